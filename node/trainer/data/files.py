"""One file of data: what it is, and its bytes and characters, whatever packs or encodes them.

Text is UTF-8 with or without a mark, or UTF-16 or UTF-32 with one; or what the member says it is. Anything
else is recognised by a sample, named, and not read: bytes taken for the wrong letters teach the base
nonsense.
"""

from __future__ import annotations

import codecs
import gzip
import io
import re
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, BinaryIO

from tapestry.node.trainer.data.errors import DamagedFile, DataError

SAMPLE_BYTES = 1 << 18  # Guess: what is not text shows itself within it
FOREIGN_SHARE = 0.1  # Guess: of a sample's non-ASCII bytes; above, the file is of another encoding than UTF-8
PIECE_CHARS = 1 << 20  # of a text that is handed on at a time
PACKINGS = (".gz", ".zst")
COMMON = (
    "cp1252",
    "latin_1",
    "cp932",
    "shift_jis",
    "euc_jp",
    "gb18030",
    "big5",
    "euc_kr",
    "cp1251",
    "cp1250",
)
SURE = 0.1  # Guess: readings that look nearly as much like text are named too, those in use first
ZSTD_READ_BYTES = 1 << 14  # each becomes a few hundred kB at most, of real text
_BAD = re.compile("[\udc80-\udcff]")  # what surrogateescape makes of a byte that is wrong
_MARKS = (  # the longer first: UTF-32's begins like UTF-16's
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)

Piece = tuple[str, bool]  # text, and whether its document ends with it


@dataclass(frozen=True, slots=True)
class SourceFile:
    """One file to tokenize, as one of the registry's formats."""

    path: str  # absolute
    size_bytes: int
    modified_ns: int
    format: str
    field: str = ""  # of a table
    encoding: str = ""  # of its text; "": its mark says, or UTF-8
    real: str = ""  # where the path led when it was looked for; "": it need not be asked


class NotText(Exception):
    """A sample is not text that we may read; the message is a reason to leave it out."""


def without_packing(name: str) -> str:
    """The name without .gz or .zst, in lower case."""
    lower = name.lower()
    return next((lower.removesuffix(end) for end in PACKINGS if lower.endswith(end)), lower)


@contextmanager
def opened(path: str) -> Iterator[BinaryIO]:
    """The file's bytes, unpacked. What a broken packing raises becomes DamagedFile."""
    try:
        with _open(path) as file:
            yield file
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise DamagedFile(f"broken packing: {error}") from error
    except Exception as error:
        if type(error).__name__ == "ZstdError":  # the library may not be there to name it
            raise DamagedFile(f"broken zstd: {error}") from error
        raise


def check_text(path: str, encoding: str) -> None:
    """Raises NotText with a reason; OSError, DamagedFile."""
    sample = _sample(path)
    if encoding or _marked(sample):
        return
    if b"\0" in sample:
        raise NotText("binary")
    if _is_utf8(sample):
        return
    raise NotText(_guess(sample))


def _sample(path: str) -> bytes:
    """The beginning; of a file that breaks off, what there is. Raises DamagedFile if that is nothing."""
    sample = b""
    try:
        with opened(path) as file:
            while len(sample) < SAMPLE_BYTES and (more := _some(file)):
                sample += more
    except DamagedFile:
        if not sample:
            raise
    return sample


def _some(file: Any) -> bytes:
    """What can be had without waiting for more: of a file that breaks off, `read` would give nothing."""
    some: bytes = file.read1(SAMPLE_BYTES)
    return some


@contextmanager
def decoded(file: SourceFile) -> Iterator[io.TextIOWrapper]:
    """The file's characters. What is not of the encoding becomes U+FFFD, which whoever tokenizes counts.

    Raises DamagedFile where the encoding cannot go on: UTF-16 and UTF-32 by name need a mark.
    """
    with opened(file.path) as raw:
        encoding = _with_mark(file.encoding) or _mark_of(file.path)
        try:
            yield io.TextIOWrapper(raw, encoding=encoding, errors="replace", newline="")
        except UnicodeError as error:
            raise DamagedFile(f"not {encoding}: {error}") from error


def _with_mark(encoding: str) -> str:
    """UTF-8 by its name may have a mark as well, which is no character of the first row."""
    return "utf-8-sig" if encoding and codecs.lookup(encoding).name == "utf-8" else encoding


def _mark_of(path: str) -> str:
    with opened(path) as file:
        return _marked(file.read(4)) or "utf-8"


def _marked(sample: bytes) -> str:
    return next((encoding for mark, encoding in _MARKS if sample.startswith(mark)), "")


def _is_utf8(sample: bytes) -> bool:
    """Also with a little damage, which is replaced and counted, and with a character cut off at the end."""
    wrong = len(_BAD.findall(codecs.getincrementaldecoder("utf-8")("surrogateescape").decode(sample)))
    return wrong <= FOREIGN_SHARE * sum(byte >= 0x80 for byte in sample) if wrong else True


def _guess(sample: bytes) -> str:
    """What the library takes the sample for, as a reason to leave its file out."""
    from charset_normalizer import from_bytes

    matches = list(from_bytes(sample[: 1 << 16]))
    if not matches or matches[0].encoding == "utf_8":
        return "not text in any encoding that is known here"
    likely = [one.encoding for one in matches if one.chaos <= matches[0].chaos + SURE]
    guesses = sorted(likely, key=lambda name: name not in COMMON)[:3]
    return f"not UTF-8, perhaps {', '.join(guesses)}: say which as encoding = in [[data.source]]"


def _open(path: str) -> BinaryIO:
    lower = path.lower()
    if lower.endswith(".gz"):
        return gzip.open(path, "rb")  # type: ignore[return-value]  # a GzipFile reads like one
    if lower.endswith(".zst"):
        return _open_zstd(path)
    return open(path, "rb")


def _open_zstd(path: str) -> BinaryIO:
    try:
        import zstandard
    except ImportError:
        raise DataError(f"{path}: to read .zst, pip install zstandard") from None
    raw = open(path, "rb")  # noqa: SIM115  # closed with what is returned
    frames = _ZstdFrames(raw, zstandard.ZstdDecompressor().decompressobj)
    return io.BufferedReader(frames, 1 << 18)


class _ZstdFrames(io.RawIOBase):
    """The bytes of all frames of a file. The library's own reader takes a break for the file's end."""

    def __init__(self, raw: BinaryIO, begin_frame: Callable[[], Any]) -> None:
        self._raw = raw
        self._begin_frame = begin_frame
        self._frame: Any = None  # the one that goes on
        self._packed = b""
        self._ready = b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._ready:
            self._packed = self._packed or self._raw.read(ZSTD_READ_BYTES)
            if not self._packed:
                if self._frame is not None:
                    raise EOFError("it breaks off")
                return 0
            frame = self._frame or self._begin_frame()
            self._ready = frame.decompress(self._packed)
            self._frame, self._packed = (None, frame.unused_data) if frame.eof else (frame, b"")
        count = min(len(buffer), len(self._ready))
        buffer[:count], self._ready = self._ready[:count], self._ready[count:]
        return count

    def close(self) -> None:
        self._raw.close()
        super().close()


def pieces_of(text: io.TextIOWrapper) -> Iterator[str]:
    """A long text in pieces that end with a line where there is one: a tokenizer sees whole words."""
    rest = ""
    while block := text.read(PIECE_CHARS):
        block = rest + block
        cut = block.rfind("\n") + 1 or len(block)
        yield block[:cut]
        rest = block[cut:]
    if rest:
        yield rest
