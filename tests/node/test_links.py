"""Links under attack: what one peer may cost us is bounded, whatever it sends and however often it comes."""

from __future__ import annotations

import asyncio
import logging
import selectors
from collections import Counter
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any

import pytest
import torch

from tapestry.compression.codecs import get_codec
from tapestry.compression.reduce import WEIGHTED
from tapestry.compression.refusals import RefusedPayload
from tapestry.dht.control import Unreachable
from tapestry.dht.presence import ADDRESSES_MAX
from tapestry.node.daemon.assembly import link_limits
from tapestry.node.daemon.averaging import Averaging
from tapestry.node.net import links as links_module
from tapestry.node.net import outbox as outbox_module
from tapestry.node.net import shares as shares_module
from tapestry.node.net.links import LINK_CURE, LinkLimits, Links
from tapestry.node.net.shares import BURST_S, MEMBER_BYTES_PER_S, Pace
from tapestry.node.net.throttle import Throttle, Throttles
from tapestry.node.net.vocabulary import Reader, encode_message
from tapestry.node.net.wire import FRAME, frame_parts
from tapestry.node.protocol.agreement import ShardSums
from tapestry.node.protocol.messages import Control, Records, Result, Shard, Stage, Status
from tapestry.node.spec.run import preset_spec

PEER = "12D3KooWPeer"
RUN = "ab" * 32
STATUS = Status(3, "cd" * 32, 3, "training", Stage.TRAINING, 0, 0, ())
PAYLOAD_BYTES = 1000
SUMS = ShardSums((1.0,), 1.0, (1.0,), (1.0,), 1.0, 1, 0)


class FakeWriter:
    """A stream that takes everything, or nothing, or is broken as uvloop has it."""

    def __init__(self, takes: bool = True) -> None:
        self.takes, self.closing, self.written = takes, False, bytearray()

    def write(self, data: Any) -> None:
        if self.closing:
            raise RuntimeError("unable to perform operation on <UnixTransport>; the handler is closed")
        self.written += data

    async def drain(self) -> None:
        await asyncio.sleep(0)
        if not self.takes:
            await asyncio.get_running_loop().create_future()

    def is_closing(self) -> bool:
        return self.closing

    def close(self) -> None:
        self.closing = True


class FakeSwarm:
    """Serves handlers that a test calls itself, and opens streams that lead nowhere."""

    peer_id = "12D3KooWMe"

    def blame(self, peer: str, reason: str) -> None: ...

    def is_banned(self, peer: str) -> bool:
        return False

    def __init__(self, reachable: bool = True, takes: bool = True) -> None:
        self.reachable, self.takes = reachable, takes
        self.handlers: dict[str, Callable[..., Awaitable[None]]] = {}
        self.opened: list[tuple[asyncio.StreamReader, FakeWriter]] = []
        self.dialled: tuple[str, ...] = ()

    async def serve(self, protocol: str, handler: Callable[..., Awaitable[None]]) -> None:
        self.handlers[protocol.split("/")[-2]] = handler

    async def connect_any(self, peer: str, addresses: tuple[str, ...], timeout_s: float) -> None:
        self.dialled = addresses

    def end_stream(self, peer: str, writer: FakeWriter) -> None:
        writer.close()

    async def open_stream(self, *_: object) -> tuple[asyncio.StreamReader, FakeWriter]:
        if not self.reachable:
            raise Unreachable("refused", "nothing listens there")
        self.opened.append((asyncio.StreamReader(), FakeWriter(self.takes)))
        return self.opened[-1]


