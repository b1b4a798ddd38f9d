"""`tapestry log --branches`: the run's chain as this home has it, islands, and what lost at forks.

An island is a branch that was made alone: its first record is forced, and no other member has it
(lineage/island.py). The one that goes on now lies in the home itself, and the run's own chain in
HOME/island until `rejoin`; those that were left lie in HOME/islands. What was left for a better chain lies
in HOME/branches (disk/branches.py): its own records only, which follow a record of the home's chain, or of
a branch that was left later. Signatures are not checked here: `tapestry verify` does that, of islands
folder by folder, of branches with the home.
"""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from tapestry.node.disk.branches import Kept, found
from tapestry.node.disk.files import unseal
from tapestry.node.errors import ExitCode, UserError
from tapestry.node.home import Home
from tapestry.node.lineage.columns import short, wrapped
from tapestry.node.lineage.crypto import ReaderCrypto
from tapestry.node.lineage.follow import Broken, island_from, read_records
from tapestry.node.lineage.island import tip
from tapestry.node.protocol.record import record_from_dict

# Of a home, and what an export asks of it: a branch has none of its own.
SHARED = ("base", "data.toml", "descriptions.json", "identity.key")


@dataclass(frozen=True, slots=True)
class Branch:
    """A chain that ends in this home."""

    kind: str  # run, island, or lost
    folder: str  # below the home; "." is the home itself
    since: int  # the last epoch that it shares with the run; of the run, 0
    epoch: int
    head: str
    goes_on: bool  # whether `start` trains on from it
    members: tuple[str, ...] = ()  # of what lost: whose contributions are in it
    why: str = ""  # it lost
    left_at: str = ""  # UTC, by this node's clock
    lacks: str = ""  # what keeps the state of its head from being exported; "" if nothing does

    @property
    def alone(self) -> int:
        """Epochs that no other member has."""
        return self.epoch - self.since if self.kind == "island" else 0


def branches(home: Home) -> list[Branch]:
    """The run first, then islands and what lost at forks, the oldest first. Raises UserError, OSError."""
    here = tip(home)
    on_island = home.island.exists()
    run = tip(Home(home.island)) if on_island else here
    chains = [Branch("run", "island" if on_island else ".", 0, run.epoch, run.head, not on_island)]
    shelf = home.path / "islands"
    left = (
        sorted(path for path in shelf.glob("*-*") if not path.name.startswith(".")) if shelf.exists() else []
    )
    chains += [_of_island(path, f"islands/{path.name}") for path in left]
    if on_island:
        chains.append(Branch("island", ".", run.epoch, here.epoch, here.head, True))
    ways = Ways(home)
    return chains + [_lost(one, ways) for one in ways.kept]


def _of_island(path: Path, folder: str) -> Branch:
    end, first = tip(Home(path)), island_from(Home(path))
    return Branch("island", folder, (first or 1) - 1, end.epoch, end.head, False)


def _lost(one: Kept, ways: Ways) -> Branch:
    about, lacks = one.about, one.about.lacks and f"it lacks {one.about.lacks}"
    members: set[str] = set()
    try:
        ways.before(one)
        for record in read_records(Home(one.path).chain, ReaderCrypto()):
            members.update(member.peer for member in record.body.members if member.weight)
    except (Broken, UserError) as error:
        lacks = str(error)
    folder, lost = f"branches/{one.name}", about.lost
    return Branch(
        *("lost", folder, about.since, lost.epoch, lost.head, False),
        *(tuple(sorted(members)), about.why, about.left_at, lacks),
    )


