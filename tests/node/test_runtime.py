"""The loop around the core and its desks: what breaks ends the node, and what must not does not."""

from __future__ import annotations

import asyncio
import logging
import math
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tapestry.compression.refusals import RefusedPayload, RefusedVector
from tapestry.node.daemon import network_desk, trainer_desk
from tapestry.node.daemon.audit_streams import Auditor
from tapestry.node.daemon.disk_desk import DiskDesk
from tapestry.node.daemon.goal import Goal
from tapestry.node.daemon.keeper import Left
from tapestry.node.daemon.runtime import Runtime
from tapestry.node.daemon.training_view import TrainingView
from tapestry.node.daemon.views import Reporter
from tapestry.node.net.network import Where
from tapestry.node.net.repeats import Repeats
from tapestry.node.net.throttle import Throttles
from tapestry.node.net.transfer import DonorFailed, WantedUpdate
from tapestry.node.net.wire import RemoteProtocolError
from tapestry.node.protocol import events as ev
from tapestry.node.protocol.agreement import Agreement
from tapestry.node.protocol.audit import UNPROVEN, SignedMean
from tapestry.node.protocol.events import Vote
from tapestry.node.protocol.members import NO_ROLL, Change, Invite, rollback_value
from tapestry.node.protocol.messages import Changes, Stage
from tapestry.node.protocol.record import Body, Member, Record
from tapestry.node.protocol.snapshot import Membership, Snapshot
from tapestry.node.spec.node import ENDLESS, Ending
from tapestry.node.surface.logs import LiveLine, printable
from tapestry.node.surface.metrics import Metrics
from tapestry.node.trainer import messages as tm
from tapestry.node.trainer.process import Died

PEER, OTHER = "12D3KooWPeer", "12D3KooWOther"
RUN = "ab" * 32


class FakeCore:
    """Says what a test puts in its mouth."""

    def __init__(self) -> None:
        self.says: list[ev.Output] = []
        self.heard: list[ev.Input] = []
        self.raises: Exception | None = None
        self.rolled: dict[int, int] = {}
        self.pending: tuple[Change, ...] = ()
        self.invites: dict[str, Invite] = {}

    def handle(self, inp: ev.Input, now: float) -> list[ev.Output]:
        self.heard.append(inp)
        if self.raises is not None and not isinstance(inp, ev.Stopping):
            raise self.raises
        says, self.says = self.says, []
        return says

    def wakeup_at(self, now: float) -> float:
        return now + 1000

    def snapshot(self, now: float) -> Snapshot:
        head = "cd" * 32
        return Snapshot(
            "12D3KooWMe",
            RUN,
            "training",
            None,
            at_head=True,
            chain_epoch=3,
            chain_head=head,
            state_epoch=3,
            state_head=head,
            state_digest="ef" * 32,
            params=9,
            round=None,
            peers=(),
            roll=replace(NO_ROLL, rolled=self.rolled, invites=self.invites),
            pending=self.pending,
        )

    def membership(self) -> Membership:
        return Membership(3, replace(NO_ROLL, rolled=self.rolled, invites=self.invites), self.pending)


class FakeDonor:
    """Serves until it is let go."""

    def __init__(self) -> None:
        self.serving = 0

    async def serve(self, reader: object, writer: object, serving: object, peer: str) -> None:
        self.serving += 1
        try:
            await asyncio.get_running_loop().create_future()
        finally:
            self.serving -= 1


