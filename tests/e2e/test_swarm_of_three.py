"""The main job with real daemons: join by one line, commit the same bits, lose one node, get it back."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from e2e.harness import Digests, Node, init, tapestry

from tapestry.node.home import Home
from tapestry.node.lineage.egress import Totals, read_egress

pytestmark = pytest.mark.e2e

PUBLISHED = """
[[source]]
path = "/letters"
owner = "the archive"
licence = "CC-BY-4.0"
mode = "open"
purposes = ["base"]
description = "Letters of two centuries"
"""


def chain_of(home: Path) -> list[dict]:
    """The bodies in a home's chain.jsonl, whatever they are sealed with."""

    def body(value: object) -> dict | None:
        if isinstance(value, dict):
            if "prev" in value and "members" in value:
                return value
            value = list(value.values())
        if isinstance(value, list):
            return next((found for found in map(body, value) if found), None)
        return None

    bodies = [body(json.loads(line)) for line in (home / "chain.jsonl").read_text().splitlines()]
    assert None not in bodies
    return [b for b in bodies if b]


def members_of(record: dict) -> int:
    return len(record["members"])


def totals_of(node: Node) -> Totals:
    totals = Totals()
    for entry in read_egress(Home(node.home)):
        totals.add(entry)
    return totals


def sent_by(node: Node) -> float:
    """Bytes, by its metrics."""
    sent = re.findall(r'tapestry_network_bytes_total\{direction="sent".*\} (\S+)', node.get("/metrics"))
    return sum(map(float, sent))


def test_three_nodes_hold_the_same_bits_lose_one_and_get_it_back(tmp_path: Path) -> None:
    founder = Node(init(tmp_path / "a", inner_steps="30", shard_elements="4096"))
    with founder:
        founder.wait_ready()
        caps = ("--max-upload", "20mbit", "--max-download", "50mbit")
        (tmp_path / "b").mkdir()
        (tmp_path / "b" / "data.toml").write_text(PUBLISHED)
        second = Node(tmp_path / "b", "--peer", founder.invitation(), *caps, data="stdlib:2/3")
        third = Node(tmp_path / "c", "--peer", founder.invitation(), data="stdlib:3/3")
        with second, third:
            nodes = (founder, second, third)
            digests = Digests(*nodes)
            second.wait_ready()
            third.wait_ready()
            assert second.status()["caps"] == {
                "upload_bytes_per_second": 2_500_000,
                "download_bytes_per_second": 6_250_000,
            }

            def all_members() -> bool:
                chain = chain_of(founder.home)
                return bool(chain) and members_of(chain[-1]) == 3

            digests.wait("a record of three members", all_members)
            start = founder.status()["epoch"]
            digests.wait("three more epochs", lambda: founder.status()["epoch"] >= start + 3)
            assert all(json.loads(n.get("/status"))["run_id"] == founder.json()["run_id"] for n in nodes)
            assert founder.get("/readyz").strip()
            assert 'tapestry_rounds_total{outcome="committed"}' in founder.get("/metrics")

            heard = founder.home / "descriptions.json"
            digests.wait("what the second says of its data", lambda: "Letters of two" in heard.read_text())

            third.kill()
            killed_at = founder.status()["epoch"]
            digests.wait("two epochs without it", lambda: founder.status()["epoch"] >= killed_at + 2)
            third.start().wait_ready()
            again = founder.status()["epoch"]
            digests.wait("its return", lambda: third.status()["epoch"] >= again)
            digests.wait(
                "a record with it again",
                lambda: members_of(chain_of(founder.home)[-1]) == 3 and founder.status()["epoch"] > again,
            )
            assert [n.stop() for n in (third, second)] == [0, 0], third.tail()
            sent = sent_by(founder)
            assert founder.stop() == 0
    assert totals_of(founder).bytes == pytest.approx(sent, rel=0.03), "its ledger and its metrics"
    killed = totals_of(third)
    assert killed.starts == 2 and killed.by_kind["contribution"] > 0
    assert any(len(names) == 3 for names in digests.shared.values()), "no epoch was seen on all three"
    for node in nodes:
        chain = chain_of(node.home)
        assert [r["epoch"] for r in chain] == list(range(1, len(chain) + 1))
        assert not any(r["forced"] for r in chain)
        assert not (node.home / "node.json").exists()
    shortest = min((chain_of(n.home) for n in nodes), key=len)
    assert all(chain_of(n.home)[: len(shortest)] == shortest for n in nodes)
    assert len(
        {c["contribution"] if isinstance(c, dict) else c[2] for r in shortest for c in r["members"]}
    ) == sum(members_of(r) for r in shortest), "a contribution counted twice"

    out = tmp_path / "model"
    assert tapestry("export", out, "--home", founder.home).returncode == 0
    assert "tensors proven" in tapestry("verify", out).stdout
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= {p.name for p in out.iterdir()}
    assert "- Letters of two centuries (of the archive, CC-BY-4.0)" in (out / "README.md").read_text()


