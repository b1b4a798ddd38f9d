"""Who belongs to the world's run: admitted late, removed, re-keyed and refused, by signed changes.

Whatever is drawn, everybody who must follow at the end is a member by then: `restore` admits who is not,
and asks again until it is so. In some worlds guests come with invitations (guests.py), or the charter changes
(reforms.py). Strangers do what nobody may do: they fork with their own records, of any
length and weight; say READY and deliver nothing; train for ever; sign changes that are none of theirs.
"""

from __future__ import annotations

import random
from typing import TYPE_CHECKING

from simulation.draws import choice, hex_digits
from simulation.guests import Guests
from simulation.lies import STRANGER
from simulation.reforms import Reforms
from simulation.shell import SimCrypto

from tapestry.node.protocol import events as ev
from tapestry.node.protocol.members import UNIT, Change, Charter, Roll, change_id, change_message
from tapestry.node.protocol.messages import Changes, Commit, Message, Ready, Records, Stage, Status
from tapestry.node.protocol.record import Body, Member, Record, accept_message, draw_message, head_of

if TYPE_CHECKING:
    from simulation.shell import Node
    from simulation.world import World

ASK_AGAIN_S = 2.0
SET_AGAIN_S = 4.0
SET_TO = {  # what settings are changed to
    "audit.share": ["0", "0.3", "1", "1"],
    "gate.margin": ["0", "0.1", "0.5"],
    "round.max_influence": ["0.4", "0.6", "1"],
    "round.straggler_wait_s": ["0", "0.5", "2", "auto"],
    "round.closing_grace_s": ["0", "0.5", "2", "auto"],
    "round.commit_grace_s": ["0", "0.5", "2"],
    "round.stall_s": ["2", "3.5", "5"],
    "round.exchange_max_s": ["5", "20", "auto"],
    "round.quorum_loss_s": ["5", "15", "auto"],
    "round.wait_max_s": ["60", "600"],
}
FORK_RECORDS_MAX = 12


def draw_charter(rng: random.Random) -> Charter:
    return Charter(
        admission="open" if rng.random() < 0.15 else "members",
        admit_by=rng.choice(["founder", "founder", "majority", "council"]),
        voice=rng.choice(["equal", "equal", "tokens", "fixed"]),
        open_votes_after=rng.choice([0, 3]),
    )


def council(rule: str, founders: int) -> str:
    """The rule as the charter writes it."""
    return f"council {min(2, founders)}/{founders}" if rule == "council" else rule


