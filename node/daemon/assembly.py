"""The one place where a node is put together: from what it brings and what its run agreed on, to a Node.

    Own (home, identity, peers...) + spec and genesis of the run -> open_state -> Keeper -> assemble -> Node

What does not fit together (a state that is not the run's, a roster that is too long for a message) is refused
here, before anything is started.
A home that is only read needs none of this: see disk/held.py.
"""

from __future__ import annotations

import asyncio
import logging
import resource
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from blake3 import blake3

from tapestry.dht.addresses import PeerAddress
from tapestry.dht.identity import Identity
from tapestry.dht.p2pd import SwarmConfig
from tapestry.dht.swarm import Swarm
from tapestry.node.daemon.audit_streams import Auditor
from tapestry.node.daemon.averaging import Averaging
from tapestry.node.daemon.base import base_folder
from tapestry.node.daemon.descriptions_desk import DescriptionsDesk
from tapestry.node.daemon.descriptors import streams_max
from tapestry.node.daemon.desk import Loop
from tapestry.node.daemon.goal import Goal
from tapestry.node.daemon.keeper import Keeper, found_run, keep_initial_state
from tapestry.node.daemon.permit import located
from tapestry.node.daemon.runtime import Runtime
from tapestry.node.daemon.views import Reporter
from tapestry.node.disk.branches import BRANCH_LIMITS, BranchLimits
from tapestry.node.disk.held import bare_state
from tapestry.node.disk.home_mark import read_mark
from tapestry.node.disk.store import LoadedStore, Store
from tapestry.node.errors import ExitCode, UserError
from tapestry.node.home import Home
from tapestry.node.lineage.bring import Brought
from tapestry.node.lineage.uses import require_brought
from tapestry.node.net.join import Agreed
from tapestry.node.net.known_peers import KnownPeers
from tapestry.node.net.links import LinkLimits
from tapestry.node.net.network import Network, NetworkConfig
from tapestry.node.net.throttle import Throttles
from tapestry.node.net.vocabulary import Reader
from tapestry.node.protocol.canon import MEMBERS_MAX, Crypto
from tapestry.node.protocol.core import Core
from tapestry.node.protocol.record import Genesis, wire_bytes
from tapestry.node.protocol.rules import Rules
from tapestry.node.protocol.settings import Value
from tapestry.node.spec.declared import BASE, paths_of, require, today_utc
from tapestry.node.spec.node import ENDLESS, Ending, NodeConfig
from tapestry.node.spec.run import RunSpec, training_spec
from tapestry.node.spec.size import exchange_sized_s
from tapestry.node.spec.training import TransformersSpec, WorkerSettings
from tapestry.node.state.means import mean_of
from tapestry.node.state.model import ModelState
from tapestry.node.trainer.process import TrainerError, TrainerProcess

ISLAND_QUORUM_LOSS_S = 1.0  # guess: nobody is waited for
BULK_FRAMES_MIN = 8192  # Guess: references of 1 kB, so some MB
VALIDATION_TOKENS = 8192  # of each set, for one loss: 0.3 s of `tiny` on one core
VALIDATION_WINDOWS_MIN, VALIDATION_WINDOWS_MAX = 4, 64  # Guess: of long windows four all the same

_log = logging.getLogger("tapestry.node")


@dataclass(frozen=True, slots=True)
class Own:
    """What a node brings to whatever run it is in."""

    home: Home
    identity: Identity
    crypto: Crypto
    swarm: SwarmConfig
    peers: tuple[PeerAddress, ...]  # that the operator gave
    reporter: Reporter
    throttles: Throttles
    ending: Ending = ENDLESS
    base: Path | None = None  # a directory with the run's base, if this member has one
    island: bool = False  # alone on purpose: nobody is looked for, and the first record is forced at once
    forbidden: Callable[[], str] = lambda: ""  # why its data may not be used any more: permit.py
    relay: bool = True  # carry connections of members that cannot be dialled
    branches: BranchLimits = BRANCH_LIMITS


@dataclass(frozen=True, slots=True)
class Node:
    """A node that is put together, and does not run yet."""

    run_id: str
    keeper: Keeper
    runtime: Runtime
    network: Network

    def start(self, swarm: Swarm, tasks: asyncio.TaskGroup) -> tuple[asyncio.Task[None], ...]:
        """Run it in `tasks`, until they are cancelled. `swarm` is closed when the network ends."""
        running = tasks.create_task(self.runtime.run())
        return running, tasks.create_task(self.network.run(swarm, self.runtime.network))


