"""What a source of data has touched: epochs, records and derivatives, and the last state before it.

The answer to a person who withdraws a consent. Nothing can be taken out of a mean again: what helps is to go
on from the state before, or to live with it, and this says which state that is. It errs on the side of naming
too much: every contribution that this member made while the source was in use, every state of the base after
the first of them, every derivative that stands on one, or was begun and not finished, or cannot be read, and
what lost at a fork and holds one.
"""

from __future__ import annotations

from dataclasses import dataclass

from tapestry.dht.identity import Identity, IdentityError
from tapestry.node.errors import UserError
from tapestry.node.home import Home
from tapestry.node.lineage.branches import Ways
from tapestry.node.lineage.crypto import ReaderCrypto
from tapestry.node.lineage.follow import Broken, read_records
from tapestry.node.lineage.listed import NAME as FILE
from tapestry.node.lineage.log import read_log
from tapestry.node.lineage.uses import Span, Touches, own_ids, spans, training_uses
from tapestry.node.sovereign.derivative import Shelf, Version
from tapestry.node.sovereign.plans import Plan, begun_plan
from tapestry.node.sovereign.standing import begun_with, behind


@dataclass(frozen=True, slots=True)
class Withdrawal:
    """What `tapestry data revoke` and `data check --touched` say."""

    records: tuple[tuple[int, str], ...]  # epoch and head: with a contribution made from the source
    head_epoch: int  # every state from the first of them to here holds something of it
    before: tuple[int, str] | None  # the last state without: epoch and head; None: none was touched
    derivatives: tuple[tuple[str, str], ...]  # NAME:N, and why
    branches: tuple[str, ...] = ()  # what lost at forks and holds something of it, by name

    def lines(self) -> list[str]:
        """For people."""
        said = ["what a mean has taken up cannot be taken out of it again; this is what it touched:"]
        if self.before is None:
            said.append("the base: nothing; no contribution was made from it")
        else:
            epochs = _ranges([epoch for epoch, _ in self.records])
            said.append(f"contributions: {len(self.records)} records, of the epochs {epochs}")
            first, last = self.records[0], self.records[-1]
            said.append(f"first record: epoch {first[0]}, head {first[1]}")
            said.append(f"last record:  epoch {last[0]}, head {last[1]}")
            said.append(f"states: every one of the base from epoch {first[0]} to {self.head_epoch}")
            said.append(f"the last state before it: epoch {self.before[0]}, head {self.before[1]}")
        said += [
            f"branch {name}: what lost at a fork and is kept holds something of it" for name in self.branches
        ]
        said += [f"derivative {name}: {why}" for name, why in self.derivatives] or ["derivatives: none"]
        return said


def withdrawal(home: Home, touches: Touches) -> Withdrawal:
    """Of all sources that `touches` names. Raises UserError where chain or events do not hold."""
    used = spans(home, touches)
    own = _own(home)
    records: list[tuple[int, str]] = []
    before: tuple[int, str] | None = None
    epoch, head, run_id = 0, "", ""
    for line in read_log(home, None) if used and home.genesis.exists() else ():
        run_id = run_id or line.run_id
        ours = own is None or any(peer in own for peer, _ in line.members)
        if ours and _in(used, run_id, line.epoch):
            before = before or (epoch, head or run_id)
            records.append((line.epoch, line.head))
        epoch, head = line.epoch, line.head
    first = records[0][0] if records else None
    shelf = Shelf(home)
    made = _derivatives(shelf, touches, run_id, first)
    made |= _unfinished(shelf, touches, run_id, first, made)
    branches = _branches(home, own, used, first) if used and home.genesis.exists() else ()
    return Withdrawal(tuple(records), epoch, before, tuple(sorted(made.items())), tuple(branches))


def _own(home: Home) -> set[str] | None:
    """Today's id, and those of keys that were replaced since. None, of a copy without its key: every record
    counts."""
    try:
        return {Identity.load(home.identity_key).peer_id, *own_ids(home)}
    except IdentityError:
        return None


def _in(used: list[Span], run_id: str, epoch: int) -> bool:
    return any(span.run_id == run_id and span.holds(epoch) for span in used)


