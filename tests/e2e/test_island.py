"""Leaving a swarm with everything, going on alone, and bringing back what was learnt, with real nodes."""

from __future__ import annotations

from pathlib import Path

import pytest
from e2e.harness import Digests, Node, init, tapestry
from e2e.test_swarm_of_three import chain_of, members_of

pytestmark = [pytest.mark.e2e, pytest.mark.long]


def run(*words: object) -> str:
    done = tapestry(*words)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_member_leaves_with_an_exit_goes_on_alone_and_brings_it_back(tmp_path: Path) -> None:
    with Node(init(tmp_path / "a", inner_steps="20")) as founder:
        founder.wait_ready()
        second = Node(tmp_path / "b", "--peer", founder.invitation(), data="stdlib:2/3")
        with second, Node(tmp_path / "c", "--peer", founder.invitation(), data="stdlib:3/3") as third:
            for node in (second, third):
                node.wait_ready()
            founder.wait("a record of three", lambda: members_of(chain_of(founder.home)[-1]) == 3)
            assert second.stop() == 0
            left_at = chain_of(second.home)[-1]["epoch"]

            out = tmp_path / "out"
            assert f"epoch {left_at}" in run("exit", out, "--home", second.home)
            alone = Node(out, "--island", "--epochs", "2", data="stdlib:2/3").start()
            alone.wait("its island", lambda: alone.status()["island"]["since_epoch"] == left_at)
            assert alone.process is not None and alone.process.wait(60) == 0, alone.tail()
            assert [r["forced"] for r in chain_of(out)][left_at:] == [True, False]
            assert "it holds" in run("verify", out)
            assert f"at epoch {left_at} again" in run("rejoin", "--home", out, "--bring")
            brought = out / "brought.safetensors"
            assert brought.exists() and chain_of(out)[-1]["epoch"] == left_at

            back = Node(out, "--peer", founder.invitation(), data="stdlib:2/3")
            with back:
                back.wait_ready()
                digests = Digests(founder, third, back)
                digests.wait("its contribution", lambda: not brought.exists())
                count = len(chain_of(out))
                digests.wait("two epochs more", lambda: len(chain_of(out)) >= count + 2)
                assert [back.stop(), third.stop(), founder.stop()] == [0, 0, 0]
    assert "brought epoch=" in back.tail(1000)
    mine, theirs = chain_of(out), chain_of(founder.home)
    assert mine == theirs[: len(mine)] or theirs == mine[: len(theirs)]
    assert not any(record["forced"] for record in theirs)
    assert list((out / "islands").iterdir())
