"""What the protocol needs of the run's spec."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal


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


def settled(rules: Rules, settings: Mapping[str, float]) -> Rules:
    """Those of the spec, with what records have changed since: members.SETTINGS.

    `max_influence` is not here: it is judged by the roll before a record, members.voice_weights.
    """
    if not settings:
        return rules
    stall_s = settings.get("round.stall_s", rules.stall_s)
    return replace(
        rules,
        stall_s=stall_s,
        heartbeat_s=min(rules.heartbeat_s, stall_s / 5),
        resend_s=min(rules.resend_s, stall_s / 5),
        min_members=int(settings.get("round.min_members", rules.min_members)),
        wait_max_s=settings.get("round.wait_max_s", rules.wait_max_s),
    )
