"""What the operator is told when something is wrong: one line and an exit code, never a traceback.

The exit codes are the contract of the command line; docs/operating.md lists them.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from enum import IntEnum


class ExitCode(IntEnum):
    """What the process tells the shell."""

    DONE = 0
    FAILED = 1  # at run time
    USAGE = 2  # the command line or a file is wrong
    UNREACHABLE = 3  # no peer could be reached
    REFUSED = 4  # run id, run spec or admission


class UserError(Exception):
    """Something that the person at the keyboard can put right, said in one line.

    `details` are further lines that belong to it, such as the differences of two run specs; `hint` says
    what to do. All of them may quote what a peer sent: control characters are taken out here, so that no
    peer can write on the operator's terminal.
    """

    def __init__(
        self,
        line: str,
        *,
        exit_code: ExitCode = ExitCode.USAGE,
        hint: str | None = None,
        details: Sequence[str] = (),
    ) -> None:
        self.line = printable(line)
        self.exit_code = exit_code
        self.hint = None if hint is None else printable(hint)
        self.details = tuple(printable(detail) for detail in details)
        super().__init__(self.line)


def printable(text: str) -> str:
    """The text on one line: white space as single blanks, control characters and their like as '?'."""
    one_line = " ".join(text.split())
    return "".join(char if char.isprintable() else "?" for char in one_line)


@contextlib.contextmanager
def as_user_error(*kinds: type[Exception]) -> Iterator[None]:
    """What is wrong with the user's files, told as such."""
    try:
        yield
    except kinds as error:
        raise UserError(str(error)) from error
