"""The desk of accusations: keeps what is proven of a liar, tells everybody, and hears what others tell.

An accusation is kept in the home, counted, shown, and passed on to all we are linked with: once, since one
that we have is no news, nor is a second one of the same liar and round if a wrong mean of it is known to be
in the state. Whoever may remove members may be away, or lack the record just then. So who has not said that
it has heard is told again, less and less often, and so is whoever is linked later, as long as the liar is a
member or the state is to be taken back; and at a start the kept files are judged again.

A proof may have 64 MiB, and many tell of it. So who tells says `accuse` with the proof's name and size first,
and is answered: `taken`, which was judged already; `later`, which another sends just now, or whose record we
do not have yet; or `send`. Who then sends what has another name is refused. A member that sends keeps others
from it for a time that follows from the size, and once it did so for nothing, never again: so of a proof
that liars want to keep out, each of their keys delays the honest ones once. Who sends steadily is not cut
off for another, as far as there is room beside the places (net/waiting.py), unless it let us down there
before: for a while who broke off, which an honest one's line may, and for good who sent what proves nothing.

What a peer brings we check ourselves. Where the run has it so, who may remove members signs the liar's
removal, and a rollback to the state before the lie, if the wrong mean is in the state. What does not prove
anything is refused, counted and named, and held against who brought it; and what is proven against a key that
has no part in the run, or of a round that no record of our chain tells of, is refused: anybody can make such
proofs, as many as it likes.

A lie is found by the auditor's desk (audit_desk.py), or by the core, of two votes or two rosters.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import mmap
from collections import OrderedDict
from dataclasses import dataclass, field, replace
from typing import Protocol

import msgpack

from tapestry.dht.p2pd import SwarmError
from tapestry.dht.streams import end_stream
from tapestry.node.daemon.audit_streams import (
    BYTES_PER_SECOND_MIN,
    PAYLOAD_BYTES_MAX,
    SILENCE_S,
    STREAMS_MAX,
    Auditor,
    AuditStreams,
    Request,
    no_such_request,
)
from tapestry.node.daemon.averaging import Averaging
from tapestry.node.daemon.desk import Loop, Outputs
from tapestry.node.daemon.members_desk import MembersDesk
from tapestry.node.daemon.views import Reporter
from tapestry.node.disk.accusations import (
    ID_CHARS,
    NAME_CHARS_MAX,
    SUFFIX,
    Accusation,
    FalseAccusation,
    Proof,
    epoch_in,
    is_against,
    keep,
    kept,
    prove,
    signed_twice,
    unpack,
)
from tapestry.node.net.network import Network
from tapestry.node.net.waiting import Held, WaitingPlaces
from tapestry.node.net.wire import (
    FrameLimits,
    RemoteProtocolError,
    StreamEnded,
    read_frame,
    read_header,
    read_payload,
)
from tapestry.node.protocol import events as ev
from tapestry.node.protocol.members import ROLLBACK_EPOCHS_MAX
from tapestry.node.protocol.settings import Settings, word_of

TOLD_MAX = 1024  # names, and (round, liar). G7
TOLD_AGAIN_S, TOLD_AGAIN_S_MAX = 10.0, 600.0  # twice as long each time. Guess: for who catches up
LATE_TRIES, LATE_S = 10, 0.5  # Guess: for the record that an accusation is of
ACCUSED_S = 60.0  # then who accuses makes room for who waits. Guess
LARGE_BYTES_MIN = int(ACCUSED_S) * BYTES_PER_SECOND_MIN  # those from here on have one place of their own, and
LARGE_BESIDE_MAX = 2  # so many that take longer go on: 192 MiB in all. Guess
BROKE_OFF_S = 12 * 3600.0  # beside the places: the largest at the least speed takes a tenth of it. Guess
AWAITED_BYTES_PER_SECOND = 128 * 1024  # of who sends what others have too; else one of them may. Guess
HEARD_S = 240.0  # that we wait for a place for accusations, and the other's word. Guess: behind three others

SEND: bytes = msgpack.packb(["send"])  # the answer to the name of a proof
PROOF: bytes = msgpack.packb(["proof"])  # what is sent then
TAKEN: bytes = msgpack.packb(["taken"])  # the answer to one that was judged
LATER: bytes = msgpack.packb(["later"])  # to one that we do not want just now
ANSWER_LIMITS = FrameLimits(64, 0)

_log = logging.getLogger("tapestry.audit")


@dataclass(slots=True)
class _Lie:
    """One that is proven: of a liar's round the one that others are told of."""

    name: str
    accused: str
    epoch: int  # of the state that the round started from
    head: str  # that state's; "" of what was signed twice
    in_state: bool
    undoes: bool  # the run has it so that the members take the state back to that one
    heard: set[str] = field(default_factory=set)  # who has it
    telling: set[str] = field(default_factory=set)  # who is being told


