"""Applicants: what they are told, what of them is remembered, and how an invitation admits."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgpack
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from tapestry.dht import control as control_module
from tapestry.dht.addresses import PeerAddress, parse_peer
from tapestry.dht.identity import Identity
from tapestry.dht.p2pd import SwarmError
from tapestry.dht.presence import Presence
from tapestry.node.daemon.admitted import TURN_ANSWERS, be_admitted
from tapestry.node.errors import ExitCode, UserError
from tapestry.node.home import Home
from tapestry.node.lineage.crypto import NodeCrypto
from tapestry.node.net import admission as protocol
from tapestry.node.net.admission import (
    APPLICANT_S,
    APPLICANTS_MAX,
    STREAMS_MAX,
    TAKEN,
    Reception,
    who_admits,
)
from tapestry.node.net.known_peers import KnownPeers
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
from tapestry.node.protocol.waits import Wait
from tapestry.node.spec.invitation import ADMIT_WITHIN_EPOCHS, Invitation, read_invitation
from tapestry.node.spec.node import NodeConfig

RUN = "ab" * 32
ADDRESS = "/ip4/127.0.0.1/tcp/1/p2p/12D3KooWMe"


def key(number: int) -> Identity:
    return Identity(Ed25519PrivateKey.from_private_bytes(bytes([number]) * 32))


FOUNDER, GUEST = key(1), key(2)
THERE = f"/ip4/127.0.0.1/tcp/1/p2p/{FOUNDER.peer_id}"
_KINDS = (("admit", "a"), ("remove", "b"))
CRYPTO = NodeCrypto(FOUNDER)


class FakeWriter:
    """Keeps the answers."""

    def __init__(self) -> None:
        self.data = bytearray()
        self.reader = asyncio.StreamReader()
        self.to: asyncio.StreamReader | None = None  # at the other end

    def is_closing(self) -> bool:
        return False

    def write(self, data: Any) -> None:
        self.data += data
        if self.to is not None:
            self.to.feed_data(data)

    async def drain(self) -> None: ...

    def close(self) -> None:
        """What asyncio does when a stream is closed: the reader is at its end."""
        self.reader.feed_eof()

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
        self.epoch = 0
        self.submitted: list[Change] = []
        self.coming: tuple[str, ...] = ()
        self.reception = Reception(
            lambda: self.roll, lambda: self.epoch, self.submit, lambda: self.coming, lambda: self.now
        )

    def submit(self, change: Change) -> str:
        self.submitted.append(change)
        return ""

    def ask(self, peer: str, name: str = "", admission: Change | None = None) -> dict[str, Any]:
        raw = change_to_list(admission) if admission is not None else None
        return self.say(peer, {"ask": "admission", "name": name, "admission": raw})

    def say(self, peer: str, question: object) -> dict[str, Any]:
        async def main() -> dict[str, Any]:
            writer = FakeWriter()
            writer.reader.feed_data(b"".join(frame_parts(msgpack.packb(question))))
            writer.reader.feed_eof()
            await self.reception.serve(peer, writer.reader, writer)  # type: ignore[arg-type]
            (answer,) = writer.answers()
            assert answer.pop("epoch") == self.epoch
            return answer

        return asyncio.run(main())

    def applied(self, change: Change, by: Identity | None = None) -> None:
        """The next record has it."""
        epoch = self.epoch + 1
        if by is not None:
            change = change.signed(by.peer_id, by.sign(change_message(RUN, change)).hex())
        named = list(self.roll.members)
        assert changes_fault(self.roll, epoch, [change], named, CRYPTO) is None
        self.roll = self.roll.after(epoch, "", [change], [(p, 1) for p in named])


class FakeSwarm:
    """A guest's, in which an office answers."""

    peer_id = GUEST.peer_id

    def __init__(self, office: Office) -> None:
        self._office = office
        self._serving: list[asyncio.Task[None]] = []

    async def connect(self, *_: object) -> None: ...

    async def open_stream(self, *_: object) -> tuple[asyncio.StreamReader, FakeWriter]:
        ours, theirs = FakeWriter(), FakeWriter()
        ours.to, theirs.to = theirs.reader, ours.reader
        serving = self._office.reception.serve(self.peer_id, theirs.reader, theirs)  # type: ignore[arg-type]
        self._serving.append(asyncio.create_task(serving))
        return ours.reader, ours


