"""Text of protected domains is dropped before anything learns from it, and counted.

What is judged, and dropped as a whole, is a row of a table or a paragraph of plain text (lines up to a blank
one). A domain's patterns look for themselves; its command is a program of the member's own that is started
once for a source, gets each text as a line of JSON and answers it with 1 (drop) or 0 (keep). A program that
answers anything else, ends, or takes over COMMAND_WAIT_S for one text ends the reading: what nobody judged is
not read.

Imports of the node only spec/data.py. Must not import torch.
"""

from __future__ import annotations

import json
import os
import re
import select
import shutil
import subprocess
import time
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
    """What the ids of a source depend on: a changed rule reads it again, a changed file of a command too."""
    return [[one.name, list(one.patterns), list(one.command), *_files_of(one)] for one in domains]


def _files_of(domain: Domain) -> list[list[object]]:
    """Size and time of change of the program and of each argument that is a file, where it runs."""
    paths = [os.path.join(domain.folder, part) for part in domain.command]
    if paths and not os.path.dirname(domain.command[0]):
        paths[0] = shutil.which(domain.command[0]) or paths[0]
    infos = [(path, os.stat(path)) for path in paths if os.path.isfile(path)]
    return [[path, info.st_size, info.st_mtime_ns] for path, info in infos]


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
        try:
            answer = _asked(process, json.dumps(text).encode() + b"\n")
        except TimeoutError as error:
            raise self._failed(f"it did not answer within {COMMAND_WAIT_S:g} s") from error
        except OSError as error:
            raise self._failed(f"it ended: {error.strerror}") from error
        if answer not in (b"0", b"1"):
            raise self._failed(f"it answered {answer.decode(errors='replace')[:40]!r}, not 0 or 1")
        return answer == b"1"

    def end(self) -> None:
        """Nobody waits for what it started itself: that may hold the pipes for ever."""
        if self._process is not None:
            for pipe in (self._process.stdin, self._process.stdout):
                assert pipe is not None
                pipe.close()
            self._process.kill()
            self._process.wait()

    def _begun(self) -> subprocess.Popen[bytes]:
        try:
            self._process = subprocess.Popen(
                self.domain.command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                bufsize=0,
                cwd=self.domain.folder or None,
            )
        except OSError as error:
            raise self._failed(f"it cannot be started: {error.strerror}") from error
        assert self._process.stdin is not None
        os.set_blocking(self._process.stdin.fileno(), False)
        return self._process

    def _failed(self, why: str) -> DataError:
        return DataError(
            f"the program of the protected domain {self.domain.name} cannot judge the data, so they are not "
            f"read: {why}"
        )


def _asked(process: subprocess.Popen[bytes], line: bytes) -> bytes:
    """What it answers to a line, by COMMAND_WAIT_S from now. Raises TimeoutError, OSError."""
    assert process.stdin is not None and process.stdout is not None
    stdin, stdout = process.stdin.fileno(), process.stdout.fileno()
    deadline_s = time.monotonic() + COMMAND_WAIT_S
    rest, answer = memoryview(line), b""
    poller = select.poll()
    poller.register(stdin, select.POLLOUT)
    poller.register(stdout, select.POLLIN)
    while rest or not answer.endswith(b"\n"):
        ready = dict(poller.poll(1000 * max(0.0, deadline_s - time.monotonic())))
        if not ready:
            raise TimeoutError
        if stdin in ready:
            rest = rest[os.write(stdin, rest) :]
            if not rest:
                poller.unregister(stdin)
        if stdout in ready:
            more = os.read(stdout, ANSWER_BYTES_MAX)
            answer += more
            if not more or len(answer) > ANSWER_BYTES_MAX:
                break
    return answer.strip()
