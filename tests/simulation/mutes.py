"""Members that say READY with a contribution and whose shards nobody ever gets, in some worlds.

A line that carries control and no bulk does that, and so does who wants to hold the others up. Some say all
the time that they get on. Where a run is open they are strangers, if it has any. They are up to all but one:
the run goes on with the one that is left, and in the end hardly any round waits for them. Drawn apart, so
that other worlds stay as they were.
"""

from __future__ import annotations

import random
from dataclasses import replace
from typing import TYPE_CHECKING

from tapestry.node.protocol.events import Contributed
from tapestry.node.protocol.messages import Shard, Status

if TYPE_CHECKING:
    from simulation.shell import Node
    from simulation.world import World

SHARE = 0.1  # of the worlds have some
LEARNT = 12  # epochs after which hardly any round waits for them
LOOKED_AT = 12  # the epochs after those
STALLED_MAX = 6  # of these: tries, of more than one of them at times


FLOOD_SHARE = 0.05  # of the worlds have some that send everybody all of theirs


class Floods:
    """Members that give more than they are asked for: their whole contribution, to everybody, at once."""

    def __init__(self, world: World, drawn: bool, names: list[str]) -> None:
        self.world = world
        rng = random.Random(f"flood {world.seed}")
        drawn = drawn and len(names) > 2 and rng.random() < FLOOD_SHARE
        self.names = rng.sample(names, rng.randint(1, len(names))) if drawn else []

    def flood(self, node: Node, contributed: Contributed) -> None:
        if node.name not in self.names:
            return
        for peer in self.world.nodes:
            for shard, blob in enumerate(contributed.blobs):
                if peer != node.name:
                    message = Shard(contributed.epoch, contributed.contribution, shard, blob)
                    self.world.send(node, peer, message, bulk=True)


class Mutes:
    """What concerns them in one world."""

    def __init__(self, world: World, drawn: bool, names: list[str]) -> None:
        self.world = world
        self.names: list[str] = []
        self.boast = False
        self.since_s = 0.0
        self.said = 0
        self.stalled: set[int] = set()  # epochs in which a ballot stalled
        rng = random.Random(f"mute {world.seed}")
        if drawn and len(names) > 2 and rng.random() < SHARE:
            late = world.late if world.charter.admission == "open" else []
            able = late or names[1:]
            self.names = rng.sample(able, rng.randint(1, len(able)))
            self.boast = rng.random() < 0.5
            self.since_s = rng.choice([0.0, 20.0 * rng.random()])

    def settle_s(self, usual_s: float) -> float:
        """Where few are left that give anything, two leaders have to find that out, one after the other."""
        return 2 * usual_s if self.names else usual_s

    def is_mute(self, node: Node) -> bool:
        """Whether what it has to give is lost on the way."""
        return node.name in self.names and self.world.now >= self.since_s

    def heartbeat(self, node: Node, status: Status) -> Status:
        """What it says of its progress."""
        if not self.boast or not self.is_mute(node):
            return status
        self.said += 1
        return replace(status, progress=status.progress + self.said)

    def on_note(self, text: str) -> None:
        if self.names and " failed=stalled " in text:
            self.stalled.add(int(text.split(" ", 1)[0].removeprefix("epoch=")))

    def wait_for_the_end(self, settle_s: float) -> None:
        """The network is whole, and has been for some epochs: few of the next ones stall."""
        world = self.world
        begin = world.furthest + LEARNT
        end, until = begin + LOOKED_AT, world.now + 4 * settle_s
        while self.names and world.furthest < end:
            if world.now > until:
                world.fail("world", f"mute {self.names}: epoch {end} not reached: {world.where()}")
            world.step()
        stalled = sum(begin <= epoch < end for epoch in self.stalled)
        if stalled > STALLED_MAX:
            world.fail("world", f"mute {self.names}: {stalled} of {LOOKED_AT} epochs stalled for them")