class Consortium:
    """Draws from a generator of its own."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.rng = world.own
        drawn = not world.directed
        self.changes = drawn and self.rng.random() < 0.6  # whether members come and go
        settings = random.Random(f"settings {world.seed}")  # apart: the other worlds stay as they were
        self.settles = drawn and settings.random() < 0.08  # whether settings of the run are changed
        self.settings = settings
        self.reforms = Reforms(world, drawn)
        self.guests = Guests(world, drawn)
        self.strangers = drawn and self.rng.random() < 0.4  # whether strangers attack

    def plan(self, until_s: float) -> None:
        if self.changes or self.world.late:
            self.world.later(3.0 * self.rng.random(), None, self._change)
        if self.strangers:
            self.world.later(3.0 * self.rng.random(), None, self._attack)
        if self.settles:
            self.world.later(SET_AGAIN_S, None, self._set)
        self.reforms.plan()
        self.guests.plan()

    # --- members -------------------------------------------------------------------------------

    def _nodes(self) -> list[Node]:
        return [n for n in self.world.nodes.values() if n.core is not None and not n.frozen]

    @property
    def asks_all(self) -> bool:
        """Whether who belongs to the run and never comes might be missed when it is asked for a signature."""
        return self.reforms.on or self.world.genesis.charter.admit_by == "majority"

    def _change(self) -> None:
        if self.world.healed:
            return
        world, rng = self.world, self.rng
        world.later(0.5 + 4.0 * rng.random(), None, self._change)
        nodes = self._nodes()
        if not nodes:
            return
        node = choice(rng, nodes)
        assert node.core is not None
        roll = node.core.chain.roll
        names = list(world.nodes)
        name = choice(rng, names)
        if name not in roll.members:
            kind, peer, value = "admit", name, "late"
        elif not self.changes or len(roll.members) < 3:
            return
        else:
            kind, peer = choice(rng, ["remove", "voice", "admit", "charter"]), name
            value = {"voice": "3", "charter": "open_share 100000"}.get(kind, "x")
            if kind == "charter":
                peer = ""
            if kind == "admit":  # of somebody who never comes: who must not be needed for anything
                if self.asks_all:
                    return
                peer = f"guest{rng.getrandbits(8)}"
            if kind == "remove" and name == names[0]:
                return  # without its founder's key a run that asks for it admits nobody ever again
        self.ask(Change(kind, peer, value, node.core.chain.epoch + 1000, self.token()))

    def _set(self) -> None:
        """By whoever may: from the next record on nodes wait shorter or longer, audit less or more, and more.
        Where epochs take minutes, waits of seconds are none."""
        world = self.world
        if world.healed or not self._nodes():
            return
        world.later(SET_AGAIN_S, None, self._set)
        epoch = max(node.core.chain.epoch for node in self._nodes() if node.core is not None)
        keys = [key for key in SET_TO if world.stretch == 1.0 or not key.endswith("_s")]
        key = choice(self.settings, keys)
        value = f"{key} {choice(self.settings, SET_TO[key])}"
        self.ask(Change("set", "", value, epoch + 1000, self.token()))

    def ask(self, change: Change) -> None:
        """By everybody who may: who is not asked for a signature need not give one."""
        self.world.tell("world", f"ASKS for {change.kind} {change.peer}")
        for node in self._nodes():
            node.feed(ev.ChangeAsked(change))

    def token(self) -> str:
        return hex_digits(self.rng, 32)

    def restore(self) -> None:
        """The network is whole: everybody belongs to the run in the end."""
        best = self.world.best()
        missing = [name for name in self.world.nodes if name not in best.roll.members]
        pending = [c for n in self._nodes() if n.core for c in n.core.ctx.proposals.pending.values()]
        run_id, done = self.world.genesis.run_id, best.roll.done  # who was removed may hold what is done
        known = {c.peer: c for c in pending if c.kind == "admit" and change_id(run_id, c) not in done}
        for name in missing:
            self.ask(known.get(name) or Change("admit", name, "", best.epoch + 1000, self.token()))
        self.world.later(ASK_AGAIN_S, None, self.restore)

    # --- strangers -----------------------------------------------------------------------------

    def _attack(self) -> None:
        world, rng = self.world, self.rng
        world.later(0.2 + 3.0 * rng.random(), None, self._attack)
        nodes = self._nodes()
        if not nodes:
            return
        victim = choice(rng, nodes)
        core = victim.core
        assert core is not None
        liar = f"{STRANGER}{rng.getrandbits(2)}"  # five identities, with the one that lies
        roll = core.chain.roll
        if liar in roll.members:
            return
        if liar not in core.ctx.peers or not core.ctx.peers[liar].up:
            victim.feed(ev.PeerUp(liar))
        for message in self._lies(liar, core.chain.epoch, roll, victim):
            victim.feed(ev.Received(liar, message))

    def _lies(self, liar: str, epoch: int, roll: Roll, victim: Node) -> list[Message]:
        rng, core = self.rng, victim.core
        assert core is not None
        head, digest = core.chain.head, core.sync.state_digest
        training = Status(epoch, head, epoch, "training", Stage.TRAINING, 0, 0, ())
        kind = rng.randrange(5)
        if kind == 0:
            return [training]
        if kind == 1:
            ballot = core.round.ballot if core.round is not None else 0
            return [training, Ready(epoch, head, ballot, False, digest, self.token(), 2**53, 1.0, -1, None)]
        if kind == 2:
            records = self._fork(liar, victim, [liar])
            far = Status(epoch + 50, records[-1].head, epoch + 50, "training", Stage.TRAINING, 0, 0, ())
            return [far, Records(records[0].body.epoch - 1, tuple(records)), Commit(records[0])]
        if kind == 3:
            change = Change("admit", liar, "", epoch + 9, self.token())
            signature = crypto_of(liar).sign(change_message(roll.run_id, change))
            name = liar if rng.random() < 0.5 or not roll.council else choice(rng, list(roll.council))
            signed = change.signed(name, signature)  # in another's name it is false
            return [Changes((signed,)), Commit(self._fork(liar, victim, [liar], (signed,))[0])]
        member = choice(rng, sorted(roll.members))  # beside itself it names a member that never signed
        named = [member] if rng.random() < 0.5 else sorted({liar, member})
        return [Commit(self._fork(liar, victim, named)[0])]

    def _fork(
        self, liar: str, victim: Node, named: list[str], changes: tuple[Change, ...] = ()
    ) -> list[Record]:
        """Forced records of its own from a recent record on, signed by all names, with its key."""
        core = victim.core
        assert core is not None
        chain = core.chain
        at = max(0, chain.epoch - self.rng.randrange(4))
        prev, crypto, records = chain.head_at(at), crypto_of(liar), []
        for i in range(1 + self.rng.randrange(FORK_RECORDS_MAX)):
            members = tuple(Member(p, UNIT, self.token(), "", 2**53) for p in named)
            forced = self.rng.random() < 0.8
            run_id, state, result = chain.genesis.run_id, core.sync.state_digest, "0" * 64
            body = Body(run_id, at + i + 1, prev, state, members, result, forced, changes=changes)
            head = head_of(body, crypto)
            signatures = tuple((p, crypto.sign(accept_message(head, 0))) for p in named)
            draws = tuple((p, crypto.sign(draw_message(head))) for p in named)
            records.append(Record(body, head, 0, signatures, None, draws))
            prev, changes = head, ()
        return records


def crypto_of(name: str) -> SimCrypto:
    return SimCrypto(name)
