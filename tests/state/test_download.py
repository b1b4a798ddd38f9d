"""A state from several donors at once: by their speed, past the bad ones, and on from where it broke off."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import threading
from collections import Counter
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
from state.kit import STALL_S, Run, Stream, state_bytes, stream_pair

from tapestry.node.disk.checkpoints import CHUNK_BYTES, Checkpoints
from tapestry.node.disk.part import NAME as PART
from tapestry.node.disk.part import Part
from tapestry.node.net import download as download_module
from tapestry.node.net.donor import Donor
from tapestry.node.net.download import Wanted, fetch_state
from tapestry.node.net.transfer import DonorFailed, TransferLimits
from tapestry.node.net.wire import RemoteProtocolError, StreamEnded
from tapestry.node.state.model import ModelState

N = 1_300_001
CHUNKS = -(-8 * N // CHUNK_BYTES)
LIMITS = TransferLimits(stall_s=STALL_S)
PATIENT = TransferLimits(stall_s=600.0)
FETCH_S = 20.0  # a fetch that waits for a donor's silence ends here

Serve = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A checkpoint of epoch 1, which the record of epoch 2 signed. Nothing here writes to it."""
    made = Run(tmp_path_factory.mktemp("donor"), n=N, shard_elements=1 << 20)
    made.advance()
    made.save()
    made.advance()
    return made


class Asked:
    """Donors at the other ends of streams, and what came of asking them."""

    def __init__(self, run: Run, limits: TransferLimits = LIMITS, **serves: Serve) -> None:
        self.run, self.limits = run, limits
        self.serves = serves
        self.state = run.fresh()
        self.faults: dict[str, Exception] = {}
        self.bytes: Counter[str] = Counter()
        self.opened = 0  # streams
        self.told: list[tuple[str, int, int]] = []

    def fetch(self, checkpoints: Checkpoints | None = None) -> str:
        """The digest; raises what fetch_state does."""
        return asyncio.run(self._fetch(checkpoints))

    async def _fetch(self, checkpoints: Checkpoints | None) -> str:
        async with contextlib.AsyncExitStack() as stack:
            tasks: list[asyncio.Task[None]] = []

            def opener(serve: Serve) -> Callable[[], Awaitable[Stream]]:
                async def open_stream() -> Stream:
                    self.opened += 1
                    mine, theirs = await stack.enter_async_context(stream_pair())
                    tasks.append(asyncio.create_task(_served(serve, theirs)))
                    return mine

                return open_stream

            openers = {name: opener(serve) for name, serve in self.serves.items()}
            wanted = Wanted(2, self.run.chain, self.state, checkpoints, lambda *far: self.told.append(far))
            try:
                async with asyncio.timeout(FETCH_S):
                    return await fetch_state(openers, wanted, self.limits, self._count, self._on_fault)
            finally:
                for task in tasks:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)

    def _on_fault(self, name: str, error: Exception) -> None:
        assert threading.current_thread() is threading.main_thread(), "what it changes is the loop's"
        self.faults[name] = error

    def _count(self, direction: str, count: int) -> None:
        self.bytes[direction] += count

    def is_right(self, digest: str) -> bool:
        return digest == self.run.chain.state_digest_at(1) and state_bytes(self.state) == self.run.numbers[1]


def test_a_checkpoint_that_was_rolled_back_is_not_taken_up_and_is_no_lie(tmp_path: Path) -> None:
    """The donor has 2, which was undone: it is asked for what came before."""
    asyncio.run(_fetch_what_came_before(tmp_path))


