"""Changes of the roll: what none of them may do, and who keeps none of them out."""

from collections.abc import Sequence
from dataclasses import replace

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from tapestry.dht.identity import Identity
from tapestry.node.lineage.crypto import NodeCrypto
from tapestry.node.protocol import members
from tapestry.node.protocol.canon import PEER_CHARS_MAX
from tapestry.node.protocol.members import (
    NEWCOMERS_MAX,
    ROLLBACK_EPOCHS_MAX,
    Change,
    Charter,
    Roll,
    change_message,
    changes_fault,
    first_roll,
    rollback_value,
)
from tapestry.node.protocol.proposals import OF_ONE_MAX, PROPOSALS_MAX, Proposals

RUN = "ab" * 32
KEYS = [Identity(Ed25519PrivateKey.from_private_bytes(bytes([n]) * 32)) for n in range(1, 9)]
PEERS = [key.peer_id for key in KEYS]
CRYPTO = NodeCrypto(KEYS[0])


def change(kind: str, peer: str, value: str, *by: int, nonce: int = 1) -> Change:
    made = Change(kind, peer, value, 9, f"{nonce:032x}")
    for n in by:
        made = made.signed(PEERS[n], KEYS[n].sign(change_message(RUN, made)).hex())
    return made


def after(roll: Roll, made: Change) -> Roll:
    named = list(roll.members)
    assert changes_fault(roll, 1, [made], named, CRYPTO) is None
    return roll.after(1, "", [made], [(peer, 1) for peer in named])


def fault(roll: Roll, made: Change) -> str | None:
    return changes_fault(roll, 1, [made], list(roll.members), CRYPTO)


@pytest.mark.parametrize("value", ["", "x" * (PEER_CHARS_MAX + 1)])
def test_a_key_is_not_replaced_by_what_nobody_could_remove_again(value: str):
    roll = first_roll(RUN, Charter(), PEERS[:2])
    assert fault(roll, change("rekey", PEERS[1], value, 0)) == "malformed"


def test_who_comes_back_by_a_change_of_keys_is_not_listed_as_removed():
    roll = after(first_roll(RUN, Charter(), PEERS[:3]), change("remove", PEERS[1], "why", 0))
    roll = after(roll, change("rekey", PEERS[2], PEERS[1], 0))
    assert PEERS[1] in roll.members and list(roll.removed) == [PEERS[2]]


def test_the_key_of_an_invitation_is_nobody():
    roll = after(first_roll(RUN, Charter(), PEERS[:2]), change("invite", PEERS[4], "2 0 guest", 0))
    assert fault(roll, change("admit", PEERS[4], "", 4)) == "invites"
    assert fault(roll, change("rekey", PEERS[1], PEERS[4], 0)) == "invites"


def test_founders_who_are_gone_are_given_nothing_to_decide():
    roll = first_roll(RUN, Charter(admit_by="majority"), PEERS[:1])
    for n in (1, 2):
        roll = after(roll, change("admit", PEERS[n], "", *range(n), nonce=n))
    roll = after(roll, change("remove", PEERS[0], "", 0))
    assert fault(roll, change("charter", "", "admit_by founder", 1, 2)) == "charter"


def heads(roll: Roll, epochs: int, rolled: dict[int, int]) -> Roll:
    """After so many records, the head of epoch n beginning with n."""
    for epoch in range(1, epochs + 1):
        changes = [back(rolled[epoch])] if epoch in rolled else []
        roll = roll.after(epoch, f"{epoch - 1:032x}", changes, [])
    return roll


def back(to: int, why: str = "why", *by: int) -> Change:
    return change("rollback", "", rollback_value(to, f"{to:032x}", why), *by)