class FakeKeeper:
    def __init__(self) -> None:
        self.donors: list[FakeDonor] = []
        self.checkpoints = 0
        self.back_to: int | None = -1
        self.abandoned = False
        self.fetching = asyncio.Event()
        self.reached = (3, "ef" * 32)
        self.run_id = RUN
        self.state = SimpleNamespace(size_bytes=1)
        self.votes: list[object] = []
        self.branches = SimpleNamespace(names=())
        self.writing, self.disk_is_free = threading.Event(), threading.Event()
        self.disk_is_free.set()

    def donor(self, on_bytes: object, genesis_only: bool = False) -> FakeDonor:
        self.donors.append(FakeDonor())
        return self.donors[-1]

    def abandon_checkpoint(self) -> None:
        self.abandoned = True

    def checkpoint(self, chain: object) -> bool:
        self.checkpoints += 1
        self.writing.set()
        self.disk_is_free.wait(5)
        return True

    def prune(self, back_to: int | None = None) -> None:
        self.back_to = back_to

    def write_vote(self, vote: object) -> None:
        self.votes.append(vote)

    def held_back_to(self, epoch: int) -> str:
        return ""

    def drop_result(self, committed: bool) -> None: ...

    def copy_of_chain(self) -> None: ...

    async def fetch_update(
        self, opener: object, wanted: WantedUpdate, on_bytes: object
    ) -> tuple[SignedMean, ...]:
        if wanted.accepted is not None and wanted.result != wanted.accepted.result:
            raise RemoteProtocolError("unproven", "not signed")
        return (SignedMean(OTHER, "ab" * 32, "s"),) if wanted.accepted is not None else ()

    async def fetch_state(self, *_: object) -> None:
        self.fetching.set()
        await asyncio.get_running_loop().create_future()


class FakeAveraging:
    """Copies when it is let go."""

    def __init__(self) -> None:
        self.go = threading.Event()
        self.go.set()
        self.refuses = False

    def take(self, buffer: bytes, copy: bool) -> tuple[bytes, ...]:
        self.go.wait(5)
        if self.refuses:
            raise RefusedPayload("not_finite", "x")
        return tuple(bytes(buffer[shard : shard + 1]) for shard in range(3))

    def commit(self, contributor: str, epoch: int, payloads: tuple[bytes, ...]) -> str:
        return f"{contributor} {epoch} {b''.join(payloads)!r}"

    def path(self, contribution: str, shard: int) -> tuple[str, ...]:
        return ()

    def frame(self, shard: int, payload: bytes) -> bytes:
        return payload

    def reduce(self, shard: int, payloads: tuple[bytes, ...], weights: tuple[int, ...]) -> None:
        raise RefusedVector("overflow", "the sum is too large")

    def longest(self, shard: int, payloads: tuple[bytes, ...]) -> int:
        return payloads.index(max(payloads))


class FakeTrainer:
    """Writes down what it is told."""

    def __init__(self) -> None:
        self.contribution = bytearray(b"abc")
        self.must_copy = True
        self.begun: list[tuple[object, ...]] = []
        self.told: list[tuple[str, int]] = []

    def begin(self, *args: object) -> None:
        self.begun.append(args)

    def evaluate(self, epoch: int) -> None: ...

    def abort(self) -> None: ...

    def save(self, epoch: int) -> None:
        self.told.append(("save", epoch))

    def end(self) -> None:
        self.told.append(("end", 0))

    def reject(self, why: str) -> None:
        self.told.append((why, 0))

    def forget(self) -> None:
        self.told.append(("forget", 0))

    def settle(self, generation: int) -> None:
        self.told.append(("settle", generation))

    def go_on(self, epoch: int) -> None:
        self.told.append(("go on", epoch))


class FakeNetwork:
    async def hosts_of(self, peer: str) -> tuple[str, ...]:
        return ()

    def __init__(self) -> None:
        self.addresses = ("/ip4/127.0.0.1/tcp/1",)
        self.given = (PEER, OTHER)
        self.sent: list[tuple[str, int, bytes]] = []

    def send_bulk(self, peer: str, message: Any, kind: str, payload: bytes) -> None:
        self.sent.append((kind, message.shard, payload))

    def drop_bulk(self) -> None: ...

    def where(self) -> Where:
        return Where(self.addresses)

    def tell_moved(self) -> None: ...