def test_a_restarted_founder_resumes_where_it_stopped(tmp_path: Path) -> None:
    with Node(init(tmp_path / "a")) as node:
        node.wait_ready()
        node.wait_epoch(3)
        address = node.address
        assert node.stop() == 0
        epoch = len(chain_of(node.home))
        node.start().wait_ready()
        assert node.address == address, "others know it by its port"
        status = node.status()
        assert status["epoch"] >= epoch
        node.kill()
        node.start().wait_ready()
        node.wait_epoch(epoch + 1)
        assert node.stop() == 0
    epochs = [r["epoch"] for r in chain_of(node.home)]
    assert epochs == list(range(1, len(epochs) + 1))


def test_a_dead_p2pd_is_replaced_and_training_goes_on(tmp_path: Path) -> None:
    with Node(init(tmp_path / "a")) as node:
        node.wait_ready()
        line = node.invitation()
        first = node.p2pd()
        assert first is not None
        first.kill()
        node.wait("a new p2pd", lambda: node.p2pd() not in (None, first), deadline_s=5.0)
        epoch = node.status()["epoch"]
        node.wait_epoch(epoch + 2)
        with Node(tmp_path / "b", "--peer", line, data="stdlib:2/3") as second:
            second.wait_ready()
            second.wait_epoch(epoch)
        assert node.stop() == 0


def test_epochs_ends_the_node_by_itself(tmp_path: Path) -> None:
    with Node(init(tmp_path / "a"), "--epochs", 3) as node:
        assert node.process is not None
        assert node.process.wait(60) == 0, node.tail()
    assert "trainer=ready device='cpu' train_tokens=" in node.log.read_text()
    assert len(chain_of(node.home)) == 3


def test_a_restarted_node_finds_the_others_without_the_peer_it_joined_by(tmp_path: Path) -> None:
    """In a run with overlap, for which all must hold as well. Epochs take a second or more: in shorter ones
    the second node may come a moment late to the founder's last round, and be no elector after it."""
    with Node(init(tmp_path / "a", overlap="true", inner_steps="100")) as founder:
        founder.wait_ready()
        second = Node(tmp_path / "b", "--peer", founder.invitation(), data="stdlib:2/3")
        third = Node(tmp_path / "c", "--peer", founder.invitation(), data="stdlib:3/3")
        with second, third:
            second.wait_ready()
            third.wait_ready()
            founder.wait("an electorate of three", lambda: founder.electorate() == 3)
            second.wait(
                "the third's address", lambda: len(json.loads((second.home / "peers.json").read_text())) == 2
            )
            assert founder.stop() == 0
            third.wait("a record of two", lambda: members_of(chain_of(third.home)[-1]) == 2)
            assert third.electorate() == 3, "two of three decide: it stays one of them"
            second.kill()
            second.flags = []
            second.start().wait_ready()
            epoch = third.status()["epoch"]
            third.wait_epoch(epoch + 2, deadline_s=20)  # sooner than it would go on alone
            assert not any(r["forced"] for r in chain_of(third.home))
            second.wait("its contribution again", lambda: members_of(chain_of(third.home)[-1]) == 2)
            assert second.stop() == 0
            third.wait("what it waits for", lambda: "need 2" in third.status()["reason"])
            assert not any(r["forced"] for r in chain_of(third.home)), "one of three goes on by itself"
            epoch = third.status()["epoch"]
            second.start().wait_ready()
            third.wait_epoch(epoch + 2)
            assert [second.stop(), third.stop()] == [0, 0]
    chains = [chain_of(node.home) for node in (founder, second, third)]
    length = min(map(len, chains))
    assert chains[0][:length] == chains[1][:length] == chains[2][:length]  # the digests of all states with it
    assert max(members_of(r) for r in chains[0]) == 3


@pytest.mark.long
def test_a_node_whose_clock_is_wrong_is_found_by_those_that_come_after_it(tmp_path: Path) -> None:
    """The DHT shows it nobody, and it to nobody; but a member that others do not reach stalls every round."""
    founder = Node(init(tmp_path / "a", inner_steps="20", shard_elements="4096"))
    with founder:
        founder.wait_ready()
        wrong = Node(tmp_path / "b", "--peer", founder.invitation())
        wrong.shift_clock(-540)
        with wrong:
            wrong.wait_ready()
            with Node(tmp_path / "c", "--peer", founder.invitation()) as late:
                late.wait_ready()

                def all_linked() -> bool:
                    return all(len(json.loads(n.get("/peers"))) == 2 for n in (founder, wrong, late))

                late.wait("links between all", all_linked, 20)
                start = founder.status()["epoch"]
                founder.wait_epoch(start + 5)
                # Any one record may miss a member that was slow for a moment; all of them, one out of reach.
                assert max(members_of(record) for record in chain_of(founder.home)[-5:]) == 3
                unknown = [p for p in json.loads(founder.get("/peers")) if not p["addresses"]]
                assert not unknown, "where they listen is told to others, and kept for a restart"
