"""A source's text -> ids on disk, once: in bounded memory, and going on where a killed trainer stopped.

Each source has one file of ids, uint16 or uint32 by the vocabulary; every document ends with eos, and begins
with bos where the run has it so. The file's name is a digest of everything that the ids depend on: the
tokenizer with its bos and eos, how the source is read, and path, size and time of each file. The file grows
under another name; every PART_TOKENS ids it is synced and its length noted together with the place in the
text, and a start that finds such a note goes on from there. To find the place it reads, and judges, the text
of the current file again, but does not tokenize it, which is what takes time.

One process at a time builds in a folder: a lock, which the kernel drops with whoever held it. The files are
this member's text in another form, so only their owner may read them.

Must not import torch.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from tapestry.node.spec.data import reals_of
from tapestry.node.trainer.data.errors import DamagedFile, DataError
from tapestry.node.trainer.data.files import Piece, SourceFile
from tapestry.node.trainer.data.protected import Judge, clear, digest_of, judge_of
from tapestry.node.trainer.data.readers.registry import format_named
from tapestry.node.trainer.data.sources import CACHE_TAG, Listing
from tapestry.node.trainer.data.tally import Group, Tally
from tapestry.node.trainer.tokenizers.api import Tokenizer

CACHE_VERSION = 2
PART_TOKENS = 1 << 24  # Guess: ten seconds of a core's work, the most that a kill costs
BATCH_CHARS = 1 << 20  # that the tokenizer's threads share; guess
BATCH_PIECES = 4096
CACHE_TAG_TEXT = b"Signature: 8a477f597d28d172789f06886806bc55\n"  # https://bford.info/cachedir


@dataclass(frozen=True, slots=True)
class TokenFile:
    """The ids of one source, memory-mapped."""

    key: str
    tokens: np.ndarray  # uint16 or uint32 (count,)
    tally: Tally
    manifest: Path  # keeps digests that were asked for

    def digest_of(self, count: int, on_part: Callable[[], None]) -> str:
        """Of the first `count` ids. `on_part` is called as it gets on, and may raise."""
        name = str(count)
        digests = _read_json(self.manifest).get("digests", {})
        if name in digests:
            return str(digests[name])
        hasher = hashlib.blake2b(digest_size=16)
        for start in range(0, count, PART_TOKENS):
            on_part()
            hasher.update(np.ascontiguousarray(self.tokens[start : min(start + PART_TOKENS, count)]).data)
        if noted := _read_json(self.manifest):  # the source may have been revoked meanwhile
            noted["digests"] = {**noted.get("digests", {}), name: hasher.hexdigest()}
            with contextlib.suppress(OSError):  # then it is made again
                write_json(self.manifest, noted)
        return hasher.hexdigest()


# Bytes of files done so far of this source. Called for each piece and whenever a text is judged, also while a
# start that goes on finds its place; may raise to end the work.
OnProgress = Callable[[int], None]


def tokenize(
    listing: Listing,
    tokenizer: Tokenizer,
    cache_dir: Path,
    on_progress: OnProgress,
    check: Callable[[Tally], None],
) -> TokenFile:
    """The ids of the source, made or found. `check` raises DataError for a tally that is too bad to go on.

    Raises DataError.
    """
    key = source_key(listing, tokenizer)
    try:
        with _locked(cache_dir):
            build = _Build(listing, tokenizer, cache_dir, key, on_progress, check)
            tally = build.finished_tally()
            if tally is None:
                tally = build.run()
                build.remove_superseded()
    except OSError as error:
        raise DataError(f"cannot write the token cache in {cache_dir}: {error.strerror}") from error
    check(tally)
    return TokenFile(key, _mapped(build.done_path, build.dtype), tally, build.manifest)


def source_key(listing: Listing, tokenizer: Tokenizer) -> str:
    """Everything that the ids of the source depend on."""
    files = [
        [one.path, one.size_bytes, one.modified_ns, one.format, one.field, one.encoding]
        for one in listing.files
    ]
    rules: dict[str, Any] = {"protected": digest_of(listing.domains)} if listing.domains else {}
    formats = {one.format: format_named(one.format).version for one in listing.files}
    if any(formats.values()):
        rules["formats"] = formats
    return _digest({"version": CACHE_VERSION, "tokenizer": tokenizer.digest, "files": files, **rules})


def _mapped(path: Path, dtype: np.dtype[Any]) -> np.ndarray:
    count = path.stat().st_size // dtype.itemsize
    return np.memmap(path, dtype=dtype, mode="r", shape=(count,)) if count else np.zeros(0, dtype)


@dataclass(frozen=True, slots=True)
class _Place:
    """How far the work has come: all that is needed to go on."""

    file: int = 0
    pieces: int = 0  # of this file
    tokens: int = 0  # in all
    tally: Any = None  # plain, as it was at the beginning of this file


class _Build:
    """The tokenization of one source."""

    def __init__(
        self,
        listing: Listing,
        tokenizer: Tokenizer,
        cache_dir: Path,
        key: str,
        on_progress: OnProgress,
        check: Callable[[Tally], None],
    ) -> None:
        self.done_path = cache_dir / f"tokens-{key}.bin"
        self.dtype = np.dtype(np.uint16 if tokenizer.vocab_size <= 1 << 16 else np.uint32)
        self.manifest = cache_dir / f"tokens-{key}.manifest"
        self._part = cache_dir / f"tokens-{key}.part"
        self._progress = cache_dir / f"tokens-{key}.progress"
        self._listing = listing
        self._tokenizer = tokenizer
        self._owner = _owner_key(listing, tokenizer)
        self._on_progress = on_progress
        self._check = check
        self._eos = np.array([tokenizer.eos_id], dtype=self.dtype)
        self._bos = np.array([] if tokenizer.bos_id is None else [tokenizer.bos_id], dtype=self.dtype)
        self._done_bytes = 0  # of whole files
        self._told_bytes = 0
        self._noted = 0  # tokens

    def finished_tally(self) -> Tally | None:
        """Of a complete file of ids; None where there is none, or one that does not fit its manifest."""
        manifest = _read_json(self.manifest)
        try:
            if self.done_path.stat().st_size != manifest["tokens"] * self.dtype.itemsize:
                return None
            return Tally.from_plain(manifest["tally"])
        except (OSError, ValueError, TypeError, KeyError, AttributeError):
            return None

    def run(self) -> Tally:
        place, tally = self._last_place()
        self._note(replace(place, tally=place.tally or tally.to_plain()))
        with (
            open(os.open(self._part, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600), "r+b") as out,
            judge_of(self._listing.domains) as judged,
        ):

            def judge(text: str) -> str:
                self._on_progress(self._told_bytes)  # a program may need a second for each text
                return judged(text)

            out.truncate(place.tokens * self.dtype.itemsize)
            out.seek(0, os.SEEK_END)
            for number, file in enumerate(self._listing.files):
                self._told_bytes = self._done_bytes
                if number >= place.file:
                    place = self._write_file(
                        replace(place, file=number, tally=tally.to_plain()), tally, out, judge
                    )
                self._done_bytes += file.size_bytes
            _sync(out)
        manifest = {**self._whose(), "tokens": place.tokens}
        try:
            os.replace(self._part, self.done_path)
        except FileNotFoundError:
            raise DataError(
                f"the ids of {self._listing.source.path} were removed while they were made, for a source was "
                "revoked: start again; tapestry data list says without which"
            ) from None
        write_json(self.manifest, {**manifest, "tally": tally.to_plain()})
        self._progress.unlink(missing_ok=True)
        return tally

    def _last_place(self) -> tuple[_Place, Tally]:
        """Where a killed trainer stopped, and the tally at the beginning of that file; else the beginning."""
        noted = _read_json(self._progress)
        try:
            place = _Place(**noted["place"])
            enough = self._part.stat().st_size >= place.tokens * self.dtype.itemsize
            if enough and 0 <= place.file < len(self._listing.files):
                return place, Tally.from_plain(place.tally)
        except (OSError, ValueError, TypeError, KeyError, AttributeError):
            pass  # nothing was noted, or what was is damaged
        return _Place(), Tally.from_plain(self._listing.tally.to_plain())

    def _write_file(self, place: _Place, tally: Tally, out: BinaryIO, judge: Judge) -> _Place:
        """The rest of one file, from the place on; the place at its end."""
        batch: list[tuple[bool, str, bool]] = []  # of each piece: whether it begins a document, text, ends it
        begins = True
        chars = seen_chars = pieces = 0  # of the batch; of the file
        for piece in _clear_pieces(self._listing, place.file, tally, judge):
            pieces += 1
            seen_chars += len(piece[0])
            self._tell(place.file, seen_chars)
            _count(piece, tally, self._listing.files[place.file].path)
            begun = begins and bool(piece[0])  # what was dropped is an empty piece, and no document
            begins = piece[1] or (begins and not begun)
            if pieces <= place.pieces:
                continue
            batch.append((begun, *piece))
            chars += len(piece[0])
            if chars >= BATCH_CHARS or len(batch) >= BATCH_PIECES:
                place = self._write_batch(replace(place, pieces=pieces), batch, out)
                self._check_on_the_way(tally)
                batch, chars = [], 0
        place = self._write_batch(replace(place, pieces=pieces), batch, out)
        return replace(place, file=place.file + 1, pieces=0)

    def _write_batch(self, place: _Place, batch: list[tuple[bool, str, bool]], out: BinaryIO) -> _Place:
        encoded = self._tokenizer.encode_batch([text for _, text, _ in batch])
        count = 0
        for ids, (begins, _, ends) in zip(encoded, batch, strict=True):
            parts = [*([self._bos] if begins else ()), ids.astype(self.dtype), *([self._eos] if ends else ())]
            for part in parts:
                out.write(part.tobytes())
                count += len(part)
        place = replace(place, tokens=place.tokens + count)
        if place.tokens - self._noted >= PART_TOKENS:
            _sync(out)
            self._note(place)
        return place

    def _note(self, place: _Place) -> None:
        fields = {name: getattr(place, name) for name in _Place.__dataclass_fields__}
        write_json(self._progress, {**self._whose(), "place": fields})
        self._noted = place.tokens

    def _whose(self) -> dict[str, Any]:
        """Whose ids they are. With follow_links they may be of anywhere: then no path is noted."""
        source = self._listing.source
        path = None if source.follow_links else source.path
        real = list(reals_of((source.path,)))  # a link may lead elsewhere when its source is revoked
        return {"version": CACHE_VERSION, "owner": self._owner, "path": path, "real": real}

    def _tell(self, file: int, chars: int) -> None:
        """Of a packed file nobody knows how far one is in it; by the characters, at most to its end."""
        self._told_bytes = self._done_bytes + min(chars, self._listing.files[file].size_bytes)
        self._on_progress(self._told_bytes)

    def _check_on_the_way(self, tally: Tally) -> None:
        """A hundred gigabytes without the field are not read to their end. Not for the first few rows."""
        if tally.rows >= 10_000:
            self._check(tally)

    def remove_superseded(self) -> None:
        """Ids of the same source as it was before: a corpus that grows every day would fill the disk.

        A trainer that has one mapped keeps it until it closes it.
        """
        for path, noted in _noted_in(self.done_path.parent):
            if path == self.manifest:
                continue
            if noted.get("version") != CACHE_VERSION or noted.get("owner") == self._owner:
                with contextlib.suppress(OSError):
                    _remove(path)


def forget(cache_dir: Path, touches: Callable[[str], bool]) -> int:
    """Remove the ids of every source whose path `touches` names, and of those that have no path; the bytes.

    What another source has is made again when it is read again. A trainer that has a file mapped keeps it
    until it ends, and one that is making it fails. Raises OSError: something is left.
    """
    found = []
    for path, noted in _noted_in(cache_dir):
        named, real = noted.get("path"), noted.get("real", ())
        if named is None or touches(named) or any(map(touches, real)):
            found.append(path)
    return sum(_remove(path) for path in found)


def _noted_in(folder: Path) -> list[tuple[Path, dict[str, Any]]]:
    """The notes that lie beside ids, finished or not."""
    found = [path for path in sorted(folder.glob("tokens-*")) if path.suffix in (".manifest", ".progress")]
    return [(path, _read_json(path)) for path in found]


def _remove(note: Path) -> int:
    """The ids, and then their notes; the bytes of the ids. Raises OSError."""
    removed = 0
    for suffix in (".bin", ".part", ".progress", ".manifest"):
        path = note.with_suffix(suffix)
        with contextlib.suppress(FileNotFoundError):
            removed += path.stat().st_size if suffix in (".bin", ".part") else 0
            path.unlink()
    return removed


def _pieces(file: SourceFile, tally: Tally) -> Iterator[Piece]:
    """A file's text. One that breaks off is counted, and what came before counts."""
    if file.real and os.path.realpath(file.path) != file.real:
        raise DataError(f"{file.path}: it leads elsewhere since it was looked for: start again")
    try:
        yield from format_named(file.format).read(file, tally)
    except DamagedFile as damage:
        tally.damaged.add(f"{file.path}: {damage}", file.size_bytes)
        yield "", True
    except OSError as error:
        raise DataError(f"{file.path}: cannot be read: {error.strerror or error}") from error


