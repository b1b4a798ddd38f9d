"""The loop around the core: what breaks ends the node, what must not does not, and stopping is quick."""

from __future__ import annotations

import asyncio
import logging
import math
from types import SimpleNamespace
from typing import Any

import pytest

from tapestry.node import runtime as runtime_module
from tapestry.node.logs import LiveLine, Repeats, printable
from tapestry.node.metrics import Metrics
from tapestry.node.protocol import events as ev
from tapestry.node.protocol.messages import Stage
from tapestry.node.runtime import Runtime
from tapestry.node.state.transfer import DonorFailed
from tapestry.node.trainer import messages as tm
from tapestry.node.wire import RemoteProtocolError

PEER, OTHER = "12D3KooWPeer", "12D3KooWOther"
RUN = "ab" * 32


class FakeCore:
    """Says what a test puts in its mouth."""

    def __init__(self) -> None:
        self.ctx = SimpleNamespace(me="12D3KooWMe", rules=SimpleNamespace(run_id=RUN), peers={})
        self.sync = SimpleNamespace(state_epoch=3, at_head=True)
        self.chain = SimpleNamespace(epoch=3, head="cd" * 32, records=[])
        self.round: Any = None
        self.stopping = False
        self.says: list[ev.Output] = []
        self.heard: list[ev.Input] = []
        self.raises: Exception | None = None

    def handle(self, inp: ev.Input, now: float) -> list[ev.Output]:
        self.heard.append(inp)
        if isinstance(inp, ev.Stopping):
            self.stopping = True
        elif self.raises is not None:
            raise self.raises
        says, self.says = self.says, []
        return says

    def wakeup_at(self, now: float) -> float:
        return now + 1000

    def phase(self) -> str:
        return "training"

    def reason(self, now: float) -> str:
        return ""


class FakeDonor:
    """Serves until it is let go."""

    def __init__(self) -> None:
        self.serving = 0

    async def serve(self, reader: object, writer: object) -> None:
        self.serving += 1
        try:
            await asyncio.get_running_loop().create_future()
        finally:
            self.serving -= 1


class FakeKeeper:
    def __init__(self) -> None:
        self.donors: list[FakeDonor] = []
        self.checkpoints = 0
        self.fetching = asyncio.Event()
        self.reached = (3, "ef" * 32)

    def donor(self, on_bytes: object) -> FakeDonor:
        self.donors.append(FakeDonor())
        return self.donors[-1]

    def checkpoint(self) -> None:
        self.checkpoints += 1

    async def fetch_state(self, *_: object) -> None:
        self.fetching.set()
        await asyncio.get_running_loop().create_future()


class Bench:
    def __init__(self) -> None:
        self.core, self.keeper = FakeCore(), FakeKeeper()
        self.metrics = Metrics("0")
        fakes: Any = (self.core, self.keeper, SimpleNamespace(settle=lambda counted: None))
        self.runtime = Runtime(*fakes, self.metrics, LiveLine(None, enabled=False), None)  # type: ignore[arg-type]

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
                bench.runtime.on_up(PEER)  # swallowed by whoever serves the stream
            await asyncio.wait([bench.task])
            with pytest.raises(ExceptionGroup) as ended:
                bench.task.result()
            assert ended.group_contains(AssertionError, match="our bug")

    run(main)


def test_leaving_does_not_wait_for_a_state_that_is_being_fetched():
    async def main() -> None:
        async with Bench() as bench:
            bench.core.says = [ev.FetchState(PEER, 2)]
            bench.runtime.feed(ev.Tick())
            await bench.keeper.fetching.wait()
            async with asyncio.timeout(1):
                await bench.runtime.leave()
            assert bench.keeper.checkpoints == 1

    run(main)


def test_a_contribution_that_was_encoded_while_the_fork_changed_is_dropped():
    async def main() -> None:
        async with Bench() as bench:
            here, other_fork = (SimpleNamespace(stage=Stage.TRAINING, of=of) for of in "ab")
            contribution = tm.Contribution(3, 8, 1.0, 2.0, 8, 1)
            for round_now, count in ((here, 1), (other_fork, 0)):
                bench.core.round, bench.core.heard = here, []

                def encode(*_: object, now: object = round_now) -> tuple[object, ...]:
                    bench.core.round = now
                    return ()

                bench.runtime.averaging = SimpleNamespace(encode=encode)  # type: ignore[assignment]
                bench.runtime.trainer = SimpleNamespace(contribution=None)  # type: ignore[assignment]
                await bench.runtime._encode(contribution)
                assert sum(isinstance(inp, ev.Contributed) for inp in bench.core.heard) == count

    run(main)


def test_one_peer_cannot_take_all_that_a_donor_serves():
    async def main() -> None:
        async with Bench() as bench:
            streams: Any = (None, None)
            serve = bench.runtime.serve_state
            mine = [asyncio.create_task(serve(PEER, *streams)) for _ in range(100)]
            other = asyncio.create_task(serve(OTHER, *streams))
            await turns()
            _, state = bench.keeper.donors
            assert state.serving == runtime_module.STATE_STREAMS_MAX + 1 and not other.done()
            for task in (*mine, other):
                task.cancel()
            await asyncio.wait([*mine, other])
            assert not bench.runtime._state_door._streams

    run(main)


def test_a_joiner_learns_the_genesis_while_all_that_give_state_are_busy():
    async def main() -> None:
        async with Bench() as bench:
            streams: Any = (None, None)
            tasks = [
                asyncio.create_task(bench.runtime.serve_state(PEER, *streams)),
                asyncio.create_task(bench.runtime.serve_genesis(OTHER, *streams)),
            ]
            await turns()
            assert [donor.serving for donor in bench.keeper.donors] == [1, 1]
            for task in tasks:
                task.cancel()
            await asyncio.wait(tasks)

    run(main)


def test_who_holds_a_genesis_stream_open_is_shown_out(monkeypatch):
    async def main() -> None:
        monkeypatch.setattr(runtime_module, "GENESIS_STREAM_S", 0.01)
        async with Bench() as bench:
            streams: Any = (None, None)
            await bench.runtime.serve_genesis(PEER, *streams)
            assert bench.keeper.donors[0].serving == 0

    run(main)


def test_refusals_are_all_counted_and_told_once(monkeypatch):
    told = []
    monkeypatch.setattr(logging.getLogger("tapestry.node"), "warning", lambda *args: told.append(args))

    async def main() -> None:
        bench = Bench()
        for _ in range(1000):
            bench.runtime.on_refused(PEER, "malformed", "x")
        bench.runtime.on_refused(PEER, "oversized", "x")
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
                bench.core.says = [ev.FetchState(PEER, 2)]
                bench.runtime.feed(ev.Tick())
                await turns()
                assert bench.core.heard[-1] == ev.FetchFailed(PEER, "", error.reason)
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
