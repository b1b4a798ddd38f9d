"""A swarm in virtual time: many cores, one seed, every fault drawn from it.

One heap of events. `World.run()` lets faults happen until `fault_s`, then heals the network, brings everyone
back, and demands that all nodes reach one head and commit on. Invariants (tests/simulation/invariants.py) are
checked after every event that can break them.

A state is the digest of its history, a contribution's shard is (peer, contribution, shard), a reduced shard
is the tuple of what was averaged: so a wrong mixture is visible in the values themselves.
"""

from __future__ import annotations

import hashlib
import heapq
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import ClassVar

from simulation.invariants import Invariants
from simulation.lies import STRANGER, draw_lie

from tapestry.node.protocol import events as ev
from tapestry.node.protocol.chain import Chain, Genesis, Record, found
from tapestry.node.protocol.context import Rules
from tapestry.node.protocol.core import Core, Restored
from tapestry.node.protocol.messages import Message, Result, Shard


def digest(data: bytes) -> str:
    return hashlib.blake2b(data, digest_size=32).hexdigest()


class SimCrypto:
    """A signature is a digest that only the simulator's honest nodes compute for themselves."""

    def __init__(self, me: str) -> None:
        self.me = me

    def digest(self, data: bytes) -> str:
        return digest(data)

    def sign(self, message: bytes) -> str:
        return digest(self.me.encode() + message)

    def verify(self, peer: str, signature: str, message: bytes) -> bool:
        return signature == digest(peer.encode() + message)


@dataclass
class Faults:
    """Probabilities per message, and rates per second of virtual time, while faults are on."""

    loss: float = 0.0
    duplicate: float = 0.0
    tail: float = 0.0  # share of messages that take up to tail_s
    tail_s: float = 4.0
    crash_per_s: float = 0.0
    freeze_per_s: float = 0.0
    cut_per_s: float = 0.0  # one-way cuts
    link_drop_per_s: float = 0.0  # streams that break and come back
    trainer_down_per_s: float = 0.0
    island_per_s: float = 0.0  # the swarm falls into two parts
    blackout_per_s: float = 0.0  # a majority, or everybody, crashes at once
    crash_at_vote: float = 0.0  # probability that a node dies just before or after it wrote a vote
    crash_at_fork: float = 0.0  # probability that it dies when it has left a fork and not followed the other
    lies_per_s: float = 0.0  # messages of random values in the name of a stranger or a member
    drip_per_s: float = 0.0  # a peer drips bytes, of which no shard ever comes

    @classmethod
    def draw(cls, rng: random.Random) -> Faults:
        def maybe(p: float, high: float) -> float:
            return rng.random() * high if rng.random() < p else 0.0

        return cls(
            loss=maybe(0.5, 0.15),
            duplicate=maybe(0.4, 0.2),
            tail=maybe(0.5, 0.1),
            crash_per_s=maybe(0.6, 0.06),
            freeze_per_s=maybe(0.3, 0.03),
            cut_per_s=maybe(0.4, 0.06),
            link_drop_per_s=maybe(0.3, 0.06),
            trainer_down_per_s=maybe(0.3, 0.04),
            island_per_s=maybe(0.4, 0.01),
            blackout_per_s=maybe(0.2, 0.01),
            crash_at_vote=maybe(0.4, 0.1),
            crash_at_fork=maybe(0.3, 0.3),
            lies_per_s=maybe(0.3, 0.5),
            drip_per_s=maybe(0.2, 0.02),
        )


@dataclass
class Disk:
    """What survives a crash."""

    records: list[Record] = field(default_factory=list)
    vote: ev.Vote | None = None
    updates: dict[str, tuple[int, tuple[object, ...]]] = field(
        default_factory=dict
    )  # head -> (epoch, shards)
    states: dict[str, tuple[int, str]] = field(default_factory=dict)  # head -> (epoch, state digest)
    state_head: str = ""


