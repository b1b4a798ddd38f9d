"""The life of a node: from the command line's configuration to exit code, and everything released on the way.

    identity -> p2pd -> genesis (home, peer, or founded) -> spec agreed -> trainer configured -> state
    -> core, links, HTTP -> ready -> ... -> a signal: leave the round, checkpoint, withdraw presence, exit 0

launch.py has locked the home and started the trainer's process before this module was imported.

What can be wrong with the configuration is found before anything slow is started; the data were looked for by
cli.py. A second signal ends the process at once; so does the deadline of a stop that takes too long.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import sys
import time
from dataclasses import replace
from datetime import UTC, datetime
from importlib.metadata import version
from typing import Any

from blake3 import blake3

from tapestry.dht.addresses import PeerAddress, parse_peer, ranked
from tapestry.dht.identity import Identity, IdentityError
from tapestry.dht.p2pd import SwarmConfig, SwarmError
from tapestry.dht.swarm import Swarm
from tapestry.node.daemon.averaging import Averaging
from tapestry.node.daemon.keeper import Keeper, found_run
from tapestry.node.daemon.runtime import Runtime
from tapestry.node.disk.store import LoadedStore, Store
from tapestry.node.errors import ExitCode, UserError
from tapestry.node.home import Home, NodeInfo
from tapestry.node.lineage.crypto import NodeCrypto
from tapestry.node.net.join import GENESIS_PROTOCOL, Agreed, agree_on_run, state_protocol
from tapestry.node.net.known_peers import KnownPeers
from tapestry.node.net.links import LinkLimits
from tapestry.node.net.network import Network, last_listen, remember_listen, without_peer
from tapestry.node.net.throttle import Throttle, Throttles
from tapestry.node.net.vocabulary import Reader
from tapestry.node.protocol.chain import MEMBERS_MAX, Genesis, wire_bytes
from tapestry.node.protocol.context import Rules
from tapestry.node.protocol.core import Core
from tapestry.node.spec.node import NodeConfig
from tapestry.node.spec.run import RunSpec, training_spec
from tapestry.node.spec.training import WorkerSettings
from tapestry.node.state.model import Arithmetic, ModelState
from tapestry.node.surface.http import start_http
from tapestry.node.surface.logs import LiveLine
from tapestry.node.surface.metrics import Metrics
from tapestry.node.surface.status import NodeView
from tapestry.node.trainer.messages import Hello
from tapestry.node.trainer.process import Event, TrainerError, TrainerProcess

STOP_S = 10.0  # the contract: exit 0 within
TRAINER_STOP_S = 4.0
VERSION = version("tapestry-node")

_log = logging.getLogger("tapestry.node")


class Daemon:
    def __init__(self, config: NodeConfig, live: LiveLine, trainer: TrainerProcess) -> None:
        self.config = config
        self.live = live
        self.trainer = trainer  # launched; it ends with `run`
        self.home = config.home
        self.started_at = time.time()
        self.metrics = Metrics(VERSION)
        self.view = NodeView(
            VERSION, self.started_at, config.upload_bytes_per_second, config.download_bytes_per_second
        )
        self.throttles = Throttles(
            Throttle(config.upload_bytes_per_second), Throttle(config.download_bytes_per_second)
        )
        self.stop = asyncio.Event()
        self._runtime: Runtime | None = None  # once it runs

    async def run(self) -> int:
        """Until the node is stopped. Returns 0; raises UserError."""
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
        main = asyncio.create_task(self._run())
        stop = asyncio.create_task(self.stop.wait())
        await asyncio.wait({main, stop}, return_when=asyncio.FIRST_COMPLETED)
        if not main.done():
            self.view.stopping = True
            _log.info("stopping")
            asyncio.get_running_loop().call_later(STOP_S, _give_up_stopping)
            main.cancel()
        stop.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await main
        return int(ExitCode.DONE)

    def _handle_signals(self) -> None:
        loop = asyncio.get_running_loop()

        def on_signal() -> None:
            if self.stop.is_set():
                os._exit(int(ExitCode.FAILED))  # the second one: at once
            self.stop.set()

        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            loop.add_signal_handler(number, on_signal)

    async def _run(self) -> None:
        config, trainer = self.config, self.trainer
        peers = [parse_peer(text) for text in config.peers]
        with _as_user_error(IdentityError):
            identity = Identity.load_or_create(self.home.identity_key)
        crypto = NodeCrypto(identity)
        async with contextlib.AsyncExitStack() as stack:
            http = await start_http(self.view, self.metrics, config.http_host, config.http_port)
            stack.push_async_callback(http.close)
            swarm = await self._start_swarm()
            stack.push_async_callback(swarm.close)  # Network.run closes it as well: that is safe
            store = Store(self.home, crypto)
            loaded = await asyncio.to_thread(store.load)
            agreed = await agree_on_run(config, loaded.genesis, swarm, peers, crypto)
            _log.info("starting trainer: it reads the data and builds the model")
            stack.push_async_callback(trainer.stop, TRAINER_STOP_S)
            await self._configure_trainer(self._worker_settings(agreed.spec, identity))
            keeper, genesis = await self._open_state(agreed, store, loaded, trainer, identity, crypto)
            runtime = await self._make_runtime(agreed.spec, genesis, keeper, identity, crypto)
            network = self._make_network(agreed.spec, genesis, runtime, identity, peers, crypto)
            runtime.trainer, runtime.network = trainer, network
            self.metrics.set_run(genesis.run_id, agreed.spec.name)
            self.metrics.set_trainer_up(True)
            self.view.attach(runtime.show, runtime.addresses_of, agreed.spec.name)
            addresses = ranked(await swarm.addresses())
            _print_banner(identity.peer_id, agreed.spec.name, genesis.run_id, addresses, http.url)
            info = self._node_info(identity.peer_id, genesis.run_id, addresses, http.url)
            stack.callback(self.home.remove_node_json)
            await self._serve(runtime, network, swarm, trainer, info)

    async def _open_state(
        self,
        agreed: Agreed,
        store: Store,
        loaded: LoadedStore,
        trainer: TrainerProcess,
        identity: Identity,
        crypto: NodeCrypto,
    ) -> tuple[Keeper, Genesis]:
        """The keeper of the run's state; for a new run, the initial state and the genesis that names it."""
        spec, genesis = agreed.spec, agreed.genesis
        arithmetic = Arithmetic.of(spec, trainer.layout.n)
        state = ModelState(trainer.params, trainer.layout.schema_hash, arithmetic, 0, "")
        if genesis is None:
            await trainer.initialise()
            loaded = await asyncio.to_thread(
                found_run, spec, identity.peer_id, state, self.home, store, crypto
            )
            genesis = loaded.genesis
            assert genesis is not None
        elif agreed.from_peer:
            _check_model(genesis, state)
            await asyncio.to_thread(store.write_genesis, genesis)
        state.head = genesis.run_id
        return Keeper(self.home, spec, store, loaded, genesis, state, self.throttles), genesis

    async def _make_runtime(
        self, spec: RunSpec, genesis: Genesis, keeper: Keeper, identity: Identity, crypto: NodeCrypto
    ) -> Runtime:
        restored = await asyncio.to_thread(keeper.restore)
        state, arithmetic = keeper.state, keeper.state.arithmetic
        rules = _rules(spec, genesis.run_id, len(arithmetic.shards))
        _check_roster(spec, rules.shard_count)
        core = Core(identity.peer_id, rules, crypto, restored, time.monotonic())
        averaging = Averaging(arithmetic.codec, state.n, spec.compression.shard_elements)
        return Runtime(core, keeper, averaging, self.metrics, self.live, self.config.epochs)

    def _make_network(
        self,
        spec: RunSpec,
        genesis: Genesis,
        runtime: Runtime,
        identity: Identity,
        peers: list[PeerAddress],
        crypto: NodeCrypto,
    ) -> Network:
        return Network(
            self._swarm_config(),
            identity,
            genesis.run_id,
            peers,
            Reader(crypto),
            runtime.averaging.unpack,
            runtime,
            _link_limits(spec, runtime.averaging, self.throttles),
            {GENESIS_PROTOCOL: runtime.serve_genesis, state_protocol(genesis.run_id): runtime.serve_state},
            KnownPeers(self.home.peers),
            runtime.news,
            self.metrics.refused,
        )

    async def _serve(
        self,
        runtime: Runtime,
        network: Network,
        swarm: Swarm,
        trainer: TrainerProcess,
        info: NodeInfo,
    ) -> None:
        """Until --epochs is reached, or cancelled; and then leave in good order."""
        async with asyncio.TaskGroup() as tasks:
            running = tasks.create_task(runtime.run())
            networking = tasks.create_task(network.run(swarm))
            training = tasks.create_task(trainer.closed())
            self._runtime = runtime
            try:
                await network.up.wait()
                self.home.write_node_json(info)
                await runtime.done.wait()
            finally:
                self.view.stopping = True
                await asyncio.shield(self._leave(runtime, network))
                for task in (running, networking, training):
                    task.cancel()

    async def _leave(self, runtime: Runtime, network: Network) -> None:
        """The orderly end: farewell, checkpoint, presence withdrawn."""
        try:
            await runtime.leave()
        except OSError as error:
            _log.error("checkpoint=failed reason=%r", str(error))
        await network.withdraw()

    # --- pieces --------------------------------------------------------------------------------

    def _swarm_config(self) -> SwarmConfig:
        loopback = all(address.startswith("/ip4/127.") for address in self.config.listen)
        return SwarmConfig(
            identity_path=self.home.identity_key,
            listen=self.config.listen,
            announce=self.config.announce,
            nat_port_map=not loopback,
        )

    async def _start_swarm(self) -> Swarm:
        """On the ports of the last time, where a free one was asked for: others know us by them."""
        config = self._swarm_config()
        last = last_listen(self.home, config.listen)
        try:
            if last is not None:
                with contextlib.suppress(SwarmError):  # taken by now
                    return await Swarm.start(replace(config, listen=last), on_refused=self.metrics.refused)
            swarm = await Swarm.start(config, on_refused=self.metrics.refused)
        except SwarmError as error:
            raise UserError(str(error)) from error
        if not config.announce:
            remember_listen(self.home, config.listen, without_peer(await swarm.addresses()))
        return swarm

    def _worker_settings(self, spec: RunSpec, identity: Identity) -> WorkerSettings:
        return WorkerSettings(
            training=training_spec(spec),
            data=self.config.data,
            cache_dir=str(self.home.cache),
            inner_state_path=str(self.home.trainer / "inner.safetensors"),
            node_seed=node_seed(identity.peer_id),
            codec=spec.compression.codec,
            shard_elements=spec.compression.shard_elements,
            residual=spec.compression.residual,
            device=self.config.device,
            threads=self.config.threads,
        )

    def _on_trainer_event(self, event: Event) -> None:
        """Before the runtime is there only the first Hello can come, and that is `start`'s affair."""
        if isinstance(event, Hello):
            _log.info("trainer=ready device=%r train_tokens=%d", event.device, event.train_tokens)
        if self._runtime is not None:
            self._runtime.on_trainer_event(event)

    async def _configure_trainer(self, settings: WorkerSettings) -> None:
        try:
            await self.trainer.configure(settings, self._on_trainer_event)
        except TrainerError as error:
            code = ExitCode.USAGE if error.reason in ("data", "settings", "device") else ExitCode.FAILED
            raise UserError(f"the trainer did not start: {error}", exit_code=code) from error

    def _node_info(self, peer_id: str, run_id: str, addresses: tuple[str, ...], url: str) -> NodeInfo:
        started = datetime.fromtimestamp(self.started_at, UTC).isoformat(timespec="seconds")
        return NodeInfo(os.getpid(), peer_id, run_id, addresses, url, VERSION, started)


