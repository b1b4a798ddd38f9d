"""What an operator does with real nodes: service manager, backup and restore, a copied home, doctor."""

from __future__ import annotations

import contextlib
import json
import shutil
import socket
from pathlib import Path

import pytest
from e2e.harness import Node, init, tapestry

pytestmark = [pytest.mark.e2e, pytest.mark.long]


def _joined(tmp_path: Path, founder: Node) -> Path:
    home = tmp_path / "b"
    home.mkdir()
    (home / "node.toml").write_text("threads = 1\n")
    return home


def test_a_service_manager_is_told_and_a_restored_member_finds_its_run(tmp_path: Path) -> None:
    manager = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    manager.bind(str(tmp_path / "notify"))
    manager.settimeout(30)
    founder = Node(init(tmp_path / "a"))
    founder.environment = {"NOTIFY_SOCKET": str(tmp_path / "notify"), "WATCHDOG_USEC": "3000000"}
    with manager, founder:
        heard = [manager.recv(1000).decode()]
        while not heard[-1].startswith("READY=1"):
            heard.append(manager.recv(1000).decode())
        assert heard[-1] == "READY=1\nSTATUS=epoch 0, training"
        assert heard[0].startswith("STATUS=epoch 0, starting\nWATCHDOG=1\nEXTEND_TIMEOUT_USEC=")
        founder.wait_ready()
        home = _joined(tmp_path, founder)
        with Node(home, "--peer", founder.invitation(), data="stdlib:2/3") as member:
            member.wait_ready()
            member.wait_epoch(2)
            done = tapestry("backup", tmp_path / "b.tar", "--home", home)
            assert done.returncode == 0, done.stderr
            epoch = member.status()["epoch"]
            member.wait_epoch(epoch + 2)
            assert member.stop() == 0
        home.rename(tmp_path / "lost")
        done = tapestry("restore", tmp_path / "b.tar", "--home", home)
        assert done.returncode == 0, done.stderr
        assert json.loads((home / "home.json").read_text())["restored_at"]
        with Node(home, data="stdlib:2/3") as member:
            member.wait_ready()
            there = founder.status()["epoch"]
            assert there > epoch
            member.wait_epoch(there)
            member.wait("its voice", lambda: member.status()["phase"] in ("training", "averaging"))
            assert "found=" in (home / "node.log").read_text()
            assert json.loads((home / "home.json").read_text())["restored_at"] == ""
        with contextlib.suppress(BlockingIOError):  # the kernel keeps ten lines and drops what comes then
            manager.setblocking(False)
            while True:
                manager.recv(1000)
        manager.settimeout(30)
        assert founder.stop() == 0
        while "STOPPING=1" not in heard:
            heard.append(manager.recv(1000).decode())


def test_the_second_node_with_one_key_is_refused_and_doctor_says_what_is_well(tmp_path: Path) -> None:
    with Node(init(tmp_path / "a")) as founder:
        founder.wait_ready()
        home = _joined(tmp_path, founder)
        with Node(home, "--peer", founder.invitation(), data="stdlib:2/3") as member:
            member.wait_ready()
            member.wait_epoch(1)
            copy = tmp_path / "copy"
            shutil.copytree(home, copy, ignore=shutil.ignore_patterns("*.sock", "state"))
            refused = tapestry("start", "--home", copy, "--data", "stdlib:3/3", "--http", "127.0.0.1:0")
            assert refused.returncode == 4 and "is a copy of" in refused.stderr
            (copy / "home.json").unlink()  # as if it came from another machine
            with Node(copy, data="stdlib:3/3") as twin:
                assert twin.process is not None and twin.process.wait(90) == 4
                assert "with this home's key" in twin.tail()
            assert member.process is not None and member.process.poll() is None
            looked = tapestry(
                "doctor",
                "--home",
                tmp_path / "c",
                "--peer",
                founder.address,
                "--data",
                "stdlib:3/3",
                "--listen",
                "/ip4/127.0.0.1/tcp/0",
                "--http",
                "127.0.0.1:0",
                "--json",
            )
            answer = json.loads(looked.stdout)
            assert looked.returncode == 0 and answer["ok"], answer
            verdicts = {one["what"]: one["verdict"] for one in answer["findings"]}
            assert verdicts["clock"] == verdicts["dialled"] == verdicts["join"] == "ok"
