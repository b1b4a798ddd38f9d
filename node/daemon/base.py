"""How a node comes by the base of its run: its own directory, its peers, or what an earlier start left.

The files that the run pins (disk/base.py) lie in HOME/base before the trainer is told of them. The weights of
a run that trains all parameters are no such file: they are the state of epoch 0, which a founder reads from
its directory, and a joiner too if it has one; else it comes from the peers, as every state does.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from tapestry.dht.addresses import PeerAddress
from tapestry.dht.p2pd import SwarmError
from tapestry.dht.swarm import Swarm
from tapestry.node.disk.base import ENDS, OWN, BaseError, BaseFile, BaseFolder, pinned
from tapestry.node.errors import ExitCode, UserError
from tapestry.node.home import Home
from tapestry.node.net.join import Agreed, state_protocol
from tapestry.node.net.throttle import Throttles
from tapestry.node.net.transfer import DonorFailed, OpenStream, TransferLimits, fetch_file
from tapestry.node.net.wire import RemoteProtocolError
from tapestry.node.progress import Told, counted, silent
from tapestry.node.spec.run import RunSpec
from tapestry.node.spec.training import WEIGHTS, TransformersSpec
from tapestry.node.trainer.models.refusal import ModelError
from tapestry.node.trainer.models.stored import join_files

OPEN_S = 10.0  # to open a stream to a donor

_log = logging.getLogger("tapestry.base")


def base_folder(home: Home, spec: RunSpec) -> BaseFolder | None:
    """HOME/base of this run; None for a preset, which has no files."""
    model = spec.model
    return BaseFolder(home.base, pinned(model)) if isinstance(model, TransformersSpec) else None


async def have_base(
    home: Home,
    own: Path | None,  # a directory of this member's own, --base
    agreed: Agreed,
    swarm: Swarm,
    peers: Sequence[PeerAddress],
    throttles: Throttles,
    on_bytes: Callable[[str, int], None],
    told: Told = silent,
) -> None:
    """HOME/base is whole when this returns. Raises UserError that says what is missing."""
    folder = base_folder(home, agreed.spec)
    if folder is None:
        return
    run_id = agreed.genesis.run_id if agreed.genesis is not None else ""
    limits = TransferLimits(agreed.spec.round.stall_s, throttles=throttles)
    missing = folder.missing()
    if missing and own is not None:
        loop = asyncio.get_running_loop()

        def from_thread(what: str, done: int, count: int) -> None:
            loop.call_soon_threadsafe(told, what, done, count)

        missing = await asyncio.to_thread(_take_own, folder, own, from_thread)
    for file in missing:
        if not run_id or not peers:
            raise UserError(
                f"the base's {file.name} is not in {folder.folder}",
                hint="name a directory that has it with --base DIR, or a member with --peer ADDRESS",
            )
        await _fetch(folder, file, run_id, swarm, peers, limits, on_bytes, told)


def _take_own(folder: BaseFolder, own: Path, told: Told) -> list[BaseFile]:
    """Copy what a member's own directory has of the files; gives what is still missing. Raises UserError."""
    try:
        missing = folder.take(own)
        weights = next((file for file in missing if file.name == WEIGHTS), None)
        if weights is not None:
            copied = counted(told, "copying the base bytes", weights.size_bytes)
            joined = folder.part(weights, OWN)

            def join() -> None:
                joined.unlink(missing_ok=True)
                join_files(own, joined, copied)

            try:
                folder.with_room(weights, OWN, join)
                folder.finish(weights, OWN)
            finally:
                joined.unlink(missing_ok=True)
    except (OSError, BaseError, ModelError) as error:
        raise UserError(
            f"--base {own}: {error}", hint="use the run's revision of the base, or leave --base out"
        ) from error
    return folder.missing()


async def _fetch(
    folder: BaseFolder,
    file: BaseFile,
    run_id: str,
    swarm: Swarm,
    peers: Sequence[PeerAddress],
    limits: TransferLimits,
    on_bytes: Callable[[str, int], None],
    told: Told,
) -> None:
    """From the first peer that has it. Raises UserError: none gave it, or our disk does not take it."""
    failures = []
    for peer in peers:
        began_at = time.monotonic()
        _log.info("base file=%s bytes=%d from=%s", file.name, file.size_bytes, peer.peer_id[-6:])
        try:
            await fetch_file(_opener(swarm, peer.peer_id, run_id), file, folder, limits, on_bytes, told)
        except (DonorFailed, RemoteProtocolError, SwarmError) as error:
            failures.append(f"{peer.peer_id[-6:]}: {error}")
            continue
        except OSError as error:  # no donor's, which are DonorFailed
            raise UserError(
                f"cannot write the base's {file.name} in {folder.folder}: {error.strerror or error}",
                exit_code=ExitCode.FAILED,
                hint=f"make room or mend the disk, and start again: {_kept(folder, file)}",
            ) from error
        seconds = time.monotonic() - began_at
        _log.info("base file=%s whole seconds=%.1f", file.name, seconds)
        return
    raise UserError(
        f"no peer gave the base's {file.name}: {'; '.join(failures)}",
        exit_code=ExitCode.UNREACHABLE,
        hint=f"start again: {_kept(folder, file)}; or name a directory that has it with --base DIR",
    )


def _kept(folder: BaseFolder, file: BaseFile) -> str:
    """What the next start goes on from."""
    kept = max(folder.part_bytes(file, end) for end in ENDS if end != OWN)
    return f"{kept} of {file.size_bytes} bytes are kept"


def _opener(swarm: Swarm, peer_id: str, run_id: str) -> OpenStream:
    async def open_stream() -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        return await swarm.open_stream(peer_id, state_protocol(run_id), OPEN_S)

    return open_stream
