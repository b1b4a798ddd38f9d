"""The gate's desk: what the core asks to be measured before it votes, and what it tells of that.

The step is taken on a copy (state/model.py), and the trainer measures it between two steps of its own, on a
few windows that this member holds out. Who has no such windows or may not use them any more, or whose trainer
is a person's script, or is gone, measures nothing: then the core votes as without a gate.
"""

from __future__ import annotations

import logging

from tapestry.compression.refusals import Refused
from tapestry.node.daemon.desk import Loop, Outputs
from tapestry.node.daemon.disk_desk import DiskDesk
from tapestry.node.daemon.goal import Goal
from tapestry.node.daemon.views import Reporter
from tapestry.node.errors import UserError
from tapestry.node.protocol import events as ev
from tapestry.node.trainer.process import TrainerProcess

_log = logging.getLogger("tapestry.node")


class GateDesk:
    """Measures results."""

    def __init__(
        self, loop: Loop, trainer: TrainerProcess, disk: DiskDesk, reporter: Reporter, goal: Goal
    ) -> None:
        self._loop = loop
        self._goal = goal
        self._trainer = trainer
        self._disk = disk
        self._reporter = reporter
        self.outputs: Outputs = {ev.Judge: self.do_judge, ev.Gated: reporter.gated}

    def do_judge(self, out: ev.Judge) -> None:
        self._loop.spawn(self._judge(out))

    async def _judge(self, out: ev.Judge) -> None:
        body, began = out.body, self._loop.now()
        losses = await self._losses(out)
        self._reporter.clock.gate(self._loop.now() - began)
        worse = None if losses is None else losses[1] - losses[0]
        self._loop.feed(ev.Judged(body.epoch - 1, body.prev, out.head, worse))

    async def _losses(self, out: ev.Judge) -> tuple[float, float] | None:
        """Held-out loss before the step and after it; None if it cannot be measured."""
        trainer = self._trainer
        if not trainer.can_judge or self._goal.forbidden():
            return None
        async with trainer.aside.lock:
            try:
                room = trainer.room_aside()
                if not await self._disk.take_aside(out.body, out.blobs, room):
                    return None
            except (UserError, Refused) as error:
                _log.warning(
                    "gate=unmeasured epoch=%d reason=%r; this node votes without having measured. Make "
                    "room in memory, if that is the reason: the gate takes one more copy of the "
                    "parameters",
                    *(out.body.epoch, str(error)),
                )
                return None
            return await trainer.judge(out.body.prev, out.head)