@pytest.mark.parametrize(
    ("epochs", "rolled", "to", "allowed"),
    [
        *((10, {}, to, to <= 9) for to in (0, 8, 9, 10, 11)),
        *((100, {}, to, to >= 100 - ROLLBACK_EPOCHS_MAX) for to in (0, 34, 35, 36, 37, 98)),
        (10, {8: 5}, 5, False),  # what was made of it is undone: name 8
        (10, {8: 5}, 8, True),
        *((10, {8: 5}, to, False) for to in (6, 7)),  # undone itself
        *((10, {8: 5}, to, True) for to in (0, 4)),
        (10, {8: 5, 10: 3}, 4, False),
        (10, {8: 5, 10: 3}, 8, False),
    ],
)
def test_only_what_stands_is_undone_and_not_too_far_back(
    epochs: int, rolled: dict[int, int], to: int, allowed: bool
) -> None:
    roll = heads(first_roll(RUN, Charter(), PEERS[:2]), epochs, rolled)
    made = replace(back(to), until=epochs + 1)
    made = made.signed(PEERS[0], KEYS[0].sign(change_message(RUN, made)).hex())
    named = list(roll.members)
    found = changes_fault(roll, epochs + 1, [made], named, CRYPTO)
    assert found == (None if allowed else "rollback")


def test_a_state_of_another_side_is_not_gone_back_to() -> None:
    roll = heads(first_roll(RUN, Charter(), PEERS[:2]), 5, {})
    there = change("rollback", "", rollback_value(3, f"{9:032x}", ""), 0)
    assert changes_fault(roll, 6, [there], PEERS[:2], CRYPTO) == "rollback"
    for value in ("3", "3 x y", f"03 {3:032x} why", f"-1 {3:032x} why"):
        assert fault(roll, change("rollback", "", value, 0)) == "malformed"


def test_two_proofs_of_one_lie_are_one_rollback_and_the_earlier_lie_counts() -> None:
    roll = heads(first_roll(RUN, Charter(), PEERS[:2]), 5, {})
    once, again, earlier = back(3, "a", 0), back(3, "b", 0), back(2, "c", 0)
    assert changes_fault(roll, 6, [once], PEERS[:2], CRYPTO) is None
    assert changes_fault(roll, 6, [once, again], PEERS[:2], CRYPTO) == "rollback"
    assert changes_fault(roll, 6, [once, earlier], PEERS[:2], CRYPTO) is None
    assert changes_fault(roll, 6, [earlier, once], PEERS[:2], CRYPTO) == "rollback"
    assert roll.after(6, f"{5:032x}", [once, earlier], []).rolled == {6: 2}


def test_a_rollback_needs_the_signatures_that_any_change_needs() -> None:
    roll = heads(first_roll(RUN, Charter(admit_by="majority"), PEERS[:3]), 5, {})
    assert changes_fault(roll, 6, [back(3, "why", 0)], PEERS[:3], CRYPTO) == "unsigned_change"
    assert changes_fault(roll, 6, [back(3, "why", 0, 1)], PEERS[:3], CRYPTO) is None


def pool(roll: Roll, *asked: tuple[int, int]) -> Proposals:
    """Filled with so many proposals of so many members."""
    proposals = Proposals()
    for by, count in asked:
        for n in range(count):
            made = change("voice", PEERS[by], str(n + 1), by)
            assert proposals.add(roll, 1, made, CRYPTO) is None
    return proposals


def asked_by(proposals: Proposals) -> Sequence[int]:
    return [list(proposals.asked_by.values()).count(peer) for peer in PEERS]


