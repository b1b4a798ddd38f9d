"""A restored home looks for its run first; a service manager hears how the node is; process 1 takes in
orphans."""

from __future__ import annotations

import asyncio
import os
import socket
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tapestry.dht.addresses import PeerAddress, parse_peer
from tapestry.dht.control import Unreachable
from tapestry.node.daemon import restored
from tapestry.node.daemon.notify import Notifier
from tapestry.node.disk.files import seal
from tapestry.node.disk.home_mark import Mark, read_mark, write_mark
from tapestry.node.disk.store import _vote_to_dict
from tapestry.node.home import Home
from tapestry.node.protocol.events import Vote
from tapestry.node.protocol.waits import Wait

THERE = parse_peer("/ip4/127.0.0.1/tcp/1/p2p/12D3KooWCaHaT7xh4yGquL286pZyfWAMnEyMke3Rwi5DGsRxQz4W")
OWN = "cd" * 16  # the name of the disk that it is now
MARK = Mark(1, "ab", "/h", "", "2026-11-29T10:00:00+00:00")


class FakeSwarm:
    """Of which nobody can be reached."""

    peer_id = "us"

    def __init__(self, reachable: bool, listed: Sequence[object] = (), silent: int = 0) -> None:
        self.reachable, self.listed, self.silent = reachable, listed, silent
        self.reached = asyncio.Event()

    async def join_dht(self, run_id: str, peers: Sequence[PeerAddress], timeout_s: float) -> int:
        return 0

    async def list_presence(self, now: float) -> list[Any]:
        return [*self.listed]

    async def connect_any(self, peer_id: str, addresses: object, timeout_s: float) -> None:
        if self.silent:  # the first that are asked do not answer while nobody else was reached
            self.silent -= 1
            await self.reached.wait()
            raise Unreachable("timeout", "nobody answers")
        self.reached.set()
        if not self.reachable and peer_id == THERE.peer_id:
            raise Unreachable("refused", "nobody there")


def look(
    home: Home,
    monkeypatch: pytest.MonkeyPatch,
    *,
    reachable: bool,
    theirs: str,
    electors: Sequence[str] = (THERE.peer_id,),
    listed: Sequence[object] = (),
    known: Sequence[PeerAddress] = (THERE,),
    silent: int = 0,
    lives: Sequence[str] = ("of before",),
) -> list[Wait | None]:
    said: list[Wait | None] = []

    async def is_member(swarm: object, peer_id: str, run_id: str, crypto: object) -> bool:
        return run_id == theirs

    monkeypatch.setattr(restored, "_is_member", is_member)
    monkeypatch.setattr(restored, "LOOK_S", 0.01)
    genesis = SimpleNamespace(run_id="ours")
    swarm: Any = FakeSwarm(reachable, listed, silent)
    standing, seats = SimpleNamespace(electorate=electors), frozenset([("us", life) for life in lives])
    place = SimpleNamespace(epoch=7, electorate=electors, standing=standing, seats=seats)
    chain: Any = SimpleNamespace(place=place)

    async def find() -> None:
        async with asyncio.timeout(5):
            await restored.find_run(home, MARK, genesis, chain, 0.05, swarm, known, object(), said.append)  # type: ignore[arg-type]

    asyncio.run(find())
    assert said[-1:] in ([], [None])
    return said


def is_ordinary(home: Home) -> bool:
    mark = read_mark(home)
    return mark is not None and mark.restored_at == ""


def test_a_restored_home_that_meets_its_run_is_an_ordinary_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = Home(tmp_path)
    said = look(home, monkeypatch, reachable=True, theirs="ours")
    assert is_ordinary(home) and len(said) == 2
    assert said[0] is not None and said[0].kind == "run"
    assert "looks for its run before it trains" in said[0].what and "alone" in said[0].ends


@pytest.mark.parametrize("where", ["known", "listed"])
def test_who_does_not_answer_takes_the_time_of_nobody_who_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    """Two members that were gone, with three addresses each, used up all the time."""
    home, gone = Home(tmp_path), [replace(THERE, peer_id=f"gone {i}") for i in range(2)]
    there = SimpleNamespace(peer_id="there", phase="training", epoch=7, addresses=("/ip4/127.0.0.1/tcp/2",))
    known = [*gone, *gone, *gone, *([replace(THERE, peer_id="there")] if where == "known" else [])]
    listed = [there] if where == "listed" else []
    electors = ["gone 0", "gone 1", "there"]
    look(
        home,
        monkeypatch,
        reachable=True,
        theirs="ours",
        electors=electors,
        listed=listed,
        known=known,
        silent=2,
    )
    assert is_ordinary(home)


@pytest.mark.parametrize(("reachable", "theirs"), [(False, "ours"), (True, "another run")])
def test_one_that_stays_alone_waits_the_runs_time_and_looks_again_at_its_next_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reachable: bool, theirs: str
) -> None:
    home = Home(tmp_path)
    write_mark(home, MARK)
    assert len(look(home, monkeypatch, reachable=reachable, theirs=theirs)) > 2
    assert not is_ordinary(home)


