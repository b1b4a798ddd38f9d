"""An accusation: all that anybody needs to see that a reducer signed a mean that it is not.

    head, epoch    of the state that the round started from
    members        (peer, contribution, weight) of what was averaged, in the roster's order
    shard, digest  which mean, and the digest that the reducer signed for it
    reducer, signature
    inputs         of each member: the path of its shard (protocol/commitment.py), and the encoded bytes

`check` needs nothing else but the run's codec and mean: the inputs are those of these names, the signature is
the reducer's over exactly these names and this digest, and the mean of the inputs has another digest, or they
have none: who averages refuses bytes that are no payload, its own as well, and signs nothing of them. Nobody
can make one against a reducer that averaged what it had (protocol/audit.py). It need not be believed, and it
proves the same years later, without a network. Anybody can make one against a key of its own: whether it is
of a mean that the run took, the chain says (daemon/keeper.py).

The other kinds of proof, of two things that one member signed in one ballot, are double_votes.py's and
double_rosters.py's. In a home they lie in HOME/accusations, one file each; `tapestry verify` checks them
again.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

import msgpack
from blake3 import blake3

from tapestry.node.disk import double_rosters, double_votes
from tapestry.node.disk.double_rosters import DoubleRoster, read_double_roster
from tapestry.node.disk.double_votes import DoubleVote, read_double_vote
from tapestry.node.disk.files import atomic_write
from tapestry.node.protocol import strict
from tapestry.node.protocol.audit import inputs_digest, mean_message
from tapestry.node.protocol.canon import (
    EPOCH_MAX,
    MEMBERS_MAX,
    PEER_CHARS_MAX,
    WEIGHT_MAX,
    Crypto,
    InvalidRecord,
)
from tapestry.node.protocol.commitment import PATH_MAX, is_committed
from tapestry.node.protocol.equivocation import Equivocation
from tapestry.node.protocol.receipts import TwoRosters
from tapestry.node.protocol.record import Member
from tapestry.node.protocol.strict import Malformed
from tapestry.node.state.means import MeanDigest, payload_of

KEPT_MAX = 64  # files in a home: who lied so often is known by now
KEPT_OF_ONE_MAX = 8  # of one liar, so that it leaves room for proofs against others
NAME_CHARS_MAX = 128  # an epoch and a shard, the end of a peer id, and a digest
ID_CHARS = 8  # of a peer id, in a name
RANK_IN_STATE = 3  # above a member's, whose is 2, one that was removed's, 1, and a stranger's, 0
SUFFIX = ".accusation"
_NOBODY: Mapping[str, int] = MappingProxyType({})

Kept = Literal["new", "known", "full"]


class FalseAccusation(ValueError):
    """It proves nothing; one line that says why."""


@dataclass(frozen=True, slots=True)
class Accusation:
    """See the module."""

    head: str
    epoch: int
    members: tuple[Member, ...]  # those with weight
    shard: int
    digest: str
    reducer: str
    signature: str
    inputs: tuple[tuple[tuple[str, ...], bytes], ...]  # (path, encoded bytes), in the members' order

    @property
    def name(self) -> str:
        """One for one signature. All of the digest: the liar chooses it, and so its first digits."""
        return f"{self.epoch}-{self.shard}-{self.reducer[-8:]}-{self.digest}"

    @property
    def accused(self) -> str:
        return self.reducer

    @property
    def why(self) -> str:
        """For the liar's removal: the same for all shards of a round, so that all sign the same change."""
        return f"signed a wrong mean: round {self.epoch + 1}"

    @property
    def what(self) -> str:
        return f"{self.why}, shard {self.shard}"

    def pack(self) -> bytes:
        """As it travels, and lies on disk."""
        members = [[m.peer, m.contribution, m.weight] for m in self.members]
        inputs = [[list(path), payload] for path, payload in self.inputs]
        said = [self.head, self.epoch, members, self.shard, self.digest, self.reducer, self.signature, inputs]
        packed: bytes = msgpack.packb(said)
        return packed


SignedTwice = DoubleVote | DoubleRoster  # two things that one member signed in one ballot
Proof = Accusation | SignedTwice

_READERS: Mapping[str, Callable[[Any], SignedTwice]] = {  # what its text begins with
    double_votes.KIND: read_double_vote,
    double_rosters.KIND: read_double_roster,
}


def signed_twice(proof: Equivocation | TwoRosters) -> SignedTwice:
    """What the core has proven, as a file."""
    return DoubleVote.of(proof) if isinstance(proof, Equivocation) else DoubleRoster.of(proof)


def unpack(data: bytes | bytearray) -> Proof:
    """Strict. Raises FalseAccusation."""
    try:
        raw = msgpack.unpackb(data, raw=False, strict_map_key=True, use_list=False)
        if isinstance(raw, tuple) and raw and isinstance(raw[0], str) and raw[0] in _READERS:
            return _READERS[raw[0]](raw)
        return _read(raw)
    except (ValueError, TypeError, InvalidRecord, msgpack.exceptions.UnpackException) as error:
        raise FalseAccusation(f"not an accusation: {error}") from None


