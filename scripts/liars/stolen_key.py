"""runs a second node with another member's key, from a home of its own

Promise: who has the key is that member, so nobody else can be moved by it: the other members stay at one head
and go on, and nobody else is accused or removed. The robbed member is told, in its log.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from liars.seen import Seen

if TYPE_CHECKING:
    from _members import Node


def lie() -> None:
    """It does not look whether a node with its key runs already, as an honest one does."""
    from tapestry.node.net import network

    async def nothing(*_: object, **__: object) -> None:
        pass

    network.refuse_twin = nothing


def strike(place: Path, robbed: Node, line: str) -> Node:
    """The thief, not started yet. `line`: the address of a member."""
    from _members import Node

    home = place / "thief"
    home.mkdir(mode=0o700)
    shutil.copy(robbed.home / "identity.key", home)
    shutil.copy(robbed.home / "node.toml", home)
    thief = Node(home, "--peer", line, data=robbed.data)
    thief.lie("stolen-key")
    return thief


def broken(seen: Seen) -> list[str]:
    return [] if seen.told_of_twin else ["the robbed member was not told"]
