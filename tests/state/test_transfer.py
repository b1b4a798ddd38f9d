"""Serving and fetching: what arrives is what was signed, or nothing, and the donor's fault has a name."""

from __future__ import annotations

import asyncio
import contextlib
import io
import threading
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgpack
import pytest
import torch
from blake3 import blake3
from state.kit import CRYPTO, STALL_S, Run, Stream, flip, new_state, state_bytes, stream_pair

from tapestry.dht.identity import Identity
from tapestry.node.disk import signed_means
from tapestry.node.disk.checkpoints import CHUNK_BYTES, restore
from tapestry.node.disk.store import Store
from tapestry.node.disk.update_header import UPDATE_SUFFIX
from tapestry.node.home import Home
from tapestry.node.lineage.crypto import NodeCrypto
from tapestry.node.net.bucket import BURST_S
from tapestry.node.net.donor import Donor
from tapestry.node.net.download import Download, Wanted, fetch_manifest, fetch_state
from tapestry.node.net.throttle import Throttle, Throttles
from tapestry.node.net.transfer import (
    DonorFailed,
    OnBytes,
    TransferLimits,
    WantedUpdate,
    bytes_of,
    fetch_genesis,
    fetch_update,
)
from tapestry.node.net.transfer import Stream as Frames
from tapestry.node.net.wire import FrameLimits, RemoteProtocolError, StreamEnded, frame_parts, read_frame
from tapestry.node.protocol.audit import SignedMean, inputs_digest, mean_message
from tapestry.node.protocol.canon import canonical
from tapestry.node.protocol.chain import Chain
from tapestry.node.protocol.record import genesis_to_dict, head_of

LIMITS = TransferLimits(stall_s=STALL_S)
N = 300_001  # three chunks, the last one short; the second one lies in both vectors
SHARD = 65_536

OpenStream = Callable[[], Awaitable[Stream]]
Fetch = Callable[[OpenStream], Awaitable[Any]]
Serve = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


def no_count(direction: str, count: int) -> None:
    pass


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Run:
    made = Run(tmp_path_factory.mktemp("template"), n=N, shard_elements=SHARD)
    made.advance()
    made.save()
    made.advance(2)
    made.save()
    return made


@pytest.fixture
def big(template: Run, tmp_path: Path) -> Run:
    """Three epochs, a checkpoint at 1 and one at the head."""
    return template.copy(tmp_path / "donor")


@pytest.fixture
def joiner(tmp_path: Path) -> Store:
    (tmp_path / "joiner").mkdir()
    store = Store(Home(tmp_path / "joiner"), CRYPTO)
    store.load()
    return store


def donor(run: Run, limits: TransferLimits = LIMITS) -> Donor:
    return Donor(run.chain.genesis, run.store, run.checkpoints, limits, no_count)


async def _between(serve: Serve, fetch: Fetch) -> Any:
    """What the fetch gives, with `serve` at the other end; both have ended then."""
    async with stream_pair() as (mine, theirs):

        async def serving() -> None:
            try:
                await serve(*theirs)
            except (StreamEnded, RemoteProtocolError, ConnectionError, TimeoutError):
                pass
            finally:
                theirs[1].close()

        async def open_stream() -> Stream:
            return mine

        task = asyncio.create_task(serving())
        try:
            return await fetch(open_stream)
        finally:
            mine[1].close()
            await task


def between(serve: Serve, fetch: Fetch) -> Any:
    return asyncio.run(_between(serve, fetch))


def wanted(run: Run, epoch: int) -> WantedUpdate:
    record = run.chain.records[epoch - 1]
    return WantedUpdate(epoch, record.head, record.body.result)


def update_of(run: Run, joiner: Store, epoch: int = 2) -> Fetch:
    arith = run.state.arithmetic
    return lambda open_stream: fetch_update(open_stream, wanted(run, epoch), arith, joiner, LIMITS, no_count)