class Bench:
    """A runtime among fakes."""

    def __init__(self, ending: Ending = ENDLESS, forbidden: Callable[[], str] = lambda: "") -> None:
        self.core, self.keeper = FakeCore(), FakeKeeper()
        self.averaging, self.trainer, self.network = FakeAveraging(), FakeTrainer(), FakeNetwork()
        self.metrics = Metrics("0")
        fakes: Any = (self.core, self.keeper, self.averaging, self.trainer, self.network)
        auditor = Auditor(None, "me", RUN, Path("none"), Throttles())  # type: ignore[arg-type]  # draws nothing
        self.runtime = Runtime(*fakes, self._reporter(), Goal(ending, forbidden), auditor)

    def _reporter(self) -> Reporter:
        return Reporter(self.metrics, LiveLine(None, enabled=False))

    def says(self, *outputs: ev.Output) -> None:
        """The core answers its next input with these."""
        self.core.says = list(outputs)
        self.runtime.feed(ev.Tick())

    def heard(self, kind: type) -> list[Any]:
        return [inp for inp in self.core.heard if isinstance(inp, kind)]

    def states(self) -> list[tuple[bool, str]]:
        """What the core has heard of the trainer."""
        return [(inp.up, inp.reason) for inp in self.heard(ev.TrainerState)]

    def contributed(self) -> list[ev.Contributed]:
        """What the core has heard of contributions."""
        return [inp for inp in self.core.heard if isinstance(inp, ev.Contributed)]

    async def __aenter__(self) -> Bench:
        self.task = asyncio.create_task(self.runtime.run())
        await turns()
        return self

    async def __aexit__(self, *_: object) -> None:
        self.task.cancel()
        await asyncio.wait([self.task])


async def turns() -> None:
    for _ in range(20):
        await asyncio.sleep(0)


def run(main: Any) -> None:
    async def within_time() -> None:
        async with asyncio.timeout(10):
            await main()

    asyncio.run(within_time())


@pytest.mark.parametrize("by", ["a stream's handler", "the timer"])
def test_a_core_that_breaks_off_ends_the_node_whoever_called_it(by):
    async def main() -> None:
        async with Bench() as bench:
            bench.core.raises = AssertionError("our bug")
            if by == "the timer":
                asyncio.get_running_loop().call_soon(bench.runtime.feed, ev.Tick())
            else:
                bench.runtime.network.on_up(PEER)  # swallowed by whoever serves the stream
            await asyncio.wait([bench.task])
            with pytest.raises(ExceptionGroup) as ended:
                bench.task.result()
            assert ended.group_contains(AssertionError, match="our bug")

    run(main)


def test_a_node_at_its_goal_begins_no_epoch_and_is_done():
    async def main() -> None:
        async with Bench(Ending(epochs=1)) as bench:
            bench.says(ev.Train(3, "cd" * 32, ""), ev.Moved(3, "training", Stage.TRAINING))
            await turns()
            assert len(bench.trainer.begun) == 1 and not bench.runtime.done.is_set()
            bench.says(ev.Train(4, "ce" * 32, "cd" * 32), ev.Moved(4, "training", Stage.TRAINING))
            await turns()
            assert len(bench.trainer.begun) == 1, "what it began would hold the others up"
            assert bench.runtime.done.is_set()

    run(main)


def test_an_admission_by_an_expired_invitation_is_refused_by_its_name():
    async def main() -> None:
        async with Bench() as bench:
            bench.core.invites = {"late": Invite("", 20, 1), "good": Invite("", 20, 0)}
            late, good = (
                Change("admit", PEER, "", 9, "ab" * 16, ((key, "ab"),)) for key in bench.core.invites
            )
            bench.runtime.network.on_message(OTHER, Changes((late, good)))
            assert bench.heard(ev.Received) == [ev.Received(OTHER, Changes((good,)))]
            assert 'tapestry_refused_total{reason="expired"} 1.0' in bench.metrics.render().decode()

    run(main)


def test_expired_invitations_are_taken_back_after_a_record_that_a_round_made():
    async def main() -> None:
        async with Bench() as bench:
            looked: list[int] = []
            bench.runtime.members.take_back = lambda: looked.append(1)  # type: ignore[method-assign]
            bench.runtime._appended((), False, 3)
            assert not looked, "another branch: its rounds are over"
            bench.runtime._appended((), False, None)
            assert looked

    run(main)


