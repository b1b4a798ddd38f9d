"""What peers may ask of our DHT node, and may answer to it: each is judged before hivemind sees it.

hivemind's handlers run in the node's own loop and take what comes: one `rpc_find` of 20,000 equal keys held
the loop for 47 s and 6 GB, an id out of range was a traceback in the log, and a peer could enter ids without
number into the routing table and so hide the others from a newcomer. Here:

- a call has a size and a number of keys that fit its kind, before it is parsed;
- the sender's DHT id is the one that follows from its peer id, which libp2p has proven, and so is every id
  in an answer. A peer that the operator named may have another: a stock `hivemind-dht` draws its id;
- calls of members may use CALLS_SHARE of the loop's time, those of strangers STRANGERS_SHARE beside it, and
  those of one peer PEER_SHARE: what is above is refused. A stranger is whoever is no member of the run;
- an answer has the bounds of what an honest node can say: 60,000 tiny items of one, which hivemind takes
  apart before anything is validated, held the loop for 0.7 s, and a search asks twenty nodes.

What is refused is an error to the caller, a count, and a fault of the peer. A peer that the operator named
may be a stock `hivemind-dht`, which keeps what anybody stores: its answers are refused too, without fault.
Knows hivemind's messages and ids; the swarm is given.
"""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable
from contextvars import ContextVar
from typing import Any

import msgpack
from hivemind.dht.protocol import DHTProtocol
from hivemind.dht.routing import DHTID
from hivemind.p2p import P2PContext, PeerID
from hivemind.proto import dht_pb2

from tapestry.dht.presence import RECORD_BYTES_MAX

RECORDS_MAX = 1024  # of one store; directory.PEERS_MAX
KEYS_MAX = 8  # of one call. We ask for one at a time
ID_BYTES = DHTID.HASH_NBYTES
SMALL_BYTES_MAX = 1024  # of a ping, and of a find of KEYS_MAX keys
STORE_BYTES_MAX = RECORDS_MAX * (RECORD_BYTES_MAX + 100)  # a whole dictionary, passed on to who is new
NEAREST_MAX = 20  # peers that an answer names for a key; hivemind's bucket_size
PEER_BYTES_MAX = 64  # of a peer id: an Ed25519 key has 38, a digest of one 34
FOUND_BYTES_MAX = STORE_BYTES_MAX + KEYS_MAX * NEAREST_MAX * (ID_BYTES + PEER_BYTES_MAX + 8)
CALLS_SHARE = 0.1  # of the loop's time. Guess: a swarm of 64 uses a thousandth
STRANGERS_SHARE = CALLS_SHARE / 2  # Guess
PEER_SHARE = 0.04  # Guess
BURST_S = 0.2  # Guess: one whole dictionary takes as long
CALL_COST_S = 0.0005  # what a call costs p2pd, the socket and the loop beside its handler. Guess
PEERS_KEPT = 1024
NEW_IDS_PER_S, NEW_IDS_BURST = 2.0, 128.0  # that enter the routing table; a new one may be sent all records

STORING: ContextVar[bool] = ContextVar("storing", default=False)  # a peer's store is being served

Answer = Callable[[Any, P2PContext], Awaitable[Any]]


class CallRefused(Exception):
    """The caller is told this; hivemind sends it as the error of the call."""

    def __init__(self, reason: str, text: str) -> None:
        super().__init__(text)
        self.reason = reason


def id_of(peer: PeerID) -> DHTID:
    """The DHT id of a node of ours: the same after a restart, and nobody's choice."""
    return DHTID.generate(source=peer.to_bytes())


class Share:
    """Time that may be used: a burst, and a part of the time that passes. Pure."""

    def __init__(self, share: float, now: float) -> None:
        self._share = share
        self._spent_s = 0.0
        self._at = now

    def has_room(self, now: float) -> bool:
        self._spent_s = max(0.0, self._spent_s - self._share * max(0.0, now - self._at))
        self._at = max(self._at, now)
        return self._spent_s < BURST_S

    def spend(self, seconds: float) -> None:
        self._spent_s += seconds


