"""Text of protected domains is dropped before anything learns from it, and counted.

What is judged, and dropped as a whole, is a row of a table or a paragraph of plain text (lines up to a blank
one). A domain's patterns look for themselves; its command is a program of the member's own that is started
once for a source, gets each text as a line of JSON and answers it with 1 (drop) or 0 (keep). A program that
answers anything else, ends, or is silent for COMMAND_WAIT_S ends the reading: what nobody judged is not read.

Imports of the node only spec/data.py. Must not import torch.
"""

from __future__ import annotations

import json
import re
import select
import subprocess
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

from tapestry.node.spec.data import Domain
from tapestry.node.trainer.data.errors import DataError
from tapestry.node.trainer.data.files import PIECE_CHARS, Piece

COMMAND_WAIT_S = 120.0  # guess: the first text waits until a classifier has loaded its model
ANSWER_BYTES_MAX = 64
_BLANK = re.compile(r"\n[^\S\n]*\n")

# Which domain a text is of; "" for none.
Judge = Callable[[str], str]
# Called with the domain's name and the characters that were dropped.
OnDropped = Callable[[str, int], None]


@contextmanager
def judge_of(domains: Sequence[Domain]) -> Iterator[Judge]:
    """One judge for all domains, while their programs run. The judge raises DataError."""
    with ExitStack() as stack:
        judges = [(domain.name, stack.enter_context(_judge(domain))) for domain in domains]
        yield lambda text: next((name for name, is_of in judges if is_of(text)), "")


def clear(pieces: Iterator[Piece], is_table: bool, judge: Judge, dropped: OnDropped) -> Iterator[Piece]:
    """The pieces without what the judge names. Raises DataError."""
    yield from (_rows if is_table else _paragraphs)(pieces, judge, dropped)


def digest_of(domains: Sequence[Domain]) -> list[list[object]]:
    """What the ids of a source depend on: a changed rule reads it again."""
    return [[one.name, list(one.patterns), list(one.command)] for one in domains]


def _rows(pieces: Iterator[Piece], judge: Judge, dropped: OnDropped) -> Iterator[Piece]:
    """A row comes as one piece. An empty one stands for a dropped row: a start that goes on counts them."""
    for text, ends in pieces:
        if text and (domain := judge(text)):
            dropped(domain, len(text))
            yield "", False
        else:
            yield text, ends


def _paragraphs(pieces: Iterator[Piece], judge: Judge, dropped: OnDropped) -> Iterator[Piece]:
    """A paragraph is judged whole unless it is longer than PIECE_CHARS."""
    rest = ""
    for text, ends in pieces:
        block = rest + text
        cut = len(block) if ends or len(block) > 2 * PIECE_CHARS else _last_break(block)
        whole, rest = block[:cut], block[cut:]
        yield "".join(_kept(whole, judge, dropped)), ends
    if rest:
        yield "".join(_kept(rest, judge, dropped)), False


def _last_break(block: str) -> int:
    """Where the last paragraph begins, which may go on in the next piece."""
    last = 0
    for match in _BLANK.finditer(block, max(0, len(block) - PIECE_CHARS)):
        last = match.end()
    return last


def _kept(block: str, judge: Judge, dropped: OnDropped) -> Iterator[str]:
    begin = 0
    for end in [*(match.end() for match in _BLANK.finditer(block)), len(block)]:
        paragraph = block[begin:end]
        begin = end
        if paragraph.strip() and (domain := judge(paragraph)):
            dropped(domain, len(paragraph))
        else:
            yield paragraph


@contextmanager
def _judge(domain: Domain) -> Iterator[Callable[[str], bool]]:
    patterns = [re.compile(pattern, re.IGNORECASE) for pattern in domain.patterns]

    def found(text: str) -> bool:
        return any(pattern.search(text) for pattern in patterns)

    if not domain.command:
        yield found
        return
    program = _Program(domain)
    try:
        yield lambda text: found(text) or program.says(text)
    finally:
        program.end()


@dataclass(slots=True)
class _Program:
    """A classifier of the member's own."""

    domain: Domain
    _process: subprocess.Popen[bytes] | None = None

    def says(self, text: str) -> bool:
        """Raises DataError."""
        process = self._process or self._begun()
        assert process.stdin is not None and process.stdout is not None
        try:
            process.stdin.write(json.dumps(text).encode() + b"\n")
            process.stdin.flush()
            ready, _, _ = select.select([process.stdout], [], [], COMMAND_WAIT_S)
            answer = process.stdout.readline(ANSWER_BYTES_MAX).strip() if ready else b""
        except OSError as error:
            raise self._failed(f"it ended: {error.strerror}") from error
        if answer not in (b"0", b"1"):
            raise self._failed(f"it answered {answer.decode(errors='replace')[:40]!r}, not 0 or 1")
        return answer == b"1"

    def end(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.communicate()

    def _begun(self) -> subprocess.Popen[bytes]:
        try:
            self._process = subprocess.Popen(
                self.domain.command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=1 << 16
            )
        except OSError as error:
            raise self._failed(f"it cannot be started: {error.strerror}") from error
        return self._process

    def _failed(self, why: str) -> DataError:
        return DataError(
            f"the program of the protected domain {self.domain.name} cannot judge the data, so they are not "
            f"read: {why}"
        )
