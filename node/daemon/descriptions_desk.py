"""The desk of descriptions: says what this member publishes of its data, and asks the others what they say.

It reads data.toml every EVERY_S. A member that it meets is asked once for all that it knows
(net/descriptions.py), and then every EVERY_S one of them, in turn: so what one says reaches those who never
meet it.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import Callable, Sequence

from tapestry.dht.p2pd import SwarmError
from tapestry.node.daemon.desk import Loop
from tapestry.node.errors import UserError
from tapestry.node.home import Home
from tapestry.node.net.descriptions import (
    Descriptions,
    descriptions_protocol,
    fetch_descriptions,
    is_heard,
    serve,
)
from tapestry.node.net.throttle import Throttles
from tapestry.node.net.transfer import DonorFailed, OnBytes, OpenStream, TransferLimits
from tapestry.node.net.wire import RemoteProtocolError
from tapestry.node.protocol.canon import Crypto
from tapestry.node.protocol.strict import Malformed
from tapestry.node.spec.declared import Declared, published

LOOK_S = 5.0  # between two looks for a member that was never asked. Guess
EVERY_S = 300.0  # Guess: descriptions change by the day, and an answer has some kB
ANSWER_S = 30.0

_log = logging.getLogger("tapestry.node")

Refused = Callable[[str, str, str], None]  # peer, reason, text


class DescriptionsDesk:
    """Of one node."""

    def __init__(
        self, loop: Loop, home: Home, run_id: str, me: str, crypto: Crypto, throttles: Throttles
    ) -> None:
        """Raises OSError."""
        self.protocol = descriptions_protocol(run_id)
        self._loop, self._home, self._me = loop, home, me
        self._known = Descriptions(home.descriptions, run_id, crypto)
        self._limits = TransferLimits(ANSWER_S, throttles=throttles)
        self._asked_at: dict[str, float] = {}
        self._serving: set[str] = set()

    async def run(
        self,
        peers: Callable[[], Sequence[str]],  # linked ones
        opener: Callable[[str, str], OpenStream],
        counting: Callable[[str], OnBytes],
        refused: Refused,
    ) -> None:
        """Until cancelled. Raises OSError when the disk fails."""
        said_at = -EVERY_S
        while True:
            now = self._loop.now()
            if now - said_at >= EVERY_S:
                said_at = now
                await asyncio.to_thread(self.say)
            roll = self._loop.snapshot().roll
            peer = self.next_of([p for p in peers() if is_heard(roll, p) and p != self._me], now)
            if peer is not None:
                self._asked_at[peer] = now
                await self.ask(peer, opener(peer, self.protocol), counting(peer), refused)
            await asyncio.sleep(LOOK_S)

    def next_of(self, members: Sequence[str], now: float) -> str | None:
        """Whom to ask: a member that was never asked at once, else every EVERY_S the one that was asked
        longest ago."""
        asked = {p: self._asked_at.get(p, -math.inf) for p in sorted(members)}
        self._asked_at = {p: at for p, at in self._asked_at.items() if p in asked}
        if not asked or (min(asked.values()) > -math.inf and now - max(asked.values()) < EVERY_S):
            return None
        return min(asked, key=asked.__getitem__)

    def say(self) -> None:
        """What data.toml publishes now. A file with a mistake in it changes nothing. Blocking."""
        try:
            texts = published(Declared.load(self._home))
        except UserError as error:
            _log.warning(
                "descriptions=not_read reason=%r; mend data.toml: until then the others have what it "
                "said before",
                str(error),
            )
            return
        if self._known.say(self._me, texts, int(time.time())):
            _log.info("descriptions=said count=%d; the other members will hear of it", len(texts))

    async def ask(self, peer: str, open_stream: OpenStream, on_bytes: OnBytes, refused: Refused) -> None:
        """One member for all that it knows."""
        try:
            told = await fetch_descriptions(open_stream, self._limits, on_bytes)
            roll = self._loop.snapshot().roll
            news = await asyncio.to_thread(self._known.take, told, roll, int(time.time()))
        except (DonorFailed, SwarmError) as error:
            _log.debug("descriptions peer=%s reason=%r", peer[-6:], str(error))
        except RemoteProtocolError as error:
            refused(peer, error.reason, str(error))
        except Malformed as error:
            refused(peer, "signature", str(error))
        else:
            if news:
                _log.info("descriptions=heard members=%d of=%s", len(news), peer[-6:])

    async def serve(
        self, peer: str, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, on_bytes: OnBytes
    ) -> None:
        """The protocol's handler, for members: of each one stream at a time."""
        if peer in self._serving:
            raise RemoteProtocolError("streams", "more than one stream of descriptions at a time")
        self._serving.add(peer)
        try:
            async with asyncio.timeout(ANSWER_S):
                await serve(reader, writer, self._known.all, self._limits, on_bytes)
        finally:
            self._serving.discard(peer)
