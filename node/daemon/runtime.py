"""The one asyncio task group that owns the core: its clock, its timer, and everything that it asks for.

Inputs come from links, trainer and finished jobs; `feed` hands each to the core at once and puts the outputs
in one queue. One task executes the queue in order, and waits for the disk where an output is a write: so what
the core says after a vote is sent after the vote is on disk. Everything heavy runs in threads and comes back
as an input. A disk that cannot be written ends the node: it must not go on promising.
"""

from __future__ import annotations

import asyncio
import logging
import math
import secrets
import time
from collections.abc import Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from typing import Any, ClassVar

from tapestry.compression.refusals import Refused
from tapestry.dht.p2pd import SwarmError
from tapestry.node.daemon.averaging import Averaging
from tapestry.node.daemon.keeper import Keeper, KeeperError
from tapestry.node.daemon.views import Dropped, PhaseClock, TrainingView
from tapestry.node.net.join import state_protocol
from tapestry.node.net.network import Network, News
from tapestry.node.net.repeats import Repeats
from tapestry.node.net.transfer import Donor, DonorFailed, OpenStream, WantedUpdate
from tapestry.node.net.wire import RemoteProtocolError, StreamEnded
from tapestry.node.protocol import events as ev
from tapestry.node.protocol.chain import Record
from tapestry.node.protocol.core import NOTHING, Core
from tapestry.node.protocol.messages import Control, Result, Shard, Stage
from tapestry.node.protocol.snapshot import Snapshot
from tapestry.node.surface.logs import LiveLine
from tapestry.node.surface.metrics import Metrics
from tapestry.node.surface.status import Shown
from tapestry.node.trainer import messages as tm
from tapestry.node.trainer.process import UNKNOWN_GENERATION, Died, Event, TrainerProcess

VALIDATION_SHARE = 0.1  # Guess: of a node's time at most, spent on measuring the validation loss
LAG_PROBE_S = 0.1
PEERS_COUNT_PROBES = 10  # Guess: once a second is often enough for a gauge
FETCH_OPEN_S = 10.0  # to open a stream to a donor
REFUSAL_LOG_S = 10.0  # Guess: between two log lines of one peer and reason
STATE_STREAMS_MAX = 2  # of one peer: to catch up, and for the round
GENESIS_STREAMS_MAX = 1
GENESIS_STREAM_S = 10.0  # as long as a joiner waits: node/join.py
COMPUTE_THREADS = 2  # Guess: two shards are reduced side by side; torch itself runs on one thread here

_log = logging.getLogger("tapestry.node")


