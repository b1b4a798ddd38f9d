"""docs/operating.md, When something is wrong: every message that people can meet has a cure.

The sources are read, not run: the text of each UserError, and of each warning and error of the log, with `…`
for what is filled in. An error needs a hint of its own, or a row; a line of the log says behind a `;` or in
`next=` what is to be done, or has a row. A text that is wholly another error's (`UserError(str(error))`) is
an envelope: what it holds was said by the reader of a file or by the operating system.
"""

from __future__ import annotations

import ast
import re
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "operating.md"
ERRORS = ("UserError",)
LEVELS = ("warning", "error", "critical")
SPOKEN = re.compile(r"; [\w…]|next=")  # a line that says what to do, or that nothing is
LETTERS_MIN = 7  # of a row's message: less would fit everything


@dataclass(frozen=True, slots=True)
class Message:
    where: str
    text: str
    has_cure: bool

    @property
    def is_envelope(self) -> bool:
        return not re.search(r"\w", self.text)


def text_of(node: ast.expr) -> str:
    """What is filled in as `…`: of an f-string, and of a format of the log."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return re.sub(r"%[-0-9.]*[a-z]", "…", node.value)
    if isinstance(node, ast.JoinedStr):
        return "".join(one.value if isinstance(one, ast.Constant) else "…" for one in node.values)
    if isinstance(node, ast.BinOp):
        return text_of(node.left) + text_of(node.right)
    return "…"


def messages(source: str, name: str) -> list[Message]:
    found = []
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call) or not node.args:
            continue
        where, text = f"{name}:{node.lineno}", text_of(node.args[0])
        if isinstance(node.func, ast.Name) and node.func.id in ERRORS:
            found.append(Message(where, text, any(keyword.arg == "hint" for keyword in node.keywords)))
        elif is_of_the_log(node.func):
            found.append(Message(where, text, bool(SPOKEN.search(text))))
    return found


def is_of_the_log(function: ast.expr) -> bool:
    """`_log.warning` and the like."""
    if not (isinstance(function, ast.Attribute) and function.attr in LEVELS):
        return False
    return ast.unparse(function.value).endswith("log")


def of_the_project() -> list[Message]:
    paths = [
        path for folder in ("node", "dht", "compression") for path in sorted((ROOT / folder).rglob("*.py"))
    ]
    return [one for path in paths for one in messages(path.read_text(), path.relative_to(ROOT).as_posix())]


def rows(page: str) -> list[str]:
    """The messages of the tables, as they stand there."""
    section = page.partition("## When something is wrong\n")[2].partition("\n## ")[0]
    cells = [line.split(" | ")[0] for line in section.splitlines() if line.startswith("| `")]
    return [message for cell in cells for message in re.findall(r"`([^`]+)`", cell)]


def fits(row: str, text: str) -> bool:
    """Whether a message begins as the row says; `…` there is anything."""
    return re.match(".+?".join(map(re.escape, row.removesuffix("…").split("…"))), text) is not None


def untold(found: list[Message], page: str) -> list[str]:
    table = rows(page)
    return [
        f"{one.where}: {one.text}"
        for one in found
        if not (one.has_cure or one.is_envelope or any(fits(row, one.text) for row in table))
    ]


def test_every_message_has_a_cure_of_its_own_or_a_row_in_operating_md() -> None:
    found = of_the_project()
    assert len(found) > 200
    assert untold(found, PAGE.read_text()) == []


def test_no_row_fits_everything_and_each_has_a_cause_and_a_cure() -> None:
    page = PAGE.read_text()
    assert [row for row in rows(page) if len(re.findall(r"[a-zA-Z]", row)) < LETTERS_MIN] == []
    section = page.partition("## When something is wrong\n")[2]
    for line in section.splitlines():
        if line.startswith("| `"):
            cells = [cell.strip() for cell in line.strip("| ").split(" | ")]
            assert len(cells) == 3 and all(cells), line


def test_every_row_is_of_a_message_that_there_is() -> None:
    """The longest piece of each is in the sources."""
    sources = "\n".join(
        text_of(node)
        for folder in ("node", "dht")
        for path in sorted((ROOT / folder).rglob("*.py"))
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Constant | ast.JoinedStr)
    )
    stale = [
        row for row in rows(PAGE.read_text()) if max(row.split("…"), key=len).strip(" :,;") not in sources
    ]
    assert stale == []


@pytest.mark.parametrize(
    ("source", "is_told"),
    [
        ("raise UserError(f'no such luck in {path}')", False),
        ("raise UserError(f'no such luck in {path}', hint='another one')", True),
        ("raise UserError(f'{path}: {error}') from error", True),
        ("raise UserError(f'cannot shine {path}: {error}')", True),
        ("_log.warning('moon=down since=%s', at)", False),
        ("_log.warning('moon=down since=%s; wait', at)", True),
        ("_log.warning('sun=down since=%s', at)", True),
        ("_log.info('moon=down since=%s', at)", True),
    ],
)
def test_the_check_can_fail(source: str, is_told: bool) -> None:
    page = "## When something is wrong\n| `cannot shine …`, `sun=down …` | night | wait |\n"
    assert (untold(messages(source, "x.py"), page) == []) is is_told