def _branches(home: Home, own: set[str] | None, used: list[Span], first: int | None) -> list[str]:
    """With a contribution made from it, or after one that was; and what cannot be read. Oldest first."""
    ways = Ways(home)
    since: dict[str, int] = {}  # the first epoch with something of it, by branch
    for one in reversed(ways.kept):  # an older one may follow a newer one's records
        about = one.about
        try:
            parent = ways.before(one)
            begun = first if parent is None else since.get(parent.name)
            if begun is not None and begun <= about.since:
                since[one.name] = begun
                continue
            for record in read_records(Home(one.path).chain, ReaderCrypto()):
                body = record.body
                ours = own is None or any(m.peer in own and m.weight for m in body.members)
                if ours and _in(used, body.run_id, body.epoch):
                    since[one.name] = body.epoch
                    break
        except (Broken, UserError):
            since[one.name] = 0
    return [one.name for one in ways.kept if one.name in since]


def _derivatives(shelf: Shelf, touches: Touches, run_id: str, first: int | None) -> dict[str, str]:
    """Trained on it, standing on a touched base, made of one that is, or not to be read: and why."""
    why: dict[str, str] = {}
    every: list[tuple[str, Version]] = []
    for name in shelf.names():
        try:
            every += [(name, version) for version in shelf.require(name).versions]
        except UserError as error:
            why[name] = f"perhaps touched, for it cannot be read: {error.line}"
    while True:
        known = len(why)
        for name, version in every:
            label = f"{name}:{version.number}"
            if label not in why and (found := _touched(version, touches, run_id, first, why)):
                why[label] = found
        if len(why) == known:
            break
    for name, version in every:
        label = f"{name}:{version.number}"
        if label not in why and (found := _behind(shelf, name, version, touches)):
            why[label] = found
    return why


def _touched(
    one: Version | Plan, touches: Touches, run_id: str, first: int | None, why: dict[str, str]
) -> str:
    data = one.data if isinstance(one, Version) else ()
    if any(touches(path) for use in data for path in (use.source, *use.real)):
        return "trained on it"
    if first is not None and one.parent.run_id == run_id and one.parent.epoch >= first:
        return f"stands on epoch {one.parent.epoch} of the base, which holds something of it"
    touched = [made_of for made_of in one.made_of if made_of in why]
    return f"made of {', '.join(touched)}" if touched else ""


def _behind(shelf: Shelf, name: str, one: Version | Plan, touches: Touches) -> str:
    """Also where the part that was trained on it is gone."""
    try:
        uses = behind(shelf, name, one) if isinstance(one, Version) else begun_with(shelf, name, one)
        is_touched = any(touches(path) for paths in uses.values() for path in paths)
    except UserError as error:
        return f"perhaps touched, for what it was made of cannot be read: {error.line}"
    return "made from it, or measured on it" if is_touched else ""


def _unfinished(
    shelf: Shelf, touches: Touches, run_id: str, first: int | None, why: dict[str, str]
) -> dict[str, str]:
    """Begun with it, and not finished: its text lies there as ids, and a model that learns from it."""
    found: dict[str, str] = {}
    for name in sorted({name for name, paths in training_uses(shelf.home) if any(map(touches, paths))}):
        if shelf.of(name).is_dir() and not (shelf.of(name) / FILE).exists():
            found[name] = f"begun with it and not finished: delete {shelf.of(name)}"
    for path in sorted(shelf.folder.glob("*/v*/plan.json")):
        place, folder = path.parent, path.parent.parent
        label, doomed = f"{folder.name}:{place.name[1:]}", place
        if not (folder / FILE).exists():
            label, doomed = folder.name, folder
        if label in why or label in found:
            continue
        plan = begun_plan(place)
        if plan is None:
            found[label] = f"perhaps touched, for {path} cannot be read; not finished: delete {doomed}"
        elif said := _behind(shelf, folder.name, plan, touches):
            found[label] = f"begun with it and not finished ({said}): delete {doomed}"
        elif said := _touched(plan, touches, run_id, first, why):
            found[label] = f"{said}; not finished: delete {doomed}"
    return found


def _ranges(epochs: list[int]) -> str:
    """3-7, 9: no more than the first few."""
    ranges: list[list[int]] = []
    for epoch in epochs:
        if ranges and epoch == ranges[-1][1] + 1:
            ranges[-1][1] = epoch
        else:
            ranges.append([epoch, epoch])
    said = [str(low) if low == high else f"{low}-{high}" for low, high in ranges[:20]]
    return ", ".join(said) + (", ..." if len(ranges) > 20 else "")
