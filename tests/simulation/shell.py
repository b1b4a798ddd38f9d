"""The shell around a core, as the simulator plays it: disk, jobs and trainer, all in virtual time.

A state is the digest of its history, a contribution's shard is (peer, contribution, shard), a reduced shard
names what was averaged: so a wrong mixture is visible in the values themselves. Of a contribution's numbers
its size is modelled, and what the run's mean, `clipped`, makes of it: some are of 1e30.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Final

from simulation.draws import randint
from simulation.gates import is_poison
from simulation.lies import STRANGER
from simulation.past import RECENT, DiskPast

from tapestry.compression.means.shares import clip_scales
from tapestry.node.protocol import events as ev
from tapestry.node.protocol.agreement import ShardSums
from tapestry.node.protocol.audit import UNPROVEN, Order, SignedMean, means_fault
from tapestry.node.protocol.chain import Chain
from tapestry.node.protocol.core import NOTHING, Core, Restored
from tapestry.node.protocol.messages import Result, Shard, Status
from tapestry.node.protocol.receipts import TwoRosters
from tapestry.node.protocol.record import Body, Record

if TYPE_CHECKING:
    from simulation.world import World

TICK: Final = ev.Tick()
NORM_MAX = 1.5  # of the run's [mean]


@lru_cache(maxsize=4096)  # every node computes what one has computed: heads, orders of leaders, signatures
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


class Part:
    """A shard of a contribution, by name."""

    def __init__(self, peer: str, contribution: str, shard: int) -> None:
        self.peer = peer
        self.contribution = contribution
        self.shard = shard
        self.size = size_of(contribution)
        self.text = f"('{peer}', '{contribution}', {shard})"

    def __repr__(self) -> str:
        return self.text


def size_of(contribution: str) -> float:
    """Its norm: between 1 and 2; of one in sixteen, whose member lies, 1e30."""
    return 1e30 if contribution[-1] == "0" else 1.0 + int(contribution[:2], 16) / 256


class Mean:
    """A reduced shard: what was averaged. Its digest is taken once, though everybody asks for it."""

    def __init__(
        self, shard: int, blobs: tuple[object, ...], weights: tuple[int, ...], lie: bool = False
    ) -> None:
        assert len(blobs) == len(weights)
        self.shard = shard
        # (peer, contribution, weight) of what is this shard of a contribution
        self.averaged: list[tuple[str, str, int]] = []
        sizes = [blob.size if isinstance(blob, Part) else 1.0 for blob in blobs]
        self.scales = clip_scales(sizes, weights, NORM_MAX)
        inputs = []
        for blob, weight in zip(blobs, weights):  # noqa: B905
            if isinstance(blob, Part) and blob.shard == shard:
                self.averaged.append((blob.peer, blob.contribution, weight))
            inputs.append(f"({blob.text if isinstance(blob, Part) else repr(blob)}, {weight})")
        self.text = f"({shard}, ({', '.join(inputs)}{',' if len(inputs) == 1 else ''}))"
        if lie:  # other bits, which look as good as any
            self.text += " and a lie"
        self.digest = digest(self.text.encode())
        poisoned = tuple(isinstance(blob, Part) and is_poison(blob.contribution) for blob in blobs)
        self.sums = sums_of(self.digest, len(blobs), poisoned)

    def __repr__(self) -> str:
        return self.text


def sums_of(digest: str, contributors: int, poisoned: tuple[bool, ...] = ()) -> ShardSums:
    """Some that follow from what was averaged, as those of real shards do; every mean has others. What is
    poisoned lies far from the mean."""
    lots = [int(digest[at : at + 4], 16) for at in range(0, 16, 4)]
    mean_square = 1.0 + lots[0]
    squares = tuple(mean_square * (1.0 + lots[1] % 7 + index) for index in range(contributors))
    if any(poisoned):
        squares = tuple([1e6 * s if bad else s for s, bad in zip(squares, poisoned)])  # noqa: B905
    dots = (float(lots[2] % 100),) * contributors
    return ShardSums(squares, mean_square, squares, dots, mean_square, lots[3], lots[2])


def digest_of(blob: object) -> str:
    """Of what travels: equal values, equal digests."""
    return blob.digest if isinstance(blob, Mean) else digest(repr(blob).encode())


@dataclass
class Disk:
    """What survives a crash."""

    records: list[Record] = field(default_factory=list)
    vote: ev.Vote | None = None
    updates: dict[str, tuple[int, tuple[object, ...]]] = field(
        default_factory=dict
    )  # head -> (epoch, shards)
    means: dict[str, tuple[SignedMean, ...]] = field(default_factory=dict)  # head -> who made that update
    states: dict[str, tuple[int, str]] = field(default_factory=dict)  # head -> (epoch, state digest)
    state_head: str = ""
    life: str = ""
    restored: bool = False  # set back to a backup, and its run was not found since


class Node:
    """A core and the shell around it, as the simulator plays it."""

    def __init__(self, world: World, name: str) -> None:
        self.world = world
        self.name = name
        self.disk = Disk(life=world.token())
        self.core: Core | None = None
        self.frozen = False
        self.life = 0  # counts starts; events of an earlier life are dropped
        self.timer_at = -1.0
        self.backlog: list[ev.Input] = []  # what came while frozen
        self.training = 0  # counts Train outputs; an older one's contribution is dropped
        self.trains = (0.0, 0.0)  # since when, and how long
        self.contributed = ""  # the name of what its trainer gave last, in this life
        self.residual = ""  # the contribution whose rounding goes into the next one
        self.base = ""  # head of the state that the newest Train named
        self.dying = False  # of its last write
        self.crypto = SimCrypto(name)
        self.left: tuple[int, list[Record]] | None = None  # (common epoch, records) of a fork just left
        self.checked: object = None  # the round whose electorate was checked
        self.skew_s = 0.0  # what its clock says more than the world's
        self.execute = EXECUTE
        self.past = DiskPast(world.genesis, self.disk.records)
        self.astray = ""  # the head whose state its arithmetic got wrong; "" if none

    def start(self) -> None:
        world, disk = self.world, self.disk
        self.life += 1
        self.frozen = False
        self.backlog.clear()
        self.timer_at = -1.0
        self.past = DiskPast(world.genesis, disk.records)
        paged = sum(self.name.encode()) % 2  # the others have all of it in memory
        if paged:
            chain = Chain(world.genesis, past=self.past, recent=RECENT)
        else:
            chain = Chain(world.genesis, disk.records)
        epoch, state = self.restore(chain)
        restored = Restored(
            chain,
            epoch,
            state,
            disk.vote,
            tuple(disk.updates),
            disk.life,
            world.backups.goes_on_alone(self),
        )
        self.core = Core(self.name, world.rules, self.crypto, restored, world.now + self.skew_s)
        self.feed(TICK)
        for other in world.nodes.values():
            if other is not self and other.core is not None:
                world.link_up(self, other)

    def restore(self, chain: Chain) -> tuple[int, str]:
        """The newest state of `chain` that checkpoints and updates lead to: epoch and digest, or -1."""
        newest = self.disk.states.get(self.disk.state_head, (-1, ""))[0]
        for epoch in range(min(newest, chain.epoch), -1, -1):
            head = chain.head_at(epoch)
            if head in self.disk.states:
                self.disk.state_head = head
                return self.disk.states[head]
        return -1, ""

    def crash(self) -> None:
        self.life += 1
        self.contributed = self.residual = ""
        self.left = None
        self.core = None
        self.frozen = False
        for other in self.world.nodes.values():
            if other.core is not None:
                self.world.link_down(self.name, other)

    def feed(self, inp: ev.Input) -> None:
        core, world = self.core, self.world
        if core is None:
            return
        if self.frozen:
            self.backlog.append(inp)
            return
        world.trace(self.name, inp)
        outputs = core.handle(inp, world.now + self.skew_s)
        if outputs is not NOTHING:
            self.carry_out(core, outputs)

    def carry_out(self, core: Core, outputs: Sequence[ev.Output]) -> None:
        world, life, now = self.world, self.life, self.world.now
        for output in outputs:
            world.trace(self.name, output)
            self.execute[type(output)](self, output)
            if self.dying:
                self.dying = False
                world.chaos.crash_for_a_while(self)
            if self.life != life:
                return  # it crashed between two outputs
        world.invariants.after_event(self, core)
        at = max(core.wakeup_at(now + self.skew_s) - self.skew_s, now + 0.001)
        if self.timer_at <= now or at < self.timer_at:
            self.timer_at = at
            world.wake(at, self)

    def thaw(self) -> None:
        self.frozen = False
        backlog, self.backlog = self.backlog, []
        for inp in backlog:
            self.feed(inp)
        self.feed(TICK)

    # --- outputs -------------------------------------------------------------------------------

    def do_send(self, out: ev.Send) -> None:
        if self.world.usurpers.keeps_back(self, out.message):
            return
        message = self.world.forgers.says(self, out.message)
        self.world.autocrats.says(self, message)
        self.world.invariants.on_send(self, message)
        self.world.send(self, out.peer, message)
        second = self.world.equivocators.second_vote(self, message)
        if second is not None:
            self.world.send(self, out.peer, second)

    def do_broadcast(self, out: ev.Broadcast) -> None:
        message = out.message
        if isinstance(message, Status):
            self.world.heartbeat(self, out.peers, self.world.mutes.heartbeat(self, message))
            return
        self.world.invariants.on_send(self, message)
        for peer in out.peers:
            self.world.send(self, peer, message)

    def do_send_shard(self, out: ev.SendShard) -> None:
        if self.world.mutes.is_mute(self):
            return
        message = Shard(out.epoch, out.contribution, out.shard, out.blob)
        self.world.send(self, out.peer, message, bulk=True)

    def do_send_result(self, out: ev.SendResult) -> None:
        message = Result(
            out.epoch, out.head, out.ballot, out.shard, digest_of(out.blob), out.blob, out.sums, out.signature
        )
        self.world.send(self, out.peer, message, bulk=True)

    def do_reduce(self, out: ev.Reduce) -> None:
        lie = self.world.lies(self.name, out.head, out.shard)
        mean = Mean(out.shard, out.blobs, out.weights, lie)
        if lie:
            self.world.lied.add(mean.digest)
        reduced = ev.Reduced(out.epoch, out.head, out.ballot, out.shard, mean.digest, mean, mean.sums)
        self.world.later(self.world.draw(0.005, 0.05), self, reduced)

    def do_persist_vote(self, out: ev.PersistVote) -> None:
        self.world.invariants.on_vote(self, self.disk.vote, out.vote)
        if self.writes():
            self.disk.vote = out.vote
            self.world.invariants.on_vote_written(self, out.vote)

    def writes(self) -> bool:
        """Whether a write reaches the disk. If the node dies of it, it was the last, and may be torn: a torn
        file is as good as none, since the store reads back only what is whole."""
        world = self.world
        if world.healed or not world.faults.crash_at_write:
            return True
        if world.rng.random() >= world.faults.crash_at_write:
            return True
        written = world.rng.random() < 0.6
        self.dying = True
        return written

    def do_persist_result(self, out: ev.PersistResult) -> None:
        self.world.invariants.on_result(self, out)
        if self.writes():
            self.disk.updates[out.head] = (out.epoch, out.blobs)
            self.disk.means[out.head] = out.means

    def do_append_record(self, out: ev.AppendRecord) -> None:
        if self.writes():
            self.disk.records.append(out.record)
            self.world.invariants.on_record(self, out.record)

    def do_switch_chain(self, out: ev.SwitchChain) -> None:
        """One write: before it or after it, a crash finds a whole chain."""
        faults, rng = self.world.faults, self.world.rng
        if not self.world.healed and faults.crash_at_fork and rng.random() < faults.crash_at_fork:
            self.dying = True
            if rng.random() < 0.5:
                return
        self.left = (out.epoch, self.disk.records[out.epoch :])
        del self.disk.records[out.epoch :]
        self.past.switched()
        for record in out.records:
            self.disk.records.append(record)
            self.world.invariants.on_record(self, record)

    def do_apply(self, out: ev.Apply) -> None:
        self.world.later(self.world.draw(0.01, 0.1), self, lambda: self.apply(out.record))

    def apply(self, record: Record) -> None:
        if record.head not in self.disk.updates:  # kept for `updates_kept` epochs, and the fork is older
            self.feed(ev.FetchFailed("", "", "missing"))
            return
        epoch, shards = self.world.invariants.on_apply(self, record)
        before = self.disk.states[record.body.prev][1]
        after = digest("".join([before, *[digest_of(s) for s in shards]]).encode())
        self.world.invariants.on_state(self, record.head, after)
        if self.world.chaos.goes_astray(self):
            self.astray, after = record.head, digest(b"astray" + after.encode())
        self.set_state(record.head, epoch, after)
        self.forget_old(epoch)
        self.feed(ev.Applied(epoch, after))

    def set_state(self, head: str, epoch: int, state: str) -> None:
        self.disk.states[head] = (epoch, state)
        self.disk.state_head = head

    def forget_old(self, epoch: int) -> None:
        keep = self.world.rollbacks.base_of(self, epoch - self.world.updates_kept)
        for head in [h for h, (e, _) in self.disk.updates.items() if e <= keep]:
            del self.disk.updates[head]
            self.disk.means.pop(head, None)

    def head_at(self, epoch: int) -> str:
        """The head of `epoch` on the chain that the disk holds."""
        return self.disk.records[epoch - 1].head if epoch else self.world.genesis.run_id

    def do_rollback(self, out: ev.Rollback) -> None:
        self.residual = ""
        head = self.head_at(out.epoch)
        if self.world.rollbacks.is_back(self, out.epoch) and head not in self.disk.states:
            self.go_back(out)
            return
        if head not in self.disk.states:  # its checkpoint and updates were of another life
            self.world.later(0.05, self, ev.FetchFailed("", "", "missing"))
            return
        epoch, state = self.disk.states[head]
        self.disk.state_head = head
        self.world.later(0.05, self, ev.Applied(epoch, state))

    def go_back(self, out: ev.Rollback) -> None:
        """By the records, to an earlier state: from what checkpoint and updates lead to."""
        self.training += 1  # what is under way is of what is undone
        found = self.world.rollbacks.made_of_disk(self, out.epoch)

        def arrive() -> None:
            if found is None:
                self.feed(ev.FetchFailed("", "", "missing"))
                return
            epoch, head, state = found
            self.world.invariants.on_state(self, head, state)
            self.set_state(head, epoch, state)
            self.feed(ev.Applied(epoch, state))

        self.world.later(self.world.draw(0.02, 0.3), self, arrive)

    def do_fetch_update(self, out: ev.FetchUpdate) -> None:
        donor = self.world.nodes.get(out.donor)

        def arrive() -> None:
            if out.donor.startswith(STRANGER):
                self.feed(ev.FetchFailed(out.donor, out.head, "missing"))
            elif donor is None or donor.core is None or donor.frozen or self.world.is_cut(donor, self):
                self.feed(ev.FetchFailed(out.donor, out.head, "timeout"))
            elif out.head not in donor.disk.updates:
                self.feed(ev.FetchFailed(out.donor, out.head, "missing"))
            else:
                epoch, shards = donor.disk.updates[out.head]
                if self.world.chaos.donor_lies():
                    shards = ("a lie", *shards[1:])
                if not self.update_holds(out.result, shards):
                    self.feed(ev.FetchFailed(out.donor, out.head, "digest"))
                    return
                means = donor.disk.means.get(out.head, ())
                if out.accepted is not None and not self.is_proven(out.accepted, means):
                    self.feed(ev.FetchFailed(out.donor, out.head, UNPROVEN))
                    return
                self.disk.updates[out.head] = (epoch, shards)
                if out.accepted is not None:
                    self.disk.means[out.head] = means
                self.feed(ev.UpdateFetched(out.head, means if out.accepted is not None else ()))

        self.world.later(self.world.fetch_s(out.donor, self.name), self, arrive)

    def update_holds(self, result: str, shards: tuple[object, ...]) -> bool:
        """Whether an update is the one that the record names: the shell's check, as node/state has it."""
        return digest("".join([digest_of(s) for s in shards]).encode()) == result

    def is_proven(self, body: Body, means: tuple[SignedMean, ...]) -> bool:
        """Whether members made this value: the shell's check, of one that was accepted and is no record."""
        return means_fault(body, means, self.world.rules.shard_count, self.crypto) is None

    def do_fetch_state(self, out: ev.FetchState) -> None:
        """From the first of the donors that can be reached: what the others give is the same state."""
        self.residual = ""
        first, donors = out.donors[0], [self.world.nodes.get(name) for name in out.donors]

        def arrive() -> None:
            able = [d for d in donors if d is not None and d.core is not None and not d.frozen]
            donor = next((d for d in able if not self.world.is_cut(d, self)), None)
            if donor is None:
                self.feed(ev.FetchFailed(first, "", "timeout"))
                return
            for epoch in range(min(out.epoch_max, len(self.disk.records)), out.epoch_min - 1, -1):
                head = self.head_at(epoch)
                if head in donor.disk.states and self.world.rollbacks.gives(self, epoch):
                    state = donor.disk.states[head][1]
                    if self.world.chaos.donor_lies():
                        state = digest(b"a lie")
                    self.set_state(head, epoch, state)
                    self.feed(ev.Applied(epoch, state))
                    return
            self.feed(ev.FetchFailed(first, "", "missing"))

        self.world.later(self.world.fetch_s(first, self.name), self, arrive)

    def do_train(self, out: ev.Train) -> None:
        self.world.invariants.on_train(self, out.epoch)
        self.training += 1
        self.base = out.base
        takes_s = self.world.draw(*self.world.train_s)
        if self.name == self.world.laggard:
            takes_s *= self.world.lag
        self.trains = self.world.now, takes_s
        self._finish_training(out.epoch, self.training, takes_s)

    def do_close_training(self, out: ev.CloseTraining) -> None:
        """What it has, at the end of the step that it is in; where steps are short, nearly at once."""
        world, (began_at, takes_s) = self.world, self.trains
        after_s = world.draw(0.01, 0.3)
        if world.steps:
            step_s = takes_s / world.steps
            after_s += step_s - (world.now - began_at) % step_s
        self._finish_training(out.epoch, self.training, after_s)

    def _finish_training(self, epoch: int, training: int, after_s: float) -> None:
        def finish() -> None:
            if training != self.training:
                return
            self.training += 1
            contribution = self.world.gates.named(self.name, self.base, 2 * self.world.token())
            self.contributed = contribution
            self.world.rollbacks.on_residual(self)
            blobs = tuple([Part(self.name, contribution, s) for s in range(self.world.rules.shard_count)])
            weight = randint(self.world.rng, 1, 1000)
            contributed = ev.Contributed(epoch, self.base, contribution, weight, 1.0, blobs)
            self.world.floods.flood(self, contributed)
            self.feed(contributed)

        self.world.later(after_s, self, finish)

    def do_nothing(self, out: ev.Output) -> None:
        pass

    def do_note(self, out: ev.Note) -> None:
        self.world.tell(self.name, out.text)
        self.world.mutes.on_note(out.text)

    def do_verdict(self, out: ev.Verdict) -> None:
        self.world.tell(self.name, f"refused peer={out.peer} reason={out.reason} {out.text}")
        self.world.refused[out.reason] = self.world.refused.get(out.reason, 0) + 1

    def do_judge(self, out: ev.Judge) -> None:
        self.world.gates.judge(self, out)

    def do_gated(self, out: ev.Gated) -> None:
        self.world.gates.gated(out)

    def do_audit(self, out: ev.Audit) -> None:
        self.world.desk.drawn(self, out, Node.compare)

    def do_equivocated(self, out: ev.Equivocated) -> None:
        if isinstance(out.proof, TwoRosters):
            self.world.splitters.on_proof(self, out.proof)
        else:
            self.world.equivocators.on_proof(self, out.proof)

    def compare(self, record: Record, order: Order, given: dict[str, object]) -> None:
        """The auditor's inputs are those that the record names: nobody has others of these names."""
        members = [m for m in record.body.members if m.weight]
        parts = tuple(given[m.peer] for m in members)
        names = [(p.peer, p.contribution, p.shard) for p in parts if isinstance(p, Part)]
        if names != [(m.peer, m.contribution, order.shard) for m in members]:
            self.world.fail(self.name, f"audit: what was kept is not what the record names: {names}")
        mean = Mean(order.shard, parts, tuple(m.weight for m in members))
        found = mean.digest != order.digest
        self.world.invariants.on_audit(self, order, found)
        if found:
            self.world.rollbacks.on_lie(record)

    def do_end_round(self, out: ev.EndRound) -> None:
        if out.counted:
            self.residual = out.counted
        self.world.desk.on_end(self, out)
        self.world.outcomes[out.outcome] = self.world.outcomes.get(out.outcome, 0) + 1