def test_data_that_may_not_be_used_any_more_are_neither_trained_on_nor_contributed():
    why = ""

    async def main() -> None:
        nonlocal why
        async with Bench(forbidden=lambda: why) as bench:
            bench.says(ev.Train(3, "cd" * 32, ""))
            await turns()
            why = "data /texts is not read: revoked"
            bench.runtime.trainer.on_event(CONTRIBUTION)
            await turns()
            assert len(bench.trainer.begun) == 1 and bench.contributed() == []
            bench.says(ev.Train(4, "ce" * 32, "cd" * 32))
            await turns()
            assert len(bench.trainer.begun) == 1
            down = [inp for inp in bench.core.heard if isinstance(inp, ev.TrainerState)]
            assert down and not down[-1].up and "revoked" in down[-1].reason

    run(main)


HELLO = tm.Hello((), (), 0, 0, "cpu", -1, "")


def test_training_goes_on_when_a_data_toml_that_could_not_be_read_is_mended(monkeypatch):
    """A slip in an editor ended it until somebody started the node again."""
    why = ""
    monkeypatch.setattr(trainer_desk, "ASK_AGAIN_S", 0.0)

    async def main() -> None:
        nonlocal why
        async with Bench(forbidden=lambda: why) as bench:
            bench.runtime.trainer.on_event(HELLO)
            why = "data.toml: not valid TOML"
            bench.says(ev.Train(3, "cd" * 32, ""))
            await turns()
            why = "data /texts is not read: revoked"
            await turns()
            assert bench.states() == [(True, ""), (False, "data.toml: not valid TOML"), (False, why)]
            why = ""
            await turns()
            assert bench.states()[-1] == (True, "") and bench.trainer.begun == []
            bench.says(ev.Train(3, "cd" * 32, ""))
            await turns()
            assert len(bench.trainer.begun) == 1 and bench.runtime.reporter.training.trouble == ""

    run(main)


def test_a_trainer_that_is_gone_is_not_called_up_because_its_data_are_allowed(monkeypatch):
    why = "data.toml: not valid TOML"
    monkeypatch.setattr(trainer_desk, "ASK_AGAIN_S", 0.0)

    async def main() -> None:
        nonlocal why
        async with Bench(forbidden=lambda: why) as bench:
            bench.says(ev.Train(3, "cd" * 32, ""))
            await turns()
            why = ""
            await turns()
            assert bench.states() == [(False, "data.toml: not valid TOML")]

    run(main)


def test_a_contribution_waits_for_a_data_toml_that_is_being_saved(monkeypatch):
    answers = iter(["", "data.toml: not valid TOML"])
    monkeypatch.setattr(trainer_desk, "ASK_AGAIN_S", 0.0)

    async def main() -> None:
        async with Bench(forbidden=lambda: next(answers, "")) as bench:
            bench.says(ev.Train(3, "cd" * 32, ""))
            await turns()
            bench.runtime.trainer.on_event(CONTRIBUTION)
            await until(bench.contributed)
            assert bench.states() == []

    run(main)


def test_a_result_is_not_measured_on_data_that_may_not_be_used_any_more():
    why = "data /texts is not read: revoked"

    async def main() -> None:
        async with Bench(forbidden=lambda: why) as bench:
            bench.trainer.can_judge = True
            bench.says(ev.Judge(SimpleNamespace(epoch=4, prev="cd" * 32), "ce" * 32, ()))
            await until(lambda: bench.heard(ev.Judged))
            (judged,) = bench.heard(ev.Judged)
            assert judged.worse is None

    run(main)


def test_leaving_does_not_wait_for_a_state_that_is_being_fetched():
    async def main() -> None:
        async with Bench() as bench:
            bench.says(ev.FetchState((PEER,), 2))
            await bench.keeper.fetching.wait()
            async with asyncio.timeout(1):
                await bench.runtime.leave()
            assert bench.keeper.checkpoints == 1

    run(main)


