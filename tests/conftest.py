"""Settings of every test."""

import os

from hypothesis import settings

# Tests run in two processes on two cores, and each starts more: threads of torch that spin while they wait
# for one another made tests of the trainer four times slower. Before torch is imported; children inherit it.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# The same examples in each run, so that a run's verdict is about the change and not about its luck; a
# deadline would judge the machine. `--hypothesis-profile=random --hypothesis-seed=N` looks elsewhere.
settings.register_profile("same", derandomize=True, deadline=None)
settings.register_profile("random", deadline=None)
settings.load_profile("same")