def test_a_few_who_ask_for_much_keep_nobodys_proposal_out():
    roll = first_roll(RUN, Charter(admit_by="majority"), PEERS)
    greedy = range(PROPOSALS_MAX // OF_ONE_MAX)
    proposals = pool(roll, *((n, OF_ONE_MAX) for n in greedy))
    assert proposals.add(roll, 1, change("remove", PEERS[0], "fills the pool", 7), CRYPTO) is None
    assert len(proposals.pending) == PROPOSALS_MAX and asked_by(proposals)[7] == 1
    again = [change("voice", PEERS[7], "9", n, nonce=n) for n in greedy]
    assert [proposals.add(roll, 1, made, CRYPTO) for made in again] == ["proposals"] * len(again)
    assert asked_by(proposals)[7] == 1


# --- invitations, councils and newcomers --------------------------------------------------------------


def test_nobody_who_was_removed_comes_back_by_an_invitation():
    roll = after(first_roll(RUN, Charter(), PEERS[:2]), change("invite", PEERS[4], "5 0 guest", 0))
    roll = after(roll, change("admit", PEERS[3], "", 4))
    roll = after(roll, change("remove", PEERS[3], "noise", 0))
    assert fault(roll, change("admit", PEERS[3], "", 4, nonce=2)) == "unsigned_change"
    assert fault(roll, change("admit", PEERS[5], "", 4)) is None, "another guest does"
    assert fault(roll, change("admit", PEERS[3], "", 0, nonce=2)) is None, "who admits may"


def test_a_record_carries_no_more_signatures_of_a_change_than_it_needs(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(members, "SIGNATURES_MANY", 3)
    roll = first_roll(RUN, Charter(admit_by="majority"), PEERS[:5])
    pool = Proposals()
    assert pool.add(roll, 1, change("remove", PEERS[4], "lied", 0, 1, 2, 3), CRYPTO) is None
    (carried,) = pool.ready(roll, 1, PEERS[:4], CRYPTO)
    assert len(carried.signatures) == 3 and fault(roll, carried) is None


@pytest.mark.parametrize(("kind", "peer", "by"), [("admit", PEERS[5], (4, 2)), ("remove", PEERS[3], (3, 2))])
def test_what_one_signature_is_enough_for_keeps_that_one(
    kind: str, peer: str, by: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
):
    """The key of an invitation that admits; who leaves by itself. PEERS[2] is one of three that it takes."""
    monkeypatch.setattr(members, "SIGNATURES_MANY", 1)
    roll = after(
        first_roll(RUN, Charter(admit_by="majority"), PEERS[:4]),
        change("invite", PEERS[4], "2 0 guest", 0, 1, 2),
    )
    pool = Proposals()
    assert pool.add(roll, 1, change(kind, peer, "", *by), CRYPTO) is None
    (carried,) = pool.ready(roll, 1, PEERS[:3], CRYPTO)
    assert [signer for signer, _ in carried.signatures] == [PEERS[by[0]]]


def test_a_council_that_has_shrunk_still_changes_the_other_rules():
    roll = first_roll(RUN, Charter(admit_by="council 2/3"), PEERS[:3])
    roll = after(roll, change("remove", PEERS[2], "gone", 0, 1))
    assert fault(roll, change("charter", "", "voice tokens", 0, 1)) is None
    assert fault(roll, change("charter", "", "voice loud", 0, 1)) == "charter"
    assert fault(roll, change("charter", "", "admit_by council 1/3", 0, 1)) == "charter"
    assert fault(roll, change("charter", "", "admit_by council 2/2", 0, 1)) is None


def test_keys_that_contribute_once_keep_no_newcomer_from_being_counted():
    roll = first_roll(RUN, Charter(admission="open", open_votes_after=3), PEERS[:1])
    for n in range(NEWCOMERS_MAX):
        roll = roll.after(n + 1, "", [], [(PEERS[0], 1), (f"key{n}", 1)])
    for n in range(3):
        assert PEERS[1] not in roll.members
        roll = roll.after(n + 500, "", [], [(PEERS[0], 1), (PEERS[1], 1), (f"late{n}", 1)])
    assert PEERS[1] in roll.members and len(roll.counted) <= NEWCOMERS_MAX


def test_the_key_of_an_invitation_does_not_contribute_its_way_in():
    roll = first_roll(RUN, Charter(admission="open", open_votes_after=1), PEERS[:1])
    roll = after(roll, change("invite", PEERS[4], "2 0 guest", 0))
    assert not roll.may_contribute(PEERS[4])
    assert PEERS[4] not in roll.after(2, "", [], [(PEERS[0], 1), (PEERS[4], 1)]).members