def test_leaving_has_the_trainer_end_at_once_and_leaves_a_large_state_to_the_update_log():
    async def main() -> None:
        for size_bytes, checkpoints in ((1 << 20, 1), (1 << 30, 0)):
            async with Bench() as bench:
                bench.keeper.state.size_bytes = size_bytes
                await bench.runtime.leave()
                assert bench.trainer.told == [("save", 3)] * checkpoints + [("end", 0)]
                assert (bench.keeper.checkpoints, bench.keeper.abandoned) == (checkpoints, not checkpoints)

    run(main)


CONTRIBUTION = tm.Contribution(3, 1, 8, 1.0, 2.0, 8, 1, 0.0)


async def until(condition: Any) -> None:
    for _ in range(5000):
        if condition():
            return
        await asyncio.sleep(0.001)


def test_a_fetch_of_an_accepted_value_answers_with_who_made_it_or_that_nobody_has():
    body = Body(RUN, 4, "cd" * 32, "ef" * 32, (), "aa" * 32)

    async def main() -> None:
        async with Bench() as bench:
            for result, accepted in ((body.result, body), ("bb" * 32, body), ("bb" * 32, None)):
                bench.says(ev.FetchUpdate(4, "dd" * 32, result, PEER, accepted))
                await turns()
            answers = [one for one in bench.core.heard if isinstance(one, ev.UpdateFetched | ev.FetchFailed)]
            made, lie, of_record = answers
            assert made == ev.UpdateFetched("dd" * 32, (SignedMean(OTHER, "ab" * 32, "s"),))
            assert lie == ev.FetchFailed(PEER, "dd" * 32, UNPROVEN)
            assert of_record == ev.UpdateFetched("dd" * 32, ())

    run(main)


def test_a_contribution_names_the_base_that_it_was_made_from():
    async def main() -> None:
        async with Bench() as bench:
            bench.averaging.go.clear()
            bench.says(ev.Train(3, "head 3", "head 2"))
            await until(lambda: bench.trainer.begun)
            bench.runtime.trainer.on_event(CONTRIBUTION)
            await turns()
            bench.says(ev.Train(3, "on another fork", ""))  # while it is copied
            await turns()
            bench.averaging.go.set()
            await until(lambda: len(bench.trainer.begun) == 2 and bench.contributed())
            assert [(c.epoch, c.base) for c in bench.contributed()] == [(3, "head 3")]

    run(main)


def test_a_begin_waits_till_the_contribution_before_it_has_been_copied():
    async def main() -> None:
        async with Bench() as bench:
            bench.averaging.go.clear()
            bench.runtime.trainer.on_event(CONTRIBUTION)
            await turns()
            bench.says(ev.Train(4, "", ""))
            await turns()
            assert not bench.trainer.begun and not bench.contributed()
            bench.averaging.go.set()
            await until(lambda: bench.trainer.begun and bench.contributed())
            assert [c.blobs for c in bench.contributed()] == [(b"a", b"b", b"c")]

    run(main)


def test_the_shards_that_are_sent_are_those_that_were_taken():
    async def main() -> None:
        async with Bench() as bench:
            bench.says(ev.SendShard(PEER, 3, "ab" * 16, 1, b"b"))
            await turns()
            assert bench.network.sent == [("contribution", 1, b"b")]

    run(main)


def test_a_contribution_that_is_refused_is_never_announced_and_its_trainer_is_replaced():
    """The core was told that no trainer was up, and the trainer nothing: neither said a word again."""

    async def main() -> None:
        async with Bench() as bench:
            bench.averaging.refuses = True
            bench.runtime.trainer.on_event(CONTRIBUTION)
            await until(lambda: bench.trainer.told)
            assert not bench.contributed()
            assert [text for text, _ in bench.trainer.told] == ["not_finite: x"], "another takes its place"
            assert b'tapestry_refused_total{reason="not_finite"} 1.0' in bench.metrics.render()

    run(main)


