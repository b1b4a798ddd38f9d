"""The name of a contribution: the root of a tree of digests over its shards.

    leaf i   digest(0, index i, digest of the shard's encoded bytes)
    node     digest(1, left, right); an odd one out goes up as it is
    root     digest(2, stage, contributor, epoch, count of shards, top)

The contributor and the epoch are in the root: who sends the shards of another, or of an earlier round,
does it under another name. So is the stage of training that the contribution is of. Records take those of
the shared base only: whoever averages, audits or replays a shard proves it against a root with `BASE`, so
what was made in a member's own stage (cpt, sft, dpo) has a name under which nobody counts it.

The *path* of a shard is the digests beside its way to the top, one for each level where there is one: with
it whoever has the name checks the shard alone. The first byte keeps leaves, nodes and roots apart (RFC 6962,
section 2.1).

Pure; standard library only. Digests are 64 hex digits, of the crypto's hash.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

Digest = Callable[[bytes], str]  # Crypto.digest
BASE = "base"  # the stage of what all members train together
PATH_MAX = 20  # levels above 2**20 shards


class Commitment:
    """The tree of one contribution, by whoever has all of it."""

    def __init__(
        self, digests: Sequence[str], contributor: str, epoch: int, digest: Digest, stage: str = BASE
    ) -> None:
        """`digests`: of the encoded bytes of each shard, at least one."""
        levels = [[_leaf(index, value, digest) for index, value in enumerate(digests)]]
        while len(levels[-1]) > 1:
            below = levels[-1]
            pairs = zip(below[::2], below[1::2], strict=False)
            odd = below[-1:] if len(below) % 2 else []
            levels.append([*(_node(left, right, digest) for left, right in pairs), *odd])
        self._levels = levels
        self.name = _root(stage, contributor, epoch, len(digests), levels[-1][0], digest)

    def path(self, shard: int) -> tuple[str, ...]:
        """What proves shard `shard` to who has the name."""
        path, index = [], shard
        for level in self._levels[:-1]:
            beside = index ^ 1
            if beside < len(level):
                path.append(level[beside])
            index //= 2
        return tuple(path)


def is_committed(
    name: str,
    contributor: str,
    epoch: int,
    count: int,  # of shards
    shard: int,
    shard_digest: str,
    path: Sequence[str],
    digest: Digest,
) -> bool:
    """Whether the shard with this digest is shard `shard` of the contribution to the base with this name."""
    if not 0 <= shard < count:
        return False
    top, index, width, beside = _leaf(shard, shard_digest, digest), shard, count, iter(path)
    while width > 1:
        if index ^ 1 < width:
            other = next(beside, None)
            if other is None:
                return False
            top = _node(other, top, digest) if index % 2 else _node(top, other, digest)
        index, width = index // 2, (width + 1) // 2
    return next(beside, None) is None and _root(BASE, contributor, epoch, count, top, digest) == name


def _leaf(index: int, shard_digest: str, digest: Digest) -> str:
    return digest(b"\0%d\0%s" % (index, shard_digest.encode()))


def _node(left: str, right: str, digest: Digest) -> str:
    return digest(b"\1%s\0%s" % (left.encode(), right.encode()))


def _root(stage: str, contributor: str, epoch: int, count: int, top: str, digest: Digest) -> str:
    parts = (stage, contributor, str(epoch), str(count), top)
    return digest(b"\2" + b"\0".join(part.encode() for part in parts))
