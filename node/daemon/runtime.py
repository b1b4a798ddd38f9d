"""The one asyncio task group that owns the core: its inputs, its outputs, its clock.

Inputs come from links, trainer and finished jobs; `feed` hands each to the core at once and puts the outputs
in one queue. One task executes the queue in order, and waits for the disk where an output is a write: so what
the core says after a vote is sent after the vote is on disk. What an output means is the affair of three
desks: trainer_desk.py, disk_desk.py, network_desk.py; views.py tells people. Everything heavy runs in threads
and comes back as an input.

The core is only ever asked to `handle`, for `wakeup_at`, and for a `snapshot`.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from tapestry.node.daemon.accusation_desk import AccusationDesk
from tapestry.node.daemon.audit_desk import AuditDesk
from tapestry.node.daemon.audit_streams import Auditor, AuditStreams
from tapestry.node.daemon.averaging import Averaging
from tapestry.node.daemon.descriptions_desk import DescriptionsDesk
from tapestry.node.daemon.desk import Job, Loop, Outputs
from tapestry.node.daemon.disk_desk import DiskDesk
from tapestry.node.daemon.gate_desk import GateDesk
from tapestry.node.daemon.goal import Goal
from tapestry.node.daemon.keeper import Keeper
from tapestry.node.daemon.members_desk import MembersDesk
from tapestry.node.daemon.network_desk import NetworkDesk
from tapestry.node.daemon.standing import Standing
from tapestry.node.daemon.trainer_desk import TrainerDesk
from tapestry.node.daemon.views import Reporter
from tapestry.node.errors import UserError
from tapestry.node.lineage.bring import Brought
from tapestry.node.net.network import Network
from tapestry.node.protocol import events as ev
from tapestry.node.protocol.core import NOTHING, Core
from tapestry.node.protocol.record import Record
from tapestry.node.protocol.snapshot import Membership, Snapshot
from tapestry.node.spec.run import why_no_change
from tapestry.node.surface.status import Shown
from tapestry.node.trainer.process import TrainerProcess

LAG_PROBE_S = 0.1
FAREWELL_S = 3.0  # Guess: that a stop waits at most for what the core said before it
PEERS_COUNT_PROBES = 10  # Guess: once a second is often enough for a gauge
COMPUTE_THREADS = 2  # Guess: two shards are reduced side by side; torch itself runs on one thread here


Words = Callable[[Loop], DescriptionsDesk]


class Runtime:
    """The node's loop; desk.py, Loop. Make it, then `run`."""

    def __init__(
        self,
        core: Core,
        keeper: Keeper,
        averaging: Averaging,
        trainer: TrainerProcess,
        network: Network,
        reporter: Reporter,
        goal: Goal,  # `done` is set there
        auditor: Auditor,
        brought: Brought | None = None,
        words: Words | None = None,  # makes the desk of descriptions, where there is one
    ) -> None:
        self._core = core
        self._brought = brought
        self._network = network
        self.reporter = reporter
        self.done = asyncio.Event()  # the state is as far as this node was to go, or `ends` says why not
        self.ends: UserError | None = None  # it was removed, and is to end
        self._goal = goal
        self.trainer = TrainerDesk(self, trainer, averaging, reporter, goal, auditor.own, self._offer)
        self.members = MembersDesk(
            self,
            auditor.own,
            auditor.crypto,
            network.given,
            lambda settings, key: why_no_change(keeper.spec, settings, key),
            lambda epoch: keeper.held_back_to(core.chain, epoch),
        )
        streams = AuditStreams(self, network, reporter, auditor)
        self._accusations = AccusationDesk(
            self, network, averaging, reporter, auditor, self.members, keeper, streams
        )
        accuse = self._accusations.accuse
        audits = AuditDesk(self, network, averaging, reporter, auditor, self.members, streams, accuse)
        self.network = NetworkDesk(
            self, network, averaging, keeper, reporter, streams, self._accusations, self.members
        )
        self.network.words = words(self) if words is not None else None
        self._standing = Standing(self, auditor.own, self.network.standing_at)
        self.disk = DiskDesk(self, keeper, self.trainer, self.network, reporter)
        self.gate = GateDesk(self, trainer, self.disk, reporter, goal)
        self.outputs: Outputs = {
            ev.Moved: self.do_moved,
            ev.EndRound: lambda out: reporter.round_ended(out, self.now()),
            ev.AppendRecord: lambda out: self._appended((out.record,), bool(out.record.body.changes), None),
            ev.SwitchChain: lambda out: self._appended(out.records, True, out.epoch),
            ev.Verdict: lambda out: reporter.refused(out.peer, out.reason, out.text),
            ev.Note: lambda out: reporter.note(out.text),
        }
        desks = self.trainer, self.disk, self.network, audits, self._accusations, self.gate
        self._execute = _table(*(desk.outputs for desk in desks), self.outputs)
        self._outbox: asyncio.Queue[ev.Output] = asyncio.Queue()
        self._compute = ThreadPoolExecutor(COMPUTE_THREADS, thread_name_prefix="compute")
        self._tasks: asyncio.TaskGroup | None = None  # while the node runs
        self._broken: asyncio.Future[None]  # ends `run` with what the core raised
        self._timer: asyncio.TimerHandle | None = None

    # --- life ----------------------------------------------------------------------------------

    async def run(self) -> None:
        """Until cancelled. Raises OSError when the disk fails, and our bugs."""
        torch_on_one_thread()
        self.reporter.meet(self.snapshot())
        try:
            async with asyncio.TaskGroup() as tasks:
                self._broken = asyncio.get_running_loop().create_future()
                self._tasks = tasks
                tasks.create_task(self._execute_all())
                tasks.create_task(self._probe())
                tasks.create_task(self._accusations.look_again())
                if self.network.words is not None:  # we are on no island
                    tasks.create_task(self._end_if_removed())
                    tasks.create_task(self._pass_words_on(self.network.words))
                    tasks.create_task(self._compare_versions())
                self.feed(ev.Tick())
                await self._broken
        finally:
            self._tasks = None
            self.reporter.live.show("")
            if self._timer is not None:
                self._timer.cancel()
            self._compute.shutdown(wait=False, cancel_futures=True)
            await self.disk.close()

    async def leave(self) -> None:
        """Tell everybody that we stop, keep what must be kept, and have the trainer end."""
        self.reporter.leaving = True
        self.feed(ev.Stopping())
        with contextlib.suppress(TimeoutError):  # the farewell comes after our vote is on disk
            await asyncio.wait_for(self._outbox.join(), FAREWELL_S)
        await self.disk.leave()

    # --- inputs and outputs --------------------------------------------------------------------

    def feed(self, inp: ev.Input) -> None:
        """An input to the core, now. Its outputs are executed in order.

        What the core raises ends the node and not only its caller, be it a stream's handler or the timer: a
        core that broke off half-way has moved, and nothing of that was written or sent.
        """
        if self._tasks is None or self._broken.done():
            return
        try:
            outputs = self._core.handle(inp, self.now())
            if outputs is NOTHING:
                return
            for output in outputs:
                self._outbox.put_nowait(output)
            self._set_timer()
        except Exception as error:
            self._broken.set_exception(error)

    def _offer(self, contribution: str) -> None:
        if self._brought is not None:
            self._brought.offer(contribution)

    def _appended(self, records: Sequence[Record], changed: bool, left: int | None) -> None:
        if self._brought is not None:
            self._brought.look(records, left)
        if left is None:  # a round made it
            self.members.take_back()
        if changed:
            self.reporter.changed(records, self.snapshot())
            self._network.check_members()

    def do_moved(self, out: ev.Moved) -> None:
        self.reporter.moved(out, self.now(), self.snapshot)
        if self._goal.reached(out.epoch):
            self.done.set()

    def _set_timer(self) -> None:
        """Call the core again when it has something to do."""
        loop, now = asyncio.get_running_loop(), self.now()
        if self._timer is not None:
            self._timer.cancel()
        delay_s = max(0.001, self._core.wakeup_at(now) - now)
        self._timer = loop.call_later(delay_s, self.feed, ev.Tick())

    async def _execute_all(self) -> None:
        while True:
            output = await self._outbox.get()
            for execute in self._execute[type(output)]:
                done = execute(output)
                if done is not None:
                    await done
            self._outbox.task_done()

    # --- what the desks and the surface ask ----------------------------------------------------

    def snapshot(self) -> Snapshot:
        return self._core.snapshot(self.now())

    def membership(self) -> Membership:
        return self._core.membership()

    def now(self) -> float:
        return time.monotonic()

    def spawn(self, job: Job) -> None:
        """Begin it. At our end it is dropped: so is what a trainer still says while it is stopped."""
        try:
            if self._tasks is not None:
                self._tasks.create_task(job)
                return
        except RuntimeError:  # the group has ended, or is about to
            pass
        job.close()

    async def compute(self, function: Callable[..., Any], *args: Any) -> Any:
        return await asyncio.get_running_loop().run_in_executor(self._compute, function, *args)

    def show(self) -> Shown:
        """What /status shows."""
        where, waiting = self._network.where(), self.members.reception.applicants
        return self.reporter.show(self.snapshot(), where, waiting, self.network.versions.known)

    async def _pass_words_on(self, words: DescriptionsDesk) -> None:
        desk = self.network
        await words.run(lambda: self._network.linked, desk.linked_opener, desk.on_words, desk.on_refused)

    async def _compare_versions(self) -> None:
        network, desk = self._network, self.network
        await desk.versions.run(lambda: network.linked, network.lacks, desk.is_member, desk.linked_opener)

    async def _end_if_removed(self) -> None:
        self.ends = await self._standing.watch()
        self.done.set()

    async def _probe(self) -> None:
        """How late the loop is, and how many peers there are."""
        loop = asyncio.get_running_loop()
        while True:
            for _ in range(PEERS_COUNT_PROBES):
                due = loop.time() + LAG_PROBE_S
                await asyncio.sleep(LAG_PROBE_S)
                self.reporter.metrics.loop_lag(max(0.0, loop.time() - due))
            core = self.snapshot()
            self.reporter.count_peers(core, self._network.where().routes)
            self.reporter.metrics.set_members(len(core.roll.members), len(self.members.reception.applicants))


def _table(*desks: Outputs) -> dict[type, list[Callable[[Any], Job | None]]]:
    """Kind of output -> what executes it, desk after desk."""
    table: dict[type, list[Callable[[Any], Job | None]]] = {}
    for outputs in desks:
        for kind, execute in outputs.items():
            table.setdefault(kind, []).append(execute)
    return table


def torch_on_one_thread() -> None:
    """Copying and reducing run in threads of ours; torch's own would only compete with the trainer."""
    import torch

    torch.set_num_threads(1)
