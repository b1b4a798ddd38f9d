"""Two that each went on alone meet again, with real nodes: one chain wins, and what lost is kept."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from e2e.harness import Digests, Node, init, tapestry
from e2e.test_swarm_of_three import chain_of, members_of

pytestmark = [pytest.mark.e2e, pytest.mark.long]


def run(*words: object) -> str:
    done = tapestry(*words)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_what_lost_when_two_islands_met_is_listed_proven_and_exported(tmp_path: Path) -> None:
    home = init(tmp_path / "a", inner_steps="20", quorum_loss_s="4", on_quorum_loss='"continue"')
    first = Node(home)
    with first:
        first.wait_ready()
        second = Node(tmp_path / "b", "--peer", first.invitation(), data="stdlib:2/3")
        with second:
            second.wait_ready()
            second.wait("a record of two", lambda: members_of(chain_of(second.home)[-1]) == 2)
            assert [second.stop(), first.stop()] == [0, 0]
    for node, epochs in ((first, 1), (second, 3)):  # nobody else is there
        node.start("--epochs", epochs)
        assert node.process is not None and node.process.wait(90) == 0, node.tail()
    before = {node: chain_of(node.home) for node in (first, second)}
    first.process = second.process = None
    with first, second:
        digests = Digests(first, second)
        digests.wait("a record of two again", lambda: members_of(chain_of(first.home)[-1]) == 2)
        won = chain_of(first.home)
        digests.wait("the same head", lambda: chain_of(second.home)[: len(won)] == won)
        (loser,) = [node for node in (first, second) if before[node] != won[: len(before[node])]]
        (name,) = loser.status()["branches"]
        assert f"tokens given up, kept as the branch {name}" in loser.get("/history")
        out = tmp_path / "lost"
        run("export", out, "--branch", name, "--home", loser.home)
        assert [first.stop(), second.stop()] == [0, 0]
    said = json.loads(run("log", "--branches", "--json", "--home", loser.home))
    assert [one["kind"] for one in said] == ["run", "lost"] and said[1]["folder"] == f"branches/{name}"
    assert said[1]["epoch"] == len(before[loser]) and said[1]["lacks"] == "" and said[1]["why"]
    assert "branches 1" in run("verify", loser.home)
    assert "was the head" in run("verify", out, "--allow-unproven"), (
        "the last state that lost was signed by nobody"
    )
    assert f"branch=kept name={name}" in loser.tail(1000)