EXECUTE: dict[type, Callable[[Node, Any], None]] = {
    ev.Send: Node.do_send,
    ev.Broadcast: Node.do_broadcast,
    ev.SendShard: Node.do_send_shard,
    ev.SendResult: Node.do_send_result,
    ev.Reduce: Node.do_reduce,
    ev.KeepResult: Node.do_nothing,
    ev.PersistVote: Node.do_persist_vote,
    ev.PersistResult: Node.do_persist_result,
    ev.Judge: Node.do_judge,
    ev.Gated: Node.do_gated,
    ev.AppendRecord: Node.do_append_record,
    ev.SwitchChain: Node.do_switch_chain,
    ev.Apply: Node.do_apply,
    ev.Rollback: Node.do_rollback,
    ev.FetchUpdate: Node.do_fetch_update,
    ev.FetchState: Node.do_fetch_state,
    ev.Train: Node.do_train,
    ev.CloseTraining: Node.do_close_training,
    ev.ExchangeBegan: Node.do_nothing,
    ev.Audit: Node.do_audit,
    ev.Equivocated: Node.do_equivocated,
    ev.EndRound: Node.do_end_round,
    ev.Moved: Node.do_nothing,
    ev.Verdict: Node.do_verdict,
    ev.Note: Node.do_note,
}
