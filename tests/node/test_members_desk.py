"""What the operator's commands are told that would do harm, or nothing."""

from __future__ import annotations

import json
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from schemas import faults, load

from tapestry.dht.identity import Identity
from tapestry.node.daemon.members_desk import (
    EXPIRED,
    LAST_AUTHORITY,
    NOT_HELD,
    TAKEN_BACK_MAX,
    TOO_MANY,
    MembersDesk,
)
from tapestry.node.lineage.crypto import NodeCrypto
from tapestry.node.protocol.members import (
    Change,
    Charter,
    Invite,
    change_id,
    change_message,
    first_roll,
    invite_value,
    rollback_value,
)
from tapestry.node.protocol.proposals import OF_ONE_MAX, Proposals
from tapestry.node.protocol.settings import Settings
from tapestry.node.protocol.snapshot import Membership
from tapestry.node.protocol.strict import Malformed
from tapestry.node.spec.run import RunSpec, why_no_change

RUN = "ab" * 32
INVITE = "cd" * 26  # an invitation's key
FOUNDER, OTHER, THIRD = (
    Identity(Ed25519PrivateKey.from_private_bytes(bytes([number]) * 32)) for number in (1, 2, 3)
)


class FakeLoop:
    def __init__(self, charter: Charter, me: Identity = FOUNDER) -> None:
        self.me = me
        self.fed: list[Any] = []
        self.snapshots = 0
        peers = [FOUNDER.peer_id, OTHER.peer_id]
        self._roll = replace(first_roll(RUN, charter, peers), council=(FOUNDER.peer_id,))
        self._pool = Proposals()

    def snapshot(self) -> Any:
        self.snapshots += 1
        return SimpleNamespace(roll=self._roll, chain_epoch=5, pending=(), run_id=RUN)

    def membership(self) -> Membership:
        return Membership(5, self._roll, tuple(self._pool.pending.values()))

    def feed(self, event: Any) -> None:
        self.fed.append(event)
        change, crypto = event.change, NodeCrypto(self.me)
        if event.sign:
            change = change.signed(self.me.peer_id, crypto.sign(change_message(RUN, change)))
        self._pool.add(self._roll, 6, change, crypto)


def asked(
    kind: str, peer: str, value: str = "", charter: Charter | None = None, no_effect: str = ""
) -> tuple[dict[str, Any], int]:
    """The answer, and how many changes the node then asks for."""
    loop = FakeLoop(charter or Charter())
    desk = MembersDesk(loop, FOUNDER.peer_id, NodeCrypto(FOUNDER), (), lambda settings, key: no_effect)  # type: ignore[arg-type]
    return desk.do({"do": "ask", "kind": kind, "peer": peer, "value": value}), len(loop.fed)


def test_a_stranger_that_comes_and_asks_costs_no_look_at_the_round() -> None:
    """A snapshot in an exchange goes through all shards: 15 ms at 7 billion parameters, for every stream."""
    loop = FakeLoop(Charter())
    desk = MembersDesk(loop, FOUNDER.peer_id, NodeCrypto(FOUNDER), (), lambda key: "")  # type: ignore[arg-type]
    assert desk.admits(OTHER.peer_id) and desk.is_member(OTHER.peer_id)
    assert not desk.admits(THIRD.peer_id) and not desk.is_member(THIRD.peer_id)
    assert desk.submit(Change("admit", THIRD.peer_id, "", 5, "ab" * 16)) and desk._epoch() == 5
    assert desk._coming() == () and loop.snapshots == 0


def test_the_last_who_decides_does_not_leave_the_others_without_anybody_who_does() -> None:
    assert asked("remove", FOUNDER.peer_id) == ({"fault": LAST_AUTHORITY}, 0)
    assert asked("remove", OTHER.peer_id)[1] == 1
    assert asked("remove", FOUNDER.peer_id, charter=Charter(admit_by="majority"))[1] == 1