class Node:
    """A core and the shell around it, as the simulator plays it."""

    def __init__(self, world: World, name: str) -> None:
        self.world = world
        self.name = name
        self.disk = Disk()
        self.core: Core | None = None
        self.frozen = False
        self.life = 0  # counts starts; events of an earlier life are dropped
        self.timer_at = -1.0
        self.backlog: list[ev.Input] = []  # what came while frozen
        self.training = 0  # counts Train outputs; an older one's contribution is dropped

    def start(self) -> None:
        world, disk = self.world, self.disk
        self.life += 1
        self.frozen = False
        self.backlog.clear()
        self.timer_at = -1.0
        state = disk.states.get(disk.state_head)
        chain = Chain(world.genesis, disk.records)
        on_chain = (
            state is not None and state[0] <= chain.epoch and chain.head_at(state[0]) == disk.state_head
        )
        restored = Restored(
            chain,
            state[0] if on_chain and state is not None else -1,
            state[1] if on_chain and state is not None else "",
            disk.vote,
            tuple(disk.updates),
        )
        self.core = Core(self.name, world.rules, SimCrypto(self.name), restored, world.now)
        self.feed(ev.Tick())
        for other in world.nodes.values():
            if other is not self and other.core is not None:
                world.link_up(self, other)

    def crash(self) -> None:
        self.life += 1
        self.core = None
        self.frozen = False
        for other in self.world.nodes.values():
            if other.core is not None:
                self.world.link_down(self.name, other)

    def feed(self, inp: ev.Input) -> None:
        if self.core is None:
            return
        if self.frozen:
            self.backlog.append(inp)
            return
        life = self.life
        for output in self.core.handle(inp, self.world.now):
            self.execute(output)
            if self.life != life:
                return  # it crashed between two outputs
        self.world.invariants.after_event(self)
        at = max(self.core.wakeup_at(self.world.now), self.world.now + 0.001)
        if self.timer_at <= self.world.now or at < self.timer_at:
            self.timer_at = at
            self.world.later(at - self.world.now, self, ev.Tick())

    def thaw(self) -> None:
        self.frozen = False
        backlog, self.backlog = self.backlog, []
        for inp in backlog:
            self.feed(inp)
        self.feed(ev.Tick())

    # --- outputs -------------------------------------------------------------------------------

    def execute(self, out: ev.Output) -> None:
        self._EXECUTE[type(out)](self, out)

    def do_send(self, out: ev.Send) -> None:
        self.world.send(self, out.peer, out.message)

    def do_send_shard(self, out: ev.SendShard) -> None:
        message = Shard(out.epoch, out.contribution, out.shard, out.blob)
        self.world.send(self, out.peer, message, bulk=True)

    def do_send_result(self, out: ev.SendResult) -> None:
        result = digest(repr(out.blob).encode())
        message = Result(out.epoch, out.head, out.ballot, out.shard, result, out.blob)
        self.world.send(self, out.peer, message, bulk=True)

    def do_reduce(self, out: ev.Reduce) -> None:
        blob = (out.shard, tuple(zip(out.blobs, out.weights, strict=True)))
        reduced = ev.Reduced(out.epoch, out.head, out.ballot, out.shard, digest(repr(blob).encode()), blob)
        self.world.later(self.world.rng.uniform(0.005, 0.05), self, reduced)

    def do_persist_vote(self, out: ev.PersistVote) -> None:
        self.world.invariants.on_vote(self, self.disk.vote, out.vote)
        dies = not self.world.healed and self.world.rng.random() < self.world.faults.crash_at_vote
        if not dies or self.world.rng.random() < 0.8:
            self.disk.vote = out.vote
        if dies:
            self.world.crash_for_a_while(self)

    def do_persist_result(self, out: ev.PersistResult) -> None:
        self.disk.updates[out.head] = (out.epoch, out.blobs)

    def do_append_record(self, out: ev.AppendRecord) -> None:
        self.disk.records.append(out.record)
        self.world.invariants.on_record(self, out.record)

    def do_truncate_chain(self, out: ev.TruncateChain) -> None:
        del self.disk.records[out.epoch :]
        if not self.world.healed and self.world.rng.random() < self.world.faults.crash_at_fork:
            self.world.crash_for_a_while(self)

    def do_apply(self, out: ev.Apply) -> None:
        self.world.later(self.world.rng.uniform(0.01, 0.1), self, lambda: self.apply(out.record))

    def apply(self, record: Record) -> None:
        before = self.disk.states[record.body.prev][1]
        epoch, shards = self.disk.updates[record.head]
        self.world.invariants.on_apply(self, record, shards)
        after = digest(f"{before}|{shards!r}".encode())
        self.set_state(record.head, epoch, after)
        self.forget_old(epoch)
        self.feed(ev.Applied(epoch, after))

    def set_state(self, head: str, epoch: int, state: str) -> None:
        self.disk.states[head] = (epoch, state)
        self.disk.state_head = head
        self.world.invariants.on_state(self, head, state)

    def forget_old(self, epoch: int) -> None:
        keep = self.world.updates_kept
        for head in [h for h, (e, _) in self.disk.updates.items() if e <= epoch - keep]:
            del self.disk.updates[head]

    def do_rollback(self, out: ev.Rollback) -> None:
        assert self.core is not None
        head = self.core.chain.head_at(out.epoch)
        epoch, state = self.disk.states[head]
        self.disk.state_head = head
        self.world.later(0.05, self, ev.Applied(epoch, state))

    def do_fetch_update(self, out: ev.FetchUpdate) -> None:
        donor = self.world.nodes.get(out.donor)

        def arrive() -> None:
            if donor is None or donor.core is None or donor.frozen or self.world.is_cut(donor, self):
                self.feed(ev.FetchFailed(out.donor, out.head, "timeout"))
            elif out.head not in donor.disk.updates:
                self.feed(ev.FetchFailed(out.donor, out.head, "missing"))
            else:
                self.disk.updates[out.head] = donor.disk.updates[out.head]
                self.feed(ev.UpdateFetched(out.head))

        self.world.later(self.world.delay(bulk=True), self, arrive)

    def do_fetch_state(self, out: ev.FetchState) -> None:
        donor = self.world.nodes.get(out.donor)

        def arrive() -> None:
            assert self.core is not None
            chain = self.core.chain
            if donor is None or donor.core is None or donor.frozen or self.world.is_cut(donor, self):
                self.feed(ev.FetchFailed(out.donor, "", "timeout"))
                return
            for epoch in range(min(out.epoch_max, chain.epoch), -1, -1):
                head = chain.head_at(epoch)
                if head in donor.disk.states and epoch % self.world.checkpoint_every == 0:
                    state = donor.disk.states[head][1]
                    self.set_state(head, epoch, state)
                    self.feed(ev.Applied(epoch, state))
                    return
            self.feed(ev.FetchFailed(out.donor, "", "missing"))

        self.world.later(self.world.delay(bulk=True), self, arrive)

    def do_train(self, out: ev.Train) -> None:
        self.training += 1
        self._finish_training(out.epoch, self.training, self.world.rng.uniform(*self.world.train_s))

    def do_close_training(self, out: ev.CloseTraining) -> None:
        self._finish_training(out.epoch, self.training, self.world.rng.uniform(0.01, 0.3))

    def _finish_training(self, epoch: int, training: int, after_s: float) -> None:
        def finish() -> None:
            if training != self.training:
                return
            self.training += 1
            contribution = self.world.token()
            blobs = tuple((self.name, contribution, s) for s in range(self.world.rules.shard_count))
            self.feed(ev.Contributed(epoch, contribution, self.world.rng.randint(1, 1000), 1.0, blobs))

        self.world.later(after_s, self, finish)

    def do_nothing(self, out: ev.Output) -> None:
        pass

    def do_note(self, out: ev.Note) -> None:
        self.world.tell(self.name, out.text)

    def do_verdict(self, out: ev.Verdict) -> None:
        self.world.tell(self.name, f"refused peer={out.peer} reason={out.reason} {out.text}")
        self.world.refused[out.reason] = self.world.refused.get(out.reason, 0) + 1

    def do_end_round(self, out: ev.EndRound) -> None:
        self.world.outcomes[out.outcome] = self.world.outcomes.get(out.outcome, 0) + 1

    _EXECUTE: ClassVar[dict[type, Callable[..., None]]] = {
        ev.Send: do_send,
        ev.SendShard: do_send_shard,
        ev.SendResult: do_send_result,
        ev.Reduce: do_reduce,
        ev.PersistVote: do_persist_vote,
        ev.PersistResult: do_persist_result,
        ev.AppendRecord: do_append_record,
        ev.TruncateChain: do_truncate_chain,
        ev.Apply: do_apply,
        ev.Rollback: do_rollback,
        ev.FetchUpdate: do_fetch_update,
        ev.FetchState: do_fetch_state,
        ev.Train: do_train,
        ev.CloseTraining: do_close_training,
        ev.EndRound: do_end_round,
        ev.Verdict: do_verdict,
        ev.Note: do_note,
    }


