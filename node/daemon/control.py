"""HOME/control.sock: how commands of this user reach the running node. One JSON line each way.

The socket has mode 0600 in a folder of mode 0700, and the kernel says whose process connects (SO_PEERCRED,
unix(7)). So what can change the run's members is never reachable over HTTP, from a web page or by others.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import socket
import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from tapestry.node.protocol.strict import Malformed
from tapestry.node.trainer.guest import short_path

LINE_BYTES_MAX = 1 << 20
ANSWER_S = 5.0  # for the command to say what it wants
CREDENTIALS = struct.Struct("3i")  # pid, uid, gid: unix(7)

_log = logging.getLogger("tapestry.node")


class Control:
    """Use: `await Control.open(...)`, then `close`."""

    def __init__(self, path: Path, server: asyncio.Server) -> None:
        self._path = path
        self._server = server

    @classmethod
    async def open(cls, path: Path, do: Callable[[Mapping[str, Any]], dict[str, Any]]) -> Control:
        """Listen. `do` answers a command, and raises Malformed for what is none. Raises OSError."""
        listener = _bound(path)
        try:

            async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
                await _serve(reader, writer, do)

            return cls(path, await asyncio.start_unix_server(serve, sock=listener, limit=LINE_BYTES_MAX))
        except OSError:
            listener.close()
            raise

    def close(self) -> None:
        self._server.close()
        self._path.unlink(missing_ok=True)


def _bound(path: Path) -> socket.socket:
    path.unlink(missing_ok=True)  # of a node that was killed; the home's lock is ours
    listener = socket.socket(socket.AF_UNIX)
    try:
        with short_path(path) as short:
            listener.bind(short)
        path.chmod(0o600)
    except OSError:
        listener.close()
        raise
    return listener


async def _serve(
    reader: asyncio.StreamReader,
    writer: asyncio.StreamWriter,
    do: Callable[[Mapping[str, Any]], dict[str, Any]],
) -> None:
    try:
        if _user(writer) not in (os.geteuid(), 0):
            return
        async with asyncio.timeout(ANSWER_S):
            line = await reader.readline()
        if line:
            writer.write(json.dumps(_answer(line, do)).encode() + b"\n")
            await writer.drain()
    except (TimeoutError, ConnectionError, ValueError) as error:
        _log.debug("control=failed reason=%r", error)
    finally:
        writer.close()


def _answer(line: bytes, do: Callable[[Mapping[str, Any]], dict[str, Any]]) -> dict[str, Any]:
    try:
        request = json.loads(line)
        if not isinstance(request, dict):
            raise Malformed("a command must be a table")
        return do(request)
    except (ValueError, RecursionError) as error:  # Malformed is a ValueError
        return {"fault": str(error)}


def _user(writer: asyncio.StreamWriter) -> int:
    connection = writer.get_extra_info("socket")
    data = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, CREDENTIALS.size)
    uid: int = CREDENTIALS.unpack(data)[1]
    return uid
