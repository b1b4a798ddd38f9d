"""Text -> tokens on disk -> windows: what this node trains and validates on.

A source is what `--data` was given: a text file, a folder of text files, `corpus.jsonl:FIELD`, `stdlib`
(the Python standard library's sources) or `stdlib:K/N` (the K-th of N disjoint parts of them). All
sources are tokenized once, in bounded memory, into one memory-mapped uint16 file; documents end with
`eos`. The last 2 % are held out for validation.

A training window is a pure function of (node seed, epoch, step). There is no cursor to save: a restart
of an epoch draws the same windows, and an epoch that was committed is never drawn again.

`list_files` alone is cheap and raises every error about paths, so a command line can check before it
starts anything. Must not import torch: the node process may use this module too.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import stat
import sysconfig
import time
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np

VOCAB_SIZE = 259
BOS_ID, EOS_ID, PAD_ID = 256, 257, 258

CACHE_VERSION = 1
READ_BYTES = 1 << 20
FILES_MAX = 1_000_000
JSONL_LINE_BYTES_MAX = 64 << 20
LEFT_AFTER_S = 86_400.0  # Guess: what has not grown for so long, nobody is building
HELD_OUT_DIVISOR = 50  # the last 2 %

_SUFFIX_WORDS = """
    txt text md rst tex org adoc csv tsv html htm xml json yaml yml toml ini cfg conf py pyi c h cc cpp hpp cu
    java kt scala go rs js jsx ts tsx css rb php pl lua r jl swift m cs fs hs ml clj ex erl sh bash zsh ps1
    sql proto zig nim f90 asm
