"""What members say of their own data, signed, and passed on from member to member (never the data).

A *description* is what a member's data.toml publishes (spec/declared.py, `published`): a few texts under its
key, with the time at which they were written. The newest of a member counts; one without texts takes back
what was said. It names the run, so that it is said of no other.

Members ask each other for all that they know, on a stream of its own: who does not know the protocol is left
in peace. Nothing of an answer is believed but what its member signed, and only members are listened to, and
newcomers of an open run who have contributed.

Imports: transfer.py's frames; no hivemind.
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tapestry.node.disk.files import atomic_write, seal, unseal
from tapestry.node.net.transfer import REQUEST_BYTES_MAX, OnBytes, OpenStream, Stream, TransferLimits, opened
from tapestry.node.net.wire import RemoteProtocolError
from tapestry.node.protocol.canon import Crypto, canonical, peer_field
from tapestry.node.protocol.members import UNIX_MAX, Roll
from tapestry.node.protocol.strict import Malformed, integer, sequence, text

TEXTS_MAX = 64  # of a member: one for each source. Guess
TEXT_CHARS_MAX = 1_500  # a description of 1,000 characters with owner and licence: spec/declared.py
SIGNED_BYTES_MAX = 16_384  # of a member. Guess
BYTES_MAX = 1 << 20  # of an answer: what is older than the newest so many bytes is left out
AHEAD_S = 86_400  # a clock may be wrong by so much. Guess
EMPTY = b"[]"

_log = logging.getLogger("tapestry.node")


@dataclass(frozen=True, slots=True)
class Description:
    """What one member says."""

    peer: str
    at: int  # Unix time
    texts: tuple[str, ...]
    signature: str = ""

    def message(self, run_id: str) -> bytes:
        """What its member signs."""
        return b"tapestry description v1\0" + canonical([run_id, self.peer, self.at, list(self.texts)])


def descriptions_protocol(run_id: str) -> str:
    return f"/tapestry/{run_id}/descriptions/1"


def description_from(raw: Any) -> Description:
    """Strict; its signature is not checked. Raises Malformed."""
    peer, at, texts, signature = sequence(raw, 4, "a description", 4)
    said = tuple([text(one, TEXT_CHARS_MAX, "a text", 1) for one in sequence(texts, TEXTS_MAX, "texts")])
    found = Description(
        peer_field(peer, "peer"), integer(at, 0, UNIX_MAX, "at"), said, text(signature, 256, "signature", 1)
    )
    if len(canonical(list(said))) > SIGNED_BYTES_MAX:
        raise Malformed(f"a member may say {SIGNED_BYTES_MAX} bytes")
    return found


def unpack(data: bytes | bytearray) -> list[Description]:
    """Of an answer. Raises Malformed."""
    try:
        raw = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise Malformed("descriptions must be JSON") from error
    if not isinstance(raw, list):
        raise Malformed("descriptions must be a list")
    return [description_from(one) for one in raw]


def pack(descriptions: Iterable[Description]) -> bytes:
    """The newest first, as many as an answer may hold."""
    lines, left = [], BYTES_MAX - 2
    for one in sorted(descriptions, key=lambda d: (-d.at, d.peer)):
        line = canonical([one.peer, one.at, list(one.texts), one.signature])
        left -= len(line) + 1
        if left < 0:
            break
        lines.append(line)
    return b"[" + b",".join(lines) + b"]"


def is_heard(roll: Roll, peer: str) -> bool:
    """Whose words are kept: members', and in an open run those of newcomers who have contributed."""
    return peer in roll.members or peer in roll.counted


def _is_ahead(one: Description, now_s: int) -> bool:
    """Whether it was said under a clock that is not ours: it is not taken, and what is said later counts."""
    return one.at > now_s + AHEAD_S


class Descriptions:
    """Those that a home knows of one run. One thread at a time."""

    def __init__(self, path: Path, run_id: str, crypto: Crypto) -> None:
        """What does not hold in the file is left out. Raises OSError."""
        self._path, self._run_id, self._crypto = path, run_id, crypto
        self._by_peer: dict[str, Description] = {}
        self._own = ""  # who speaks here, member or not yet
        try:
            found = unpack(canonical(unseal(path.read_bytes().removesuffix(b"\n"))))
        except FileNotFoundError:
            found = []
        except ValueError as error:
            _log.warning(
                "descriptions=dropped path=%s reason=%r; the others give them again. Check the disk",
                path,
                str(error),
            )
            found = []
        for one in found:
            if self._is_signed(one):
                self._by_peer[one.peer] = one

    @property
    def all(self) -> tuple[Description, ...]:
        """From any thread."""
        return tuple(self._by_peer.values())

    def say(self, peer: str, texts: tuple[str, ...], now_s: int) -> bool:
        """What this node's own member says from now on; whether that is news. Raises OSError."""
        self._own = peer
        known = self._by_peer.get(peer) or Description(peer, -1, ())
        if known.texts == texts and not _is_ahead(known, now_s):
            return False
        texts = texts[:TEXTS_MAX]
        mine = Description(peer, now_s if _is_ahead(known, now_s) else max(now_s, known.at + 1), texts)
        self._by_peer[peer] = replace(mine, signature=self._crypto.sign(mine.message(self._run_id)))
        self._write()
        return True

    def take(self, told: Iterable[Description], roll: Roll, now_s: int) -> list[str]:
        """Peers of whom there is news; raises Malformed if a member is made to say what it did not sign, and
        OSError. Who is no member any more is forgotten."""
        news = []
        for one in told:
            known = self._by_peer.get(one.peer)
            if not is_heard(roll, one.peer) or _is_ahead(one, now_s):
                continue
            if known is not None and known.at >= one.at and not _is_ahead(known, now_s):
                continue
            if not self._is_signed(one):
                raise Malformed(f"a description that {one.peer[-6:]} did not sign")
            self._by_peer[one.peer] = one
            news.append(one.peer)
        gone = [peer for peer in self._by_peer if not is_heard(roll, peer) and peer != self._own]
        for peer in gone:
            del self._by_peer[peer]
        if news or gone:
            self._write()
        return news

    def _is_signed(self, one: Description) -> bool:
        return self._crypto.verify(one.peer, one.signature, one.message(self._run_id))

    def _write(self) -> None:
        atomic_write(self._path, seal(json.loads(pack(self._by_peer.values()))) + b"\n")


# --- the stream ---------------------------------------------------------------------------------------


async def serve(
    reader: asyncio.StreamReader,
    writer: asyncio.StreamWriter,
    known: Iterable[Description],
    limits: TransferLimits,
    on_bytes: OnBytes,
) -> None:
    """One answer. Raises as Donor.serve."""
    stream = Stream(reader, writer, limits, on_bytes)
    request, _ = await stream.receive(REQUEST_BYTES_MAX, 0)
    if request != {"ask": "descriptions"}:
        raise RemoteProtocolError("malformed", "no request for descriptions")
    await stream.send({"is": "descriptions"}, pack(known))


async def fetch_descriptions(
    open_stream: OpenStream, limits: TransferLimits, on_bytes: OnBytes
) -> list[Description]:
    """All that a member knows. Raises as transfer.py says."""
    async with opened(open_stream, limits, on_bytes) as stream:
        await stream.send({"ask": "descriptions"})
        _, data = await stream.answer("descriptions", {}, REQUEST_BYTES_MAX, BYTES_MAX)
    try:
        return unpack(data)
    except Malformed as error:
        raise RemoteProtocolError("malformed", str(error)) from error
