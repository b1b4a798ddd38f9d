"""An accusation proves a lie to anyone, and proves nothing against who told none."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from blake3 import blake3
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from tapestry.compression.codecs import get_codec
from tapestry.compression.reduce import WEIGHTED
from tapestry.dht.identity import Identity
from tapestry.node.daemon.averaging import Averaging
from tapestry.node.disk.accusations import (
    KEPT_MAX,
    KEPT_OF_ONE_MAX,
    Accusation,
    FalseAccusation,
    check,
    epoch_in,
    is_against,
    keep,
    kept,
    unpack,
)
from tapestry.node.lineage.crypto import NodeCrypto
from tapestry.node.protocol.audit import inputs_digest, mean_message
from tapestry.node.protocol.commitment import Commitment
from tapestry.node.protocol.record import Member

N, SHARDS, SHARD, EPOCH, HEAD = 1000, 4, 2, 5, "ab" * 32
CODEC = get_codec("int8-block")


def averaging() -> Averaging:
    return Averaging(CODEC, N, 256, WEIGHTED)


IDENTITY = Identity(Ed25519PrivateKey.from_private_bytes(b"tapestry audit tests ed25519 key"))


@pytest.fixture
def crypto() -> NodeCrypto:
    return NodeCrypto(IDENTITY)


def accusation(crypto: NodeCrypto, wrong: bool = True) -> Accusation:
    """Of a reducer that signed the mean of three, or another one."""
    a = averaging()
    members, inputs, payloads = [], [], []
    for seed, peer in enumerate(("alice", "bob", "carol")):
        x = torch.randn(N, generator=torch.Generator().manual_seed(seed))
        encoded = a.take(torch.cat([CODEC.encode(x[i : i + 256]) for i in range(0, N, 256)]), copy=False)
        name = a.commit(peer, EPOCH, encoded)
        members.append(Member(peer, 1 + seed, name))
        inputs.append((a.path(name, SHARD), bytes(encoded[SHARD].numpy())))
        payloads.append(encoded[SHARD])
    weights = [1, 1, 1] if wrong else [m.weight for m in members]
    digest = a.mean_digest(SHARD, payloads, weights)
    said = mean_message(HEAD, SHARD, digest, inputs_digest(members, crypto))
    return Accusation(
        HEAD, EPOCH, tuple(members), SHARD, digest, IDENTITY.peer_id, crypto.sign(said), tuple(inputs)
    )


def judge(one: Accusation, crypto: NodeCrypto) -> None:
    check(one, SHARDS, averaging().mean_digest, crypto)


def test_a_signed_mean_that_is_another_is_proven_from_the_file_alone(
    crypto: NodeCrypto, tmp_path: Path
) -> None:
    one = accusation(crypto)
    assert [keep(tmp_path, one), keep(tmp_path, one)] == ["new", "known"]
    (path,) = kept(tmp_path)
    judge(unpack(path.read_bytes()), crypto)


def test_an_honest_reducer_cannot_be_accused(crypto: NodeCrypto) -> None:
    with pytest.raises(FalseAccusation, match="the reducer's mean is right"):
        judge(accusation(crypto, wrong=False), crypto)


def _other_input(one: Accusation) -> Accusation:
    path, payload = one.inputs[1]
    inputs: Sequence[tuple[tuple[str, ...], bytes]] = (one.inputs[0], (path, one.inputs[2][1]), one.inputs[2])
    assert payload != one.inputs[2][1]
    return dataclasses.replace(one, inputs=tuple(inputs))


def _other_weight(one: Accusation) -> Accusation:
    members = (dataclasses.replace(one.members[0], weight=9), *one.members[1:])
    return dataclasses.replace(one, members=members)


@pytest.mark.parametrize(
    ("forge", "why"),
    [
        (lambda one: dataclasses.replace(one, digest="cd" * 32), "did not sign"),
        (lambda one: dataclasses.replace(one, shard=1), "did not sign"),
        (lambda one: dataclasses.replace(one, head="cd" * 32), "did not sign"),
        (lambda one: dataclasses.replace(one, reducer="somebody else"), "did not sign"),
        (_other_weight, "did not sign"),
        (lambda one: dataclasses.replace(one, epoch=6), "not of its contribution"),
        (_other_input, "not of its contribution"),
    ],
)
def test_what_is_forged_proves_nothing(forge, why: str, crypto: NodeCrypto) -> None:
    with pytest.raises(FalseAccusation, match=why):
        judge(forge(accusation(crypto)), crypto)


@pytest.mark.parametrize("junk", [b"\xff" * 1000, b"\xff", b""], ids=["junk", "short", "nothing"])
def test_who_signs_a_mean_of_bytes_that_are_no_contribution_is_proven_to_lie(
    crypto: NodeCrypto, junk: bytes
) -> None:
    """A reducer that committed to junk where it averages itself could sign any mean, and no audit had a word
    for it. An honest one signs nothing of inputs that have no mean."""
    one = accusation(crypto, wrong=False)
    tree = Commitment([blake3(junk).hexdigest()] * SHARDS, "carol", EPOCH, crypto.digest)
    members = (*one.members[:2], dataclasses.replace(one.members[2], contribution=tree.name))
    said = mean_message(HEAD, SHARD, one.digest, inputs_digest(members, crypto))
    inputs = (*one.inputs[:2], (tree.path(SHARD), junk))
    lie = dataclasses.replace(one, members=members, inputs=inputs, signature=crypto.sign(said))
    judge(unpack(lie.pack()), crypto)


def test_every_broken_text_is_refused(crypto: NodeCrypto) -> None:
    packed = accusation(crypto).pack()
    for length in range(0, len(packed), 97):
        with pytest.raises(FalseAccusation):
            unpack(packed[:length])
    for data in (b"", b"\x90", b"\xc0", b"\x81\xa1a\x01", packed + b"\0"):
        with pytest.raises(FalseAccusation):
            unpack(data)


def test_a_home_keeps_so_many(crypto: NodeCrypto, tmp_path: Path) -> None:
    one = accusation(crypto)
    liars = [dataclasses.replace(one, reducer=f"{number:08}", epoch=number) for number in range(KEPT_MAX + 3)]
    assert [keep(tmp_path, lie) for lie in liars] == ["new"] * KEPT_MAX + ["full"] * 3
    assert len(kept(tmp_path)) == KEPT_MAX


def test_one_liar_leaves_room_for_proofs_against_others(crypto: NodeCrypto, tmp_path: Path) -> None:
    one = accusation(crypto)
    news = [keep(tmp_path, dataclasses.replace(one, epoch=epoch)) for epoch in range(KEPT_MAX)]
    assert news.count("new") == KEPT_OF_ONE_MAX
    assert keep(tmp_path, dataclasses.replace(one, reducer="somebody else")) == "new"


def test_a_liar_does_not_keep_the_proof_out_that_matters_by_others_against_itself(
    crypto: NodeCrypto, tmp_path: Path
) -> None:
    """It signs as many digests as it likes, also some that begin as that of the mean that was taken."""
    one = accusation(crypto)
    decoy = dataclasses.replace(one, digest=one.digest[:-1] + ("0" if one.digest[-1] != "0" else "1"))
    assert [keep(tmp_path, decoy), keep(tmp_path, one)] == ["new", "known"], "of one lie one proof is enough"
    assert keep(tmp_path, one, in_state=True) == "new" and len(kept(tmp_path)) == 1
    for epoch in range(EPOCH + 1, EPOCH + KEPT_OF_ONE_MAX):
        assert keep(tmp_path, dataclasses.replace(one, epoch=epoch)) == "new"
    later = dataclasses.replace(one, epoch=EPOCH + 50)
    assert [keep(tmp_path, later), keep(tmp_path, later, in_state=True)] == ["full", "new"]
    assert len(kept(tmp_path)) == KEPT_OF_ONE_MAX


def test_strangers_do_not_keep_proofs_against_members_out(crypto: NodeCrypto, tmp_path: Path) -> None:
    """In an open run anybody contributes once, and can sign wrong means of it then."""
    one, ranks = accusation(crypto), {"removed!": 1}
    for number in range(KEPT_MAX):
        keep(tmp_path, dataclasses.replace(one, reducer=f"{number:08}", epoch=number))
    news = [
        keep(tmp_path, dataclasses.replace(one, reducer=peer, epoch=9), ranks)
        for peer in ("stranger", "the removed!", "or the memb", "stranger")
    ]
    assert news == ["full", "new", "full", "full"]
    ranks["the memb"] = 2
    assert keep(tmp_path, dataclasses.replace(one, reducer="or the memb", epoch=9), ranks) == "new"
    names = " ".join(path.name for path in kept(tmp_path))
    assert len(kept(tmp_path)) == KEPT_MAX and "removed!" in names and "the memb" in names


def test_a_files_name_says_of_which_epoch_it_is_and_against_whom(crypto: NodeCrypto) -> None:
    one = accusation(crypto)
    assert epoch_in(one.name) == one.epoch and is_against(one.name, ["somebody else", one.reducer])
    assert not is_against(one.name, ["somebody else"])
    assert [epoch_in(name) for name in ("", "-1-2", "1" * 30 + "-2", "\N{SUPERSCRIPT TWO}-3")] == [-1] * 4
    assert not is_against("no proof", ["no proof"])
