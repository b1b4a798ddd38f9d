"""`tapestry doctor`: whether a node could train here, now; what is wrong otherwise, and the cure.

Each look is a function that gives findings; nothing is changed, and what is started (a p2pd under a key
made for the purpose, a file of some MB in the home) is gone afterwards. What needs a peer or a run that is
not known is said to be not checked, and is no fault.

    home, its files, data, versions, limits -> memory, disk (what the run's model needs) -> device -> ports ->
    the peer: reached, its run, clock, can it dial back
"""

from __future__ import annotations

import asyncio
import contextlib
import mmap
import os
import re
import resource
import shutil
import socket
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from importlib import metadata
from pathlib import Path

from tapestry.dht.addresses import parse_peer
from tapestry.dht.identity import Identity, IdentityError
from tapestry.dht.p2pd import SwarmError, require_free
from tapestry.node.daemon.assembly import check_roster
from tapestry.node.daemon.descriptors import KEPT, STREAMS_MIN, raise_limit
from tapestry.node.daemon.visit import Run, visit
from tapestry.node.disk.home_mark import require_original
from tapestry.node.disk.store import read_vote
from tapestry.node.disk.use import disk_use
from tapestry.node.errors import UserError
from tapestry.node.home import Home
from tapestry.node.lineage.crypto import ReaderCrypto
from tapestry.node.lineage.follow import Broken, read_genesis
from tapestry.node.net.asked import refuse_ourselves
from tapestry.node.net.join import free_memory_bytes
from tapestry.node.progress import Told, silent
from tapestry.node.spec.declared import BASE, paths_of, require, today_utc
from tapestry.node.spec.node import NodeConfig
from tapestry.node.spec.run import RunSpec, diff
from tapestry.node.spec.size import (
    FLOAT_BYTES,
    PAYLOAD_BYTES,
    STATE_BYTES,
    Machine,
    parameters_of,
    size_fault,
)
from tapestry.node.surface.findings import Finding, Verdict, passed, unknown, wrong
from tapestry.node.surface.tls import ServerTls
from tapestry.node.surface.token import Token
from tapestry.node.trainer.brought import BroughtError, read_about
from tapestry.node.trainer.data.errors import DataError
from tapestry.node.trainer.data.sources import list_data, located_in

TRIAL_BYTES = 32 << 20
SYNC_S_MAX = 1.0  # Guess: a vote is synced a few times a round
TRAINING_BYTES = 16  # of a trained parameter: itself, gradient, two moments of AdamW; activations come on top
PROGRAM_BYTES = 3 << 29  # node and trainer with torch loaded, measured: 1.3 GB together
# What the node writes in: folders, and files that grow. Others it reads, or replaces as a whole.
_WRITTEN = re.compile(
    r"accusations|branches|cache|checkpoints|derivatives|islands?|state|tensorboard|trainer|updates"
    r"|lock|\..+\.lock|chain\.(index|jsonl|marks)|(data-events|egress|history)\.jsonl|node\.(log|out)"
)


async def examine(config: NodeConfig, tell: Callable[[Finding], None], told: Told = silent) -> bool:
    """All looks, told as they are made. Whether nothing is wrong. `told` hears what is looked at."""
    ok = True

    def look(what: str, findings: Iterable[Finding]) -> None:
        nonlocal ok
        told(f"looking at {what}", 0, 1)
        for finding in findings:
            ok = ok and finding.verdict is not Verdict.WRONG
            tell(finding)

    held = config.home.is_held()
    look("the home", look_at_home(config.home, held))
    look("its files", look_at_files(config, held))
    look("the data", look_at_data(config))
    look("packages", look_at_versions())
    look("limits", look_at_limits())
    found: list[Run] = []
    look("the run", find_run(config, found))
    told("asking the peer" if config.peers else "looking for a way out", 0, 1)
    peer = await visit(config, tuple(parse_peer(text) for text in config.peers), held)
    if peer.run is not None and not found:
        found.append(peer.run)
    look("memory", look_at_memory(found[0] if found else None, free_memory_bytes(), held))
    look("the disk", look_at_disk(config.home, found[0] if found else None, held))
    look("the device", look_at_device(config.device))
    look("ports", look_at_ports(config, held))
    look("the peer", peer.findings)
    if found:
        look("whether it could join", look_at_join(config, found[0], peer.run, held))
    return ok


# --- this machine -----------------------------------------------------------------------------------


