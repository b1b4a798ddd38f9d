"""A real node that signs wrong means is named by the others, each by itself, with a proof in its home; and
the run goes on without it, from the state before its lie."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from e2e.harness import Node, init, tapestry

from tapestry.node.disk.held import open_run
from tapestry.node.home import Home
from tapestry.node.lineage.crypto import ReaderCrypto
from tapestry.node.protocol.path import stretches

pytestmark = pytest.mark.e2e


def test_a_lying_reducer_is_named_with_proof_and_removed_and_what_it_made_is_undone(tmp_path: Path) -> None:
    home = init(tmp_path / "a", inner_steps="4", shard_elements="4096", share="1.0", on_lie='"rollback"')
    founder = Node(home)
    with founder:
        founder.wait_ready()
        honest = Node(tmp_path / "b", "--peer", founder.invitation(), data="stdlib:2/3")
        reducer = Node(tmp_path / "c", "--peer", founder.invitation(), data="stdlib:3/3")
        reducer.lie("lying-reducer")
        with honest, reducer:
            for node in (honest, reducer):
                node.wait_ready()
            name = reducer.json()["peer_id"]
            for node in (founder, honest):
                node.wait("an accusation", lambda node=node: node.status()["accused"])
                assert {one["peer"] for one in node.status()["accused"]} == {name}
                assert "accusation=proven" in node.log.read_text()
            assert not reducer.status()["accused"]
            founder.wait("agreement on honest shards", lambda: agreed(founder) + agreed(honest) > 0)
            honest.wait("a removal", lambda: name in removed(honest))
            assert "signed a wrong mean" in removed(honest)[name]
            reducer.wait("the reason", lambda: "signed a wrong mean" in reducer.status()["reason"])
            goes_on = founder.status()["epoch"] + 3
            with Node(tmp_path / "d", "--peer", founder.invitation(), data="stdlib:3/3") as joiner:
                for node in (founder, honest, joiner):
                    node.wait("the run to go on", lambda node=node: node.status()["epoch"] >= goes_on)
        lied = {one["epoch"] for one in founder.status()["accused"]}
    chains = []
    for home in (founder.home, honest.home, joiner.home):
        proof = tapestry("verify", home)
        assert proof.returncode == 0, proof.stdout + proof.stderr
        held = open_run(Home(home), ReaderCrypto())
        assert held is not None
        chains.append(held.chain)
        path = stretches(held.chain.rolled, held.chain.epoch)
        on_path = {epoch for stretch in path for epoch in stretch} - held.chain.rolled.keys()
        assert held.chain.rolled and not lied & on_path
    for chain in chains:  # one run: each is the beginning of the longest, or is it
        assert max(chains, key=lambda one: one.epoch).head_at(chain.epoch) == chain.head
    for home in (founder.home, honest.home):
        assert list((home / "accusations").glob("*.accusation"))
    said = " ".join(tapestry("log", "--home", founder.home).stdout.split())  # long lines are broken
    assert re.search(
        rf"epoch \d+: the state is that of epoch \d+ again, because …{name[-6:]} lied in epoch", said
    )


def removed(node: Node) -> dict[str, str]:
    done = tapestry("members", "--home", node.home, "--json")
    table: dict[str, str] = json.loads(done.stdout)["removed"]
    return table


def agreed(node: Node) -> int:
    lines = node.get("/metrics").splitlines()
    (line,) = (one for one in lines if one.startswith('tapestry_audits_total{outcome="agreed"}'))
    return int(float(line.split()[-1]))
