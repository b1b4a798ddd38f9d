"""A swarm in virtual time: many cores, one seed, every fault drawn from it.

One heap of events. `World.run()` lets faults happen, then heals the network, brings everyone back, and
demands that all nodes reach one head and commit on; then it kills one for good. Invariants (invariants.py)
are checked after every event that can break them.
"""

from __future__ import annotations

import hashlib
import random
import traceback
from collections.abc import Callable, Sequence
from dataclasses import replace
from heapq import heappop, heappush
from typing import Any, Literal, NoReturn

from simulation.audits import Audits
from simulation.autocrats import Autocrats
from simulation.backups import Backups
from simulation.colluders import Colluders
from simulation.consortium import Consortium, council, draw_charter
from simulation.draws import hex_digits
from simulation.equivocators import Equivocators
from simulation.faults import Chaos, Faults
from simulation.forgers import Forgers
from simulation.gates import GateWorld
from simulation.invariants import Invariants
from simulation.inventors import Inventors
from simulation.mutes import Floods, Mutes
from simulation.petitions import Petitions
from simulation.rollbacks import Rollbacks
from simulation.shell import TICK, Node, SimCrypto, digest
from simulation.shrinkers import Shrinkers
from simulation.splitters import Splitters
from simulation.stops import Stops
from simulation.usurpers import Usurpers
from simulation.violation import Violation

from tapestry.node.protocol import events as ev
from tapestry.node.protocol.canon import quorum
from tapestry.node.protocol.chain import Chain
from tapestry.node.protocol.core import founding_vote
from tapestry.node.protocol.members import Charter
from tapestry.node.protocol.messages import Message, Stage, Status
from tapestry.node.protocol.record import Genesis, found
from tapestry.node.protocol.rules import Rules

__all__ = ["Faults", "Node", "SimCrypto", "Violation", "World", "digest"]

SETTLE_S = 90.0  # after the network has healed: all nodes at one head, two epochs on. Virtual
SURVIVE_S = 25.0  # after a reducer's death: two epochs on. Detection, two rounds of up to 7 s, some ballots
GATED_S = 60.0  # the same where a gate has rounds made again, up to four times each, or a liar may lead them
COMPUTED: dict[str, Any] = dict.fromkeys(
    ("straggler_wait_s", "closing_grace_s", "quorum_loss_s", "exchange_max_s")
)  # each node computes its own: protocol/pace.py
Happening = ev.Input | Callable[[], object]
EXAM_EVERY = 3  # seeds, of which one ends with a death
PETITIONED = 1  # of EXAM_EVERY: it ends with a change that everybody asks for
FAR_SHARE = 0.1  # of the worlds have one node far from all others
FAR_S = (0.05, 0.2)  # one way
LIAR_SHARE = 0.15  # of the worlds have a reducer that lies
LIES_OF_16 = 3  # of 16 shards that it averages
SLOW_SHARE = 0.05  # of the worlds are slow ones, of few nodes
SLOW_PEERS_MAX = 5
STRETCH = 30.0  # times as long as elsewhere takes everything in them but a message and a fault
AUDIT_SHARE = 0.3  # of shards: more than a run has, so that more is seen in a short one


