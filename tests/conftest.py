"""Settings of every test."""

from hypothesis import settings

# The same examples in each run, so that a run's verdict is about the change and not about its luck.
# `--hypothesis-profile=random --hypothesis-seed=N` looks elsewhere.
settings.register_profile("same", derandomize=True, deadline=None)  # a deadline would judge the machine
settings.register_profile("random", deadline=None)
settings.load_profile("same")
