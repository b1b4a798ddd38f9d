"""Applicants: what they are told, what of them is remembered, and how an invitation admits."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import Any

import msgpack
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from tapestry.dht.identity import Identity
from tapestry.node.errors import UserError
from tapestry.node.lineage.crypto import NodeCrypto
from tapestry.node.net.admission import APPLICANT_S, APPLICANTS_MAX, Reception, who_admits
from tapestry.node.net.wire import FRAME, RemoteProtocolError, frame_parts
from tapestry.node.protocol.members import (
    Change,
    Charter,
    Roll,
    change_message,
    change_to_list,
    changes_fault,
    first_roll,
    invite_value,
)
from tapestry.node.spec.invitation import Invitation, read_invitation

RUN = "ab" * 32
ADDRESS = "/ip4/127.0.0.1/tcp/1/p2p/12D3KooWMe"


def key(number: int) -> Identity:
    return Identity(Ed25519PrivateKey.from_private_bytes(bytes([number]) * 32))


FOUNDER, GUEST = key(1), key(2)
CRYPTO = NodeCrypto(FOUNDER)


class FakeWriter:
    """Keeps the answers."""

    def __init__(self) -> None:
        self.data = bytearray()

    def is_closing(self) -> bool:
        return False

    def write(self, data: Any) -> None:
        self.data += data

    async def drain(self) -> None: ...

    def answers(self) -> list[dict[str, Any]]:
        found, at = [], 0
        while at < len(self.data):
            size, _ = FRAME.unpack_from(self.data, at)
            found.append(msgpack.unpackb(self.data[at + FRAME.size : at + FRAME.size + size]))
            at += FRAME.size + size
        return found


class Office:
    """A reception and what it is given."""

    def __init__(self, roll: Roll | None = None) -> None:
        self.roll = roll or first_roll(RUN, Charter(), [FOUNDER.peer_id])
        self.now = 1000.0
        self.submitted: list[Change] = []
        self.coming: tuple[str, ...] = ()
        self.reception = Reception(lambda: self.roll, self.submit, lambda: self.coming, lambda: self.now)

    def submit(self, change: Change) -> str:
        self.submitted.append(change)
        return ""

    def ask(self, peer: str, name: str = "", admission: Change | None = None) -> dict[str, Any]:
        raw = change_to_list(admission) if admission is not None else None
        return self.say(peer, {"ask": "admission", "name": name, "admission": raw})

    def say(self, peer: str, question: object) -> dict[str, Any]:
        async def main() -> dict[str, Any]:
            reader, writer = asyncio.StreamReader(), FakeWriter()
            reader.feed_data(b"".join(frame_parts(msgpack.packb(question))))
            reader.feed_eof()
            await self.reception.serve(peer, reader, writer)  # type: ignore[arg-type]
            (answer,) = writer.answers()
            return answer

        return asyncio.run(main())

    def applied(self, change: Change, by: Identity | None = None) -> None:
        """The next record has it."""
        if by is not None:
            change = change.signed(by.peer_id, by.sign(change_message(RUN, change)).hex())
        named = list(self.roll.members)
        assert changes_fault(self.roll, 1, [change], named, CRYPTO) is None
        self.roll = self.roll.after(1, [change], [(p, 1) for p in named])


def invited(office: Office, uses: int = 1, expires_at: int = 0) -> Invitation:
    invitation = Invitation.drawn(ADDRESS, RUN)
    value = invite_value("Gast", uses, expires_at)
    office.applied(Change("invite", invitation.key, value, 9, "cd" * 16), FOUNDER)
    return invitation


def test_who_is_no_member_is_told_who_admits_and_is_remembered_until_it_is_one() -> None:
    office = Office()
    answer = office.ask(GUEST.peer_id, "Oma\n")
    assert answer == {"is": "applicant", "by": FOUNDER.peer_id, "why": ""}
    assert [(a.peer, a.name) for a in office.reception.applicants] == [(GUEST.peer_id, "Oma")]
    office.applied(Change("admit", GUEST.peer_id, "", 9, "ef" * 16), FOUNDER)
    assert office.ask(GUEST.peer_id)["is"] == "member"
    assert office.reception.applicants == ()


def test_who_was_removed_is_told_why() -> None:
    office = Office(first_roll(RUN, Charter(), [FOUNDER.peer_id, GUEST.peer_id]))
    office.applied(Change("remove", GUEST.peer_id, "sent noise", 9, "ef" * 16), FOUNDER)
    assert office.ask(GUEST.peer_id) == {"is": "removed", "by": "", "why": "sent noise"}


def test_an_invitation_admits_its_guest_once_and_nobody_else() -> None:
    office = Office()
    invitation = read_invitation(invited(office).line)
    assert invitation is not None and invitation.run_id == RUN and invitation.address == ADDRESS
    admission = invitation.admission(GUEST.peer_id, "me", 0)
    with pytest.raises(RemoteProtocolError):
        office.ask(key(3).peer_id, "", admission)  # another's admission
    assert "next record" in office.ask(GUEST.peer_id, "", admission)["why"]
    assert office.submitted == [admission]
    office.applied(admission)
    assert office.roll.members[GUEST.peer_id].name == "Gast"
    late = invitation.admission(key(3).peer_id, "", 0)
    assert "used up" in office.ask(key(3).peer_id, "", late)["why"]
    assert changes_fault(office.roll, 2, [late], list(office.roll.members), CRYPTO) == "unsigned_change"


def test_an_invitation_that_no_record_has_yet_is_said_to_be_on_its_way() -> None:
    office = Office()
    invitation = Invitation.drawn(ADDRESS, RUN)
    admission = invitation.admission(GUEST.peer_id, "", 0)
    assert "is not known here" in office.ask(GUEST.peer_id, "", admission)["why"]
    office.coming = (invitation.key,)
    assert "holds from the next record on" in office.ask(GUEST.peer_id, "", admission)["why"]
    assert office.submitted == []


def test_an_invitation_expires() -> None:
    office = Office()
    invitation = invited(office, expires_at=1100)
    office.now = 1101.0
    assert "expired" in office.ask(GUEST.peer_id, "", invitation.admission(GUEST.peer_id, "", 0))["why"]
    assert office.submitted == []


@pytest.mark.parametrize("cut", [1, 20, 43])
def test_a_line_that_was_cut_is_no_invitation(cut: int) -> None:
    line = Invitation.drawn(ADDRESS, RUN).line
    with pytest.raises(UserError, match="not whole"):
        read_invitation(line[:-cut])
    assert read_invitation(ADDRESS) is None


def test_a_flood_of_applicants_is_bounded_and_who_asked_last_is_shown() -> None:
    office = Office()
    for number in range(3 * APPLICANTS_MAX):
        office.ask(f"stranger{number}")
    office.ask(GUEST.peer_id, "Oma")
    shown = office.reception.applicants
    assert len(shown) == APPLICANTS_MAX and shown[0].peer == GUEST.peer_id
    office.now += APPLICANT_S + 1
    assert office.reception.applicants == ()


@pytest.mark.parametrize(
    "question",
    [{}, {"ask": "state"}, {"ask": "admission", "name": 3, "admission": None}, {"ask": "admission"}],
)
def test_other_questions_are_refused(question: dict[str, Any]) -> None:
    with pytest.raises(RemoteProtocolError):
        Office().say(GUEST.peer_id, question)


def test_a_council_is_named_with_how_many_it_takes() -> None:
    roll = first_roll(RUN, Charter(admit_by="council 2/3"), ["a", "b", "c"])
    assert who_admits(roll) == "2 of a, b, c"
    seats = {peer: replace(seat, name=peer.upper()) for peer, seat in roll.members.items()}
    assert who_admits(replace(roll, members=seats)) == "2 of A, B, C"
