"""Which run this node is of: the home's, a peer's, or a new one. Found out before anything else is started.

A joiner asks the peers it was given for the genesis. A stock DHT bootstrap peer knows none: then the run id
(from --run-id) leads to the members' presence, and any member serves the genesis. Whatever does not agree -
run ids, specs - ends the start with the difference shown: no two swarms that look healthy and never meet.
"""

from __future__ import annotations

import asyncio
import logging
import os
import shutil
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tapestry.dht.addresses import PeerAddress
from tapestry.dht.control import Unreachable
from tapestry.dht.p2pd import SwarmError
from tapestry.dht.swarm import Swarm
from tapestry.node.disk.files import atomic_write
from tapestry.node.errors import ExitCode, UserError
from tapestry.node.net.asked import TAKE_IT, check_run_id, own_spec, spec_to_found
from tapestry.node.net.transfer import DonorFailed, TransferLimits, fetch_genesis
from tapestry.node.net.wire import RemoteProtocolError
from tapestry.node.protocol.canon import Crypto
from tapestry.node.protocol.record import Genesis
from tapestry.node.spec.node import NodeConfig
from tapestry.node.spec.run import RunSpec, diff
from tapestry.node.spec.size import Machine, size_fault, size_lines

GENESIS_PROTOCOL = "/tapestry/genesis/1"
CONNECT_S = 10.0
ASK_S = 10.0

_log = logging.getLogger("tapestry.join")


@dataclass(frozen=True, slots=True)
class Agreed:
    """The run. Without a genesis it is to be founded with this spec."""

    genesis: Genesis | None
    spec: RunSpec
    from_peer: bool


def state_protocol(run_id: str) -> str:
    """The stream that serves updates and checkpoints."""
    return f"/tapestry/{run_id}/state/1"


async def agree_on_run(
    config: NodeConfig,
    home_genesis: Genesis | None,
    swarm: Swarm,
    peers: Sequence[PeerAddress],
    crypto: Crypto,
) -> Agreed:
    """Raises UserError: 2 for files, 3 if no peer can be reached, 4 if run id or spec do not agree."""
    if home_genesis is not None:
        spec = own_spec(config, home_genesis)
        await _compare_with_peers(home_genesis, swarm, peers, crypto)
        return Agreed(home_genesis, spec, from_peer=False)
    if peers:
        genesis = await _ask_peers(config, swarm, peers, crypto)
        check_run_id(config, genesis.run_id, "the peer")
        spec = RunSpec.of_genesis(genesis)
        _check_spec(config.run, spec)
        _show_run(config, spec, genesis)
        _check_size(config, spec, genesis)
        await _ask_consent(config)
        return Agreed(genesis, spec, from_peer=True)
    return Agreed(None, spec_to_found(config), from_peer=False)


def _show_run(config: NodeConfig, spec: RunSpec, genesis: Genesis) -> None:
    """What is joined: on stdout in a few lines, or in the log where that is JSON; all of it in a file."""
    path = config.home.agreed_toml
    atomic_write(path, f"# What the members of this run have agreed on.\n\n{spec.to_toml()}".encode())
    _log.info(
        "joining run_id=%s run_name=%r founder=%s params=%d spec=%s",
        genesis.run_id,
        spec.name,
        genesis.founder,
        genesis.params,
        path,
        extra={"printed": config.log_format == "text"},
    )
    if config.log_format != "text":
        return
    sys.stdout.write(f"joining run {spec.name}, {genesis.run_id}, founded by {genesis.founder}\n")
    if config.show_spec:
        sys.stdout.write(_indented(spec))
    sys.stdout.write("".join(f"  {line}\n" for line in size_lines(spec, genesis.params)))
    sys.stdout.write(f"  all that it agreed on is in {path}\n")
    sys.stdout.flush()


async def _ask_peers(
    config: NodeConfig, swarm: Swarm, peers: Sequence[PeerAddress], crypto: Crypto
) -> Genesis:
    """The genesis from the first peer that serves one, or from a member whom a bootstrap peer knows."""
    unreachable: list[str] = []
    silent: list[str] = []
    for peer in peers:
        try:
            await swarm.connect(peer, CONNECT_S)
            return await _fetch(swarm, peer.peer_id, crypto)
        except Unreachable as error:
            (silent if error.reason == "unsupported" else unreachable).append(str(error))
        except _NoGenesis as error:
            silent.append(str(error))
    if not silent:
        raise UserError(
            f"cannot reach any peer: {'; '.join(unreachable)}",
            exit_code=ExitCode.UNREACHABLE,
            hint="is the peer running, and is its port open to this machine?",
        )
    if config.run_id is None:
        raise UserError(
            f"the peer serves no run: {silent[0]}",
            exit_code=ExitCode.UNREACHABLE,
            hint="a DHT bootstrap peer knows no run: name it with --run-id, or join by a member's address",
        )
    return await _ask_members(config.run_id, swarm, peers, crypto)


