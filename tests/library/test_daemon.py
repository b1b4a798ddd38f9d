"""What a script is told of its node while that starts, and what it must not do to it meanwhile."""

from __future__ import annotations

import os
import socket
import subprocess
from pathlib import Path
from typing import Any

import pytest
from torch import nn

from tapestry.node import api
from tapestry.node.home import Home
from tapestry.node.library import daemon
from tapestry.node.library.daemon import Daemon
from tapestry.node.library.errors import SwarmError
from tapestry.node.trainer.messages import Stop, pack
from tapestry.node.trainer.opening import ChannelClosed


class Child:
    """A process that goes on until `code` is set, and says what was done to it."""

    def __init__(self, code: int | None = None) -> None:
        self.code = code
        self.killed = False

    def poll(self) -> int | None:
        return self.code

    def wait(self, timeout: float | None = None) -> int:
        if self.code is None:
            raise subprocess.TimeoutExpired("tapestry", timeout or 0.0)
        return self.code

    def kill(self) -> None:
        self.killed, self.code = True, -9


def node_of(home: Home, child: Child) -> Daemon:
    ours, theirs = socket.socketpair()
    theirs.close()
    return Daemon(home, ours, child, 0)  # type: ignore[arg-type]


def home_in(folder: Path) -> Home:
    home = Home(folder)
    home.create()
    return home


def test_a_script_at_a_standing_node_is_not_told_an_error_of_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its node's output goes elsewhere; in node.out lies what ended another one, weeks ago."""
    home = home_in(tmp_path)
    home.output.write_text("error: no data to train on\nhint: name some\n")
    ours, theirs = socket.socketpair()
    monkeypatch.setattr(daemon, "knock", lambda path: ours)
    with theirs, home.lock():
        node = Daemon.find(home)
        assert node is not None
        assert "no data" not in str(node.failure()) and "has ended" in str(node.failure())
        with home.output.open("a") as log:
            log.write("error: the disk is full\n")
        assert str(node.failure()) == "the disk is full"
        node.close()


def test_to_ask_a_node_that_is_starting_does_not_end_it(tmp_path: Path) -> None:
    child = Child()
    node = node_of(home_in(tmp_path), child)
    with pytest.raises(SwarmError, match="is starting"):
        node.ask("/status")
    assert not child.killed and child.code is None
    node.connection.close()


def test_a_node_that_waits_to_be_admitted_is_asked_where_it_answers_before_it_is_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = home_in(tmp_path)
    asked: list[Any] = []
    monkeypatch.setattr(
        daemon, "ask", lambda home, url, path: asked.append((url, path)) or {"phase": "joining"}
    )
    node = node_of(home, Child())
    with home.lock():
        home.write_endpoint("http://127.0.0.1:9")
        assert home.starting_url(os.getpid()) is not None
        assert node.ask("/status") == {"phase": "joining"}
    assert asked == [("http://127.0.0.1:9", "/status")]
    node.connection.close()


def test_a_script_says_meanwhile_what_its_node_waits_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The node's first word comes after somebody has admitted it: the script hung without a line."""
    ours, theirs = socket.socketpair()
    admitted = iter((False, False, True))
    node = Daemon(home_in(tmp_path), ours, Child(), 0)  # type: ignore[arg-type]
    node.ask = lambda path: {"phase": "joining", "reason": "to be admitted by …abcdef"}  # type: ignore[method-assign]
    node.receive_buffers = dict  # type: ignore[method-assign]
    monkeypatch.setattr(daemon, "LOOK_S", 0.0)
    monkeypatch.setattr(api, "SIGN_OF_LIFE_S", 0.0)
    said: list[str] = []

    def tell(line: str) -> None:
        said.append(line)
        if next(admitted):
            theirs.close()

    swarm = api.Swarm(nn.Linear(1, 1), home=tmp_path, tell=tell)
    swarm._daemon = node
    with pytest.raises(ChannelClosed):
        swarm._join(node)
    assert len(said) == 3 and all("to be admitted by …abcdef" in line for line in said)
    ours.close()


def test_a_node_that_ends_before_it_has_joined_says_why_to_its_script(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It says Stop where it would say how to begin; the script ended in a traceback, without the cause."""
    ours, theirs = socket.socketpair()
    home = home_in(tmp_path)
    home.output.write_text("error: cannot reach any peer: nothing listens there\nhint: is it running?\n")
    node = Daemon(home, ours, Child(3), 0)  # type: ignore[arg-type]
    node.receive_buffers = dict  # type: ignore[method-assign]
    theirs.sendall(pack(Stop()))
    swarm = api.Swarm(nn.Linear(1, 1), home=tmp_path)
    monkeypatch.setattr(swarm, "_start", lambda: node)
    with pytest.raises(SwarmError, match="cannot reach any peer: nothing listens there\nhint: is it running"):
        swarm.open()
    theirs.close()


def test_a_node_that_hangs_up_and_does_not_end_is_killed_by_close_alone(tmp_path: Path) -> None:
    child = Child()
    node = node_of(home_in(tmp_path), child)
    assert "does not end" in str(node.failure())
    assert not child.killed
    node.close()
    assert child.killed


def test_a_node_that_ended_while_it_started_says_why(tmp_path: Path) -> None:
    home = home_in(tmp_path)
    home.output.write_text("error: the port is taken\nhint: another one\n")
    node = node_of(home, Child(2))
    with pytest.raises(SwarmError, match="the port is taken\nhint: another one"):
        node.ask("/status")
    node.connection.close()