class Ways:
    """The branches of a home, and what each of them follows."""

    def __init__(self, home: Home) -> None:
        """Raises UserError, OSError."""
        self._home = home
        kept = found(home)
        asked = {epoch for one in kept for epoch in (one.about.since, one.about.lost.epoch)}
        self._heads = heads_at(home.chain, asked)
        # A node that was killed before it left them still has them on its chain; its next start drops them.
        self.kept = [one for one in kept if self._heads.get(one.about.lost.epoch) != one.about.lost.head]

    def named(self, name: str) -> Kept:
        """Raises UserError."""
        for one in self.kept:
            if one.name == name.removeprefix("branches/"):
                return one
        raise UserError(
            f"{self._home.path} has no branch {name}", hint="tapestry log --branches lists what there is"
        )

    def before(self, one: Kept) -> Kept | None:
        """Whose records it follows: the home's own chain's (None), or those of a branch that was left later.

        Raises UserError.
        """
        about = one.about
        run = about.run_id if not about.since else self._heads.get(about.since)
        if run == about.since_head:
            return None
        for other in self.kept:
            begin, end = other.about.since, other.about.lost.epoch
            if other.about.number > about.number and begin < about.since <= end:
                heads = heads_at(Home(other.path).chain, {about.since - begin})
                if heads.get(about.since - begin) == about.since_head:
                    return other
        raise UserError(
            f"the records before branch {one.name} are gone: nothing here has epoch {about.since} of it",
            exit_code=ExitCode.FAILED,
            hint="the home's chain was cut by damage: start the node, which fetches its records again",
        )

    def lines(self, one: Kept | None, epoch: int) -> Iterator[bytes]:
        """Of chain.jsonl, from the genesis up to `epoch`: of a branch, or of the home's own chain. Raises
        UserError, OSError."""
        path, begin = self._home.chain, 0
        if one is not None:
            path, begin = Home(one.path).chain, one.about.since
            yield from self.lines(self.before(one), begin)
        with path.open("rb") as file:
            yield from itertools.islice(file, epoch - begin)


def heads_at(chain: Path, epochs: set[int]) -> Mapping[int, str]:
    """Heads of these lines of a chain.jsonl, counted from 1; not of damaged ones. Raises OSError."""
    heads: dict[int, str] = {}
    if not chain.exists() or not epochs:
        return heads
    with chain.open("rb") as lines:
        for number, line in enumerate(itertools.islice(lines, max(epochs)), 1):
            if number in epochs:
                try:
                    heads[number] = record_from_dict(unseal(line[:-1]), ReaderCrypto()).head
                except ValueError:
                    continue
    return heads


def as_home(home: Home, name: str, folder: Path) -> Home:
    """A home in the new `folder` whose chain ends with the branch, to be read. Raises UserError, OSError."""
    ways = Ways(home)
    one = ways.named(name)
    copy = Home(folder)
    folder.mkdir()
    shutil.copyfile(home.genesis, copy.genesis)
    with copy.chain.open("wb") as file:
        file.writelines(ways.lines(one, one.about.lost.epoch))
    own = Home(one.path)
    for target, source in ((copy.updates, own.updates), (copy.checkpoints, own.checkpoints)):
        target.symlink_to(source.absolute())
    for shared in SHARED:
        if (home.path / shared).exists():
            (folder / shared).symlink_to((home.path / shared).absolute())
    return copy


def lines(chains: Sequence[Branch]) -> Iterator[str]:
    """For people."""
    yield f"{'branch':<8}  {'epochs':<15}  head"
    for one in chains:
        first = 0 if one.kind == "run" else one.since + 1
        epochs = f"{first}-{one.epoch}" if first <= one.epoch else "-"  # of an island that just began
        said = {"run": "waits: rejoin", "island": "as it was left", "lost": f"left {one.left_at}"}[one.kind]
        said = "goes on" if one.goes_on else said
        yield f"{one.kind:<8}  {epochs:<15}  {one.head[:16]}  {said}"
        if one.kind == "island" and one.folder != ".":
            yield f"{'':10}in {one.folder}"
        if one.kind == "lost":
            name = one.folder.removeprefix("branches/")
            for text in (
                f"by {' '.join(short(peer) for peer in one.members) or 'nobody'}",
                f"it lost: {one.why}",
                f"cannot be exported: {one.lacks}" if one.lacks else f"export --branch {name}",
            ):
                yield from wrapped(text, " " * 10, " " * 12)
