"""What the three desks of a node share: the loop that they work for.

A desk takes a part of the core's outputs, one method for each kind, and answers with inputs. `outputs` names
the methods; one that returns a coroutine is waited for before the next output is executed.
"""

from __future__ import annotations

from collections.abc import Callable, Coroutine, Mapping
from typing import Any, Protocol

from tapestry.node.protocol.events import Input
from tapestry.node.protocol.snapshot import Membership, Snapshot

Job = Coroutine[Any, Any, None]
Outputs = Mapping[type, Callable[[Any], Job | None]]  # kind of output -> what executes it


class Loop(Protocol):
    """The part of daemon/runtime.py that a desk sees."""

    def feed(self, inp: Input) -> None:
        """An input to the core, now."""
        ...

    def spawn(self, job: Job) -> None:
        """Run `job` beside the loop, as long as the node runs."""
        ...

    def snapshot(self) -> Snapshot:
        """What the core shows at this moment."""
        ...

    def membership(self) -> Membership:
        """The part of it that is cheap, whatever the size of the model."""
        ...

    def now(self) -> float: ...

    async def compute(self, function: Callable[..., Any], *args: Any) -> Any:
        """Call `function` in a thread for work on tensors."""
        ...
