"""REFUSED_REASONS is complete: compared with every reason that the sources can give, as they are written.

A reason that is not in the list would be counted as `other`, and nobody would see what peers do wrong.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

from tapestry.node.surface.metrics import REFUSED_REASONS

ROOT = Path(__file__).resolve().parent.parent.parent

# Raised on what a peer sent, with the reason first. RefusedLayout is not here: it is about our own model.
ERRORS = ("RemoteProtocolError", "InvalidRecord", "PresenceError", "RefusedPayload", "RefusedVector")
ERRORS += ("RefusedWeights", "RefusedCodec", "CallRefused")
CALLS = ("refuse", "on_refused", "_on_refused", "refused", "_break")  # reason first, or after the peer
PROTOCOL = ROOT / "node" / "protocol"
JUDGES = ("ready_fault", "value_fault", "roster_fault", "accept")  # there they return one, as on_<message> do
JUDGES += ("body_fault", "_behind_fault", "changes_fault", "change_fault", "_meaning_fault", "_on_strangers")
JUDGES += ("charter_fault", "add", "_result_fault", "handover_fault", "_seats_fault", "seat_fault")
JUDGES += ("signed_fault",)


def test_every_reason_that_can_be_given_is_counted_by_its_name() -> None:
    given = set()
    for package in ("compression", "dht", "node"):
        for path in sorted((ROOT / package).rglob("*.py")):
            given |= reasons_in(path.read_text(encoding="utf-8"), path.parent == PROTOCOL)
    assert given == set(REFUSED_REASONS)
    assert len(REFUSED_REASONS) == len(given)


def test_reasons_are_found_however_they_are_given() -> None:
    source = """
def check(x):
    reason = "scale" if x else "not_finite"
    raise RefusedPayload(reason, "a text")
def serve(self, peer):
    raise RemoteProtocolError("malformed", f"{peer}")
    self.listener.on_refused(peer, "slow", "why")
    self._on_refused("streams")
    self.ctx.refuse(peer, error.reason, "passed on")
    raise RemoteProtocolError(error.reason, "passed on")
def on_ready(self):
    return "not_leader"
def on_need(self):
    return "a sentence"
def leader_fault(self):
    return "leader_gone"
def roster_fault(self):
    return "roster" if self else None
"""
    passed = {"scale", "not_finite", "malformed", "slow", "streams"}
    assert reasons_in(source, protocol=False) == passed
    assert reasons_in(source, protocol=True) == passed | {"not_leader", "roster"}


def reasons_in(source: str, protocol: bool) -> set[str]:
    """The reasons that one module can give."""
    found: set[str] = set()
    for function in ast.walk(ast.parse(source)):
        if not isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        words = {
            target.id: list(_constants(node.value))
            for node in ast.walk(function)
            if isinstance(node, ast.Assign)
            for target in node.targets
            if isinstance(target, ast.Name)
        }
        for node in ast.walk(function):
            if isinstance(node, ast.Call):
                for value in _reason_of(node):
                    found.update(
                        words.get(value.id, ()) if isinstance(value, ast.Name) else _constants(value)
                    )
            elif isinstance(node, ast.Return) and protocol and _judges(function.name):
                value = node.value
                found.update(words.get(value.id, ()) if isinstance(value, ast.Name) else _constants(value))
    return {word for word in found if word.replace("_", "").isalpha() and word.islower()}


def _reason_of(call: ast.Call) -> list[ast.expr]:
    name = call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")
    if name in ERRORS:
        return call.args[:1]
    if name in CALLS:
        return call.args[:1] if len(call.args) == 1 else call.args[1:2]
    return []


def _judges(name: str) -> bool:
    return name.startswith("on_") or name in JUDGES


def _constants(value: ast.expr | None) -> Iterator[str]:
    if isinstance(value, ast.Constant) and isinstance(value.value, str):
        yield value.value
    elif isinstance(value, ast.IfExp):
        yield from _constants(value.body)
        yield from _constants(value.orelse)
    elif isinstance(value, ast.Tuple):
        for element in value.elts:
            yield from _constants(element)
