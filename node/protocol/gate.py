"""Whether a result is accepted: each member measures it on data of its own before it votes (the gate).

    measure   all shards of a roster's result are here: the shell takes the step aside and says by how much
              the loss on held-out data is worse than before it (Judge, Judged)
    accept    not worse than `gate_margin`, or nothing to measure with, or no answer in time
    refuse    worse: no vote; the leader is told by how much (REFUSE), and READY says it in later ballots
    again     a majority of the electorate refused: the next ballot is without the contribution that differs
              most from the others, as most reducers' sums have it

It is a matter of votes alone, so that nothing of it touches consensus: not to accept is always allowed, and
what a quorum accepted is followed by who refused as by everybody else. An accepted value that a leader
proposes again is not measured: it may have been decided. But a leader goes by any quorum of promises, and
where a majority refused, there is one that tells of no accepted value (leader.py, `_accepted`).

It stops no run: a member refuses REFUSALS_MAX times in a round at most, and never where so few contribute
that another could not be left out. docs/decisions/016-gate.md.

Pure: it is told the time.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence

from tapestry.node.protocol.acceptor import Acceptor
from tapestry.node.protocol.agreement import ShardSums, sampled
from tapestry.node.protocol.canon import quorum
from tapestry.node.protocol.events import Gated, Judge
from tapestry.node.protocol.members import rollback_of
from tapestry.node.protocol.messages import Refuse
from tapestry.node.protocol.record import Body
from tapestry.node.protocol.round_state import RoundState
from tapestry.node.protocol.waits import Wait, span

REFUSALS_MAX = 3  # of one member in one round. Guess: 3 liars of 7, one after another
CONTRIBUTIONS_MIN = 3  # of two that differ nobody can say which is the odd one
VALUES_MAX = 16  # results of one round that are remembered. G7
WORSE_MAX = 1e6  # that is told: a loss of more says no more


class Gate:
    """A member's half; the leader's is in leader.py. Mutable; owned by Round, which shares its state."""

    def __init__(self, state: RoundState, acceptor: Acceptor) -> None:
        self.state = state
        self.ctx = state.ctx
        self.acceptor = acceptor
        self.found: dict[str, float | None] = {}  # head of a body -> by how much it is worse; None: unknown
        self.refusals = 0  # of ours, in this round
        self.ballot = -1  # that the next three are of
        self.value: tuple[Body, str] | None = None  # the result, and its head; it is on disk
        self.until: float | None = None  # an answer is waited for
        self.refused: float | None = None  # by how much too bad we said that it is

    # --- what the shell found ------------------------------------------------------------------

    def on_judged(self, head: str, worse: float | None) -> None:
        """Perhaps of an earlier ballot: the same body needs no second look."""
        while len(self.found) >= VALUES_MAX:
            del self.found[next(iter(self.found))]
        self.found.setdefault(head, worse)

    # --- our vote ------------------------------------------------------------------------------

    def passes(self, now: float) -> bool:
        """All shards of this ballot's roster are here: whether to vote for them now. If not, we wait for the
        measurement, or have refused."""
        state, margin = self.state, self.ctx.rules.gate_margin
        roster = state.exchange.roster
        if margin is None or roster is None or roster.forced:
            return True
        if self.ballot != state.ballot:
            self.ballot, self.value, self.until, self.refused = state.ballot, None, None, None
        if self.refused is not None:
            return False
        if self.value is None:
            self.value = self.acceptor.hold_result()
            self._remember_furthest(self.value[1])
        body, head = self.value
        if rollback_of(body.changes) is not None:
            return True  # no step is taken
        if head not in self.found:
            if self.until is None:
                self.until = now + self.ctx.pace.gate_max_s()
                self.ctx.emit(Judge(body, head, state.exchange.result_blobs()))
                return False
            if now < self.until:
                return False
            self.found[head] = None
        self.until, worse = None, self.found[head]
        if worse is None or worse <= margin:
            self._say("unmeasured" if worse is None else "passed", worse)
            return True
        if not self._may_refuse(body):
            self._say("went_on", worse)
            return True
        self._refuse(head, worse)
        return False

    def accept(self) -> str | None:
        """Vote for the result. As Acceptor.accept."""
        held = self.value if self.ballot == self.state.ballot else None
        return self.acceptor.accept(*(held or self.acceptor.hold_result()))

    def _may_refuse(self, body: Body) -> bool:
        """Whether the round can be made again with less, and we have not asked for that too often."""
        contributors = sum(m.weight > 0 for m in body.members)
        left = max(self.ctx.contributors_min(), quorum(len(self.state.electorate)), CONTRIBUTIONS_MIN - 1)
        return self.refusals < REFUSALS_MAX and contributors > left

    def _remember_furthest(self, head: str) -> None:
        """For whoever leads the next ballot, if a majority refuses this: it may be us."""
        known = self.state.furthest
        while len(known) >= VALUES_MAX:
            del known[next(iter(known))]
        known[head] = furthest_of(self.state)

    def _refuse(self, head: str, worse: float) -> None:
        state = self.state
        self.refusals += 1
        self.refused = min(worse, WORSE_MAX)
        state.refused = head
        state.exchange.progress += 1
        self._say("refused", worse, state.furthest[head])
        if state.leading:
            state.refusals[self.ctx.me] = self.refused
        else:
            self.tell()

    def tell(self) -> None:
        """Also again, for it may have been lost."""
        state = self.state
        if self.value is not None and self.refused is not None and self.ballot == state.ballot:
            refuse = Refuse(state.epoch, state.head, state.ballot, self.value[1], self.refused)
            self.ctx.send(state.leader, refuse)

    def keep_patience(self, now: float) -> None:
        """While we measure we get on, as far as others can see."""
        if self.ballot == self.state.ballot and self.until is not None and now < self.until:
            self.state.exchange.progress += 1

    def wait(self, now: float) -> Wait | None:
        """What we wait for, if it is the gate."""
        state, pace = self.state, self.ctx.pace
        if self.ballot != state.ballot or self.value is None:
            return None
        if self.refused is not None:
            what = f"refused the result: {self.refused:.4f} worse on held-out data; waiting for the others"
            ends = "ends when a majority accepts it all the same, or a ballot without one contribution begins"
            return Wait("round", what, ends, now - state.stage_at, pace.result_max_s())
        ends = f"ends when it is measured; after {span(pace.gate_max_s())} this node votes without"
        for_s = 0.0 if self.until is None else max(0.0, now - (self.until - pace.gate_max_s()))
        return Wait("round", "measuring the result on held-out data", ends, for_s, pace.gate_max_s())

    def _say(self, outcome: str, worse: float | None, peer: str = "") -> None:
        self.ctx.emit(Gated(self.state.epoch, outcome, math.nan if worse is None else worse, peer))


def furthest_of(state: RoundState) -> str:
    """The contributor whose contribution differs most from the others', as most reducers' sums have it."""
    members = state.exchange.contributors()
    weights = [m.weight for m in members]
    by_reducer = state.exchange.sums_by_reducer()
    said = {reducer: shares(distances(sums, weights)) for reducer, sums in by_reducer.items()}
    return furthest(said, [m.peer for m in members])


def furthest(said: Mapping[str, Sequence[float]], contributors: Sequence[str]) -> str:
    """Of the contributors, by what each reducer says of them (shares of all distances, in their order).

    A reducer has one voice, however far it says that somebody is, and none about itself. The lower median of
    the voices counts: what fewer than half of the others say of somebody leaves nobody out.
    """
    found = []
    for index, peer in enumerate(contributors):
        voices = [shares[index] for reducer, shares in said.items() if reducer != peer]
        found.append(statistics.median_low(voices or [shares[index] for shares in said.values()]))
    return contributors[max(range(len(found)), key=lambda index: (found[index], -index))]


def shares(distances: Sequence[float]) -> list[float]:
    """Each as a share of their sum; equal ones where there is none."""
    total = math.fsum(distances)
    if not 0.0 < total < math.inf:
        return [1.0 / len(distances) for _ in distances]
    return [distance / total for distance in distances]


def distances(shards: Sequence[ShardSums], weights: Sequence[int]) -> list[float]:
    """Of each contribution to the mean of all others, squared.

    With m the mean, x_i a contribution of the share w_i of the weight, and m_i the mean of all but it:
    x_i - m_i = (x_i - m) / (1 - w_i). The sums give |x_i - m|^2 = |x_i|^2 - 2 x_i.m + |m|^2. Where the rule
    is not the plain mean, m is what the rule made, and the order is what counts.
    """
    total = sum(weights)
    mean_square, squares, dots = sampled(shards)
    found = []
    for weight, square, dot in zip(weights, squares, dots, strict=True):
        rest = (total - weight) / total
        found.append(max(square - 2.0 * dot + mean_square, 0.0) / (rest * rest) if rest else math.inf)
    return found