class Guard:
    """Of one swarm. `serve` stands before each of hivemind's handlers."""

    def __init__(
        self,
        on_refused: Callable[[str, str], None],  # peer id, reason
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._on_refused = on_refused
        self._clock = clock
        self._named: dict[str, None] = {}  # by the operator
        self.is_member: Callable[[str], bool] = lambda peer: True  # until it is known who is
        self._members = Share(CALLS_SHARE, clock())
        self._strangers = Share(STRANGERS_SHARE, clock())
        self._shares: dict[str, Share] = {}
        self._new_ids = NEW_IDS_BURST
        self._new_ids_at = clock()

    def trust_id_of(self, peer_id: str) -> None:
        """This peer was named by who runs the node: it may have a DHT id of its own choice."""
        self._named[peer_id] = None

    async def serve(self, kind: type, data: bytes, context: P2PContext, answer: Answer) -> bytes:
        """The answer to a call. Raises CallRefused, which is counted already, and what the handler raises."""
        remote = context.remote_id
        peer, began_at = remote.to_base58(), self._clock()
        try:
            self._admit(peer, began_at)
            request = parsed(kind, data)
            self._check_sender(request, remote)
        except CallRefused as refused:
            if peer in self._shares:  # its own affair: refusals must not use up what there is for all
                self._shares[peer].spend(self._clock() - began_at + CALL_COST_S)
            self._on_refused(peer, refused.reason)
            raise
        token = STORING.set(kind is dht_pb2.StoreRequest)
        try:
            response = await answer(request, context)
        finally:
            STORING.reset(token)
        packed: bytes = response.SerializeToString()
        # A ping that asks us to ping back waits for the network: that is not our time.
        waited = getattr(request, "validate", False)
        self._spend(peer, CALL_COST_S + (0.0 if waited else self._clock() - began_at))
        return packed

    def answered(self, kind: type, data: bytes, remote: PeerID) -> Any:
        """What a peer answers to a call of ours. Raises CallRefused, which is counted already."""
        try:
            return parsed_answer(kind, data)
        except CallRefused as refused:
            peer = remote.to_base58()
            if peer not in self._named:
                self._on_refused(peer, refused.reason)
            raise

    def is_own_id(self, node_id: DHTID, peer: PeerID) -> bool:
        """Whether this id may stand for this peer."""
        return node_id == id_of(peer) or peer.to_base58() in self._named

    def bind(self, protocol: DHTProtocol) -> None:
        """Let nothing into the routing table, nor out of an answer, whose id is not its own."""
        update, call_find = protocol.update_routing_table, protocol.call_find

        async def update_bound(node_id: DHTID | None, peer_id: PeerID, responded: bool = True) -> None:
            known = node_id is None or node_id in protocol.routing_table
            if node_id is not None and not self.is_own_id(node_id, peer_id):
                return
            if node_id is None and responded and protocol.routing_table.get(peer_id=peer_id) is None:
                return  # it says no id: nothing to enter
            if known or not responded or self._may_enter():
                await update(node_id, peer_id, responded)

        async def call_find_bound(peer: PeerID, keys: Any) -> Any:
            found = await call_find(peer, keys)
            if found is None:
                return None
            return {
                key: (value, {i: p for i, p in nearest.items() if self.is_own_id(i, p)})
                for key, (value, nearest) in found.items()
            }

        protocol.update_routing_table, protocol.call_find = update_bound, call_find_bound

    def _may_enter(self) -> bool:
        now = self._clock()
        self._new_ids = min(NEW_IDS_BURST, self._new_ids + NEW_IDS_PER_S * (now - self._new_ids_at))
        self._new_ids_at = now
        if self._new_ids < 1.0:
            return False
        self._new_ids -= 1.0
        return True

    def _admit(self, peer: str, now: float) -> None:
        share = self._shares.get(peer)
        if share is None:
            if len(self._shares) >= PEERS_KEPT:
                self._shares.pop(next(iter(self._shares)))
            share = self._shares[peer] = Share(PEER_SHARE, now)
        if not share.has_room(now):
            raise CallRefused("calls", "more calls to the DHT than a peer has use for")
        if not self._share_of_all(peer).has_room(now):
            raise CallRefused("busy", "the DHT has more calls than it takes")

    def _share_of_all(self, peer: str) -> Share:
        """What it has together with all others of its kind."""
        return self._members if self.is_member(peer) else self._strangers

    def _spend(self, peer: str, seconds: float) -> None:
        self._share_of_all(peer).spend(seconds)
        if peer in self._shares:
            self._shares[peer].spend(seconds)

    def _check_sender(self, request: Any, remote: PeerID) -> None:
        node_id = request.peer.node_id
        if node_id and not self.is_own_id(DHTID.from_bytes(node_id), remote):
            raise CallRefused("forged", "the DHT id is not the one of this peer id")


def parsed(kind: type, data: bytes) -> Any:
    """The request, within its bounds. Raises CallRefused."""
    bytes_max = STORE_BYTES_MAX if kind is dht_pb2.StoreRequest else SMALL_BYTES_MAX
    request = _message(kind, data, bytes_max)
    ids = [request.peer.node_id, *getattr(request, "keys", ())]
    if len(ids) > KEYS_MAX + 1:
        raise CallRefused("oversized", f"a call of {len(ids) - 1} keys")
    if any(node_id and len(node_id) != ID_BYTES for node_id in ids) or not all(ids[1:]):
        raise CallRefused("malformed", "an id of another length")
    if kind is dht_pb2.StoreRequest:
        _check_store(request)
    return request


def parsed_answer(kind: type, data: bytes) -> Any:
    """The answer, within its bounds. Raises CallRefused."""
    bytes_max = FOUND_BYTES_MAX if kind is dht_pb2.FindResponse else SMALL_BYTES_MAX
    answer = _message(kind, data, bytes_max)
    if len(answer.peer.node_id) not in (0, ID_BYTES):
        raise CallRefused("malformed", "an id of another length")
    if kind is dht_pb2.FindResponse:
        if len(answer.results) > KEYS_MAX:
            raise CallRefused("oversized", f"an answer of {len(answer.results)} keys")
        for result in answer.results:
            _check_found(result)
    return answer


def _message(kind: type, data: bytes, bytes_max: int) -> Any:
    if len(data) > bytes_max:
        raise CallRefused("oversized", f"a message of {len(data)} bytes")
    try:
        return kind.FromString(data)  # type: ignore[attr-defined]
    except Exception as error:  # protobuf's DecodeError has no stable place
        raise CallRefused("malformed", "no protobuf") from error


def _check_found(result: Any) -> None:
    ids, peers = result.nearest_node_ids, result.nearest_peer_ids
    if max(len(ids), len(peers)) > NEAREST_MAX:
        raise CallRefused("oversized", f"an answer that names {max(len(ids), len(peers))} peers")
    if any(len(node_id) != ID_BYTES for node_id in ids):
        raise CallRefused("malformed", "an id of another length")
    if len(ids) != len(peers) or not all(0 < len(peer) <= PEER_BYTES_MAX for peer in peers):
        raise CallRefused("malformed", "peers that are none")
    if result.type == dht_pb2.FOUND_DICTIONARY:
        _check_dictionary(result.value)
    elif len(result.value) > RECORD_BYTES_MAX + 16:
        raise CallRefused("oversized", f"a record of {len(result.value)} bytes")


def _check_store(request: Any) -> None:
    lists = (request.subkeys, request.values, request.expiration_time, request.in_cache)
    if any(len(items) != len(request.keys) for items in lists):
        raise CallRefused("malformed", "a store whose lists differ in length")
    for tag, value in zip(request.subkeys, request.values, strict=True):
        if tag == DHTProtocol.IS_DICTIONARY:
            _check_dictionary(value)
        elif len(value) > RECORD_BYTES_MAX + 16 or len(tag) > 128:
            raise CallRefused("oversized", f"a record of {len(value)} bytes")


def _check_dictionary(value: bytes) -> None:
    """hivemind's extension type 0x50: [size or nil, time, [[subkey, value, time], ...]], packed twice."""
    try:
        packed = msgpack.unpackb(value)
        items = None
        if packed.code == 0x50:
            _, _, items = msgpack.unpackb(packed.data, max_array_len=RECORDS_MAX + 1, max_map_len=0)
    except Exception as error:  # whatever stands in it: it is a peer's
        raise CallRefused("malformed", "no dictionary") from error
    if not isinstance(items, list):
        raise CallRefused("malformed", "no dictionary")
    if len(items) > RECORDS_MAX:
        raise CallRefused("oversized", f"a dictionary of {len(items)} records")
    for item in items:
        if not (isinstance(item, list) and len(item) == 3 and isinstance(item[1], bytes)):
            raise CallRefused("malformed", "a record that is none")
        if not isinstance(item[0], str) or type(item[2]) is not float:
            raise CallRefused("malformed", "a record that is none")
