"""Islands whose numbers nobody gives: whose word on them is doubted, and for how long.

Fewer than a quorum may force a record, where nobody hears a quorum. A record is taken on its signatures,
and its update is fetched afterwards: from whoever forced it, for nobody else has it. If that member gives
it to nobody, or its disk is lost, the others are at a head whose state they cannot come to, and so decide
nothing.

They go back then (Sync.leave_hollow) to the record whose state they hold, as if the forced ones had never
reached them. The next forced record of those who signed those is not taken for a while, which is twice as
long each time: an honest island that could not be reached is joined in the end, and a liar cannot hold
anybody for more than a part of the time that becomes ever smaller. Whoever gives an update is believed as
before.

Pure. docs/decisions/025-hollow-islands.md.
"""

from __future__ import annotations

from collections.abc import Iterable

from tapestry.node.protocol.record import Record

DOUBLINGS_MAX = 10  # of a doubt. Guess: with quorum_loss_s = 30, eight hours


class Doubts:
    """Mutable; owned by Sync. As many as there are members that forced records whose numbers were missing."""

    def __init__(self) -> None:
        self.of: dict[str, tuple[int, float]] = {}  # peer -> how often, and until when

    def hold_back(self, records: Iterable[Record], now: float) -> bool:
        """Whether a fork of these records has to wait, for who forced some of them."""
        return bool(self.of) and any(now < self.of[p][1] for p in _forced_by(records) if p in self.of)

    def add(self, records: Iterable[Record], now: float, first_s: float) -> None:
        """Nobody gave what these records are made of."""
        for peer in _forced_by(records):
            times = self.of[peer][0] + 1 if peer in self.of else 0
            self.of[peer] = times, now + first_s * 2 ** min(times, DOUBLINGS_MAX)

    def dispel(self, record: Record) -> None:
        """The update of this record was given."""
        if self.of:
            for peer in _forced_by([record]):
                self.of.pop(peer, None)


def _forced_by(records: Iterable[Record]) -> set[str]:
    return {peer for record in records if record.body.forced for peer, _ in record.signatures}
