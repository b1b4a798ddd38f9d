"""Each warning says why, and what is to be done: after a semicolon, or in a word of its own."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SAYS = (";", "next=", ": set this machine's clock")  # what comes before the cure
TOLD_BY_THE_TEXT = {  # where the cure is in a value: the place of the call -> where it is made
    "node/daemon/trainer_desk.py": "trainer/inner.py and library/member.py, Notice",
    "node/daemon/views.py": "trainer_health.py, and loss_watch.py",
}


def _warnings(source: str) -> list[tuple[int, str]]:
    """Line and format of each."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
            continue
        if node.func.attr == "warning" and ast.unparse(node.func.value) == "_log" and node.args:
            found.append((node.lineno, ast.unparse(node.args[0])))
    return found


def _without_cure(path: str, source: str) -> list[str]:
    told = path in TOLD_BY_THE_TEXT
    return [
        f"{path}:{line}: {text}"
        for line, text in _warnings(source)
        if not any(sign in text for sign in SAYS) and not (told and text.rstrip("'").endswith("%s"))
    ]


@pytest.mark.parametrize("room", ["compression", "dht", "node"])
def test_every_warning_says_what_is_to_be_done(room: str) -> None:
    faults = [
        fault
        for path in sorted((ROOT / room).rglob("*.py"))
        for fault in _without_cure(str(path.relative_to(ROOT)), path.read_text(encoding="utf-8"))
    ]
    assert faults == []


def test_the_check_itself_can_fail() -> None:
    bare = '_log.warning("p2pd=restarted")'
    assert _without_cure("node/net/network.py", bare) == ["node/net/network.py:1: 'p2pd=restarted'"]
    assert _without_cure("node/net/network.py", '_log.warning("a=b; make room")') == []
    assert _without_cure("node/net/network.py", '_log.warning("trainer %s", text)') != []
