"""A simulated disk's records as the past of a chain: as disk/chain_file.py, but that nothing is written."""

from __future__ import annotations

from tapestry.node.protocol.chain import Past, Point, walk
from tapestry.node.protocol.place import genesis_place
from tapestry.node.protocol.record import Genesis, Record

RECENT = 3  # records that stay in memory: fewer than a fork is long
EVERY = 4  # epochs between places that are kept


class DiskPast(Past):
    """Of one life of one node."""

    def __init__(self, genesis: Genesis, records: list[Record]) -> None:
        self._genesis = genesis
        self._records = records  # the disk's own list
        self._switches = 0
        self._points: dict[str, Point] = {}  # by head

    @property
    def switches(self) -> int:
        return self._switches

    def switched(self) -> None:
        """The disk left a fork."""
        self._switches += 1

    def __len__(self) -> int:
        return len(self._records)

    def head_at(self, epoch: int) -> str:
        return self._records[epoch - 1].head if 0 < epoch <= len(self._records) else ""

    def read(self, epoch: int, count_max: int) -> tuple[Record, ...]:
        return tuple(self._records[epoch : epoch + count_max])

    def kept(self, epoch: int) -> Point | None:
        at = epoch - epoch % EVERY
        if not at:
            return None
        head = self.head_at(at)
        if head not in self._points:
            start = self.kept(at - EVERY) or Point(genesis_place(self._genesis), 0)
            self._points[head] = walk(start, self, at)
        return self._points[head]
