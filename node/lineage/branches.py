"""`tapestry log --branches`: the run's chain as this home has it, and what it has made alone on islands.

An island is a branch: its first record is forced, and no other member has it (lineage/island.py). The one
that goes on now lies in the home itself, and the run's own chain in HOME/island until `rejoin`; those that
were left lie in HOME/islands. Signatures are not checked here: `tapestry verify` does that, of each folder.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tapestry.node.home import Home
from tapestry.node.lineage.follow import island_from
from tapestry.node.lineage.island import tip


@dataclass(frozen=True, slots=True)
class Branch:
    """A chain that ends in this home."""

    kind: str  # run, or island
    folder: str  # below the home; "." is the home itself
    since: int  # the last epoch that it shares with the run; of the run, 0
    epoch: int
    head: str
    goes_on: bool  # whether `start` trains on from it

    @property
    def alone(self) -> int:
        """Epochs that no other member has."""
        return self.epoch - self.since if self.kind == "island" else 0


def branches(home: Home) -> list[Branch]:
    """The run first, then islands, the oldest first. Raises UserError, OSError."""
    here = tip(home)
    on_island = home.island.exists()
    run = tip(Home(home.island)) if on_island else here
    found = [Branch("run", "island" if on_island else ".", 0, run.epoch, run.head, not on_island)]
    shelf = home.path / "islands"
    left = (
        sorted(path for path in shelf.glob("*-*") if not path.name.startswith(".")) if shelf.exists() else []
    )
    found += [_of_island(path, f"islands/{path.name}") for path in left]
    if on_island:
        found.append(Branch("island", ".", run.epoch, here.epoch, here.head, True))
    return found


def _of_island(path: Path, folder: str) -> Branch:
    end, first = tip(Home(path)), island_from(Home(path))
    return Branch("island", folder, (first or 1) - 1, end.epoch, end.head, False)


def lines(found: list[Branch]) -> Iterator[str]:
    """For people."""
    yield f"{'branch':<8}  {'epochs':<12}  {'head':<16}  {'where':<28}"
    for one in found:
        epochs = f"{one.since + 1}-{one.epoch}" if one.kind == "island" else f"0-{one.epoch}"
        said = "goes on" if one.goes_on else "as it was left" if one.kind == "island" else "waits: rejoin"
        yield f"{one.kind:<8}  {epochs:<12}  {one.head[:16]:<16}  {one.folder:<28}  {said}"
