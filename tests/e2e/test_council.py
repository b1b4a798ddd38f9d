"""A council of real nodes: what two of its three sign is done, at every node alike; what one signs is not."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

import pytest
from e2e.harness import DEADLINE_S, Node, init, tapestry

from tapestry.node.home import Home
from tapestry.node.surface import control

pytestmark = pytest.mark.e2e
COUNT = 3


def said(*words: object) -> str:
    done = tapestry(*words)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def table_of(node: Node) -> dict[str, Any]:
    """What `tapestry members` asks the node for."""
    return control.ask(Home(node.home), {"do": "members"})


def members(node: Node) -> set[str]:
    return {one["peer"] for one in table_of(node)["members"]}


def proposed(by: Node, *words: object) -> str:
    """Its name, and that one signature is not enough is said."""
    answer = said(*words, "--home", by.home)
    assert answer.startswith("1 of 2 have signed; the others run: tapestry approve "), answer
    return answer.rsplit(" ", 1)[1]


def approved(by: Node, name: str) -> None:
    by.wait("the proposal", lambda: [one for one in table_of(by)["pending"] if one["id"].startswith(name)])
    answer = said("approve", name, "--home", by.home)
    assert answer.startswith(f"approved {name}, from epoch "), answer


def test_two_of_three_admit_and_replace_a_key_and_one_does_neither(tmp_path: Path) -> None:
    homes = [tmp_path / name for name in "abc"]
    ids = [said("id", "--home", home) for home in homes[1:]]
    init(homes[0], inner_steps="4", admit_by=f'"council 2/{COUNT}"', founders=json.dumps(ids))
    first, second, third = (Node(home, data=f"stdlib:{i + 1}/{COUNT}") for i, home in enumerate(homes))
    with contextlib.ExitStack() as stack:
        stack.enter_context(first).wait_ready()
        for node in (second, third):
            node.flags = ["--peer", first.address]
            stack.enter_context(node).wait_ready()
        first.wait("an electorate of three", lambda: first.electorate() == COUNT)
        assert members(first) == {first.json()["peer_id"], *ids}

        newcomer = stack.enter_context(Node(tmp_path / "d", "--peer", first.address))
        newcomer.wait("its answer", lambda: "waiting to be admitted by" in newcomer.log.read_text())
        peer = next(one["peer"] for one in table_of(first)["applicants"])
        name = proposed(first, "propose", "admit", peer, "lab-quito")
        assert proposed(first, "propose", "rekey", ids[1], peer) != name, "the same needs another one's too"
        for node in (first, second):
            node.wait_epoch(first.status()["epoch"] + 3)
            assert peer not in members(node) and ids[1] in members(node)
        (waiting,) = (one for one in table_of(second)["pending"] if one["kind"] == "admit")
        assert (waiting["signed"], waiting["needs"], waiting["enough"]) == (1, 2, False)
        approved(second, name)
        newcomer.wait_ready()
        first.wait("an electorate of four", lambda: first.electorate() == COUNT + 1)
        for node in (first, second, third, newcomer):
            node.wait("the newcomer", lambda node=node: peer in members(node))
        refused = tapestry("propose", "remove", ids[1], "--home", newcomer.home)
        assert refused.returncode == 4 and "may not ask for that" in refused.stderr, "no founder"

        assert third.stop() == 0
        heir = Node(tmp_path / "e", "--peer", first.address, data=third.data)
        key = said("id", "--home", heir.home)
        approved(second, proposed(first, "propose", "rekey", ids[1], key))
        stack.enter_context(heir).wait_ready()
        first.wait("an electorate of four again", lambda: first.electorate() == COUNT + 1)
        assert members(heir) == {first.json()["peer_id"], ids[0], peer, key}
        third.start()
        assert third.process is not None and third.process.wait(DEADLINE_S) == 4, third.tail()
        assert "its key was replaced" in third.tail()
        approved(heir, proposed(first, "propose", "set", "outer.lr", "0.5"))
        newcomer.wait("the setting", lambda: newcomer.status()["settings"] == {"outer.lr": 0.5})
        assert [node.stop() for node in (heir, newcomer, second, first)] == [0, 0, 0, 0]
    for home in (first.home, heir.home):
        assert "it holds" in said("verify", home)