def _read(raw: Any) -> Accusation:
    head, epoch, members, shard, digest, reducer, signature, inputs = strict.sequence(raw, 8, "it", 8)
    named = tuple([_member(m) for m in strict.sequence(members, MEMBERS_MAX, "members", 1)])
    given = tuple([_input(i) for i in strict.sequence(inputs, MEMBERS_MAX, "inputs", 1)])
    if len(named) != len(given):
        raise Malformed("not as many inputs as members")
    return Accusation(
        strict.hexadecimal(head, (64,), "head"),
        strict.integer(epoch, 0, EPOCH_MAX, "epoch"),
        named,
        strict.integer(shard, 0, (1 << PATH_MAX) - 1, "shard"),
        strict.hexadecimal(digest, (64,), "digest"),
        strict.text(reducer, PEER_CHARS_MAX, "reducer", 1),
        strict.text(signature, 256, "signature", 1),
        given,
    )


def _member(raw: Any) -> Member:
    peer, contribution, weight = strict.sequence(raw, 3, "a member", 3)
    return Member(
        strict.text(peer, PEER_CHARS_MAX, "peer", 1),
        strict.integer(weight, 1, WEIGHT_MAX, "weight"),
        strict.hexadecimal(contribution, (64,), "contribution"),
    )


def _input(raw: Any) -> tuple[tuple[str, ...], bytes]:
    path, payload = strict.sequence(raw, 2, "an input", 2)
    if not isinstance(payload, bytes):
        raise Malformed("an input must be bytes")
    digests = strict.sequence(path, PATH_MAX, "path")
    return tuple([strict.hexadecimal(d, (64,), "path") for d in digests]), payload


def prove(proof: Proof, run_id: str, shard_count: int, mean_digest: MeanDigest, crypto: Crypto) -> None:
    """Of any kind. Raises FalseAccusation unless it is proven."""
    if isinstance(proof, Accusation):
        check(proof, shard_count, mean_digest, crypto)
        return
    fault = proof.fault(run_id, crypto)
    if fault is not None:
        raise FalseAccusation(fault)


def check(accusation: Accusation, shard_count: int, mean_digest: MeanDigest, crypto: Crypto) -> None:
    """Averages again. Raises FalseAccusation unless it is proven."""
    a = accusation
    signed = mean_message(a.head, a.shard, a.digest, inputs_digest(a.members, crypto))
    if not crypto.verify(a.reducer, a.signature, signed):
        raise FalseAccusation("the reducer did not sign this")
    payloads = []
    for member, (path, payload) in zip(a.members, a.inputs, strict=True):
        digest = blake3(payload).hexdigest()
        if not is_committed(
            *(member.contribution, member.peer, a.epoch, shard_count, a.shard, digest, path, crypto.digest)
        ):
            raise FalseAccusation(f"the input of {member.peer[-6:]} is not of its contribution")
        payloads.append(payload_of(payload))
    if mean_digest(a.shard, payloads, [m.weight for m in a.members]) == a.digest:
        raise FalseAccusation("the reducer's mean is right")


def keep(
    folder: Path,
    accusation: Proof,
    ranks: Mapping[str, int] = _NOBODY,  # last characters of a peer id -> how much a proof against it matters
    in_state: bool = False,  # the wrong mean is in the state of the run
) -> Kept:
    """Write it down, if there is room. Raises OSError.

    Of one lie there is one proof, and of one liar KEPT_OF_ONE_MAX: a liar signs as many as it likes. One that
    is in the state is kept in the place of another of the same liar. When a home has KEPT_MAX, a proof takes
    the place of the oldest against somebody of lower rank: strangers can sign means as well.
    """
    folder.mkdir(exist_ok=True)
    path = folder / f"{accusation.name}{SUFFIX}"
    if path.exists():
        return "known"
    there = sorted(kept(folder), key=lambda one: one.stat().st_mtime_ns)
    of_one = [one for one in there if _accused_of(one.name) == accusation.accused[-ID_CHARS:]]
    lie = accusation.name.rpartition("-")[0]
    same = [one for one in of_one if one.name.rpartition("-")[0] == lie]
    gone: Path | None = None
    if same or len(of_one) >= KEPT_OF_ONE_MAX:
        if not in_state:
            return "known" if same else "full"
        gone = (same or of_one)[0]
    elif len(there) >= KEPT_MAX:
        rank = RANK_IN_STATE if in_state else ranks.get(accusation.accused[-ID_CHARS:], 0)
        gone = min(there, key=lambda one: ranks.get(_accused_of(one.name), 0))
        if ranks.get(_accused_of(gone.name), 0) >= rank:
            return "full"
    atomic_write(path, accusation.pack())
    if gone is not None:
        gone.unlink(missing_ok=True)
    return "new"


def _accused_of(file: str) -> str:
    """The last characters of the peer id of whom a file proves something: see `name` of each kind."""
    parts = file.split("-")
    return parts[2] if len(parts) > 2 else ""


def is_against(file: str, peers: Collection[str]) -> bool:
    """Whether a file of this name is against one of these, by the ends of their ids."""
    return _accused_of(file) in {peer[-ID_CHARS:] for peer in peers}


def epoch_in(name: str) -> int:
    """The epoch that the name of a proof, or of its file, begins with: see `name` of each kind. -1: none."""
    epoch = name.partition("-")[0]
    return int(epoch) if epoch.isascii() and epoch.isdecimal() and len(epoch) < 16 else -1


def kept(folder: Path) -> list[Path]:
    """The files of all that a home keeps."""
    return sorted(folder.glob(f"*{SUFFIX}"))