def nobody_fails(donor: str, error: Exception) -> None:
    raise AssertionError(f"{donor}: {error}")


def state_of(
    run: Run,
    state: Any,
    epoch_max: int = 2,
    limits: TransferLimits = LIMITS,
    on_bytes: OnBytes = no_count,
    chain: Chain | None = None,
) -> Fetch:
    """From one donor."""
    wanted = Wanted(epoch_max, chain or run.chain, state)
    return lambda open_stream: fetch_state({"d": open_stream}, wanted, limits, on_bytes, nobody_fails)


async def pulled(stream: Frames, download: Download) -> None:
    for index in [*download.missing]:
        await download.ask(stream, index)
        await download.receive(stream, index)


def answers(*frames: tuple[dict[str, Any], bytes]) -> Serve:
    """A donor that takes one request and says just this, whatever was asked."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await read_frame(reader, FrameLimits(4096, 0), STALL_S, STALL_S)
        for header, payload in frames:
            for part in frame_parts(msgpack.packb(header), [payload]):
                writer.write(part)
        await writer.drain()
        await reader.read()

    return serve


# --- what is right arrives ----------------------------------------------------------------------------


def test_a_joiner_gets_the_genesis(big: Run) -> None:
    genesis = between(
        donor(big).serve, lambda open_stream: fetch_genesis(open_stream, CRYPTO, LIMITS, no_count)
    )
    assert genesis == big.chain.genesis


def test_an_update_arrives_in_the_log_to_the_byte(big: Run, joiner: Store) -> None:
    between(donor(big).serve, update_of(big, joiner))
    payloads = joiner.read_update(2, big.chain.head_at(2), big.chain.records[1].body.result)
    assert all(map(torch.equal, payloads, big.payloads[1]))


def test_a_donor_speaks_before_it_has_read_all_of_an_update(
    big: Run, joiner: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From 1.3 billion parameters on that takes longer than stall_s, so that nobody could fetch one."""
    heard = threading.Event()

    class Slow(io.FileIO):
        def readinto(self, piece: Any) -> int:
            if self.tell() > 2 * SHARD:
                heard.wait(5 * STALL_S)  # the rest takes as long as the other side hears nothing
            return super().readinto(piece)

    def opened(path: Path, mode: str = "r", **more: Any) -> Any:
        slow = path.suffix == UPDATE_SUFFIX and mode == "rb"
        return io.BufferedReader(Slow(path)) if slow else open(path, mode, **more)

    def on_bytes(direction: str, count: int) -> None:
        if direction == "in":
            heard.set()

    monkeypatch.setattr(Path, "open", opened)
    arith, update = big.state.arithmetic, wanted(big, 2)
    between(donor(big).serve, lambda stream: fetch_update(stream, update, arith, joiner, LIMITS, on_bytes))
    assert heard.is_set() and joiner.has_update(update.head)


@pytest.mark.parametrize("offset", [200, -1])
def test_a_damaged_update_is_missing_and_nobody_is_to_blame(big: Run, joiner: Store, offset: int) -> None:
    """It is found out while it is sent: the last shard is kept back."""
    (path,) = big.home.updates.glob("00000002-*.upd")
    flip(path, offset)
    for _ in range(2):
        with pytest.raises(DonorFailed) as raised:
            between(donor(big).serve, update_of(big, joiner))
        assert raised.value.reason == "missing"
    assert not path.exists() and joiner.heads_with_updates() == ()


@pytest.mark.parametrize("damaged", [True, False])
def test_a_donor_looks_at_an_update_that_a_peer_hung_up_on(
    big: Run, joiner: Store, monkeypatch: pytest.MonkeyPatch, damaged: bool
) -> None:
    """The peer may have seen by the codes that they are damaged, before the donor has compared digests."""
    (path,) = big.home.updates.glob("00000002-*.upd")
    if damaged:
        flip(path, -1)
    send = Frames.send

    async def hangs_up(self: Frames, header: dict[str, Any], payload: bytes | memoryview = b"") -> None:
        if header.get("index") == 1:
            raise ConnectionResetError("the peer has gone")
        await send(self, header, payload)

    monkeypatch.setattr(Frames, "send", hangs_up)
    with pytest.raises((ConnectionResetError, DonorFailed)):
        between(donor(big).serve, update_of(big, joiner))
    assert path.exists() != damaged and big.store.has_update(wanted(big, 2).head) != damaged