def invited(office: Office, uses: int = 1, expires_at: int = 0) -> Invitation:
    invitation = Invitation.drawn(ADDRESS, RUN)
    value = invite_value("Gast", uses, expires_at)
    office.applied(Change("invite", invitation.key, value, office.epoch + 9, "cd" * 16), FOUNDER)
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


def test_a_guest_that_knows_no_record_is_admitted_to_a_run_of_any_age(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(protocol, "ASK_AGAIN_S", 0.0)
    monkeypatch.setattr(protocol, "PACE_S", 0.0)
    office = Office()
    office.epoch = 3 * ADMIT_WITHIN_EPOCHS
    line = Invitation.drawn(f"/ip4/127.0.0.1/tcp/1/p2p/{FOUNDER.peer_id}", RUN)
    value = invite_value("Gast", 1, 0)
    office.applied(Change("invite", line.key, value, office.epoch + 9, "cd" * 16), FOUNDER)
    told: list[str] = []

    def say(wait: Wait) -> None:
        assert wait.kind == "admission" and wait.ends.startswith("ends by itself"), "nobody is to admit it"
        if wait.what not in told:
            told.append(wait.what)
            office.applied(office.submitted[0])

    async def main() -> None:
        config = NodeConfig.resolve(Home(tmp_path), {"peers": (line.line,), "external": True}, {})
        peers = [parse_peer(peer) for peer in config.peers]
        async with asyncio.timeout(10.0):
            await be_admitted(config, office.roll, FakeSwarm(office), peers, say)  # type: ignore[arg-type]

    asyncio.run(main())
    assert len(told) == 1 and TAKEN in told[0] and GUEST.peer_id in office.roll.members


class Unreachable:
    """A swarm in which nobody is."""

    peer_id = GUEST.peer_id

    async def connect(self, *_: object) -> None:
        raise SwarmError("nobody there")


def _start(home: Path, records: Office, swarm: object, peers: Sequence[str] = (), waits: bool = True) -> None:
    """Of the guest's node, by these records and with what its home knows."""

    async def main() -> None:
        config = replace(NodeConfig.resolve(Home(home), {"external": True}, {}), waits=waits)
        async with asyncio.timeout(10.0):
            await be_admitted(config, records.roll, swarm, [*map(parse_peer, peers)], lambda reason: None)  # type: ignore[arg-type]

    asyncio.run(main())


@pytest.mark.parametrize("peers", [(), (THERE,)], ids=["known", "given"])
def test_who_was_removed_and_admitted_again_asks_before_it_believes_its_own_records(
    tmp_path: Path, peers: Sequence[str]
) -> None:
    """They end with the removal, which it heard of; what came after that only the others know."""
    office = Office()
    admission, removal = (Change(kind, GUEST.peer_id, "noise", 9, n * 32) for kind, n in _KINDS)
    KnownPeers(Home(tmp_path).peers).remember({FOUNDER.peer_id: (THERE,)})
    office.applied(admission, FOUNDER)
    office.applied(removal, FOUNDER)
    stale = Office(office.roll)
    with pytest.raises(UserError, match="was removed from the run: noise"):
        _start(tmp_path, stale, FakeSwarm(office), peers)
    office.applied(replace(admission, nonce="c" * 32), FOUNDER)
    _start(tmp_path, stale, FakeSwarm(office), peers)
    with pytest.raises(UserError, match="was removed from the run: noise"):
        _start(tmp_path, stale, Unreachable(), peers)


class Shown(FakeSwarm):
    """A guest's, whose given peer keeps the DHT and knows no run; in the DHT are these."""

    def __init__(self, office: Office, shown: Sequence[PeerAddress]) -> None:
        super().__init__(office)
        self._shown = shown
        self.opened: list[str] = []

    async def join_dht(self, *_: object) -> None: ...

    async def list_presence(self, now: float) -> list[Presence]:
        return [
            Presence(RUN, one.peer_id, 0, RUN, "training", (one.maddr,), now, now + 60) for one in self._shown
        ]

    async def open_stream(self, peer: str, *_: object) -> tuple[asyncio.StreamReader, FakeWriter]:  # type: ignore[override]
        self.opened.append(peer)
        if peer == OTHER.peer_id:
            raise control_module.Unreachable("unsupported", "the peer does not serve this protocol")
        return await super().open_stream()


def test_a_guest_whose_peer_only_keeps_the_dht_asks_the_members_that_it_shows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not the others whom it shows: what a stranger says of members would be believed."""
    monkeypatch.setattr(protocol, "PACE_S", 0.0)
    office, stranger = Office(), THERE.replace(FOUNDER.peer_id, key(4).peer_id)
    swarm = Shown(office, [parse_peer(stranger), parse_peer(THERE)])
    with pytest.raises(UserError, match=r"not admitted yet: .* admits; your id is"):
        _start(tmp_path, Office(), swarm, [ELSEWHERE], waits=False)
    assert swarm.opened == [OTHER.peer_id, OTHER.peer_id, FOUNDER.peer_id]
    office.applied(Change("admit", GUEST.peer_id, "", 9, "ef" * 16), FOUNDER)
    _start(tmp_path, Office(), swarm, [ELSEWHERE])
    with pytest.raises(UserError, match=r"no peer could be asked for admission: .* does not serve"):
        _start(tmp_path, Office(), Shown(office, [parse_peer(stranger)]), [ELSEWHERE])


class Several(FakeSwarm):
    """A guest's, in which several offices answer; `asked` says which, in order."""

    def __init__(self, offices: dict[str, Office]) -> None:
        self._offices = offices
        self._serving = []
        self.asked: list[str] = []

    async def open_stream(self, peer: str, *_: object) -> tuple[asyncio.StreamReader, FakeWriter]:  # type: ignore[override]
        self.asked.append(peer)
        self._office = self._offices[peer]
        return await super().open_stream()


OTHER = key(3)
ELSEWHERE = f"/ip4/127.0.0.1/tcp/2/p2p/{OTHER.peer_id}"


def test_that_it_was_removed_is_believed_only_if_all_say_so_that_answer(tmp_path: Path) -> None:
    """Who is asked first may be behind, or removed itself."""
    behind = Office()
    admission, removal = (Change(kind, GUEST.peer_id, "noise", 9, n * 32) for kind, n in _KINDS)
    behind.applied(admission, FOUNDER)
    behind.applied(removal, FOUNDER)
    office = Office(behind.roll)
    swarm = Several({OTHER.peer_id: behind, FOUNDER.peer_id: office})
    with pytest.raises(UserError, match="was removed from the run: noise") as caught:
        _start(tmp_path, Office(behind.roll), swarm, [ELSEWHERE, THERE])
    assert caught.value.exit_code == ExitCode.REFUSED
    assert swarm.asked == [OTHER.peer_id, FOUNDER.peer_id]
    office.applied(replace(admission, nonce="c" * 32), FOUNDER)
    _start(tmp_path, Office(behind.roll), swarm, [ELSEWHERE, THERE])


@pytest.mark.parametrize("waits", [True, False], ids=["waits", "no-wait"])
def test_who_waits_at_a_peer_that_gets_no_records_asks_the_others_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, waits: bool
) -> None:
    monkeypatch.setattr(protocol, "ASK_AGAIN_S", 0.01)
    monkeypatch.setattr(protocol, "PACE_S", 0.0)
    island, office = Office(), Office()
    swarm = Several({OTHER.peer_id: island, FOUNDER.peer_id: office})
    office.applied(Change("admit", GUEST.peer_id, "", 9, "ef" * 16), FOUNDER)
    _start(tmp_path, Office(), swarm, [ELSEWHERE, THERE], waits)
    assert swarm.asked == [OTHER.peer_id, FOUNDER.peer_id]


