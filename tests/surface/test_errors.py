"""UserError: one line, fit for a terminal."""

from __future__ import annotations

from tapestry.node.errors import ExitCode, UserError


def test_the_exit_codes_are_those_of_the_contract() -> None:
    assert {code.name: int(code) for code in ExitCode} == {
        "DONE": 0,
        "FAILED": 1,
        "USAGE": 2,
        "UNREACHABLE": 3,
        "REFUSED": 4,
    }


def test_what_a_peer_wrote_cannot_reach_the_terminal_as_control_characters() -> None:
    error = UserError("a\nb\x1b[2Jc\u202e", hint="x\ty\x07", details=["p\rq\x00"])
    assert error.line == "a b?[2Jc?"
    assert error.hint == "x y?"
    assert error.details == ("p q?",)
    assert str(error) == error.line
