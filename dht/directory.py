"""The DHT of one run: its node, and the validator that every presence record must pass.

hivemind's `DHTNode` runs inside our own event loop, over the p2pd that p2pd.py started. It does not use
`hivemind.DHT`, a forked process behind a pipe."""

from __future__ import annotations

import functools
import logging
import math
import time
from collections.abc import Callable

import msgpack
from hivemind.dht.node import DHTNode
from hivemind.dht.routing import DHTID
from hivemind.dht.validation import DHTRecord, RecordValidatorBase
from hivemind.p2p import P2P

from tapestry.dht.addresses import short
from tapestry.dht.guard import STORING, Guard, id_of
from tapestry.dht.identity import verify
from tapestry.dht.presence import CLOCK_SKEW_S, RECORD_BYTES_MAX, Presence, PresenceError, decode

# A DHT answer breaks above 4 MiB (hivemind, control.py); so many records of the largest size are half of it.
PEERS_MAX = 1024
# Of those, who belong to no run that we know: applicants, in an open run newcomers. Guess
STRANGERS_MAX = 128


_log = logging.getLogger("tapestry.directory")

CLOCK_WARNING_S = 600.0  # between two warnings. Guess


def presence_key(run_id: str) -> str:
    """The DHT key under which the members of a run keep their presence, one subkey per peer id."""
    return f"tapestry/{run_id}/presence"


class PresenceValidator(RecordValidatorBase):  # type: ignore[misc]  # hivemind is untyped
    """Lets into our DHT storage, and out of answers, only genuine presence records of our run.

    hivemind asks it for every record that a peer stores here and for every record in a peer's answer. It
    covers the presence key whole: a plain value, which hivemind would let replace all records at once, is
    refused, and so is a record under another peer's name or with another lifetime than its signed one.

    Every other key is refused as foreign. Keys arrive hashed, so a presence of another run cannot be told
    from rubbish, and whoever may store under any key can fill our memory. The price: runs must not share one
    DHT (a stock `hivemind-dht` may serve as entry to one run, not to several).

    hivemind refuses a peer's whole answer for one bad record in it. So times are judged with twice the usual
    tolerance: a record that an honest peer, whose clock is off, has accepted must not make us deaf to it.
    """

    def __init__(
        self,
        run_id: str,
        on_refused: Callable[[str], None],
        clock: Callable[[], float] = time.time,
        is_member: Callable[[str], bool] = lambda peer: True,
    ) -> None:
        self._run_id = run_id
        self._key = DHTID.generate(source=presence_key(run_id)).to_bytes()
        self._on_refused = on_refused
        self._clock = clock
        self._is_member = is_member
        # Each reading brings the same records from several nodes: check a signature once.
        self._verify = functools.lru_cache(maxsize=2 * PEERS_MAX)(verify)
        self._members: dict[str, float] = {}  # until when their records live
        self._strangers: dict[str, float] = {}
        self._warned_at = -math.inf

    def validate(self, record: DHTRecord) -> bool:
        try:
            self._check(record)
        except PresenceError as error:
            _log.debug("presence refused reason=%s error=%s", error.reason, error)
            self._on_refused(error.reason)
            if error.reason == "future":
                self._warn_of_clocks(str(error))
            return False
        return True

    def _warn_of_clocks(self, why: str) -> None:
        """Of two peers whose clocks differ, one is told so: the one whose clock is behind."""
        now = self._clock()
        if abs(now - self._warned_at) >= CLOCK_WARNING_S:
            self._warned_at = now
            _log.warning("clock=differs %s: set this machine's clock, or have that peer's set", why)

    def _check(self, record: DHTRecord) -> None:
        if record.key != self._key:
            raise PresenceError("foreign", "a record under a key that is not this run's presence")
        now = self._clock()
        presence = decode(
            unwrap(record.value), self._verify, run_id=self._run_id, now=now, clock_skew_s=2 * CLOCK_SKEW_S
        )
        # hivemind serialises a subkey with msgpack; that of a plain value is msgpack's nil.
        if record.subkey != msgpack.packb(presence.peer_id):
            raise PresenceError("forged", f"peer {short(presence.peer_id)}'s record under another subkey")
        if record.expiration_time != presence.expires_at:
            raise PresenceError("forged", f"peer {short(presence.peer_id)}'s record with another expiry")
        self._admit(presence, now)

    def _admit(self, presence: Presence, now: float) -> None:
        """Anyone can make peer ids: bound how many are kept at a time, and let none take a member's place.

        What is stored here beyond that is refused. In an answer of others it is not, for the members' records
        beside it would go with it: the oldest is forgotten.
        """
        peer, storing = presence.peer_id, STORING.get()
        member = self._is_member(peer)
        table = self._members if member else self._strangers
        most = STRANGERS_MAX if storing and not member else PEERS_MAX
        if peer not in table and len(table) >= most:
            for gone in [one for one, expiry in table.items() if expiry <= now]:
                del table[gone]
            if len(table) >= most and storing:
                raise PresenceError("oversized", f"there are {most} peers already")
            while len(table) >= PEERS_MAX:
                del table[next(iter(table))]
        table[peer] = presence.expires_at


def unwrap(value: bytes) -> bytes:
    """The bytes in the msgpack in which hivemind wraps every value."""
    if len(value) > RECORD_BYTES_MAX + 3:  # msgpack's longest header of so few bytes
        raise PresenceError("oversized", f"a value of {len(value)} bytes, the limit is {RECORD_BYTES_MAX}")
    try:
        record = msgpack.unpackb(value)
    except ValueError as error:
        raise PresenceError("malformed", "the value is not msgpack") from error
    if not isinstance(record, bytes) or msgpack.packb(record) != value:
        raise PresenceError("malformed", "the value is not a record in bytes")
    return record


async def create_dht_node(
    p2p: P2P,
    run_id: str,
    guard: Guard,
    on_refused: Callable[[str], None],
    is_member: Callable[[str], bool],
) -> DHTNode:
    node = await DHTNode.create(
        p2p=p2p,
        # The same after a restart: the peer takes the place of its own stale contact.
        node_id=id_of(p2p.peer_id),
        record_validator=PresenceValidator(run_id, on_refused, is_member=is_member),
        # A presence lives a minute or two; a cached one only delays the news of the next.
        cache_locally=False,
        cache_nearest=0,
        cache_on_store=False,
        cache_refresh_before_expiry=0,
        # hivemind doubles the ban of a peer with every failure, without end: after a day's partition it would
        # not be asked for another day.
        backoff_rate=1.0,
    )
    guard.bind(node.protocol)
    return node