@dataclass(slots=True, eq=False)
class _Claim:
    """What a peer says that it has."""

    peer: str
    name: str
    count: int  # bytes
    until: float = 0.0  # when we no longer wait for it alone


class _KnownMeanwhile(Exception):
    """Another was faster."""


class Evidence(Protocol):
    """What the chain and the disk say of a lie; keeper.Keeper. Called in any thread. Raises OSError."""

    @property
    def epoch(self) -> int: ...

    def of_a_record(self, lie: Accusation) -> bool: ...

    def in_the_state(self, lie: Accusation) -> bool: ...

    def settings_at(self, epoch: int) -> Settings: ...


class AccusationDesk:
    """One node's part in what its run knows of liars."""

    def __init__(
        self,
        loop: Loop,
        network: Network,
        averaging: Averaging,
        reporter: Reporter,
        auditor: Auditor,
        members: MembersDesk,
        evidence: Evidence,
        streams: AuditStreams,
    ) -> None:
        self._loop = loop
        self._network = network
        self._averaging = averaging
        self._reporter = reporter
        self._members = members
        self._evidence = evidence
        self._streams = streams
        self._on_lie = auditor.on_lie
        self._crypto = auditor.crypto
        self._own = auditor.own
        self._folder = auditor.folder
        self._run_id = auditor.run_id
        self._accused = WaitingPlaces(STREAMS_MAX, ACCUSED_S, members.is_member)
        self._accused_at_length = WaitingPlaces(1, ACCUSED_S, members.is_member, LARGE_BESIDE_MAX)
        self._limits = replace(streams.limits, behind_s=ACCUSED_S)
        self._coming: dict[str, _Claim] = {}  # by name: of who sends it, and others need not
        # Members whose claim came to nothing -> when they may go on beside the places.
        self._in_vain: dict[str, float] = {}
        self._told: OrderedDict[str, None] = OrderedDict()  # names of accusations that were judged
        self._lies: dict[tuple[int, str], _Lie] = {}  # by epoch and liar
        self._back: dict[str, asyncio.Event] = {}  # who is to be told again -> its next link is up
        self.outputs: Outputs = {ev.Equivocated: self.do_equivocated}
        streams.requests["accuse"] = self.on_accuse

    def do_equivocated(self, out: ev.Equivocated) -> None:
        self._loop.spawn(self.accuse(signed_twice(out.proof), self._own))

    async def accuse(self, accusation: Proof, by: str) -> None:
        """It is proven: keep it, say it, pass it on."""
        a = accusation
        if self._is_told(a.name):
            return
        in_state = isinstance(a, Accusation) and await self._loop.compute(self._evidence.in_the_state, a)
        if isinstance(a, Accusation) and in_state and self._is_told(f"{a.head}-{a.accused}"):
            return  # one wrong mean of that round is known to be in the state: more of them change nothing
        new = await self._keep(a, in_state)
        on_lie = await self._rule_at(a.epoch)
        # What is in the state is undone after the liar's removal too: it may have been for another lie.
        undoes = on_lie == "rollback" and in_state
        self._pass_on(self._noted(a, in_state, undoes, new), by, new)
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
        if on_lie == "rollback" and isinstance(a, Accusation):  # the others make no wrong state
            self._ask_to_roll_back(a, in_state)

    async def _rule_at(self, epoch: int) -> str:
        """What was to be done about a lie in that round, so that all ask for the same, whenever they hear."""
        try:
            settings = await self._loop.compute(self._evidence.settings_at, epoch)
        except (LookupError, OSError):  # a fork is left just now: the rule of our newest record
            settings = self._members.roll.settings
        return word_of(settings, "audit.on_lie", self._on_lie)

    async def look_again(self) -> None:
        """At a start: judge anew what the home keeps against members, and against others what is to be undone
        still. Whoever was to sign that may have been stopped before, and who comes later is told of it."""
        for path in kept(self._folder):
            try:
                if not self._may_be_due(path.name):
                    continue
                proof = unpack(await self._loop.compute(path.read_bytes))
                is_due = self._is_against_a_member(proof) or await self._is_to_be_undone(proof)
                if is_due and await self._concerns_the_run(proof):
                    await self._prove(proof)
                    await self.accuse(proof, self._own)
            except (OSError, FalseAccusation) as error:
                _log.info("accusation=not_judged file=%s reason=%r", path.name, str(error))

    def _may_be_due(self, file: str) -> bool:
        """By its name: files may be many, and large."""
        is_recent = epoch_in(file) >= self._evidence.epoch - ROLLBACK_EPOCHS_MAX
        return is_recent or is_against(file, self._members.roll.members)

    async def _is_to_be_undone(self, proof: Proof) -> bool:
        if not isinstance(proof, Accusation) or not self._members.may_be_undone(proof.epoch, proof.head):
            return False
        if await self._rule_at(proof.epoch) != "rollback":
            return False
        return bool(await self._loop.compute(self._evidence.in_the_state, proof))

    def on_up(self, peer: str) -> None:
        """It may have been away when a lie was proven, or behind."""
        if (back := self._back.pop(peer, None)) is not None:
            back.set()
        for lie in self._lies.values():
            if self._is_due(lie):
                self._begin_telling(peer, lie)

    def _is_due(self, lie: _Lie) -> bool:
        """Whether something is to be done about it still."""
        undoes = lie.undoes and self._members.may_be_undone(lie.epoch, lie.head)
        return undoes or self._is_against_a_member(lie)

    def _is_against_a_member(self, lie: Proof | _Lie) -> bool:
        """And not against one again that was let in since."""
        seat = self._members.roll.members.get(lie.accused)
        return seat is not None and seat.since <= lie.epoch

    def _noted(self, a: Proof, in_state: bool, undoes: bool, new: bool) -> _Lie:
        """What others are told of this liar's round: one in the state, if there is one, or the newest."""
        key = (a.epoch, a.accused)
        lie = self._lies.get(key)
        if lie is None or (new and (in_state or not lie.in_state)):
            head = a.head if isinstance(a, Accusation) else ""
            lie = self._lies[key] = _Lie(a.name, a.accused, a.epoch, head, in_state, undoes)
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
        async with self._streams.line(peer, "accuse"):
            if peer in lie.heard:
                return True
            try:
                with (self._folder / f"{lie.name}{SUFFIX}").open("rb") as file:
                    # Many are told at once, and it may be large: they share the pages.
                    packed = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            except (OSError, ValueError):  # another has its place; an empty one proves nothing
                return True
            if len(packed) > PAYLOAD_BYTES_MAX:  # nobody would take it
                _log.info("accusation=not_told file=%s bytes=%d: too large", lie.name, len(packed))
                return True
            if await self._bring(peer, lie.name, packed):
                lie.heard.add(peer)
        return peer in lie.heard

    async def _bring(self, peer: str, name: str, packed: mmap.mmap | bytes) -> bool:
        """Whether it has judged it: by us, or because another was first."""
        try:
            reader, writer = await self._streams.open(peer)
        except SwarmError:
            return False
        try:
            said = msgpack.packb(["accuse", name, len(packed)])
            await self._streams.write(peer, writer, said)
            answer = await self._answer(reader)
            if answer == SEND:
                await self._streams.write(peer, writer, PROOF, [packed], HEARD_S)
                answer = await self._answer(reader)
            return answer == TAKEN
        except (StreamEnded, TimeoutError, ConnectionError, SwarmError):
            _log.debug("accusation=not_told peer=%s name=%s", peer[-6:], name)
        except RemoteProtocolError as error:
            self._reporter.refused(peer, error.reason, str(error))
        finally:
            end_stream(writer)
        return False

    async def _answer(self, reader: asyncio.StreamReader) -> bytes:
        header, _ = await read_frame(reader, ANSWER_LIMITS, HEARD_S, SILENCE_S, self._streams.came)
        return header

    def _is_told(self, name: str) -> bool:
        """Whether `name` was noted before; it is from now on."""
        known = name in self._told
        self._told[name] = None
        while len(self._told) > TOLD_MAX:
            self._told.popitem(last=False)
        return known

    async def _keep(self, a: Proof, in_state: bool) -> bool:
        """Whether it is news. It may be there since an earlier start, or there is no room for it."""
        roll = self._members.roll
        ranks = {peer[-ID_CHARS:]: 1 for peer in roll.removed} | {p[-ID_CHARS:]: 2 for p in roll.members}
        try:
            outcome = await self._loop.compute(keep, self._folder, a, ranks, in_state)
        except OSError as error:
            _log.error("accusation=not_kept reason=%r; make room in the home", str(error))
            outcome = "full"
        if outcome != "new":
            _log.info("accusation=proven peer=%s not_kept=%s; it %s", a.accused, outcome, a.what)
        return bool(outcome == "new")

    def _ask_to_roll_back(self, lie: Accusation, in_state: bool) -> None:
        if in_state:
            self._members.roll_back(lie.epoch, lie.head, f"{lie.accused} lied in epoch {lie.epoch + 1}")
        else:
            _log.warning(
                "rollback=not_asked epoch=%d; the update on this disk has no such mean, so the lie did "
                "no harm here. The liar's removal stands",
                lie.epoch,
            )

    async def _concerns_the_run(self, proof: Proof) -> bool:
        """Whether it is of a record in our chain, for which we wait a moment; or a member signed twice."""
        if not isinstance(proof, Accusation):
            roll = self._members.roll
            return proof.accused in roll.members or proof.accused in roll.removed
        for _ in range(LATE_TRIES):
            if self._evidence.epoch > proof.epoch:
                break
            await asyncio.sleep(LATE_S)
        found: bool = await self._loop.compute(self._evidence.of_a_record, proof)
        return found

    # --- other members' streams ----------------------------------------------------------------

    async def on_accuse(self, request: Request) -> None:
        """A peer names a proof, and says how large it is. Of all together so many bring one at a time: the
        others wait. Who accuses takes nothing from who asks for an input. Raises as AuditStreams.serve."""
        match request.said:
            case [str() as name, int() as count] if _is_claim(name, count):
                claim = _Claim(request.peer, name, count)
            case _:
                raise no_such_request()
        places = self._accused_at_length if count >= LARGE_BYTES_MIN else self._accused
        async with self._streams.turn_of(claim.peer, "accuse"):
            if await self._needs_none(claim, request.writer):
                return
            goes_on = self._in_vain.get(claim.peer, 0.0) <= self._loop.now()
            async with places.place(claim.peer, request.writer, goes_on) as held:
                if not await self._needs_none(claim, request.writer):  # another brought it meanwhile
                    await self._receive(claim, request, held)

    async def _needs_none(self, claim: _Claim, writer: asyncio.StreamWriter) -> bool:
        """Whether it was told not to send."""
        answer = self._answer_without(claim)
        if answer is not None:
            await self._streams.write(claim.peer, writer, answer)
        return answer is not None

    def _answer_without(self, claim: _Claim) -> bytes | None:
        if claim.name in self._told:
            self._has_heard(claim)
            return TAKEN
        coming = self._coming.get(claim.name)
        if coming is not None and coming.count == claim.count and self._loop.now() < coming.until:
            return LATER
        # Of a record that is still to come: we could only refuse it, and have it sent again.
        is_early = claim.count >= LARGE_BYTES_MIN and self._evidence.epoch <= epoch_in(claim.name)
        return LATER if is_early else None

    async def _receive(self, claim: _Claim, request: Request, held: Held) -> None:
        """While a member sends it, others need not: for a time, and if it never let us down."""
        peer, is_member = claim.peer, self._members.is_member(claim.peer)
        if is_member and peer not in self._in_vain:
            claim.until = self._loop.now() + ACCUSED_S + claim.count / AWAITED_BYTES_PER_SECOND
            self._coming[claim.name] = claim
        again_at = self._in_vain.get(peer, 0.0)
        try:
            await self._streams.write(peer, request.writer, SEND)
            await self._judge(claim, await self._proof(claim, request.reader), request.writer)
        except _KnownMeanwhile:
            self._has_heard(claim)
        except RemoteProtocolError:
            again_at = math.inf
            raise
        finally:
            if self._coming.get(claim.name) is claim:
                del self._coming[claim.name]
            if is_member and claim.name not in self._told:
                again_at = max(again_at, self._loop.now() + BROKE_OFF_S if held.is_beside else 0.0)
                self._in_vain[peer] = again_at
                while len(self._in_vain) > TOLD_MAX:
                    del self._in_vain[next(iter(self._in_vain))]

    async def _proof(self, claim: _Claim, reader: asyncio.StreamReader) -> bytearray:
        """Raises _KnownMeanwhile, and as AuditStreams.serve."""

        def came(count: int) -> None:
            self._streams.came(count)
            if claim.name in self._told:
                raise _KnownMeanwhile

        header, count = await read_header(reader, self._limits, SILENCE_S, SILENCE_S, came)
        if header != PROOF or count != claim.count:
            raise RemoteProtocolError("accusation", f"{count} bytes came where it had said {claim.count}")
        return await read_payload(reader, count, self._limits, SILENCE_S, came)

    def _has_heard(self, claim: _Claim) -> None:
        for lie in self._lies.values():
            if lie.name == claim.name:
                lie.heard.add(claim.peer)

    async def _judge(self, claim: _Claim, payload: bytearray, writer: asyncio.StreamWriter) -> None:
        """A look at one record comes first: made-up names would have us average made-up inputs. Who tells of
        a record that our chain lacks is not blamed: it may be ahead of us, or on another side of a fork. It
        gets no answer, and tells us again."""
        peer = claim.peer
        try:
            proof = unpack(payload)
            if proof.name != claim.name:
                raise FalseAccusation(f"it is named {proof.name}, and not {claim.name}")
            if claim.name in self._told:
                self._has_heard(claim)
            elif await self._concerns_the_run(proof):
                await self._prove(proof)
                await self.accuse(proof, peer)
            else:
                self._reporter.refused(peer, "accusation", "it is of nobody's part in our chain")
                return
        except FalseAccusation as error:
            with contextlib.suppress(TimeoutError, ConnectionError, SwarmError):  # blamed though it hangs up
                await self._streams.write(peer, writer, TAKEN)
            raise RemoteProtocolError("accusation", str(error)) from None
        await self._streams.write(peer, writer, TAKEN)

    async def _prove(self, proof: Proof) -> None:
        """Raises FalseAccusation."""
        count, mean_digest = len(self._averaging.shards), self._averaging.mean_digest
        await self._loop.compute(prove, proof, self._run_id, count, mean_digest, self._crypto)


def _is_claim(name: str, count: int) -> bool:
    return len(name) <= NAME_CHARS_MAX and type(count) is int and 0 < count <= PAYLOAD_BYTES_MAX