def look_at_home(home: Home, held: bool) -> Iterator[Finding]:
    """Its mark, whether a node runs in it, whether files there can be written and mapped."""
    try:
        require_original(home)
    except UserError as error:
        yield wrong("home", error.line, error.hint or "")
        return
    folder = _existing_parent(home.path)
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            file.truncate(4096)
            mmap.mmap(file.fileno(), 4096).close()
    except (OSError, ValueError) as error:
        why = getattr(error, "strerror", None) or str(error)
        cure = "give the node a home on a local disk that this user may write to"
        yield wrong("home", f"{folder} cannot be written and mapped: {why}", cure)
        return
    if closed := _closed_to_us(home):
        cure = f"sudo chown -R USER: {home.path}, with the user of the node; root wrote there perhaps"
        yield wrong("home", f"this user cannot {', '.join(closed)} in {home.path}", cure)
        return
    yield passed("home", f"{home.path}{', a node runs in it' if held else ''}")


def _closed_to_us(home: Home) -> list[str]:
    """What this user cannot do there, as "write chain.jsonl". (lost+found is no file of ours.)"""
    names = set(os.listdir(home.path)) - {"lost+found"} if home.path.is_dir() else set()
    closed = []
    for name in sorted(names):
        path = home.path / name
        if not path.exists():  # a link may lead nowhere
            continue
        if not os.access(path, os.R_OK):
            closed.append(f"read {name}")
        elif _WRITTEN.fullmatch(name) and not os.access(path, os.W_OK):
            closed.append(f"write {name}")
    return closed


def look_at_files(config: NodeConfig, held: bool) -> Iterator[Finding]:
    """What a start reads before it looks for its run, by the start's own readers; all that is wrong of it."""
    home, faults = config.home, 0
    for read in (
        lambda: None if held else home.require_way(config.island, to_others=bool(config.peers)),
        lambda: _identity(config),
        lambda: Token.load_or_create(home.http_token) if home.http_token.exists() else None,
        lambda: read_vote(home),
        lambda: _certificate(config),
        lambda: read_about(home.brought) if home.brought.exists() else None,
    ):
        try:
            read()
            continue
        except UserError as error:
            text, cure = error.line, error.hint or f"tapestry verify {home.path}"
        except IdentityError as error:
            text, cure = str(error), "what the line says; a lost key is in your backup"
        except BroughtError as error:
            text, cure = str(error), "move it away to go on without; the island lies in islands/"
        except OSError as error:
            text = f"{error.filename}: {error.strerror}"
            cure = "files of the home are for the user of the node"
        faults += 1
        yield wrong("files", text, cure)
    if not faults:
        yield passed("files", "key, token, vote and certificate can be used, where there are any")


def _identity(config: NodeConfig) -> None:
    """Raises IdentityError, UserError."""
    if os.path.lexists(config.home.identity_key):
        peer_id = Identity.load(config.home.identity_key).peer_id
        refuse_ourselves([parse_peer(text) for text in config.peers], peer_id)


def _certificate(config: NodeConfig) -> None:
    """Raises UserError."""
    if config.http_tls is not None:
        with tempfile.TemporaryDirectory(prefix="tapestry-doctor-") as folder:
            ServerTls(*config.http_tls, Path(folder) / "shown")


def look_at_data(config: NodeConfig) -> Iterator[Finding]:
    if config.external:
        yield unknown("data", "a script brings them, or see settings above")
        return
    try:
        located = located_in(config.data)
        require(config.home, paths_of(config.data), BASE, today_utc(), located)
        listings = list_data(config.data, located)
    except UserError as error:
        yield wrong("data", error.line, error.hint or "")
        return
    except DataError as error:
        yield wrong("data", str(error), "name text with --data, or in [data] of node.toml")
        return
    files = sum(len(one.files) for one in listings.sources)
    yield passed("data", f"{files} files; what of them can be read is found when the node starts")


def look_at_versions() -> Iterator[Finding]:
    """What is installed against what this package asks for."""
    from packaging.requirements import Requirement

    faults, count = [], 0
    for text in metadata.requires("tapestry-node") or ():
        requirement = Requirement(text)
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        count += 1
        try:
            there = metadata.version(requirement.name)
        except metadata.PackageNotFoundError:
            faults.append(f"{requirement.name} is not installed")
            continue
        if not requirement.specifier.contains(there, prereleases=True):
            faults.append(f"{requirement.name} is {there}, not {requirement.specifier}")
    python = ".".join(map(str, sys.version_info[:3]))
    if faults:
        yield wrong("packages", "; ".join(faults), "pip install -c constraints.txt . in the source folder")
    else:
        version = metadata.version("tapestry-node")
        yield passed("packages", f"tapestry {version}, Python {python}, all {count} packages fit")


