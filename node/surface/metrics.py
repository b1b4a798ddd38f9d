"""The node's Prometheus metrics: names and labels are the contract of the operator's surface.

Every series exists from the start, so that a rate or an alert never waits for a first event. Labels take
fixed values only, or names from this member's own configuration: nothing that a peer says becomes a label,
and no peer is one. Losses are NaN until there is a loss, because a loss of 0 would be a lie.

Must not import torch or hivemind.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping

import prometheus_client
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Info, Metric, ProcessCollector

from tapestry.node.disk.use import KINDS
from tapestry.node.protocol.waits import KINDS as WAITS

ROUND_OUTCOMES = ("committed", "aborted", "missed", "forced")
AGREEMENT_FIGURES = ("cosine", "sign", "norm_kept")  # protocol/agreement.py
ROUND_PHASES = ("training", "ready", "exchanging", "gate", "accepted")  # protocol/messages.py, Stage
NODE_PHASES = ("starting", "joining", "training", "averaging", "degraded", "stopping")
DIRECTIONS = ("sent", "received")
ROUTES = ("direct", "relayed")
BYTE_KINDS = ("control", "contribution", "result", "state", "audit")
GATE_OUTCOMES = ("passed", "unmeasured", "refused", "went_on", "again")  # protocol/events.py, Gated
AUDIT_OUTCOMES = ("agreed", "lie", "incomplete", "skipped")
REFUSED_REASONS = (  # tests/surface/test_refusals.py reads the sources and finds the same
    # dht/presence.py
    *("forged", "stale", "oversized", "foreign", "malformed", "future"),
    # protocol/place.py and sync.py: records
    *("signature", "unlinked", "unsigned", "electorate", "branch", "no_common_record", "forced", "final"),
    *("handover", "seat", "draw"),
    # protocol/members.py and proposals.py: who belongs to the run, and what changes that
    *("not_member", "weights", "behind", "changes", "unsigned_change", "void", "done", "member"),
    *("no_member", "invites", "charter", "proposals", "rollback"),
    # daemon/network_desk.py: an admission by an invitation whose time is over
    "expired",
    # protocol/round.py and exchange.py: messages of a round
    *(
        "not_leader",
        "narrow",
        "unheeded",
        "not_reducer",
        "not_elector",
        "roster",
        "roster_signature",
        "weight",
        "shard",
        "state_digest",
        "equivocation",
        "agreement",
        "mean_signature",
    ),
    # daemon/averaging.py, audit_desk.py, accusation_desk.py
    *("commitment", "missing", "accusation"),
    # compression: frames and payloads; "digest" is a payload that is not the one that was announced
    *("not_finite", "overflow", "length", "count", "shape", "dtype", "scale", "code", "codec"),
    *("magic", "version", "digest", "total", "device", "contiguous"),
    # net/transfer.py: what a donor gives
    *("genesis", "update", "unproven"),
    # dht/guard.py: calls to the DHT
    *("calls", "busy"),
    # net/links.py, daemon/network_desk.py: more than a peer may have of us
    *("streams", "slow", "peers_max"),
    # what a handler of ours raised
    "other",
)

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

# Guesses: a round of `nano` takes a tenth of a second on loopback, one of a large model half an hour.
_ROUND_BUCKETS_S = (0.1, 0.25, 0.5, 1, 2.5, 5, 10, 15, 30, 60, 120, 300, 600, 1800)
_PHASE_BUCKETS_S = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300, 1800)
# Guess: 1 ms is a busy loop, 100 ms is felt by peers, 1 s threatens the stall timer.
_LAG_BUCKETS_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 5)


class Metrics:
    """One node's metrics, on a registry of their own.

    Arguments outside the fixed labels raise ValueError, except refusal reasons, which count as `other`:
    they come from many places.
    """

    def __init__(self, version: str) -> None:
        no_created_series: Callable[[], None] = prometheus_client.disable_created_metrics
        no_created_series()  # they would double every counter; a switch of the library, for the process
        self._version = version
        self._registry = CollectorRegistry()
        ProcessCollector(registry=self._registry)
        self._make_round_metrics()
        self._make_training_metrics()
        self._make_network_metrics()
        self._info = Info("tapestry", "Version of this node and the run it is in.", registry=self._registry)
        self.set_run("", "")
        disk = Gauge("tapestry_disk_bytes", "What the home takes on disk.", ["kind"], registry=self._registry)
        self._disk = {kind: disk.labels(kind=kind) for kind in KINDS}
        self._disk_free = Gauge(
            "tapestry_disk_free_bytes", "What is free where the home is.", registry=self._registry
        )
        waiting = Gauge(
            "tapestry_waiting_seconds",
            "How long the node has waited, once that is longer than is usual, by what for; else 0.",
            labelnames=["kind"],
            registry=self._registry,
        )
        self._waiting = {kind: waiting.labels(kind=kind) for kind in WAITS}
        self._loop_lag = Histogram(
            "tapestry_loop_lag_seconds",
            "How late the node's event loop ran a timer.",
            registry=self._registry,
            buckets=_LAG_BUCKETS_S,
        )

    def render(self) -> bytes:
        """The Prometheus text format; serve it as CONTENT_TYPE."""
        return prometheus_client.generate_latest(self._registry)

    def collect(self) -> Iterable[Metric]:
        """The same as prometheus_client has it. From any thread."""
        return self._registry.collect()

    def set_disk(self, use: Mapping[str, int], free: int) -> None:
        """Bytes of the home by disk/use.KINDS, and what is left on its file system."""
        for kind, count in use.items():
            self._disk[_one_of(KINDS, kind)].set(count)
        self._disk_free.set(free)

    def set_run(self, run_id: str, run_name: str) -> None:
        """Once the run is known."""
        self._info.info({"version": self._version, "run_id": run_id, "run_name": run_name})

    def set_waiting(self, waits: Mapping[str, float]) -> None:
        """Seconds by protocol/waits.KINDS; for what is not named it does not wait."""
        for kind, gauge in self._waiting.items():
            gauge.set(waits.get(kind, 0.0))

    # ---- rounds --------------------------------------------------------------------------------------

    def set_epoch(self, epoch: int) -> None:
        self._epoch.set(epoch)

    def round_ended(self, outcome: str, duration_s: float | None) -> None:
        """`duration_s` from this node's start of training to the end; None if it took no part."""
        self._rounds[_one_of(ROUND_OUTCOMES, outcome)].inc()
        if duration_s is not None:
            self._round_seconds.observe(duration_s)

    def round_phase_ended(self, phase: str, duration_s: float) -> None:
        self._round_phases[_one_of(ROUND_PHASES, phase)].observe(duration_s)

    def gated(self, outcome: str) -> None:
        """One of GATE_OUTCOMES."""
        self._gate[_one_of(GATE_OUTCOMES, outcome)].inc()

    def audited(self, outcome: str) -> None:
        """One of AUDIT_OUTCOMES."""
        self._audits[_one_of(AUDIT_OUTCOMES, outcome)].inc()

    def accused(self) -> None:
        """A lie of a reducer was proven."""
        self._accusations.inc()

    def rolled_back(self) -> None:
        """A record took the state back to an earlier one."""
        self._rollbacks.inc()

    def dropped(self, records: int, weight: int) -> None:
        """A fork was left for a better chain."""
        self._dropped_records.inc(records)
        self._dropped_weight.inc(weight)

    def set_contribution_weight(self, weight: float) -> None:
        self._contribution_weight.set(weight)

    def set_agreement(self, figures: Mapping[str, float]) -> None:
        """How far the contributions of the latest committed round agree."""
        for figure, value in figures.items():
            self._agreement[_one_of(AGREEMENT_FIGURES, figure)].set(value)

    # ---- training ------------------------------------------------------------------------------------

    def trained(self, steps: int, tokens: int, loss: float) -> None:
        """Progress of the trainer since the last call."""
        self._train_steps.inc(steps)
        self._train_tokens.inc(tokens)
        self._train_loss.set(loss)

    def trainer_waited(self, duration_s: float) -> None:
        """Before its latest contribution the trainer had nothing to do for so long."""
        self._train_waiting.inc(duration_s)

    def set_validation_losses(self, losses: Mapping[str, float]) -> None:
        """Of each of this member's validation sets; NaN for one that has not been measured yet."""
        for name, loss in losses.items():
            self._validation_loss.labels(set=name).set(loss)

    def set_data_passes(self, passes: float) -> None:
        """How often the trainer has gone over this member's data."""
        self._data_passes.set(passes)

    def set_trainer_up(self, up: bool) -> None:
        self._trainer_up.set(up)

    def trainer_restarted(self) -> None:
        self._trainer_restarts.inc()

    # ---- network and process -------------------------------------------------------------------------

    def network_bytes(self, direction: str, kind: str, byte_count: int) -> None:
        self._network_bytes[_one_of(DIRECTIONS, direction), _one_of(BYTE_KINDS, kind)].inc(byte_count)
        self._bytes[direction][kind] += byte_count

    def bytes_by_kind(self, direction: str) -> Mapping[str, int]:
        """What `network_bytes` was told since the start."""
        return dict(self._bytes[direction])

    def set_peers(self, counts: Mapping[str, int]) -> None:
        """Live peers by the phase they say they are in; phases that are not named have none."""
        for phase, gauge in self._peers.items():
            gauge.set(counts.get(phase, 0))

    def set_links(self, counts: Mapping[str, int]) -> None:
        """Linked peers by the way to them, as ROUTES."""
        for route, gauge in self._links.items():
            gauge.set(counts.get(route, 0))

    def set_members(self, members: int, applicants: int) -> None:
        """Who belongs to the run, and who waits to."""
        self._members.set(members)
        self._applicants.set(applicants)

    def refused(self, reason: str) -> None:
        """Something of a peer was refused."""
        self._refused[reason if reason in self._refused else "other"].inc()

    def loop_lag(self, lag_s: float) -> None:
        self._loop_lag.observe(lag_s)

    # ---- declarations --------------------------------------------------------------------------------

    def _make_round_metrics(self) -> None:
        registry = self._registry
        self._epoch = Gauge("tapestry_epoch", "Committed updates in this node's state.", registry=registry)
        rounds = Counter(
            "tapestry_rounds", "Rounds that ended, by how.", labelnames=["outcome"], registry=registry
        )
        self._rounds = {outcome: rounds.labels(outcome=outcome) for outcome in ROUND_OUTCOMES}
        self._round_seconds = Histogram(
            "tapestry_round_seconds",
            "From having a contribution to the commit: what averaging cost.",
            registry=registry,
            buckets=_ROUND_BUCKETS_S,
        )
        phases = Histogram(
            "tapestry_round_phase_seconds",
            "Duration of the phases of a round.",
            labelnames=["phase"],
            registry=registry,
            buckets=_PHASE_BUCKETS_S,
        )
        self._round_phases = {phase: phases.labels(phase=phase) for phase in ROUND_PHASES}
        self._dropped_records = Counter(
            "tapestry_dropped_records",
            "Committed records of this node's chain that were given up for a better one.",
            registry=registry,
        )
        self._dropped_weight = Counter(
            "tapestry_dropped_weight", "Tokens behind those records.", registry=registry
        )
        gate = Counter(
            "tapestry_gate",
            "Results of rounds that this node measured on its held-out data, or made again.",
            labelnames=["outcome"],
            registry=registry,
        )
        self._gate = {outcome: gate.labels(outcome=outcome) for outcome in GATE_OUTCOMES}
        audits = Counter(
            "tapestry_audits",
            "Shards of others that this node averaged again after a commit.",
            labelnames=["outcome"],
            registry=registry,
        )
        self._audits = {outcome: audits.labels(outcome=outcome) for outcome in AUDIT_OUTCOMES}
        self._accusations = Counter(
            "tapestry_accusations",
            "Lies that this node has seen proven: wrong means, and two votes or two rosters in one ballot.",
            registry=registry,
        )
        self._rollbacks = Counter(
            "tapestry_rollbacks",
            "Times that this node's state went back to an earlier one, by the members' decision.",
            registry=registry,
        )
        agreement = Gauge(
            "tapestry_agreement",
            "How far the contributions of the latest committed round agree: 1 is wholly.",
            labelnames=["figure"],
            registry=registry,
        )
        self._agreement = {figure: agreement.labels(figure=figure) for figure in AGREEMENT_FIGURES}
        for gauge in self._agreement.values():
            gauge.set(math.nan)
        self._contribution_weight = Gauge(
            "tapestry_contribution_weight",
            "Tokens behind this node's latest contribution.",
            registry=registry,
        )

    def _make_training_metrics(self) -> None:
        registry = self._registry
        self._train_loss = Gauge("tapestry_train_loss", "Latest training loss, nats.", registry=registry)
        self._train_loss.set(math.nan)
        self._validation_loss = Gauge(
            "tapestry_validation_loss",
            "Loss of the shared base on this member's validation sets, nats.",
            labelnames=["set"],
            registry=registry,
        )
        self._data_passes = Gauge(
            "tapestry_train_data_passes", "Passes over this member's training data.", registry=registry
        )
        self._train_tokens = Counter("tapestry_train_tokens", "Tokens trained on.", registry=registry)
        self._train_steps = Counter("tapestry_train_steps", "Inner steps taken.", registry=registry)
        self._train_waiting = Counter(
            "tapestry_train_waiting_seconds",
            "Time in which the trainer had no step to take: it waited for a round.",
            registry=registry,
        )
        self._trainer_up = Gauge(
            "tapestry_trainer_up", "1 while the trainer process works.", registry=registry
        )
        self._trainer_restarts = Counter(
            "tapestry_trainer_restarts", "Times the trainer process was started again.", registry=registry
        )

    def _make_network_metrics(self) -> None:
        registry = self._registry
        network = Counter(
            "tapestry_network_bytes",
            "Bytes on streams with peers.",
            labelnames=["direction", "kind"],
            registry=registry,
        )
        self._network_bytes = {
            (direction, kind): network.labels(direction=direction, kind=kind)
            for direction in DIRECTIONS
            for kind in BYTE_KINDS
        }
        self._bytes = {direction: dict.fromkeys(BYTE_KINDS, 0) for direction in DIRECTIONS}
        peers = Gauge("tapestry_peers", "Live peers, by phase.", labelnames=["phase"], registry=registry)
        self._members = Gauge("tapestry_members", "Members of the run.", registry=registry)
        self._applicants = Gauge("tapestry_applicants", "Peers that wait to be admitted.", registry=registry)
        self._peers = {phase: peers.labels(phase=phase) for phase in NODE_PHASES}
        links = Gauge(
            "tapestry_links",
            "Linked peers, by the way to them: direct, or relayed by another peer.",
            labelnames=["route"],
            registry=registry,
        )
        self._links = {route: links.labels(route=route) for route in ROUTES}
        refused = Counter(
            "tapestry_refused",
            "Records, frames and contributions of peers that were refused.",
            labelnames=["reason"],
            registry=registry,
        )
        self._refused = {reason: refused.labels(reason=reason) for reason in REFUSED_REASONS}


def _one_of(values: tuple[str, ...], value: str) -> str:
    if value not in values:
        raise ValueError(f"{value!r} is not one of {', '.join(values)}")
    return value
