"""The life of a node: from the command line's configuration to exit code, and everything released on the way.

    identity -> p2pd -> genesis (home, peer, or founded) -> spec agreed -> trainer configured -> state
    -> core, links, HTTP -> ready -> ... -> a signal: leave the round, checkpoint, withdraw presence, exit 0

assembly.py says what a node is put together from. launch.py has locked the home and started the trainer's
process before this module was imported.

What can be wrong with the configuration is found before anything slow is started; the data were looked for by
cli.py. A second signal ends the process at once; so does the deadline of a stop that takes too long.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import os
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime
from importlib.metadata import version

from tapestry.dht.addresses import PeerAddress, parse_peer, ranked
from tapestry.dht.identity import Identity, IdentityError
from tapestry.dht.p2pd import SwarmError
from tapestry.dht.swarm import Swarm
from tapestry.node.daemon.admitted import be_admitted
from tapestry.node.daemon.assembly import (
    Node,
    Own,
    assemble,
    fixed,
    open_state,
    swarm_config,
    worker_settings,
)
from tapestry.node.daemon.base import have_base
from tapestry.node.daemon.coming import Coming, TokenizingView
from tapestry.node.daemon.control import Control
from tapestry.node.daemon.disk_desk import is_large
from tapestry.node.daemon.egress import EgressLedger
from tapestry.node.daemon.notify import Notifier
from tapestry.node.daemon.permit import DataPermit, led_to
from tapestry.node.daemon.restored import RESTORED_WAIT_S, chain_of, find_run
from tapestry.node.daemon.views import Reporter
from tapestry.node.daemon.waits import WaitTeller
from tapestry.node.disk.branches import BranchLimits
from tapestry.node.disk.home_mark import read_mark
from tapestry.node.disk.store import Store
from tapestry.node.disk.use import disk_free, disk_use
from tapestry.node.errors import ExitCode, UserError, as_user_error
from tapestry.node.home import Home, NodeInfo
from tapestry.node.lineage.crypto import NodeCrypto
from tapestry.node.lineage.follow import Broken, read_genesis
from tapestry.node.lineage.island import begin as begin_island
from tapestry.node.lineage.uses import Started, note_use
from tapestry.node.net.asked import refuse_ourselves
from tapestry.node.net.join import agree_on_run
from tapestry.node.net.network import last_listen, without_peer
from tapestry.node.net.throttle import Throttle, Throttles
from tapestry.node.protocol.waits import BY_ITSELF_S, Wait
from tapestry.node.spec.declared import BASE, paths_of, sources_of
from tapestry.node.spec.listen import Listening, write_listening
from tapestry.node.spec.node import NodeConfig
from tapestry.node.spec.training import WorkerSettings
from tapestry.node.surface.admit import Admit
from tapestry.node.surface.history import History, HistoryFile, read_history
from tapestry.node.surface.http import needs_token, start_http
from tapestry.node.surface.logs import Log
from tapestry.node.surface.metrics import Metrics
from tapestry.node.surface.otel import About, open_otel
from tapestry.node.surface.status import NodeView
from tapestry.node.surface.tls import ServerTls
from tapestry.node.surface.token import Token
from tapestry.node.surface.trackers import open_trackers
from tapestry.node.trainer.messages import Hello, Tokenizing
from tapestry.node.trainer.process import Event, Parted, TrainerError, TrainerProcess

STOP_S = 10.0  # the contract: exit 0 within
TRAINER_STOP_S = 4.0  # where nothing has to be put away
# Of STOP_S, for the end of a trainer that is killed in a step: 5 GB take 4 s beside other jobs.
CLOSING_S = 6.0
TRAINER_STOP_LARGE_S = 1.0  # it has nothing to save
DISK_EVERY_S = 60.0
USERS_REASONS = ("data", "model", "settings", "device")  # of messages.Failed: what a person can put right
VERSION = version("tapestry-node")

_log = logging.getLogger("tapestry.node")


class Daemon:
    def __init__(self, config: NodeConfig, live: Log, trainer: TrainerProcess, notifier: Notifier) -> None:
        self.config = config
        self.live = live
        self.trainer = trainer  # launched; it ends with `run`
        trainer.on_event = self._on_trainer_event
        self.home = config.home
        self.started_at = time.time()
        self.metrics = Metrics(VERSION)
        self.notifier = notifier
        self.view = NodeView(VERSION, config.upload_bytes_per_second, config.download_bytes_per_second)
        self.history = History()
        self.throttles = Throttles(
            Throttle(config.upload_bytes_per_second), Throttle(config.download_bytes_per_second)
        )
        self.stop = asyncio.Event()
        self._stopping_at: float | None = None  # loop time
        self._tokenizing = TokenizingView(live)
        self._waits = WaitTeller(self.view.wait, self.metrics, self.history)
        self._node: Node | None = None  # once it runs
        self._is_up = False  # it has been: from then on Ctrl-C is the usual end
        self._given_up = False

    async def run(self) -> int:
        """Until the node is stopped. Returns 0, or 1 for a Ctrl-C before it was up; raises UserError."""
        try:
            return await self._run_until_stopped()
        except (UserError, OSError, SwarmError, ExceptionGroup) as error:
            first = _first(error)
            if isinstance(first, UserError):
                raise first from None
            if isinstance(first, SwarmError):
                raise UserError(str(first), exit_code=ExitCode.FAILED) from error
            if isinstance(first, OSError):
                raise _disk_failed(self.home, first) from error
            raise

    async def _run_until_stopped(self) -> int:
        self._handle_signals()
        self._heed_stop_requests()
        main = asyncio.create_task(self._run())
        stop = asyncio.create_task(self.stop.wait())
        signs = asyncio.create_task(self.notifier.run(self._in_a_line))
        waits = asyncio.create_task(self._waits.run())
        await asyncio.wait({main, stop}, return_when=asyncio.FIRST_COMPLETED)
        if not main.done():
            self.view.stopping = True
            self._stopping_at = asyncio.get_running_loop().time()
            self.notifier.stopping()
            _log.info("stopping")
            self.history.tell("this node stops")
            asyncio.get_running_loop().call_later(STOP_S, _give_up_stopping)
            main.cancel()
        stop.cancel()
        waits.cancel()
        main.add_done_callback(lambda _: signs.cancel())
        with contextlib.suppress(asyncio.CancelledError):
            await main
        return int(ExitCode.FAILED if self._given_up else ExitCode.DONE)

    def _in_a_line(self) -> str:
        """For the service manager."""
        status = self.view.status()
        what = f"epoch {status['epoch']}, {status['phase']}"
        return what if status["reason"] in ("", status["phase"]) else f"{what}: {status['reason']}"

    def _handle_signals(self) -> None:
        loop = asyncio.get_running_loop()

        def on_signal(number: int) -> None:
            if self.stop.is_set():
                os._exit(int(ExitCode.FAILED))  # the second one: at once
            self._given_up = number == signal.SIGINT and not self._is_up
            self.stop.set()

        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:  # nohup
                loop.add_signal_handler(number, on_signal, number)

    def _heed_stop_requests(self) -> None:
        """From `tapestry stop` in another container, whose signals do not reach us. One may be there since
        this process took the home (launch.py)."""
        loop, path = asyncio.get_running_loop(), self.home.stop_request

        def look() -> None:  # in the log's thread, each second
            if os.path.lexists(path):
                path.unlink(missing_ok=True)
                loop.call_soon_threadsafe(self.stop.set)

        look()
        self.live.every_second(look)

    async def _run(self) -> None:
        config, trainer = self.config, self.trainer
        peers = tuple(parse_peer(text) for text in config.peers)
        with as_user_error(IdentityError):
            identity = Identity.load_or_create(self.home.identity_key)
        refuse_ourselves(peers, identity.peer_id)
        crypto = NodeCrypto(identity)
        async with contextlib.AsyncExitStack() as stack:
            self.history.tell(f"this node starts, version {VERSION}")
            token = await asyncio.to_thread(Token.load_or_create, self.home.http_token)
            shown = token if needs_token(config.http_host) else None
            http = await start_http(
                self.view,
                self.metrics,
                config.http_host,
                config.http_port,
                shown,
                history=self.history,
                admit=Admit(token, self.view.admit),
                tls=await asyncio.to_thread(self._tls),
            )
            self._show_token(shown)
            about = About(VERSION, identity.peer_id)
            otel = await asyncio.to_thread(open_otel, self.metrics, config.otlp_endpoint, os.environ, about)
            if otel is not None:
                stack.push_async_callback(asyncio.to_thread, otel.close)
            stack.push_async_callback(http.close)
            self.home.write_endpoint(http.url)
            stack.callback(self.home.remove_endpoint)
            swarm = await self._start_swarm()
            stack.push_async_callback(swarm.close)  # Network.run closes it as well: that is safe
            await self._find_run_again(swarm, peers, crypto)
            store = Store(self.home, crypto)
            loaded = await asyncio.to_thread(store.load)
            if self._is_there(loaded.epoch):
                return
            if config.island:
                began = await asyncio.to_thread(begin_island, self.home)
                self.view.island_since = began.epoch
                _log.warning("island=yes since_epoch=%d; tapestry rejoin is the way back", began.epoch)
            agreed = await agree_on_run(config, loaded.genesis, swarm, peers, crypto)
            sources: Sequence[PeerAddress] = peers
            if agreed.genesis is not None:
                chain = await asyncio.to_thread(store.chain, agreed.genesis)
                sources = await be_admitted(config, chain.roll, swarm, peers, self._wait_for)
                self._wait_for(None)
            coming = Coming(self._wait_for_base).update
            count = self._on_base_bytes
            await have_base(self.home, config.base, agreed, swarm, sources, self.throttles, count, coming)
            self._wait_for(_waiting_for(config))
            _log.info("%s", _waiting_for(config).what)
            stack.push_async_callback(self._stop_trainer)
            settings = worker_settings(config, agreed.spec, identity.peer_id)
            await self._configure_trainer(settings)
            self._wait_for(None)
            trackers = await asyncio.to_thread(
                open_trackers, config.trackers, self.home.path, agreed.spec.name, agreed.spec.to_dict()
            )
            stack.push_async_callback(asyncio.to_thread, trackers.close)
            egress = await asyncio.to_thread(EgressLedger, self.home)
            stack.push_async_callback(egress.close)
            reporter = Reporter(self.metrics, self.live, trackers, self.history, egress)
            own = Own(
                self.home,
                identity,
                crypto,
                swarm_config(config),
                peers,
                reporter,
                self.throttles,
                config.ending,
                config.base,
                config.island,
                DataPermit(self.home, paths_of(config.data), located=settings.located).refusal,
                config.relay,
                BranchLimits(config.branches_kept, config.branches_bytes),
            )
            keeper, genesis = await open_state(own, agreed, store, loaded, trainer)
            if not config.external:
                used = (self.home, BASE, sources_of(config.data), genesis.run_id, loaded.epoch)
                node_says = Started(identity.peer_id, config.island, led_to(settings.located))
                await asyncio.to_thread(note_use, *used, node_says)
            await asyncio.to_thread(egress.begin, genesis.run_id)
            node = await assemble(own, agreed.spec, keeper, trainer)
            stack.push_async_callback(asyncio.to_thread, (await self._remember(genesis.run_id)).close)
            self.metrics.set_run(genesis.run_id, agreed.spec.name)
            self.metrics.set_trainer_up(True)
            self.view.attach(
                node.runtime.show,
                node.network.addresses_of,
                node.network.bans,
                agreed.spec.name,
                node.runtime.members.admit,
            )
            addresses = ranked(await swarm.addresses())
            info = self._node_info(identity.peer_id, genesis.run_id, addresses, http.url)
            self._say_who(info, agreed.spec.name, node.runtime.members.roll.is_open)
            stack.callback(self.home.remove_node_json)
            control = await Control.open(self.home.control_socket, node.runtime.members.do)
            stack.callback(control.close)
            await self._serve(node, swarm, info, egress)

    async def _serve(self, node: Node, swarm: Swarm, info: NodeInfo, egress: EgressLedger) -> None:
        """Until --epochs is reached, or cancelled; and then leave in good order.

        Raises UserError if the others have removed this node.
        """
        async with asyncio.TaskGroup() as tasks:
            beside = (self.trainer.closed(), egress.run(), self._look_at_disk())
            running = (*node.start(swarm, tasks), *map(tasks.create_task, beside))
            self._node = node
            try:
                await node.network.up.wait()
                self.home.write_node_json(info)
                self._is_up = True
                self.notifier.ready(self._in_a_line())
                await node.runtime.done.wait()
                if node.runtime.ends is not None:
                    raise node.runtime.ends
                _log.info("done epoch=%d: that is all this start was to make", node.keeper.state.epoch)
            finally:
                self.view.stopping = True
                await asyncio.shield(self._leave(node))
                for task in running:
                    task.cancel()

    async def _stop_trainer(self) -> None:
        """It was told when the node began to leave; a long step may take what time is left."""
        wait_s = TRAINER_STOP_S
        if self._node is not None and is_large(self._node.keeper.state):
            wait_s = TRAINER_STOP_LARGE_S
        elif self._stopping_at is not None:
            wait_s = self._stopping_at + STOP_S - CLOSING_S - asyncio.get_running_loop().time()
        await self.trainer.stop(max(0.0, wait_s))

    async def _look_at_disk(self) -> None:
        """What the home takes and what is left, for the metrics, until cancelled."""
        while True:
            with contextlib.suppress(OSError):
                use = await asyncio.to_thread(disk_use, self.home)
                self.metrics.set_disk(use, disk_free(self.home))
            await asyncio.sleep(DISK_EVERY_S)

    async def _leave(self, node: Node) -> None:
        """The orderly end: farewell, checkpoint, presence withdrawn."""
        try:
            await node.runtime.leave()
        except OSError as error:
            _log.error(
                "checkpoint=failed reason=%r; make room or mend the disk: the next start takes an older one",
                str(error),
            )
        await node.network.withdraw(node.runtime.network.news())

    async def _find_run_again(self, swarm: Swarm, peers: Sequence[PeerAddress], crypto: NodeCrypto) -> None:
        """Of a home that was restored from a backup; once its island has ended, if it is on one. Raises
        UserError, OSError."""
        mark = read_mark(self.home)
        if mark is None or not mark.restored_at or not self.home.genesis.exists() or self.config.island:
            return
        try:
            genesis, spec = read_genesis(self.home.genesis, crypto)
        except Broken as error:
            raise UserError(f"{self.home.genesis}: {error}", hint="restore another backup") from error

        chain = await asyncio.to_thread(chain_of, self.home, genesis, crypto)
        set_s = chain.roll.settings.get("round.quorum_loss_s", spec.round.quorum_loss_s)
        wait_s = fixed(set_s) or RESTORED_WAIT_S
        await find_run(self.home, mark, genesis, chain, wait_s, swarm, peers, crypto, self._wait_for)

    def _wait_for(self, wait: Wait | None) -> None:
        """What the start waits for, for all who look; None for nothing any more."""
        self.view.wait_for(wait)
        self.live.show("" if wait is None else wait.what)

    def _wait_for_base(self, text: str) -> None:
        """`text` says how far it is."""
        self._wait_for(Wait("base", text, "ends by itself when it is here", usual_s=BY_ITSELF_S))

    def _is_there(self, epoch: int) -> bool:
        """Whether --until-epoch asks for what this home has already; says so."""
        until = self.config.ending.until_epoch
        if until is None or epoch < until:
            return False
        _log.info("done epoch=%d: --until-epoch asks for %d; nothing is left to do", epoch, until)
        return True

    # --- pieces --------------------------------------------------------------------------------

    async def _remember(self, run_id: str) -> HistoryFile:
        """The history goes on where this home's ended."""
        before = await asyncio.to_thread(read_history, self.home.history, run_id)
        file = HistoryFile(self.home.history, run_id)
        self.history.keep_in(file, before)
        return file

    async def _start_swarm(self) -> Swarm:
        """On the ports of the last time, where a free one was asked for: others know us by them. An island,
        which nobody is to find, has another, and leaves them for after it."""
        config = swarm_config(self.config)
        last = None if self.config.island else last_listen(self.home, config.listen)
        try:
            if last is not None:
                with contextlib.suppress(SwarmError):  # taken by now
                    return await Swarm.start(replace(config, listen=last), on_refused=self.metrics.refused)
            swarm = await Swarm.start(config, on_refused=self.metrics.refused)
        except SwarmError as error:
            raise UserError(str(error)) from error
        if not self.config.island:
            bound = () if config.announce else without_peer(await swarm.addresses())
            said = self.config.listen_said
            write_listening(self.home, Listening(config.listen, config.announce, said, bound))
        return swarm

    def _on_base_bytes(self, direction: str, count: int) -> None:
        self.metrics.network_bytes("sent" if direction == "out" else "received", "state", count)

    def _on_trainer_event(self, event: Event) -> None:
        """Before the node is there only the data's progress and the first Hello can come."""
        if isinstance(event, Hello):
            for line in event.summary:
                _log.info("%s", line)
            _log.info("trainer=ready device=%r train_tokens=%d", event.device, event.train_tokens)
        elif isinstance(event, Tokenizing):
            text = self._tokenizing.show(event, time.monotonic())
            if self._node is None:
                self.view.wait_for(replace(_waiting_for(self.config), what=text))
        elif isinstance(event, Parted) and self.config.script_fd is not None:
            if self._node is None:
                _log.info("the script that started this node has left, before the node was up")
            self.stop.set()  # we are here for this script alone
        elif isinstance(event, Parted) and self._node is None:
            _log.info("the script has left; %s", _waiting_for(self.config).what)
        if self._node is not None:
            self._node.runtime.trainer.on_event(event)

    async def _configure_trainer(self, settings: WorkerSettings) -> None:
        try:
            await self.trainer.configure(settings, self._on_trainer_event)
        except TrainerError as error:
            code = ExitCode.USAGE if error.reason in USERS_REASONS else ExitCode.FAILED
            raise UserError(f"the trainer did not start: {error}", exit_code=code) from error

    def _say_who(self, info: NodeInfo, run_name: str, is_open: bool) -> None:
        """In the log, and for people on stdout, which is no place for them where the log is JSON."""
        _log.info(
            "started peer_id=%s run_id=%s run_name=%r addresses=%s http=%s version=%s pid=%d",
            info.peer_id,
            info.run_id,
            run_name,
            ",".join(info.addresses),
            info.http,
            info.version,
            info.pid,
            extra={"printed": self._prints},
        )
        if self.config.kept:
            kept = " ".join(self.config.kept)
            _log.info("kept flags=%r; --listen changes it", kept, extra={"printed": self._prints})
        if self._prints:
            _print_banner(info, run_name, is_open, self.config)

    def _tls(self) -> ServerTls | None:
        if self.config.http_tls is None:
            return None
        cert, key = self.config.http_tls
        return ServerTls(cert, key, self.home.http_cert)

    def _show_token(self, token: Token | None) -> None:
        """Where it is; itself only once: from then on it is in its file only."""
        if token is None:
            return
        made = "made" if token.new else "needed"
        _log.info("endpoint_token=%s path=%s", made, token.path, extra={"printed": self._prints})
        if self._prints:
            text = (
                f"{token.text}  (kept in {token.path}, not shown again)" if token.new else f"in {token.path}"
            )
            sys.stdout.write(f"endpoint token  {text}\n")
            sys.stdout.flush()

    @property
    def _prints(self) -> bool:
        return self.config.log_format == "text" or not self.live.is_on_screen

    def _node_info(self, peer_id: str, run_id: str, addresses: tuple[str, ...], url: str) -> NodeInfo:
        started = datetime.fromtimestamp(self.started_at, UTC).isoformat(timespec="seconds")
        return NodeInfo(os.getpid(), peer_id, run_id, addresses, url, VERSION, started)