class Heard:
    """A listener that counts."""

    def __init__(self) -> None:
        self.ups: list[str] = []
        self.messages: list[Control | Shard | Result] = []
        self.refused: Counter[str] = Counter()
        self.unusable = 0
        self.removed: set[str] = set()  # from the run
        self.strangers: set[str] = set()  # of an open run
        self.progress = 0

    def on_up(self, peer: str) -> None:
        self.ups.append("up")

    def admits(self, peer: str) -> bool:
        return peer not in self.removed

    def is_member(self, peer: str) -> bool:
        return peer not in self.strangers

    def on_down(self, peer: str) -> None:
        self.ups.append("down")

    def on_message(self, peer: str, message: Control | Shard | Result) -> None:
        self.messages.append(message)

    def on_bulk_progress(self, peer: str) -> None:
        self.progress += 1

    def on_unusable(self, peer: str, reason: str, text: str) -> None:
        self.unusable += 1

    def on_refused(self, peer: str, reason: str, text: str) -> None:
        self.refused[reason] += 1

    def on_bytes(self, direction: str, kind: str, count: int, peer: str) -> None: ...


class Bench:
    """Links on a fake swarm, within a running loop."""

    def __init__(self, swarm: FakeSwarm | None = None, **limits: Any) -> None:
        self.swarm = swarm or FakeSwarm()
        self.heard = Heard()
        values = {
            "control_bytes_max": 4096,
            "payload_bytes_max": PAYLOAD_BYTES,
            "peers_max": 4,
            "silence_s": 5.0,
            "backoff_initial_s": 0.001,
        }
        self.links = Links(
            self.swarm,  # type: ignore[arg-type]
            RUN,
            Reader(None),  # type: ignore[arg-type]  # no records here
            unpack,
            self.heard,
            LinkLimits(**(values | limits)),
        )
        self.streams: list[asyncio.Task[None]] = []

    async def __aenter__(self) -> Bench:
        self.task = asyncio.create_task(self.links.run())
        await turns()
        return self

    async def __aexit__(self, *_: object) -> None:
        for task in (*self.streams, self.task):
            task.cancel()
        await asyncio.wait([*self.streams, self.task])

    def stream(self, name: str, data: bytes = b"", peer: str = PEER) -> asyncio.Task[None]:
        """A stream that the peer opened and wrote `data` on."""
        reader = asyncio.StreamReader()
        reader.feed_data(data)

        async def serve() -> None:
            await self.swarm.handlers[name](peer, reader, FakeWriter())

        self.streams.append(asyncio.create_task(serve()))
        return self.streams[-1]

    async def linked(self) -> None:
        self.links.want(PEER)
        await until(lambda: PEER in self.links.linked)


def unpack(peer: str, message: Shard | Result, frame: bytearray) -> tuple[object, str]:
    if len(frame) != PAYLOAD_BYTES:
        raise RefusedPayload("length", f"{len(frame)} bytes")
    return torch.frombuffer(frame, dtype=torch.uint8), ""


async def turns(count: int = 20) -> None:
    for _ in range(count):
        await asyncio.sleep(0)


