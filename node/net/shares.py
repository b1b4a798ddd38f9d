"""What one peer may take of this node: of the loop's time, of what is read, and of what is answered.

All peers' messages are handled on one loop and come through one download cap. So each peer has a share of
both, and who sends more than that is read later, while the others are not: a flood costs its sender. What is
owed stays with the peer, whichever of its streams it came on; so each wait comes before a frame is read.

`Share` is one peer's, `Shares` are those of all. Knows no streams: links.py reads and writes them.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from tapestry.node.net.bucket import Bucket
from tapestry.node.net.throttle import SLEEP_MIN_S, Throttles

CONTROL_SHARE = 0.25  # Guess: of the loop's time, for one peer's messages and our answers to them
CONTROL_SHARE_ALL = 0.5  # Guess: for those of all; six that flooded us had one and a half loops
BULK_SHARE = 0.5  # Guess: checking a shard runs at GB/s, so this is far above any network
BURST_S = 0.25  # Guess: of the loop's time; a round's messages cost milliseconds
STREAM_COST_S = 0.002  # Guess: what a stream costs us and p2pd to open
# Of one peer's messages; if that is less, its part of a quarter of the download cap, which all who send just
# now share. Guess
CONTROL_BYTES_PER_S = 1e6
# Whoever else sends, of a member's: a roster or a page of records is read within stall_s, and its heartbeats
# after it. As state transfers take of a donor; half of that quarter at the lowest cap. Guess
MEMBER_BYTES_PER_S = 16 * 1024
SHARED_S = 0.25  # Guess: so often who waits looks how many share
ANSWERS_BYTES_PER_S = 4e6  # records, to all who ask; a quarter of the upload cap if that is less. Guess
JUNK_BYTES_PER_S = 64 * 1024  # who sends payloads that are refused is read at this rate for DEBT_S_MAX. Guess
DEBT_S_MAX = 60.0


class Pace:
    """How long a peer may occupy the loop: a burst, and a share of the time that passes."""

    def __init__(self, share: Callable[[], float], clock: Callable[[], float]) -> None:
        self._share = share
        self._clock = clock
        self._spent_s = 0.0
        self._at = clock()

    @contextlib.contextmanager
    def spending(self) -> Iterator[None]:
        """What is done inside counts."""
        began_at = self._clock()
        try:
            yield
        finally:
            self.spend(self._clock() - began_at)

    def spend(self, seconds: float) -> None:
        self._spent_s += seconds

    def pause_s(self) -> float:
        """How long to wait before the next message is read."""
        now = self._clock()
        share = self._share()
        self._spent_s = max(0.0, self._spent_s - share * (now - self._at))
        self._at = now
        return max(0.0, self._spent_s - BURST_S) / share

    async def wait(self) -> None:
        """At least one turn for everybody else: a full buffer is thousands of messages."""
        await asyncio.sleep(self.pause_s())


@dataclass(slots=True)
class Share:
    """One peer's. Bytes are spent as they are read."""

    peer: str
    control_pace: Pace
    bulk_pace: Pace
    control_bytes_in: Bucket  # what it may send us of messages
    junk: Bucket  # what it sent that was refused
    answers_at: float = 0.0  # when its next question is answered


class Shares:
    """Of all peers of one node. On its loop."""

    def __init__(
        self,
        throttles: Throttles,
        is_member: Callable[[str], bool],  # it comes before those that anybody can be
        count_there: Callable[[], int],  # how many peers there are just now
        control_bytes_max: int,  # of one message
    ) -> None:
        self._throttles = throttles
        self._is_member = is_member
        self._count_there = count_there
        self._control_bytes_max = control_bytes_max
        self._shares: dict[str, Share] = {}

    def begin(self, peer: str) -> Share:
        """This peer's, until `end`."""
        clock = asyncio.get_running_loop().time
        self._shares[peer] = Share(
            peer,
            control_pace=Pace(self.control_share, clock),
            bulk_pace=Pace(lambda: BULK_SHARE, clock),
            control_bytes_in=Bucket(
                self._control_bytes_per_s(1), clock(), DEBT_S_MAX, self._control_bytes_max
            ),
            junk=Bucket(JUNK_BYTES_PER_S, clock(), DEBT_S_MAX),
        )
        return self._shares[peer]

    def end(self, peer: str) -> None:
        del self._shares[peer]

    def control_share(self) -> float:
        """Of the loop's time, of each peer that is there: all together have CONTROL_SHARE_ALL."""
        return min(CONTROL_SHARE, CONTROL_SHARE_ALL / max(1, self._count_there()))

    async def control_is_paid(self, share: Share) -> None:
        """Wait till the peer's messages are paid off, at a rate that those of others lower.

        Others count while they owe anything at all. So a heartbeat counts for its milliseconds, which leaves
        on average what max-min fairness does: the share of who wants more is what the others leave. If only
        those counted who are made to wait, who sends just below its rate would count for nothing, and four
        such peers would take the whole cap.
        """
        bucket, clock = share.control_bytes_in, asyncio.get_running_loop().time
        while True:
            now = clock()
            senders = sum(other.control_bytes_in.is_owed(now) for other in self._shares.values())
            rate = self._control_bytes_per_s(max(1, senders))
            if rate < MEMBER_BYTES_PER_S and self._is_member(share.peer):
                rate = min(MEMBER_BYTES_PER_S, self._control_bytes_per_s(1))
            bucket.set_rate(rate, now)
            wait_s = bucket.wait_s(0, now)
            if not wait_s:
                return
            await asyncio.sleep(max(min(wait_s, SHARED_S), SLEEP_MIN_S))

    async def junk_is_paid(self, share: Share) -> None:
        """Wait till what the peer sent that was refused is paid off."""
        if wait_s := share.junk.wait_s(0, asyncio.get_running_loop().time()):
            await asyncio.sleep(max(wait_s, SLEEP_MIN_S))

    def answered(self, share: Share, byte_count: int) -> None:
        """So much goes out now to who asked: its part of what answers may take, which those who asked of
        late share, says when it is answered again."""
        now, cap = asyncio.get_running_loop().time(), self._throttles.upload.bytes_per_second
        asking = sum(now < one.answers_at for one in self._shares.values())
        rate = ANSWERS_BYTES_PER_S if cap is None else min(ANSWERS_BYTES_PER_S, cap / 4)
        share.answers_at = now + byte_count * (1 + asking) / rate

    def _control_bytes_per_s(self, senders: int) -> float:
        """What one of so many may send of messages: all spend from one cap."""
        cap = self._throttles.download.bytes_per_second
        return CONTROL_BYTES_PER_S if cap is None else min(CONTROL_BYTES_PER_S, cap / 4 / senders)
