"""A real node that signs wrong means is named by the others, each by itself, with a proof in its home."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from e2e.harness import Node, init, tapestry

pytestmark = pytest.mark.e2e

LIAR = """
import runpy
from tapestry.node.daemon.averaging import Averaging

honest = Averaging.reduce

def lie(self, shard, payloads, weights):
    return honest(self, shard, payloads, [2 * weights[0], *weights[1:]])

Averaging.reduce = lie
runpy.run_module("tapestry.node.cli", run_name="__main__", alter_sys=True)
"""


def test_a_lying_reducer_is_named_with_proof_and_removed_and_nobody_else_is(tmp_path: Path) -> None:
    founder = Node(init(tmp_path / "a", inner_steps="4", shard_elements="4096", share="1.0"))
    with founder:
        founder.wait_ready()
        honest = Node(tmp_path / "b", "--peer", founder.address, data="stdlib:2/3")
        liar = Node(tmp_path / "c", "--peer", founder.address, data="stdlib:3/3")
        (tmp_path / "liar.py").write_text(LIAR)
        liar.program = (sys.executable, "-P", str(tmp_path / "liar.py"))
        with honest, liar:
            for node in (honest, liar):
                node.wait_ready()
            name = liar.json()["peer_id"]
            for node in (founder, honest):
                node.wait("an accusation", lambda node=node: node.status()["accused"])
                assert {one["peer"] for one in node.status()["accused"]} == {name}
                assert "accusation=proven" in node.log.read_text()
            assert not liar.status()["accused"]
            founder.wait("agreement on honest shards", lambda: agreed(founder) + agreed(honest) > 0)
            honest.wait("a removal", lambda: name in removed(honest))
            assert "signed a wrong mean" in removed(honest)[name]
            liar.wait("the reason", lambda: "signed a wrong mean" in liar.status()["reason"])
    for home in (founder.home, honest.home):
        assert list((home / "accusations").glob("*.accusation"))
        proof = tapestry("verify", home, "--no-replay")
        assert proof.returncode == 0, proof.stderr
        assert name[-6:] in proof.stdout and "signed a wrong mean" in proof.stdout


def removed(node: Node) -> dict[str, str]:
    done = tapestry("members", "--home", node.home, "--json")
    table: dict[str, str] = json.loads(done.stdout)["removed"]
    return table


def agreed(node: Node) -> int:
    lines = node.get("/metrics").splitlines()
    (line,) = (one for one in lines if one.startswith('tapestry_audits_total{outcome="agreed"}'))
    return int(float(line.split()[-1]))