def test_a_state_arrives_to_the_bit_and_is_one_that_the_chain_signed(big: Run) -> None:
    state = big.fresh()
    digest = between(donor(big).serve, state_of(big, state))
    assert (state.epoch, state.head) == (1, big.chain.head_at(1))
    assert digest == state.digest() == big.chain.state_digest_at(1)
    assert state_bytes(state) == big.numbers[1]


@pytest.mark.parametrize("capped", ["donor", "joiner"])
def test_a_state_takes_the_time_that_a_cap_gives_it_and_nobody_is_blamed_for_that(
    big: Run, capped: str
) -> None:
    now = 0.0

    async def sleep(seconds: float) -> None:
        nonlocal now
        now += seconds
        await asyncio.sleep(0)

    throttle = Throttle(1e6, lambda: now, sleep)
    donors = TransferLimits(STALL_S, throttles=Throttles(upload=throttle))
    joiners = TransferLimits(STALL_S, throttles=Throttles(download=throttle))
    moved = 0

    def on_bytes(direction: str, count: int) -> None:
        nonlocal moved
        moved += count if direction == "in" else 0

    state = big.fresh()
    between(
        donor(big, donors if capped == "donor" else LIMITS).serve,
        state_of(big, state, 2, joiners if capped == "joiner" else LIMITS, on_bytes),
    )
    assert state_bytes(state) == big.numbers[1] and moved > 1e6
    assert now == pytest.approx(moved / 1e6 - BURST_S, rel=0.05)


def test_a_joiner_reaches_the_head_by_a_state_and_the_updates_after_it(big: Run, joiner: Store) -> None:
    state = big.fresh()
    between(donor(big).serve, state_of(big, state))
    for epoch in (2, 3):
        between(donor(big).serve, update_of(big, joiner, epoch))
        payloads = joiner.read_update(epoch, big.chain.head_at(epoch))
        state.apply(payloads, big.chain.records[epoch - 1])
    assert state.digest() == big.digest


def test_a_download_goes_on_where_another_donor_broke_off(big: Run) -> None:
    state = big.fresh()

    async def resume(open_stream: OpenStream) -> str:
        stream = Frames(*await open_stream(), LIMITS, no_count)
        download = Download(await fetch_manifest(stream, 2, big.chain, state), state)
        assert list(download.missing) == [0, 1, 2]
        del download.missing[1]
        start, stop = CHUNK_BYTES, 2 * CHUNK_BYTES
        size = len(state.vectors()[0])
        state.vectors()[0][start:size] = big.numbers[1][start:size]
        state.vectors()[1][: stop - size] = big.numbers[1][size:stop]
        await pulled(stream, download)
        return download.finish()

    assert between(donor(big).serve, resume) == big.chain.state_digest_at(1)
    assert state_bytes(state) == big.numbers[1]


def test_a_chunk_of_a_fetch_that_has_ended_is_not_written_into_the_state(big: Run) -> None:
    """Its thread may be late, and the state has gone on."""
    state = big.fresh()

    async def late(open_stream: OpenStream) -> bytes:
        stream = Frames(*await open_stream(), LIMITS, no_count)
        download = Download(await fetch_manifest(stream, 2, big.chain, state), state)
        await download.ask(stream, 1)
        download.close()
        await download.receive(stream, 1)
        return state_bytes(state)

    assert between(donor(big).serve, late) == state_bytes(big.fresh())