def _clear_pieces(listing: Listing, file: int, tally: Tally, judge: Judge) -> Iterator[Piece]:
    """A file's text without what is of a protected domain, which is counted."""
    one = listing.files[file]
    pieces = _pieces(one, tally)
    if not listing.domains:
        return pieces

    def dropped(domain: str, chars: int) -> None:
        tally.protected.setdefault(domain, Group()).add(one.path, chars)

    return clear(pieces, format_named(one.format).is_table, judge, dropped)


def _count(piece: Piece, tally: Tally, path: str) -> None:
    text, ends = piece
    tally.chars += len(text)
    tally.documents += ends
    if wrong := text.count("\ufffd"):
        tally.replaced.add(path, count=wrong)


def _owner_key(listing: Listing, tokenizer: Tokenizer) -> str:
    """The source as the member names it, whatever is in it today."""
    source = listing.source
    return _digest([source.path, source.field, source.encoding, tokenizer.digest])


def _digest(value: object) -> str:
    text = json.dumps(value).encode("utf-8", "surrogateescape")
    return hashlib.blake2b(text, digest_size=16).hexdigest()


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    if not (folder / CACHE_TAG).exists():
        _write_private(folder / CACHE_TAG, CACHE_TAG_TEXT)
    fd = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        yield
    finally:
        os.close(fd)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def write_json(path: Path, value: object) -> None:
    """Whole or not at all, and on disk when this returns. Raises OSError."""
    temporary = path.with_name(f".{path.name}.tmp")  # one writer: the lock, or the home's
    _write_private(temporary, json.dumps(value).encode("utf-8", "surrogateescape"))
    os.replace(temporary, path)
    fd = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _write_private(path: Path, data: bytes) -> None:
    with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600), "wb") as file:
        file.write(data)
        _sync(file)


def _sync(out: BinaryIO) -> None:
    out.flush()
    os.fsync(out.fileno())
