"""A member that signs two values in one ballot, in some worlds; nobody else is ever proven to have.

Its second vote is for the same roster with another result, which only it claims. Drawn apart, so that other
worlds stay as they were.
"""

from __future__ import annotations

import random
from dataclasses import replace
from typing import TYPE_CHECKING

from simulation.draws import choice, hex_digits

from tapestry.node.protocol.equivocation import Equivocation
from tapestry.node.protocol.messages import Accept, Message
from tapestry.node.protocol.record import accept_message, draw_message, head_of

if TYPE_CHECKING:
    from simulation.shell import Node
    from simulation.world import World

SHARE = 0.1  # of the worlds have one
OFTEN = 0.3  # of its votes


class Equivocators:
    """What concerns them in one world."""

    def __init__(self, world: World, drawn: bool, names: list[str]) -> None:
        self.world = world
        self.rng = random.Random(f"equivocator {world.seed}")
        self.name = choice(self.rng, names) if drawn and len(names) > 2 and self.rng.random() < SHARE else ""
        self.proven = 0

    def second_vote(self, node: Node, message: Message) -> Accept | None:
        """What it says besides."""
        if type(message) is not Accept or node.name != self.name or self.rng.random() >= OFTEN:
            return None
        core = node.core
        body = core.round.state.accepted_body if core is not None and core.round is not None else None
        if body is None or body.forced:
            return None
        other = replace(body, result=hex_digits(self.rng, 64))
        head = head_of(other, node.crypto)
        signature = node.crypto.sign(accept_message(head, message.ballot))
        draw = node.crypto.sign(draw_message(head))
        return replace(message, body_head=head, result=other.result, signature=signature, draw=draw)

    def on_proof(self, node: Node, proof: Equivocation) -> None:
        """It is who was proven to, and by the checker's own look at it."""
        first, second = proof.bodies
        heads = [head_of(body, node.crypto) for body in proof.bodies]
        signed = all(
            node.crypto.verify(proof.peer, signature, accept_message(head, proof.ballot))
            for head, signature in zip(heads, proof.signatures, strict=True)
        )
        if (
            proof.peer not in {self.name}.union(self.world.colluders.names)
            or not signed
            or first.prev != second.prev
            or first.result == second.result
        ):
            self.world.fail(node.name, f"equivocation: {proof.peer} is accused, and did not sign two values")
        self.proven += 1
