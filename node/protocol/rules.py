"""What the protocol needs of the run's spec."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

from tapestry.node.protocol.settings import Settings, Value


@dataclass(frozen=True, slots=True)
class Rules:
    """The part of the run spec that the protocol needs. Seconds, counts and shares. A wait that is None is
    computed: pace.py."""

    run_id: str
    shard_count: int
    straggler_wait_s: float | None = 5.0
    closing_grace_s: float | None = 2.0
    stall_s: float = 5.0
    quorum_loss_s: float | None = 30.0
    on_quorum_loss: Literal["auto", "continue", "wait"] = "continue"
    min_members: int = 1
    max_influence: float = 1.0
    commit_grace_s: float = 1.0
    exchange_max_s: float | None = 300.0  # Guess: a peer that drips bytes holds a ballot up no longer
    exchange_sized_s: float = 300.0  # what an exchange of this model takes on the slowest line allowed for
    wait_max_s: float = 43_200.0  # that a computed wait comes to
    heartbeat_s: float = 1.0  # Guess: a fifth of stall_s, so that one lost heartbeat accuses nobody
    resend_s: float = 1.0  # Guess: longer than a round trip anywhere on Earth
    gate_margin: float | None = (
        None  # by how much a result may worsen a member's held-out loss; None: no gate
    )
    gate_max_s: float | None = None  # that a member takes to measure; then it votes unmeasured
    audit_share: float = 0.05  # of a record's shards, that another member averages again
    peers_max: int = 64
    records_bytes_max: int = 1 << 19  # of a RECORDS message; one record is always in it
    own: frozenset[str] = frozenset()  # settings that no record changes here: a node by itself has its own


CHANGED_BY = {  # setting -> field of Rules
    "gate.margin": "gate_margin",
    "round.straggler_wait_s": "straggler_wait_s",
    "round.closing_grace_s": "closing_grace_s",
    "round.commit_grace_s": "commit_grace_s",
    "round.stall_s": "stall_s",
    "round.exchange_max_s": "exchange_max_s",
    "round.quorum_loss_s": "quorum_loss_s",
    "round.wait_max_s": "wait_max_s",
    "round.min_members": "min_members",
}


def settled(rules: Rules, settings: Settings) -> Rules:
    """Those of the spec, with what records have changed since, as the roll of the state at hand has it.

    `max_influence` and `audit_share` are not here. They are of one record and may be asked for later, so they
    are looked up in the roll before that: members.voice_weights, drawn.share_of.
    """
    changed: dict[str, Any] = {
        field: _as_rule(key, settings[key])
        for key, field in CHANGED_BY.items()
        if key in settings and key not in rules.own
    }
    if not changed:
        return rules
    fifth_s = changed.get("stall_s", rules.stall_s) / 5
    return replace(
        rules,
        heartbeat_s=min(rules.heartbeat_s, fifth_s),
        resend_s=min(rules.resend_s, fifth_s),
        **changed,
    )


def _as_rule(key: str, value: Value) -> float | int | None:
    """As Rules has it: None for a wait that is computed, and for no gate."""
    if isinstance(value, str) or (key == "gate.margin" and value == 0.0):
        return None
    return int(value) if key == "round.min_members" else value
