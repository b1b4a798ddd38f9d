"""The name of a contribution proves each of its shards, and nothing else."""

from __future__ import annotations

import hashlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tapestry.node.protocol.commitment import PATH_MAX, Commitment, is_committed


def digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def shards(count: int) -> list[str]:
    return [digest(b"shard %d" % index) for index in range(count)]


@given(st.integers(1, 70), st.data())
def test_every_shard_is_proven_in_its_place_alone(count: int, data: st.DataObject) -> None:
    digests = shards(count)
    tree = Commitment(digests, "alice", 7, digest)
    shard, other = data.draw(st.integers(0, count - 1)), data.draw(st.integers(0, count))
    path = tree.path(shard)
    assert len(path) <= PATH_MAX
    assert is_committed(tree.name, "alice", 7, count, shard, digests[shard], path, digest)
    if other != shard:
        assert not is_committed(tree.name, "alice", 7, count, other, digests[shard], path, digest)
    assert not is_committed(tree.name, "alice", 7, count, shard, digest(b"another"), path, digest)
    assert not is_committed(tree.name, "alice", 7, count + 1, shard, digests[shard], path, digest)
    assert not is_committed(
        tree.name, "alice", 7, count, shard, digests[shard], (*path, path[-1] if path else "0"), digest
    )
    if path:
        assert not is_committed(tree.name, "alice", 7, count, shard, digests[shard], path[:-1], digest)


@pytest.mark.parametrize(("contributor", "epoch"), [("bob", 7), ("alice", 8)])
def test_anothers_contribution_or_an_old_one_has_another_name(contributor: str, epoch: int) -> None:
    digests = shards(5)
    tree = Commitment(digests, "alice", 7, digest)
    assert Commitment(digests, contributor, epoch, digest).name != tree.name
    assert not is_committed(tree.name, contributor, epoch, 5, 0, digests[0], tree.path(0), digest)


@pytest.mark.parametrize("stage", ["cpt", "sft", "dpo", "", "base\0"])
def test_what_is_of_a_members_own_stage_is_no_contribution_to_the_base(stage: str) -> None:
    digests = shards(5)
    tree = Commitment(digests, "alice", 7, digest, stage)
    assert tree.name != Commitment(digests, "alice", 7, digest).name
    assert not is_committed(tree.name, "alice", 7, 5, 0, digests[0], tree.path(0), digest)