def _print_banner(peer_id: str, run_name: str, run_id: str, addresses: tuple[str, ...], url: str) -> None:
    """What `start` prints first."""
    lines = [
        f"peer id  {peer_id}",
        f"run      {run_name}  {run_id}",
        *(f"address  {address}" for address in addresses),
        f"metrics  {url}/metrics",
        f"status   {url}/status",
        "others join with:",
        f"  tapestry start --peer {addresses[0] if addresses else '<this node>'}"
        f" --run-id {run_id} --data <their data>",
    ]
    sys.stdout.write("\n".join(lines) + "\n")
    sys.stdout.flush()


# --- helpers ----------------------------------------------------------------------------------------


def node_seed(peer_id: str) -> int:
    """What makes a node's random windows its own: 63 bits of its peer id's digest."""
    return int.from_bytes(blake3(peer_id.encode()).digest()[:8], "big") >> 1


def _check_model(genesis: Genesis, state: ModelState) -> None:
    """What we build from the spec must be what the founder built."""
    if (genesis.schema, genesis.params) != (state.schema, state.n):
        raise UserError(
            f"this version builds another model from the run's spec: {state.n} parameters here, "
            f"{genesis.params} in the run",
            exit_code=ExitCode.REFUSED,
            hint="install the versions of tapestry and transformers that the run uses",
        )


