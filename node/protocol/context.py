"""What the parts of the core share: who we are, the run's rules, the peers as last heard, the outputs.

Imports nothing outside this package; holds no behaviour beyond questions about peers.
"""

from __future__ import annotations

from collections.abc import Container, Mapping
from dataclasses import dataclass, field

from tapestry.node.protocol.canon import MEMBERS_MAX, Crypto
from tapestry.node.protocol.deliveries import NEWCOMERS, Deliveries
from tapestry.node.protocol.events import Broadcast, Output, Send, Verdict
from tapestry.node.protocol.members import Roll
from tapestry.node.protocol.messages import Control, Leave, Stage, Status
from tapestry.node.protocol.movers import Movers
from tapestry.node.protocol.pace import Pace
from tapestry.node.protocol.proposals import Proposals
from tapestry.node.protocol.receipts import Receipts
from tapestry.node.protocol.rules import Rules, settled


@dataclass(slots=True)
class PeerView:
    """A peer as last heard."""

    up: bool = False
    heard_at: float = -1e9
    status: Status | None = None

    def stage_at(self, epoch: int, head: str) -> Stage:
        """How far it is in the round that starts from `head`; AWAY if it is elsewhere."""
        status = self.status
        if status is None or status.epoch != epoch or status.head != head:
            return Stage.AWAY
        return status.stage


CLOSE_BEHIND = 8  # epochs. Guess: what is decided in a few round trips, where epochs are short
MISSED_PATIENCE = 8  # rounds in a row that a peer may miss before it is waited for in some only. Guess
NEWCOMERS_PATIENCE = 3  # the same, of one that has not contributed yet. Guess
BEHIND_PATIENCE = 4  # rounds in a row that a peer may be too late for before it is waited for. Guess
UPDATES_MAX = 4096  # heads remembered as being in the update log; a forgotten one is fetched again. G7


