"""HOME/base: files that are pinned by digest, copied, fetched from a donor, or refused."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from state.kit import Run, Stream, stream_pair
from state.test_transfer import LIMITS, between, no_count

from tapestry.node.disk.base import (
    ANEW,
    OWN,
    PIECE_BYTES,
    BaseFile,
    BaseFolder,
    take_base,
)
from tapestry.node.net.donor import Donor
from tapestry.node.net.transfer import DonorFailed, fetch_file
from tapestry.node.net.wire import RemoteProtocolError

LARGE = bytes(range(256)) * (PIECE_BYTES // 256) * 2 + b"the end"  # three pieces, the last one short


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A base's directory, with a file that no run takes."""
    folder = tmp_path / "source"
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "llama"}')
    (folder / "tokenizer.json").write_bytes(LARGE)
    (folder / "training_args.bin").write_bytes(b"a pickle")
    return folder


@pytest.fixture
def held(source: Path, tmp_path: Path) -> BaseFolder:
    """HOME/base of a member that has it all."""
    files = take_base(source, tmp_path / "held")
    return BaseFolder(tmp_path / "held", files)


def test_a_run_takes_of_a_base_the_files_that_members_need_and_no_other(held: BaseFolder) -> None:
    assert sorted(path.name for path in held.folder.iterdir()) == ["config.json", "tokenizer.json"]
    assert held.missing() == []
    assert str(held.files["config.json"]).startswith("config.json 23 ")


def test_a_file_of_another_size_or_none_is_missing(held: BaseFolder) -> None:
    (held.folder / "config.json").write_text("{}")
    (held.folder / "tokenizer.json").unlink()
    assert [file.name for file in held.missing()] == ["config.json", "tokenizer.json"]


def test_a_members_own_directory_is_taken_where_it_has_the_same_bytes(
    held: BaseFolder, source: Path, tmp_path: Path
) -> None:
    (source / "config.json").write_text('{"model_type": "LLAMA"}')  # of the same size
    mine = BaseFolder(tmp_path / "mine", [*held.files.values()])
    assert [file.name for file in mine.take(source)] == ["config.json"]
    assert (mine.folder / "tokenizer.json").read_bytes() == LARGE


def test_a_file_comes_from_a_donor_to_the_byte(held: BaseFolder, tmp_path: Path, run: Run) -> None:
    mine = BaseFolder(tmp_path / "mine", [*held.files.values()])
    for file in mine.missing():
        between(_serves(run, held), _fetches(file, mine))
    assert mine.missing() == []
    assert (mine.folder / "tokenizer.json").read_bytes() == LARGE


def test_a_download_goes_on_where_it_broke_off(held: BaseFolder, tmp_path: Path, run: Run) -> None:
    mine, file = BaseFolder(tmp_path / "mine", [*held.files.values()]), held.files["tokenizer.json"]
    mine.append(file, LARGE[: PIECE_BYTES + 5])  # a piece, and some of the next
    donor = Asked(held.folder, [*held.files.values()])
    between(_serves(run, donor), _fetches(file, mine))
    assert donor.asked == [1, 2]
    assert (mine.folder / "tokenizer.json").read_bytes() == LARGE


def test_another_file_in_its_place_is_refused_and_dropped(held: BaseFolder, tmp_path: Path, run: Run) -> None:
    mine, file = BaseFolder(tmp_path / "mine", [*held.files.values()]), held.files["tokenizer.json"]
    (held.folder / "tokenizer.json").write_bytes(LARGE[:-1] + b"!")
    with pytest.raises(RemoteProtocolError, match=r"tokenizer.json has the digest") as caught:
        between(_serves(run, held), _fetches(file, mine))
    assert caught.value.reason == "digest"
    assert [*mine.folder.iterdir()] == []