def test_who_asks_for_more_than_waits_for_one_record_is_told_so() -> None:
    loop = FakeLoop(Charter())
    desk = MembersDesk(loop, FOUNDER.peer_id, NodeCrypto(FOUNDER), (), lambda settings, key: "")  # type: ignore[arg-type]

    def invite() -> dict[str, Any]:
        key = Identity(Ed25519PrivateKey.generate())
        return desk.do({"do": "ask", "kind": "invite", "peer": key.peer_id, "value": "1 0 guest"})

    assert all("id" in invite() for _ in range(OF_ONE_MAX))
    assert invite() == {"fault": TOO_MANY}

    line = Identity(Ed25519PrivateKey.generate())  # a guest's, whose key has signed as many admissions
    loop._roll = replace(loop._roll, invites={line.peer_id: Invite("", 1000, 0)})
    said = []
    for _ in range(OF_ONE_MAX + 1):
        admission = Change("admit", Identity(Ed25519PrivateKey.generate()).peer_id, "", 9, "ab" * 16)
        signature = NodeCrypto(line).sign(change_message(RUN, admission))
        said.append(desk.submit(admission.signed(line.peer_id, signature)))
    assert said == [""] * OF_ONE_MAX + [TOO_MANY]


def of_invitation(loop: FakeLoop, line: Identity, expires_at: int) -> Change:
    """An admission of somebody by it, as its guest signs it."""
    invites = {**loop._roll.invites, line.peer_id: Invite("", 20, expires_at)}
    loop._roll = replace(loop._roll, invites=invites)
    admission = Change("admit", Identity(Ed25519PrivateKey.generate()).peer_id, "", 9, "ab" * 16)
    return admission.signed(line.peer_id, NodeCrypto(line).sign(change_message(RUN, admission)))


def at_1000_s(loop: FakeLoop, who: Identity) -> MembersDesk:
    return MembersDesk(
        loop,  # type: ignore[arg-type]
        who.peer_id,
        NodeCrypto(who),
        (),
        lambda settings, key: "",
        clock=lambda: 1000.0,
    )


def test_an_admission_that_rests_on_an_expired_invitation_is_not_heard_of_peers() -> None:
    loop = FakeLoop(Charter())
    desk = at_1000_s(loop, FOUNDER)
    late, lasting, eternal = (
        of_invitation(loop, Identity(Ed25519PrivateKey.generate()), until) for until in (999, 1001, 0)
    )
    removal = Change("remove", OTHER.peer_id, "", 9, "cd" * 16)
    assert desk.in_time((late, lasting, eternal, removal)) == (lasting, eternal, removal)
    by_the_founder = late.signed(FOUNDER.peer_id, NodeCrypto(FOUNDER).sign(change_message(RUN, late)))
    assert desk.in_time((by_the_founder,)) == (by_the_founder,), "who may admit needs no invitation"
    loop._pool.add(loop._roll, 6, late, NodeCrypto(FOUNDER))
    assert desk.in_time((late,)) == (late,), "it came in time"


def test_an_invitation_that_has_expired_before_it_was_approved_is_refused() -> None:
    loop = FakeLoop(Charter(admit_by="majority"))
    desk = at_1000_s(loop, FOUNDER)
    said = {}
    for until in (999, 1001, 0):
        line = Identity(Ed25519PrivateKey.generate())
        invite = Change("invite", line.peer_id, invite_value("guest", 1, until), 20, "ab" * 16)
        by_another = NodeCrypto(OTHER).sign(change_message(RUN, invite))
        loop._pool.add(loop._roll, 6, invite.signed(OTHER.peer_id, by_another), NodeCrypto(FOUNDER))
        said[until] = desk.do({"do": "approve", "id": change_id(RUN, invite)})
    assert said[999] == {"fault": EXPIRED}
    assert "id" in said[1001] and "id" in said[0] and len(loop.fed) == 2