def test_every_byte_is_counted_on_both_sides(big: Run) -> None:
    ours: Counter[str] = Counter()
    theirs: Counter[str] = Counter()

    def count(counter: Counter[str]) -> Callable[[str, int], None]:
        return lambda direction, size: counter.update({direction: size})

    serving = Donor(big.chain.genesis, big.store, big.checkpoints, LIMITS, count(theirs))
    state = big.fresh()
    between(
        serving.serve,
        state_of(big, state, 2, LIMITS, count(ours)),
    )
    assert ours["in"] == theirs["out"] > 8 * N
    assert ours["out"] == theirs["in"] > 0


def test_a_checkpoint_that_is_pruned_while_it_is_sent_arrives_all_the_same(big: Run) -> None:
    state = big.fresh()

    async def fetch(open_stream: OpenStream) -> str:
        stream = Frames(*await open_stream(), LIMITS, no_count)
        download = Download(await fetch_manifest(stream, 2, big.chain, state), state)
        first, *rest = download.missing
        download.missing = {first: None}
        await pulled(stream, download)
        (path,) = big.home.checkpoints.glob("00000001-*")
        path.unlink()
        download.missing = dict.fromkeys(rest)
        await pulled(stream, download)
        return download.finish()

    assert between(donor(big).serve, fetch) == big.chain.state_digest_at(1)


# --- what is wrong is refused, with a reason ------------------------------------------------------------


class Tampering:
    """A donor's end of the stream that flips one byte of what it sends."""

    def __init__(self, writer: asyncio.StreamWriter, at: int) -> None:
        self._writer, self._at = writer, at

    def write(self, data: Any) -> None:
        data = bytearray(data)
        if 0 <= self._at < len(data):
            data[self._at] ^= 1
        self._at -= len(data)
        self._writer.write(data)

    async def drain(self) -> None:
        await self._writer.drain()

    def is_closing(self) -> bool:
        return self._writer.is_closing()


def test_who_may_know_the_genesis_alone_gets_no_update_and_no_state(big: Run, joiner: Store) -> None:
    served: list[str] = []

    async def serve(*streams: Any) -> None:
        door = Donor(big.chain.genesis, big.store, big.checkpoints, LIMITS, no_count, genesis_only=True)
        try:
            await door.serve(*streams)
        except RemoteProtocolError as error:
            served.append(error.reason)

    assert between(serve, lambda opened: fetch_genesis(opened, CRYPTO, LIMITS, no_count)) == big.chain.genesis
    for fetch in (update_of(big, joiner), state_of(big, big.fresh())):
        with pytest.raises(DonorFailed):
            between(serve, fetch)
    assert served == ["not_member"] * 2 and joiner.heads_with_updates() == ()


def test_who_holds_the_streams_of_the_genesis_keeps_no_joiner_away(big: Run) -> None:
    """Anybody may open them: 64 keys with one silent stream each, and every joiner was told `busy`."""

    async def main() -> None:
        limits = replace(LIMITS, serves_max=2, stall_s=30.0)
        door = Donor(big.chain.genesis, big.store, big.checkpoints, limits, no_count, genesis_only=True)
        async with contextlib.AsyncExitStack() as stack:
            pairs = [await stack.enter_async_context(stream_pair()) for _ in range(3)]
            held = []
            for ours, _ in pairs:
                held.append(asyncio.create_task(door.serve(*ours)))
                await asyncio.sleep(0)
            async with asyncio.timeout(10.0):
                await held[0]  # who was silent longest

                async def open_stream() -> Any:
                    return pairs[2][1]

                assert await fetch_genesis(open_stream, CRYPTO, limits, no_count) == big.chain.genesis
            assert not held[1].done()
            pairs[1][1][1].close()
            await asyncio.gather(*held)

    asyncio.run(main())


def tampered(run: Run, at: int) -> Serve:
    return lambda reader, writer: donor(run).serve(reader, Tampering(writer, at))  # type: ignore[arg-type]