async def _ask_members(run_id: str, swarm: Swarm, peers: Sequence[PeerAddress], crypto: Crypto) -> Genesis:
    try:
        await swarm.join_dht(run_id, peers)
        members = await swarm.list_presence(time.time())
    except SwarmError as error:
        raise UserError(str(error), exit_code=ExitCode.UNREACHABLE) from error
    for member in members:
        if member.peer_id == swarm.peer_id:
            continue
        try:
            await swarm.connect_any(member.peer_id, member.addresses, CONNECT_S)
            return await _fetch(swarm, member.peer_id, crypto)
        except (Unreachable, _NoGenesis) as error:
            _log.warning(
                "member=%s genesis=failed reason=%r; the next one is asked", member.peer_id[-6:], str(error)
            )
    raise UserError(
        f"no member of run {run_id[:12]} could be reached ({len(members)} are announced)",
        exit_code=ExitCode.UNREACHABLE,
        hint="check the run id, or join by a member's address",
    )


async def _compare_with_peers(
    genesis: Genesis, swarm: Swarm, peers: Sequence[PeerAddress], crypto: Crypto
) -> None:
    """A resumed node goes on without its peers, but never beside a peer of another run."""
    for peer in peers:
        try:
            await swarm.connect(peer, CONNECT_S)
            theirs = await _fetch(swarm, peer.peer_id, crypto)
        except (Unreachable, _NoGenesis) as error:
            _log.warning(
                "peer=%s not_reached reason=%r; the node goes on without it, and tries again. If it "
                "stays so, see that this peer runs and that its address is right",
                peer.peer_id[-6:],
                str(error),
            )
            continue
        if theirs.run_id != genesis.run_id:
            raise UserError(
                f"the peer is of another run: {theirs.run_id[:16]} there, {genesis.run_id[:16]} in this home",
                exit_code=ExitCode.REFUSED,
                hint="use another --home for that run",
            )


def _check_size(config: NodeConfig, spec: RunSpec, genesis: Genesis) -> None:
    """By arithmetic, before anything is built or downloaded. Raises UserError."""
    machine = Machine(free_memory_bytes(), shutil.disk_usage(config.home.path).free, config.max_params)
    fault = size_fault(spec, genesis.params, machine)
    if fault:
        raise UserError(
            f"the peer's run is refused: {fault}",
            exit_code=ExitCode.REFUSED,
            hint="if that is the run you meant, use a larger machine, or raise --max-params",
        )


def free_memory_bytes() -> int:
    """MemAvailable; all there is of an unknown machine. proc(5), meminfo."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, ValueError, StopIteration):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


async def _ask_consent(config: NodeConfig) -> None:
    """A person at a terminal agrees to a run that only its peer's address named. Raises UserError."""
    named = config.run_id is not None or config.max_params is not None
    if named or not (sys.stdin.isatty() and sys.stdout.isatty()):
        return
    sys.stdout.write("join this run? [y/N] ")
    sys.stdout.flush()
    loop = asyncio.get_running_loop()
    readable = asyncio.Event()
    loop.add_reader(sys.stdin.fileno(), readable.set)
    try:
        await readable.wait()
    finally:
        loop.remove_reader(sys.stdin.fileno())
    if sys.stdin.readline().strip().lower() not in ("y", "yes"):
        raise UserError(
            "not joined",
            exit_code=ExitCode.REFUSED,
            hint="--run-id ID or --max-params N joins without a question",
        )


class _NoGenesis(Exception):
    pass


async def genesis_of(swarm: Swarm, peer_id: str, crypto: Crypto) -> Genesis | str:
    """The genesis that a connected peer serves, or why it serves none."""
    try:
        return await _fetch(swarm, peer_id, crypto)
    except (Unreachable, _NoGenesis) as error:
        return str(error)


async def _fetch(swarm: Swarm, peer_id: str, crypto: Crypto) -> Genesis:
    """Raises Unreachable and _NoGenesis."""

    async def open_stream() -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        return await swarm.open_stream(peer_id, GENESIS_PROTOCOL, CONNECT_S)

    try:
        return await fetch_genesis(
            open_stream, crypto, TransferLimits(stall_s=ASK_S), lambda direction, count: None
        )
    except (DonorFailed, RemoteProtocolError) as error:
        raise _NoGenesis(f"peer {peer_id[-6:]} gave no genesis: {error}") from error


def _check_spec(path: Path | None, spec: RunSpec) -> None:
    """A run.toml at hand must say what the peer's run has."""
    differences = diff(RunSpec.load(path), spec) if path is not None else []
    if differences:
        raise UserError(
            f"{path} differs from the peer's run:",
            exit_code=ExitCode.REFUSED,
            details=tuple(differences),
            hint=TAKE_IT,
        )


def _indented(spec: RunSpec) -> str:
    lines = [line for line in spec.to_toml().splitlines() if line.strip() and not line.startswith("#")]
    return "".join(f"  {line}\n" for line in lines)
