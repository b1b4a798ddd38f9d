"""How long each stage of a round takes on this node, and what averaging costs it."""

from __future__ import annotations

from tapestry.node.protocol.messages import Stage
from tapestry.node.surface.metrics import Metrics


class PhaseClock:
    """Times the stages of a round for the metrics. `now` is in seconds, by the clock of the loop."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics
        self._stage = Stage.AWAY
        self._since = 0.0
        self._ready_at: float | None = None
        self._gate_s = 0.0  # of the stage that goes on, spent on measuring the result
        self._phases: dict[str, float] = {}  # seconds, since they were taken

    def stage(self, stage: Stage, now: float) -> None:
        if stage == self._stage:
            return
        if self._stage != Stage.AWAY:
            phase, duration_s = self._stage.name.lower(), max(0.0, now - self._since - self._gate_s)
            self._gate_s = 0.0
            self._metrics.round_phase_ended(phase, duration_s)
            self._phases[phase] = self._phases.get(phase, 0.0) + duration_s
        if stage >= Stage.READY and self._ready_at is None:
            self._ready_at = now
        self._stage, self._since = stage, now

    def gate(self, duration_s: float) -> None:
        """A result was measured, in the middle of a stage."""
        self._gate_s += duration_s
        self._metrics.round_phase_ended("gate", duration_s)
        self._phases["gate"] = self._phases.get("gate", 0.0) + duration_s

    def train(self) -> None:
        self._ready_at = None

    def round_ended(self, now: float) -> float | None:
        """Seconds from having a contribution to the end: what averaging cost. None if there was none."""
        ready_at, self._ready_at = self._ready_at, None
        return None if ready_at is None else now - ready_at

    def take_phases(self) -> dict[str, float]:
        """Seconds in each stage since the last call."""
        phases, self._phases = self._phases, {}
        return phases