class World:
    """One seed's world."""

    def __init__(
        self,
        seed: int,
        peers: int | None = None,
        faults: Faults | None = None,
        fault_s: float = 80.0,
        epochs: int = 20,
        rules: Rules | None = None,
        updates_kept: int = 6,
        checkpoint_every: int = 4,
        keep_story: bool = False,
        keep_trace: bool = False,
        late: Sequence[str] = (),  # in a story of one's own: who is no member from the start
        admission: str = "",  # and whether the run is open
    ) -> None:
        self.rng = random.Random(seed)
        self.random = self.rng.random
        self.seed = seed
        self.now = 0.0
        self.heap: list[tuple[float, int, int, Node | None, Happening]] = []
        self.count = 0
        self.messages = 0
        self.handovers = 0  # times that a record which bears one was taken
        self.story: list[tuple[float, str, object, object]] | None = [] if keep_story else None
        self.digest = hashlib.blake2b(digest_size=16) if keep_trace else None
        self.outcomes: dict[str, int] = {}
        self.refused: dict[str, int] = {}
        self.cuts: dict[tuple[str, str], float] = {}  # (from, to) -> until
        self.unlinked: set[tuple[str, str]] = set()  # (from, to) that get no link
        self.links: dict[tuple[str, str], int] = {}  # (from, to) -> which link of theirs it is
        self.updates_kept = updates_kept
        self.checkpoint_every = checkpoint_every
        self.train_s = (0.3, self.rng.choice([0.6, 1.0, 3.0]))
        self.faults = Faults.draw(self.rng) if faults is None else faults
        self.fault_s = fault_s
        self.epochs = epochs
        self.stretch = 1.0
        self.laggard, self.lag = "", 1.0  # a node whose trainer is that much slower than the others'
        self.steps = 0  # of an epoch; a trainer that is told to end does so after one. 0: nearly at once
        self.bulk_s = 0.0  # what a shard takes at the longest, in which bytes come every second
        self.furthest = 0  # epoch that any node has ever come to
        self.healed = False
        peers = self.rng.choice([1, 2, 3, 3, 4, 4, 5, 5, 6, 7, 8, 12]) if peers is None else peers
        names = [f"p{i}" for i in range(peers)]
        slow = random.Random(f"slow {seed}")  # a draw of its own, as below
        is_slow = faults is None and rules is None and peers <= SLOW_PEERS_MAX and slow.random() < SLOW_SHARE
        if is_slow:
            self.slow_down(slow, names)
        self.chaos = Chaos(self, self.faults)
        policies: list[Literal["auto", "continue", "wait"]] = ["continue", "wait"]
        policy = self.rng.choice(policies)
        founder = SimCrypto(names[0])
        state = digest(b"state 0")
        nonce = "0" * 32
        # Drawn apart, so that the rest of the world is what it was before there were members. Where faults
        # are given, the story is one of its own: all are founders, and tokens weigh as they always did.
        own = random.Random(seed ^ 0x6D656D626572)
        self.directed = faults is not None
        self.charter, self.late = Charter(voice="tokens"), list(late)
        if admission:
            self.charter = replace(self.charter, admission=admission)
        if not self.directed:
            policy = "auto" if policy == "wait" and own.random() < 0.5 else policy
            self.charter = draw_charter(own)
            self.late = [] if own.random() < 0.5 else [n for n in names[1:] if own.random() < 0.3]
        founders = [n for n in names if n not in self.late]
        charter = replace(self.charter, admit_by=council(self.charter.admit_by, len(founders)))
        self.own = own
        self.genesis: Genesis = found(
            "spec", names[0], state, digest(b"schema"), 1000, nonce, founder, charter, founders
        )
        self.rules = (
            replace(rules, run_id=self.genesis.run_id)
            if rules is not None
            else Rules(
                run_id=self.genesis.run_id,
                shard_count=self.rng.randint(1, 5),
                straggler_wait_s=1.0,
                closing_grace_s=0.5,
                stall_s=3.0,
                quorum_loss_s=self.rng.choice([8.0, 15.0]),
                on_quorum_loss=policy,
                exchange_max_s=20.0,
                audit_share=AUDIT_SHARE,
                max_influence=self.rng.choice([1.0, 1.0, 0.6]),
                records_bytes_max=self.rng.choice([1 << 19, 1 << 19, 2500]),
            )
        )
        if is_slow:
            self.rules = replace(self.rules, **COMPUTED, exchange_sized_s=20 * STRETCH)
        self.gates = GateWorld(self, faults is None and not is_slow, names)
        self.rules = self.gates.rules(self.rules)
        self.far_s: dict[str, float] = {}  # node -> what a message takes longer to it, and from it
        far = random.Random(f"far {seed}")  # a draw of its own: the other worlds stay as they were
        if faults is None and peers > 1 and far.random() < FAR_SHARE:
            self.far_s[names[-1]] = far.uniform(*FAR_S)
        liars = random.Random(f"liar {seed}")
        lies = faults is None and peers > 1 and liars.random() < LIAR_SHARE
        self.liar = names[-1] if lies else ""  # a reducer that sends everybody the same wrong mean at times
        self.lied: set[str] = set()  # digests of what it made
        self.equivocators = Equivocators(self, faults is None, names)
        self.backups = Backups(self, faults is None and not is_slow, names)
        self.inventors = Inventors(self, faults is None, names)
        self.mutes = Mutes(self, faults is None and not is_slow and not self.gates.on, names)
        self.autocrats = Autocrats(self, faults is None and not is_slow, names)
        self.splitters = Splitters(self, faults is None and not is_slow, names)
        self.forgers = Forgers(self, faults is None and not is_slow, names)
        self.shrinkers = Shrinkers(self, faults is None and not is_slow and not self.mutes.names, names)
        self.stops = Stops(self, faults is None)
        self.usurpers = Usurpers(self, faults is None and not is_slow, names)
        self.floods = Floods(self, faults is None and not is_slow, names)
        able = faults is None and not is_slow and not self.mutes.names and not self.usurpers.names
        self.colluders = Colluders(self, able, names, self.liars())
        self.rollbacks = Rollbacks(self, faults is None)
        self.desk = Audits(self, liars, names)
        self.audits: dict[bool, int] = {}  # whether a lie was found -> how often
        self.invariants = Invariants(self)
        self.consortium = Consortium(self)
        self.petitions = Petitions(self)
        self.nodes = {name: Node(self, name) for name in names}
        if self.faults.skew_s:
            for node in self.nodes.values():
                node.skew_s = self.rng.random() * self.faults.skew_s
        first = self.nodes[names[0]]
        first.disk.states[self.genesis.run_id] = (0, state)
        first.disk.state_head = self.genesis.run_id
        first.disk.vote = founding_vote(self.genesis.run_id, first.disk.life)
        self.invariants.state_of[self.genesis.run_id] = state

    def slow_down(self, own: random.Random, names: list[str]) -> None:
        """Epochs of minutes, one member slower than the others, and shards that take long."""
        self.stretch = STRETCH
        self.train_s = (0.3 * STRETCH, own.choice([1.0, 3.0]) * STRETCH)
        self.laggard, self.lag, self.steps = names[-1], own.uniform(1.0, 3.0), own.choice([1, 4])
        self.bulk_s = own.choice([0.0, 1.0]) * STRETCH
        self.fault_s, self.epochs = self.fault_s * STRETCH / 3, self.epochs // 3
        self.faults = self.faults.rarer(3 / STRETCH)

    def liars(self) -> set[str]:
        """Each that lies in its own way."""
        kinds = (
            self.equivocators,
            self.inventors,
            self.autocrats,
            self.splitters,
            self.forgers,
            self.shrinkers,
        )
        return {self.liar, *[kind.name for kind in kinds]} - {""}

    def lies(self, name: str, head: str, shard: int) -> bool:
        """Whether this reducer sends another mean of the shard in the round of `head`."""
        return name == self.liar and int(digest(f"lie {head} {shard}".encode())[0], 16) < LIES_OF_16

    # --- running -------------------------------------------------------------------------------

    def run(self, settle_s: float = SETTLE_S) -> World:
        """Faults until `epochs` are committed or fault_s is over, then peace, then one more death.

        Raises Violation if an invariant breaks.
        """
        try:
            self._run(settle_s)
        except Violation:
            raise
        except Exception as error:
            where = traceback.extract_tb(error.__traceback__)[-1]
            self.fail("world", f"raised {error!r} at {where.filename.rsplit('/', 1)[-1]}:{where.lineno}")
        return self

    def _run(self, settle_s: float) -> None:
        nodes = list(self.nodes.values())
        nodes[0].start()
        for node in nodes[1:]:
            self.later(self.rng.random() * 5.0, None, node.start)
        self.chaos.plan(self.fault_s)
        self.consortium.plan(self.fault_s)
        self.rollbacks.plan()
        self.backups.plan()
        self.usurpers.plan()
        self.colluders.plan()
        self.shrinkers.plan()
        self.stops.plan()
        self.gates.plan()
        while self.heap and self.now < self.fault_s and self.furthest < self.epochs:
            self.step()
        self.heal()
        self.consortium.restore()
        settle_s = self.usurpers.settle_s(self.mutes.settle_s(settle_s))
        goal, until = self.furthest + 2, self.now + settle_s * self.stretch
        while not self.settled(goal):
            if self.now > until or not self.heap:
                text = f"liveness: no common head at epoch {goal} within {settle_s * self.stretch:g} s"
                self.fail("world", f"{text}: {self.where()}")
            self.step()
        self.mutes.wait_for_the_end(settle_s)
        self.usurpers.wait_for_the_end(settle_s)
        needed = self.usurpers.names or self.colluders.names  # for a majority then
        if self.seed % EXAM_EVERY == 0 and not needed:
            self._survive_a_death()
        if self.seed % EXAM_EVERY == PETITIONED:
            self.petitions.wait_for_one(settle_s)

    def _survive_a_death(self) -> None:
        """G4: a reducer is killed for good in the middle of a round; a majority goes on by itself."""
        dead = None
        until = self.now + SETTLE_S * self.stretch
        while dead is None:
            self.step()
            for node in self.nodes.values():
                core = node.core
                if core is None or core.round is None or core.round.stage != Stage.EXCHANGING:
                    continue
                electorate = core.round.electorate
                if self._can_do_without(node.name, electorate) and core.round.exchange.reduces(node.name):
                    dead = node
            if self.now > until or len(self.nodes) < 3:
                return
        self.tell(dead.name, "KILLED for good")
        dead.crash()
        goal, killed_at = self.furthest + 2, self.now
        living = [n for n in self.nodes.values() if n is not dead]
        slow = self.gates.on or self.mutes.names or self.splitters.name or self.forgers.name
        until = killed_at + (GATED_S if slow else SURVIVE_S) * self.stretch
        while not self._are_at(goal, living):
            if self.now > until:
                text = f"G4: {dead.name} died, and epoch {goal} was not reached in time"
                self.fail("world", f"{text}: {self.where()}")
            self.step()

    def _can_do_without(self, name: str, electorate: Sequence[str]) -> bool:
        """Whether an elector may die. Of three one of whom forges, neither of the others: it can go on to
        ballots of its own as long as no quorum is there without it."""
        others = set(electorate) - {name, self.forgers.name}
        return name in electorate and len(electorate) > 2 and len(others) >= quorum(len(electorate))

    def _are_at(self, goal: int, nodes: list[Node]) -> bool:
        """All of them that belong to the run: to be in again one may need the signature of who is dead."""
        chains = [n.core.chain for n in nodes if n.core is not None]
        if len(chains) < len(nodes):
            return False
        members = max(chains, key=lambda chain: chain.epoch).roll.members
        return all(chain.epoch >= goal for n, chain in zip(nodes, chains, strict=True) if n.name in members)

    def fail(self, name: str, text: str) -> NoReturn:
        raise Violation(self.seed, self.now, name, text)

    def start_all(self) -> World:
        """For directed scenarios: everybody at once, and no fault but those that the test makes."""
        for node in self.nodes.values():
            node.start()
        return self

    def until(self, holds: Callable[[], bool], limit_s: float) -> float:
        """Run until `holds()`, asked after every event. Returns how long that took; fails after limit_s."""
        start = self.now
        while not holds():
            if self.now - start > limit_s or not self.heap:
                raise AssertionError(f"t={self.now:.2f}, not within {limit_s} s: {self.where()}")
            self.step()
        return self.now - start

    def epoch(self) -> int:
        """The furthest that any living node has come."""
        return max((n.core.chain.epoch for n in self.nodes.values() if n.core is not None), default=0)

    def best(self) -> Chain:
        """Of the chains of all living nodes."""
        return max((n.core.chain for n in self.nodes.values() if n.core is not None), key=lambda c: c.tip)

    def cut(self, a: str, b: str, for_s: float = 1e9) -> None:
        """Nothing of what `a` says reaches `b`."""
        self.cuts[a, b] = max(self.cuts.get((a, b), 0.0), self.now + for_s)

    def unlink(self, a: str, b: str) -> None:
        """They never get a link. To be said before they start."""
        self.unlinked |= {(a, b), (b, a)}

    def settled(self, goal: int) -> bool:
        cores = [n.core for n in self.nodes.values()]
        first = cores[0]
        return first is not None and all(
            c is not None and c.sync.at_head and c.chain.epoch >= goal and c.chain.head == first.chain.head
            for c in cores
        )

    def where(self) -> str:
        return "; ".join(
            f"{n.name}: down" if n.core is None else
            f"{n.name}: {n.core.chain.epoch}/{n.core.sync.state_epoch} {n.core.chain.head[:6]} "
            f"{n.core.phase()} {n.core.snapshot(self.now + n.skew_s).reason}"
            + (f" b{n.core.round.ballot}{'F' if n.core.round.forced else ''} {n.core.round.stage.name}"
               if n.core.round else "")
            for n in self.nodes.values()
        )  # fmt: skip

    def step(self) -> None:
        at, _, life, node, what = heappop(self.heap)
        self.now = at
        if node is None:
            assert callable(what)
            what()
        elif life != node.life:
            return
        elif what is TICK:
            if at == node.timer_at:  # else it was set anew
                node.feed(TICK)
        elif isinstance(what, ev.Received) or not callable(what):
            node.feed(what)
        else:
            what()

    def ticket(self) -> int:
        """Of two events at one moment, the one with the lower ticket comes first."""
        self.count += 1
        return self.count

    def later(self, delay_s: float, node: Node | None, what: Happening) -> None:
        life = node.life if node is not None else 0
        heappush(self.heap, (self.now + delay_s, self.ticket(), life, node, what))

    def at(self, at: float, ticket: int, what: Callable[[], object]) -> None:
        heappush(self.heap, (at, ticket, 0, None, what))

    def wake(self, at: float, node: Node) -> None:
        heappush(self.heap, (at, self.ticket(), node.life, node, TICK))

    def draw(self, low: float, high: float) -> float:
        return low + (high - low) * self.random()

    def token(self) -> str:
        return hex_digits(self.rng, 32)

    def trace_digest(self) -> str:
        assert self.digest is not None
        return self.digest.hexdigest()

    def tell(self, name: str, text: object, to: object = None) -> None:
        if self.story is not None:
            self.story.append((self.now, name, to, text))

    def trace(self, name: str, what: object) -> None:
        if self.digest is not None:
            self.digest.update(f"{self.now!r} {name} {what!r}\n".encode())

    # --- the network ---------------------------------------------------------------------------

    def delay(self, bulk: bool = False) -> float:
        draw, faults = self.random, self.faults
        delay_s = 0.002 + 0.028 * draw()
        if bulk:
            delay_s += 0.1 * draw()
        if not self.healed and faults.tail and draw() < faults.tail:
            delay_s += faults.tail_s * draw()
        return delay_s

    def way_s(self, a: str, b: str) -> float:
        """What distance adds to a message from `a` to `b`."""
        return self.far_s.get(a, 0.0) + self.far_s.get(b, 0.0) if self.far_s else 0.0

    def fetch_s(self, a: str, b: str) -> float:
        """What a fetch takes: open a stream, ask, be answered, as if the bytes came at once."""
        return self.delay(bulk=True) + 4 * self.way_s(a, b)

    def is_cut(self, a: Node, b: Node) -> bool:
        return bool(self.cuts) and self.cuts.get((a.name, b.name), 0.0) > self.now

    def send(self, sender: Node, to: str, message: Message, bulk: bool = False) -> None:
        receiver = self.nodes.get(to)  # None: the stranger that tells lies
        self.messages += 1
        if self.colluders.names and self.colluders.takes(sender, to, message):
            return
        message = self.forgers.hears(sender.name, to, self.autocrats.hears(to, message))
        if receiver is None or receiver.core is None or self.is_cut(sender, receiver):
            return
        if self.shrinkers.ignores(sender, to, message):
            return
        way_s = self.way_s(sender.name, to)
        message = self.splitters.says(sender, to, message)
        if bulk:
            self.splitters.begins(sender, receiver, way_s)
        received: ev.Input
        if self.healed:
            message = self.splitters.signs(sender, message)
            self.tell(sender.name, message, to)
            received = ev.Received(sender.name, message)
            self.later(self.delay(bulk) + way_s + self.drips(sender, receiver, bulk), receiver, received)
            return
        draw, faults = self.random, self.faults
        if faults.loss and draw() < faults.loss:
            return
        message = self.inventors.says(sender, self.chaos.falsify(sender.name, message))
        message = self.splitters.signs(sender, message)
        received = ev.Received(sender.name, message)
        if bulk and faults.corrupt and draw() < faults.corrupt:
            received = ev.PeerRefused(sender.name, "checksum")
        self.tell(sender.name, message, to)
        self.later(self.delay(bulk) + way_s + self.drips(sender, receiver, bulk), receiver, received)
        if faults.duplicate and draw() < faults.duplicate:
            self.later(self.delay(bulk) + way_s, receiver, received)

    def drips(self, sender: Node, receiver: Node, bulk: bool) -> float:
        """What a large frame takes besides; meanwhile the receiver sees bytes of it come."""
        if not bulk or not self.bulk_s:
            return 0.0
        takes_s = self.bulk_s * self.random()
        for second in range(1, int(takes_s) + 1):
            self.later(float(second), receiver, ev.BulkProgress(sender.name))
        return takes_s

    def heartbeat(self, sender: Node, peers: tuple[str, ...], status: Status) -> None:
        """A broadcast that reaches most of its receivers at one moment: the lion's share of all messages."""
        draw, faults = self.random, self.faults
        received = ev.Received(sender.name, status)
        together = []
        self.messages += len(peers)
        for peer in peers:
            receiver = self.nodes.get(peer)
            if receiver is None or receiver.core is None or self.is_cut(sender, receiver):
                continue
            if self.colluders.names and self.colluders.hides(sender.name, peer):
                continue
            way_s = self.way_s(sender.name, peer)
            if not self.healed:
                if faults.loss and draw() < faults.loss:
                    continue
                if faults.tail and draw() < faults.tail:
                    self.later(faults.tail_s * draw() + way_s, receiver, received)
                    continue
                if faults.duplicate and draw() < faults.duplicate:
                    self.later(self.delay() + way_s, receiver, received)
            if way_s:
                self.later(self.delay() + way_s, receiver, received)
                continue
            together.append((receiver, receiver.life))
        if self.story is not None:
            for receiver, _ in together:
                self.tell(sender.name, status, receiver.name)

        def arrive() -> None:
            for receiver, life in together:
                if receiver.life == life:
                    receiver.feed(received)

        self.at(self.now + 0.002 + 0.028 * draw(), self.ticket(), arrive)

    def link_up(self, a: Node, b: Node) -> None:
        if (a.name, b.name) in self.unlinked:
            return
        for one, other in ((a, b), (b, a)):
            self.links[other.name, one.name] = self.count
            self.later(self.delay() + self.way_s(a.name, b.name), one, ev.PeerUp(other.name))

    def link_down(self, name: str, at: Node) -> None:
        """`at` hears that its link to `name` is gone, unless a new one is there by then."""
        link = self.links.get((name, at.name))

        def tell() -> None:
            if self.links.get((name, at.name)) == link:
                at.feed(ev.PeerDown(name))

        self.later(self.delay(), at, tell)

    def heal(self) -> None:
        self.tell("world", "HEAL")
        self.healed = True
        self.cuts.clear()
        self.unlinked.clear()
        for node in self.nodes.values():
            if node.core is None:
                node.start()
            elif node.frozen:
                node.thaw()
            node.feed(ev.TrainerState(True, ""))
        nodes = list(self.nodes.values())
        for i, a in enumerate(nodes):
            for b in nodes[:i]:
                self.link_up(a, b)