class Runtime:
    """The node's loop. Make it, give it its trainer and network, then `run`."""

    def __init__(
        self,
        core: Core,
        keeper: Keeper,
        averaging: Averaging,
        metrics: Metrics,
        live: LiveLine,
        epochs: int | None,
    ) -> None:
        self.core = core
        self.keeper = keeper
        self.metrics = metrics
        self.trainer: TrainerProcess | None = None
        self.network: Network | None = None
        self.view = TrainingView()
        self.dropped = Dropped(0, 0)
        self.done = asyncio.Event()  # --epochs is reached
        self.averaging = averaging
        self._live = live
        self._epochs = epochs
        self._outbox: asyncio.Queue[ev.Output] = asyncio.Queue()
        self._compute = ThreadPoolExecutor(COMPUTE_THREADS, thread_name_prefix="compute")
        self._disk = ThreadPoolExecutor(1, thread_name_prefix="disk")
        self._results = ThreadPoolExecutor(1, thread_name_prefix="result")  # no vote waits for its syncs
        self._tasks: asyncio.TaskGroup | None = None
        self._broken: asyncio.Future[None] | None = None  # ends `run` with what the core raised
        self._fetching: asyncio.Task[Any] | None = None  # a whole state, from a donor
        self._refusals = Repeats(REFUSAL_LOG_S)
        self._timer: asyncio.TimerHandle | None = None
        self._state_lock = asyncio.Lock()  # one job on the parameters at a time
        self._buffer_lock = asyncio.Lock()  # the contribution's buffer is being read
        self._contributed = "", 0  # name of our latest contribution, and generation of its begin
        self._base = ""  # head of the state that the trainer has begun from
        self._clock = PhaseClock(metrics)
        self._moved = ev.Moved(-2, "", Stage.AWAY)  # what was told last
        self._health_told = ""
        self._peers_up = 0
        self._leaving = False
        self._state_protocol = state_protocol(keeper.run_id)
        # Two, so that a joiner learns what the run is while all that give state are busy.
        self._genesis_door = _Door(keeper.donor(self._on_state_bytes), GENESIS_STREAMS_MAX, GENESIS_STREAM_S)
        self._state_door = _Door(keeper.donor(self._on_state_bytes), STATE_STREAMS_MAX, None)

    # --- life ----------------------------------------------------------------------------------

    async def run(self) -> None:
        """Until cancelled. Raises OSError when the disk fails, and our bugs."""
        torch_on_one_thread()
        try:
            async with asyncio.TaskGroup() as tasks:
                self._tasks = tasks
                self._broken = asyncio.get_running_loop().create_future()
                tasks.create_task(self._execute_all())
                tasks.create_task(self._probe_lag())
                self.feed(ev.Tick())
                await self._broken
        finally:
            self._tasks = None
            self._live.show("")
            if self._timer is not None:
                self._timer.cancel()
            self._compute.shutdown(wait=False, cancel_futures=True)
            self._results.submit(self.keeper.drop_result, False)
            self._results.shutdown(wait=False)
            # Not on the loop, which has signals to hear: a second one must find it listening.
            await asyncio.get_running_loop().run_in_executor(None, self._disk.shutdown)

    async def leave(self) -> None:
        """Tell everybody that we stop, and keep what must be kept. The trainer is still running."""
        self._leaving = True
        self.feed(ev.Stopping())
        await asyncio.sleep(0)  # the farewell is queued; links write it while we save
        if self._fetching is not None:
            self._fetching.cancel()  # what has come of it lies in memory only: there is nothing to keep
        async with self._state_lock:
            epoch = self.snapshot().state_epoch
            if self.trainer is not None and epoch >= 0:
                self.trainer.save(epoch)
            await self._in_disk_thread(self.keeper.checkpoint)

    def feed(self, inp: ev.Input) -> None:
        """An input to the core, now. Its outputs are executed in order.

        What the core raises ends the node and not only who called, be it a stream's handler or the timer: a
        core that broke off half-way has moved, and nothing of that was written or sent.
        """
        if self._tasks is None or self._broken is None or self._broken.done():
            return
        try:
            outputs = self.core.handle(inp, self._now())
            if outputs is NOTHING:
                return
            for output in outputs:
                self._outbox.put_nowait(output)
            self._set_timer()
        except Exception as error:
            self._broken.set_exception(error)

    def _set_timer(self) -> None:
        """Call the core again when it has something to do."""
        loop, now = asyncio.get_running_loop(), self._now()
        if self._timer is not None:
            self._timer.cancel()
        delay_s = max(0.001, self.core.wakeup_at(now) - now)
        self._timer = loop.call_later(delay_s, self.feed, ev.Tick())

    def snapshot(self) -> Snapshot:
        """What the core shows at this moment."""
        return self.core.snapshot(self._now())

    def _count_peers(self) -> None:
        counts: dict[str, int] = {}
        peers = self.snapshot().peers
        for peer in peers:
            if peer.phase:
                counts[peer.phase] = counts.get(peer.phase, 0) + 1
        self._peers_up = len(peers)
        self.metrics.set_peers(counts)

    def _now(self) -> float:
        return time.monotonic()

    def news(self) -> News:
        core = self.snapshot()
        return News(core.chain_epoch, core.chain_head, core.phase)

    def show(self) -> Shown:
        """What /status shows."""
        view, network = self.view, self.network
        return Shown(
            self.snapshot(),
            view.loss,
            view.val_loss,
            view.tokens_total,
            view.tokens_per_second,
            self.dropped.records,
            self.dropped.weight,
            network.addresses if network is not None else (),
        )

    def addresses_of(self, peer: str) -> tuple[str, ...]:
        return self.network.addresses_of(peer) if self.network is not None else ()

    async def _probe_lag(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            for _ in range(PEERS_COUNT_PROBES):
                due = loop.time() + LAG_PROBE_S
                await asyncio.sleep(LAG_PROBE_S)
                self.metrics.loop_lag(max(0.0, loop.time() - due))
            self._count_peers()

    # --- links (Listener) ----------------------------------------------------------------------

    def on_up(self, peer: str) -> None:
        self.feed(ev.PeerUp(peer))

    def on_down(self, peer: str) -> None:
        self.feed(ev.PeerDown(peer))

    def on_message(self, peer: str, message: Control | Shard | Result) -> None:
        self.feed(ev.Received(peer, message))

    def on_bulk_progress(self, peer: str) -> None:
        self.feed(ev.BulkProgress(peer))

    def on_unusable(self, peer: str, reason: str, text: str) -> None:
        self._log_refusal(peer, reason, text)
        self.feed(ev.PeerRefused(peer, reason))

    def on_refused(self, peer: str, reason: str, text: str) -> None:
        self._log_refusal(peer, reason, text)
        self.metrics.refused(reason)

    def _log_refusal(self, peer: str, reason: str, text: str) -> None:
        """All are counted, but a peer must not fill the disk with what it did, nor all together."""
        if self._refusals.may_tell(reason if reason == "peers_max" else (peer, reason), self._now()):
            _log.warning("refused peer=%s reason=%s %s", peer[-6:], reason, text)

    def on_bytes(self, direction: str, kind: str, count: int) -> None:
        self.metrics.network_bytes(direction, kind, count)

    # --- trainer -------------------------------------------------------------------------------

    def on_trainer_event(self, event: Event) -> None:
        """What the trainer says, on the loop."""
        self.view.on_event(event, self._now())
        if isinstance(event, tm.Contribution):
            self.metrics.set_contribution_weight(event.weight)
            self.metrics.trainer_waited(event.waited_s)
            self._spawn(self._take(event, self._base))
        elif isinstance(event, tm.Progress):
            self.metrics.trained(*self.view.take_progress(), event.loss)
            self._show(event)
        elif isinstance(event, tm.Validation):
            self.metrics.set_validation_loss(event.loss)
            _log.info("epoch=%d validation_loss=%.4f", event.epoch, event.loss)
        elif isinstance(event, tm.Hello):
            self.metrics.set_trainer_up(True)
            if event.note:
                _log.warning("trainer note=%r", event.note)
            self.feed(ev.TrainerState(True, ""))
        elif isinstance(event, tm.Failed | Died):
            self._trainer_down(event)
        elif isinstance(event, tm.Saved) and event.error:
            _log.warning("trainer inner_state=not_saved reason=%r", event.error)

    def _show(self, event: tm.Progress) -> None:
        self._live.show(
            f"epoch {event.epoch}  step {event.step}/{event.steps}  loss {event.loss:.4f}  "
            f"{event.tokens_per_second:,.0f} tokens/s  {self._peers_up} peers  {self._moved.phase}"
        )

    def _trainer_down(self, event: tm.Failed | Died) -> None:
        self.metrics.set_trainer_up(False)
        if isinstance(event, Died):
            self.metrics.trainer_restarted()
            last = event.output[-1] if event.output else ""
            why = f"trainer died, exit {event.exit_code}; next start in {event.will_restart_in_s:g} s {last}"
        else:
            why = f"trainer failed: {event.reason}: {event.text}"
        _log.warning("%s", why)
        self.feed(ev.TrainerState(False, why))

    async def _take(self, event: tm.Contribution, base: str) -> None:
        """Out of the memory that the trainer will write to again, and to the core."""
        if self.trainer is None:
            return
        token = secrets.token_hex(16)
        async with self._buffer_lock:
            try:
                payloads = await self._in_compute_thread(self.averaging.take, self.trainer.contribution)
            except Refused as refused:
                self.metrics.refused(refused.reason)
                self.feed(ev.TrainerState(False, f"contribution refused: {refused}"))
                return
            self._contributed = token, event.generation
            self.feed(ev.Contributed(event.epoch, base, token, event.weight, event.norm, payloads))

    # --- outputs -------------------------------------------------------------------------------

    async def _execute_all(self) -> None:
        while True:
            output = await self._outbox.get()
            done = self._EXECUTE[type(output)](self, output)
            if done is not None:
                await done

    def do_send(self, out: ev.Send) -> None:
        if self.network is not None:
            self.network.send_control(out.peer, out.message)

    def do_broadcast(self, out: ev.Broadcast) -> None:
        if self.network is not None:
            for peer in out.peers:
                self.network.send_control(peer, out.message)

    def do_send_shard(self, out: ev.SendShard) -> None:
        message = Shard(out.epoch, out.contribution, out.shard, None)
        self._send_bulk(out.peer, message, "contribution", out.blob)

    def do_send_result(self, out: ev.SendResult) -> None:
        message = Result(out.epoch, out.head, out.ballot, out.shard, "", None)
        self._send_bulk(out.peer, message, "result", out.blob)

    def _send_bulk(self, peer: str, message: Shard | Result, kind: str, blob: Any) -> None:
        if self.network is not None:
            self.network.send_bulk(peer, message, kind, self.averaging.frame(message.shard, blob))

    def do_reduce(self, out: ev.Reduce) -> None:
        self._spawn(self._reduce(out))

    async def _reduce(self, out: ev.Reduce) -> None:
        reduce = self.averaging.reduce
        try:
            mean, digest = await self._in_compute_thread(reduce, out.shard, out.blobs, out.weights)
        except Refused as refused:
            _log.error("reduce=refused shard=%d %s", out.shard, refused)
            self.feed(ev.PeerRefused(max(out.peers), refused.reason))
            return
        self.feed(ev.Reduced(out.epoch, out.head, out.ballot, out.shard, digest, mean))

    def do_keep_result(self, out: ev.KeepResult) -> None:
        self._results.submit(self.keeper.put_result, out.shard, out.blob, out.digest)

    async def do_persist_vote(self, out: ev.PersistVote) -> None:
        await self._in_disk_thread(self.keeper.write_vote, out.vote)

    async def do_persist_result(self, out: ev.PersistResult) -> None:
        loop, write = asyncio.get_running_loop(), self.keeper.write_update
        await loop.run_in_executor(self._results, write, out.epoch, out.head, out.blobs)

    async def do_append_record(self, out: ev.AppendRecord) -> None:
        await self._in_disk_thread(self.keeper.append_record, out.record)
        if out.newest:  # of many that come at once, the last one is news
            self._tell_committed(out.record)

    def _tell_committed(self, record: Record) -> None:
        body = record.body
        weight = sum(m.weight for m in body.members)
        contributors = sum(m.weight > 0 for m in body.members)
        text = f"committed epoch={body.epoch} head={record.head[:12]}"
        text += f" contributions={contributors} weight={weight}"
        if math.isfinite(self.view.loss):
            text += f" loss={self.view.loss:.4f} tokens_per_second={self.view.tokens_per_second:.0f}"
        if record.ballot:
            text += f" ballot={record.ballot}"
        _log.info("%s%s", text, " forced=true" if body.forced else "")

    async def do_switch_chain(self, out: ev.SwitchChain) -> None:
        records, weight = await self._in_disk_thread(self.keeper.switch_chain, out.epoch, out.records)
        self.dropped = Dropped(self.dropped.records + records, self.dropped.weight + weight)
        self.metrics.dropped(records, weight)
        self._tell_committed(out.records[-1])

    def do_apply(self, out: ev.Apply) -> None:
        self._spawn(self._state_job(self.keeper.apply, out.record))

    def do_rollback(self, out: ev.Rollback) -> None:
        if self.trainer is not None:
            self.trainer.abort()  # what it makes of the base that we leave must not pass for another's
        self._spawn(self._state_job(self.keeper.rollback, out.epoch))

    async def _state_job(self, job: Callable[..., tuple[int, str]], *args: Any) -> None:
        async with self._state_lock:
            try:
                epoch, digest = await self._in_disk_thread(job, *args)
            except KeeperError as error:
                self.feed(ev.FetchFailed("", "", str(error)))
                return
        self.feed(ev.Applied(epoch, digest))
        if self._epochs is not None and epoch >= self._epochs and self.snapshot().at_head:
            self.done.set()
        if self.keeper.checkpoint_due(epoch):
            self._spawn(self._checkpoint(epoch))

    async def _checkpoint(self, epoch: int) -> None:
        async with self._state_lock:
            if self.trainer is not None:
                self.trainer.save(epoch)
            await self._in_disk_thread(self.keeper.checkpoint)

    def do_fetch_update(self, out: ev.FetchUpdate) -> None:
        self._spawn(self._fetch_update(out))

    async def _fetch_update(self, out: ev.FetchUpdate) -> None:
        wanted = WantedUpdate(out.epoch, out.head, out.result)
        opener = self._opener(out.donor)
        fetching = self.keeper.fetch_update(opener, wanted, self._on_state_bytes)
        why = await self._failure_of(out.donor, fetching)
        self.feed(ev.FetchFailed(out.donor, out.head, why) if why else ev.UpdateFetched(out.head))

    def do_fetch_state(self, out: ev.FetchState) -> None:
        self._spawn(self._fetch_state(out))

    async def _fetch_state(self, out: ev.FetchState) -> None:
        keeper, opener = self.keeper, self._opener(out.donor)
        async with self._state_lock:
            if self._leaving:
                return
            if self.trainer is not None:
                self.trainer.abort()
            chain = await self._in_disk_thread(keeper.copy_of_chain)
            fetching = keeper.fetch_state(opener, out.epoch_max, chain, self._on_state_bytes)
            self._fetching = asyncio.current_task()
            try:
                why = await self._failure_of(out.donor, fetching)
            finally:
                self._fetching = None
            if not why:
                await self._in_disk_thread(keeper.checkpoint)
        self.feed(ev.FetchFailed(out.donor, "", why) if why else ev.Applied(*keeper.reached))

    async def _failure_of(self, donor: str, fetching: Coroutine[Any, Any, None]) -> str:
        """Run a fetch: "" or why it failed, in a word. What our own disk raises is passed on."""
        try:
            await fetching
        except RemoteProtocolError as error:
            self.on_refused(donor, error.reason, str(error))
            return error.reason
        except DonorFailed as error:
            return error.reason
        except SwarmError as error:
            _log.info("fetch=failed donor=%s reason=%r", donor[-6:], str(error))
            return "unreachable"
        return ""

    def _opener(self, donor: str) -> OpenStream:
        async def open_stream() -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
            if self.network is None:
                raise SwarmError("there is no network")
            return await self.network.open_stream(donor, self._state_protocol, FETCH_OPEN_S)

        return open_stream

    def _on_state_bytes(self, direction: str, count: int) -> None:
        self.metrics.network_bytes("sent" if direction == "out" else "received", "state", count)

    async def serve_genesis(
        self, peer: str, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        """The handler of the genesis protocol."""
        await self._serve_through(self._genesis_door, peer, reader, writer)

    async def serve_state(
        self, peer: str, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        """The handler of the state protocol."""
        await self._serve_through(self._state_door, peer, reader, writer)

    async def _serve_through(
        self, door: _Door, peer: str, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        try:
            await door.serve(peer, reader, writer)
        except RemoteProtocolError as error:
            self.on_refused(peer, error.reason, str(error))
        except (StreamEnded, TimeoutError, ConnectionError) as error:
            _log.debug("serving peer=%s ended reason=%r", peer[-6:], error)

    async def do_train(self, out: ev.Train) -> None:
        if self.trainer is None or (self._epochs is not None and out.epoch >= self._epochs):
            return
        async with self._buffer_lock:
            if self.view.validation_due(self._now(), VALIDATION_SHARE):
                self.view.validating(self._now())
                self.trainer.evaluate(out.epoch)
            self._clock.train(self._now())
            self._base = out.base
            self.trainer.begin(out.epoch, out.base, out.before)

    def do_close_training(self, out: ev.CloseTraining) -> None:
        if self.trainer is not None:
            self.trainer.close_round(out.epoch)

    def do_exchange_began(self, out: ev.ExchangeBegan) -> None:
        if self.trainer is not None:
            self.trainer.go_on(out.epoch)

    def do_end_round(self, out: ev.EndRound) -> None:
        self._settle(out.counted)
        self._results.submit(self.keeper.drop_result, out.outcome == "committed")
        self.metrics.round_ended(out.outcome, self._clock.round_ended(self._now()))
        if self.network is not None:
            self.network.drop_bulk()
        if out.outcome != "committed" and not self._leaving:
            _log.warning("round=%s epoch=%d", out.outcome, out.epoch)

    def _settle(self, counted: str) -> None:
        """Tell the trainer which contribution of ours the record of this round names, if there is one."""
        if counted and self.trainer is not None:
            token, generation = self._contributed
            self.trainer.settle(generation if counted == token else UNKNOWN_GENERATION)

    def do_moved(self, out: ev.Moved) -> None:
        """Metrics, presence and log follow what the node is doing."""
        self._clock.stage(out.stage, self._now())
        if out.epoch != self._moved.epoch:
            self.metrics.set_epoch(max(out.epoch, 0))
            if self.network is not None:
                self.network.tell_moved()
        self._moved = out
        health = "working" if out.phase in ("training", "averaging") else out.phase
        if health == "degraded":
            self.view.tokens_per_second = 0.0
        if health != self._health_told:
            self._health_told = health
            if health != "stopping":  # the daemon says that
                reason = "at the head" if health == "working" else self.snapshot().reason
                _log.info("phase=%s epoch=%d %s", out.phase, max(out.epoch, 0), reason)
                self._live.show(f"{out.phase}: {reason}")

    def do_verdict(self, out: ev.Verdict) -> None:
        self.on_refused(out.peer, out.reason, out.text)

    def do_note(self, out: ev.Note) -> None:
        _log.info("%s", out.text)

    _EXECUTE: ClassVar[dict[type, Callable[..., Coroutine[Any, Any, None] | None]]] = {
        ev.Send: do_send,
        ev.Broadcast: do_broadcast,
        ev.SendShard: do_send_shard,
        ev.SendResult: do_send_result,
        ev.Reduce: do_reduce,
        ev.KeepResult: do_keep_result,
        ev.PersistVote: do_persist_vote,
        ev.PersistResult: do_persist_result,
        ev.AppendRecord: do_append_record,
        ev.SwitchChain: do_switch_chain,
        ev.Apply: do_apply,
        ev.Rollback: do_rollback,
        ev.FetchUpdate: do_fetch_update,
        ev.FetchState: do_fetch_state,
        ev.Train: do_train,
        ev.CloseTraining: do_close_training,
        ev.ExchangeBegan: do_exchange_began,
        ev.EndRound: do_end_round,
        ev.Moved: do_moved,
        ev.Verdict: do_verdict,
        ev.Note: do_note,
    }

    # --- threads -------------------------------------------------------------------------------

    def _spawn(self, job: Coroutine[Any, Any, None]) -> None:
        if self._tasks is None:
            job.close()
        else:
            self._tasks.create_task(job)

    async def _in_compute_thread(self, function: Callable[..., Any], *args: Any) -> Any:
        return await asyncio.get_running_loop().run_in_executor(self._compute, function, *args)

    async def _in_disk_thread(self, function: Callable[..., Any], *args: Any) -> Any:
        return await asyncio.get_running_loop().run_in_executor(self._disk, function, *args)


class _Door:
    """A donor's streams: of each peer so many at a time, and if they must be short, so long."""

    def __init__(self, donor: Donor, streams_max: int, stream_s: float | None) -> None:
        self._donor = donor
        self._streams_max = streams_max
        self._stream_s = stream_s
        self._streams: dict[str, int] = {}

    async def serve(self, peer: str, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """As Donor.serve. Without this one peer could take all the streams that a donor serves at once."""
        count = self._streams.get(peer, 0)
        if count >= self._streams_max:
            raise RemoteProtocolError("streams", f"more than {self._streams_max} streams at a time")
        self._streams[peer] = count + 1
        try:
            async with asyncio.timeout(self._stream_s):
                await self._donor.serve(reader, writer)
        finally:
            self._streams[peer] -= 1
            if not self._streams[peer]:
                del self._streams[peer]


def torch_on_one_thread() -> None:
    """Copying and reducing run in threads of ours; torch's own would only compete with the trainer."""
    import torch

    torch.set_num_threads(1)
