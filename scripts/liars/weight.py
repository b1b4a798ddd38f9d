"""says READY with 2^53 tokens, in a run whose voice is tokens

Promise: no record gives it more than max_influence of the weight. The run goes on, at one head; the loss is
at most a tenth above that of the run without it.
"""

from __future__ import annotations

from dataclasses import replace

from liars import lying
from liars.seen import Seen, loss_fault
from tapestry.node.protocol.events import Contributed
from tapestry.node.protocol.exchange import Exchange

INFLUENCE = 0.4
RUN = {"voice": '"tokens"', "max_influence": str(INFLUENCE)}
ROUNDING = 1e-3


def lie() -> None:
    honest = Exchange.contribute

    def contribute(self: Exchange, contributed: Contributed) -> None:
        honest(self, replace(contributed, weight=2**53) if lying.now() else contributed)

    Exchange.contribute = contribute  # type: ignore[method-assign]


def broken(seen: Seen) -> list[str]:
    faults = loss_fault(seen)
    if seen.share_max > INFLUENCE + ROUNDING:
        faults.append(f"it had {seen.share_max:.1%} of the weight, at most {INFLUENCE:.0%} is allowed")
    if not seen.contributed:
        faults.append("no record counts it: the attack has shown nothing")
    return faults
