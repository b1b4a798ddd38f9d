"""The Tapestry node: protocol, links, averaging, state, trainer, and the operator's surface.

`from tapestry.node import Swarm, SwarmError, SwarmCallback, LightningCallback` is what scripts use (api.py);
nothing of it is imported before it is asked for.
"""

from __future__ import annotations

TYPE_CHECKING = False  # as type checkers know it; `typing` would take most of a command's start
if TYPE_CHECKING:
    from typing import Any

    from tapestry.node.api import Swarm
    from tapestry.node.library.errors import SwarmError
    from tapestry.node.library.lightning import LightningCallback
    from tapestry.node.library.transformers import SwarmCallback

__all__ = ["LightningCallback", "Swarm", "SwarmCallback", "SwarmError"]


def __getattr__(name: str) -> Any:
    if name == "Swarm":
        from tapestry.node.api import Swarm

        return Swarm
    if name == "SwarmError":
        from tapestry.node.library.errors import SwarmError

        return SwarmError
    if name == "SwarmCallback":
        from tapestry.node.library.transformers import SwarmCallback

        return SwarmCallback
    if name == "LightningCallback":
        from tapestry.node.library.lightning import LightningCallback

        return LightningCallback
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
