"""The auditor's desk: averages again what the head of a record draws, and tells everybody of a lie.

    do_audit   the core's draw: drawn shards are kept for the auditors, and those that we are to look at are
               asked of their contributors, averaged and compared. Who does not answer is asked again, for it
               may not have heard of the record yet, and the reducer in its place; then another auditor is
               told, which does the same. Who did not even answer the last time has a moment to do so, and
               the reducer is asked at once: it shall not take the time that all audits have
    serve      streams of peers: `input` (head, shard, peer) gives a member of that record a kept shard with
               its path, or nothing; `second` (head, shard) has us look at a shard of which the first auditor
               did not get all; `accuse` brings an accusation, which we check ourselves

Who gives an auditor nothing, though there is a link to it, is named and counted. That proves nothing: it may
have restarted. A pattern of it is for people to judge.

An accusation is kept in the home, counted, shown, and passed on to all we are linked with: once, since one
that we have is no news, nor is a second one of the same liar and round if a wrong mean of it is known to be
in the state. Whoever may remove members may be away, or lack the record just then. So who has not said that
it has heard is told again, less and less often, and so is whoever is linked later, as long as the liar is a
member; and at a start the kept files are judged again.

Where the run has it so, who may remove members signs the liar's removal, and a rollback to the state before
the lie, if the wrong mean is in the state. What does not prove anything is refused, counted and named, and
held against who brought it; and what is proven against a key that has no part in the run, or of a round that
no record of our chain tells of, is refused: anybody can make such proofs, as many as it likes.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import mmap
import random
from collections import Counter, OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol
from weakref import WeakValueDictionary

import msgpack
from torch import Tensor
from typing_extensions import Buffer

from tapestry.dht.p2pd import SwarmError
from tapestry.node.daemon.averaging import Averaging
from tapestry.node.daemon.desk import Loop, Outputs
from tapestry.node.daemon.members_desk import MembersDesk
from tapestry.node.daemon.views import Reporter
from tapestry.node.disk.accusations import (
    ID_CHARS,
    SUFFIX,
    Accusation,
    FalseAccusation,
    keep,
    kept_against,
    prove,
    unpack,
)
from tapestry.node.disk.double_votes import DoubleVote
from tapestry.node.net.network import Network, Streams
from tapestry.node.net.throttle import Throttles
from tapestry.node.net.waiting import WaitingPlaces
from tapestry.node.net.wire import (
    FrameLimits,
    RemoteProtocolError,
    StreamEnded,
    WriteLimits,
    frame_parts,
    read_frame,
    read_header,
    read_payload,
    write_frame,
)
from tapestry.node.net.wire import unpack as unpack_header
from tapestry.node.protocol import events as ev
from tapestry.node.protocol import strict
from tapestry.node.protocol.audit import Input, Order, second_auditor
from tapestry.node.protocol.canon import Crypto
from tapestry.node.protocol.chain import Member, Record
from tapestry.node.protocol.commitment import PATH_MAX, is_committed
from tapestry.node.protocol.settings import Settings, word_of
from tapestry.node.state.means import payload_digest, payload_of

KEPT_RECORDS = 4  # at least, however large: an auditor asks at once for most
KEPT_S = 180.0  # as long as both auditors may ask, where rounds are short: 2 * (sum of AGAIN_S and answers)
KEPT_BYTES_MAX = 256 << 20  # Guess: of copies beyond KEPT_RECORDS
KEPT_MAX = 4096  # records. G7
TOLD_MAX = 1024  # names, and (round, liar). G7
TOLD_AGAIN_S, TOLD_AGAIN_S_MAX = 10.0, 600.0  # twice as long each time. Guess: for who catches up
LATE_TRIES, LATE_S = 10, 0.5  # Guess: for the record that an accusation is of
STREAMS_MAX = 4  # of all peers that are given inputs at a time, and that accuse; the others wait
STREAMS_OF_ONE_MAX = 8  # open ones of a peer; it is given one input at a time, and accuses by one
LARGE_BYTES_MIN = 1 << 20  # Guess: accusations from here on have one place of their own
GIVEN_S, ACCUSED_S = 30.0, 60.0  # then who gets an input, or accuses, makes room for who waits. Guess
ASKED_OF_REDUCER_MAX = 2  # streams of an audit to its reducer at a time: AUDITS_AT_ONCE may have the same one
BYTES_PER_SECOND_MIN = 16 * 1024  # of who asks or accuses, or gives; Guess: as of a donor (net/transfer.py)
AUDITS_AT_ONCE = 2  # Guess: each holds all members' bytes of a shard
AUDITS_MAX = 64  # under way, those that wait to ask again among them: they hold what came. G7
WAITING_MAX = 16384  # audits that wait for one of those places: 5 MB. 70 billion parameters draw 4,500. G7
AGAIN_S = (
    2.0,
    10.0,
    30.0,
)  # Guess: a member that is late for the record; one that catches up; a line that is full
ANSWER_S = 60.0  # Guess: behind other auditors
SILENT_S = 2.0  # Guess: who did not answer the last time; else it holds up the audits of all others
OPENED_PER_S = 8.0  # streams to one peer. Guess: it takes 20 a second of one (dht/swarm.py), of all kinds
OPEN_S = 10.0
SILENCE_S = 10.0
HEARD_S = 240.0  # that we wait for a place for accusations, and the other's word. Guess: behind three others
HEADER_BYTES_MAX = 8192  # a path of PATH_MAX digests fits
ACCUSATION_BYTES_MAX = 64 << 20  # Guess: 128 members' shards of 512 KiB

TAKEN = msgpack.packb(["taken"])  # the answer to an accusation that was judged

_Given = tuple[tuple[str, ...], Tensor]  # a path, and encoded bytes

_log = logging.getLogger("tapestry.audit")


def audit_protocol(run_id: str) -> str:
    return f"/tapestry/{run_id}/audit/1"


@dataclass(frozen=True, slots=True)
class Auditor:
    """Who audits."""

    crypto: Crypto
    own: str  # peer id
    run_id: str
    folder: Path  # HOME/accusations
    throttles: Throttles
    on_lie: Literal["remove", "rollback", "mark"] = "mark"  # the spec's: what this node asks for


@dataclass(slots=True)
class _Lie:
    """One that is proven: of a liar's round the one that others are told of."""

    name: str
    accused: str
    epoch: int  # of the state that the round started from
    in_state: bool
    heard: set[str] = field(default_factory=set)  # who has it
    telling: set[str] = field(default_factory=set)  # who is being told


