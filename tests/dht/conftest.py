"""What the tests of the dht package share: warnings that hivemind gives, and identities and records."""

from __future__ import annotations

import pytest

# hivemind 1.1.12's own, each at import or at P2P.create: not ours to mend.
_HIVEMIND_WARNINGS = (
    "ignore:`torch.jit.script` is deprecated:DeprecationWarning",
    "ignore:path is deprecated. Use files:DeprecationWarning",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.name in ("test_swarm.py", "test_validator.py"):
            for line in _HIVEMIND_WARNINGS:
                item.add_marker(pytest.mark.filterwarnings(line))
