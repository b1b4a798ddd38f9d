"""Messages that no honest node sends: right types, any values. What the wire cannot refuse, the core must.

A lie in a member's name stays within what the protocol bears from one: a promise, a vote or a roster that it
never gave is beyond consensus among nodes that may crash but do not lie (docs/decisions), and is not drawn.
"""

from __future__ import annotations

import random
from collections.abc import Callable

from simulation.draws import choice, hex_digits, randint

from tapestry.node.protocol.agreement import ALIKE, COUNT_MAX, SUM_MAX, ShardSums
from tapestry.node.protocol.canon import EPOCH_MAX, WEIGHT_MAX
from tapestry.node.protocol.core import Core
from tapestry.node.protocol.messages import (
    Accept,
    Call,
    Closing,
    Commit,
    GetRecords,
    Message,
    Need,
    Propose,
    Ready,
    Records,
    Result,
    Roster,
    Shard,
    Stage,
    Status,
)
from tapestry.node.protocol.record import BALLOT_MAX, Body, Member, Record

FALSE_SUMS = ShardSums((0.0, SUM_MAX), SUM_MAX, (1.0, 0.0), (SUM_MAX, -SUM_MAX), 0.0, 0, COUNT_MAX)
STRANGER = "stranger"  # connected, in no electorate, and takes part in nothing


def draw_lie(rng: random.Random, victim: Core, member: bool) -> Message:
    """A message to `victim`. Half of the fields are what it would like to hear, half are not."""
    lie = _Liar(rng, victim)
    kinds: list[Callable[[], Message]]
    kinds = [lie.status, lie.get_records, lie.records, lie.need, lie.shard, lie.result, lie.closing]
    if not member:
        kinds += [lie.call, lie.ready, lie.roster, lie.propose, lie.accept, lie.commit]
    return choice(rng, kinds)()


class _Liar:
    def __init__(self, rng: random.Random, victim: Core) -> None:
        self.rng = rng
        self.victim = victim
        self.round = victim.round

    # --- values --------------------------------------------------------------------------------

    def epoch(self) -> int:
        now = self.victim.chain.epoch
        return choice(self.rng, [now, now, now, now + 1, now - 1, 0, -1, -(10**6), EPOCH_MAX])

    def head(self) -> str:
        return choice(self.rng, [self.victim.chain.head, self.victim.chain.head, self.hex(64)])

    def ballot(self) -> int:
        now = self.round.ballot if self.round is not None else 0
        return choice(self.rng, [now, now + 1, now + randint(self.rng, 1, 9), 0, -1, BALLOT_MAX])

    def hex(self, length: int) -> str:
        return hex_digits(self.rng, length)

    def shard_index(self) -> int:
        return choice(self.rng, [0, 1, 2, -1, -(10**9), 10**9])

    def peer(self) -> str:
        return choice(self.rng, [STRANGER, self.victim.ctx.me, *self.victim.ctx.peers])

    def digest(self) -> str:
        return choice(self.rng, [self.victim.sync.state_digest, self.hex(64)])

    def contribution(self) -> str:
        mine = self.round.exchange.mine if self.round is not None else None
        return choice(self.rng, ["", self.hex(32), mine.contribution if mine is not None else ""])

    def members(self) -> tuple[Member, ...]:
        peers = sorted({STRANGER, *(self.peer() for _ in range(randint(self.rng, 0, 6)))})
        return tuple(Member(p, choice(self.rng, [1, WEIGHT_MAX]), self.hex(32)) for p in peers)

    def body(self) -> Body:
        chain = self.victim.chain
        members = choice(self.rng, [self.members(), (Member(STRANGER, WEIGHT_MAX, self.hex(32)),)])
        forced = self.rng.random() < 0.5
        run_id = choice(self.rng, [chain.genesis.run_id, self.hex(64)])
        epoch = self.epoch() + 1
        return Body(run_id, epoch, self.head(), self.digest(), members, self.hex(64), forced)

    def record(self) -> Record:
        """Signed by all whose key the liar has: itself."""
        from simulation.world import SimCrypto, digest

        from tapestry.node.protocol.record import accept_message, draw_message, head_of

        body, ballot = self.body(), max(self.ballot(), 0)
        crypto = SimCrypto(STRANGER)
        head = head_of(body, crypto)
        signers = sorted({m.peer for m in body.members})
        votes, draws = (
            tuple((p, crypto.sign(message) if p == STRANGER else digest(b"?")) for p in signers)
            for message in (accept_message(head, ballot), draw_message(head))
        )
        return Record(body, head, ballot, votes, None, draws)

    # --- messages ------------------------------------------------------------------------------

    def status(self) -> Status:
        stage = choice(self.rng, list(Stage))
        progress = choice(self.rng, [0, 1, 10**9])
        waiting = tuple(self.peer() for _ in range(randint(self.rng, 0, 8)))
        epoch, head, state_epoch = self.epoch(), self.head(), max(self.epoch(), -1)
        return Status(epoch, head, state_epoch, "lying", stage, self.ballot(), progress, waiting)

    def get_records(self) -> GetRecords:
        return GetRecords(tuple((self.epoch(), self.head()) for _ in range(randint(self.rng, 0, 4))))

    def records(self) -> Records:
        return Records(self.epoch(), tuple(self.record() for _ in range(randint(self.rng, 0, 3))))

    def need(self) -> Need:
        shards = tuple(self.shard_index() for _ in range(20))
        return Need(self.epoch(), self.head(), self.ballot(), self.contribution(), shards)

    def shard(self) -> Shard:
        return Shard(self.epoch(), self.hex(32), self.shard_index(), "blob of a liar")

    def result(self) -> Result:
        ballot = choice(
            self.rng, [-1, BALLOT_MAX]
        )  # a reducer's wrong mean is a wrong contribution by any name
        epoch, head, shard, hexes = self.epoch(), self.head(), self.shard_index(), self.hex(64)
        return Result(epoch, head, ballot, shard, hexes, "mean of a liar", FALSE_SUMS, "a liar's")

    def closing(self) -> Closing:
        return Closing(self.epoch(), self.head(), self.ballot())

    def call(self) -> Call:
        return Call(self.epoch(), self.head(), self.ballot(), self.rng.random() < 0.5)

    def ready(self) -> Ready:
        accepted = choice(self.rng, [None, self.body()])
        weight = choice(self.rng, [0, 1, -1, WEIGHT_MAX, 2 * WEIGHT_MAX])
        return Ready(
            self.epoch(),
            self.head(),
            self.ballot(),
            self.rng.random() < 0.3,
            self.digest(),
            "",
            weight,
            float("nan"),
            self.ballot(),
            accepted,
            unheard=tuple(self.peer() for _ in range(randint(self.rng, 0, 8))),
        )

    def roster(self) -> Roster:
        reducers = tuple(self.shard_index() for _ in range(self.victim.ctx.rules.shard_count))
        members = self.members()
        forced = self.rng.random() < 0.5
        return Roster(self.epoch(), self.head(), self.ballot(), forced, self.digest(), members, reducers)

    def propose(self) -> Propose:
        holders = tuple(self.peer() for _ in range(3))
        return Propose(self.epoch(), self.head(), self.ballot(), self.body(), holders)

    def accept(self) -> Accept:
        return Accept(
            self.epoch(),
            self.head(),
            self.ballot(),
            self.hex(64),
            self.hex(64),
            ALIKE,
            self.hex(64),
            choice(self.rng, ["", self.hex(64)]),
        )

    def commit(self) -> Commit:
        return Commit(self.record())