@pytest.mark.parametrize("at", [500, CHUNK_BYTES // 2, CHUNK_BYTES + 5000, 8 * N])
def test_a_wrong_byte_in_any_chunk_is_refused_and_no_state_passes_for_the_whole(big: Run, at: int) -> None:
    state = big.fresh()
    before = state_bytes(state)
    with pytest.raises(RemoteProtocolError) as raised:
        between(tampered(big, at), state_of(big, state))
    assert raised.value.reason == "digest"
    assert "chunk" in str(raised.value)
    assert state.torn or state_bytes(state) == before


@pytest.mark.parametrize("at", [100, SHARD // 2, SHARD + 3000, 4 * SHARD + 5000])
def test_a_wrong_byte_in_any_shard_is_refused_and_not_written(big: Run, joiner: Store, at: int) -> None:
    with pytest.raises(RemoteProtocolError) as raised:
        between(tampered(big, at), update_of(big, joiner))
    assert raised.value.reason in ("digest", "code")
    assert joiner.heads_with_updates() == ()


def test_a_donor_whose_whole_state_is_another_is_refused(big: Run) -> None:
    """Chunks that agree with a manifest that lies."""
    checkpoint = big.checkpoints.list()[1]
    lie = big.fresh()
    lie.epoch, lie.head = checkpoint.epoch, checkpoint.head
    checkpoint.path.unlink()
    _, big.checkpoints = big.reopened()
    big.checkpoints.save(lie, checkpoint.state_digest)
    state = big.fresh()
    with pytest.raises(RemoteProtocolError) as raised:
        between(donor(big).serve, state_of(big, state))
    assert raised.value.reason == "digest"
    assert state.torn


def test_a_checkpoint_of_another_fork_or_digest_is_refused_before_a_chunk_is_asked_for(big: Run) -> None:
    state = big.fresh()
    manifest = {
        "is": "manifest",
        "epoch": 1,
        "head": big.chain.head_at(1),
        "state_digest": big.digests[1],
        "n": N,
        "names": ["params", "momentum"],
        "chunk_bytes": CHUNK_BYTES,
    }
    chunks = bytes(32 * 3)
    for change, payload, reason in (
        ({"head": "ab" * 32}, chunks, "foreign"),
        ({"epoch": 2}, chunks, "foreign"),
        ({"epoch": 3, "head": big.chain.head}, chunks, "foreign"),
        ({"epoch": -1}, chunks, "foreign"),
        ({"n": N + 1}, chunks, "foreign"),
        ({"names": ["params"]}, chunks, "foreign"),
        ({"chunk_bytes": 1}, chunks, "foreign"),
        ({"state_digest": "00" * 32}, chunks, "digest"),
        ({}, chunks[1:], "malformed"),
        ({}, chunks + b"x", "oversized"),
        ({"epoch": True}, chunks, "malformed"),
        ({"more": 1}, chunks, "malformed"),
        ({"is": "chunk"}, chunks, "malformed"),
    ):
        with pytest.raises(RemoteProtocolError) as raised:
            between(answers(({**manifest, **change}, payload)), state_of(big, state))
        assert raised.value.reason == reason, change
    assert not state.torn


def test_an_update_of_the_wrong_form_is_refused(big: Run, joiner: Store) -> None:
    count = len(big.state.arithmetic.shards)
    start: tuple[dict[str, Any], bytes] = ({"is": "update", "shards": count}, b"")
    size = big.state.arithmetic.payload_sizes[0]
    payload = bytes(size)
    for frames, reason in (
        ([({"is": "update", "shards": count + 1}, b"")], "update"),
        ([({"is": "update", "shards": "5"}, b"")], "malformed"),
        ([start, ({"is": "shard", "index": 1}, payload)], "malformed"),
        ([start, ({"is": "shard", "index": 0}, payload[1:])], "malformed"),
        ([start, ({"is": "shard", "index": 0}, payload + b"x")], "oversized"),
        ([start, ({"is": "shard", "index": 0}, b"\x80" + payload[1:])], "code"),
        ([({"x": "y" * 5000}, b"")], "oversized"),
    ):
        with pytest.raises(RemoteProtocolError) as raised:
            between(answers(*frames), update_of(big, joiner))
        assert raised.value.reason == reason, frames
    assert joiner.heads_with_updates() == ()


def test_a_forged_genesis_is_refused(big: Run) -> None:
    raw = {**genesis_to_dict(big.chain.genesis), "params": N + 1}
    for genesis, reason in ((canonical(raw), "genesis"), (b"{", "malformed"), (b"[" * 9999, "malformed")):
        with pytest.raises(RemoteProtocolError) as raised:
            between(
                answers(({"is": "genesis", "genesis": genesis}, b"")),
                lambda open_stream: fetch_genesis(open_stream, CRYPTO, LIMITS, no_count),
            )
        assert raised.value.reason == reason


# --- a value that a donor says to have accepted -------------------------------------------------------


def accepted(run: Run, signer: NodeCrypto = CRYPTO) -> tuple[WantedUpdate, list[torch.Tensor], bytes]:
    """What comes after the head, of which there is no record yet; its shards, and who made them."""
    payloads = run.random_payloads()
    body = run.next_record(payloads).body
    inputs = inputs_digest(body.members, CRYPTO)
    digests = [blake3(bytes_of(payload)).hexdigest() for payload in payloads]
    (reducer,) = [m.peer for m in body.members]
    means = [
        SignedMean(reducer, digest, signer.sign(mean_message(body.prev, shard, digest, inputs)))
        for shard, digest in enumerate(digests)
    ]
    wanted = WantedUpdate(body.epoch, head_of(body, CRYPTO), body.result, body)
    return wanted, payloads, signed_means.pack(means)


def fetch_of(run: Run, wanted: WantedUpdate, joiner: Store) -> Fetch:
    arith = run.state.arithmetic
    return lambda open_stream: fetch_update(open_stream, wanted, arith, joiner, LIMITS, no_count)


def test_an_accepted_value_arrives_with_who_made_it_and_can_be_given_on(big: Run, joiner: Store) -> None:
    wanted, payloads, means = accepted(big)
    big.store.write_update(wanted.epoch, wanted.head, payloads, means=means)
    got = between(donor(big).serve, fetch_of(big, wanted, joiner))
    assert got == signed_means.unpack(means, len(payloads))
    assert joiner.read_means(wanted.epoch, wanted.head) == means
    assert all(map(torch.equal, joiner.read_update(wanted.epoch, wanted.head), payloads))


@pytest.mark.parametrize(
    "how", ["another signed", "for another value", "of too few shards", "no bytes of ours"]
)
def test_numbers_that_nobody_made_are_not_taken_for_an_accepted_value(
    big: Run, joiner: Store, tmp_path: Path, how: str
) -> None:
    signer = NodeCrypto(Identity.load_or_create(tmp_path / "key")) if how == "another signed" else CRYPTO
    wanted, payloads, means = accepted(big, signer)
    if how == "for another value":
        means = accepted(big)[2]
    elif how == "of too few shards":
        means = signed_means.pack(signed_means.unpack(means, len(payloads))[:-1])
    elif how == "no bytes of ours":
        means = b"\x91" + means
    big.store.write_update(wanted.epoch, wanted.head, payloads, means=means)
    with pytest.raises(RemoteProtocolError) as raised:
        between(donor(big).serve, fetch_of(big, wanted, joiner))
    assert raised.value.reason == "unproven" and not joiner.has_update(wanted.head)


def test_who_has_an_update_and_not_who_made_it_says_missing(big: Run, joiner: Store) -> None:
    wanted, payloads, means = accepted(big)
    big.store.write_update(wanted.epoch, wanted.head, payloads, means=means)
    big.store.drop_means(wanted.epoch - 1)
    assert big.store.read_means(wanted.epoch, wanted.head) == means, "its round is not over"
    big.store.drop_means(wanted.epoch)
    with pytest.raises(DonorFailed, match="missing"):
        between(donor(big).serve, fetch_of(big, wanted, joiner))


# --- donors that cannot or will not ---------------------------------------------------------------------


def test_a_donor_without_it_says_missing(big: Run, joiner: Store) -> None:
    absent = WantedUpdate(9, "ab" * 32, "00" * 32)
    arith = big.state.arithmetic
    for fetch in (
        lambda open_stream: fetch_update(open_stream, absent, arith, joiner, LIMITS, no_count),
        state_of(big, big.fresh(), epoch_max=0),
    ):
        with pytest.raises(DonorFailed) as raised:
            between(donor(big).serve, fetch)
        assert raised.value.reason == "missing"


def test_a_donor_whose_own_file_is_damaged_says_missing_and_sends_nothing_of_it(
    big: Run, joiner: Store
) -> None:
    flip(next(big.home.updates.glob("00000002-*")), -1)
    flip(next(big.home.checkpoints.glob("00000001-*")), -1)
    for fetch in (update_of(big, joiner), state_of(big, big.fresh())):
        with pytest.raises(DonorFailed) as raised:
            between(donor(big).serve, fetch)
        assert raised.value.reason == "missing"
    assert [c.epoch for c in big.checkpoints.list()] == [3]


def test_a_donor_serves_only_so_many_at_once(big: Run) -> None:
    one_at_a_time = donor(big, TransferLimits(stall_s=STALL_S, serves_max=1))

    async def scenario() -> None:
        async with stream_pair() as (mine, theirs):
            first = asyncio.create_task(one_at_a_time.serve(*theirs))
            await asyncio.sleep(0)
            with pytest.raises(DonorFailed) as raised:
                await _between(one_at_a_time.serve, state_of(big, big.fresh()))
            assert raised.value.reason == "busy"
            mine[1].close()
            await first
        await _between(one_at_a_time.serve, state_of(big, big.fresh()))

    asyncio.run(scenario())


def test_joiners_leave_a_stream_for_who_needs_an_update(big: Run, joiner: Store) -> None:
    """A state takes hours, and each joiner asks four donors: a member that is late would find all busy."""
    two = donor(big, TransferLimits(stall_s=STALL_S, serves_max=2))

    async def scenario() -> None:
        async with stream_pair() as (mine, theirs):
            first = asyncio.create_task(two.serve(*theirs))
            stream = Frames(*mine, LIMITS, no_count)
            await fetch_manifest(stream, 2, big.chain, big.fresh())
            with pytest.raises(DonorFailed) as raised:
                await _between(two.serve, state_of(big, big.fresh()))
            assert raised.value.reason == "busy"
            await _between(two.serve, update_of(big, joiner))
            mine[1].close()
            await first
        await _between(two.serve, state_of(big, big.fresh()))

    asyncio.run(scenario())


@pytest.mark.parametrize("of_states", [False, True])
def test_two_that_hold_all_streams_make_room_for_who_has_none(
    big: Run, joiner: Store, of_states: bool
) -> None:
    """Everybody who had missed a round was told `busy`, for as long as they liked."""
    shared = donor(big, TransferLimits(stall_s=30.0, serves_max=5 if of_states else 4))
    fetch = state_of(big, big.fresh()) if of_states else update_of(big, joiner)

    async def scenario() -> None:
        async with contextlib.AsyncExitStack() as stack:
            pairs = [await stack.enter_async_context(stream_pair()) for _ in range(4)]
            held = []
            for index, (mine, theirs) in enumerate(pairs):
                held.append(asyncio.create_task(shared.serve(*theirs, peer="ab"[index % 2])))
                if of_states:
                    stream = Frames(*mine, LIMITS, no_count)
                    await fetch_manifest(stream, 2, big.chain, big.fresh())
                await asyncio.sleep(0)
            await _between(lambda *theirs: shared.serve(*theirs, peer="late"), fetch)
            assert [task.done() for task in held] == [True, False, False, False]
            for _, writer in (mine for mine, _ in pairs):
                writer.close()
            await asyncio.gather(*held, return_exceptions=True)

    asyncio.run(scenario())


async def _silent(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    await reader.read()


async def _ends(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    await reader.read(1)


async def _ends_in_a_frame(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    await reader.read(1)
    writer.write(b"\0\0\0\x10\0\0\0\0abc")
    await writer.drain()


@pytest.mark.parametrize(
    ("serve", "reason"), [(_silent, "timeout"), (_ends, "ended"), (_ends_in_a_frame, "ended")]
)
def test_a_donor_that_is_silent_or_goes_away_is_left(
    big: Run, joiner: Store, serve: Serve, reason: str
) -> None:
    for fetch in (update_of(big, joiner), state_of(big, big.fresh())):
        with pytest.raises(DonorFailed) as raised:
            between(serve, fetch)
        assert raised.value.reason == reason


def test_a_donor_that_drips_bytes_is_left(big: Run, joiner: Store) -> None:
    async def drip(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"\0\0\x01\0\0\0\0\0")
        while not reader.at_eof():
            writer.write(b"\x81")
            await writer.drain()
            await asyncio.sleep(STALL_S / 10)

    with pytest.raises(DonorFailed) as raised:
        between(drip, update_of(big, joiner))
    assert raised.value.reason == "timeout"


# --- joiners that ask for nonsense ----------------------------------------------------------------------


@pytest.mark.parametrize(
    "request_",
    [
        {"ask": "everything"},
        {"ask": "genesis", "more": 1},
        {"ask": "update", "epoch": -1, "head": "ab" * 32},
        {"ask": "update", "epoch": 1, "head": "../../etc/passwd"},
        {"ask": "update", "epoch": 1},
        {"ask": "checkpoint", "epoch_max": True},
        {"ask": "checkpoint", "epoch_max": 2**60},
        {"ask": "chunk", "epoch": 1, "head": "HEAD", "index": 3},
        [],
        {"ask": "x" * 2000},
    ],
)
def test_a_request_that_is_none_is_refused(big: Run, request_: Any) -> None:
    if isinstance(request_, dict) and request_.get("head") == "HEAD":
        request_ = {**request_, "head": big.chain.head_at(1)}

    async def scenario() -> None:
        async with stream_pair() as (mine, theirs):
            for part in frame_parts(msgpack.packb(request_)):
                mine[1].write(part)
            with pytest.raises(RemoteProtocolError):
                await donor(big).serve(*theirs)

    asyncio.run(scenario())


def test_a_joiner_that_falls_silent_frees_its_place(big: Run) -> None:
    async def scenario() -> None:
        async with stream_pair() as (_, theirs):
            with pytest.raises(TimeoutError):
                await donor(big).serve(*theirs)

    asyncio.run(scenario())


def test_at_the_head_no_checkpoint_is_signed_so_none_is_taken(big: Run) -> None:
    chain = Chain(big.chain.genesis, big.chain.records[:1])
    with pytest.raises(RemoteProtocolError) as raised:
        between(
            donor(big).serve,
            state_of(big, big.fresh(), 1, chain=chain),
        )
    assert raised.value.reason == "digest"


def test_a_fetched_state_of_another_size_of_model_is_refused(big: Run) -> None:
    with pytest.raises(RemoteProtocolError):
        between(donor(big).serve, state_of(big, new_state(N // 2)))


def test_a_state_that_was_torn_by_a_failed_fetch_is_whole_after_a_restore(big: Run) -> None:
    with pytest.raises(RemoteProtocolError):
        between(tampered(big, 8 * N), state_of(big, big.state))
    store, checkpoints = big.reopened()
    restored = restore(big.chain, 3, store, checkpoints, big.state)
    assert restored is not None and state_bytes(big.state) == big.numbers[3]
