"""The desk of accusations: keeps what is proven of a liar, tells everybody, and hears what others tell.

An accusation is kept in the home, counted, shown, and passed on to all we are linked with: once, since one
that we have is no news, nor is a second one of the same liar and round if a wrong mean of it is known to be
in the state. Whoever may remove members may be away, or lack the record just then. So who has not said that
it has heard is told again, less and less often, and so is whoever is linked later, as long as the liar is a
member; and at a start the kept files are judged again.

What a peer brings (`accuse`, audit_streams.py) we check ourselves. Where the run has it so, who may remove
members signs the liar's removal, and a rollback to the state before the lie, if the wrong mean is in the
state. What does not prove anything is refused, counted and named, and held against who brought it; and what
is proven against a key that has no part in the run, or of a round that no record of our chain tells of, is
refused: anybody can make such proofs, as many as it likes.

A lie is found by the auditor's desk (audit_desk.py), or by the core, of two votes.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import mmap
from collections import OrderedDict
from dataclasses import dataclass, field
from typing import Protocol

import msgpack

from tapestry.dht.p2pd import SwarmError
from tapestry.node.daemon.audit_streams import (
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
    SUFFIX,
    Accusation,
    FalseAccusation,
    keep,
    kept_against,
    prove,
    unpack,
)
from tapestry.node.disk.double_votes import DoubleVote
from tapestry.node.net.network import Network
from tapestry.node.net.waiting import WaitingPlaces
from tapestry.node.net.wire import RemoteProtocolError, read_payload
from tapestry.node.protocol import events as ev
from tapestry.node.protocol.settings import Settings, word_of

TOLD_MAX = 1024  # names, and (round, liar). G7
TOLD_AGAIN_S, TOLD_AGAIN_S_MAX = 10.0, 600.0  # twice as long each time. Guess: for who catches up
LATE_TRIES, LATE_S = 10, 0.5  # Guess: for the record that an accusation is of
LARGE_BYTES_MIN = 1 << 20  # Guess: accusations from here on have one place of their own
ACCUSED_S = 60.0  # then who accuses makes room for who waits. Guess
HEARD_S = 240.0  # that we wait for a place for accusations, and the other's word. Guess: behind three others

TAKEN = msgpack.packb(["taken"])  # the answer to an accusation that was judged

_log = logging.getLogger("tapestry.audit")


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
        self._accused_at_length = WaitingPlaces(1, ACCUSED_S, members.is_member)
        self._told: OrderedDict[str, None] = OrderedDict()  # names of accusations that were judged
        self._lies: dict[tuple[int, str], _Lie] = {}  # by epoch and liar
        self._back: dict[str, asyncio.Event] = {}  # who is to be told again -> its next link is up
        self.outputs: Outputs = {ev.Equivocated: self.do_equivocated}
        streams.requests["accuse"] = self.on_accuse

    def do_equivocated(self, out: ev.Equivocated) -> None:
        self._loop.spawn(self.accuse(DoubleVote.of(out.proof), self._own))

    async def accuse(self, accusation: Accusation | DoubleVote, by: str) -> None:
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
                    await self.accuse(proof, self._own)
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
        async with self._streams.line(peer, "accuse"):
            if peer in lie.heard:
                return True
            try:
                with (self._folder / f"{lie.name}{SUFFIX}").open("rb") as file:
                    # Many are told at once, and it may be large: they share the pages.
                    packed = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            except (OSError, ValueError):  # another has its place; an empty one proves nothing
                return True
            if await self._streams.say(peer, ["accuse"], [packed], HEARD_S):
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

    # --- other members' streams ----------------------------------------------------------------

    async def on_accuse(self, request: Request) -> None:
        """Of all together so many accuse at a time: the others wait. Who accuses takes nothing from who asks
        for an input. Raises as AuditStreams.serve."""
        if request.said:
            raise no_such_request()
        streams, peer, count = self._streams, request.peer, request.payload_bytes
        places = self._accused_at_length if count >= LARGE_BYTES_MIN else self._accused
        async with streams.turn_of(peer, "accuse"), places.place(peer, request.writer):
            payload = await read_payload(request.reader, count, streams.limits, SILENCE_S, streams.came)
            await self._judge(peer, payload, request.writer)

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
                await self.accuse(accusation, peer)
            else:
                self._reporter.refused(peer, "accusation", "it is of nobody's part in our chain")
                return
        except FalseAccusation as error:
            with contextlib.suppress(TimeoutError, ConnectionError, SwarmError):  # blamed though it hangs up
                await self._streams.write(peer, writer, TAKEN)
            raise RemoteProtocolError("accusation", str(error)) from None
        await self._streams.write(peer, writer, TAKEN)

    async def _prove(self, proof: Accusation | DoubleVote) -> None:
        """Raises FalseAccusation."""
        count, mean_digest = len(self._averaging.shards), self._averaging.mean_digest
        await self._loop.compute(prove, proof, self._run_id, count, mean_digest, self._crypto)
