"""A trainer that the node did not start: a process in which a person's own training loop runs.

It gets what a worker inherits (a socket and the shared buffers), and from then on speaks as one: messages.py,
shared.py. It comes in one of two ways:

    Line   the script has started this node, and handed it an end of a socketpair; the node ends with it
    Door   the node runs by itself and listens on HOME/trainer.sock: one script at a time, any number in turn

The buffers' descriptors go over the socket with the greeting (SCM_RIGHTS, unix(7)). Only a process of this
node's own user is let in: the socket has mode 0600, and the kernel says whose process connects (SO_PEERCRED).

A guest is never killed, only hung up on: its process is a person's. It may also be silent for as long as it
likes, while a notebook's cell is being written; that it is gone, the kernel says.

What the script does with it is in node/library. Must not import torch.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import struct
from collections.abc import Iterator
from pathlib import Path

from tapestry.node.trainer.messages import HEADER, Command, Report, body_length, pack, unpack_report
from tapestry.node.trainer.shared import BUFFERS

GREETING = b"tapestry trainer 1\n"  # with it come the descriptors of BUFFERS, in this order
CREDENTIALS = struct.Struct("3i")  # unix(7), struct ucred: pid, uid, gid


class Guest:
    """One script that is here; process.Hired."""

    guest = True

    @classmethod
    async def greet(cls, connection: socket.socket, fds: dict[str, int]) -> Guest:
        """Raises OSError, if it is gone already."""
        try:
            socket.send_fds(connection, [GREETING], [fds[name] for name in BUFFERS])
            reader, writer = await asyncio.open_connection(sock=connection)
        except BaseException:
            connection.close()
            raise
        return cls(_peer(connection)[0], reader, writer)

    def __init__(self, pid: int, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.attached = False
        self.pid = pid
        self._reader = reader
        self._writer = writer

    async def receive(self) -> Report:
        """Raises MessageError; IncompleteReadError or ConnectionError when the script has hung up."""
        length = body_length(await self._reader.readexactly(HEADER.size))
        return unpack_report(await self._reader.readexactly(length))

    def send(self, command: Command) -> None:
        """It may lie there until the script looks."""
        if not self._writer.is_closing():
            self._writer.write(pack(command))

    async def collect_output(self) -> tuple[str, ...]:
        """What it prints is not ours."""
        return ()

    async def end(self) -> int:
        """It has hung up: that is all the end there is."""
        return 0

    def kill(self) -> None:
        """Hang up."""
        self._writer.close()

    async def close(self) -> None:
        """Hang up, and let the socket go."""
        self._writer.close()
        with contextlib.suppress(ConnectionError):
            await self._writer.wait_closed()


class Line:
    """The one script that has started this node; process.Hire."""

    again = False

    def __init__(self, fd: int) -> None:
        self._connection: socket.socket | None = socket.socket(fileno=fd)

    async def __call__(self, fds: dict[str, int]) -> Guest:
        """Once; later it waits for what does not come, until it is cancelled."""
        connection, self._connection = self._connection, None
        if connection is None:
            await asyncio.Event().wait()
        assert connection is not None
        connection.setblocking(False)
        return await Guest.greet(connection, fds)

    def close(self) -> None:
        """If nobody took it up."""
        if self._connection is not None:
            self._connection.close()


class Door:
    """HOME/trainer.sock; process.Hire. Raises OSError."""

    again = True

    def __init__(self, path: Path) -> None:
        self._path = path
        path.unlink(missing_ok=True)  # of a node that was killed; the home's lock is ours
        self._socket = socket.socket(socket.AF_UNIX)
        try:
            with short_path(path) as short:
                self._socket.bind(short)
            path.chmod(0o600)
            self._socket.listen(1)
            self._socket.setblocking(False)
        except OSError:
            self._socket.close()
            raise

    async def __call__(self, fds: dict[str, int]) -> Guest:
        """The next script that knocks. Raises OSError, if it does not wait for the answer."""
        while True:
            connection, _ = await asyncio.get_running_loop().sock_accept(self._socket)
            if _peer(connection)[1] in (os.geteuid(), 0):
                return await Guest.greet(connection, fds)
            connection.close()

    def close(self) -> None:
        """Nobody else comes in."""
        self._socket.close()
        self._path.unlink(missing_ok=True)


def knock(path: Path) -> socket.socket:
    """The script's end of a Door. Raises OSError."""
    connection = socket.socket(socket.AF_UNIX)
    try:
        with short_path(path) as short:
            connection.connect(short)
    except OSError:
        connection.close()
        raise
    return connection


@contextlib.contextmanager
def short_path(path: Path) -> Iterator[str]:
    """The same file by a name that fits a socket's address, which has 107 bytes: through its folder's fd."""
    folder = os.open(path.parent, os.O_PATH | os.O_DIRECTORY)
    try:
        yield f"/proc/self/fd/{folder}/{path.name}"
    finally:
        os.close(folder)


def _peer(connection: socket.socket) -> tuple[int, int]:
    """Pid and uid of the process at the other end."""
    credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, CREDENTIALS.size)
    pid, uid, _ = CREDENTIALS.unpack(credentials)
    return pid, uid