@pytest.mark.parametrize(("named", "settled"), [("ours", [1]), ("another of ours", [-1]), ("none", [])])
def test_the_trainer_is_told_whether_its_contribution_counted(named, settled):
    async def main() -> None:
        async with Bench() as bench:
            bench.runtime.trainer.on_event(CONTRIBUTION)
            await until(bench.contributed)
            (contributed,) = bench.contributed()
            names = {"ours": contributed.contribution, "another of ours": "ab" * 16, "none": ""}
            bench.says(ev.EndRound(3, "committed", names[named]))
            await turns()
            assert bench.trainer.told == [("settle", generation) for generation in settled]

    run(main)


def test_the_trainer_is_told_which_state_it_begins_from_and_which_was_before():
    async def main() -> None:
        async with Bench() as bench:
            bench.says(ev.Train(0, "head 0", ""), ev.Train(7, "head 7", "head 6"))
            await turns()
            assert bench.trainer.begun == [(0, "head 0", "", {}), (7, "head 7", "head 6", {})]

    run(main)


def hello(inner_epoch: int) -> tm.Hello:
    return tm.Hello((), (), 1, 1, "cpu", inner_epoch, "", (), ())


def test_moments_of_what_was_undone_are_neither_kept_nor_saved_as_those_of_the_state_that_is_there_again():
    async def main() -> None:
        async with Bench() as bench:
            bench.runtime.trainer.on_event(hello(2))
            bench.says(ev.Train(4, "head 4", "head 3"))
            await turns()
            bench.core.rolled = {5: 3}
            bench.runtime.trainer.save(
                5
            )  # a checkpoint of the state that is there again, before an epoch began
            assert bench.trainer.told == []
            bench.says(ev.Train(5, "head 5", ""), ev.Train(6, "head 6", "head 5"))
            await turns()
            bench.runtime.trainer.save(6)
            assert bench.trainer.told == [("forget", 0), ("save", 6)], "once, and then they are of this line"

    run(main)


def test_a_trainer_that_comes_up_with_moments_of_what_was_undone_is_told_before_it_goes_on():
    async def main() -> None:
        async with Bench() as bench:
            bench.core.rolled = {5: 3}
            bench.says(ev.Train(6, "head 6", ""))  # none is up
            await turns()
            bench.runtime.trainer.on_event(hello(6))
            assert bench.trainer.told == [], "what it saved since is of this line"
            bench.runtime.trainer.on_event(Died(1, 0.0, ()))
            bench.runtime.trainer.on_event(hello(4))
            assert bench.trainer.told == [("forget", 0)]

    run(main)


def test_a_vote_and_what_is_said_after_it_wait_for_no_checkpoint():
    """A member that wrote a large one was silent for so long that the others went on without it."""

    async def main() -> None:
        async with Bench() as bench:
            bench.keeper.disk_is_free.clear()
            leaving = asyncio.create_task(bench.runtime.leave())
            await until(bench.keeper.writing.is_set)
            vote = Vote(3, "cd" * 32, -1, -1, None, "", (0, 0, 0))
            bench.says(ev.PersistVote(vote), ev.Note("said after it"))
            await until(lambda: bench.keeper.votes == [vote])
            assert not leaving.done() and bench.keeper.back_to == -1, "nothing is dropped before it is there"
            bench.keeper.disk_is_free.set()
            await leaving
            assert bench.keeper.back_to is None

    run(main)


def test_only_a_rollback_that_this_node_signed_makes_its_disk_keep_more():
    async def main() -> None:
        async with Bench() as bench:
            back = Change("rollback", "", rollback_value(2, "ab" * 32, "why"), 9, "cd" * 16, ((PEER, ""),))
            bench.core.pending = (back,)
            await bench.runtime.leave()
            assert bench.keeper.back_to is None
        async with Bench() as bench:
            bench.core.pending = (replace(back, signatures=((PEER, ""), ("12D3KooWMe", ""))),)
            await bench.runtime.leave()
            assert bench.keeper.back_to == 2

    run(main)