@dataclass(slots=True)
class Context:
    me: str
    rules: Rules
    crypto: Crypto
    roll: Roll  # of our newest record
    proposals: Proposals
    peers: dict[str, PeerView] = field(default_factory=dict)
    out: list[Output] = field(default_factory=list)
    updates: dict[str, None] = field(default_factory=dict)  # heads whose update lies in the update log
    missed: dict[str, int] = field(default_factory=dict)  # peer -> rounds since its last contribution
    delivered: dict[str, None] = field(
        default_factory=dict
    )  # peers that a record of late names as contributor
    deliveries: Deliveries = field(default_factory=Deliveries)
    leaves: dict[str, Leave] = field(default_factory=dict)  # member -> the last that it signed
    # elector -> leader that left it out -> the epoch in which it did so last
    without: dict[str, dict[str, int]] = field(default_factory=dict)
    movers: Movers = field(default_factory=Movers)
    receipts: Receipts = field(default_factory=Receipts)
    pace: Pace = field(init=False)

    given: Rules = field(init=False)  # the spec's, before any record changed them

    def __post_init__(self) -> None:
        self.given = self.rules
        self.rules = settled(self.given, self.roll.settings)
        self.pace = Pace(self.rules)

    def enrol(self, roll: Roll) -> None:
        """The roll of our newest record, and what it says of our waits."""
        if roll.settings != self.roll.settings:
            self.rules = self.pace.rules = settled(self.given, roll.settings)
        self.roll = roll
        for peer in [p for p in self.without if p not in roll.members]:
            del self.without[peer]

    def contributors_min(self) -> int:
        """No round starts with fewer contributions: `min_members`.

        But one is enough where a change has all its signatures: without a record nobody could be admitted of
        those who are waited for, nobody who is gone removed, and this number not be lowered. A quorum decides
        such a record as it does all others.
        """
        return 1 if self.proposals.any_signed(self.roll) else max(1, self.rules.min_members)

    def emit(self, output: Output) -> None:
        self.out.append(output)

    def send(self, peer: str, message: Control) -> None:
        self.out.append(Send(peer, message))

    def broadcast(self, message: Control) -> None:
        """To those who belong to the run: a stranger hears nothing of us."""
        may = self.roll.may_contribute
        peers = tuple(peer for peer, view in self.peers.items() if view.up and may(peer))
        if peers:
            self.out.append(Broadcast(peers, message))

    def keep_update(self, head: str) -> None:
        if len(self.updates) >= UPDATES_MAX:
            del self.updates[next(iter(self.updates))]
        self.updates[head] = None

    def refuse(self, peer: str, reason: str, text: str) -> None:
        self.out.append(Verdict(peer, reason, text))

    def heard(self, peer: str, now: float) -> bool:
        """Up, and heard within stall_s. We always hear ourselves."""
        if peer == self.me:
            return True
        view = self.peers.get(peer)
        return view is not None and self._heard(view, now)

    def _heard(self, view: PeerView, now: float) -> bool:
        return view.up and now - view.heard_at < self.rules.stall_s

    def unheard(self, electorate: tuple[str, ...], now: float) -> tuple[str, ...]:
        """The electors that we do not hear, and whoever else is silent although its link stands."""
        may = self.roll.may_contribute
        others = [p for p, view in self.peers.items() if view.up and p not in electorate and may(p)]
        return tuple(p for p in [*electorate, *others] if not self.heard(p, now))[:MEMBERS_MAX]

    def deserves(self, peer: str) -> bool:
        """Whether a round waits for it. Who has missed many rounds in a row is waited for in the 8th,
        16th and so on, and who never delivered from its 4th on: whoever only says that it trains costs the
        others less and less."""
        missed = self.missed.get(peer, 0)
        patience = MISSED_PATIENCE if peer in self.delivered else NEWCOMERS_PATIENCE
        return missed < patience or missed.bit_count() == 1

    def undelivered(self, peer: str, epoch: int) -> bool:
        """Whether a roster of ours does without it, for what it did not deliver when one named it."""
        return self.deliveries.left_out(self._account(peer), epoch)

    def _account(self, peer: str) -> str:
        return peer if peer in self.roll.members or peer in self.delivered else NEWCOMERS

    def count_deliveries(
        self,
        epoch: int,
        named: Mapping[str, str],
        contributors: Container[str],
        excused: Container[str],
        now: float,
    ) -> None:
        """The round of `epoch` was decided: who was named by a roster (and whose), and is not in the record.

        Who is not heard now has gone, which costs no stall.
        """
        delivered = dict.fromkeys(self._account(p) for p in named if p in contributors)
        failed = {
            self._account(p): leader
            for p, leader in named.items()
            if p not in contributors and p not in excused and self.heard(p, now)
        }
        for key in delivered:
            if key not in failed:
                self.deliveries.succeeded(key)
        for key, leader in failed.items():
            self.deliveries.failed(key, epoch, leader, self.me)
        self.deliveries.keep_only(self.peers, self.me)

    def leaving(self, peer: str) -> bool:
        """Its last word was that it is not at any head."""
        view = self.peers.get(peer)
        return view is not None and view.status is not None and view.status.stage == Stage.AWAY

    def on_the_way(self, peer: str, epoch: int, now: float) -> bool:
        """Heard, and when it last spoke in the round before that of `epoch`: it may be taking the step."""
        view = self.peers.get(peer)
        status = view.status if view is not None else None
        return (
            status is not None
            and status.epoch == epoch - 1
            and status.stage != Stage.AWAY
            and self.heard(peer, now)
        )

    def count_missed(self, epoch: int, head: str, contributors: Container[str], late: Container[str]) -> None:
        """The round of `head` was decided: who held it up, or was not ready when it was over, is counted.

        `late`: waited for by us, in vain. Who was ready and not seated missed nothing, and who was away
        neither gains nor loses by it.
        """
        for peer, view in self.peers.items():
            slow = _follows(view, epoch) and view.stage_at(epoch, head) < Stage.READY
            if peer not in contributors and (slow or peer in late) and self.roll.may_contribute(peer):
                self.missed[peer] = self.missed.get(peer, 0) + 1
        for peer in [p for p in self.missed if p in contributors or p not in self.peers]:
            del self.missed[peer]
        for peer in [p for p in self.delivered if p not in self.peers]:
            del self.delivered[peer]
        self.delivered.update(dict.fromkeys(p for p in self.peers if p in contributors))

    def awaited(self, epoch: int, now: float) -> list[str]:
        """Peers that have been too late for many rounds in a row, by little: where an epoch is as short as it
        takes to get an update, they would be so for good."""
        return [
            peer
            for peer, missed in self.missed.items()
            if missed >= BEHIND_PATIENCE
            and missed.bit_count() == 1
            and self.roll.may_contribute(peer)
            and self.heard(peer, now)
            and _follows(self.peers[peer], epoch)
        ]

    def stage_at(self, peer: str, epoch: int, head: str) -> Stage:
        """How far `peer` is in the round that starts from `head`; AWAY if it is elsewhere."""
        view = self.peers.get(peer)
        return view.stage_at(epoch, head) if view is not None else Stage.AWAY

    def is_within(self, peer: str, epoch: int, head: str, ballot: int) -> bool:
        """Whether it takes part in the round that starts from `head`, in this ballot at the most."""
        view = self.peers.get(peer)
        if view is None or view.status is None or view.stage_at(epoch, head) == Stage.AWAY:
            return False
        return view.status.ballot <= ballot

    def live_at(self, epoch: int, head: str, now: float) -> list[str]:
        """Other peers that may contribute, heard of late, at this head and taking part."""
        may = self.roll.may_contribute
        return [
            peer
            for peer, view in self.peers.items()
            if self._heard(view, now) and view.stage_at(epoch, head) != Stage.AWAY and may(peer)
        ]


def _follows(view: PeerView, epoch: int) -> bool:
    """Whether it says that it is at state `epoch`, or takes the last few steps to it."""
    status = view.status
    return view.up and status is not None and status.state_epoch >= max(0, epoch - CLOSE_BEHIND)
