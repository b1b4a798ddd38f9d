"""Whether an export proves its tensors by itself: `export` says so, and `verify` asks for it."""

from __future__ import annotations

from tapestry.node.protocol.place import Place

FLOAT32 = "float32"  # as tapestry.json names it


def vouched_to(place: Place, island_from: int | None = None) -> int:
    """The newest epoch whose record a majority of the last full electorate stands behind, of a chain that has
    come to `place`. Of an island, which begins with record `island_from`, members stand behind nothing."""
    epoch = place.epoch - place.standing.since
    return epoch if island_from is None else min(epoch, island_from - 1)


def vouching(place: Place, epoch: int) -> int:
    """The record, of a chain that has come to `place`, that a majority must stand behind so that the state of
    `epoch` is what members signed: the one after it, unless nothing or an earlier state made it."""
    if epoch == 0 or epoch in place.roll.rolled:
        return epoch
    return min(epoch + 1, place.epoch)


def made_alone(place: Place, island_from: int | None = None) -> str:
    """From where on fewer than a majority made the records up to `place`, in words; "" if a majority stands
    behind all of them."""
    end = vouched_to(place, island_from)
    if end >= place.epoch:
        return ""
    standing = place.standing
    made = len({*standing.signers}.intersection(standing.electorate))
    where = "" if island_from is None or island_from > place.epoch else ", on an island"
    return f"from epoch {end + 1} on made by {made} of {len(standing.electorate)} members alone{where}"


def alone_at(place: Place, epoch: int, island_from: int | None = None) -> str:
    """`made_alone`, where the state of `epoch` rests on it, and up to where none does."""
    end = vouched_to(place, island_from)
    if vouching(place, epoch) <= end:
        return ""
    return f"{made_alone(place, island_from)}; members signed the states up to epoch {max(0, end - 1)}"


def unprovable(form: str, dtype: str, epoch: int, signed: bool, alone: str) -> str:
    """Why the members' signatures do not reach the tensors of such an export, and what to do; "" if they do.

    `form` and `dtype` as tapestry.json has them; `signed`: somebody signed the state of that epoch; `alone`:
    what `alone_at` says of it.
    """
    if alone:
        return alone
    if form == "merged":
        return (
            "adapters were added to the base, which rounds as the machine does; an export of the same epoch "
            "with --adapters can be proven"
        )
    if not signed:
        return (
            f"epoch {epoch} was the head, whose state nobody had signed yet; compare with a home (--against "
            "HOME), or export the epoch below"
        )
    if dtype != FLOAT32:
        return (
            f"they were rounded to {dtype}, and signed is the state in float32; compare with a home, or with "
            "an export of the same epoch in f32 (--against HOME|OUT)"
        )
    return ""
