"""What the tests of the node's shell need: hivemind's own warning, let through by its exact words."""

from __future__ import annotations

import logging
import warnings

with warnings.catch_warnings():
    # hivemind 1.1.12 decorates two functions of its mixture-of-experts at import.
    warnings.filterwarnings("ignore", "`torch.jit.script` is deprecated", DeprecationWarning)
    import hivemind  # noqa: F401

logging.addLevelName(logging.WARNING, "WARNING")  # which it renames, for the whole process
