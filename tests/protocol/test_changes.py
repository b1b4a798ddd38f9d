"""Changes of the roll: what none of them may do, and who keeps none of them out."""

from collections.abc import Sequence

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from tapestry.dht.identity import Identity
from tapestry.node.lineage.crypto import NodeCrypto
from tapestry.node.protocol.canon import PEER_CHARS_MAX
from tapestry.node.protocol.members import Change, Charter, Roll, change_message, changes_fault, first_roll
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
    return roll.after(1, [made], [(peer, 1) for peer in named])


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
