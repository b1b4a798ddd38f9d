"""What the tests of the dht package need: hivemind's own warnings, each let through by its exact words."""

from __future__ import annotations

import warnings

import pytest

with warnings.catch_warnings():
    # hivemind 1.1.12 decorates two functions of its mixture-of-experts at import.
    warnings.filterwarnings("ignore", "`torch.jit.script` is deprecated", DeprecationWarning)
    import hivemind  # noqa: F401

# P2P.create finds its p2pd by an old function of importlib.resources.
_AT_P2P_CREATE = "ignore:path is deprecated. Use files:DeprecationWarning"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.name == "test_swarm.py":
            item.add_marker(pytest.mark.filterwarnings(_AT_P2P_CREATE))
