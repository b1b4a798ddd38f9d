"""What an end-to-end test that is itself a peer needs: a warning of hivemind let through by its words."""

from __future__ import annotations

import logging
import warnings

with warnings.catch_warnings():
    # hivemind 1.1.12 decorates two functions of its mixture-of-experts at import.
    warnings.filterwarnings("ignore", "`torch.jit.script` is deprecated", DeprecationWarning)
    import hivemind  # noqa: F401

logging.addLevelName(logging.WARNING, "WARNING")  # which it renames, for the whole process