def test_who_may_sign_takes_expired_invitations_back_once_and_all_ask_for_the_same() -> None:
    asked_for = []
    for who, charter in ((FOUNDER, Charter()), (OTHER, Charter(admit_by="majority")), (OTHER, Charter())):
        loop = FakeLoop(charter, who)
        desk = at_1000_s(loop, who)
        for number, until in enumerate((999, 1001, 0, 998)):
            of_invitation(
                loop, Identity(Ed25519PrivateKey.from_private_bytes(bytes([9 + number]) * 32)), until
            )
        desk.take_back()
        desk.take_back()
        asked_for.append([one.change for one in loop.fed])
        assert [one.peer for one in asked_for[-1]] in ([], desk._expired())
    assert asked_for[0] == asked_for[1] and [len(one) for one in asked_for] == [2, 2, 0]


def test_many_that_have_expired_leave_room_for_what_the_operator_asks() -> None:
    loop = FakeLoop(Charter())
    desk = at_1000_s(loop, FOUNDER)
    for _ in range(30):
        of_invitation(loop, Identity(Ed25519PrivateKey.generate()), 999)
    desk.take_back()
    assert len(loop.fed) == TAKEN_BACK_MAX
    assert "id" in desk.do({"do": "ask", "kind": "remove", "peer": OTHER.peer_id, "value": ""})


@pytest.mark.parametrize(
    ("kind", "peer", "value"),
    [
        ("admit", THIRD.peer_id[:-1], ""),
        ("admit", "hanoi", ""),
        ("rekey", OTHER.peer_id, THIRD.peer_id[:-2]),
        ("rekey", OTHER.peer_id, ""),
    ],
)
def test_a_mistyped_id_gets_no_seat(kind: str, peer: str, value: str) -> None:
    with pytest.raises(Malformed, match="is no peer id"):
        asked(kind, peer, value)
    assert asked(kind, THIRD.peer_id if kind == "admit" else OTHER.peer_id, THIRD.peer_id)[1] == 1


def test_a_setting_that_would_change_nothing_in_this_run_is_not_asked_for() -> None:
    change = ("set", "", "train.accumulation 4")
    assert asked(*change)[1] == 1
    assert asked(*change, no_effect="this run takes inner steps") == (
        {"fault": "this run takes inner steps"},
        0,
    )


@pytest.mark.parametrize(
    ("value", "fault"),
    [
        ("round.exchange_max_s auto", ""),
        ("audit.share 0.5", ""),
        ("round.min_members 65", "round.min_members: 65 with limits.max_peers = 64; must not be larger"),
        ("train.accumulation 4", "this run takes inner steps: change train.inner_steps"),
    ],
)
def test_a_setting_is_asked_for_only_if_run_toml_could_have_it_so(value: str, fault: str) -> None:
    loop, spec = FakeLoop(Charter()), RunSpec.from_dict({"name": "demo"})
    loop._roll = replace(loop._roll, settings={"round.straggler_wait_s": "auto", "train.batch_size": 2.0})

    def why(settings: Settings, key: str) -> str:
        return why_no_change(spec, settings, key)

    desk = MembersDesk(loop, FOUNDER.peer_id, NodeCrypto(FOUNDER), (), why)  # type: ignore[arg-type]
    answer = desk.do({"do": "ask", "kind": "set", "peer": "", "value": value})
    assert (answer.get("fault", ""), len(loop.fed)) == (fault, 0 if fault else 1)


def test_a_setting_out_of_bounds_is_refused_in_one_line() -> None:
    for value in ("round.wait_max_s 1", "audit.on_lie forgive"):
        with pytest.raises(Malformed, match=r"wait_max_s: 1 is not a number from 60|on_lie: forgive is not"):
            asked("set", "", value)


