"""What lost at forks and lies in HOME/branches, for `tapestry verify`: checked as a home is.

Its records follow a record of the home's own chain, or of a branch that was left later, and are judged from
there on: link, electorate, weights, signatures, voices. What stood behind its head is computed again. Its
updates and its checkpoint are compared with the records, and the states are replayed up to its head, unless
it says what it lacks.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from tapestry.node.disk.branches import About, Side, folders, read_about
from tapestry.node.home import Home
from tapestry.node.lineage.chain_proof import Followed, ToFollow, copied, follow
from tapestry.node.lineage.crypto import ReaderCrypto
from tapestry.node.lineage.follow import Follower
from tapestry.node.lineage.numbers_proof import check_update, checkpoints_of, is_gone, updates_of
from tapestry.node.lineage.proof import Proof, Signed
from tapestry.node.lineage.replay import check_states
from tapestry.node.progress import Told
from tapestry.node.protocol.record import Genesis
from tapestry.node.spec.run import RunSpec


@dataclass(frozen=True, slots=True)
class OnDisk:
    """The branches of a home, as their branch.json say; newest first."""

    found: tuple[tuple[Path, About], ...]

    @property
    def needed(self) -> set[int]:
        """Epochs of which they need what another chain says: its updates, or whether it has their head."""
        numbers = {epoch for path, _ in self.found for epoch in _epochs(Home(path))}
        return numbers | {about.lost.epoch for _, about in self.found}

    @property
    def ties(self) -> frozenset[int]:
        """Epochs at which they leave another chain."""
        return frozenset(about.since for _, about in self.found)


def branches_of(home: Home, proof: Proof) -> OnDisk:
    """Those whose branch.json can be read; the others are faults."""
    found = []
    for path in folders(home):
        try:
            about = read_about(path)
        except (ValueError, OSError) as error:
            proof.fault(f"branches/{path.name}/branch.json", str(error))
            continue
        if path.name != about.name:
            proof.fault(f"branches/{path.name}/branch.json", f"it is of another branch, {about.name}")
        found.append((path, about))
    return OnDisk(tuple(sorted(found, key=lambda one: -one[1].number)))


def check_branches(
    on_disk: OnDisk,
    genesis: Genesis,
    spec: RunSpec,
    chain: Followed,
    replay: bool,
    parents: set[int],
    proof: Proof,
    told: Told,
) -> dict[str, Followed]:
    """Each, newest first: an older one may follow its records. All chains, by their folder: that of the home
    is the first, and "". `parents`: epochs of which derivatives need what every chain says."""
    chains = {"": chain}
    for done, (path, about) in enumerate(on_disk.found):
        told("branches", done, len(on_disk.found))
        name, part = f"branches/{path.name}", Proof("branch", genesis.run_id, spec.name)
        signed = chain.signed.get(about.lost.epoch)
        if signed is not None and signed.head == about.lost.head:
            proof.notes.append(f"{name}: its records are on the chain: a killed node did not leave them")
            continue
        check = _Check(path, about, genesis, spec, on_disk.needed | parents, on_disk.ties, part, told)
        found = check.run(list(chains.values()), replay)
        if is_gone(path):
            proof.notes.append(f"{name}: the node dropped it meanwhile")
            continue
        if found is not None:
            chains[name] = found
        proof.branches += 1
        for fault in part.faults:
            proof.fault(f"{name}/{fault.file}", fault.what, fault.epoch)
        proof.notes += [f"{name}: {note}" for note in part.notes]
    return chains


@dataclass(frozen=True, slots=True)
class _Check:
    """Of one branch."""

    path: Path
    about: About
    genesis: Genesis
    spec: RunSpec
    needed: set[int]  # epochs, by others than itself
    ties: frozenset[int]
    proof: Proof
    told: Told

    def run(self, chains: list[Followed], replay: bool) -> Followed | None:
        about, proof, home = self.about, self.proof, Home(self.path)
        if about.run_id != self.genesis.run_id:
            proof.fault("branch.json", f"it is of the run {about.run_id[:12]}")
        start = next(_tied(about, chains), None)
        if start is None:
            text = f"no chain of this home has its epoch {about.since}, which it follows"
            proof.fault("chain.jsonl", text, about.since + 1)
            return None
        follower, before = start
        updates, checkpoints = updates_of(home, proof), checkpoints_of(home, self.genesis, proof)
        needed = {*updates, *checkpoints, about.lost.epoch, *self.needed}
        chain = ToFollow(
            *(home.chain, self.genesis, self.spec, needed, None, self.told),
            ties=self.ties,
            start=copied(follower),
            before={epoch: one for epoch, one in before.items() if epoch <= about.since},
        )
        found = follow(chain, ReaderCrypto(), proof)
        self._check_end(found)
        for epoch, path in sorted(updates.items()):
            check_update(path, epoch, found.signed.get(epoch), proof)
        if replay and (checkpoints or not about.lacks):
            check_states(self.genesis, self.spec, found.signed, updates, checkpoints, proof, self.told)
            if not about.lacks and proof.holds and proof.replayed_to != about.lost.epoch:
                proof.fault("branch.json", f"lacks nothing, it says, and leads to {proof.replayed_to} only")
        if about.lacks:
            proof.notes.append(f"the state of its head cannot be made: it lacks {about.lacks}")
        return found

    def _check_end(self, found: Followed) -> None:
        about, proof = self.about, self.proof
        if (proof.epoch, proof.head) != (about.lost.epoch, about.lost.head):
            if proof.holds:
                proof.fault("chain.jsonl", "does not end with the head that branch.json names", proof.epoch)
        elif Side.of(found.end.at) != about.lost:
            proof.fault("branch.json", "what it says stood behind its head is not what its records say")


def _tied(about: About, chains: list[Followed]) -> Iterator[tuple[Follower, Mapping[int, Signed]]]:
    """Where a chain has the record that the branch follows."""
    for chain in chains:
        at = chain.ties.get(about.since)
        if at is not None and at.head == about.since_head:
            yield at, chain.signed


def _epochs(home: Home) -> set[int]:
    """Of the updates and checkpoints that lie there, by their names."""
    quiet = Proof("branch")
    checkpoints = {
        int(path.name.partition("-")[0])
        for path in home.checkpoints.glob("*-*")
        if path.name.partition("-")[0].isdigit()
    }
    return {*updates_of(home, quiet), *checkpoints}