"""
TEXT_SUFFIXES = frozenset(f".{word}" for word in _SUFFIX_WORDS.split())
_STDLIB = re.compile(r"stdlib(?::(\d{1,9})/(\d{1,9}))?")
_STDLIB_LEFT_OUT = frozenset({"site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test"})


class DataError(ValueError):
    """The data cannot be used; one line that says what to do."""


@dataclass(frozen=True, slots=True)
class SourceFile:
    """One file to tokenize. `field` names the text in each line of a jsonl file, or is None."""

    path: str
    size_bytes: int
    modified_ns: int
    field: str | None = None


@dataclass(frozen=True, slots=True)
class Corpus:
    """Tokens on disk, memory-mapped, and where the held-out part begins."""

    tokens: np.ndarray  # uint16 (train_count + validation_count,)
    train_count: int
    validation_count: int
    sequence_length: int

    def training_windows(self, node_seed: int, epoch: int, step: int, count: int) -> np.ndarray:
        """int64 (count, sequence_length + 1); the same for the same arguments, on every machine."""
        seeds = np.random.SeedSequence([node_seed, epoch, step])
        rng = np.random.Generator(np.random.Philox(seeds))
        starts = rng.integers(0, self.train_count - self.sequence_length, size=count)
        return self._windows(starts)

    def validation_windows(self, count_max: int) -> np.ndarray:
        """int64 (count, sequence_length + 1), 1 <= count <= count_max; always the same, evenly spaced."""
        last_start = self.validation_count - (self.sequence_length + 1)
        count = min(count_max, last_start // (self.sequence_length + 1) + 1)
        starts = self.train_count + np.linspace(0, last_start, count).astype(np.int64)
        return self._windows(starts)

    def _windows(self, starts: np.ndarray) -> np.ndarray:
        return self.tokens[starts[:, None] + np.arange(self.sequence_length + 1)].astype(np.int64)


def load_corpus(sources: Sequence[str], cache_dir: Path, sequence_length: int) -> Corpus:
    """Tokenizes, or maps the cache of an earlier time. Raises DataError."""
    files = list_files(sources)
    key = _cache_key(files)
    # Neither suffix is one of text: a cache inside a data folder must not become data.
    bin_path, manifest_path = cache_dir / f"tokens-{key}.bin", cache_dir / f"tokens-{key}.manifest"
    count = _cached_count(bin_path, manifest_path)
    if count is None:
        sources_key = _sources_key(sources)
        try:
            count = _build_cache(files, key, sources_key, bin_path, manifest_path)
        except OSError as error:
            raise DataError(f"cannot write the token cache in {cache_dir}: {error.strerror}") from error
        _remove_superseded(manifest_path, sources_key)
    needed = 2 * (sequence_length + 1)
    if count < needed:
        raise DataError(
            f"the data holds {count} tokens; one training and one validation window of sequence_length "
            f"{sequence_length} need {needed}: add more text with --data"
        )
    tokens = np.memmap(bin_path, dtype=np.uint16, mode="r", shape=(count,))
    validation_count = max(count // HELD_OUT_DIVISOR, sequence_length + 1)
    return Corpus(tokens, count - validation_count, validation_count, sequence_length)


def list_files(sources: Sequence[str]) -> tuple[SourceFile, ...]:
    """The files behind the sources, in a fixed order, each once. Raises DataError."""
    if not sources:
        raise DataError("no data given: name files or folders of text with --data, or --data stdlib")
    files: dict[tuple[str, str | None], SourceFile] = {}
    for source in sources:
        for file in _files_of(source):
            files[(file.path, file.field)] = file
    if len(files) > FILES_MAX:
        raise DataError(f"--data names {len(files)} files, more than {FILES_MAX}: join them into larger ones")
    return tuple(files.values())


def encode(text: str) -> list[int]:
    """The byte tokenizer: UTF-8 bytes are ids 0-255."""
    return list(text.encode("utf-8", errors="surrogatepass"))


def _files_of(source: str) -> list[SourceFile]:
    path, field = _split_field(source)
    stdlib = _STDLIB.fullmatch(source)
    try:
        if stdlib:
            return _stdlib_files(source, stdlib)
        mode = os.stat(path).st_mode
        if stat.S_ISDIR(mode):
            return _folder_files(path, source)
        if not stat.S_ISREG(mode):
            raise DataError(f"--data {source}: neither a file nor a folder")
        return [_single_file(path, field, source)]
    except FileNotFoundError:
        raise DataError(f"--data {source}: there is no such file or folder") from None
    except OSError as error:
        raise DataError(f"--data {source}: {error.filename} cannot be read: {error.strerror}") from error


def _split_field(source: str) -> tuple[str, str | None]:
    """A name that exists as it stands has no field; else what follows the last colon is one."""
    if ":" not in source or os.path.exists(source):
        return source, None
    path, field = source.rsplit(":", 1)
    return (path, field) if field and path.endswith(".jsonl") else (source, None)


def _single_file(path: str, field: str | None, source: str) -> SourceFile:
    suffix = Path(path).suffix.lower()
    if suffix == ".jsonl" and field is None:
        raise DataError(f"--data {source}: say which field holds the text, as in --data {source}:text")
    if suffix != ".jsonl" and suffix not in TEXT_SUFFIXES:
        raise DataError(
            f"--data {source}: {suffix or 'a name without a suffix'} is not known as text; "
            "rename it to .txt if it is, or use .jsonl with a field"
        )
    if _is_binary(path):
        raise DataError(f"--data {source}: this is a binary file, not text")
    return _source_file(path, field)


def _folder_files(root: str, source: str) -> list[SourceFile]:
    """Text files below `root`. Links to folders are not followed, so no loop of links is entered."""
    files = []
    for folder, folders, names in os.walk(root, onerror=_raise):
        folders[:] = sorted(name for name in folders if not name.startswith(".") and name != "__pycache__")
        for name in sorted(names):
            path = os.path.join(folder, name)
            if name.startswith(".") or Path(name).suffix.lower() not in TEXT_SUFFIXES:
                continue
            if os.path.isfile(path) and os.path.getsize(path) and not _is_binary(path):
                files.append(_source_file(path, None))
    if not files:
        raise DataError(
            f"--data {source}: no text files in this folder (looked for .txt, .md, code and the like; "
            "give jsonl files one by one with their field)"
        )
    return files


def _stdlib_files(source: str, match: re.Match[str]) -> list[SourceFile]:
    part, parts = (int(match[1]), int(match[2])) if match[1] else (1, 1)
    if not 1 <= part <= parts:
        raise DataError(f"--data {source}: the part must be between 1 and {parts}")
    root = sysconfig.get_path("stdlib")
    files = []
    for folder, folders, names in os.walk(root, onerror=_raise):
        folders[:] = sorted(set(folders) - _STDLIB_LEFT_OUT)
        for name in sorted(names):
            path = os.path.join(folder, name)
            if name.endswith(".py") and os.path.getsize(path):
                files.append(_source_file(path, None))
    chosen = _balanced_part(files, part, parts)
    if not chosen:
        raise DataError(f"--data {source}: there are only {len(files)} files, fewer than {parts} parts")
    return chosen


def _balanced_part(files: list[SourceFile], part: int, parts: int) -> list[SourceFile]:
    """The largest file not yet placed goes to the smallest part: disjoint, and near equal in bytes."""
    if parts > len(files):
        return []
    totals = [0] * parts
    chosen = []
    for file in sorted(files, key=lambda file: (-file.size_bytes, file.path)):
        smallest = totals.index(min(totals))
        totals[smallest] += file.size_bytes
        if smallest == part - 1:
            chosen.append(file)
    return sorted(chosen, key=lambda file: file.path)


def _source_file(path: str, field: str | None) -> SourceFile:
    info = os.stat(path)
    return SourceFile(os.path.abspath(path), info.st_size, info.st_mtime_ns, field)


def _is_binary(path: str) -> bool:
    """A zero byte near the beginning: the rule that git and grep use."""
    with open(path, "rb") as file:
        return b"\0" in file.read(8192)


def _raise(error: OSError) -> None:
    raise error


def _cache_key(files: Sequence[SourceFile]) -> str:
    identity = [[file.path, file.size_bytes, file.modified_ns, file.field] for file in files]
    return _digest({"version": CACHE_VERSION, "tokenizer": "byte", "files": identity})


def _sources_key(sources: Sequence[str]) -> str:
    return _digest([one if _STDLIB.fullmatch(one) else os.path.abspath(one) for one in sources])


def _digest(value: object) -> str:
    text = json.dumps(value).encode("utf-8", "surrogateescape")
    return hashlib.blake2b(text, digest_size=16).hexdigest()


def _cached_count(bin_path: Path, manifest_path: Path) -> int | None:
    """How many tokens the cache holds; None where there is none or it does not fit its manifest."""
    try:
        manifest = json.loads(manifest_path.read_text())
        count = manifest["tokens"] if isinstance(manifest, dict) else None
        complete = isinstance(count, int) and count > 0 and bin_path.stat().st_size == 2 * count
    except (OSError, ValueError, KeyError):
        return None
    return count if complete else None


def _build_cache(
    files: Sequence[SourceFile], key: str, sources_key: str, bin_path: Path, manifest_path: Path
) -> int:
    """The manifest is renamed into place last, so what it describes is always there and complete."""
    bin_path.parent.mkdir(parents=True, exist_ok=True)
    unique = uuid.uuid4().hex  # two nodes may share a cache folder and build it at the same time
    temporary = bin_path.with_name(f".{bin_path.name}.{unique}")
    temporary_manifest = manifest_path.with_name(f".{manifest_path.name}.{unique}")
    try:
        with open(temporary, "wb") as out:
            count = sum(_write_tokens(file, out) for file in files)
            _flush_to_disk(out)
        with open(temporary_manifest, "wb") as out:
            manifest = {"version": CACHE_VERSION, "key": key, "sources": sources_key, "tokens": count}
            out.write(json.dumps(manifest).encode())
            _flush_to_disk(out)
        os.replace(temporary, bin_path)
        os.replace(temporary_manifest, manifest_path)
    finally:
        temporary.unlink(missing_ok=True)
        temporary_manifest.unlink(missing_ok=True)
    return count


def _remove_superseded(newest: Path, sources_key: str) -> None:
    """Caches of the same sources as they were before: a corpus that grows every day would fill the disk.

    Who has one mapped keeps it until it closes it. What a killed builder left goes too.
    """
    for manifest_path in set(newest.parent.glob("tokens-*.manifest")) - {newest}:
        with contextlib.suppress(OSError, ValueError, AttributeError):
            if json.loads(manifest_path.read_text()).get("sources") == sources_key:
                manifest_path.unlink()
                manifest_path.with_suffix(".bin").unlink()
    for left in newest.parent.glob(".tokens-*"):
        with contextlib.suppress(OSError):
            if time.time() - left.stat().st_mtime > LEFT_AFTER_S:
                left.unlink()


def _flush_to_disk(out: BinaryIO) -> None:
    out.flush()
    os.fsync(out.fileno())


def _write_tokens(file: SourceFile, out: BinaryIO) -> int:
    """Every document of the file, each followed by eos; returns the number of tokens."""
    pieces = _text_pieces(file) if file.field is None else _jsonl_pieces(file)
    eos = np.array([EOS_ID], dtype=np.uint16).tobytes()
    count = 0
    for piece in pieces:
        out.write(eos if piece is None else np.frombuffer(piece, dtype=np.uint8).astype(np.uint16).tobytes())
        count += 1 if piece is None else len(piece)
    return count


def _text_pieces(file: SourceFile) -> Iterator[bytes | None]:
    """The file's bytes in bounded pieces, then None for the end of the document."""
    try:
        with open(file.path, "rb") as source:
            while piece := source.read(READ_BYTES):
                yield piece
    except OSError as error:
        raise DataError(f"{file.path}: cannot be read: {error.strerror}") from error
    yield None


def _jsonl_pieces(file: SourceFile) -> Iterator[bytes | None]:
    """The named field of every line that is not blank, each followed by None."""
    try:
        with open(file.path, "rb") as source:
            number = 0
            while line := source.readline(JSONL_LINE_BYTES_MAX):
                number += 1
                if len(line) == JSONL_LINE_BYTES_MAX:
                    raise DataError(f"{file.path}, line {number}: longer than {JSONL_LINE_BYTES_MAX} bytes")
                if line.strip():
                    yield _jsonl_text(file, line, number).encode("utf-8", errors="replace")
                    yield None
    except OSError as error:
        raise DataError(f"{file.path}: cannot be read: {error.strerror}") from error


def _jsonl_text(file: SourceFile, line: bytes, number: int) -> str:
    try:
        document = json.loads(line)
    except (ValueError, RecursionError):
        raise DataError(f"{file.path}, line {number}: not valid JSON") from None
    text = document.get(file.field) if isinstance(document, dict) else None
    if not isinstance(text, str):
        fields = ", ".join(sorted(document)[:8]) if isinstance(document, dict) else "none"
        raise DataError(f"{file.path}, line {number}: no text in field {file.field!r} (there are: {fields})")
    return text