def test_a_rollback_is_asked_for_only_if_our_own_disk_leads_there() -> None:
    loop = FakeLoop(Charter())
    for epoch in range(1, 6):
        loop._roll = loop._roll.after(epoch, f"{epoch - 1:032x}{0:032x}", [], [])
    held = lambda epoch: f"{epoch:032x}{0:032x}" if epoch in (2, 3, 4, 5) else ""  # noqa: E731
    desk = MembersDesk(
        loop,  # type: ignore[arg-type]
        FOUNDER.peer_id,
        NodeCrypto(FOUNDER),
        (),
        lambda settings, key: "",
        held,
    )

    def ask(value: str) -> str:
        return str(desk.do({"do": "ask", "kind": "rollback", "peer": "", "value": value}).get("fault", ""))

    assert ask("1 bad data") == NOT_HELD.format(epoch=1)
    assert ask("5 bad data") == "nothing has been made of epoch 5 yet"
    assert not loop.fed and ask("2 bad data") == ""
    assert loop.fed[0].change.value == rollback_value(2, f"{2:032x}{0:032x}", "bad data")
    with pytest.raises(Malformed, match="must be a number"):
        ask("two bad data")
    held_no_more = loop.fed[0].change
    loop.membership = lambda: Membership(5, loop._roll, (held_no_more,))  # type: ignore[method-assign]
    desk._held_back_to = lambda epoch: ""
    name = change_id(RUN, held_no_more)
    assert desk.do({"do": "approve", "id": name})["fault"] == NOT_HELD.format(epoch=2)


def test_what_a_proof_asks_for_is_the_same_change_at_everybody() -> None:
    asked_for = []
    for who in (FOUNDER, OTHER):
        loop = FakeLoop(Charter(admit_by="majority"))
        for epoch in range(1, 6):
            loop._roll = loop._roll.after(epoch, f"{epoch - 1:032x}{0:032x}", [], [])
        desk = MembersDesk(
            loop,  # type: ignore[arg-type]
            who.peer_id,
            NodeCrypto(who),
            (),
            lambda settings, key: "",
            lambda epoch: f"{epoch:032x}{0:032x}",
        )
        desk.roll_back(3, f"{3:032x}{0:032x}", "a lie")
        desk.roll_back(4, f"{9:032x}{0:032x}", "of another side")
        may_be = [desk.may_be_undone(e, f"{of:032x}{0:032x}") for e, of in ((3, 3), (4, 9), (5, 5))]
        assert may_be == [True, False, False], "the last is the newest"
        asked_for.append([one.change for one in loop.fed])
    assert asked_for[0] == asked_for[1] and len(asked_for[0]) == 1


def test_the_table_of_members_is_as_its_schema_says() -> None:
    loop = FakeLoop(Charter(admit_by="majority"))
    change = Change("remove", OTHER.peer_id, "why", 9, "0" * 32, ((FOUNDER.peer_id, "ab"),))
    own = replace(change, signatures=((OTHER.peer_id, "ab"),))
    by_invitation = Change("admit", THIRD.peer_id, "", 9, "1" * 32, ((INVITE, "ab"),))
    core = SimpleNamespace(
        roll=replace(
            loop._roll,
            removed={"ef" * 26: "why"},
            invites={INVITE: Invite("", 1, 0)},
            settings={"train.lr": 0.1, "round.exchange_max_s": "auto"},
        ),
        chain_epoch=5,
        pending=(change, own, by_invitation),
        run_id=RUN,
        peers=(),
        phase="training",
    )
    loop.snapshot = lambda: core  # type: ignore[method-assign]
    desk = MembersDesk(loop, FOUNDER.peer_id, NodeCrypto(FOUNDER), (), lambda settings, key: "")  # type: ignore[arg-type]
    table = json.loads(json.dumps(desk.do({"do": "members"})))
    assert [one["enough"] for one in table["pending"]] == [False, True, True]
    assert table.pop("done") == [], "the command leaves it out"
    assert faults(load("members"), table) == []
