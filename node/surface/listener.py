"""The endpoint's listening sockets: connections are taken at a bounded rate, and may begin with a handshake.

asyncio's own server takes whatever comes, as fast as it comes: two hundred clients that came again as often
as they were turned away took a third of a core from the loop that makes the rounds, whatever was done with
them afterwards. Here so many a second are taken; the others wait in the kernel, which costs the loop nothing.
A TLS handshake has a deadline and a place: the oldest unfinished one makes room for the newest, for idle
connections would use up the node's file descriptors before door.py sees one of them.

Of the project it imports turns.py only.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import socket
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from tapestry.node.errors import ExitCode, UserError
from tapestry.node.surface.turns import Turns

if TYPE_CHECKING:
    import ssl

AGAIN_S = 1.0  # after an accept that failed for want of descriptors or memory; asyncio waits as long
# What accept(2) says of the one connection that it would have taken, and not of the next.
OF_ONE_GUEST = frozenset(
    {
        *(errno.ECONNABORTED, errno.EHOSTDOWN, errno.EHOSTUNREACH, errno.ENETDOWN, errno.ENETUNREACH),
        *(errno.ENONET, errno.ENOPROTOOPT, errno.EOPNOTSUPP, errno.EPERM, errno.EPROTO),
    }
)

_log = logging.getLogger("tapestry.http")


@dataclass(frozen=True, slots=True)
class ListenerLimits:
    """What bounds connections before the door sees them."""

    connections_per_s: float
    connections_burst: int
    handshakes_max: int
    handshake_s: float
    backlog: int  # connections that wait in the kernel


class Listener:
    """Made by `open`; `close` ends it."""

    @classmethod
    async def open(
        cls,
        door: Callable[[], asyncio.Protocol],
        host: str,
        port: int,
        limits: ListenerLimits,
        context: Callable[[], ssl.SSLContext] | None = None,  # for the next handshake; None: not encrypted
    ) -> Listener:
        """On the addresses that `host` stands for, as many of them as this machine has. Raises OSError."""
        loop = asyncio.get_running_loop()
        found = await loop.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        return cls(door, _bound(found, port, limits.backlog), limits, context)

    def __init__(
        self,
        door: Callable[[], asyncio.Protocol],
        sockets: tuple[socket.socket, ...],
        limits: ListenerLimits,
        context: Callable[[], ssl.SSLContext] | None,
    ) -> None:
        self.sockets = sockets
        self._door = door
        self._context = context
        self._limits = limits
        self._turns = Turns(limits.connections_per_s, limits.connections_burst)
        self._beginning: dict[asyncio.Task[None], None] = {}  # the oldest first
        self._accepting = [self._accepting_at(one) for one in sockets]

    def close(self) -> None:
        for task in (*self._accepting, *self._beginning):
            task.cancel()

    def _accepting_at(self, listener: socket.socket) -> asyncio.Task[None]:
        task = asyncio.create_task(self._accept(listener))
        task.add_done_callback(lambda _: listener.close())  # also of a task that was ended before it began
        return task

    async def _accept(self, listener: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        while True:
            if (wait_s := self._turns.wait_s(loop.time())) > 0:
                await asyncio.sleep(wait_s)
            try:
                guest, _ = await loop.sock_accept(listener)
            except OSError as error:
                if error.errno in OF_ONE_GUEST:
                    self._turns.take(loop.time())
                    continue
                _log.warning(
                    "accept=failed %s; tried again in %g s. If it goes on, raise the limit of open "
                    "files (ulimit -n)",
                    error.strerror,
                    AGAIN_S,
                )
                await asyncio.sleep(AGAIN_S)
                continue
            except Exception:  # our bug: nobody awaits this task, and the endpoint must not end in silence
                _log.exception("accept=failed; tried again in %g s. Report this bug", AGAIN_S)
                await asyncio.sleep(AGAIN_S)
                continue
            self._turns.take(loop.time())
            task = asyncio.create_task(self._begin(guest))
            self._beginning[task] = None
            task.add_done_callback(partial(self._begun, guest))
            if len(self._beginning) > self._limits.handshakes_max:
                next(iter(self._beginning)).cancel()

    async def _begin(self, guest: socket.socket) -> None:
        """A handshake, if there is to be one; then the connection is the door's."""
        try:
            context = None if self._context is None else self._context()
            handshake_s = None if context is None else self._limits.handshake_s
            await asyncio.get_running_loop().connect_accepted_socket(
                self._door, guest, ssl=context, ssl_handshake_timeout=handshake_s
            )
        except OSError as error:  # ssl's errors are some: no TLS, too late, or gone
            guest.close()
            _log.debug("handshake=failed %s", error)
        except Exception:
            guest.close()
            _log.exception("handshake=failed")

    def _begun(self, guest: socket.socket, task: asyncio.Task[None]) -> None:
        del self._beginning[task]
        if task.cancelled():  # perhaps before it began
            guest.close()


def require_port(host: str, port: int) -> None:
    """Raises UserError if nobody can listen there now."""
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        for one in _bound(found, port, None):
            one.close()
    except OSError as error:
        raise cannot_listen(host, port, error) from error


def cannot_listen(host: str, port: int, error: OSError) -> UserError:
    """What the operator is told."""
    reasons = {
        errno.EADDRINUSE: f"port {port} on {host} is in use",
        errno.EACCES: f"port {port} on {host} needs more rights than this user has",
        errno.EADDRNOTAVAIL: f"{host} is not an address of this machine",
    }
    reason = reasons.get(error.errno or 0, f"cannot listen on {host} port {port}: {error.strerror or error}")
    return UserError(
        f"--http: {reason}",
        exit_code=ExitCode.USAGE,
        hint="--http HOST:PORT; port 0 takes a free one",
    )


def _bound(
    found: Sequence[tuple[Any, ...]],  # of getaddrinfo
    port: int,
    backlog: int | None,  # None: nobody is listened to yet
) -> tuple[socket.socket, ...]:
    """On as many of the addresses as this machine has; all closed where that fails. Raises OSError."""
    sockets: list[socket.socket] = []
    lacking: OSError | None = None
    try:
        for family, _, _, _, address in dict.fromkeys(found):
            bound = sockets[0].getsockname()[1] if sockets else port  # where port 0 took a free one
            try:
                sockets.append(_socket_at(family, (address[0], bound, *address[2:]), backlog))
            except OSError as error:
                if error.errno not in (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT):
                    raise
                lacking = lacking or error
        if not sockets:
            raise lacking or OSError(errno.EADDRNOTAVAIL, "no address")
    except OSError:
        for one in sockets:
            one.close()
        raise
    return tuple(sockets)


def _socket_at(family: int, address: tuple[object, ...], backlog: int | None) -> socket.socket:
    """Raises OSError."""
    listener = socket.socket(family, socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        listener.setblocking(False)
        listener.bind(address)
        if backlog is not None:
            listener.listen(backlog)
    except OSError:
        listener.close()
        raise
    return listener