async def open_state(
    own: Own, agreed: Agreed, store: Store, loaded: LoadedStore, trainer: TrainerProcess
) -> tuple[Keeper, Genesis]:
    """The keeper of the run's state; for a new run, the initial state and the genesis that names it.

    The parameters are the trainer's, which maps them too. Raises UserError, OSError.
    """
    spec, genesis = agreed.spec, agreed.genesis
    params, schema, folder = trainer.params, trainer.layout.schema_hash, own.home.state
    state = await asyncio.to_thread(bare_state, spec, params, schema, folder=folder)
    begins = genesis is None
    if genesis is None:
        await _initialise(trainer)
        founder = own.identity.peer_id
        loaded = await asyncio.to_thread(found_run, spec, founder, state, own.home, store, own.crypto)
        genesis = loaded.genesis
        assert genesis is not None
    elif agreed.from_peer:
        check_model(genesis, state)
        if own.base is not None and _begins_from_weights(spec):
            await _initialise(trainer)
            begins = await asyncio.to_thread(keep_initial_state, spec, genesis, state, own.home)
            if begins:
                _log.info("state=0 of=%s; nothing is downloaded for it", own.base)
            else:
                _log.warning(
                    "state=0 of=%s is not the run's; it comes from the peers. Leave --base away, or "
                    "name the run's",
                    own.base,
                )
        await asyncio.to_thread(store.write_genesis, genesis)
    state.head = genesis.run_id
    base = base_folder(own.home, spec)
    keeper = Keeper(own.home, spec, store, loaded, genesis, state, own.throttles, base, begins, own.branches)
    return keeper, genesis


def _begins_from_weights(spec: RunSpec) -> bool:
    """Whether state 0 is the weights of a base, so that a member who has them can make it."""
    model = spec.model
    return isinstance(model, TransformersSpec) and bool(model.weights) and not model.lora_rank


async def _initialise(trainer: TrainerProcess) -> None:
    try:
        await trainer.initialise()
    except TrainerError as error:
        raise UserError(f"the model cannot be initialised: {error}") from error


async def assemble(own: Own, spec: RunSpec, keeper: Keeper, trainer: TrainerProcess) -> Node:
    """Core, runtime and network around a keeper. Raises UserError, OSError."""
    restored = await asyncio.to_thread(keeper.restore)
    mark = read_mark(own.home)
    if mark is not None and mark.restored_at:  # its run was not found: restored.py
        restored = replace(restored, alone=True)
    state, run_id, peer_id = keeper.state, keeper.run_id, own.identity.peer_id
    rules = rules_of(spec, run_id, len(state.arithmetic.shards))
    if own.island:
        rules = alone(rules)
    check_roster(spec, rules.shard_count)
    core = Core(peer_id, rules, own.crypto, restored, time.monotonic())
    mean = mean_of(spec.mean)
    averaging = Averaging(state.arithmetic.codec, state.n, spec.compression.shard_elements, mean)
    own.reporter.float32_ratio = averaging.float32_ratio
    limits = link_limits(spec, averaging, own.throttles)
    reader = Reader(own.crypto)
    config = NetworkConfig(own.swarm, own.identity, run_id, own.peers, limits, reader, own.relay)
    known = own.home.island / "peers.json" if own.island else own.home.peers
    network = Network(config, KnownPeers(known))
    on_lie = spec.audit.on_lie
    auditor = Auditor(own.crypto, peer_id, run_id, own.home.accusations, own.throttles, on_lie)
    goal = Goal(own.ending, own.forbidden)
    brought = Brought(own.home, peer_id, run_id)
    brought.meet(restored.chain)

    def words(loop: Loop) -> DescriptionsDesk:
        return DescriptionsDesk(loop, own.home, run_id, peer_id, own.crypto, own.throttles)

    runtime = Runtime(
        core,
        keeper,
        averaging,
        trainer,
        network,
        own.reporter,
        goal,
        auditor,
        brought,
        None if own.island else words,
    )
    return Node(run_id, keeper, runtime, network)


# --- what the spec means for the parts --------------------------------------------------------------


def fixed(wait: Value) -> float | None:
    """None where each node computes it ("auto"): pace.py."""
    return None if isinstance(wait, str) else wait


def rules_of(spec: RunSpec, run_id: str, shard_count: int) -> Rules:
    """What the protocol needs of the spec."""
    r = spec.round
    return Rules(
        run_id=run_id,
        shard_count=shard_count,
        straggler_wait_s=fixed(r.straggler_wait_s),
        closing_grace_s=fixed(r.closing_grace_s),
        stall_s=r.stall_s,
        exchange_max_s=fixed(r.exchange_max_s),
        exchange_sized_s=exchange_sized_s(shard_count * spec.compression.shard_elements),
        quorum_loss_s=fixed(r.quorum_loss_s),
        wait_max_s=r.wait_max_s,
        on_quorum_loss=r.on_quorum_loss,
        min_members=r.min_members,
        max_influence=r.max_influence,
        commit_grace_s=r.commit_grace_s,
        heartbeat_s=min(1.0, r.stall_s / 5),
        resend_s=min(1.0, r.stall_s / 5),
        peers_max=spec.limits.max_peers,
        records_bytes_max=spec.limits.max_control_frame_bytes // 2,
        audit_share=spec.audit.share,
        gate_margin=spec.gate.margin or None,
    )