class World:
    """One seed's world."""

    def __init__(
        self,
        seed: int,
        peers: int | None = None,
        faults: Faults | None = None,
        fault_s: float = 40.0,
        rules: Rules | None = None,
        updates_kept: int = 6,
        checkpoint_every: int = 4,
        keep_story: bool = False,
    ) -> None:
        self.rng = random.Random(seed)
        self.seed = seed
        self.now = 0.0
        self.heap: list[tuple[float, int, int, Node | None, object]] = []
        self.count = 0
        self.messages = 0
        self.story: list[str] | None = [] if keep_story else None
        self.outcomes: dict[str, int] = {}
        self.refused: dict[str, int] = {}
        self.cuts: dict[tuple[str, str], float] = {}  # (from, to) -> until
        self.links: dict[tuple[str, str], int] = {}  # (from, to) -> which link of theirs it is
        self.updates_kept = updates_kept
        self.checkpoint_every = checkpoint_every
        self.train_s = (0.5, self.rng.choice([0.8, 2.0, 6.0]))
        self.faults = Faults.draw(self.rng) if faults is None else faults
        self.fault_s = fault_s
        self.healed = False
        peers = self.rng.randint(1, 7) if peers is None else peers
        names = [f"p{i}" for i in range(peers)]
        policy = self.rng.choice(["continue", "wait"])
        founder = SimCrypto(names[0])
        state = digest(b"state 0")
        self.genesis: Genesis = found("spec", names[0], state, digest(b"schema"), 1000, founder)
        self.rules = rules or Rules(
            run_id=self.genesis.run_id,
            shard_count=self.rng.randint(1, 5),
            straggler_wait_s=1.0,
            closing_grace_s=0.5,
            stall_s=3.0,
            quorum_loss_s=self.rng.choice([8.0, 15.0]),
            on_quorum_loss=policy,
            exchange_max_s=20.0,
            max_influence=self.rng.choice([1.0, 1.0, 0.6]),
        )
        self.invariants = Invariants(self)
        self.nodes = {name: Node(self, name) for name in names}
        first = self.nodes[names[0]]
        first.disk.states[self.genesis.run_id] = (0, state)
        first.disk.state_head = self.genesis.run_id

    # --- running -------------------------------------------------------------------------------

    def run(self, settle_s: float = 120.0) -> World:
        """Faults until fault_s, then peace. Raises AssertionError with the seed if an invariant breaks."""
        nodes = list(self.nodes.values())
        nodes[0].start()
        for node in nodes[1:]:
            self.later(self.rng.uniform(0.0, 10.0), None, node.start)
        self._plan_faults()
        self.later(self.fault_s, None, self.heal)
        while self.heap and self.now < self.fault_s:
            self.step()
        goal = 0
        while self.now < self.fault_s + settle_s:
            self.step()
            if not self.healed:
                continue
            if not goal:
                goal = max(len(n.disk.records) for n in nodes) + 3
            if self.settled(goal):
                return self
        raise AssertionError(f"seed {self.seed}: no common head at epoch {goal}: {self.where()}")

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

    def cut(self, a: str, b: str, for_s: float = 1e9) -> None:
        """Nothing of what `a` says reaches `b`."""
        self.cuts[a, b] = self.now + for_s

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
            f"{n.core.phase()} {n.core.reason(self.now)}"
            + (f" b{n.core.round.ballot}{'F' if n.core.round.forced else ''} {n.core.round.stage.name}"
               if n.core.round else "")
            for n in self.nodes.values()
        )  # fmt: skip

    def step(self) -> None:
        at, _, life, node, what = heapq.heappop(self.heap)
        self.now = at
        if node is not None and life != node.life:
            return
        if callable(what):
            what()
        else:
            assert node is not None
            node.feed(what)  # type: ignore[arg-type]

    def later(self, delay_s: float, node: Node | None, what: ev.Input | Callable[[], None]) -> None:
        self.count += 1
        life = node.life if node is not None else 0
        heapq.heappush(self.heap, (self.now + delay_s, self.count, life, node, what))

    def token(self) -> str:
        return f"{self.rng.getrandbits(128):032x}"

    def tell(self, name: str, text: str) -> None:
        if self.story is not None:
            self.story.append(f"{self.now:8.3f} {name} {text}")

    # --- the network ---------------------------------------------------------------------------

    def delay(self, bulk: bool = False) -> float:
        rng = self.rng
        base = rng.uniform(0.002, 0.03) + (rng.uniform(0.0, 0.1) if bulk else 0.0)
        if not self.healed and self.faults.tail and rng.random() < self.faults.tail:
            base += rng.uniform(0.0, self.faults.tail_s)
        return base

    def is_cut(self, a: Node, b: Node) -> bool:
        return self.cuts.get((a.name, b.name), 0.0) > self.now

    def send(self, sender: Node, to: str, message: Message, bulk: bool = False) -> None:
        receiver = self.nodes.get(to)  # None: the stranger that tells lies
        self.messages += 1
        if receiver is None or receiver.core is None or self.is_cut(sender, receiver):
            return
        rng, faults = self.rng, self.faults
        if not self.healed and faults.loss and rng.random() < faults.loss:
            return
        if self.story is not None:
            self.tell(sender.name, f"-> {to} {message}")
        self.later(self.delay(bulk), receiver, ev.Received(sender.name, message))
        if not self.healed and faults.duplicate and rng.random() < faults.duplicate:
            self.later(self.delay(bulk), receiver, ev.Received(sender.name, message))

    def link_up(self, a: Node, b: Node) -> None:
        for one, other in ((a, b), (b, a)):
            self.links[other.name, one.name] = self.count
            self.later(self.delay(), one, ev.PeerUp(other.name))

    def link_down(self, name: str, at: Node) -> None:
        """`at` hears that its link to `name` is gone, unless a new one is there by then."""
        link = self.links.get((name, at.name))

        def tell() -> None:
            if self.links.get((name, at.name)) == link:
                at.feed(ev.PeerDown(name))

        self.later(self.delay(), at, tell)

    # --- faults --------------------------------------------------------------------------------

    def _plan_faults(self) -> None:
        for rate, fault in (
            (self.faults.crash_per_s, self._crash),
            (self.faults.freeze_per_s, self._freeze),
            (self.faults.cut_per_s, self._cut),
            (self.faults.link_drop_per_s, self._drop_link),
            (self.faults.trainer_down_per_s, self._trainer_down),
            (self.faults.island_per_s, self._island),
            (self.faults.blackout_per_s, self._blackout),
            (self.faults.lies_per_s, self._lie),
            (self.faults.drip_per_s, self._drip),
        ):
            at = 0.0
            while rate:
                at += self.rng.expovariate(rate * len(self.nodes))
                if at >= self.fault_s:
                    break
                self.later(at, None, fault)

    def _pick(self) -> Node:
        return self.rng.choice(list(self.nodes.values()))

    def _crash(self) -> None:
        self.crash_for_a_while(self._pick())

    def crash_for_a_while(self, node: Node) -> None:
        if node.core is not None:
            self.tell(node.name, "CRASH")
            node.crash()
            self.later(self.rng.choice([0.2, 0.5, 3.0, 20.0]), None, lambda: self._restart(node))

    def _blackout(self) -> None:
        nodes = list(self.nodes.values())
        for node in self.rng.sample(nodes, self.rng.randint(len(nodes) // 2 + 1, len(nodes))):
            self.crash_for_a_while(node)

    def _island(self) -> None:
        names = list(self.nodes)
        island = self.rng.sample(names, self.rng.randint(1, len(names)))
        until = self.now + self.rng.uniform(1.0, 40.0)
        self.tell("world", f"ISLAND {island}")
        for a in names:
            for b in names:
                if (a in island) != (b in island):
                    self.cuts[a, b] = until

    def _restart(self, node: Node) -> None:
        if node.core is None:
            self.tell(node.name, "RESTART")
            node.start()

    def _freeze(self) -> None:
        node = self._pick()
        if node.core is not None and not node.frozen:
            self.tell(node.name, "FREEZE")
            node.frozen = True
            life = node.life
            self.later(self.rng.uniform(1, 15), None, lambda: node.life == life and node.thaw())

    def _cut(self) -> None:
        a, b = self._pick(), self._pick()
        self.tell(a.name, f"CUT -> {b.name}")
        self.cuts[a.name, b.name] = self.now + self.rng.uniform(0.5, 20)
        if self.rng.random() < 0.5:
            self.cuts[b.name, a.name] = self.cuts[a.name, b.name]

    def _drop_link(self) -> None:
        a, b = self._pick(), self._pick()
        if a is not b and a.core is not None and b.core is not None:
            for one, other in ((a, b), (b, a)):
                self.link_down(other.name, one)
            self.later(0.5, None, lambda: a.core and b.core and self.link_up(a, b))

    def _trainer_down(self) -> None:
        node = self._pick()
        node.training += 1
        node.feed(ev.TrainerState(False, "killed"))
        life = node.life
        up = ev.TrainerState(True, "")
        self.later(self.rng.uniform(0.5, 8), None, lambda: node.life == life and node.feed(up))

    def _lie(self) -> None:
        """One message of random values, in the name of a member or of somebody who is none."""
        victim, liar = self._pick(), self.rng.choice([STRANGER, self._pick().name])
        if victim.core is None or liar == victim.name:
            return
        if liar == STRANGER:
            victim.feed(ev.PeerUp(liar))
        lie = draw_lie(self.rng, victim.core, member=liar != STRANGER)
        self.tell(liar, f"LIES to {victim.name}: {lie}")
        victim.feed(ev.Received(liar, lie))

    def _drip(self) -> None:
        victim, peer = self._pick(), self._pick().name
        self.tell(peer, f"DRIPS to {victim.name}")
        for i in range(200):
            self.later(0.2 * i, victim, ev.BulkProgress(peer))

    def heal(self) -> None:
        self.tell("world", "HEAL")
        self.healed = True
        self.cuts.clear()
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