async def until(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(5):
        while not condition():  # noqa: ASYNC110  # what is awaited is the loop's own work
            await asyncio.sleep(0)


def run(main: Callable[[], Coroutine[Any, Any, None]]) -> None:
    async def within_time() -> None:
        async with asyncio.timeout(10):
            await main()

    asyncio.run(within_time())


def framed(header: bytes, payload: bytes = b"") -> bytes:
    return b"".join(bytes(part) for part in frame_parts(header, [payload] if payload else ()))


def test_of_many_streams_of_a_kind_only_the_newest_is_read():
    async def main() -> None:
        async with Bench() as bench:
            streams = []
            for _ in range(200):
                streams.append(bench.stream("bulk", FRAME.pack(10, PAYLOAD_BYTES)))
                await asyncio.sleep(0)
            await turns()
            assert [task for task in streams if not task.done()] == streams[-1:]

    run(main)


def test_a_peer_beyond_peers_max_gets_no_bulk_stream_read():
    async def main() -> None:
        async with Bench(peers_max=1) as bench:
            bench.links.want("12D3KooWFirst")
            await until(lambda: bench.links.linked)
            frame = framed(encode_message(Shard(3, "cd" * 32, 0, None)), bytes(PAYLOAD_BYTES))
            stream = bench.stream("bulk", frame)
            await until(stream.done)
            assert not bench.heard.messages and bench.heard.refused == {"peers_max": 1}

    run(main)


def test_who_gives_no_sign_is_given_up_unless_who_runs_this_node_named_it():
    async def main() -> None:
        async with Bench(FakeSwarm(reachable=False), give_up_s=0.01, backoff_max_s=0.001) as bench:
            bench.links.want(PEER)
            bench.links.keep("12D3KooWGiven", "/given")
            assert bench.links.wanted == [PEER, "12D3KooWGiven"]
            await until(lambda: PEER not in bench.links.wanted)
            await asyncio.sleep(0.02)
            assert bench.links.wanted == ["12D3KooWGiven"]

    run(main)


def test_a_link_that_stood_for_long_is_not_given_up_when_it_breaks():
    async def main() -> None:
        async with Bench(give_up_s=0.05, backoff_max_s=0.001) as bench:
            await bench.linked()
            await asyncio.sleep(0.1)
            bench.swarm.opened[0][0].feed_eof()
            await until(lambda: len(bench.swarm.opened) == 4 and bench.links.linked)

    run(main)


def test_that_a_given_peer_cannot_be_reached_is_told_once_and_of_others_not(caplog):
    async def main() -> None:
        async with Bench(FakeSwarm(reachable=False), backoff_max_s=0.001) as bench:
            bench.links.want(PEER)
            bench.links.keep("12D3KooWGiven", "/given")
            await asyncio.sleep(0.05)
        told = [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING]
        assert told == [f"link=failed peer=WGiven reason=refused nothing listens there; {LINK_CURE}"]

    run(main)


def test_who_was_given_gets_a_link_though_there_are_peers_max():
    async def main() -> None:
        async with Bench(peers_max=1) as bench:
            await bench.linked()
            bench.links.keep("12D3KooWGiven", "/given")
            bench.links.want("12D3KooWOther")
            assert bench.links.wanted == [PEER, "12D3KooWGiven"] and bench.heard.refused == {"peers_max": 1}

    run(main)


def test_a_member_takes_the_place_of_who_anybody_can_be_and_of_no_other_member():
    """In an open run 64 keys filled a node's links, and a member whose link broke was refused for good."""

    async def main() -> None:
        async with Bench(peers_max=2) as bench:
            strangers = ["12D3KooWStrangerA", "12D3KooWStrangerB"]
            bench.heard.strangers.update([*strangers, "12D3KooWStrangerC"])
            for stranger in strangers:
                bench.links.want(stranger)
            await until(lambda: len(bench.links.linked) == 2)
            bench.links.want("12D3KooWStrangerC")
            assert bench.heard.refused == {"peers_max": 1}
            for name in ("control", "bulk"):
                bench.stream(name, peer=strangers[1])
            bench.stream("control", peer=PEER)
            await until(lambda: sorted(bench.links.wanted) == sorted([strangers[0], PEER]))
            bench.stream("control", peer=strangers[1])  # it comes back, and finds no place
            await turns()
            assert strangers[1] not in bench.links.wanted
            bench.links.want("12D3KooWMember", hint=True)
            await until(lambda: sorted(bench.links.linked) == ["12D3KooWMember", PEER])
            bench.links.want("12D3KooWMember2")
            await turns()
            assert sorted(bench.links.linked) == ["12D3KooWMember", PEER], "of members none goes for another"

    run(main)


def test_an_address_that_was_given_is_tried_whatever_the_peer_says_of_itself():
    async def main() -> None:
        async with Bench() as bench:
            bench.links.keep(PEER, "/given")
            bench.links.want(PEER, ("/own", "/other"))
            bench.links.want(PEER)
            await until(lambda: bench.links.linked)
            assert bench.links.addresses == {PEER: ("/own", "/other", "/given")}

    run(main)


def test_a_peer_of_many_addresses_that_moved_is_dialled_where_it_is_now():
    """A hint was dropped where as many addresses as a presence record has were known already."""

    async def main() -> None:
        async with Bench() as bench:
            old = [f"/old/{i}" for i in range(ADDRESSES_MAX)]
            bench.links.want(PEER, old)
            await until(lambda: bench.links.linked)
            bench.swarm.reachable = False
            for reader, _ in bench.swarm.opened:
                reader.feed_eof()
            await until(lambda: not bench.links.linked)
            for move in ("first", "second"):
                new = [f"/{move}/{i}" for i in range(ADDRESSES_MAX)]
                bench.links.want(PEER, new, hint=True)
                await until(lambda new=new: bench.swarm.dialled == (*new, *old))
            bench.swarm.reachable = True
            await until(lambda: bench.links.linked)

    run(main)


def test_whom_we_only_try_to_reach_takes_nobodys_place():
    """Anybody can say in the DHT that there are a hundred peers."""

    async def main() -> None:
        async with Bench(FakeSwarm(reachable=False), peers_max=2) as bench:
            for i in range(9):
                bench.links.want(f"12D3KooWHint{i}", hint=True)
            assert len(bench.links.wanted) == 2 and not bench.links.full and not bench.heard.refused
            bench.stream("control", framed(encode_message(STATUS)))
            await until(lambda: bench.heard.messages)
            bench.links.want("12D3KooWProven")
            assert [p for p in bench.links.wanted if "Hint" not in p] == [PEER, "12D3KooWProven"]

    run(main)


def test_who_was_broken_off_is_not_given_up():
    async def main() -> None:
        async with Bench(give_up_s=0.05, backoff_max_s=0.001, queue_frames_max=1) as bench:
            await bench.linked()
            await asyncio.sleep(0.1)
            bench.links.send_control(PEER, STATUS)
            bench.links.send_control(PEER, STATUS)
            assert bench.heard.refused == {"slow": 1}
            await until(lambda: len(bench.swarm.opened) == 4 and bench.links.linked)

    run(main)


def test_a_model_of_many_shards_fits_into_the_queue_of_one_peer():
    """Of 7 billion parameters a reducer gets 8,901 shards at the roster: its link broke at the 8,193rd."""

    async def main() -> None:
        averaging = Averaging(get_codec("int8-block"), 20_000 * 256, 256, WEIGHTED)
        limits = link_limits(preset_spec("nano", "many"), averaging, Throttles())
        async with Bench(bulk_frames_max=limits.bulk_frames_max) as bench:
            await bench.linked()
            for ballot in range(2):
                for shard in range(20_000):
                    result = Result(3, "cd" * 32, ballot, shard, "", None, SUMS, "")
                    bench.links.send_bulk(PEER, result, "result", [b"x"])
            assert not bench.heard.refused and bench.links.linked
            for shard in range(100):
                bench.links.send_bulk(PEER, Shard(3, "ef" * 32, shard, None), "contribution", [b"x"])
            assert bench.heard.refused == {"slow": 1}, "and it has an end"

    run(main)


def test_a_full_buffer_of_messages_leaves_turns_to_others():
    async def main() -> None:
        async with Bench() as bench:
            bench.stream("control", framed(encode_message(STATUS)) * 1000)
            most, before = 0, 0
            while len(bench.heard.messages) < 1000:
                await asyncio.sleep(0)
                most, before = max(most, len(bench.heard.messages) - before), len(bench.heard.messages)
            assert most <= 2

    run(main)


def test_a_flood_gets_its_share_of_the_loop_and_no_more():
    now = 0.0
    pace = Pace(lambda: 0.25, lambda: now)
    pace.spend(BURST_S)
    assert pace.pause_s() == 0
    pace.spend(0.5)
    assert pace.pause_s() == pytest.approx(2.0)
    now = 2.0
    assert pace.pause_s() == pytest.approx(0)
    now = 100.0
    pace.spend(BURST_S)
    assert pace.pause_s() == 0, "what was not used is not saved up, and old debts are paid"


def test_a_peer_that_costs_more_than_its_burst_waits_and_others_do_not(monkeypatch):
    async def main() -> None:
        async with Bench() as bench:
            monkeypatch.setattr(shares_module, "BURST_S", -1000.0)
            bench.stream("control", framed(encode_message(STATUS)))
            await turns()
            assert not bench.heard.messages
            monkeypatch.setattr(shares_module, "BURST_S", BURST_S)
            bench.stream("control", framed(encode_message(STATUS)), peer="12D3KooWOther")
            await until(lambda: bench.heard.messages)

    run(main)


def test_answers_that_are_not_taken_end_the_link_at_once_and_up_and_down_alternate():
    async def main() -> None:
        bench = Bench(FakeSwarm(takes=False), queue_bytes_max=10_000, control_bytes_max=2_000)
        async with bench:
            await bench.linked()
            for _ in range(1000):
                bench.links.send_control(PEER, Records(0, ()))
                bench.links.send_control(PEER, STATUS)
            assert bench.heard.refused == {"slow": 1} and bench.heard.ups == ["up", "down"]
            await until(lambda: bench.heard.ups == ["up", "down", "up"])
            assert all(writer.closing for _, writer in bench.swarm.opened[:2])
        assert bench.heard.ups == ["up", "down", "up", "down"]

    run(main)


def test_who_is_removed_is_sent_what_it_was_told_before_and_then_nothing():
    async def main() -> None:
        async with Bench() as bench:
            await bench.linked()
            told = [Status(epoch, "cd" * 32, 3, "training", Stage.TRAINING, 0, 0, ()) for epoch in range(3)]
            for message in told:
                bench.links.send_control(PEER, message)
            bench.heard.removed.add(PEER)
            bench.links.check_members()
            bench.links.send_control(PEER, STATUS)
            await until(lambda: "down" in bench.heard.ups)
            assert bench.swarm.opened[0][1].written == b"".join(framed(encode_message(m)) for m in told)
            assert bench.heard.refused == {"not_member": 1}
            await until(lambda: not bench.links.wanted)
            assert bench.heard.ups == ["up", "down"]

    run(main)


@pytest.mark.parametrize("is_back", [False, True])
def test_who_is_removed_and_takes_nothing_is_waited_for_no_longer_than_that(monkeypatch, is_back):
    monkeypatch.setattr(links_module, "FAREWELL_S", 0.05)

    async def main() -> None:
        async with Bench(FakeSwarm(takes=False)) as bench:
            await bench.linked()
            bench.links.send_control(PEER, STATUS)
            bench.heard.removed.add(PEER)
            bench.links.check_members()
            await turns()
            assert bench.heard.ups == ["up"]
            if is_back:
                bench.heard.removed.clear()
            await asyncio.sleep(0.1)
            assert bench.heard.ups == (["up"] if is_back else ["up", "down"])

    run(main)


def test_a_stream_that_broke_before_we_wrote_is_no_error_of_ours():
    async def main() -> None:
        async with Bench() as bench:
            await bench.linked()
            for _, writer in bench.swarm.opened:
                writer.closing = True
            bench.links.send_control(PEER, STATUS)
            await until(lambda: "down" in bench.heard.ups)
            assert not bench.task.done()

    run(main)


def test_a_peer_that_comes_and_goes_does_not_make_us_hurry():
    async def main() -> None:
        async with Bench(backoff_initial_s=0.001, backoff_max_s=5.0) as bench:
            bench.links.want(PEER)
            for _ in range(2000):
                for reader, _ in bench.swarm.opened:
                    if not reader.at_eof():
                        reader.feed_eof()
                bench.links.want(PEER)
                await asyncio.sleep(0)
            assert bench.heard.ups.count("up") < 12  # the pause doubles each time

    run(main)


def test_unusable_data_is_told_and_the_stream_goes_on():
    async def main() -> None:
        async with Bench() as bench:
            header = encode_message(Shard(3, "cd" * 32, 0, None))
            bench.stream("bulk", framed(header, b"short") + framed(header, bytes(PAYLOAD_BYTES)))
            await until(lambda: bench.heard.messages)
            assert bench.heard.unusable == 1 and not bench.heard.refused

    run(main)


def test_answers_to_who_asks_for_records_again_and_again_are_bounded(monkeypatch):
    """23 MB of questions were answered with 571 MB."""

    async def main() -> None:
        monkeypatch.setattr(shares_module, "ANSWERS_BYTES_PER_S", 1000.0)
        async with Bench() as bench:
            await bench.linked()
            for _ in range(1000):
                bench.links.send_control(PEER, Records(3, ()))
            bench.links.send_control(PEER, STATUS)
            answer, status = encode_message(Records(3, ())), encode_message(STATUS)
            control = bench.swarm.opened[0][1]
            await until(lambda: framed(status) in control.written)
            assert 1 <= control.written.count(framed(answer)) <= 3

    run(main)


def test_an_answer_that_is_asked_for_early_comes_when_its_time_has_come(monkeypatch):
    """It was dropped, and who catches up asks again after stall_s only: 20 records in 5 s."""

    async def main() -> None:
        first, second, third = (Records(epoch, ()) for epoch in range(3))
        monkeypatch.setattr(shares_module, "ANSWERS_BYTES_PER_S", 10 * len(encode_message(first)))
        async with Bench() as bench:
            await bench.linked()
            began_s = asyncio.get_running_loop().time()
            for answer in (first, second, third):
                bench.links.send_control(PEER, answer)
            control = bench.swarm.opened[0][1]
            await until(lambda: framed(encode_message(third)) in control.written)
            assert asyncio.get_running_loop().time() - began_s >= 0.09
            assert framed(encode_message(second)) not in control.written, "its question was the older one"

    run(main)


def test_a_flood_of_messages_is_read_at_the_rate_of_its_sender(monkeypatch):
    async def main() -> None:
        monkeypatch.setattr(shares_module, "CONTROL_BYTES_PER_S", 1000.0)
        async with Bench() as bench:
            bench.stream("control", framed(encode_message(STATUS)) * 5000)
            await until(lambda: bench.heard.messages)
            await asyncio.sleep(0.1)
            first = len(bench.heard.messages)
            assert first * len(encode_message(STATUS)) < 20_000
            bench.stream("control", framed(encode_message(STATUS)), "12D3KooWOther")
            await until(lambda: len(bench.heard.messages) > first)

    run(main)


class Leaping(asyncio.SelectorEventLoop):
    """A loop whose time passes only while it waits, and then at once."""

    def __init__(self) -> None:
        self.now, selector = 0.0, selectors.DefaultSelector()
        super().__init__(selector)
        select = selector.select

        def leap(timeout: float | None = None) -> Any:
            self.now += timeout or 0.0
            return select(0)

        selector.select = leap  # type: ignore[method-assign]

    def time(self) -> float:
        return self.now


def test_messages_of_many_take_a_quarter_of_the_download_cap_together():
    """Each had a quarter of its own: five peers left bulk nothing."""
    cap, senders, seconds = 800_000.0, 8, 4.0

    async def main() -> None:
        async with Bench(peers_max=16, throttles=Throttles(download=Throttle(cap))) as bench:
            for i in range(senders):
                bench.stream("control", framed(encode_message(STATUS)) * 10_000, f"12D3KooWPeer{i}")
            await asyncio.sleep(1.0)  # their bursts
            before = len(bench.heard.messages)
            await asyncio.sleep(seconds)
            passed = (len(bench.heard.messages) - before) * len(encode_message(STATUS))
            assert passed == pytest.approx(seconds * cap / 4, rel=0.05)

    with asyncio.Runner(loop_factory=Leaping) as runner:
        runner.run(main())


def test_long_messages_of_many_newcomers_take_no_more_than_that_quarter():
    """At a low rate a minute of it is less than a message: one of each came each minute, seventeen times
    the quarter."""
    cap, senders, seconds, message_bytes = 64.0 * 1024, 16, 600.0, 2**20

    async def main() -> None:
        throttles = Throttles(download=Throttle(cap))
        shares = shares_module.Shares(throttles, lambda _: False, lambda: senders, message_bytes)
        read_bytes, clock = 0, asyncio.get_running_loop().time

        async def read(share: shares_module.Share) -> None:
            nonlocal read_bytes
            while True:
                await shares.control_is_paid(share)
                share.control_bytes_in.spend(message_bytes, clock())
                read_bytes += message_bytes

        reading = [asyncio.create_task(read(shares.begin(f"12D3KooWPeer{i}"))) for i in range(senders)]
        await asyncio.sleep(seconds)
        for task in reading:
            task.cancel()
        first = senders * message_bytes  # nobody owed anything
        assert first <= read_bytes <= first + seconds * cap / 4

    with asyncio.Runner(loop_factory=Leaping) as runner:
        runner.run(main())


def test_who_sends_just_below_its_rate_counts_as_who_sends():
    """If only those counted who are made to wait, four such peers would take the whole cap."""
    cap, senders, seconds = 100_000.0, 4, 8.0
    message = framed(encode_message(STATUS))

    async def main() -> None:
        async with Bench(peers_max=16, throttles=Throttles(download=Throttle(cap))) as bench:
            readers = [asyncio.StreamReader(limit=1 << 20) for _ in range(senders)]
            bench.heard.strangers.update(f"12D3KooWPeer{i}" for i in range(senders))
            for i, reader in enumerate(readers):
                serving = bench.swarm.handlers["control"](f"12D3KooWPeer{i}", reader, FakeWriter())
                bench.streams.append(asyncio.create_task(serving))
            for _ in range(round(seconds / 0.01)):
                for reader in readers:
                    reader.feed_data(message * round(0.95 * cap / 4 * 0.01 / len(encode_message(STATUS))))
                await asyncio.sleep(0.01)
            passed = len(bench.heard.messages) * len(encode_message(STATUS))
            assert passed < 1.2 * seconds * cap / 4

    with asyncio.Runner(loop_factory=Leaping) as runner:
        runner.run(main())


def test_a_member_is_read_in_time_however_many_others_flood():
    """It had a sixty-fourth of a quarter of the cap: its heartbeats came after its page, too late."""
    page = framed(encode_message(STATUS)) * (20_000 // len(encode_message(STATUS)))

    async def main() -> None:
        async with Bench(peers_max=64, throttles=Throttles(download=Throttle(1e6))) as bench:
            flood = framed(encode_message(STATUS)) * 10_000
            bench.heard.strangers.update(f"12D3KooWStranger{i}" for i in range(60))
            for stranger in bench.heard.strangers:
                bench.stream("control", flood, stranger)
            await asyncio.sleep(1.0)
            counts, hear = Counter[str](), bench.heard.on_message

            def on_message(peer: str, message: Any) -> None:
                counts[peer] += len(encode_message(message))
                hear(peer, message)

            bench.heard.on_message = on_message  # type: ignore[method-assign]
            bench.stream("control", page * 10, PEER)
            await asyncio.sleep(0.2)
            assert counts[PEER] >= 20_000, "what comes at once is read at once, though others flood already"
            counts.clear()
            await asyncio.sleep(4.0)
            assert counts.pop(PEER) == pytest.approx(4.0 * MEMBER_BYTES_PER_S, rel=0.1)
            assert sum(counts.values()) <= 1.05 * 4.0 * 1e6 / 4

    with asyncio.Runner(loop_factory=Leaping) as runner:
        runner.run(main())


@pytest.mark.parametrize("name", ["control", "bulk"])
def test_a_stream_that_is_opened_anew_is_read_once_the_one_before_it_is_paid(monkeypatch, name):
    """Its first frame was read at once: who opened one after the other paid for none."""
    monkeypatch.setattr(shares_module, "CONTROL_BYTES_PER_S", 1000.0)
    monkeypatch.setattr(shares_module, "JUNK_BYTES_PER_S", 1000.0)
    junk = framed(encode_message(Shard(3, "cd" * 32, 0, None)), bytes(PAYLOAD_BYTES - 1))
    status = framed(encode_message(STATUS))
    frame, count = (status, 50 * PAYLOAD_BYTES // len(status)) if name == "control" else (junk, 50)

    async def main() -> None:
        async with Bench() as bench:
            for _ in range(count):
                bench.stream(name, frame)
                await asyncio.sleep(0.01)
            heard = bench.heard.unusable + len(bench.heard.messages)
            assert 1 <= heard * len(frame) <= 8192 + 1000 * (0.02 * count) + len(frame)

    with asyncio.Runner(loop_factory=Leaping) as runner:
        runner.run(main())


def test_who_sends_what_cannot_be_used_is_read_slowly_after_it(monkeypatch):
    async def main() -> None:
        monkeypatch.setattr(shares_module, "JUNK_BYTES_PER_S", 1000.0)
        async with Bench() as bench:
            junk = framed(encode_message(Shard(3, "cd" * 32, 0, None)), b"junk" * (PAYLOAD_BYTES // 4 - 1))
            bench.stream("bulk", junk * 200)
            await until(lambda: bench.heard.unusable)
            await asyncio.sleep(0.1)
            assert bench.heard.unusable < 40

    run(main)


def test_all_peers_together_get_half_of_the_loop():
    async def main() -> None:
        async with Bench(peers_max=16) as bench:
            for i in range(10):
                bench.stream("control", framed(encode_message(STATUS)), f"12D3KooWPeer{i}")
            await until(lambda: len(bench.heard.messages) == 10)
            assert bench.links._shares.control_share() == pytest.approx(0.05)

    run(main)


def bulk_frames(bench: Bench, count: int) -> None:
    for shard in range(count):
        bench.links.send_bulk(PEER, Shard(3, "cd" * 16, shard, None), "contribution", [bytes(PAYLOAD_BYTES)])


def test_bulk_that_waits_for_long_gets_more_streams_and_each_frame_goes_out_once(monkeypatch):
    monkeypatch.setattr(outbox_module, "WIDEN_S", 0.0)
    monkeypatch.setattr(outbox_module, "WIDEN_BYTES_PER_S", 0.0)

    async def main() -> None:
        async with Bench() as bench:
            await bench.linked()
            most = 1 + len(links_module.BULK_STREAMS)
            while len(bench.swarm.opened) < most:
                bulk_frames(bench, 8)
                await turns()
            bulk_frames(bench, 40)
            await turns(200)
            assert len(bench.swarm.opened) == most and bench.heard.ups == ["up"]
            sent = b"".join(bytes(writer.written) for _, writer in bench.swarm.opened[1:])
            for shard in range(8, 40):
                header = encode_message(Shard(3, "cd" * 16, shard, None))
                assert sent.count(framed(header, bytes(PAYLOAD_BYTES))) == 1
            assert sum(bool(writer.written) for _, writer in bench.swarm.opened[1:]) > 1
            bench.swarm.opened[-1][0].feed_eof()  # the end of any stream is the end of the link
            await until(lambda: len(bench.swarm.opened) == most + 2 and bench.links.linked)
            assert all(writer.closing for _, writer in bench.swarm.opened[:most])

    run(main)


@pytest.mark.parametrize(("widen_s", "bytes_per_s"), [(60.0, 0.0), (0.0, 1e15)])
def test_bulk_that_waits_for_a_moment_or_for_a_slow_line_keeps_its_one_stream(
    monkeypatch, widen_s, bytes_per_s
):
    monkeypatch.setattr(outbox_module, "WIDEN_S", widen_s)
    monkeypatch.setattr(outbox_module, "WIDEN_BYTES_PER_S", bytes_per_s)

    async def main() -> None:
        async with Bench() as bench:
            await bench.linked()
            bulk_frames(bench, 100)
            await turns(300)
            assert len(bench.swarm.opened) == 2

    run(main)


def test_a_peer_of_one_bulk_stream_is_sent_all_on_that_one(monkeypatch):
    monkeypatch.setattr(outbox_module, "WIDEN_S", 0.0)
    monkeypatch.setattr(outbox_module, "WIDEN_BYTES_PER_S", 0.0)

    async def main() -> None:
        async with Bench() as bench:
            await bench.linked()
            bench.swarm.reachable = False  # it does not serve the others
            bulk_frames(bench, 50)
            await turns(300)
            assert len(bench.swarm.opened[1][1].written) > 50 * PAYLOAD_BYTES
            assert bench.heard.ups == ["up"]

    run(main)