async def _fetch_what_came_before(tmp_path: Path) -> None:
    run = Run(tmp_path / "home", n=700)
    run.advance()
    run.save()
    run.advance()
    run.save()
    run.roll_back(0)
    state, limits = run.fresh(), TransferLimits(stall_s=60.0)
    run.checkpoints.save(run.fresh_at(0), run.digests[0])
    async with stream_pair() as (mine, theirs):
        serving = asyncio.create_task(_served(honest(run), theirs))

        async def open_stream() -> Stream:
            return mine

        faults: dict[str, Exception] = {}
        wanted = Wanted(3, run.chain, state)
        digest = await fetch_state({"a": open_stream}, wanted, limits, lambda *_: None, faults.__setitem__)
        serving.cancel()
        await asyncio.gather(serving, return_exceptions=True)
    assert (state.epoch, digest) == (0, run.digests[0]) and not faults


def test_a_checkpoint_that_is_older_than_our_state_is_as_good_as_none(tmp_path: Path) -> None:
    """Who says that it is ahead would take us back, and our own state would be gone."""
    asyncio.run(_fetch_nothing_older(tmp_path))


async def _fetch_nothing_older(tmp_path: Path) -> None:
    run = Run(tmp_path / "home", n=700)
    run.advance()
    run.save()
    run.advance()
    state = run.fresh()
    before = state_bytes(state)
    async with stream_pair() as (mine, theirs):
        serving = asyncio.create_task(_served(honest(run), theirs))

        async def open_stream() -> Stream:
            return mine

        wanted = Wanted(2, run.chain, state, epoch_min=2)
        with pytest.raises(DonorFailed, match="older than ours") as failed:
            await fetch_state(
                {"a": open_stream}, wanted, TransferLimits(stall_s=60.0), lambda *_: None, lambda *_: None
            )
        serving.cancel()
        await asyncio.gather(serving, return_exceptions=True)
    assert failed.value.reason == "missing" and state_bytes(state) == before


async def _served(serve: Serve, stream: Stream) -> None:
    with contextlib.suppress(StreamEnded, RemoteProtocolError, ConnectionError, TimeoutError):
        await serve(*stream)
    stream[1].close()


def honest(run: Run, checkpoints: Checkpoints | None = None) -> Serve:
    limits = TransferLimits(stall_s=60.0)
    donor = Donor(run.chain.genesis, run.store, checkpoints or run.checkpoints, limits, lambda *_: None)
    return donor.serve


class Writer:
    """A donor's end, of which the bytes after `after` meet with something."""

    def __init__(self, writer: asyncio.StreamWriter, after: int, what: str) -> None:
        self._writer, self._left, self._what = writer, after, what

    def write(self, data: Any) -> None:
        before, self._left = self._left, self._left - len(data)
        if before > 0 >= self._left:
            if self._what == "ends":
                self._writer.close()
            if self._what == "lies":
                data = bytearray(data)
                data[before - 1] ^= 1
        if before > 0 or self._what == "lies":
            self._writer.write(data)

    async def drain(self) -> None:
        if self._left <= 0 and self._what == "sleeps":
            await asyncio.Event().wait()
        await self._writer.drain()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._writer, name)