def test_a_lone_elector_goes_on_alone_whoever_serves_the_genesis(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Anybody can. As one that was found it stood by for ever, for a record that nobody else can make."""
    home = Home(tmp_path)
    same = SimpleNamespace(peer_id="them", phase="training", epoch=7, addresses=())
    write_mark(home, MARK)
    assert len(look(home, monkeypatch, reachable=True, theirs="ours", electors=["us"], listed=[same])) > 2
    assert not is_ordinary(home)


def test_a_lone_elector_whose_run_went_on_after_the_backup_has_found_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may have signed the records that others have, and would sign others for the same epochs."""
    home = Home(tmp_path)
    further = SimpleNamespace(peer_id="them", phase="training", epoch=8, addresses=())
    look(home, monkeypatch, reachable=True, theirs="ours", electors=["us"], listed=[further])
    assert is_ordinary(home)


@pytest.mark.parametrize(("lives", "looks"), [((OWN,), False), (("of before",), True), ((), True)])
def test_one_whose_newest_record_names_the_disk_that_it_is_now_is_an_ordinary_home(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    lives: Sequence[str],
    looks: bool,
) -> None:
    """It has gone on alone, and made that record."""
    home = Home(tmp_path)
    write_mark(home, MARK)
    home.vote.write_bytes(seal(_vote_to_dict(Vote(7, "ab" * 32, 0, -1, None, OWN))))
    said = look(home, monkeypatch, reachable=False, theirs="ours", lives=lives)
    assert (bool(said), is_ordinary(home)) == (looks, not looks)


# ---- the service manager -----------------------------------------------------------------------------


def test_a_service_manager_hears_ready_status_and_signs_of_life(tmp_path: Path) -> None:
    path = str(tmp_path / "notify")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(path)
        manager.settimeout(5)
        environ = {
            "NOTIFY_SOCKET": path,
            "WATCHDOG_USEC": "30000000",
            "WATCHDOG_PID": str(os.getpid()),
            "A": "b",
        }
        notifier = Notifier(environ)
        assert environ == {"A": "b"}  # no child speaks for us
        assert notifier.every_s == 10.0
        notifier.beat("epoch 0, joining")
        assert manager.recv(999) == b"STATUS=epoch 0, joining\nWATCHDOG=1\nEXTEND_TIMEOUT_USEC=60000000"
        notifier.ready("epoch 1, training")
        notifier.beat("epoch 2, training")
        notifier.stopping()
        got = [manager.recv(999) for _ in range(3)]
        assert got == [
            b"READY=1\nSTATUS=epoch 1, training",
            b"STATUS=epoch 2, training\nWATCHDOG=1",
            b"STOPPING=1",
        ]
    notifier.ready("epoch 1, training")  # it is gone: no matter
    Notifier({}).ready("epoch 1, training")
    assert Notifier({"WATCHDOG_USEC": "9000000", "WATCHDOG_PID": "1"}).every_s == 10.0  # another's
    assert Notifier({"WATCHDOG_USEC": "9000000"}).every_s == 3.0


def test_words_of_peers_are_no_field_of_the_service_managers(tmp_path: Path) -> None:
    path = str(tmp_path / "notify")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(path)
        manager.settimeout(5)
        notifier = Notifier({"NOTIFY_SOCKET": path})
        notifier.ready("removed by x: gone\nMAINPID=1")
        notifier.beat("removed by x: gone\nSTOPPING=1")
        said = [manager.recv(999) for _ in range(2)]
    assert said == [
        b"READY=1\nSTATUS=removed by x: gone MAINPID=1",
        b"STATUS=removed by x: gone STOPPING=1",
    ]


def test_a_status_that_fails_is_told_once_and_the_sign_of_life_goes_on(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The task ended, nobody looked at it, and the watchdog killed a node that was well."""
    said: list[str] = []
    third = asyncio.Event()

    class Heard(Notifier):
        def send(self, text: str) -> None:
            said.append(text)
            if len(said) == 3:
                third.set()

    def status() -> str:
        raise KeyError("a bug of ours")

    async def main() -> None:
        notifier = Heard({"WATCHDOG_USEC": "30000", "WATCHDOG_PID": str(os.getpid())})
        running = asyncio.create_task(notifier.run(status))
        async with asyncio.timeout(5.0):
            await third.wait()
        running.cancel()

    asyncio.run(main())
    assert all(text.startswith("STATUS=alive; ") and "WATCHDOG=1" in text for text in said)
    (record,) = caplog.records
    assert "status=not_told" in record.getMessage() and record.exc_info is not None


ADOPTS = """
import ctypes, os, subprocess, sys, time
from tapestry.node.daemon.notify import Reaper
ctypes.CDLL(None).prctl(36, 1)  # PR_SET_CHILD_SUBREAPER: as process 1 is
subprocess.run(["sh", "-c", "sleep 0 & sleep 0 & exit 0"])
mine = subprocess.Popen(["true"])
reaper = Reaper()
def zombies():
    children = open(f"/proc/self/task/{os.getpid()}/children").read().split()
    return sum(open(f"/proc/{child}/stat").read().rsplit(")", 1)[1].split()[0] == "Z" for child in children)
while (before := zombies()) < 3:
    time.sleep(0.01)
mine.wait()  # as the loop does, before the reaper looks again
for _ in range(8):
    reaper.look()
print(before, zombies(), mine.returncode)
"""


def test_process_1_takes_in_orphans_and_leaves_its_own_children_to_who_waits_for_them() -> None:
    done = subprocess.run([sys.executable, "-c", ADOPTS], capture_output=True, text=True, timeout=30)
    assert done.stdout.split() == ["3", "0", "0"], done
