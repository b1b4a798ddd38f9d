"""What a peer can tell a machine that wants to join: the time there, its version, and whether it can be
dialled.

    question   msgpack {"ports": [4001, ...]}                 the TCP ports on which the asker listens
    answer     msgpack {"time": seconds since 1970, "version", "run_id", "host", "open": [true, ...]}

`host` is where the asker's connection comes from, and the only host that is dialled: nobody can have a
third party dialled through us. A plain TCP handshake is all that happens there. `tapestry doctor --peer`
asks.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any

import msgpack

from tapestry.node.net.repeats import Repeats
from tapestry.node.net.throttle import Throttle
from tapestry.node.net.wire import (
    FrameLimits,
    RemoteProtocolError,
    WriteLimits,
    frame_parts,
    read_frame,
    unpack,
    write_frame,
)
from tapestry.node.protocol import strict

CHECKUP_PROTOCOL = "/tapestry/checkup/1"
PORTS_MAX = 4
FRAME_BYTES_MAX = 4096
ASK_S = 5.0
DIAL_S = 3.0
AGAIN_S = 2.0  # Guess: of one peer; who asks faster gets no answer
AT_A_TIME_MAX = 8

HostsOf = Callable[[str], Awaitable[Sequence[str]]]  # where a peer's connections come from


@dataclass(frozen=True, slots=True)
class Answer:
    """What the peer said, and when by our clock."""

    offset_s: float  # its clock less ours
    uncertain_s: float  # half of what the question took
    version: str
    run_id: str
    host: str  # "" if it does not know where we come from, or we come through a relay
    open: tuple[bool, ...]  # by port


class Checkup:
    """The answering side."""

    def __init__(self, run_id: str, version: str, hosts_of: HostsOf) -> None:
        self._run_id = run_id
        self._version = version
        self._hosts_of = hosts_of
        self._asked = Repeats(AGAIN_S)
        self._serving: dict[str, asyncio.StreamWriter] = {}  # whose stream was opened first is the first

    async def serve(self, peer: str, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """The handler. Raises RemoteProtocolError, TimeoutError and what streams raise."""
        if peer in self._serving or not self._asked.may_tell(peer, asyncio.get_running_loop().time()):
            return
        if len(self._serving) >= AT_A_TIME_MAX:  # who asks is done in a moment, and who is silent makes room
            self._serving.pop(next(iter(self._serving))).close()
        self._serving[peer] = writer
        try:
            async with asyncio.timeout(ASK_S):
                header, _ = await read_frame(reader, FrameLimits(FRAME_BYTES_MAX, 0), None, ASK_S)
            ports = _ports(unpack(header))
            came_at = time.time()
            hosts = await self._hosts_of(peer)
            host = hosts[0] if hosts else ""
            opened = await asyncio.gather(*(is_open(host, port) for port in ports)) if host else []
            answer = {
                "time": came_at,
                "took": time.time() - came_at,
                "version": self._version,
                "run_id": self._run_id,
                "host": host,
                "open": list(opened),
            }
            limits = WriteLimits(Throttle(None), False, ASK_S, whole_frame=True)
            await write_frame(writer, frame_parts(msgpack.packb(answer)), limits, lambda _: None)
        finally:
            if self._serving.get(peer) is writer:
                del self._serving[peer]


async def ask(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, ports: Sequence[int]) -> Answer:
    """Raises RemoteProtocolError, StreamEnded, TimeoutError and what streams raise."""
    limits = WriteLimits(Throttle(None), False, ASK_S, whole_frame=True)
    asked_at = time.time()
    question = msgpack.packb({"ports": list(ports[:PORTS_MAX])})
    await write_frame(writer, frame_parts(question), limits, lambda _: None)
    async with asyncio.timeout(ASK_S + DIAL_S):
        header, _ = await read_frame(reader, FrameLimits(FRAME_BYTES_MAX, 0), None, ASK_S)
    return _answer(unpack(header), asked_at, time.time())


async def is_open(host: str, port: int) -> bool:
    """Whether a TCP handshake succeeds there."""
    try:
        async with asyncio.timeout(DIAL_S):
            _, writer = await asyncio.open_connection(host, port)
    except (OSError, TimeoutError, ValueError, OverflowError):
        return False
    writer.close()
    return True


def _ports(question: Any) -> list[int]:
    try:
        listed = strict.table(question, ("ports",), "the question")["ports"]
        ports = strict.sequence(listed, PORTS_MAX, "ports")
        return [strict.integer(port, 1, 65_535, "a port") for port in ports]
    except strict.Malformed as error:
        raise RemoteProtocolError("malformed", str(error)) from None


def _answer(answer: Any, asked_at: float, came_at: float) -> Answer:
    try:
        table = strict.table(answer, ("time", "took", "version", "run_id", "host", "open"), "the answer")
        version, run_id, host = (strict.text(table[key], 256, key) for key in ("version", "run_id", "host"))
        opened = [strict.boolean(one, "open") for one in strict.sequence(table["open"], PORTS_MAX, "open")]
        clock, took = (strict.finite(table[key], key, 0.0) for key in ("time", "took"))
    except strict.Malformed as error:
        raise RemoteProtocolError("malformed", str(error)) from None
    way_s = max(0.0, came_at - asked_at - took)
    return Answer(clock - (asked_at + way_s / 2), way_s / 2, version, run_id, host, tuple(opened))
