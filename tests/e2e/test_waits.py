"""A founder that waits for a second member, and an applicant, with real daemons: what they say of it."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from e2e.harness import Node, init, tapestry

from tapestry.node.daemon.waits import LOOK_S
from tapestry.node.protocol.waits import USUAL_S

pytestmark = [pytest.mark.e2e, pytest.mark.long]


def test_a_founder_that_waits_for_a_second_member_says_so_everywhere_and_is_ready(tmp_path: Path) -> None:
    with Node(init(tmp_path / "a", "--preset", "nano", "--admission", "members", min_members="2")) as founder:

        def waiting() -> dict:
            return founder.status()["waiting"] or {}

        founder.wait_ready()
        founder.wait("its wait", lambda: waiting().get("kind") == "members")
        assert founder.get("/readyz") == "ready\n" and "waiting=" not in founder.log.read_text()
        with Node(tmp_path / "b", "--peer", founder.address, data="stdlib:2/3") as second:
            second.wait("its answer", lambda: "waiting to be admitted by" in second.log.read_text())
            shown = json.loads(tapestry("status", "--home", second.home, "--json").stdout)
            assert (shown["phase"], shown["waiting"]["kind"]) == ("joining", "admission")
            asks = re.search(r"; ends when who admits runs: tapestry admit (12D3KooW\w+)$", shown["reason"])
            assert asks is not None, shown["reason"]

            founder.wait("a line of the log", lambda: "waiting=members" in founder.log.read_text())
            assert waiting()["lasting"] and USUAL_S <= waiting()["for_s"] < USUAL_S + 6 * LOOK_S
            says = founder.get("/readyz")
            assert says.startswith("ready; 1 contribution, the run asks for 2, for 1.") and "invite" in says
            events = json.loads(founder.get("/history"))["events"]
            assert [event for event in events if event["text"].startswith("waiting: 1 contribution")]
            lines = founder.get("/metrics").splitlines()
            line = next(line for line in lines if line.startswith('tapestry_waiting_seconds{kind="members"}'))
            assert float(line.split()[-1]) >= USUAL_S

            assert tapestry("admit", asks[1], "--home", founder.home).returncode == 0
            founder.wait_epoch(2)
            assert waiting().get("kind") != "members" and founder.get("/readyz") == "ready\n"
