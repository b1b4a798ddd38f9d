"""runs a second node with another member's key, from a home of its own

Promise: who has the key is that member, so nobody else can be moved by it: the other members stay at one head
and go on, and nobody else is accused or removed. The robbed member is told, in its log.
"""

from __future__ import annotations

import shutil
import time
from pathlib import Path
from typing import TYPE_CHECKING

from liars.seen import Seen

if TYPE_CHECKING:
    from _members import Node


LATER_S = 5.0  # its process began before its node


def lie() -> None:
    """It does not look whether a node with its key runs already, as an honest one does."""
    from tapestry.node.net import network

    async def nothing(*_: object, **__: object) -> None:
        pass

    network.refuse_twin = nothing


def strike(place: Path, robbed: Node, line: str) -> Node:
    """The thief, not started yet. `line`: the address of a member. A node that has started just now gives way
    to another with its key, so we wait until the robbed one does not."""
    import psutil
    from _members import Node

    from tapestry.node.net.twins import YOUNG_S

    young_s = psutil.Process(robbed.pid).create_time() + YOUNG_S + LATER_S - time.time()
    time.sleep(max(young_s, 0.0))
    home = place / "thief"
    home.mkdir(mode=0o700)
    shutil.copy(robbed.home / "identity.key", home)
    shutil.copy(robbed.home / "node.toml", home)
    thief = Node(home, "--peer", line, data=robbed.data)
    thief.lie("stolen-key")
    return thief


def broken(seen: Seen) -> list[str]:
    return [] if seen.told_of_twin else ["the robbed member was not told"]