@pytest.mark.parametrize("left", [PIECE_BYTES, 2 * PIECE_BYTES, len(LARGE)])
def test_what_an_earlier_donor_poisoned_is_asked_anew_of_an_honest_one(
    held: BaseFolder, tmp_path: Path, run: Run, left: int
) -> None:
    """The honest donor was named, and who asked the liar first at each start never had the file."""
    mine, file = BaseFolder(tmp_path / "mine", [*held.files.values()]), held.files["tokenizer.json"]
    mine.append(file, bytes(left))  # zeros: a power cut leaves them as well
    asyncio.run(_streams(_serves(run, held), _fetches(file, mine)))
    assert [path.name for path in mine.folder.iterdir()] == ["tokenizer.json"]
    assert (mine.folder / "tokenizer.json").read_bytes() == LARGE


def test_what_the_disk_no_longer_gives_of_an_earlier_download_is_asked_anew(
    held: BaseFolder, tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every start ended with the same error."""
    mine, file = BaseFolder(tmp_path / "mine", [*held.files.values()]), held.files["tokenizer.json"]
    mine.append(file, LARGE[:PIECE_BYTES])
    spoilt, of = mine.part(file).stat().st_ino, BaseFile.of

    def reading(path: Path) -> BaseFile:
        if path.stat().st_ino == spoilt:
            raise OSError(errno.EIO, "bad sector")
        return of(path)

    monkeypatch.setattr(BaseFile, "of", reading)
    os.link(mine.part(file), tmp_path / "the inode is not used again")
    asyncio.run(_streams(_serves(run, held), _fetches(file, mine)))
    assert (mine.folder / "tokenizer.json").read_bytes() == LARGE


def test_a_donor_is_named_for_a_false_file_that_it_gave_by_itself(
    held: BaseFolder, tmp_path: Path, run: Run
) -> None:
    mine, file = BaseFolder(tmp_path / "mine", [*held.files.values()]), held.files["tokenizer.json"]
    (held.folder / "tokenizer.json").write_bytes(LARGE[:-1] + b"!")
    mine.append(file, LARGE[:PIECE_BYTES])
    with pytest.raises(RemoteProtocolError, match=r"tokenizer.json has the digest") as caught:
        asyncio.run(_streams(_serves(run, held), _fetches(file, mine)))
    assert caught.value.reason == "digest"
    assert mine.part(file).read_bytes() == LARGE[:PIECE_BYTES], "which an earlier donor gave"
    assert len([*mine.folder.iterdir()]) == 1


@pytest.mark.parametrize("gives", [3, 2])
def test_a_false_end_does_not_destroy_what_the_donor_before_gave(
    held: BaseFolder, tmp_path: Path, run: Run, gives: int
) -> None:
    """The honest donor broke off, and the next one gave a false last piece: all began again, of that one."""
    mine, file = BaseFolder(tmp_path / "mine", [*held.files.values()]), held.files["tokenizer.json"]
    mine.append(file, LARGE[: 2 * PIECE_BYTES])
    honest = Asked(held.folder, [*held.files.values()])
    liar = _liar(tmp_path / "liar", [*held.files.values()], gives)
    with pytest.raises(RemoteProtocolError if gives == 3 else DonorFailed):
        asyncio.run(_streams(_serves(run, liar), _fetches(file, mine)))
    assert liar.asked == [2, 0, 1, 2]
    asyncio.run(_streams(_serves(run, honest), _fetches(file, mine)))
    assert honest.asked == [2]
    assert [path.name for path in mine.folder.iterdir()] == [file.name]
    assert (mine.folder / file.name).read_bytes() == LARGE


def test_what_honest_donors_give_beside_a_false_beginning_adds_up(
    held: BaseFolder, tmp_path: Path, run: Run
) -> None:
    mine, file = BaseFolder(tmp_path / "mine", [*held.files.values()]), held.files["tokenizer.json"]
    mine.append(file, bytes(2 * PIECE_BYTES))
    breaks_off = Asked(held.folder, [*held.files.values()], gives=2)
    with pytest.raises(DonorFailed):
        asyncio.run(_streams(_serves(run, breaks_off), _fetches(file, mine)))
    honest = Asked(held.folder, [*held.files.values()])
    asyncio.run(_streams(_serves(run, honest), _fetches(file, mine)))
    assert (breaks_off.asked, honest.asked) == ([2, 0, 1, 2], [2, 2])
    assert [path.name for path in mine.folder.iterdir()] == [file.name]
    assert (mine.folder / file.name).read_bytes() == LARGE


@pytest.mark.parametrize("gives", [3, 2])
def test_a_second_false_end_does_not_destroy_what_honest_donors_gave_beside_a_false_beginning(
    held: BaseFolder, tmp_path: Path, run: Run, gives: int
) -> None:
    mine, file = BaseFolder(tmp_path / "mine", [*held.files.values()]), held.files["tokenizer.json"]
    mine.append(file, bytes(PIECE_BYTES))
    mine.append(file, LARGE[: 2 * PIECE_BYTES], ANEW)
    liar = _liar(tmp_path / "liar", [*held.files.values()], gives)
    with pytest.raises(RemoteProtocolError if gives == 3 else DonorFailed):
        asyncio.run(_streams(_serves(run, liar), _fetches(file, mine)))
    assert liar.asked == [1, 2, 2, 0, 1, 2]
    assert mine.part(file, ANEW).read_bytes() == LARGE[: 2 * PIECE_BYTES]
    honest = Asked(held.folder, [*held.files.values()])
    asyncio.run(_streams(_serves(run, honest), _fetches(file, mine)))
    assert honest.asked == [1, 2, 2]
    assert [path.name for path in mine.folder.iterdir()] == [file.name]
    assert (mine.folder / file.name).read_bytes() == LARGE


def test_two_false_beginnings_keep_nobody_out(held: BaseFolder, tmp_path: Path, run: Run) -> None:
    mine, file = BaseFolder(tmp_path / "mine", [*held.files.values()]), held.files["tokenizer.json"]
    mine.append(file, bytes(PIECE_BYTES))
    mine.append(file, bytes(2 * PIECE_BYTES), ANEW)
    mine.append(file, bytes(PIECE_BYTES), OWN)  # it was killed
    honest = Asked(held.folder, [*held.files.values()])
    asyncio.run(_streams(_serves(run, honest), _fetches(file, mine)))
    assert honest.asked == [1, 2, 2, 0, 1, 2]
    assert [path.name for path in mine.folder.iterdir()] == [file.name]
    assert (mine.folder / file.name).read_bytes() == LARGE


@pytest.mark.parametrize("anew", [0, PIECE_BYTES])
def test_where_the_disk_has_no_room_for_two_a_false_beginning_makes_place(
    held: BaseFolder, tmp_path: Path, run: Run, anew: int
) -> None:
    """Each start ended in the same error, for good."""
    mine, file = Small(tmp_path / "mine", [*held.files.values()]), held.files["tokenizer.json"]
    mine.room_bytes = len(LARGE) * 3 // 2
    mine.append(file, bytes(PIECE_BYTES) + LARGE[PIECE_BYTES : 2 * PIECE_BYTES])
    mine.append(file, LARGE[:anew], ANEW)
    asyncio.run(_streams(_serves(run, held), _fetches(file, mine)))
    assert [path.name for path in mine.folder.iterdir()] == [file.name]
    assert (mine.folder / file.name).read_bytes() == LARGE


def test_what_was_begun_anew_is_gone_on_with_where_the_older_made_place(
    held: BaseFolder, tmp_path: Path, run: Run
) -> None:
    mine, file = Small(tmp_path / "mine", [*held.files.values()]), held.files["tokenizer.json"]
    mine.room_bytes = 3 * PIECE_BYTES
    mine.append(file, bytes(2 * PIECE_BYTES))
    breaks_off = Asked(held.folder, [*held.files.values()], gives=2)
    with pytest.raises(DonorFailed):
        asyncio.run(_streams(_serves(run, breaks_off), _fetches(file, mine)))
    assert [path.name for path in mine.folder.iterdir()] == [file.name + ANEW]
    honest = Asked(held.folder, [*held.files.values()])
    asyncio.run(_streams(_serves(run, honest), _fetches(file, mine)))
    assert honest.asked == [2]
    assert (mine.folder / file.name).read_bytes() == LARGE


def test_a_disk_without_room_for_the_file_alone_is_an_error(
    held: BaseFolder, tmp_path: Path, run: Run
) -> None:
    mine, file = Small(tmp_path / "mine", [*held.files.values()]), held.files["tokenizer.json"]
    mine.room_bytes = 2 * PIECE_BYTES
    with pytest.raises(OSError, match="No space"):
        asyncio.run(_streams(_serves(run, held), _fetches(file, mine)))


def test_a_members_own_directory_ends_what_a_download_left(
    held: BaseFolder, source: Path, tmp_path: Path
) -> None:
    mine, file = Small(tmp_path / "mine", [*held.files.values()]), held.files["tokenizer.json"]
    mine.room_bytes = len(LARGE) * 3 // 2
    mine.append(file, bytes(PIECE_BYTES))
    mine.append(file, bytes(PIECE_BYTES // 2), ANEW)
    assert mine.take(source) == []
    assert sorted(path.name for path in mine.folder.iterdir()) == sorted(mine.files)


class Asked(BaseFolder):
    """Knows what it was asked for; of the whole file it gives so many pieces."""

    def __init__(self, folder: Path, files: list[BaseFile], gives: int = 3) -> None:
        super().__init__(folder, files)
        self.asked: list[int] = []
        self.gives = gives

    def piece(self, digest: str, index: int) -> bytes | None:
        self.asked.append(index)
        return super().piece(digest, index) if index < self.gives or 0 not in self.asked else None


class Small(BaseFolder):
    """On a disk with so much room; what does not fit is torn."""

    room_bytes = 0

    def with_room(self, file: BaseFile, end: str, write: Callable[[], None]) -> None:
        def fits() -> None:
            write()
            if sum(path.stat().st_size for path in self.folder.iterdir()) > self.room_bytes:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        super().with_room(file, end, fits)


def _liar(folder: Path, files: list[BaseFile], gives: int) -> Asked:
    """Serves zeros."""
    liar = Asked(folder, files, gives)
    for file in files:
        liar.append(file, bytes(file.size_bytes))
        os.rename(liar.part(file), folder / file.name)
    return liar


def test_a_donor_without_the_file_says_missing(held: BaseFolder, tmp_path: Path, run: Run) -> None:
    mine, file = BaseFolder(tmp_path / "mine", [*held.files.values()]), held.files["tokenizer.json"]
    (held.folder / "tokenizer.json").unlink()
    for folder in (held, None):  # None: of a run without a base
        with pytest.raises(DonorFailed, match="missing"):
            between(_serves(run, folder), _fetches(file, mine))


@pytest.mark.parametrize("index", [3, 2**31])
def test_a_piece_beyond_the_end_is_none(held: BaseFolder, index: int) -> None:
    assert held.piece(held.files["tokenizer.json"].digest, index) is None
    assert held.piece("ab" * 32, 0) is None


def _serves(run: Run, base: BaseFolder | None) -> Any:
    return Donor(run.chain.genesis, run.store, run.checkpoints, LIMITS, no_count, base).serve


async def _streams(serve: Any, fetch: Any) -> None:
    """As `between`, with a stream for each time that one is opened."""
    async with contextlib.AsyncExitStack() as stack:

        async def open_stream() -> Stream:
            mine, theirs = await stack.enter_async_context(stream_pair())
            serving.append(asyncio.create_task(serve(*theirs)))
            return mine

        serving: list[asyncio.Task[None]] = []
        try:
            await fetch(open_stream)
        finally:
            await asyncio.gather(*serving)


def _fetches(file: BaseFile, folder: BaseFolder) -> Any:
    async def fetch(open_stream: Any) -> None:
        async with asyncio.timeout(10):
            await fetch_file(open_stream, file, folder, LIMITS, no_count)

    return fetch
