"""Settings of every test."""

import os

from hypothesis import HealthCheck, settings

# Tests run in two processes on two cores, and each starts more: threads of torch that spin while they wait
# for one another made tests of the trainer four times slower. Before torch is imported; children inherit it.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# The same examples in each run, so that a run's verdict is about the change and not about its luck; a
# deadline would judge the machine, and so would the check for examples that are slow to make.
# `--hypothesis-profile=random --hypothesis-seed=N` looks elsewhere.
TIMED = (HealthCheck.too_slow,)
settings.register_profile("same", derandomize=True, deadline=None, suppress_health_check=TIMED)
settings.register_profile("random", deadline=None, suppress_health_check=TIMED)
settings.load_profile("same")