class Evidence(Protocol):
    """What the chain and the disk say of a lie; keeper.Keeper. Called in any thread. Raises OSError."""

    @property
    def epoch(self) -> int: ...

    def of_a_record(self, lie: Accusation) -> bool: ...

    def in_the_state(self, lie: Accusation) -> bool: ...

    def settings_at(self, epoch: int) -> Settings: ...


class AuditDesk:
    """One node's part in the audits of its run."""

    def __init__(
        self,
        loop: Loop,
        network: Network,
        averaging: Averaging,
        reporter: Reporter,
        auditor: Auditor,
        members: MembersDesk,
        evidence: Evidence,
    ) -> None:
        self._loop = loop
        self._evidence = evidence
        self._network = network
        self._averaging = averaging
        self._reporter = reporter
        self._members = members
        self._on_lie = auditor.on_lie
        self._crypto = auditor.crypto
        self._own = auditor.own
        self._folder = auditor.folder
        self._throttles = auditor.throttles
        self.protocol = audit_protocol(auditor.run_id)
        # Head of a record -> (peer, shard) -> path and encoded bytes, of contributions to it.
        self._kept: OrderedDict[str, dict[tuple[str, int], tuple[tuple[str, ...], Tensor]]] = OrderedDict()
        self._kept_at: dict[str, float] = {}  # since when
        self._records: dict[str, Record] = {}  # those
        # Of those, what we look at if we are asked, by first auditor and shard.
        self._seconds: dict[str, dict[tuple[str, int], Order]] = {}
        self._auditing = 0
        self._waiting: list[tuple[Record, Order, bool]] = []  # for a place
        self._turn = asyncio.Semaphore(AUDITS_AT_ONCE)
        self._giving = WaitingPlaces(STREAMS_MAX, GIVEN_S, members.is_member)
        self._accused = WaitingPlaces(STREAMS_MAX, ACCUSED_S, members.is_member)
        self._accused_at_length = WaitingPlaces(1, ACCUSED_S, members.is_member)
        self._streams: Counter[str] = Counter()  # open ones, by peer
        # By peer and what it asks for: it takes no more than one's place.
        self._turns: WeakValueDictionary[tuple[str, str], asyncio.Lock] = WeakValueDictionary()
        self._read = FrameLimits(
            HEADER_BYTES_MAX, ACCUSATION_BYTES_MAX, BYTES_PER_SECOND_MIN, auditor.throttles.download
        )
        self._run_id = auditor.run_id
        self._told: OrderedDict[str, None] = OrderedDict()  # names of accusations that were judged
        self._lies: dict[tuple[int, str], _Lie] = {}  # by epoch and liar
        # By who is told, and what.
        self._lines: WeakValueDictionary[tuple[str, str], asyncio.Lock] = WeakValueDictionary()
        self._back: dict[str, asyncio.Event] = {}  # who is to be told again -> its next link is up
        self._silent: dict[str, None] = {}  # of the newest record's members, who did not answer the last time
        # Of who was asked or told something lately: when it may be again.
        self._open_at: dict[str, float] = {}
        self.outputs: Outputs = {ev.Audit: self.do_audit, ev.Equivocated: self.do_equivocated}

    # --- our own audits ------------------------------------------------------------------------

    def do_audit(self, out: ev.Audit) -> None:
        head = out.record.head
        # Copies: the trainer's memory, where ours lie, is written again in the next epoch.
        self._kept[head] = {
            (one.peer, one.shard): (self._path_of(one), one.blob.clone())  # type: ignore[attr-defined]  # a tensor
            for one in out.kept
        }
        self._records[head] = out.record
        self._seconds[head] = {(order.first, order.shard): order for order in out.seconds}
        self._kept_at[head] = self._loop.now()
        self._silent = {m.peer: None for m in out.record.body.members if m.peer in self._silent}
        self._drop_old()
        self._begin_audits(out.record, out.orders, first=True)

    def _drop_old(self) -> None:
        """Of short rounds many are kept, for auditors ask again; of long ones a few."""
        held = sum(payload.nbytes for kept in self._kept.values() for _, payload in kept.values())
        while len(self._kept) > KEPT_RECORDS:
            old, kept = next(iter(self._kept.items()))
            is_old = self._loop.now() - self._kept_at[old] > KEPT_S
            if not is_old and held <= KEPT_BYTES_MAX and len(self._kept) <= KEPT_MAX:
                return
            held -= sum(payload.nbytes for _, payload in kept.values())
            del self._kept[old], self._kept_at[old], self._records[old], self._seconds[old]

    def _path_of(self, one: Input) -> tuple[str, ...]:
        return one.path if one.peer != self._own else self._averaging.path(one.contribution, one.shard)

    def _begin_audits(self, record: Record, orders: Sequence[Order], first: bool) -> None:
        """Now or when there is a place. A lot says which of them waits, or is left out if too many do: nobody
        can foresee a shard that we do not look at."""
        self._waiting += [(record, order, first) for order in orders]
        while len(self._waiting) > WAITING_MAX:
            self._skip(*self._by_lot()[:2])
        self._begin_waiting()

    def _begin_waiting(self) -> None:
        while self._waiting and self._auditing < AUDITS_MAX:
            record, order, first = self._by_lot()
            if record.head not in self._kept:  # the others have dropped what they kept for it as well
                self._skip(record, order)
                continue
            self._auditing += 1
            self._loop.spawn(self._audit(record, order, first))

    def _by_lot(self) -> tuple[Record, Order, bool]:
        """One of those that wait, and it waits no more."""
        waiting, index = self._waiting, random.randrange(len(self._waiting))
        waiting[index], waiting[-1] = waiting[-1], waiting[index]
        return waiting.pop()

    def _skip(self, record: Record, order: Order) -> None:
        self._reporter.audited("skipped")
        _log.info("audit=skipped epoch=%d shard=%d: too many wait", record.body.epoch, order.shard)

    async def _audit(self, record: Record, order: Order, first: bool) -> None:
        """One shard of one record. `first`: another auditor is told if we do not get all of it."""
        members = tuple(m for m in record.body.members if m.weight)
        given: dict[str, _Given] = {}
        try:
            for pause_s in (0.0, *AGAIN_S):
                await asyncio.sleep(pause_s)
                async with self._turn:
                    await self._gather(record, order, members, given, ask_reducer=pause_s > 0)
                    if len(given) == len(members):
                        await self._compare(record, order, members, [given[m.peer] for m in members])
                        return
        finally:
            self._auditing -= 1
            self._begin_waiting()
        await self._give_up(record, order, [m.peer for m in members if m.peer not in given], first)

    async def _gather(
        self,
        record: Record,
        order: Order,
        members: Sequence[Member],
        given: dict[str, _Given],
        ask_reducer: bool,
    ) -> None:
        """What is not in `given` yet, of everybody at once."""
        missing = [m for m in members if m.peer not in given]
        line = asyncio.Semaphore(ASKED_OF_REDUCER_MAX)
        found = await asyncio.gather(*(self._input(record, order, m, line, ask_reducer) for m in missing))
        given.update({m.peer: one for m, one in zip(missing, found, strict=True) if one is not None})

    async def _give_up(self, record: Record, order: Order, missing: list[str], first: bool) -> None:
        """Nobody gave what these contributed. Those that we are linked to withheld it, or lost it."""
        linked = [peer for peer in missing if peer in self._network.linked]
        epoch, shard = record.body.epoch, order.shard
        self._reporter.audited("incomplete")
        self._reporter.withheld(linked, epoch, shard)
        short = [peer[-6:] for peer in missing]
        _log.info("audit=incomplete epoch=%d shard=%d no_input_of=%s", epoch, shard, short)
        peers = [m.peer for m in record.body.members]
        second = second_auditor(record.head, shard, order.reducer, self._own, peers, self._crypto)
        if first and second is not None:
            await self._say(second, ["second", record.head, shard])

    async def _compare(
        self, record: Record, order: Order, members: tuple[Member, ...], inputs: list[_Given]
    ) -> None:
        weights = [m.weight for m in members]
        payloads = [payload for _, payload in inputs]
        digest = await self._loop.compute(self._averaging.mean_digest, order.shard, payloads, weights)
        if digest == order.digest:
            self._reporter.audited("agreed")
            return
        given = tuple((path, bytes(payload.numpy().data)) for path, payload in inputs)
        accusation = Accusation(
            record.body.prev,
            record.body.epoch - 1,
            members,
            order.shard,
            order.digest,
            order.reducer,
            order.signature,
            given,
        )
        self._reporter.audited("lie")
        await self._accuse(accusation, self._own)

    async def _input(
        self, record: Record, order: Order, member: Member, to_reducer: asyncio.Semaphore, ask_reducer: bool
    ) -> _Given | None:
        """A member's shard, and the path that proves it; None if neither it nor the reducer gave it.

        `to_reducer`: how many ask that at a time. `ask_reducer`: for others too, not only who did not answer.
        """
        peer, linked = member.peer, self._network.linked
        kept = self._kept.get(record.head, {}).get((peer, order.shard))
        if kept is None and peer in linked and peer != order.reducer:
            kept = await self._given_by(peer, record, order.shard, member)
        is_asked = peer == order.reducer or ask_reducer or peer in self._silent
        if kept is None and is_asked and order.reducer in linked:
            async with to_reducer:
                kept = await self._given_by(order.reducer, record, order.shard, member)
        return kept

    async def _given_by(self, source: str, record: Record, shard: int, member: Member) -> _Given | None:
        try:
            header, payload = await self._ask(source, ["input", record.head, shard, member.peer])
            path = _path(header)
        except (SwarmError, StreamEnded, TimeoutError, ConnectionError):
            self._silent[source] = None
            return None
        except RemoteProtocolError as error:
            if error.reason != "missing":
                self._reporter.refused(source, error.reason, str(error))
            return None
        tensor = payload_of(payload)
        if not self._is_of(member, record.body.epoch - 1, shard, payload_digest(tensor), path):
            self._reporter.refused(source, "commitment", "an input that is not of the contribution")
            return None
        return path, tensor

    def _is_of(self, member: Member, epoch: int, shard: int, digest: str, path: tuple[str, ...]) -> bool:
        count = len(self._averaging.shards)
        name = member.contribution
        return is_committed(name, member.peer, epoch, count, shard, digest, path, self._crypto.digest)

    async def _ask(self, peer: str, said: list[Any]) -> tuple[bytes, bytearray]:
        open_s, answer_s = (SILENT_S, SILENT_S) if peer in self._silent else (OPEN_S, ANSWER_S)
        reader, writer = await self._open(peer, open_s)
        try:
            await self._write(peer, writer, msgpack.packb(said))
            header, payload = await read_frame(reader, self._read, answer_s, SILENCE_S, self._came)
            self._silent.pop(peer, None)
            if not payload and header == msgpack.packb([]):  # a path, of one of several shards, is not empty
                raise RemoteProtocolError("missing", "it has not kept this")
            return header, payload
        finally:
            writer.close()

    async def _open(self, peer: str, open_s: float = OPEN_S) -> Streams:
        """A stream, not sooner than the peer is to let one in: it bans who opens many. Raises SwarmError."""
        now = self._loop.now()
        self._open_at = {other: at for other, at in self._open_at.items() if at > now}
        at = self._open_at.get(peer, now)
        self._open_at[peer] = at + 1 / OPENED_PER_S
        await asyncio.sleep(at - now)
        return await self._network.open_stream(peer, self.protocol, open_s)

    # --- lies ----------------------------------------------------------------------------------

    def do_equivocated(self, out: ev.Equivocated) -> None:
        self._loop.spawn(self._accuse(DoubleVote.of(out.proof), self._own))

    async def _accuse(self, accusation: Accusation | DoubleVote, by: str) -> None:
        """It is proven: keep it, say it, pass it on."""
        a = accusation
        if self._is_told(a.name):
            return
        in_state = isinstance(a, Accusation) and await self._loop.compute(self._evidence.in_the_state, a)
        if isinstance(a, Accusation) and in_state and self._is_told(f"{a.head}-{a.accused}"):
            return  # one wrong mean of that round is known to be in the state: more of them change nothing
        new = await self._keep(a, in_state)
        self._pass_on(self._noted(a, in_state, new), by, new)
        # By the rule of that round, so that all ask for the same, whenever they hear of it.
        try:
            settings = await self._loop.compute(self._evidence.settings_at, a.epoch)
        except (LookupError, OSError):  # a fork is left just now: the rule of our newest record
            settings = self._members.roll.settings
        on_lie = word_of(settings, "audit.on_lie", self._on_lie)
        # What is in the state is undone after the liar's removal too: it may have been for another lie.
        undoes = on_lie == "rollback" and in_state
        if not new and not undoes and (on_lie == "mark" or a.accused not in self._members.roll.members):
            return
        self._reporter.accused(a.accused, a.epoch + 1, a.shard, a.what)
        _log.error(
            "accusation=proven peer=%s found_by=%s file=%s; it %s. Ask its operator; the members may remove "
            "it",
            *(a.accused, by[-6:], a.name, a.what),
        )
        if on_lie != "mark":
            self._members.expel(a.accused, f"proven to have {a.why}", a.epoch + 1)
        if on_lie == "rollback" and isinstance(a, Accusation):  # two votes make no wrong state
            self._ask_to_roll_back(a, in_state)

    async def look_again(self) -> None:
        """At a start: judge anew what the home keeps against members. Whoever was to sign the removal may
        have been stopped before that, and who comes later is told of it."""
        for path in kept_against(self._folder, self._members.roll.members):
            try:
                proof = unpack(await self._loop.compute(path.read_bytes))
                if self._is_due(proof) and await self._concerns_the_run(proof):
                    await self._prove(proof)
                    await self._accuse(proof, self._own)
            except (OSError, FalseAccusation) as error:
                _log.info("accusation=not_judged file=%s reason=%r", path.name, str(error))

    def on_up(self, peer: str) -> None:
        """It may have been away when a lie was proven, or behind."""
        if (back := self._back.pop(peer, None)) is not None:
            back.set()
        for lie in self._lies.values():
            if self._is_due(lie):
                self._begin_telling(peer, lie)

    def _is_due(self, lie: Accusation | DoubleVote | _Lie) -> bool:
        """Whether the liar is a member still, and not one again that was let in since."""
        seat = self._members.roll.members.get(lie.accused)
        return seat is not None and seat.since <= lie.epoch

    def _noted(self, a: Accusation | DoubleVote, in_state: bool, new: bool) -> _Lie:
        """What others are told of this liar's round: one in the state, if there is one, or the newest."""
        key = (a.epoch, a.accused)
        lie = self._lies.get(key)
        if lie is None or (new and (in_state or not lie.in_state)):
            lie = self._lies[key] = _Lie(a.name, a.accused, a.epoch, in_state)
        while len(self._lies) > TOLD_MAX:
            del self._lies[next(iter(self._lies))]
        return lie

    def _pass_on(self, lie: _Lie, by: str, new: bool) -> None:
        lie.heard.add(by)
        if new or self._is_due(lie):
            for peer in self._network.linked:
                self._begin_telling(peer, lie)

    def _begin_telling(self, peer: str, lie: _Lie) -> None:
        if peer != lie.accused and peer not in lie.heard | lie.telling:
            lie.telling.add(peer)
            self._loop.spawn(self._tell(peer, lie))

    async def _tell(self, peer: str, lie: _Lie) -> None:
        """Until it has heard, or a link is lost: the next one begins it again."""
        pause_s = TOLD_AGAIN_S
        while not await self._tell_once(peer, lie):
            is_back = await self._comes_back(peer, pause_s)
            pause_s = TOLD_AGAIN_S if is_back else min(2 * pause_s, TOLD_AGAIN_S_MAX)
            if peer not in self._network.linked or not self._is_due(lie):
                break
        lie.telling.discard(peer)

    async def _comes_back(self, peer: str, within_s: float) -> bool:
        """Whether a new link to it is up in that time."""
        back = self._back.setdefault(peer, asyncio.Event())
        try:
            async with asyncio.timeout(within_s):
                await back.wait()
        except TimeoutError:
            return False
        return True

    async def _tell_once(self, peer: str, lie: _Lie) -> bool:
        """Whether that is all: it has heard, or there is no file any more."""
        async with self._line(peer, "accuse"):
            if peer in lie.heard:
                return True
            try:
                with (self._folder / f"{lie.name}{SUFFIX}").open("rb") as file:
                    # Many are told at once, and it may be large: they share the pages.
                    packed = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            except (OSError, ValueError):  # another has its place; an empty one proves nothing
                return True
            if await self._say_now(peer, ["accuse"], [packed], HEARD_S):
                lie.heard.add(peer)
        return peer in lie.heard

    def _is_told(self, name: str) -> bool:
        """Whether `name` was noted before; it is from now on."""
        known = name in self._told
        self._told[name] = None
        while len(self._told) > TOLD_MAX:
            self._told.popitem(last=False)
        return known

    async def _keep(self, a: Accusation | DoubleVote, in_state: bool) -> bool:
        """Whether it is news. It may be there since an earlier start, or there is no room for it."""
        roll = self._members.roll
        ranks = {peer[-ID_CHARS:]: 1 for peer in roll.removed} | {p[-ID_CHARS:]: 2 for p in roll.members}
        try:
            kept = await self._loop.compute(keep, self._folder, a, ranks, in_state)
        except OSError as error:
            _log.error("accusation=not_kept reason=%r; make room in the home", str(error))
            kept = "full"
        if kept != "new":
            _log.info("accusation=proven peer=%s not_kept=%s; it %s", a.accused, kept, a.what)
        return bool(kept == "new")

    def _ask_to_roll_back(self, lie: Accusation, in_state: bool) -> None:
        if in_state:
            self._members.roll_back(lie.epoch, lie.head, f"{lie.accused} lied in epoch {lie.epoch + 1}")
        else:
            _log.warning(
                "rollback=not_asked epoch=%d; the update on this disk has no such mean, so the lie did "
                "no harm here. The liar's removal stands",
                lie.epoch,
            )

    async def _concerns_the_run(self, proof: Accusation | DoubleVote) -> bool:
        """Whether it is of a record in our chain, for which we wait a moment; or of a member's votes."""
        if isinstance(proof, DoubleVote):
            roll = self._members.roll
            return proof.accused in roll.members or proof.accused in roll.removed
        for _ in range(LATE_TRIES):
            if self._evidence.epoch > proof.epoch:
                break
            await asyncio.sleep(LATE_S)
        found: bool = await self._loop.compute(self._evidence.of_a_record, proof)
        return found

    async def _say(self, peer: str, said: list[Any], payload: list[Buffer] | None = None) -> None:
        """Whether it arrived is all the same to us."""
        async with self._line(peer, "say"):
            await self._say_now(peer, said, payload)

    def _line(self, peer: str, what: str) -> asyncio.Lock:
        """To each peer one thing of a kind at a time: it refuses many streams of one, and counts them against
        it. What waits for its place for accusations keeps nothing else from it."""
        return self._lines.setdefault((peer, what), asyncio.Lock())

    async def _say_now(
        self, peer: str, said: list[Any], payload: list[Buffer] | None, patience_s: float = SILENCE_S
    ) -> bool:
        """Whether it answered: that it has judged what it was told."""
        try:
            reader, writer = await self._open(peer)
        except SwarmError:
            return False
        try:
            await self._write(peer, writer, msgpack.packb(said), payload, patience_s)
            return bool(await asyncio.wait_for(reader.read(1), patience_s))
        except (TimeoutError, ConnectionError, SwarmError):
            _log.debug("audit=not_told peer=%s of=%s", peer[-6:], said[0])
            return False
        finally:
            writer.close()

    # --- other members' streams ----------------------------------------------------------------

    async def serve(self, peer: str, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One request. Each peer has so many open; of all together so many are given inputs at a time, and so
        many accuse: the others wait. Who accuses takes nothing from who asks for an input.

        Raises RemoteProtocolError, StreamEnded, TimeoutError and ConnectionError.
        """
        if peer not in self._network.linked:
            return
        if self._streams[peer] >= STREAMS_OF_ONE_MAX:
            raise RemoteProtocolError("streams", f"more than {STREAMS_OF_ONE_MAX} streams at a time")
        self._streams[peer] += 1
        try:
            await self._serve(peer, reader, writer)
        finally:
            self._streams[peer] -= 1
            if not self._streams[peer]:
                del self._streams[peer]

    async def _serve(self, peer: str, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        header, payload_bytes = await read_header(reader, self._read, SILENCE_S, SILENCE_S, self._came)
        match _values(header, 4, "request"):
            case ["accuse"]:
                is_large = payload_bytes >= LARGE_BYTES_MIN
                places = self._accused_at_length if is_large else self._accused
                async with self._turn_of(peer, "accuse"), places.place(peer, writer):
                    payload = await read_payload(reader, payload_bytes, self._read, SILENCE_S, self._came)
                    await self._judge(peer, payload, writer)
            case ["second", head, shard] if not payload_bytes:
                self._audit_as_second(peer, head, shard)
            case ["input", head, shard, of] if not payload_bytes:
                async with self._turn_of(peer, "input"), self._giving.place(peer, writer):
                    await self._give(peer, writer, head, shard, of)
            case _:
                raise RemoteProtocolError("malformed", "no such request")

    def _turn_of(self, peer: str, what: str) -> asyncio.Lock:
        return self._turns.setdefault((peer, what), asyncio.Lock())

    def _audit_as_second(self, peer: str, head: Any, shard: Any) -> None:
        """Once for a shard of the first auditor's: who asks has drawn it."""
        if not isinstance(head, str) or type(shard) is not int:
            return
        order = self._seconds.get(head, {}).pop((peer, shard), None)
        if order is not None:
            self._begin_audits(self._records[head], [order], first=False)

    async def _judge(self, peer: str, payload: bytearray, writer: asyncio.StreamWriter) -> None:
        """A look at one record comes first: made-up names would have us average made-up inputs. Who tells of
        a record that our chain lacks is not blamed: it may be ahead of us, or on another side of a fork. It
        gets no answer, and tells us again."""
        try:
            accusation = unpack(payload)
            if accusation.name in self._told:
                lie = self._lies.get((accusation.epoch, accusation.accused))
                if lie is not None and lie.name == accusation.name:
                    lie.heard.add(peer)
            elif await self._concerns_the_run(accusation):
                await self._prove(accusation)
                await self._accuse(accusation, peer)
            else:
                self._reporter.refused(peer, "accusation", "it is of nobody's part in our chain")
                return
        except FalseAccusation as error:
            with contextlib.suppress(TimeoutError, ConnectionError, SwarmError):  # blamed though it hangs up
                await self._write(peer, writer, TAKEN)
            raise RemoteProtocolError("accusation", str(error)) from None
        await self._write(peer, writer, TAKEN)

    async def _prove(self, proof: Accusation | DoubleVote) -> None:
        """Raises FalseAccusation."""
        count, mean_digest = len(self._averaging.shards), self._averaging.mean_digest
        await self._loop.compute(prove, proof, self._run_id, count, mean_digest, self._crypto)

    async def _give(self, peer: str, writer: asyncio.StreamWriter, head: Any, shard: Any, of: Any) -> None:
        asked = isinstance(head, str) and type(shard) is int and isinstance(of, str)
        found = self._kept.get(head, {}).get((of, shard)) if asked else None
        body = self._records[head].body if found is not None else None
        if found is None or body is None or all(m.peer != peer for m in body.members):
            await self._write(peer, writer, msgpack.packb([]))
            return
        path, payload = found
        self._reporter.egress.part("audit", body.epoch, head)
        await self._write(peer, writer, msgpack.packb(list(path)), [memoryview(payload.numpy())])  # type: ignore[arg-type]

    async def _write(
        self,
        peer: str,
        writer: asyncio.StreamWriter,
        header: bytes,
        payload: list[Buffer] | None = None,
        patience_s: float = SILENCE_S,
    ) -> None:
        def left(count: int) -> None:
            self._reporter.metrics.network_bytes("sent", "audit", count)
            self._reporter.egress.sent("audit", peer, count)

        limits = WriteLimits(self._throttles.upload, waits=bool(payload), patience_s=patience_s)
        await write_frame(writer, frame_parts(header, payload or []), limits, left)

    def _came(self, count: int) -> None:
        self._reporter.metrics.network_bytes("received", "audit", count)


def _values(header: bytes, count_max: int, what: str) -> list[Any]:
    """Raises RemoteProtocolError."""
    try:
        return [*strict.sequence(unpack_header(header), count_max, what)]
    except strict.Malformed as error:
        raise RemoteProtocolError("malformed", str(error)) from None


def _path(header: bytes) -> tuple[str, ...]:
    """Raises RemoteProtocolError."""
    try:
        return tuple([strict.hexadecimal(d, (64,), "path") for d in _values(header, PATH_MAX, "path")])
    except strict.Malformed as error:
        raise RemoteProtocolError("malformed", str(error)) from None