def test_the_trainer_goes_on_when_an_exchange_begins():
    async def main() -> None:
        async with Bench() as bench:
            bench.says(ev.ExchangeBegan(3), ev.ExchangeBegan(3))
            await turns()
            assert bench.trainer.told == [("go on", 3), ("go on", 3)]

    run(main)


def test_every_output_has_a_desk():
    assert set(Bench().runtime._execute) == set(ev.Output.__args__)


def test_what_a_trainer_says_while_the_node_ends_is_dropped():
    """It ended a node with a traceback in place of exit code 0."""

    async def job() -> None:
        raise AssertionError("it is not begun")

    async def main() -> None:
        runtime = Bench().runtime
        async with asyncio.TaskGroup() as tasks:
            runtime._tasks = tasks
        runtime.spawn(job())

    run(main)


def test_steps_taken_ahead_of_a_round_are_counted_once_each():
    view, taken = TrainingView(), []
    progress = [(4, 8), (5, 1), (5, 3), (5, 3), (5, 8), (6, 8), (6, 2), (6, 8)]  # 6 was begun from nothing
    for epoch, step in progress:
        view.on_event(tm.Progress(epoch, 1, step, 8, 2.0, 10 * step, 1.0), 0.0)
        taken.append(view.take_progress())
    assert taken == [(8, 80), (1, 10), (2, 20), (0, 0), (5, 50), (8, 80), (2, 20), (6, 60)]
    assert view.tokens_total == 320


def test_one_peer_cannot_take_all_that_a_donor_serves():
    async def main() -> None:
        async with Bench() as bench:
            streams: Any = (None, None)
            serve = bench.runtime.network.serve_state
            mine = [asyncio.create_task(serve(PEER, *streams)) for _ in range(100)]
            other = asyncio.create_task(serve(OTHER, *streams))
            await turns()
            _, state = bench.keeper.donors
            assert state.serving == network_desk.STATE_STREAMS_MAX + 1 and not other.done()
            for task in (*mine, other):
                task.cancel()
            await asyncio.wait([*mine, other])
            assert not bench.runtime.network._state_door.open

    run(main)


def test_a_joiner_learns_the_genesis_while_all_that_give_state_are_busy():
    async def main() -> None:
        async with Bench() as bench:
            streams: Any = (None, None)
            tasks = [
                asyncio.create_task(bench.runtime.network.serve_state(PEER, *streams)),
                asyncio.create_task(bench.runtime.network.serve_genesis(OTHER, *streams)),
            ]
            await turns()
            assert [donor.serving for donor in bench.keeper.donors] == [1, 1]
            for task in tasks:
                task.cancel()
            await asyncio.wait(tasks)

    run(main)


def test_who_holds_a_genesis_stream_open_is_shown_out(monkeypatch):
    async def main() -> None:
        monkeypatch.setattr(network_desk, "GENESIS_STREAM_S", 0.01)
        async with Bench() as bench:
            streams: Any = (None, None)
            await bench.runtime.network.serve_genesis(PEER, *streams)
            assert bench.keeper.donors[0].serving == 0

    run(main)


@pytest.mark.parametrize(("contributors", "said"), [(1, ""), (2, " cosine=0.707 sign=0.750 norm_kept=0.500")])
def test_a_commit_says_how_far_contributions_agree_where_there_are_several(monkeypatch, contributors, said):
    told, points = [], []
    monkeypatch.setattr(
        logging.getLogger("tapestry.node"), "info", lambda *args: told.append(args[0] % args[1:])
    )

    class FakeTrackers:
        def put(self, step: int, point: dict[str, float]) -> None:
            points.append(point)

    metrics = Metrics("0")
    members = tuple(Member(f"p{index}", 9, "ab" * 32, "", 5) for index in range(contributors))
    agreement = Agreement(707_107, 750_000, 500_000)
    body = Body(RUN, 4, RUN, RUN, members, RUN, agreement=agreement)
    Reporter(metrics, LiveLine(None, enabled=False), FakeTrackers()).committed(
        Record(body, RUN, 0, ()), tokens=5
    )
    assert told == [
        f"committed epoch=4 head={RUN[:12]} contributions={contributors} tokens={5 * contributors}{said}"
    ]
    assert points[0]["agreement/norm_kept"] == 0.5 and points[0]["agreement/sign"] == 0.75
    assert b'tapestry_agreement{figure="norm_kept"} 0.5' in metrics.render()