def alone(rules: Rules) -> Rules:
    """Those of an island: whatever the run says of a lost quorum, this member goes on by itself."""
    own = frozenset({"round.quorum_loss_s", "round.min_members"})
    rules = replace(rules, on_quorum_loss="continue", quorum_loss_s=ISLAND_QUORUM_LOSS_S, min_members=1)
    return replace(rules, own=own)


def link_limits(spec: RunSpec, averaging: Averaging, throttles: Throttles) -> LinkLimits:
    """What a peer may send, how long it may be silent, and how much may wait for it.

    A ballot queues for a peer, at a stroke, the shards that the peer averages, and later our means: at most
    every shard once. What is left of the ballot before may lie there still.
    """
    return LinkLimits(
        bulk_frames_max=max(BULK_FRAMES_MIN, 2 * len(averaging.shards) + 64),
        control_bytes_max=spec.limits.max_control_frame_bytes,
        payload_bytes_max=averaging.frame_bytes_max,
        peers_max=spec.limits.max_peers,
        silence_s=3 * spec.round.stall_s,
        throttles=throttles,
    )


def worker_settings(config: NodeConfig, spec: RunSpec, peer_id: str) -> WorkerSettings:
    """What the trainer is told, of the run and of this node. Raises UserError for undeclared data."""
    home = config.home
    places = located(config.data)
    protected = require(home, paths_of(config.data), BASE, today_utc(), places)
    require_brought(home, today_utc())
    return WorkerSettings(
        training=training_spec(spec),
        data=config.data,
        cache_dir=str(home.cache),
        validation_windows=validation_windows(
            spec.data.sequence_length, spec.train.batches * spec.train.batch_size
        ),
        base_dir=str(home.base),
        weights_dir=str(config.base or ""),
        inner_state_path=str(home.trainer / "inner.safetensors"),
        cursor_path=str(home.trainer / "cursor.json"),
        gate_windows=spec.gate.windows,  # also without a gate: a record may set one up
        node_seed=node_seed(peer_id),
        codec=spec.compression.codec,
        shard_elements=spec.compression.shard_elements,
        residual=spec.compression.residual,
        device=config.device,
        local=config.training,
        threads=config.threads,
        run_spec=spec.canonical().decode() if config.external else "",
        protected=protected,
        located=places,
        brought_path=str(home.brought),
    )


def validation_windows(sequence_length: int, epoch: int) -> int:
    """Windows of each validation set: about as many tokens in every run, so that measuring stays cheap, and
    no more than half of an epoch's, for what an epoch takes says how fast members are."""
    windows = min(VALIDATION_TOKENS // sequence_length, epoch // 2)
    return min(VALIDATION_WINDOWS_MAX, max(VALIDATION_WINDOWS_MIN, windows))


def swarm_config(config: NodeConfig) -> SwarmConfig:
    """How p2pd is started for this node."""
    loopback = all(address.startswith(("/ip4/127.", "/ip6/::1/")) for address in config.listen)
    return SwarmConfig(
        identity_path=config.home.identity_key,
        listen=config.listen,
        announce=config.announce,
        nat_port_map=not loopback,
        streams_max=streams_max(resource.getrlimit(resource.RLIMIT_NOFILE)[0]),
    )


def node_seed(peer_id: str) -> int:
    """What makes a node's random windows its own: 63 bits of its peer id's digest."""
    return int.from_bytes(blake3(peer_id.encode()).digest()[:8], "big") >> 1


# --- what must fit together -------------------------------------------------------------------------


def check_model(genesis: Genesis, state: ModelState) -> None:
    """What we build from the spec must be what the founder built. Raises UserError."""
    if (genesis.schema, genesis.params) != (state.schema, state.n):
        raise UserError(
            f"this version builds another model from the run's spec: {state.n} parameters here, "
            f"{genesis.params} in the run",
            exit_code=ExitCode.REFUSED,
            hint="install the versions of tapestry and transformers that the run uses",
        )


def check_roster(spec: RunSpec, shard_count: int) -> None:
    """A roster names every member, and the reducer of every shard. Raises UserError if it is too long."""
    roster_bytes = wire_bytes(min(spec.limits.max_peers, MEMBERS_MAX), 0) + 3 * shard_count
    if roster_bytes > spec.limits.max_control_frame_bytes:
        raise UserError(
            f"the model has {shard_count} shards, so a message may have {roster_bytes} bytes, and the run's "
            f"limits.max_control_frame_bytes is {spec.limits.max_control_frame_bytes}",
            exit_code=ExitCode.REFUSED,
            hint="found a run with a larger compression.shard_elements, or with that limit raised",
        )
