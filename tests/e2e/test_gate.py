"""Real nodes measure a result before they vote: what one member poisons is left out, and the run goes on."""

from __future__ import annotations

from pathlib import Path

import pytest
from e2e.harness import Node, init

pytestmark = [pytest.mark.e2e, pytest.mark.long]  # over half a minute where cores are shared


def test_a_poisoned_contribution_is_refused_by_the_others_data_and_left_out(tmp_path: Path) -> None:
    """The plain mean, which it would drag anywhere."""
    founder = Node(init(tmp_path / "a", inner_steps="4", rule='"mean"', margin="0.02"))
    with founder:
        founder.wait_ready()
        honest = Node(tmp_path / "b", "--peer", founder.invitation(), data="stdlib:2/3")
        poisoner = Node(tmp_path / "c", "--peer", founder.invitation(), data="stdlib:3/3")
        poisoner.lie("poison")
        with honest, poisoner:
            for node in (honest, poisoner):
                node.wait_ready()
            name, nodes = poisoner.json()["peer_id"], (founder, honest, poisoner)
            founder.wait("a round made again", lambda: any("gate=again" in n.log.read_text() for n in nodes))
            for node in (founder, honest):
                node.wait("a refusal", lambda node=node: "gate=refused" in node.log.read_text())
                text = next(line for line in node.log.read_text().splitlines() if "gate=refused" in line)
                assert f"furthest={name}" in text
            epoch = founder.status()["epoch"]
            founder.wait("the run to go on", lambda: founder.status()["epoch"] > epoch + 3)
            assert 'tapestry_gate_total{outcome="refused"}' in founder.get("/metrics")
            assert founder.status()["val_loss"] < 5.6
