"""A chain whose older records lie elsewhere answers as one in memory, however far its disk lags."""

from __future__ import annotations

from collections.abc import Callable

from hypothesis import given
from hypothesis import strategies as st
from simulation.past import DiskPast
from simulation.world import SimCrypto, digest

from tapestry.node.protocol.chain import Chain, tokens_of
from tapestry.node.protocol.members import UNIT, Change
from tapestry.node.protocol.place import Place, genesis_place, next_place
from tapestry.node.protocol.places import place_from_dict, place_to_dict
from tapestry.node.protocol.record import Body, Member, Record, found, head_of

CRYPTO = SimCrypto("a")
GENESIS = found("spec", "a", digest(b"0"), digest(b"schema"), 10, "0" * 32, CRYPTO, founders=("a", "b", "c"))
RECENT = 3


def record_after(at: Place, members: str, forced: bool = False, changes: tuple[Change, ...] = ()) -> Record:
    named = tuple(Member(p, UNIT, digest(p.encode()), "", 7 + at.epoch) for p in sorted(members))
    state, result = digest(b"state %d" % at.epoch), digest(b"result")
    body = Body(GENESIS.run_id, at.epoch + 1, at.head, state, named, result, forced, changes=changes)
    return Record(body, head_of(body, CRYPTO), 0, ())


def test_of_a_past_that_has_lost_its_end_nothing_later_is_read():
    """A copy of the chain that is used while a fork is left: no record stands in another's place."""
    one = Lagging()
    for _ in range(9):
        one.append("abc", False)
    one.write(9)
    copy = Chain(GENESIS, past=one.past, recent=RECENT)
    assert [r.body.epoch for r in copy.after(4, 4)] == [5, 6, 7, 8]
    one.switch(5, ["ab"])
    del one.disk[5:]
    assert [r.body.epoch for r in copy.after(4, 4)] == [5] and copy.state_digest_at(5) is None


class Lagging:
    """A chain in memory, one over a disk, and what that disk has still to write."""

    def __init__(self) -> None:
        self.disk: list[Record] = []
        self.past = DiskPast(GENESIS, self.disk)
        self.whole = Chain(GENESIS)
        self.paged = Chain(GENESIS, past=self.past, recent=RECENT)
        self.queue: list[Callable[[], None]] = []

    def append(self, members: str, forced: bool) -> None:
        record = record_after(self.whole.place, members, forced)
        self.whole.append(record)
        self.paged.append(record)
        self.queue.append(lambda: self.disk.append(record))

    def switch(self, back: int, members: list[str]) -> None:
        epoch = max(0, self.whole.epoch - back)
        at, records = self.whole.place_at(epoch), []
        for named in members:
            records.append(record_after(at, named))
            at = next_place(at, records[-1])
        assert self.whole.switch(epoch, records) == self.paged.switch(epoch, records)

        def write() -> None:
            self.disk[epoch:] = records
            self.past.switched()

        self.queue.append(write)

    def write(self, count: int) -> None:
        for step in self.queue[:count]:
            step()
        del self.queue[:count]

    def agree(self) -> None:
        whole, paged = self.whole, self.paged
        epochs = range(whole.epoch + 1)
        assert (paged.epoch, paged.head, paged.tip) == (whole.epoch, whole.head, whole.tip)
        assert paged.tokens == whole.tokens == tokens_of(whole.records)
        assert [paged.place_at(e) for e in reversed(epochs)] == [whole.place_at(e) for e in reversed(epochs)]
        assert [paged.head_at(e) for e in (-1, *epochs, whole.epoch + 1)] == [
            "",
            *map(whole.head_at, epochs),
            "",
        ]
        assert list(paged.records) == list(whole.records)
        assert [paged.after(e, 2) for e in epochs] == [whole.after(e, 2) for e in epochs]
        assert [paged.state_digest_at(e) for e in epochs] == [whole.state_digest_at(e) for e in epochs]


NAMED = st.sampled_from(["a", "ab", "abc", "bc"])
STEPS = st.lists(
    st.tuples(st.just("append"), NAMED, st.booleans())
    | st.tuples(st.just("switch"), st.integers(0, 9), st.lists(NAMED, min_size=1, max_size=4))
    | st.tuples(st.just("write"), st.integers(1, 6)),
    max_size=24,
)


@given(STEPS)
def test_a_chain_over_a_disk_that_lags_answers_as_one_in_memory(steps) -> None:
    run = Lagging()
    for kind, *arguments in steps:
        getattr(run, kind)(*arguments)
        run.agree()
    run.write(len(run.queue))
    again = Chain(GENESIS, past=run.past, recent=RECENT)
    assert (again.place, again.tokens) == (run.whole.place, run.whole.tokens)


def test_what_the_disk_has_is_let_go_and_what_it_has_not_is_kept() -> None:
    run = Lagging()
    for _ in range(50):
        run.append("abc", False)
    assert len(run.paged._tail) == 50
    run.write(50)
    for _ in range(2 * RECENT):
        run.append("abc", False)
        run.write(1)
        run.agree()
    assert len(run.paged._tail) < 2 * RECENT + 1 and len(run.paged._places) < 2 * RECENT + 2


def test_nothing_is_let_go_while_the_disk_has_the_other_side_of_a_fork() -> None:
    """Records of a fork that we left and came back to would be taken for those on the disk now."""
    run = Lagging()
    for _ in range(8):
        run.append("abc", False)
    run.write(8)
    run.switch(6, ["ab"] * 12)
    run.agree()
    assert len(run.paged._tail) == 2 + 12
    run.write(1)
    run.append("abc", False)
    run.agree()
    assert len(run.paged._tail) == RECENT


def test_a_place_survives_its_text_with_every_kind_of_change() -> None:
    invite = Change("invite", "k" * 9, "2 0 guest", 99, "1" * 32)
    changes = (
        Change("admit", "d", "dora", 99, "2" * 32, (("k" * 9, "00"),)),
        Change("remove", "c", "left", 99, "3" * 32),
        Change("set", "", "train.lr 0.5", 99, "4" * 32),
        Change("charter", "", "voice fixed", 99, "5" * 32),
        Change("voice", "b", "7", 99, "6" * 32),
    )
    at = genesis_place(GENESIS)
    for record_changes, forced in (((invite,), False), (changes, False), ((), True)):
        at = next_place(at, record_after(at, "ab", forced, record_changes))
        assert place_from_dict(place_to_dict(at)) == at
    assert at.standing.since == 1 and at.roll.invites and at.roll.removed and at.roll.settings