def test_refusals_are_all_counted_and_told_once(monkeypatch):
    told = []
    monkeypatch.setattr(logging.getLogger("tapestry.node"), "warning", lambda *args: told.append(args))

    async def main() -> None:
        bench = Bench()
        for _ in range(1000):
            bench.runtime.network.on_refused(PEER, "malformed", "x")
        bench.runtime.network.on_refused(PEER, "oversized", "x")
        assert b'tapestry_refused_total{reason="malformed"} 1000.0' in bench.metrics.render()
        assert len(told) == 2

    run(main)


def test_a_donor_that_lies_or_fails_is_named_and_the_node_goes_on():
    async def main() -> None:
        async with Bench() as bench:
            for error in (RemoteProtocolError("digest", "x"), DonorFailed("ended", "x")):

                async def fetch(*_: object, error: Exception = error) -> None:
                    raise error

                bench.keeper.fetch_state = fetch  # type: ignore[method-assign]
                bench.says(ev.FetchState((PEER,), 2))
                failed = ev.FetchFailed(PEER, "", error.reason)
                await until(lambda failed=failed: bench.core.heard[-1] == failed)
                assert bench.core.heard[-1] == failed
            assert not bench.task.done()

    run(main)


def test_repeats_are_told_again_after_a_while_and_forgotten_when_there_are_many():
    repeats = Repeats(10.0)
    assert [repeats.may_tell("a", now) for now in (0.0, 9.0, 10.0, 11.0)] == [True, False, True, False]
    for number in range(5000):
        assert repeats.may_tell(number, math.pi)
    assert len(repeats._told_at) < 2000


def test_a_peers_words_make_no_line_and_move_no_terminal():
    assert printable("reason=\x1b[2J\n12:00:00 forged") == "reason=\\x1b[2J\\n12:00:00 forged"
    assert printable("größe=3") == "größe=3"


def test_what_a_fork_cost_is_told_with_the_branch_that_is_kept() -> None:
    async def main() -> None:
        said: list[object] = []
        keeper = SimpleNamespace(
            branches=SimpleNamespace(names=("older",)),
            committed_tokens=7,
            switch_chain=lambda epoch, records: Left(2, 20, "newer"),
        )
        reporter: Any = SimpleNamespace(
            branches=(),
            dropped=lambda *cost, hollow: said.append((*cost, hollow)),
            committed=lambda record, tokens: said.append((record, tokens)),
        )
        desk = DiskDesk(None, keeper, None, None, reporter)  # type: ignore[arg-type]
        assert reporter.branches == ("older",), "what there is at the start"
        keeper.branches.names = ("older", "newer")
        await desk.do_switch_chain(ev.SwitchChain(1, ("theirs",)))  # type: ignore[arg-type]
        assert reporter.branches == ("older", "newer")
        assert said == [(2, 20, "newer", False), ("theirs", 7)]
        said.clear()
        await desk.do_switch_chain(ev.SwitchChain(1, ()))
        assert said == [(2, 20, "newer", True)], "and no record is news"

    run(main)


def test_where_a_mean_overflows_who_is_left_out_is_who_sent_the_largest() -> None:
    async def main() -> None:
        async with Bench() as bench:
            peers = ("12D3KooWAlice", "12D3KooWBob", "12D3KooWCarol")
            bench.runtime.network.do_reduce(
                ev.Reduce(3, "cd" * 32, 0, 0, (b"1", b"9", b"2"), (1, 1, 1), peers)
            )
            named = ev.PeerRefused("12D3KooWBob", "overflow")
            async with asyncio.timeout(5.0):
                while named not in bench.core.heard:
                    assert not any(isinstance(i, ev.PeerRefused) for i in bench.core.heard)
                    await asyncio.sleep(0.01)

    asyncio.run(main())
