"""A swarm of a member on a GPU and one on its processor. Deselected unless asked for with -m gpu."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from e2e.harness import Digests, Node, init
from e2e.test_swarm_of_three import chain_of, members_of

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device"),
]


@pytest.mark.parametrize("overlap", ["false", "true"])
def test_a_member_on_a_gpu_and_one_on_its_processor_hold_the_same_bits(tmp_path: Path, overlap: str) -> None:
    home = init(tmp_path / "a", preset="tiny", inner_steps="20", overlap=overlap)
    with Node(home, "--device", "cuda") as on_gpu:
        on_gpu.wait_ready()
        assert "trainer=ready device='cuda, " in on_gpu.log.read_text()
        with Node(
            tmp_path / "b", "--peer", on_gpu.invitation(), "--device", "cpu", data="stdlib:2/3"
        ) as on_cpu:
            digests = Digests(on_gpu, on_cpu)
            on_cpu.wait_ready()
            digests.wait("a record of both", lambda: members_of(chain_of(on_gpu.home)[-1]) == 2)
            epoch = on_gpu.status()["epoch"]
            digests.wait("three more epochs", lambda: on_cpu.status()["epoch"] >= epoch + 3)
            assert [on_cpu.stop(), on_gpu.stop()] == [0, 0], on_gpu.tail()
    assert any(len(names) == 2 for names in digests.shared.values()), "no epoch was seen on both"
    chains = [chain_of(node.home) for node in (on_gpu, on_cpu)]
    length = min(map(len, chains))
    assert chains[0][:length] == chains[1][:length]
    assert sum(members_of(r) == 2 for r in chains[0]) >= 3
