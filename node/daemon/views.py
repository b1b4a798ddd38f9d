"""What a node tells people of its training and rounds: log lines, the live line, metrics, and /status.

Kept beside the core, from what core and trainer report. Nothing here decides anything.
"""

from __future__ import annotations

import itertools
import logging
import math
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType

from tapestry.node.daemon.coming import Coming
from tapestry.node.daemon.egress import Egress, Unwritten
from tapestry.node.daemon.likeness_watch import CURE, LikenessWatch
from tapestry.node.daemon.loss_watch import LossWatch
from tapestry.node.daemon.phase_clock import PhaseClock
from tapestry.node.daemon.training_view import TrainingView, known
from tapestry.node.net.admission import Applicant
from tapestry.node.net.network import Where
from tapestry.node.net.repeats import Repeats
from tapestry.node.protocol import events as ev
from tapestry.node.protocol.record import Record
from tapestry.node.protocol.settings import Settings, shown
from tapestry.node.protocol.snapshot import Snapshot
from tapestry.node.protocol.waits import BY_ITSELF_S, Wait
from tapestry.node.surface.history import History
from tapestry.node.surface.logs import Shows
from tapestry.node.surface.metrics import Metrics
from tapestry.node.surface.names import Names
from tapestry.node.surface.status import WORKING, Shown, Traffic
from tapestry.node.surface.story import Story
from tapestry.node.surface.trackers import Trackers
from tapestry.node.trainer import messages as tm
from tapestry.node.trainer.process import Event

ACCUSED_SHOWN = 16  # in /status
WITHHELD_MAX = 256  # peers that are counted. G7
REFUSAL_LOG_S = 10.0  # Guess: between two log lines of one peer and reason
OUTCOMES = {  # of a round that did not commit with us in it, and what is to be done
    "aborted": "it left no trace and the next one is under way; if this goes on, `tapestry status` says who "
    "is waited for",
    "missed": "the others went on without this node, which catches up; if this goes on, this machine or its "
    "line is too slow",
    "forced": "a majority of the members was not there; if these should be, look for why they are not: "
    "tapestry peers",
}

REFUSED_CURE = (
    "it counts for nothing, and nothing is to be done. If it goes on, ask its operator: tapestry members"
)

GATED = {  # protocol/events.py, Gated
    "refused": "this node does not vote for it; if a majority does, it follows",
    "again": "a majority refused, and the round goes on without this contribution. If it is the same member "
    "again and again, ask its operator",
    "went_on": "it is accepted all the same, for nothing more can be left out",
}

_log = logging.getLogger("tapestry.node")


@dataclass(frozen=True, slots=True)
class Dropped:
    """What this node gave up since its start, because the chain on the other side of a fork was better."""

    records: int
    weight: int