def look_at_limits() -> Iterator[Finding]:
    """File descriptors, and the shared memory that hivemind's locks need."""
    with contextlib.suppress(ValueError, OSError):  # it is judged below
        raise_limit()
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    if limit != resource.RLIM_INFINITY and limit < KEPT + STREAMS_MIN:
        text = f"{limit} file descriptors, {KEPT + STREAMS_MIN} are needed"
        yield wrong("limits", text, "ulimit -n 65536, or LimitNOFILE=65536 in the systemd unit")
        return
    try:
        with tempfile.TemporaryFile(dir="/dev/shm") as file:
            file.write(b"x" * 4096)
            file.flush()
    except OSError as error:
        cure = "mount a tmpfs there; in a container, --shm-size=64m"
        yield wrong("limits", f"/dev/shm cannot be written: {error.strerror}", cure)
        return
    yield passed("limits", f"{limit} file descriptors, /dev/shm can be written")


def look_at_memory(run: Run | None, free_bytes: int, held: bool) -> Iterator[Finding]:
    """A running node has what it needs already."""
    if held:
        yield passed("memory", f"{size(free_bytes)} are free beside the node that runs here")
        return
    if run is None:
        yield unknown("memory", f"{size(free_bytes)} are free; no run is known to compare it with")
        return
    n = parameters_of(run.spec)
    needed = TRAINING_BYTES * run.trained + FLOAT_BYTES * max(0, n - run.trained) + PROGRAM_BYTES
    text = f"{size(free_bytes)} free, {size(needed)} needed to train {n:,} parameters, and activations"
    if needed > free_bytes:
        cure = "close other programs or use a larger machine; micro_batch and checkpointing in [training]"
        yield wrong("memory", text, f"{cure} of node.toml lower what activations take")
    else:
        yield passed("memory", text)