def _check_roster(spec: RunSpec, shard_count: int) -> None:
    """A roster names every member, and the reducer of every shard."""
    roster_bytes = wire_bytes(min(spec.limits.max_peers, MEMBERS_MAX), 0) + 3 * shard_count
    if roster_bytes > spec.limits.max_control_frame_bytes:
        raise UserError(
            f"the model has {shard_count} shards, so a message may have {roster_bytes} bytes, and the run's "
            f"limits.max_control_frame_bytes is {spec.limits.max_control_frame_bytes}",
            exit_code=ExitCode.REFUSED,
            hint="found a run with a larger compression.shard_elements, or with that limit raised",
        )


def _rules(spec: RunSpec, run_id: str, shard_count: int) -> Rules:
    r = spec.round
    return Rules(
        run_id=run_id,
        shard_count=shard_count,
        straggler_wait_s=r.straggler_wait_s,
        closing_grace_s=r.closing_grace_s,
        stall_s=r.stall_s,
        exchange_max_s=r.exchange_max_s,
        quorum_loss_s=r.quorum_loss_s,
        on_quorum_loss=r.on_quorum_loss,
        min_members=r.min_members,
        max_influence=r.max_influence,
        commit_grace_s=r.commit_grace_s,
        heartbeat_s=min(1.0, r.stall_s / 5),
        resend_s=min(1.0, r.stall_s / 5),
        peers_max=spec.limits.max_peers,
        records_bytes_max=spec.limits.max_control_frame_bytes // 2,
    )


def _link_limits(spec: RunSpec, averaging: Averaging, throttles: Throttles | None = None) -> LinkLimits:
    return LinkLimits(
        control_bytes_max=spec.limits.max_control_frame_bytes,
        payload_bytes_max=averaging.frame_bytes_max,
        peers_max=spec.limits.max_peers,
        silence_s=3 * spec.round.stall_s,
        throttles=throttles or Throttles(),
    )


@contextlib.contextmanager
def _as_user_error(*kinds: type[Exception]) -> Any:
    try:
        yield
    except kinds as error:
        raise UserError(str(error)) from error


def _first(error: Exception) -> Exception:
    """What went wrong first, out of the groups that task groups make."""
    while isinstance(error, ExceptionGroup):
        error = error.exceptions[0]
    return error


def _disk_failed(home: Home, error: OSError) -> UserError:
    return UserError(
        f"cannot go on: {error.strerror or error} ({error.filename or home.path})",
        exit_code=ExitCode.FAILED,
        hint=f"the last committed state in {home.path} is whole; make room or mend the disk and start again",
    )


def _give_up_stopping() -> None:
    _log.error("stopping took longer than %g s; ending now", STOP_S)
    os._exit(int(ExitCode.FAILED))
