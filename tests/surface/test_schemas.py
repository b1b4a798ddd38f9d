"""docs/schemas: what --json prints is what they say, no more and no less."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tapestry.node.lineage.log import Line
from tapestry.node.protocol.members import Change
from tapestry.node.surface.findings import wrong
from tapestry.node.surface.http import _finite
from tapestry.node.surface.status import NO_TRAFFIC, NodeView

CHANGES = (Change("admit", "b", "Bea", 9, "0" * 32, (("a", "ab"),)),)
SCHEMAS = Path(__file__).resolve().parents[2] / "docs" / "schemas"
TYPES: dict[str, Any] = {
    "number": (int, float),
    "string": str,
    "integer": int,
    "boolean": bool,
    "null": type(None),
}


def faults(schema: dict[str, Any], value: Any, where: str = "$") -> list[str]:
    """The keywords that our schemas use. https://json-schema.org/draft/2020-12"""
    if "anyOf" in schema:
        tried = [faults(one, value, where) for one in schema["anyOf"]]
        return [] if [] in tried else min(tried, key=len)
    if "const" in schema or "enum" in schema:
        allowed = schema.get("enum", [schema.get("const")])
        return [] if value in allowed else [f"{where} is {value!r}"]
    kinds = [schema["type"]] if isinstance(schema["type"], str) else schema["type"]
    if kinds == ["array"]:
        if not isinstance(value, list):
            return [f"{where} is no list"]
        return [f for i, one in enumerate(value) for f in faults(schema["items"], one, f"{where}[{i}]")]
    if kinds == ["object"]:
        return _object_faults(schema, value, where)
    right = any(
        isinstance(value, TYPES[k]) and (k == "boolean" or not isinstance(value, bool)) for k in kinds
    )
    return [] if right else [f"{where} is {value!r}, no {kinds}"]


def _object_faults(schema: dict[str, Any], value: Any, where: str) -> list[str]:
    if not isinstance(value, dict):
        return [f"{where} is no table"]
    known, more = schema.get("properties", {}), schema["additionalProperties"]
    found = [f"{where}.{key} is missing" for key in schema.get("required", []) if key not in value]
    for key, one in value.items():
        if key in known or more:
            found += faults(known.get(key, more), one, f"{where}.{key}")
        else:
            found.append(f"{where}.{key} is not in the schema")
    return found


def schema(name: str) -> dict[str, Any]:
    table: dict[str, Any] = json.loads((SCHEMAS / f"{name}.json").read_text())
    return table


def attached() -> NodeView:
    """A view of a node that is in a round, with a peer and one that is banned."""
    view = NodeView("0.1.0", 0.0)
    peer = SimpleNamespace(peer_id="a", phase="training", epoch=3, head="ab", same_head=True, heard_s=0.5)
    round_ = SimpleNamespace(
        epoch=3,
        ballot=0,
        leader="a",
        stage=SimpleNamespace(name="READY"),
        forced=False,
        electorate=2,
        members=2,
    )
    round_.waiting_on = ("a",)
    agreement = SimpleNamespace(shares=lambda: {"cosine": 0.5})
    core = SimpleNamespace(
        peer_id="us", run_id="r", phase="training", reason="", state_epoch=3, state_head="ab"
    )
    core.roll = SimpleNamespace(members={"us": None})
    core.state_digest, core.params, core.peers, core.round, core.agreement = (
        "d",
        7,
        (peer,),
        round_,
        agreement,
    )
    shown = SimpleNamespace(
        core=core,
        loss=1.5,
        loss_epoch=3,
        val_loss=math.nan,
        val_loss_epoch=-1,
        trainer_trouble="",
        val_losses={"x": 2.0},
        data_passes=0.1,
        tokens_total=9,
        tokens_per_second=1.0,
        dropped_records=0,
        dropped_weight=0,
        branches=("00000003-" + "ab" * 8,),
        accused=({"peer": "c", "epoch": 3, "shard": 1, "what": "signed a wrong mean"},),
        withheld=({"peer": "c", "count": 2},),
        applicants=({"peer": "d", "name": "D", "since": 1.5},),
        traffic=NO_TRAFFIC,
        addresses=("/ip4/1.2.3.4/tcp/1",),
        reachable=True,
        relays=(),
        routes={"a": "direct"},
    )
    ban = SimpleNamespace(peer="b", reason="streams", left_s=3.0)
    view.attach(
        lambda: shown, lambda peer: ("/ip4/1.2.3.4/tcp/2",), lambda: (ban,), "run", lambda peer, name: ""
    )  # type: ignore[arg-type, return-value]
    return view


def test_status_and_peers_are_as_their_schemas_say() -> None:
    for view in (NodeView("0.1.0", 0.0), attached()):
        assert faults(schema("status"), _finite(view.status())) == []
        assert faults(schema("peers"), _finite(view.peers())) == []
    assert len(attached().peers()) == 2


def test_log_and_doctor_are_as_their_schemas_say() -> None:
    lines = [
        Line(1, "2026", (("a", 0.5),), 2, 2, False, 9, "ab", "r", 0.5, 2.5, CHANGES),
        Line(2, "", (), 1, 1, True, 0, "cd", "r", None),
    ]
    assert [faults(schema("log"), line.table()) for line in lines] == [[], []]
    answer = {"ok": False, "findings": [wrong("disk", "full", "make room").table()]}
    assert faults(schema("doctor"), answer) == []


@pytest.mark.parametrize(
    "change",
    [{"epoch": "3"}, {"epoch": True}, {"new": 1}, {"phase": "gone"}, {"round": {}}, {"addresses": [1]}],
)
def test_the_check_itself_can_fail(change: dict[str, Any]) -> None:
    assert faults(schema("status"), attached().status() | change) != []
