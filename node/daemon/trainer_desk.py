"""The trainer's desk: what the core asks of the trainer, and what the trainer reports.

A contribution is copied out of the memory that the trainer writes to, in a thread; the trainer is not told to
begin again before that copy is made. The core hears of a contribution together with the base that it was made
from, and so drops one that was made on a fork that has been left since.

Of data that may not be used nothing is begun or contributed. Whether they still may not is asked once a
second: data.toml may have been looked at while somebody saved it, or have had a mistake that was mended.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable

from tapestry.compression.refusals import Refused
from tapestry.node.daemon.averaging import Averaging
from tapestry.node.daemon.desk import Loop, Outputs
from tapestry.node.daemon.goal import Goal
from tapestry.node.daemon.trainer_health import TrainerHealth
from tapestry.node.daemon.views import Reporter
from tapestry.node.protocol import events as ev
from tapestry.node.trainer import messages as tm
from tapestry.node.trainer.orders import UNKNOWN_GENERATION
from tapestry.node.trainer.process import Died, Event, Parted, TrainerProcess

NOTE_CURE = (  # of an inner optimizer that cannot be used
    "nothing is to be done after an upgrade or a change of [training]; else check the disk. Some epochs "
    "learn less"
)
VALIDATION_SHARE = 0.1  # Guess: of a node's time at most, spent on measuring the validation loss
ASK_AGAIN_S = 1.0  # whether data may be used again
SETTLE_TIMES = 3  # of asking, while a contribution waits for a data.toml that is being written. Guess
NO_SCRIPT = ev.TrainerState(
    False, "no script trains here", "the next one that opens this home with Swarm does"
)
FORBIDDEN_ENDS = f"looked at again each {ASK_AGAIN_S:g} s"

_log = logging.getLogger("tapestry.node")


class TrainerDesk:
    """Hands the trainer its work."""

    def __init__(
        self,
        loop: Loop,
        trainer: TrainerProcess,
        averaging: Averaging,
        reporter: Reporter,
        goal: Goal,  # no training beyond it
        own: str,  # peer id
        offer: Callable[[str], None],  # is told of a contribution before anybody else
    ) -> None:
        self._loop = loop
        self._trainer = trainer
        trainer.forbidden = goal.forbidden
        self._averaging = averaging
        self._reporter = reporter
        self._goal = goal
        self._own = own
        self._offer = offer
        self._health = TrainerHealth()
        self._buffer_lock = asyncio.Lock()  # the contribution's buffer is being read
        self._base = ""  # head of the state that the trainer has begun from
        self._begun_epoch = -1
        self._inner_epoch: int | None = None  # that the trainer's own state is of; None while none is up
        self._forbidden = ""  # why, as it was told last; "": the data may be used
        self._contributed = "", 0  # name of our latest contribution, and generation of its begin
        self.outputs: Outputs = {
            ev.Train: self.do_train,
            ev.CloseTraining: self.do_close_training,
            ev.ExchangeBegan: self.do_exchange_began,
            ev.EndRound: self.do_end_round,
        }

    # --- for the disk desk ---------------------------------------------------------------------

    def abort(self) -> None:
        """The base is about to become one that no update made of this one: what the trainer makes of it must
        not pass for another's, and what rounding took from what may be undone must not come back."""
        self._trainer.abort()
        self._trainer.settle(UNKNOWN_GENERATION)

    def save(self, epoch: int) -> None:
        """Have the inner optimizer written down, as of the beginning of `epoch`; not what was undone."""
        if not self._undone(epoch):
            self._trainer.save(epoch)

    def _undone(self, epoch: int) -> bool:
        """Whether the trainer's own state was made on a line that a record up to `epoch` has undone."""
        since, rolled = self._inner_epoch, self._loop.snapshot().roll.rolled
        return since is not None and any(since < at <= epoch for at in rolled)

    def end(self) -> None:
        """Have the trainer end while the rest of the node is put away."""
        self._trainer.end()

    # --- what the trainer reports --------------------------------------------------------------

    def on_event(self, event: Event) -> None:
        """A report of the trainer, on the loop."""
        self._reporter.on_event(event, self._loop.now())
        if isinstance(event, tm.Contribution):
            self._loop.spawn(self._take(event, self._base))
        elif isinstance(event, tm.Hello):
            self._reporter.trainer_up()
            self._inner_epoch = event.inner_epoch
            if self._undone(self._begun_epoch):
                self._trainer.forget()  # before it is told what was begun meanwhile
            if event.note:
                _log.warning("trainer note=%r; %s", event.note, NOTE_CURE)
            self._loop.feed(ev.TrainerState(True, ""))
        elif isinstance(event, tm.Failed | Died | Parted):
            self._down(event)
        elif isinstance(event, tm.Notice):
            _log.warning("trainer %s", event.text)  # with what to do: inner.py, member.py
        elif isinstance(event, tm.Saved) and event.error:
            _log.warning(
                "trainer inner_state=not_saved reason=%r; make room or mend the disk: a restart begins it "
                "afresh",
                event.error,
            )

    def _down(self, event: tm.Failed | Died | Parted) -> None:
        self._inner_epoch = None  # the next one says what it has
        self._trainer.abort()  # the core asks for it again when the next one is here: else it began it twice
        if isinstance(event, Died):
            self._reporter.metrics.trainer_restarted()
            why = self._health.died(event)
            state = ev.TrainerState(False, self._health.cause, self._health.ends)
        elif isinstance(event, Parted):
            state = NO_SCRIPT
            why = f"{state.reason}; {state.ends}"
        else:
            why = self._health.failed(event)
            state = ev.TrainerState(False, self._health.cause, self._health.ends)
        self._reporter.trainer_down(
            why, self._health.trouble, told=not isinstance(event, Died) or self._health.worth_telling
        )
        self._loop.feed(state)

    async def _take(self, event: tm.Contribution, base: str) -> None:
        """Check a contribution, which stays while it is held (or is copied), and tell the core."""
        async with self._buffer_lock:
            try:
                trainer, take = self._trainer, self._averaging.take
                payloads = await self._loop.compute(take, trainer.contribution, trainer.must_copy)
                commit = self._averaging.commit
                name = await self._loop.compute(commit, self._own, event.epoch, payloads)
            except Refused as refused:
                self._reporter.metrics.refused(refused.reason)
                self._trainer.reject(str(refused))  # says so; another one begins this epoch again
                return
        if not await self._is_allowed_soon():
            return
        await self._loop.compute(self._offer, name)
        self._contributed = name, event.generation
        self._health.contributed()
        self._reporter.training.trouble = ""
        self._loop.feed(ev.Contributed(event.epoch, base, name, event.weight, event.norm, payloads))

    async def _is_allowed_soon(self) -> bool:
        """Whether the data may be used; not half a file decides it."""
        for _ in range(SETTLE_TIMES):
            if not self._goal.forbidden():
                return True
            await asyncio.sleep(ASK_AGAIN_S)
        return not self._is_forbidden()

    def _is_forbidden(self) -> bool:
        """Whether the data may not be used; then this node contributes nothing, says why, and asks again."""
        why, before = self._goal.forbidden(), self._forbidden
        if why:
            self._forbidden = why
            self._reporter.trainer_down(why, why, told=why != before)
            self._loop.feed(ev.TrainerState(False, why, FORBIDDEN_ENDS))
            if not before:
                self._loop.spawn(self._until_allowed())
        return bool(why)

    async def _until_allowed(self) -> None:
        while why := self._goal.forbidden():
            if why != self._forbidden:
                self._is_forbidden()
            await asyncio.sleep(ASK_AGAIN_S)
        self._forbidden = ""
        _log.info("data=allowed training goes on")
        if self._inner_epoch is not None:  # else the next trainer says that it is there
            self._reporter.training.trouble = ""
            self._reporter.trainer_up()
            self._loop.feed(ev.TrainerState(True, ""))

    # --- outputs -------------------------------------------------------------------------------

    async def do_train(self, out: ev.Train) -> None:
        """Begin an epoch, as soon as the contribution before it has been taken."""
        self._goal.begin(out.epoch)
        if self._goal.reached(out.epoch) or self._is_forbidden():
            return
        async with self._buffer_lock:
            now = self._loop.now()
            if self._reporter.training.validation_due(now, VALIDATION_SHARE):
                self._reporter.training.validating(now)
                self._trainer.evaluate(out.epoch)
            self._reporter.clock.train()
            self._base = out.base
            self._begun_epoch = out.epoch
            if self._undone(out.epoch):
                self._trainer.forget()
            if self._inner_epoch is not None:
                self._inner_epoch = out.epoch
            settings = self._loop.snapshot().roll.settings
            self._trainer.begin(out.epoch, out.base, out.before, settings)

    def do_close_training(self, out: ev.CloseTraining) -> None:
        self._trainer.close_round(out.epoch)

    def do_exchange_began(self, out: ev.ExchangeBegan) -> None:
        self._trainer.go_on(out.epoch)

    def do_end_round(self, out: ev.EndRound) -> None:
        """Tell the trainer which contribution of ours the record of this round names, if it names one."""
        if out.counted:
            name, generation = self._contributed
            self._trainer.settle(generation if out.counted == name else UNKNOWN_GENERATION)