def test_without_waiting_it_ends_once_all_were_asked(tmp_path: Path) -> None:
    swarm = Several({OTHER.peer_id: Office(), FOUNDER.peer_id: Office()})
    with pytest.raises(UserError, match=r"not admitted yet: .* admits; your id is") as caught:
        _start(tmp_path, Office(), swarm, [ELSEWHERE, THERE], waits=False)
    assert caught.value.exit_code == ExitCode.REFUSED
    assert swarm.asked == [OTHER.peer_id, FOUNDER.peer_id]


def test_a_sole_peer_is_asked_on_one_stream(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its other addresses are no others: a second stream would be refused there."""
    monkeypatch.setattr(protocol, "ASK_AGAIN_S", 0.0)
    monkeypatch.setattr(protocol, "PACE_S", 0.0)
    office = Office()
    swarm = Several({FOUNDER.peer_id: office})
    answers = 0

    def epoch() -> int:
        nonlocal answers
        answers += 1
        if answers == 3 * TURN_ANSWERS:
            office.applied(Change("admit", GUEST.peer_id, "", 9, "ef" * 16), FOUNDER)
        return office.epoch

    office.reception = Reception(lambda: office.roll, epoch, office.submit)
    _start(tmp_path, Office(), swarm, [THERE, THERE.replace("tcp/1", "tcp/7")])
    assert swarm.asked == [FOUNDER.peer_id]


def test_who_is_no_member_and_knows_nobody_is_told_to_name_one(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no member of the run"):
        _start(tmp_path, Office(), Unreachable())


def test_a_member_that_knows_no_address_of_another_is_told_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def said(members: Sequence[str] = (FOUNDER.peer_id, GUEST.peer_id), **flags: object) -> list[str]:
        office = Office(first_roll(RUN, Charter(), members))
        config = NodeConfig.resolve(Home(tmp_path), {"external": True, **flags}, {})
        caplog.clear()
        asyncio.run(be_admitted(config, office.roll, FakeSwarm(office), (), lambda wait: None))  # type: ignore[arg-type]
        return [record.getMessage().partition(" ")[0] for record in caplog.records]

    assert said() == ["others=unknown"]
    assert said(members=[GUEST.peer_id]) == said(island=True) == said(peers=(THERE,)) == []
    Home(tmp_path).peers.write_text(json.dumps({FOUNDER.peer_id: [THERE]}))
    assert said() == []


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


def test_a_flood_of_applicants_is_bounded_and_who_asked_last_is_shown(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(protocol, "PACE_S", 0.0)
    office = Office()
    for number in range(3 * APPLICANTS_MAX):
        office.ask(f"stranger{number}")
    office.ask(GUEST.peer_id, "Oma")
    shown = office.reception.applicants
    assert len(shown) == APPLICANTS_MAX and shown[0].peer == GUEST.peer_id
    office.now += APPLICANT_S + 1
    assert office.reception.applicants == ()


def test_who_holds_all_streams_keeps_nobody_from_being_answered() -> None:
    office = Office()

    async def main() -> None:
        async with asyncio.TaskGroup() as tasks:
            silent = []
            for number in range(2 * STREAMS_MAX):
                silent.append(FakeWriter())
                serving = office.reception.serve(f"stranger{number}", silent[-1].reader, silent[-1])  # type: ignore[arg-type]
                tasks.create_task(serving)
            await asyncio.sleep(0)
            guest = FakeWriter()
            question = {"ask": "admission", "name": "Oma", "admission": None}
            guest.reader.feed_data(b"".join(frame_parts(msgpack.packb(question))))
            guest.reader.feed_eof()
            await office.reception.serve(GUEST.peer_id, guest.reader, guest)  # type: ignore[arg-type]
            assert [answer["is"] for answer in guest.answers()] == ["applicant"]
            assert sum(not writer.reader.at_eof() for writer in silent) < STREAMS_MAX
            for writer in silent:
                writer.close()

    asyncio.run(main())


def test_questions_that_come_without_a_pause_are_answered_at_a_pace() -> None:
    office = Office()

    async def main() -> int:
        flood = FakeWriter()
        question = {"ask": "admission", "name": "Oma", "admission": None}
        flood.reader.feed_data(100 * b"".join(frame_parts(msgpack.packb(question))))
        serving = asyncio.create_task(office.reception.serve(GUEST.peer_id, flood.reader, flood))  # type: ignore[arg-type]
        for _ in range(50):
            await asyncio.sleep(0)
        serving.cancel()
        return len(flood.answers())

    assert asyncio.run(main()) == 1


def test_a_member_that_drips_its_answer_is_left_for_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each byte had ten seconds of its own: eleven hours for an answer."""
    monkeypatch.setattr(protocol, "SILENCE_S", 0.05)
    monkeypatch.setattr(protocol, "BYTES_PER_SECOND_MIN", 1 << 20)

    async def drip(reader: asyncio.StreamReader) -> None:
        reader.feed_data(FRAME.pack(protocol.ANSWER_BYTES_MAX, 0))
        while True:
            reader.feed_data(b"\0")
            await asyncio.sleep(0.01)

    async def main() -> None:
        writer, began_at = FakeWriter(), asyncio.get_running_loop().time()

        async def open_stream() -> Any:
            return writer.reader, writer

        dripping = asyncio.create_task(drip(writer.reader))
        try:
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(protocol.ask_once(open_stream, "Oma"), 3.0)
            assert asyncio.get_running_loop().time() - began_at < 2.0
        finally:
            dripping.cancel()

    asyncio.run(main())


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
