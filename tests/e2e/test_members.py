"""Who may take part, with real daemons: an applicant, an invitation, a removal."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from e2e.harness import DEADLINE_S, LOOPBACK, Node, init, tapestry

pytestmark = pytest.mark.e2e
PASSED = 'tapestry_gate_total{outcome="passed"}'


def test_strangers_wait_guests_come_in_and_who_is_removed_is_told_why(tmp_path: Path) -> None:
    def asked(*words: object) -> dict:
        done = tapestry(*words, "--home", founder.home)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout) if "--json" in words else {"line": done.stdout.strip()}

    def members() -> dict[str, str]:
        return {one["peer"]: one["name"] for one in asked("members", "--json")["members"]}

    def measured(node: Node) -> float:
        lines = node.get("/metrics").splitlines()
        return sum(float(line.split()[-1]) for line in lines if line.startswith(PASSED))

    with Node(init(tmp_path / "a")) as founder:
        founder.wait_ready()
        founder.wait_epoch(1)
        refused = tapestry(
            "start",
            "--home",
            tmp_path / "x",
            "--peer",
            founder.address,
            "--no-wait",
            "--data",
            "stdlib",
            *LOOPBACK,
        )
        assert refused.returncode == 4 and "your id" in refused.stderr

        with Node(tmp_path / "b", "--peer", founder.address, data="stdlib:2/3") as second:
            second.wait("its answer", lambda: "waiting to be admitted by" in second.log.read_text())
            shown = json.loads(tapestry("status", "--home", second.home, "--json").stdout)
            assert shown["phase"] == "joining" and "waiting to be admitted by" in shown["reason"]
            applicants = asked("members", "--json")["applicants"]
            peer = next(one["peer"] for one in applicants if one["name"] == "b")
            assert peer in second.log.read_text() and peer not in members()
            assert founder.status()["peers"] == 0, "an applicant has no link"
            asked("admit", peer[-8:], "--name", "Bea")
            second.wait_ready()
            assert members()[peer] == "Bea"
            founder.wait("an electorate of two", lambda: founder.electorate() == 2)

            line = asked("invite", "--name", "Guest")["line"]
            with Node(tmp_path / "c", "--peer", line, data="stdlib:3/3") as third:
                third.wait_ready()
                assert "Guest" in members().values()
                founder.wait("an electorate of three", lambda: founder.electorate() == 3)
                told = asked("propose", "set", "outer.lr", "5e-1")["line"]
                assert "from epoch" in told, told
                for setting in (("audit.share", "1"), ("round.exchange_max_s", "120"), ("gate.margin", "5")):
                    told = asked("propose", "set", *setting)["line"]
                    assert "from epoch" in told, told
                bad = tapestry("propose", "set", "round.wait_max_s", "1", "--home", founder.home)
                assert bad.returncode and "round.wait_max_s: 1 is not a number from 60" in bad.stderr, bad
                in_force = {"outer.lr": 0.5, "audit.share": 1, "round.exchange_max_s": 120, "gate.margin": 5}
                third.wait("the settings", lambda: third.status()["settings"] == in_force)
                third.wait("a measured result", lambda: measured(third) > 0)
                founder.wait_epoch(int(told.split()[-2]) + 2)
                asked("remove", peer, "--why", "sent noise")
                founder.wait("two go on", lambda: founder.electorate() == 2)
                second.wait("the reason", lambda: "sent noise" in second.status()["reason"])
                founder.wait("its link closed", lambda: founder.status()["peers"] == 1)
                assert third.stop() == 0
            assert second.stop() == 0
        assert founder.stop() == 0
    proof = tapestry("verify", founder.home)
    assert proof.returncode == 0, proof.stderr
    log = " ".join(tapestry("log", "--home", founder.home).stdout.split())  # long lines are broken
    assert f"admit Bea …{peer[-6:]}, asked for by" in log and f"remove Bea …{peer[-6:]} sent noise" in log, (
        log
    )
    told = tapestry("members", "--home", founder.home)
    assert all(key in told.stdout for key in in_force)
    assert told.returncode == 0 and "sent noise" in told.stdout, "from the records alone"


def test_who_was_removed_while_it_was_off_ends_with_the_reason_when_it_is_back(tmp_path: Path) -> None:
    """By its own records it is a member, and no record reaches it: of two it would go on alone for good."""
    with Node(init(tmp_path / "a")) as founder:
        founder.wait_ready()
        with Node(tmp_path / "b", "--peer", founder.invitation(), data="stdlib:2/3") as second:
            second.wait_ready()
            founder.wait("an electorate of two", lambda: founder.electorate() == 2)
            peer = second.json()["peer_id"]
            assert second.stop() == 0
            done = tapestry("remove", peer, "--why", "sent noise", "--home", founder.home)
            assert done.returncode == 0, done.stderr
            founder.wait("two less one", lambda: founder.electorate() == 1)
            assert "handed_over_by=" in (founder.home / "node.log").read_text(), "of two, who stops leaves it"
            second.start()
            assert second.process is not None and second.process.wait(DEADLINE_S) == 4, second.tail()
            assert "this node was removed from the run: sent noise" in second.tail()
        assert founder.stop() == 0
