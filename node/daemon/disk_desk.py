"""The disk's desk: votes, results, records and states, in the order in which the core says them.

Three kinds of work, kept apart. A write that the core's next word depends on is waited for: nothing is sent
after a vote before the vote is on disk. The shards of a result are written in a thread of their own, and so
are checkpoints: no vote waits for them, nor what is said after it, which is how others know that we live.
Jobs on the parameters (apply, go back, fetch, checkpoint) run beside the loop, one at a time. A disk that
cannot be written ends the node: it must not go on promising.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from torch import Tensor

from tapestry.dht.p2pd import SwarmError
from tapestry.node.daemon.desk import Loop, Outputs
from tapestry.node.daemon.keeper import Keeper, KeeperError
from tapestry.node.daemon.network_desk import NetworkDesk
from tapestry.node.daemon.trainer_desk import TrainerDesk
from tapestry.node.daemon.views import Reporter
from tapestry.node.net.transfer import DonorFailed, OpenStream, WantedUpdate
from tapestry.node.net.wire import RemoteProtocolError
from tapestry.node.protocol import events as ev
from tapestry.node.protocol.audit import SignedMean
from tapestry.node.protocol.members import read_rollback
from tapestry.node.protocol.record import Body, Record
from tapestry.node.protocol.sync import NO_STATE
from tapestry.node.state.model import ModelState

LEAVING_BYTES_MAX = 256 << 20  # Guess: a state that even a slow disk takes in two of the seconds to stop in

_log = logging.getLogger("tapestry.node")


def is_large(state: ModelState) -> bool:
    """Whether a state, and the inner optimizer of its model, take too long to write when a node stops."""
    return state.size_bytes > LEAVING_BYTES_MAX


class DiskDesk:
    """Keeps what must be kept."""

    def __init__(
        self,
        loop: Loop,
        keeper: Keeper,
        trainer: TrainerDesk,
        network: NetworkDesk,
        reporter: Reporter,
    ) -> None:
        self._loop = loop
        self._keeper = keeper
        self._trainer = trainer
        self._network = network
        self._reporter = reporter
        reporter.branches = keeper.branches.names
        self._leaving = False
        self._fetching: asyncio.Task[Any] | None = None  # a whole state, from a donor
        self._state_lock = asyncio.Lock()  # one job on the parameters at a time
        self._disk = ThreadPoolExecutor(1, thread_name_prefix="disk")
        self._results = ThreadPoolExecutor(1, thread_name_prefix="result")
        self._checkpoints = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self.outputs: Outputs = {
            ev.KeepResult: self.do_keep_result,
            ev.PersistVote: self.do_persist_vote,
            ev.PersistResult: self.do_persist_result,
            ev.AppendRecord: self.do_append_record,
            ev.SwitchChain: self.do_switch_chain,
            ev.Apply: self.do_apply,
            ev.Rollback: self.do_rollback,
            ev.FetchUpdate: self.do_fetch_update,
            ev.FetchState: self.do_fetch_state,
            ev.EndRound: self.do_end_round,
        }

    # --- life ----------------------------------------------------------------------------------

    async def leave(self) -> None:
        """Keep what must be kept; the trainer ends meanwhile. A large state is not written again: the last
        checkpoint and the update log lead to it, and the next start takes those steps once more. Nor is the
        inner optimizer of so large a model: the next start has it as of that checkpoint."""
        self._leaving = True
        if self._fetching is not None:
            self._fetching.cancel()  # what has come of it lies in memory only: there is nothing to keep
        small = not is_large(self._keeper.state)
        if not small:
            self._keeper.abandon_checkpoint()
        async with self._state_lock:
            epoch = self._loop.snapshot().state_epoch
            if small and epoch >= 0:
                self._trainer.save(epoch)
            self._trainer.end()
            if small:
                await self._write_checkpoint()

    async def close(self) -> None:
        """End the threads, when the writes that were begun are done."""
        self._results.submit(self._keeper.drop_result, False)
        self._results.shutdown(wait=False)
        # Not on the loop, which has signals to hear: a second one must find it listening.
        for thread in (self._checkpoints, self._disk):
            await asyncio.get_running_loop().run_in_executor(None, thread.shutdown)

    async def _on_disk(self, function: Callable[..., Any], *args: Any) -> Any:
        return await asyncio.get_running_loop().run_in_executor(self._disk, function, *args)

    # --- the round's result and vote -----------------------------------------------------------

    def do_keep_result(self, out: ev.KeepResult) -> None:
        self._results.submit(self._keeper.put_result, out.shard, out.blob, out.digest)

    async def do_persist_vote(self, out: ev.PersistVote) -> None:
        await self._on_disk(self._keeper.write_vote, out.vote)

    async def do_persist_result(self, out: ev.PersistResult) -> None:
        loop, write = asyncio.get_running_loop(), self._keeper.write_update
        await loop.run_in_executor(self._results, write, out.epoch, out.head, out.blobs, out.means)

    def do_end_round(self, out: ev.EndRound) -> None:
        self._results.submit(self._keeper.drop_result, out.outcome == "committed")

    # --- the chain -----------------------------------------------------------------------------

    async def do_append_record(self, out: ev.AppendRecord) -> None:
        await self._on_disk(self._keeper.append_record, out.record)
        if out.newest:  # of many that come at once, the last one is news
            self._reporter.committed(out.record, self._keeper.committed_tokens)

    async def do_switch_chain(self, out: ev.SwitchChain) -> None:
        left = await self._on_disk(self._keeper.switch_chain, out.epoch, out.records)
        self._reporter.branches = self._keeper.branches.names
        self._reporter.dropped(left.records, left.tokens, left.branch, hollow=not out.records)
        if out.records:
            self._reporter.committed(out.records[-1], self._keeper.committed_tokens)

    # --- the state -----------------------------------------------------------------------------

    def do_apply(self, out: ev.Apply) -> None:
        self._loop.spawn(self._step(out.record))

    async def _step(self, record: Record) -> None:
        await self._state_job(self._keeper.apply, record)

    async def take_aside(
        self,
        body: Body,
        blobs: Sequence[Any],
        out: Tensor,  # f32 (n,)
    ) -> bool:
        """The parameters that the step of `body` makes, into `out`; False if our state is not the one before.

        Raises Refused.
        """
        async with self._state_lock:
            done: bool = await self._on_disk(self._keeper.take_aside, body, blobs, out)
        return done

    def do_rollback(self, out: ev.Rollback) -> None:
        self._trainer.abort()
        self._loop.spawn(self._go_back(out.epoch))

    async def _go_back(self, epoch: int) -> None:
        if await self._state_job(self._keeper.rollback, epoch) == epoch:
            why = await self._on_disk(self._keeper.rolled_back, epoch)
            if why is not None:
                self._reporter.rolled_back(epoch, *why)

    async def _state_job(self, job: Callable[..., tuple[int, str]], *args: Any) -> int:
        """Returns the epoch that the state has come to; -1 if it has not."""
        epoch: int
        async with self._state_lock:
            try:
                epoch, digest = await self._on_disk(job, *args)
            except KeeperError as error:
                self._loop.feed(ev.FetchFailed("", "", str(error)))
                return NO_STATE
        self._loop.feed(ev.Applied(epoch, digest))
        if self._keeper.checkpoint_due(epoch):
            self._loop.spawn(self._checkpoint(epoch))
        return epoch

    async def _checkpoint(self, epoch: int) -> None:
        async with self._state_lock:
            self._trainer.save(epoch)
            await self._write_checkpoint()

    async def _write_checkpoint(self) -> None:
        """Hold the state lock. The chain goes on meanwhile, so what may be dropped is asked of it afterwards,
        in the thread that changes it."""
        chain = await self._on_disk(self._keeper.copy_of_chain)
        loop, write = asyncio.get_running_loop(), self._keeper.checkpoint
        if await loop.run_in_executor(self._checkpoints, write, chain):
            await self._on_disk(self._keeper.prune, self._back_to())
            self._reporter.branches = self._keeper.branches.names

    def _back_to(self) -> int | None:
        """The epoch that a rollback which has this node's signature may lead to: what makes it is kept."""
        core = self._loop.snapshot()
        signed = [c for c in core.pending if core.peer_id in dict(c.signatures)]
        return min((read_rollback(c.value)[0] for c in signed if c.kind == "rollback"), default=None)

    # --- from donors ---------------------------------------------------------------------------

    def do_fetch_update(self, out: ev.FetchUpdate) -> None:
        self._loop.spawn(self._fetch_update(out))

    async def _fetch_update(self, out: ev.FetchUpdate) -> None:
        wanted = WantedUpdate(out.epoch, out.head, out.result, out.accepted)
        opener = self._network.opener(out.donor)
        means: tuple[SignedMean, ...] = ()

        async def fetching() -> None:
            nonlocal means
            means = await self._keeper.fetch_update(opener, wanted, self._network.on_state_bytes)

        why = await self._failure_of(out.donor, fetching())
        failed = ev.FetchFailed(out.donor, out.head, why)
        self._loop.feed(failed if why else ev.UpdateFetched(out.head, means))

    def do_fetch_state(self, out: ev.FetchState) -> None:
        self._loop.spawn(self._fetch_state(out))

    async def _fetch_state(self, out: ev.FetchState) -> None:
        keeper, first = self._keeper, out.donors[0]
        openers = {donor: _reaching(self._network.opener(donor)) for donor in out.donors}
        others: list[str] = []  # that failed
        async with self._state_lock:
            if self._leaving:
                return
            self._trainer.abort()
            self._fetching = asyncio.current_task()
            try:
                chain = await self._on_disk(keeper.copy_of_chain)
                count, on_fault = self._network.on_state_bytes, self._noting(others)
                told = self._reporter.coming.update
                epochs = out.epoch_min, out.epoch_max
                fetching = keeper.fetch_state(openers, epochs, chain, count, on_fault, told)
                why = await self._failure_of(first, fetching)
            finally:
                self._fetching = None
                self._reporter.coming.end()
            if not why:
                await self._write_checkpoint()
        failed = ev.FetchFailed(first, "", why, tuple(others))
        self._loop.feed(failed if why else ev.Applied(*keeper.reached))

    def _noting(self, failed: list[str]) -> Callable[[str, Exception], None]:
        """Of several donors, who failed or lied while the others went on: named here, and noted."""

        def on_fault(donor: str, error: Exception) -> None:
            failed.append(donor)
            if isinstance(error, RemoteProtocolError):
                self._reporter.refused(donor, error.reason, str(error))
            else:
                _log.info("fetch=failed donor=%s reason=%r", donor[-6:], str(error))

        return on_fault

    async def _failure_of(self, donor: str, fetching: Coroutine[Any, Any, None]) -> str:
        """Run a fetch: "" or why it failed, in a word. What our own disk raises is passed on."""
        try:
            await fetching
        except RemoteProtocolError as error:
            self._reporter.refused(donor, error.reason, str(error))
            return error.reason
        except DonorFailed as error:
            return error.reason
        except SwarmError as error:
            _log.info("fetch=failed donor=%s reason=%r", donor[-6:], str(error))
            return "unreachable"
        return ""


def _reaching(opener: OpenStream) -> OpenStream:
    """A donor that cannot be reached is one that failed."""

    async def open_stream() -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        try:
            return await opener()
        except SwarmError as error:
            raise DonorFailed("unreachable", str(error)) from error

    return open_stream
