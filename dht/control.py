"""p2pd's control socket: what is asked of it, and what its refusals mean.

Each question is a connection of its own, which an opened stream then goes on to use. hivemind's client is not
used: it leaves a connection open after each failed request, has no deadlines, and reads through asyncio's
default buffer.

Peers are named by peer id in base58, addresses are multiaddrs in text. Knows hivemind's bindings of p2pd's
protocol.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
from collections.abc import Iterable, Sequence

import base58
import multiaddr
from hivemind.p2p.p2p_daemon_bindings.utils import read_pbmsg_safe, write_pbmsg
from hivemind.proto import p2pd_pb2
from hivemind.utils.multiaddr import Multiaddr as HivemindMultiaddr
from multiaddr.exceptions import Error as MultiaddrError

from tapestry.dht.addresses import short
from tapestry.dht.p2pd import SwarmError
from tapestry.dht.streams import STREAM_BUFFER_BYTES

# p2pd answers its own control socket in milliseconds; this is for a machine that swaps.
CONTROL_TIMEOUT_S = 10.0


class Unreachable(SwarmError):
    """A peer cannot be reached. `reason` is one word: see _DIAL_FAILURES; the text names the address."""

    def __init__(self, reason: str, text: str) -> None:
        super().__init__(text)
        self.reason = reason


class Control:
    """Of one p2pd. Every method raises SwarmError when p2pd does not answer."""

    def __init__(self, path: str) -> None:
        self._path = path  # of the socket

    async def addresses(self) -> list[str]:
        """Where p2pd listens, or what it announces, without its peer id."""
        response = await self._query(_request("IDENTIFY"))
        return _texts_of(response.identify.addrs)

    async def connections(self) -> dict[str, list[str]]:
        """The peers that p2pd has a connection with -> the remote ends of those connections."""
        response = await self._query(_request("LIST_PEERS"))
        found: dict[str, list[str]] = {}
        for peer in response.peers:
            found.setdefault(base58.b58encode(peer.id).decode(), []).extend(_texts_of(peer.addrs))
        return found

    async def disconnect(self, peer_id: str) -> None:
        """End the connections with a peer, and all their streams."""
        request = _request("DISCONNECT")
        request.disconnect.CopyFrom(p2pd_pb2.DisconnectRequest(peer=base58.b58decode(peer_id)))
        await self._query(request)

    async def hand_over(self, protocol: str, streams_path: str) -> None:
        """From now on each stream that a peer opens to `protocol` is a connection to that socket."""
        # hivemind's Multiaddr: py-multiaddr 0.2 drops the leading '/' of a path, and p2pd finds no socket.
        listener = HivemindMultiaddr(f"/unix{streams_path}").to_bytes()
        request = _request("STREAM_HANDLER")
        request.streamHandler.CopyFrom(
            p2pd_pb2.StreamHandlerRequest(addr=listener, proto=[protocol], balanced=False)
        )
        await self._query(request)

    async def connect(self, peer_id: str, addresses: Sequence[str], timeout_s: float) -> None:
        """Connect to a peer at any of `addresses`; nothing to do when there is a connection. Raises
        Unreachable."""
        where = ", ".join(addresses)
        request = _request("CONNECT")
        request.connect.CopyFrom(
            p2pd_pb2.ConnectRequest(
                peer=base58.b58decode(peer_id),
                addrs=_transports_of(peer_id, addresses),
                timeout=math.ceil(timeout_s),
            )
        )
        if not request.connect.addrs:
            raise Unreachable("unroutable", f"peer {short(peer_id)} gives no address that can be dialled")
        try:
            await self._ask(request, timeout_s)
        except TimeoutError:
            raise Unreachable("timeout", f"{where}: no answer in {timeout_s:g} s") from None
        except _Refused as error:
            raise _unreachable(where, str(error), timeout_s) from None

    async def open_stream(
        self, peer_id: str, protocol: str, timeout_s: float
    ) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """Open a stream to a peer, connecting first if p2pd knows where it is. Raises Unreachable."""
        request = _request("STREAM_OPEN")
        request.streamOpen.CopyFrom(
            p2pd_pb2.StreamOpenRequest(
                peer=base58.b58decode(peer_id), proto=[protocol], timeout=math.ceil(timeout_s)
            )
        )
        try:
            async with asyncio.timeout(timeout_s):
                _, reader, writer = await self._exchange(request)
        except TimeoutError:
            raise Unreachable("timeout", f"peer {short(peer_id)}: no answer in {timeout_s:g} s") from None
        except _Refused as error:
            raise _unreachable(f"peer {short(peer_id)}", str(error), timeout_s) from None
        return reader, writer

    async def _query(self, request: p2pd_pb2.Request) -> p2pd_pb2.Response:
        """A question about p2pd itself, which it can answer at once. Raises SwarmError."""
        try:
            return await self._ask(request, CONTROL_TIMEOUT_S)
        except TimeoutError:
            raise SwarmError(f"p2pd does not answer in {CONTROL_TIMEOUT_S:g} s") from None
        except _Refused as error:
            raise SwarmError(f"p2pd refused: {error}") from None

    async def _ask(self, request: p2pd_pb2.Request, timeout_s: float) -> p2pd_pb2.Response:
        """One question to p2pd. Raises TimeoutError, SwarmError, _Refused."""
        async with asyncio.timeout(timeout_s):
            response, _, writer = await self._exchange(request)
        writer.close()
        return response

    async def _exchange(
        self, request: p2pd_pb2.Request
    ) -> tuple[p2pd_pb2.Response, asyncio.StreamReader, asyncio.StreamWriter]:
        """Send a request on a new connection. Raises SwarmError, _Refused."""
        with contextlib.ExitStack() as on_failure:
            try:
                reader, writer = await asyncio.open_unix_connection(self._path, limit=STREAM_BUFFER_BYTES)
                on_failure.callback(writer.close)
                await write_pbmsg(writer, request)
                response = p2pd_pb2.Response()
                await read_pbmsg_safe(reader, response)
            except (OSError, asyncio.IncompleteReadError) as error:
                raise SwarmError("p2pd does not answer: it has ended or is ending") from error
            if response.type == p2pd_pb2.Response.ERROR:
                raise _Refused(response.error.msg)
            on_failure.pop_all()
        return response, reader, writer


async def opener_of(reader: asyncio.StreamReader) -> tuple[str, str]:
    """Of a stream that p2pd hands over: who opened it, as libp2p's handshake proved, and to which protocol.

    Raises TimeoutError, OSError, IncompleteReadError.
    """
    info = p2pd_pb2.StreamInfo()
    async with asyncio.timeout(CONTROL_TIMEOUT_S):
        await read_pbmsg_safe(reader, info)
    return base58.b58encode(info.peer).decode(), info.proto


class _Refused(Exception):
    """p2pd answered a request with an error; the message is its own."""


def _request(kind: str) -> p2pd_pb2.Request:
    return p2pd_pb2.Request(type=p2pd_pb2.Request.Type.Value(kind))


def _texts_of(packed_addresses: Iterable[bytes]) -> list[str]:
    """The addresses in text; one that py-multiaddr does not know is left out."""
    texts: list[str] = []
    for packed in packed_addresses:
        with contextlib.suppress(MultiaddrError):
            texts.append(str(multiaddr.Multiaddr(packed)))
    return texts


def _transports_of(peer_id: str, addresses: Iterable[str]) -> list[bytes]:
    """The addresses as p2pd wants them: packed, without the peer id at the end. Bad ones are left out."""
    packed: list[bytes] = []
    for address in addresses:
        with contextlib.suppress(MultiaddrError):
            packed.append(multiaddr.Multiaddr(address.removesuffix(f"/p2p/{peer_id}")).to_bytes())
    return packed


# What p2pd says, the word for it, and what to tell the user; the most telling first.
_DIAL_FAILURES = (
    ("dial to self", "self", "that is this node itself"),
    ("peer id mismatch", "wrong_peer", "another peer answers there"),
    ("protocols not supported", "unsupported", "the peer does not serve this protocol"),
    ("failed to negotiate security protocol", "not_libp2p", "what answers there is no libp2p peer"),
    ("connection refused", "refused", "refused, nothing listens there"),
    ("network is unreachable", "unroutable", "there is no route to it"),
    ("no route to host", "unroutable", "there is no route to it"),
    ("no addresses", "unroutable", "no address of it is known"),
    ("routing: not found", "unroutable", "no address of it is known"),
    (
        "no good addresses",
        "unroutable",
        "its name does not resolve, or its address cannot be dialled from here",
    ),
    ("dial backoff", "backoff", "failed a moment ago, p2pd waits before it tries again"),
    ("deadline exceeded", "timeout", "no answer"),
    ("i/o timeout", "timeout", "no answer"),
)


def _unreachable(where: str, message: str, timeout_s: float) -> Unreachable:
    known = (failure[1:] for failure in _DIAL_FAILURES if failure[0] in message)
    reason, text = next(known, ("failed", " ".join(message.split())))
    if reason == "wrong_peer":
        text += f" ({message.rsplit('remote key matches ', 1)[-1].split()[0]})"
    if reason == "timeout":
        text += f" in {timeout_s:g} s"
    return Unreachable(reason, f"{where}: {text}")