class Reporter:
    """Everything that people are told, from one place."""

    def __init__(
        self,
        metrics: Metrics,
        live: Shows,
        trackers: Trackers | None = None,
        history: History | None = None,
        egress: Egress | None = None,
    ) -> None:
        self.metrics = metrics
        self.live = live
        self.egress = egress or Unwritten()  # the ledger of what leaves
        self.float32_ratio = 1.0  # how many times as large what is sent would be
        self._trackers = trackers or Trackers({})
        self._history = history or History()
        self._names = Names()
        self._story = Story(self._history, self._names.call, self._names.knows)
        self.training = TrainingView()
        self.coming = Coming(live.show)
        self._losses = LossWatch()
        self._likeness = LikenessWatch()
        self.clock = PhaseClock(metrics)
        self.leaving = False  # rounds that end from now on are no news
        self._settings: Settings = {}  # in force, as told
        self._dropped = Dropped(0, 0)
        self.branches: tuple[str, ...] = ()  # what lost at forks and is kept, by name; oldest first
        self._accused: list[dict[str, str | int]] = []
        self._withheld: Counter[str] = Counter()  # peer -> inputs that it did not give an auditor
        self._refusals = Repeats(REFUSAL_LOG_S)
        self._epoch = -2
        self._phase = ""
        self._health = ""
        self._peers_up = 0
        self._trainer_up = True
        self._traffic_told = self.traffic  # up to the latest point of the history

    @property
    def traffic(self) -> Traffic:
        """What has crossed the network since the start."""
        by_kind = self.metrics.bytes_by_kind
        return Traffic.of(by_kind("sent"), by_kind("received"), self.float32_ratio)

    def show(
        self,
        core: Snapshot,
        where: Where,
        applicants: Sequence[Applicant] = (),
        versions: Mapping[str, str] = MappingProxyType({}),  # of peers, where they are known
    ) -> Shown:
        """What /status shows."""
        self.meet(core)
        training, dropped = self.training, self._dropped
        if self.coming.text:
            core = replace(core, wait=self._with_progress(core.wait))
        return Shown(
            core,
            training.loss,
            training.loss_epoch,
            training.val_loss,
            training.val_loss_epoch,
            dict(training.val_losses),
            training.data_passes,
            training.tokens_total,
            training.tokens_per_second,
            dropped.records,
            dropped.weight,
            self.branches,
            where.addresses,
            where.reachable,
            where.relays,
            where.routes,
            self.traffic,
            training.trouble,
            tuple({**one, "name": self._names.name(str(one["peer"]))} for one in self._accused),
            tuple(
                {"peer": peer, "name": self._names.name(peer), "count": count}
                for peer, count in self._withheld.most_common(ACCUSED_SHOWN)
            ),
            tuple(
                {
                    "peer": peer,
                    "name": self._names.name(peer),
                    "cosine": round(one.cosine, 3),
                    "others": round(one.others, 3),
                }
                for peer, one in sorted(self._likeness.unlike.items())
            ),
            tuple({"peer": one.peer, "name": one.name, "since": one.since} for one in applicants),
            self._names.name,
            self._history.last_contributions,
            self._losses.trouble,
            versions,
        )

    def _with_progress(self, wait: Wait | None) -> Wait | None:
        """It waits for what comes: how far that is."""
        if wait is None or wait.kind != "state":
            return wait
        return replace(wait, what=f"{wait.what}; {self.coming.text}", usual_s=BY_ITSELF_S)

    # --- of the trainer ------------------------------------------------------------------------

    def on_event(self, event: Event, now: float) -> None:
        """A report of the trainer."""
        self.training.on_event(event, now)
        if isinstance(event, tm.Contribution):
            self._losses.trained(known(event.loss))
            self.metrics.set_contribution_weight(event.weight)
            self.metrics.trainer_waited(event.waited_s)
            self.metrics.set_data_passes(event.passes)
        elif isinstance(event, tm.Progress):
            self.metrics.trained(*self.training.take_progress(), self.training.loss)
            self.live.show(
                f"epoch {event.epoch}  step {event.step}/{event.steps}  loss {self.training.loss:.4f}  "
                f"{event.tokens_per_second:,.0f} tokens/s  {self._peers_up} peers  {self._phase}"
            )
        elif isinstance(event, tm.Validation):
            self.metrics.set_validation_losses(self.training.val_losses)
            sets = self.training.val_losses if len(self.training.val_losses) > 1 else {}
            words = "validated epoch=%d validation_loss=%.4f" + " %s=%.4f" * len(sets)
            _log.info(words, event.epoch, event.loss, *itertools.chain(*sets.items()))
            losses = self.training.val_losses.items()
            self._trackers.put(event.epoch, {f"validation/loss/{name}": loss for name, loss in losses})
            self._history.point(event.epoch, validation=self.training.val_losses)
            if self._losses.validated(event.epoch, event.loss):
                self._losses_changed(event.epoch)
        elif isinstance(event, tm.Hello):
            self.metrics.set_validation_losses(self.training.val_losses)

    def _losses_changed(self, epoch: int) -> None:
        """Training and validation loss have begun to go apart, or do so no longer."""
        if self._losses.trouble:
            _log.warning("losses=apart epoch=%d %s", epoch, self._losses.trouble)
        else:
            _log.info("losses=together epoch=%d the validation loss no longer rises", epoch)
        self._story.losses(self._losses.trouble)

    def trainer_up(self) -> None:
        self.metrics.set_trainer_up(True)
        if not self._trainer_up:
            self._story.trainer("the trainer works again", up=True)
        self._trainer_up = True

    def trainer_down(self, why: str, trouble: str, told: bool) -> None:
        """`trouble`: the cause, for /status. Not `told`: it is no news."""
        self.metrics.set_trainer_up(False)
        self.training.trouble = trouble
        self._trainer_up = False
        if told:
            _log.warning("trainer=down %s", why)  # with the cure, once it is clear: trainer_health.py
            self._story.trainer(why, up=False)

    # --- of the core ---------------------------------------------------------------------------

    def moved(self, out: ev.Moved, now: float, look: Callable[[], Snapshot]) -> None:
        """Metrics and log follow what the node is doing."""
        self.clock.stage(out.stage, now)
        if out.epoch != self._epoch:
            self._epoch = out.epoch
            self.metrics.set_epoch(max(out.epoch, 0))
        self._phase = out.phase
        health = "working" if out.phase in WORKING else out.phase
        if health == "degraded":
            self.training.tokens_per_second = 0.0
        if health == self._health:
            return
        self._health = health
        if health != "stopping":  # the daemon says that
            reason = "at the head" if health == "working" else look().reason
            _log.info("phase=%s epoch=%d %s", out.phase, max(out.epoch, 0), reason)
            self.live.show(f"{out.phase}: {reason}")
            self._story.health(health, reason)

    def round_ended(self, out: ev.EndRound, now: float) -> None:
        seconds, phases = self.clock.round_ended(now), self.clock.take_phases()
        self.metrics.round_ended(out.outcome, seconds)
        timed = {f"round/{phase}_seconds": duration for phase, duration in phases.items()}
        self._trackers.put(out.epoch, {"round/seconds": seconds, **timed})
        if out.outcome != "aborted":
            self._history.point(out.epoch + 1, round_s=seconds, phases=phases)
        if not self.leaving:
            self._story.round_ended(out.epoch, out.outcome, seconds, now)
        if out.likeness:
            self._compared(out.epoch + 1, dict(out.likeness))
        if out.outcome != "committed" and not self.leaving:
            _log.warning("round=%s epoch=%d; %s", out.outcome, out.epoch, OUTCOMES[out.outcome])

    def _compared(self, epoch: int, cosines: Mapping[str, float]) -> None:
        """How like the others' mean each contribution to record `epoch` was."""
        from_now_on, no_more = self._likeness.seen(cosines, self._names.has)
        for peer in from_now_on:
            one = self._likeness.unlike[peer]
            _log.warning(
                "unlike=%s epoch=%d cosine=%.3f others=%.3f; %s",
                *(peer[-6:], epoch, one.cosine, one.others, CURE),
            )
            self._story.unlike(
                peer, f"cosine {one.cosine:.2f} to their mean, theirs {one.others:.2f}: {CURE}"
            )
        for peer in no_more:
            _log.info("alike=%s epoch=%d its contributions are like the others' again", peer[-6:], epoch)

    def committed(self, record: Record, tokens: int) -> None:
        """A record that is on disk now; behind the chain up to it are so many tokens."""
        body, training = record.body, self.training
        trained = sum(m.tokens for m in body.members)
        contributors = sum(m.weight > 0 for m in body.members)
        figures = body.agreement.shares()
        self.metrics.set_agreement(figures)
        told: dict[str, object] = {  # "%..." and its value
            "epoch=%d": body.epoch,
            "head=%s": record.head[:12],
            "contributions=%d": contributors,
            "tokens=%d": trained,
        }
        if contributors > 1:
            told |= {f"{figure}=%.3f": share for figure, share in figures.items()}
        if math.isfinite(training.loss):
            told |= {"loss=%.4f": training.loss, "tokens_per_second=%.0f": training.tokens_per_second}
        if record.ballot:
            told["ballot=%d"] = record.ballot
        _log.info(f"committed {' '.join(told)}{' forced=true' if body.forced else ''}", *told.values())
        point = {
            "train/loss": training.loss,
            "train/tokens_per_second": training.tokens_per_second,
            "train/tokens": training.tokens_total,
            "data/passes": training.data_passes,
            "round/members": contributors,
            **{f"agreement/{figure}": share for figure, share in figures.items()},
        }
        self._trackers.put(body.epoch, point)
        self._remember(record, contributors, tokens)

    def _remember(self, record: Record, contributors: int, tokens: int) -> None:
        """The record and its epoch's point in the history."""
        epoch, training = record.body.epoch, self.training
        before, now = self._traffic_told, self.traffic
        self._traffic_told = now
        self._story.committed(record, time.time())
        self._history.point(
            epoch,
            contributions=contributors,
            tokens=tokens,
            loss=training.loss_of(epoch - 1),
            tokens_per_second=training.tokens_per_second,
            passes=training.data_passes,
            sent=now.sent - before.sent,
            received=now.received - before.received,
            sent_float32=now.sent_float32 - before.sent_float32,
            received_float32=now.received_float32 - before.received_float32,
            agreement=record.body.agreement.shares() if contributors > 1 else {},
        )

    def changed(self, records: Sequence[Record], core: Snapshot) -> None:
        """Records that are on disk now; some may change who belongs to the run, and its rules."""
        self._tell_settings(core.roll.settings, core.chain_epoch)
        self.meet(core)
        for record in records:
            self._story.changed(record.body)

    def _tell_settings(self, now: Settings, epoch: int) -> None:
        """What is in force now, and was not: by a record, or because its fork was left."""
        before, self._settings = self._settings, now
        for key in {**before, **now}:
            if key not in now:
                _log.info("setting=%s is the run spec's again epoch=%d", key, epoch)
                self._story.unset(key, epoch)
            elif before.get(key) != now[key]:
                _log.info("setting=%s value=%s epoch=%d", key, shown(now[key]), epoch)

    def dropped(self, records: int, weight: int, branch: str, hollow: bool) -> None:
        """A fork was left for a better chain, or (`hollow`) because nobody gave its numbers; `branch` is the
        name of what is kept of it, or ""."""
        self._dropped = Dropped(self._dropped.records + records, self._dropped.weight + weight)
        self.metrics.dropped(records, weight)
        self._story.dropped(records, weight, branch, hollow)

    def gated(self, out: ev.Gated) -> None:
        """What the gate made of a result of a round."""
        self.metrics.gated(out.outcome)
        if out.outcome in ("passed", "unmeasured"):
            return
        without = f" furthest={out.peer}" if out.peer else ""
        _log.warning(
            "gate=%s epoch=%d worse=%.4f%s; %s",
            *(out.outcome, out.epoch + 1, out.worse, without, GATED[out.outcome]),
        )
        self._story.gate(out.epoch + 1, out.outcome, out.worse, out.peer)

    def audited(self, outcome: str) -> None:
        """As Metrics.audited."""
        self.metrics.audited(outcome)

    def accused(self, peer: str, epoch: int, shard: int, what: str) -> None:
        """It is proven that a peer signed what it must not: of record `epoch`; of a shard, or -1 of votes."""
        self.metrics.accused()
        self._accused.append({"peer": peer, "epoch": epoch, "shard": shard, "what": what})
        del self._accused[:-ACCUSED_SHOWN]
        self._story.accused(peer, what)

    def rolled_back(self, epoch: int, to: int, why: str) -> None:
        """The run's members took what was made since `to` back."""
        self.metrics.rolled_back()
        _log.warning(
            "rolled_back epoch=%d state=%d why=%r; nothing is to be done: the run goes on from there",
            *(epoch, to, why),
        )
        self._story.rolled_back(epoch, to, why)

    def withheld(self, peers: Sequence[str], epoch: int, shard: int) -> None:
        """These did not give us, who audits, what they contributed; nor did the reducer of the shard."""
        for peer in peers:
            if peer in self._withheld or len(self._withheld) < WITHHELD_MAX:
                self._withheld[peer] += 1
            if self._refusals.may_tell((peer, "withheld"), time.monotonic()):
                self._story.withheld(peer, epoch, shard)

    def note(self, text: str) -> None:
        _log.info("%s", text)

    # --- of peers ------------------------------------------------------------------------------

    def meet(self, core: Snapshot) -> None:
        """Who is in the run, and what they are called, from now on."""
        self._names.learn(core.peer_id, core.roll)
        self._settings = core.roll.settings

    def refused(self, peer: str, reason: str, text: str) -> None:
        """Something of `peer` was refused."""
        self.log_refusal(peer, reason, text)
        self.metrics.refused(reason)

    def log_refusal(self, peer: str, reason: str, text: str) -> None:
        """All are counted, but a peer must not fill the disk with what it did, nor all together."""
        if self._refusals.may_tell(reason if reason == "peers_max" else (peer, reason), time.monotonic()):
            _log.warning("refused peer=%s reason=%s %s; %s", peer[-6:], reason, text, REFUSED_CURE)
            self._story.refused(peer, reason, text)

    def count_peers(self, core: Snapshot, routes: Mapping[str, str]) -> None:
        """`routes`: linked peer -> "direct" or "relayed"."""
        self.meet(core)
        counts: dict[str, int] = {}
        for peer in core.peers:
            if peer.phase:
                counts[peer.phase] = counts.get(peer.phase, 0) + 1
        self._peers_up = len(core.peers)
        self.metrics.set_peers(counts)
        self.metrics.set_links(Counter(routes.values()))
        if not self.leaving:
            self._story.peers(core)