def look_at_disk(home: Home, run: Run | None, held: bool) -> Iterator[Finding]:
    """Room and speed, against what the model needs."""
    folder = _existing_parent(home.path)
    free = shutil.disk_usage(folder).free
    try:
        bytes_per_s, sync_s = _disk_speed(folder, min(TRIAL_BYTES, free // 4))
    except OSError as error:
        yield wrong("disk", f"{folder} cannot be written: {error.strerror}", "make room or mend the disk")
        return
    text = f"{size(free)} free, writes {size(int(bytes_per_s))}/s, syncs in {1000 * sync_s:.0f} ms"
    if sync_s > SYNC_S_MAX:
        yield wrong("disk", text, "each vote waits for a sync: put the home on a local disk")
    elif run is None:
        yield unknown("disk", f"{text}; no run is known to compare it with")
    else:
        state = STATE_BYTES * run.trained if held else 0  # in files without a name: disk/scratch.py
        use = disk_use(home)
        yield _judged_disk(run, free, (use["checkpoints"] + state, use["updates"]), bytes_per_s, text)


def _judged_disk(run: Run, free: int, lies: tuple[int, int], bytes_per_s: float, text: str) -> Finding:
    """`lies`: bytes of states and of updates that the home has already."""
    limits, update = run.spec.limits, PAYLOAD_BYTES * run.trained
    states, updates = STATE_BYTES * run.trained * (limits.checkpoints_kept + 2), int(2 * update)
    needed = states + updates
    there = min(lies[0], states) + min(lies[1], updates)
    most = needed + limits.updates_kept_bytes
    text += (
        f"; {size(needed)} needed, of which the home has {size(there)}, with all updates up to {size(most)}"
    )
    if needed - there > free:
        return wrong("disk", text, "make room, or give the node a --home on a larger disk")
    update_s = update / bytes_per_s
    if update_s > run.spec.round.stall_s:
        cure = (
            f"one update takes {update_s:.0f} s to write, the round's stall_s is {run.spec.round.stall_s:g}"
        )
        return wrong("disk", text, f"{cure}: put the home on a faster disk")
    return passed("disk", text)


def look_at_device(device: str) -> Iterator[Finding]:
    import torch

    there = torch.cuda.is_available()
    if device.startswith("cuda") and not there:
        why, cure = "this torch is built for CPUs", "install a torch with CUDA, or --device cpu"
        if built := torch.version.cuda:
            why = f"torch is built for CUDA {built} and finds no device"
            cure = "see that nvidia-smi works and is as new as that; or --device cpu"
        yield wrong("device", f"{device}: {why}", cure)
        return
    for index in (int(number) for number in re.findall(r"\d+", device)):
        if index >= torch.cuda.device_count():
            yield wrong("device", f"cuda:{index} is not there", f"there are {torch.cuda.device_count()}")
            return
    if device == "cpu" or not there:
        yield passed("device", f"cpu, {len(os.sched_getaffinity(0))} cores")
        return
    free, total = torch.cuda.mem_get_info(0)
    name = torch.cuda.get_device_name(0)
    yield passed("device", f"{name}, {size(free)} of {size(total)} free, CUDA {torch.version.cuda}")


def look_at_ports(config: NodeConfig, held: bool) -> Iterator[Finding]:
    """Those that the node would listen on; a running node has them already."""
    if held:
        yield passed("ports", "held by the node that runs here")
        return
    for address in config.listen:
        try:
            require_free(address)
        except SwarmError as error:
            yield wrong("ports", str(error), "stop what listens there, or choose another --listen")
            return
    with socket.socket(socket.AF_INET6 if ":" in config.http_host else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((config.http_host, config.http_port))
        except OSError as error:
            text = f"--http {config.http_host}:{config.http_port}: {error.strerror}"
            yield wrong("ports", text, "choose another with --http HOST:PORT; port 0 takes a free one")
            return
    yield passed("ports", f"free: {', '.join(config.listen)}, {config.http_host}:{config.http_port}")


# --- the run and its members ------------------------------------------------------------------------


def find_run(config: NodeConfig, found: list[Run]) -> Iterator[Finding]:
    """The home's, or the one of a run.toml; put into `found`."""
    home = config.home
    try:
        if home.genesis.exists():
            genesis, spec = read_genesis(home.genesis, ReaderCrypto())
            found.append(Run(spec, genesis.params, f"the run in {home.path}", genesis.run_id))
        elif config.run is not None:
            spec = RunSpec.load(config.run)
            found.append(Run(spec, parameters_of(spec), str(config.run)))
        if found:
            check_roster(found[0].spec, 1)
    except Broken as error:
        yield wrong("run", f"{home.genesis}: {error}", "move it away and join again with --peer")
        return
    except OSError as error:
        cure = "run this as the user whose home it is, or mend the disk"
        yield wrong("run", f"cannot read {home.genesis}: {error.strerror}", cure)
        return
    except UserError as error:
        yield wrong("run", error.line, error.hint or "see the comments in run.toml")
        return
    if found:
        run = found[0]
        name = f"{run.spec.name} {run.run_id[:12]}".strip()
        yield passed("run", f"{name}, {parameters_of(run.spec):,} parameters ({run.whose})")
    elif not config.peers:
        yield wrong(
            "run", "none: no run in the home, no run.toml, no --peer", "tapestry init DIR, or --peer ADDRESS"
        )


def look_at_join(config: NodeConfig, ours: Run, theirs: Run | None, held: bool) -> Iterator[Finding]:
    """Whether this node could be in the peer's run; one that runs has memory and disk for its own already."""
    if theirs is None:
        return
    memory = disk = sys.maxsize
    if not held:
        free = shutil.disk_usage(_existing_parent(config.home.path)).free
        memory, disk = free_memory_bytes(), free + disk_use(config.home)["checkpoints"]
    machine = Machine(memory, disk, config.max_params)
    fault = size_fault(theirs.spec, theirs.trained, machine)
    differences = diff(ours.spec, theirs.spec) if not ours.run_id else []
    if config.run_id is not None and config.run_id != theirs.run_id:
        yield wrong("join", f"the peer is of run {theirs.run_id[:16]}, not of --run-id", "ask its operator")
    elif ours.run_id and ours.run_id != theirs.run_id:
        text = f"this home is of run {ours.run_id[:16]}, the peer of {theirs.run_id[:16]}"
        yield wrong("join", text, "use another --home for that run")
    elif differences:
        yield wrong(
            "join",
            f"run.toml differs from the peer's: {differences[0]}",
            "remove it to take the run as it is",
        )
    elif fault:
        yield wrong(
            "join", f"the peer's run is refused: {fault}", "use a larger machine, or raise --max-params"
        )
    else:
        yield passed("join", f"this node could be in {theirs.spec.name} {theirs.run_id[:12]}")


# --- pieces -----------------------------------------------------------------------------------------


def size(count: int) -> str:
    for unit, name in ((2**40, "TiB"), (2**30, "GiB"), (2**20, "MiB")):
        if count >= unit:
            return f"{count / unit:.1f} {name}"
    return f"{count / 1024:.0f} KiB"


def _existing_parent(path: Path) -> Path:
    return next(folder for folder in (path, *path.parents) if folder.is_dir())


def _disk_speed(folder: Path, count: int) -> tuple[float, float]:
    """Bytes per second to a synced file, and the median time of a small sync. Raises OSError."""
    piece = os.urandom(1 << 20)
    with tempfile.TemporaryFile(dir=folder, buffering=0) as file:
        began_s = time.monotonic()
        for _ in range(max(1, count // len(piece))):
            file.write(piece)
        os.fsync(file.fileno())
        took_s = max(1e-6, time.monotonic() - began_s)
        written = file.tell()
        syncs = []
        for _ in range(5):
            began_s = time.monotonic()
            file.write(b"x" * 4096)
            os.fsync(file.fileno())
            syncs.append(time.monotonic() - began_s)
    return written / took_s, sorted(syncs)[2]


def run(config: NodeConfig, tell: Callable[[Finding], None], told: Told = silent) -> bool:
    """`examine`, from the outside."""
    return asyncio.run(examine(config, tell, told))