def after(chunks: float, what: str, serve: Serve) -> Serve:
    """Sleeps, ends or lies after so many chunks."""

    async def served(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await serve(reader, Writer(writer, int(chunks * CHUNK_BYTES), what))  # type: ignore[arg-type]

    return served


def other_state(run: Run, folder: Path, digest: str) -> Checkpoints:
    """Another state under a signed digest: what a liar has who knows what the others have."""
    state: ModelState = run.fresh()
    for vector in state.overwrite():
        vector[:] = bytes(len(vector))
    state.adopt(1, run.chain.head_at(1), state._hash())
    checkpoints = Checkpoints(folder, run.chain.genesis.run_id, 3)
    checkpoints.load()
    checkpoints.save(state, digest)
    return checkpoints


def test_every_donor_gives_a_part(run: Run, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    asked = Asked(run, a=honest(run), b=honest(run), c=honest(run), d=honest(run))
    assert asked.is_right(asked.fetch()) and not asked.faults
    (line,) = [r.getMessage() for r in caplog.records if "state=fetched" in r.getMessage()]
    shares = [int(one.split(":")[1]) for one in line.split("donors=")[1].split(",")]
    assert len(shares) == 4 and min(shares) > 0 and CHUNKS <= sum(shares) <= CHUNKS + 3
    assert asked.bytes["in"] < 8 * N + 8 * CHUNK_BYTES, "hardly anything comes twice"
    whats, done, totals = zip(*asked.told, strict=True)
    assert set(whats) == {"state of epoch 1 bytes"} and list(done) == sorted(done)
    assert done[-1] == totals[-1] == asked.state.size_bytes


@pytest.mark.parametrize("slow", ["a", "b"])
def test_the_last_pieces_of_a_donor_that_sleeps_are_asked_of_another(run: Run, slow: str) -> None:
    """Nobody waits until its silence has been long enough."""
    serves = {"a": honest(run), "b": honest(run)}
    serves[slow] = after(1.5, "sleeps", honest(run))
    asked = Asked(run, PATIENT, **serves)
    assert asked.is_right(asked.fetch()) and not asked.faults


@pytest.mark.parametrize("bad", ["a", "b"])
@pytest.mark.parametrize(("what", "kind"), [("lies", RemoteProtocolError), ("ends", DonorFailed)])
def test_a_donor_that_fails_is_named_and_its_pieces_come_from_another(
    run: Run, bad: str, what: str, kind: type[Exception]
) -> None:
    serves = {"a": honest(run), "b": honest(run)}
    serves[bad] = after(1.5, what, honest(run))
    asked = Asked(run, **serves)
    assert asked.is_right(asked.fetch())
    assert [*asked.faults] == [bad] and isinstance(asked.faults[bad], kind)


def test_if_all_fail_the_first_is_told_by_what_is_raised_and_the_others_by_name(run: Run) -> None:
    asked = Asked(run, a=after(1.5, "ends", honest(run)), b=after(1.5, "lies", honest(run)))
    with pytest.raises(DonorFailed, match="ended"):
        asked.fetch()
    assert [*asked.faults] == ["b"] and asked.state.torn


def test_a_lone_liar_about_the_whole_is_outvoted(run: Run, tmp_path: Path) -> None:
    signed = run.chain.state_digest_at(1)
    assert signed is not None
    lie = honest(run, other_state(run, tmp_path, signed))
    asked = Asked(run, a=lie, b=honest(run), c=honest(run))
    assert asked.is_right(asked.fetch())


def test_who_vouched_for_a_state_that_nobody_signed_is_named(run: Run, tmp_path: Path) -> None:
    signed = run.chain.state_digest_at(1)
    assert signed is not None
    lie = honest(run, other_state(run, tmp_path, signed))
    asked = Asked(run, a=lie, b=lie)
    mine = Checkpoints(tmp_path / "mine", run.chain.genesis.run_id, 3)
    mine.load()
    with pytest.raises(RemoteProtocolError, match="has the digest"):
        asked.fetch(mine)
    assert [*asked.faults] == ["b"] and asked.state.torn
    assert not (tmp_path / "mine" / PART).exists(), "it would be taken up again"


@pytest.mark.parametrize("gives", [0.5, 99.0])
def test_liars_whose_offer_was_chosen_do_not_keep_a_joiner_from_who_has_the_state(
    run: Run, tmp_path: Path, gives: float
) -> None:
    """They outvote the honest donor, and give a part of what they offer, or all of it."""
    signed = run.chain.state_digest_at(1)
    assert signed is not None
    lie = after(gives, "ends", honest(run, other_state(run, tmp_path, signed)))
    asked = Asked(run, a=lie, b=honest(run), c=lie)
    mine = Checkpoints(tmp_path / "mine", run.chain.genesis.run_id, 3)
    mine.load()
    assert asked.is_right(asked.fetch(mine)) and {*asked.faults} == {"a", "c"}
    assert [c.epoch for c in mine.list()] == [1] and not (tmp_path / "mine" / PART).exists()


def test_what_came_before_a_crash_is_not_asked_for_again_and_becomes_the_checkpoint(
    run: Run, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    mine = Checkpoints(tmp_path, run.chain.genesis.run_id, 3)
    mine.load()
    first = Asked(run, a=after(6.5, "ends", honest(run)))
    with pytest.raises(DonorFailed):
        first.fetch(mine)
    part = tmp_path / PART
    data = bytearray(part.read_bytes())
    data[-8 * N + 100] ^= 1  # of the first chunk: a power cut spoilt it
    part.write_bytes(data)

    caplog.set_level("INFO")
    read = Part.read

    def reading(self: Part, index: int) -> bytes:
        assert not second.opened, "a donor that waits while a large part is read hangs up"
        return read(self, index)

    monkeypatch.setattr(Part, "read", reading)
    again = Checkpoints(tmp_path, run.chain.genesis.run_id, 3)
    again.load()
    second = Asked(run, b=honest(run))
    assert second.is_right(second.fetch(again))
    assert f"state=resumed epoch=1 chunks=5 of={CHUNKS}" in caplog.text
    assert second.bytes["in"] < (CHUNKS - 5) * CHUNK_BYTES + 4096
    (kept,) = again.list()
    assert not part.exists() and kept.path.read_bytes() == run.checkpoints.list()[-1].path.read_bytes()
    loaded = run.fresh()
    assert again.load_newest(run.chain, 1, loaded) is not None and loaded.digest() == second.state.digest()


class Damaged:
    """A chain of which the disk no longer gives a record."""

    def __init__(self, chain: Any) -> None:
        self._chain = chain

    def state_digest_at(self, epoch: int) -> str:
        raise OSError(errno.EIO, f"record {epoch + 1} is damaged")

    def __getattr__(self, name: str) -> Any:
        return getattr(self._chain, name)


@pytest.mark.parametrize("donors", ["a", "ab"])
def test_a_damaged_record_of_our_own_ends_the_fetch_and_names_no_donor(
    run: Run, monkeypatch: pytest.MonkeyPatch, donors: str
) -> None:
    """It waited for good for an offer, and held the state's lock: the node was joining for ever."""
    monkeypatch.setattr(run, "chain", Damaged(run.chain))
    asked = Asked(run, PATIENT, **dict.fromkeys(donors, honest(run)))
    with pytest.raises(OSError, match="is damaged"):
        asked.fetch()
    assert not asked.faults


def test_a_chunk_that_the_disk_no_longer_gives_is_asked_for_again(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A bad sector ended the node at every start, until somebody deleted the file."""
    mine = Checkpoints(tmp_path, run.chain.genesis.run_id, 3)
    mine.load()
    with pytest.raises(DonorFailed):
        Asked(run, a=after(6.5, "ends", honest(run))).fetch(mine)
    read = Part.read

    def reading(self: Part, index: int) -> bytes:
        if index == 2:
            raise OSError(errno.EIO, "bad sector")
        return read(self, index)

    monkeypatch.setattr(Part, "read", reading)
    again = Asked(run, b=honest(run))
    assert again.is_right(again.fetch(mine))
    assert again.bytes["in"] < (CHUNKS - 5) * CHUNK_BYTES + 4096


def test_a_disk_that_is_gone_is_no_damage(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mine = Checkpoints(tmp_path, run.chain.genesis.run_id, 3)
    mine.load()
    with pytest.raises(DonorFailed):
        Asked(run, a=after(6.5, "ends", honest(run))).fetch(mine)

    def reading(self: Part, index: int) -> bytes:
        raise OSError(errno.ENODEV, "no such device")

    monkeypatch.setattr(Part, "read", reading)
    with pytest.raises(OSError, match="no such device"):
        Asked(run, b=honest(run)).fetch(mine)


def test_a_window_follows_the_donors_speed() -> None:
    giving = download_module._Giving(began_s=0.0)
    assert giving.window(5.0) == download_module.WINDOW_MIN
    giving.given = 3
    assert [giving.window(now) for now in (0.1, 1.0, 30.0)] == [8, 4, 2]
