"""A chain of records: the newest in memory, older ones where they are kept.

What is in the past lies in a `Past`, the store's files for a node (disk/chain_file.py), and is read when it
is asked for; without a Past all records stay in memory, as in the simulator
(docs/decisions/017-chain-on-disk.md). What may follow what is place.py's.

Standard library only.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple, Protocol, overload

from tapestry.node.protocol.canon import Crypto
from tapestry.node.protocol.members import Roll
from tapestry.node.protocol.path import last_before, leads, step_from, stretches, updates_from
from tapestry.node.protocol.place import Place, Tip, check_record, genesis_place, next_place
from tapestry.node.protocol.record import Genesis, Record
from tapestry.node.protocol.settings import Settings

RECENT = 256  # records of a chain with a past that stay in memory. Guess: 7 MB of 64 members
PAGE = 256  # records that are read at a time


class Past(Protocol):
    """Records that lie elsewhere, from the first on: what is read of them is what was appended.

    It may lag behind the chain that reads it, by what was decided and is not written yet, and lose its end
    when a fork is left; `switches` says how often that was.
    """

    @property
    def switches(self) -> int: ...

    def __len__(self) -> int: ...

    def head_at(self, epoch: int) -> str:
        """Of record `epoch`, from 1 on; "" where there is none."""
        ...

    def read(self, epoch: int, count_max: int) -> tuple[Record, ...]:
        """Records after `epoch`, in order."""
        ...

    def kept(self, epoch: int) -> Point | None:
        """The last place up to `epoch` that is kept, so that not all records before must be read again."""
        ...


class Point(NamedTuple):
    """What the records up to an epoch come to."""

    place: Place
    tokens: int  # that members say they trained on


def walk(at: Point, past: Past, epoch: int) -> Point:
    """From `at` to `epoch`, by the records between. Raises LookupError where they are gone."""
    place, tokens = at
    while place.epoch < epoch:
        page = past.read(place.epoch, min(PAGE, epoch - place.epoch))
        if not page:
            raise LookupError(f"record {place.epoch + 1} is gone")
        for record in page:
            place = next_place(place, record)
        tokens += tokens_of(page)
    return Point(place, tokens)


def point_at(genesis: Genesis, past: Past, epoch: int, known: Point | None = None) -> Point:
    """Of one of the past's epochs. `known`: one from where to go, if it is of no later epoch."""
    start = past.kept(epoch) or Point(genesis_place(genesis), 0)
    if known is not None and start.place.epoch < known.place.epoch <= epoch:
        start = known
    return walk(start, past, epoch)


