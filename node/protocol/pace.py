"""How long this node waits, where the run leaves it to each: computed from what it measured itself.

Nothing that is decided depends on a wait: waits only say when a leader sends its roster, when a ballot is
given up, and when a quorum counts as lost. So they need not be equal, and no node is told another's. What is
measured is what this node saw: since when it was in the round, when a quorum was ready, how long data went
to and fro. What a peer says of its own speed is not asked. docs/decisions/015-waits-that-scale.md.

Pure: it is told the time, and keeps a few lengths. `None` in Rules stands for a computed wait.
"""

from __future__ import annotations

from collections import deque

from tapestry.node.protocol.rules import Rules
from tapestry.node.protocol.waits import UNMEASURED_S, USUAL_EPOCHS, USUAL_S

LENGTHS_KEPT = 5  # Guess: the lower median of five is moved neither by a start-up nor by one bad night

# A round waits for who is late as long as the quorum took, so that nobody makes it more than twice as long.
STRAGGLER_SHARE = 0.25  # of an epoch, before stragglers are told to end. Guess
CLOSING_SHARE = 0.75  # of an epoch, for them to send what they have: one step of theirs. Guess
FOLLOWERS_PATIENCE = 1.5  # times what the leader may wait: it measured on its own, and may have started later

STRAGGLER_MIN_S = 5.0  # Guess; the fixed waits of earlier runs, as are the next three
CLOSING_MIN_S = 2.0
QUORUM_LOSS_MIN_S = 30.0
EXCHANGE_SIZED_S = 300.0  # for whatever model, before anything was measured

EXCHANGE_MIN_S = 60.0  # Guess: a link that is slow for a moment is not given up
EXCHANGE_MARGIN = 10.0  # times a usual exchange, up to what the size allows. Guess
EXCHANGE_MARGIN_SLOW = 1.5  # times one that is longer than that. Guess
GATE_MIN_S = 30.0  # Guess: a trainer that is in the middle of a step, and then a few windows
GATE_SHARE = 0.5  # of an epoch, to measure a result. Guess: it takes a few windows of an epoch's hundreds

EXCHANGE_WIDEN_MAX = 4  # doublings, after exchanges that were given up in one round


class Pace:
    """Mutable; owned by Context, told by the round and the core."""

    def __init__(self, rules: Rules) -> None:
        self.rules = rules
        self.epochs: deque[float] = deque(maxlen=LENGTHS_KEPT)
        self.exchanges: deque[float] = deque(maxlen=LENGTHS_KEPT)
        self.epoch = -1  # of the round under way
        self.began_at = 0.0  # that epoch: with the exchange before it, where we took part in that
        self.measured = -1  # the epoch whose quorum was seen last
        self.exchange: tuple[int, float, float] | None = None  # epoch, since when, until when at the longest
        self.given_up = 0  # exchanges of this round that took too long

    # --- what happens --------------------------------------------------------------------------

    def round_began(self, epoch: int, now: float) -> None:
        """The round that starts from state `epoch`. If we exchanged in the one before, that took so long."""
        self.epoch, self.began_at, self.given_up = epoch, now, 0
        if self.exchange is not None and self.exchange[0] == epoch - 1:
            self.began_at = self.exchange[1]  # with overlap, trainers work from then on
            self.exchanges.append(now - self.exchange[1])
        self.exchange = None

    def quorum_ready(self, now: float) -> None:
        """A quorum of the electorate is seen to be ready, perhaps not for the first time in this round."""
        if self.measured != self.epoch:
            self.measured = self.epoch
            self.epochs.append(now - self.began_at)

    def exchange_began(self, epoch: int, now: float) -> None:
        """Phase 2 of a ballot begins here."""
        before = self.exchange
        if before is not None and before[0] == epoch and now >= before[2]:
            self.given_up += 1
        self.exchange = (epoch, now, now + self.exchange_max_s())

    def exchange_overdue(self, now: float) -> bool:
        return self.exchange is not None and now >= self.exchange[2]

    # --- how long is waited --------------------------------------------------------------------

    def epoch_s(self) -> float:
        """How long a quorum usually takes to be ready; 0 if nothing was measured yet."""
        return _lower_median(self.epochs)

    def straggler_wait_s(self) -> float:
        """With a quorum ready, until stragglers are told that the round closes."""
        fixed = self.rules.straggler_wait_s
        return self._computed(STRAGGLER_MIN_S, STRAGGLER_SHARE * self.epoch_s()) if fixed is None else fixed

    def closing_grace_s(self) -> float:
        """From then on, until the roster goes without them."""
        fixed = self.rules.closing_grace_s
        return self._computed(CLOSING_MIN_S, CLOSING_SHARE * self.epoch_s()) if fixed is None else fixed

    def leaders_wait_s(self) -> float:
        """What a follower grants its leader, from a quorum's being ready to its roster."""
        rules, wait_s = self.rules, self.straggler_wait_s() + self.closing_grace_s()
        if rules.straggler_wait_s is None or rules.closing_grace_s is None:
            wait_s *= FOLLOWERS_PATIENCE
        return wait_s + rules.stall_s

    def quorum_loss_s(self) -> float:
        """Without a quorum, until on_quorum_loss decides: where epochs take hours, minutes part nobody."""
        fixed = self.rules.quorum_loss_s
        return self._computed(QUORUM_LOSS_MIN_S, self.epoch_s()) if fixed is None else fixed

    def exchange_max_s(self) -> float:
        """The longest exchange, even if it makes progress. By the model's size at first, then by what
        exchanges take; after one that was given up, twice as long, since it may have been the line."""
        rules = self.rules
        if rules.exchange_max_s is not None:
            return rules.exchange_max_s
        sized_s, usual_s = max(EXCHANGE_SIZED_S, rules.exchange_sized_s), _lower_median(self.exchanges)
        limit_s = max(min(EXCHANGE_MARGIN * usual_s, sized_s), EXCHANGE_MARGIN_SLOW * usual_s) or sized_s
        widened_s = limit_s * 2.0 ** min(self.given_up, EXCHANGE_WIDEN_MAX)
        return self._computed(EXCHANGE_MIN_S, min(widened_s, sized_s * 2.0**EXCHANGE_WIDEN_MAX))

    def gate_max_s(self) -> float:
        """The longest that this node measures a result before it votes all the same."""
        fixed = self.rules.gate_max_s
        return self._computed(GATE_MIN_S, GATE_SHARE * self.epoch_s()) if fixed is None else fixed

    def result_max_s(self) -> float:
        """Until all have a whole result, and have measured it where there is a gate."""
        measured_s = self.gate_max_s() if self.rules.gate_margin is not None else 0.0
        return self.exchange_max_s() + measured_s

    def training_usual_s(self) -> float:
        """That others train on while we are ready, before people are told."""
        epoch_s = self.epoch_s()
        return max(USUAL_S, USUAL_EPOCHS * epoch_s) if epoch_s else UNMEASURED_S

    def _computed(self, low_s: float, wait_s: float) -> float:
        return min(max(low_s, wait_s), self.rules.wait_max_s)


def _lower_median(lengths: deque[float]) -> float:
    return sorted(lengths)[(len(lengths) - 1) // 2] if lengths else 0.0
