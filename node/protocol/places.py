"""The text of a place: so that a node's disk keeps, now and then, what all records so far come to.

For our own disk only, sealed there (disk/chain_file.py): nothing of it is ever believed of a peer. What is
equal to something beside it is left out, as most of a standing is while rounds are ordinary.

Standard library only.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tapestry.node.protocol.members import Charter, Invite, Roll, Seat, charter_to_dict
from tapestry.node.protocol.place import Place, Standing


def place_to_dict(place: Place) -> dict[str, Any]:
    standing = place.standing
    return {
        "epoch": place.epoch,
        "head": place.head,
        "electorate": list(place.electorate),
        "roll": _roll_to_dict(place.roll),
        "full": standing.full,
        "full_electorate": None if standing.electorate == place.electorate else list(standing.electorate),
        "full_roll": None if standing.roll == place.roll else _roll_to_dict(standing.roll),
        "signers": list(standing.signers),
        "voice": standing.voice,
        "since": standing.since,
        "unnamed": [list(pair) for pair in place.unnamed],
        "seats": [list(pair) for pair in sorted(place.seats)],
    }


def place_from_dict(raw: Mapping[str, Any]) -> Place:
    """Of `place_to_dict`; raises KeyError, TypeError or ValueError for anything else."""
    electorate, roll = tuple(raw["electorate"]), _roll_from_dict(raw["roll"])
    full_electorate, full_roll = raw["full_electorate"], raw["full_roll"]
    standing = Standing(
        raw["full"],
        electorate if full_electorate is None else tuple(full_electorate),
        roll if full_roll is None else _roll_from_dict(full_roll),
        tuple(raw["signers"]),
        raw["voice"],
        raw["since"],
    )
    seats = frozenset([(peer, life) for peer, life in raw["seats"]])
    unnamed = tuple([(peer, count) for peer, count in raw["unnamed"]])
    return Place(raw["epoch"], raw["head"], electorate, roll, standing, unnamed, seats)


def _roll_to_dict(roll: Roll) -> dict[str, Any]:
    """Pairs in place of maps: their order is kept, and `removed` forgets its oldest first."""
    return {
        "run_id": roll.run_id,
        "charter": charter_to_dict(roll.charter),
        "members": [[peer, seat.name, seat.voice, seat.since] for peer, seat in roll.members.items()],
        "council": list(roll.council),
        "invites": [[key, i.name, i.uses, i.expires_at] for key, i in roll.invites.items()],
        "done": [list(pair) for pair in roll.done.items()],
        "counted": [list(pair) for pair in roll.counted.items()],
        "removed": [list(pair) for pair in roll.removed.items()],
        "settings": [list(pair) for pair in roll.settings.items()],
        "heads": list(roll.heads),
        "rolled": [list(pair) for pair in roll.rolled.items()],
    }


def _roll_from_dict(raw: Mapping[str, Any]) -> Roll:
    return Roll(
        run_id=raw["run_id"],
        charter=Charter(**raw["charter"]),
        members={peer: Seat(name, voice, since) for peer, name, voice, since in raw["members"]},
        council=tuple(raw["council"]),
        invites={key: Invite(name, uses, expires_at) for key, name, uses, expires_at in raw["invites"]},
        done=dict(raw["done"]),
        counted=dict(raw["counted"]),
        removed=dict(raw["removed"]),
        settings=dict(raw["settings"]),
        heads=tuple(raw["heads"]),
        rolled=dict(raw["rolled"]),
    )
