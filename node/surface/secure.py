"""A listening socket whose connections begin with a TLS handshake, each with a deadline and within a number.

asyncio's own server takes as many handshakes as come and gives them one deadline each: idle connections would
use up the node's file descriptors before door.py sees one of them. Here the oldest unfinished handshake makes
room for the newest, and what is finished goes to the door.

Imports asyncio, socket and ssl only.
"""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import ssl

AGAIN_S = 1.0  # after an accept that failed for want of descriptors or memory; asyncio waits as long

_log = logging.getLogger("tapestry.http")


@dataclass(frozen=True, slots=True)
class Within:
    """What bounds handshakes."""

    handshakes_max: int
    handshake_s: float
    backlog: int  # connections that wait in the kernel


class SecureListener:
    """Made by `open`; `close` ends it. Of asyncio.Server it has what http.py needs."""

    @classmethod
    async def open(
        cls,
        door: Callable[[], asyncio.Protocol],
        host: str,
        port: int,
        context: Callable[[], ssl.SSLContext],  # for the next handshake
        within: Within,
    ) -> SecureListener:
        """Raises OSError."""
        loop = asyncio.get_running_loop()
        found = await loop.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        family, _, _, _, address = found[0]
        listener = socket.socket(family, socket.SOCK_STREAM)
        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if family == socket.AF_INET6:
                listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            listener.setblocking(False)
            listener.bind(address)
            listener.listen(within.backlog)
        except OSError:
            listener.close()
            raise
        return cls(door, listener, context, within)

    def __init__(
        self,
        door: Callable[[], asyncio.Protocol],
        listener: socket.socket,
        context: Callable[[], ssl.SSLContext],
        within: Within,
    ) -> None:
        self.sockets = (listener,)
        self._door = door
        self._context = context
        self._within = within
        self._handshakes: dict[asyncio.Task[None], None] = {}  # the oldest first
        self._accepting = asyncio.create_task(self._accept(listener))

    def close(self) -> None:
        for task in (self._accepting, *self._handshakes):
            task.cancel()

    async def _accept(self, listener: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        with listener:
            while True:
                try:
                    guest, _ = await loop.sock_accept(listener)
                except OSError as error:
                    _log.warning(
                        "accept=failed %s; tried again in %g s. If it goes on, raise the limit of open "
                        "files (ulimit -n)",
                        error.strerror,
                        AGAIN_S,
                    )
                    await asyncio.sleep(AGAIN_S)
                    continue
                task = asyncio.create_task(self._encrypt(guest))
                self._handshakes[task] = None
                task.add_done_callback(lambda done: self._handshakes.pop(done, None))
                if len(self._handshakes) > self._within.handshakes_max:
                    next(iter(self._handshakes)).cancel()

    async def _encrypt(self, guest: socket.socket) -> None:
        """A handshake; then the connection is the door's."""
        loop = asyncio.get_running_loop()
        try:
            await loop.connect_accepted_socket(
                self._door, guest, ssl=self._context(), ssl_handshake_timeout=self._within.handshake_s
            )
        except OSError as error:  # ssl's errors are some: no TLS, too late, or gone
            guest.close()
            _log.debug("handshake=failed %s", error)
        except asyncio.CancelledError:
            guest.close()
            raise