class Chain:
    """The records from the genesis to the head, each checked when it was added.

    Of `past`, records up to `_base` are ours; those after them, which it may have too, are in `_tail`. The
    tail is cut when the past has them, but not while it lags behind a fork that we left: what lies there then
    may be of the other side.
    """

    def __init__(
        self,
        genesis: Genesis,
        records: Iterable[Record] = (),  # that follow `past`; from our own disk: checked before
        past: Past | None = None,
        recent: int = RECENT,  # records that stay in memory at least
    ) -> None:
        self.genesis = genesis
        self._past = past
        self._recent = recent
        self._switches = 0  # as the past will count them when it has caught up
        self._base = 0
        self._tail: list[Record] = []  # of epochs _base + 1 and on
        self._places = [genesis_place(genesis)]  # after epochs _base and on
        self._walked: Point | None = None  # the last that was asked for before _base
        self.tokens = 0  # that members say they trained on, up to the head
        if past is not None:
            self._open(past)
        for record in records:
            self.append(record)

    def _open(self, past: Past) -> None:
        count = len(past)
        self._switches, self._base = past.switches, max(0, count - self._recent)
        place, self.tokens = point_at(self.genesis, past, self._base)
        self._places = [place]
        for record in past.read(self._base, count - self._base):
            self.append(record)

    @property
    def epoch(self) -> int:
        return self._base + len(self._tail)

    @property
    def head(self) -> str:
        return self._places[-1].head

    @property
    def place(self) -> Place:
        return self._places[-1]

    @property
    def tip(self) -> Tip:
        return self._places[-1].tip

    @property
    def roll(self) -> Roll:
        """Who belongs to the run now."""
        return self._places[-1].roll

    @property
    def records(self) -> Sequence[Record]:
        """records[i].body.epoch == i + 1; those before the newest are read when they are asked for."""
        return self._tail if self._past is None else _Records(self)

    def head_at(self, epoch: int) -> str:
        """The head of `epoch`; "" where we have none, so that it equals nobody's."""
        if self._base <= epoch <= self.epoch:
            return self._places[epoch - self._base].head
        if not epoch:
            return self.genesis.run_id
        return self._past.head_at(epoch) if self._past is not None and 0 < epoch < self._base else ""

    def place_at(self, epoch: int) -> Place:
        """Where the chain was after record `epoch`."""
        if epoch >= self._base:
            return self._places[epoch - self._base]
        return self._before(epoch).place

    def electorate_at(self, epoch: int) -> tuple[str, ...]:
        return self.place_at(epoch).electorate

    @property
    def rolled(self) -> Mapping[int, int]:
        """As in Roll, of the head's: what path.py asks for."""
        return self.roll.rolled

    def leads(self, at: int, epoch: int | None = None) -> bool:
        """Whether state `at` lies on the path to state `epoch`, or the head's."""
        return leads(self.rolled, at, self.epoch if epoch is None else epoch)

    def step_from(self, at: int, epoch: int | None = None) -> int:
        """The next epoch on the way from state `at` to state `epoch`, or the head's."""
        return step_from(self.rolled, at, self.epoch if epoch is None else epoch)

    def last_before(self, at: int) -> int:
        """The newest epoch on the path to the head's state that is not after `at`."""
        return last_before(self.rolled, at, self.epoch)

    def updates_after(self, at: int, count_max: int) -> tuple[Record, ...]:
        """Records whose updates lead on from state `at` to the head's, so many at most, and not beyond where
        the state is an earlier one again."""
        if self.rolled:
            count_max = min(count_max, updates_from(self.rolled, at, self.epoch))
        return self.after(at, count_max)

    def state_digest_at(self, epoch: int) -> str | None:
        """The digest of state `epoch` as signed: by the genesis or by the record after. None at the head,
        unless that is an earlier state again."""
        if epoch == 0:
            return self.genesis.state_digest
        if epoch in self.rolled:
            return self.state_digest_at(self.rolled[epoch])
        after = self.after(epoch, 1)
        return after[0].body.state_digest if after else None

    def append(self, record: Record) -> None:
        """A checked record. Our bug if it does not follow."""
        assert record.body.epoch == self.epoch + 1 and record.body.prev == self.head
        self._places.append(next_place(self._places[-1], record))
        self._tail.append(record)
        self.tokens += tokens_of((record,))
        if self._past is not None and len(self._tail) >= 2 * self._recent:
            self._let_go(self._past)

    def _let_go(self, past: Past) -> None:
        """Of what the past has by now, keep only the newest in memory."""
        if past.switches != self._switches:
            return
        count = min(len(self._tail) - self._recent, len(past) - self._base)
        if count > 0:
            assert past.head_at(self._base + count) == self._tail[count - 1].head
            del self._tail[:count], self._places[:count]
            self._base += count

    def switch(self, epoch: int, records: Sequence[Record]) -> tuple[int, int]:
        """Leave a fork: checked records take the place of those after `epoch`. How many were dropped, and how
        many tokens are behind those."""
        count, tokens = self.epoch - epoch, self.tokens
        if epoch >= self._base:
            self.tokens -= tokens_of(self._tail[epoch - self._base :])
            del self._tail[epoch - self._base :], self._places[epoch + 1 - self._base :]
        else:
            place, self.tokens = self._before(epoch)
            self._base, self._tail, self._places, self._walked = epoch, [], [place], None
        self._switches += 1
        tokens -= self.tokens
        for record in records:
            self.append(record)
        return count, tokens

    def _before(self, epoch: int) -> Point:
        """What the past says of an epoch before the tail."""
        assert self._past is not None and epoch >= 0
        self._walked = point_at(self.genesis, self._past, epoch, self._walked)
        return self._walked

    def after(self, epoch: int, count_max: int) -> tuple[Record, ...]:
        """Records after `epoch`, so many at most."""
        if epoch >= self._base:
            return tuple(self._tail[epoch - self._base : epoch - self._base + count_max])
        assert self._past is not None
        count = min(count_max, self._base - epoch)
        found = self._past.read(epoch, count)
        if len(found) < count:  # a fork was left since this copy was made: nothing later follows
            return found
        return found + self.after(self._base, count_max - len(found))

    def settings_of(self, record: Record) -> Settings:
        """What records before it have changed of the spec: it is a record of this chain."""
        return self.place_at(record.body.epoch - 1).roll.settings

    def check(
        self,
        record: Record,
        crypto: Crypto,
        max_influence: float = 1.0,
        on_quorum_loss: str = "continue",
    ) -> None:
        """Whether `record` may be appended. Raises InvalidRecord."""
        check_record(record, self.place, crypto, max_influence, on_quorum_loss)


class _Records(Sequence[Record]):
    """Of a chain with a past. A slice is read whole; to go over all of them reads a page at a time."""

    def __init__(self, chain: Chain) -> None:
        self._chain = chain

    def __len__(self) -> int:
        return self._chain.epoch

    @overload
    def __getitem__(self, index: int) -> Record: ...
    @overload
    def __getitem__(self, index: slice) -> tuple[Record, ...]: ...

    def __getitem__(self, index: int | slice) -> Record | tuple[Record, ...]:
        if isinstance(index, slice):
            start, stop, step = index.indices(len(self))
            assert step == 1
            return self._chain.after(start, max(0, stop - start))
        epoch = index if index >= 0 else len(self) + index
        found = self._chain.after(epoch, 1) if 0 <= epoch < len(self) else ()
        if not found:
            raise IndexError(f"no record {epoch + 1}")
        return found[0]

    def __iter__(self) -> Iterator[Record]:
        return records_from(self._chain, 0, self._chain.epoch)


def records_from(chain: Chain, epoch: int, end: int) -> Iterator[Record]:
    """Those after `epoch` up to `end`, however many, a page at a time."""
    while epoch < end:
        page = chain.after(epoch, min(PAGE, end - epoch))
        if not page:
            raise LookupError(f"record {epoch + 1} is gone")
        yield from page
        epoch += len(page)


def makers(chain: Chain, epoch: int) -> Iterator[Record]:
    """The records whose updates made state `epoch`: without those that were undone."""
    for stretch in stretches(chain.rolled, epoch):
        yield from records_from(chain, stretch.start, stretch.stop - 1)


def tokens_of(records: Iterable[Record]) -> int:
    """That their members say they trained on."""
    return sum(m.tokens for r in records for m in r.body.members)
