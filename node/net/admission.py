"""How somebody becomes a member: an applicant asks, a member answers, until a record has admitted it.

An applicant reaches the run by two streams, this one and that of the genesis, and by nothing else. It opens
this stream to a member, asks, and asks again every ASK_AGAIN_S on the same stream. Who has an invitation asks
without it first: an admission is for records around one epoch, and who knows none is told where the run is.

    {"ask": "admission", "name": NAME, "admission": CHANGE or None}    CHANGE: signed with an invitation's key
    {"is": "member", ...}                            it may begin
    {"is": "applicant", "by": WHO ADMITS, "why": WHAT IS WRONG WITH ITS INVITATION or "", "epoch": EPOCH}
    {"is": "removed", "why": WHY, ...}

A member remembers APPLICANTS_MAX of them, those who asked last: who floods it is shown instead of others, and
hides nobody from `tapestry admit`, which takes the id that the applicant was told. It serves STREAMS_MAX at
once: for who comes then, the stream that was opened first is closed. So nobody holds the others up, and an
applicant that loses its stream has had its answer and comes again.

Imports net/wire.py's frames and asyncio; no hivemind. What opens streams is given.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import msgpack

from tapestry.node.errors import printable
from tapestry.node.net.throttle import Throttle
from tapestry.node.net.wire import (
    FrameLimits,
    RemoteProtocolError,
    StreamEnded,
    WriteLimits,
    frame_parts,
    read_frame,
    unpack,
    write_frame,
)
from tapestry.node.protocol import strict
from tapestry.node.protocol.canon import EPOCH_MAX
from tapestry.node.protocol.members import (
    NAME_CHARS_MAX,
    WHY_CHARS_MAX,
    Change,
    Roll,
    change_from,
    change_to_list,
    has_expired,
    needed,
)

ASK_AGAIN_S = 1.0
QUESTION_BYTES_MAX = 4096
ANSWER_BYTES_MAX = 4096
TAKEN = "the invitation is good: admitted with the next record"
COMING = "the invitation holds from the next record on"
SILENCE_S = 10.0  # Guess: between two questions, and for an answer
BYTES_PER_SECOND_MIN = 1024  # of a question or an answer that has begun; as links.py
APPLICANTS_MAX = 64  # remembered. G7
STREAMS_MAX = 32  # Guess: served at once
PACE_S = 0.1  # Guess: after an answer, before the next question on that stream is read
APPLICANT_S = 600.0  # Guess: after so long without a question it is forgotten

Streams = tuple[asyncio.StreamReader, asyncio.StreamWriter]


def admission_protocol(run_id: str) -> str:
    return f"/tapestry/{run_id}/admission/1"


@dataclass(frozen=True, slots=True)
class Applicant:
    """Who waits."""

    peer: str
    name: str  # that it gives itself
    since: float  # Unix time
    seen_at: float  # Unix time


@dataclass(frozen=True, slots=True)
class Answer:
    """What a member says to an applicant."""

    standing: str  # member | applicant | removed
    by: str = ""  # applicant: who admits
    why: str = ""  # removed: the reason; applicant: what is wrong with its invitation
    epoch: int = field(
        default=0, compare=False
    )  # of the newest record there; each changes it, and says nothing


class Reception:
    """A member's side: who waits, and what they are told."""

    def __init__(
        self,
        roll: Callable[[], Roll],
        epoch: Callable[[], int],
        submit: Callable[[Change], str],
        coming: Callable[[], Iterable[str]] = tuple,  # keys of invitations that wait for a record
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._roll = roll
        self._epoch = epoch  # of our newest record
        self._submit = submit  # a change to the core; returns what is wrong with it, or ""
        self._coming = coming
        self._clock = clock
        self._applicants: dict[str, Applicant] = {}  # the one that asked last is the last
        self._serving: dict[str, asyncio.StreamWriter] = {}  # whose stream was opened first is the first

    @property
    def applicants(self) -> tuple[Applicant, ...]:
        """Who waits now, those first who asked last."""
        roll, now = self._roll(), self._clock()
        for peer, applicant in list(self._applicants.items()):
            if peer in roll.members or now - applicant.seen_at > APPLICANT_S:
                del self._applicants[peer]
        return tuple(reversed(self._applicants.values()))

    async def serve(self, peer: str, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Answer until the peer is done. Raises RemoteProtocolError, StreamEnded, TimeoutError, OSError."""
        if peer in self._serving:
            raise RemoteProtocolError("streams", "more than one stream to ask for admission")
        if len(self._serving) >= STREAMS_MAX:
            self._serving.pop(next(iter(self._serving))).close()
        self._serving[peer] = writer
        try:
            while True:
                answer = self._answer(peer, await _receive(reader, QUESTION_BYTES_MAX))
                fields = {"is": answer.standing, "by": answer.by, "why": answer.why}
                await _send(writer, fields | {"epoch": self._epoch()})
                await asyncio.sleep(PACE_S)
        except StreamEnded as ended:
            if not ended.clean:
                raise
        finally:
            if self._serving.get(peer) is writer:
                del self._serving[peer]

    def _answer(self, peer: str, question: dict[str, Any]) -> Answer:
        """Raises RemoteProtocolError."""
        try:
            fields = strict.table(question, ("ask", "name", "admission"), "a question")
            name = printable(strict.text(fields["name"], NAME_CHARS_MAX, "name"))
            change = None if fields["admission"] is None else change_from(fields["admission"])
            if fields["ask"] != "admission" or (change and (change.kind, change.peer) != ("admit", peer)):
                raise strict.Malformed("no question of an applicant")
        except strict.Malformed as error:
            raise RemoteProtocolError("malformed", str(error)) from None
        roll = self._roll()
        if roll.may_contribute(peer):
            return Answer("member")
        if peer in roll.removed:  # no invitation is enough: see members.admits_guest
            return Answer("removed", why=roll.removed[peer])
        why = self._take(roll, change) or TAKEN if change is not None else ""
        self._remember(peer, name)
        return Answer("applicant", who_admits(roll), why)

    def _take(self, roll: Roll, change: Change) -> str:
        """An admission by invitation. Returns what is wrong with it, or ""."""
        invites = [roll.invites[key] for key, _ in change.signatures if key in roll.invites]
        if not invites and any(key in self._coming() for key, _ in change.signatures):
            return COMING
        if not invites:
            return "the invitation is not known here: it was used up, has expired, or was taken back"
        if all(has_expired(invite.expires_at, self._clock()) for invite in invites):
            return "the invitation has expired"
        return self._submit(change)

    def _remember(self, peer: str, name: str) -> None:
        now = self._clock()
        known = self._applicants.pop(peer, None)
        if len(self._applicants) >= APPLICANTS_MAX:
            del self._applicants[next(iter(self._applicants))]
        self._applicants[peer] = Applicant(peer, name, known.since if known is not None else now, now)


def who_admits(roll: Roll) -> str:
    """For people: those whose signatures admit, and how many of them it takes."""
    deciders = sorted(roll.members) if roll.charter.admit_by == "majority" else list(roll.council)
    names = [roll.members[p].name or p for p in deciders if p in roll.members]
    shown = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
    return shown if len(names) == 1 else f"{needed(roll)} of {shown}"


# --- the applicant ----------------------------------------------------------------------------------


async def ask_until_member(
    open_stream: Callable[[], Awaitable[Streams]],
    name: str,
    admission: Callable[[int], Change | None],  # by invitation, in a run at that epoch
    heard: Callable[[Answer], None],
) -> None:
    """Ask over one stream until the answer is `member`; `heard` is told of every other, and may raise.

    Raises RemoteProtocolError, StreamEnded, TimeoutError, OSError, and what opening raises.
    """
    reader, writer = await open_stream()
    brought: Change | None = None
    try:
        while True:
            answer = await _ask(reader, writer, name, brought)
            if answer.standing == "member":
                return
            had, brought = brought, admission(answer.epoch)
            if had is None and brought is not None:
                continue
            heard(answer)
            await asyncio.sleep(ASK_AGAIN_S)
    finally:
        writer.close()


async def ask_once(open_stream: Callable[[], Awaitable[Streams]], name: str) -> Answer:
    """What a member says of us, without an invitation. Raises as `ask_until_member`."""
    reader, writer = await open_stream()
    try:
        return await _ask(reader, writer, name, None)
    finally:
        writer.close()


async def _ask(
    reader: asyncio.StreamReader, writer: asyncio.StreamWriter, name: str, brought: Change | None
) -> Answer:
    raw = change_to_list(brought) if brought is not None else None
    await _send(writer, {"ask": "admission", "name": name, "admission": raw})
    return _answer_of(await _receive(reader, ANSWER_BYTES_MAX))


def _answer_of(raw: dict[str, Any]) -> Answer:
    try:
        fields = strict.table(raw, ("is", "by", "why", "epoch"), "an answer")
        standing = strict.text(fields["is"], 16, "is")
        if standing not in ("member", "applicant", "removed"):
            raise strict.Malformed("no answer to an applicant")
        epoch = strict.integer(fields["epoch"], 0, EPOCH_MAX, "epoch")
        by, why = (printable(strict.text(fields[key], 4 * WHY_CHARS_MAX, key)) for key in ("by", "why"))
    except strict.Malformed as error:
        raise RemoteProtocolError("malformed", str(error)) from None
    return Answer(standing, by, why, epoch)


async def _receive(reader: asyncio.StreamReader, bytes_max: int) -> dict[str, Any]:
    limits = FrameLimits(bytes_max, 0, BYTES_PER_SECOND_MIN)
    header, _ = await read_frame(reader, limits, start_s=SILENCE_S, silence_s=SILENCE_S)
    fields = unpack(header)
    if type(fields) is not dict:
        raise RemoteProtocolError("malformed", "a header that is not a map")
    return fields


async def _send(writer: asyncio.StreamWriter, header: dict[str, Any]) -> None:
    limits = WriteLimits(Throttle(None), waits=False, patience_s=SILENCE_S)
    await write_frame(writer, frame_parts(msgpack.packb(header)), limits, lambda count: None)