def _waiting_for(config: NodeConfig) -> Wait:
    """A trainer that can start."""
    if not config.external:
        what = "starting trainer: it reads the data and builds the model"
        return Wait("trainer", what, "ends by itself when it is ready", usual_s=BY_ITSELF_S)
    if config.script_fd is not None:
        return Wait("trainer", "waiting for the script's module", "ends when the script makes its Swarm")
    what = f"waiting for a script that opens {config.home.path} with tapestry.node.Swarm"
    return Wait("trainer", what, "ends when one does")


def _print_banner(info: NodeInfo, run_name: str, is_open: bool, config: NodeConfig) -> None:
    """What `start` prints first."""
    addresses, run_id, url = info.addresses, info.run_id, info.http
    joins = "others join" if is_open else "others join by what `tapestry invite` prints, or ask to join"
    lines = [
        f"peer id  {info.peer_id}",
        f"run      {run_name}  {run_id}",
        *(f"address  {address}" for address in addresses),
        f"page     {url}/",
        f"metrics  {url}/metrics",
        f"status   {url}/status",
    ]
    if config.kept:
        lines.insert(2, f"kept     {' '.join(config.kept)}, of an earlier start; --listen changes it")
    if config.island:
        lines.append(
            "island   this node goes on alone: nothing of it reaches the run; back by: tapestry rejoin"
        )
    else:
        there = addresses[0] if addresses else "<this node>"
        lines += [f"{joins} with:", f"  tapestry start --peer {there} --run-id {run_id} --data <their data>"]
    sys.stdout.write("\n".join(lines) + "\n")
    sys.stdout.flush()


# --- helpers ----------------------------------------------------------------------------------------


def _first(error: Exception) -> Exception:
    """What went wrong first, out of the groups that task groups make."""
    while isinstance(error, ExceptionGroup):
        error = error.exceptions[0]
    return error


def _disk_failed(home: Home, error: OSError) -> UserError:
    if error.errno in (errno.EMFILE, errno.ENFILE):
        return UserError(
            f"cannot go on: {error.strerror} ({error.filename or home.path})",
            exit_code=ExitCode.FAILED,
            hint="the disk is well: raise the limit (ulimit -n 65536) and start again",
        )
    return UserError(
        f"cannot go on: {error.strerror or error} ({error.filename or home.path})",
        exit_code=ExitCode.FAILED,
        hint=f"the last committed state in {home.path} is whole; make room or mend the disk and start again",
    )


def _give_up_stopping() -> None:
    _log.error("stopping=failed after_s=%g; the node ends now, its last committed state is whole", STOP_S)
    logging.shutdown()
    os._exit(int(ExitCode.FAILED))
