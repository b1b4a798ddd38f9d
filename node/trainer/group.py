"""Several devices in one member: one process for each, which are one trainer to the node.

    rank 0   the worker that the node has started: owns the socket, hears commands, and says all that is said
    others   started by rank 0, with the same shared buffers; they do what rank 0 does, at the same moment

All run the same worker (worker.py). Rank 0 tells the others each command as it takes it up, and also that
there was none (`LeadingChannel`, `FollowingChannel`); what happens then follows from settings and commands
alone, so all ranks go through the same calls, which is what collective operations ask. Parameters,
gradients and the inner optimizer's state are cut over the ranks by FSDP2 (`held`); each rank reads the
pieces of the base that it holds from the one shared vector, works on its part of every batch, encodes every
size-th span of codec shards, and writes its payloads into the one shared contribution.

A rank that dies takes the trainer with it: rank 0 watches its children, they are killed with rank 0
(PR_SET_PDEATHSIG), and the node starts a new trainer from the last committed state, as after any death.

Limits: micro-batches are of one size for all ranks, which do not adapt to too little memory; all logits of a
micro-batch are made at once; Muon, which needs whole matrices, is refused.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from tapestry.node.trainer.messages import (
    HEADER,
    Command,
    Configure,
    Initialise,
    Report,
    body_length,
    pack,
    unpack_command,
)

if TYPE_CHECKING:
    import torch
    from torch import Tensor

FOR_EVER = timedelta(days=365)  # between two rounds a trainer may wait as long as it takes
EXIT_RANK_DIED = 4
FAILED_ALIKE_S = 2.0  # guess


class Channel(Protocol):
    """worker.Channel, or one of those below."""

    def send(self, report: Report) -> None: ...

    def send_last(self, report: Report) -> None: ...

    def receive(self, wait: bool) -> Command | None: ...


def devices_of(wanted: str) -> list[str]:
    """A device for each process: `cpu:2` is two on the CPU, `cuda:0,1` two GPUs, all else is one."""
    kind, _, rest = wanted.partition(":")
    if not rest:
        return [wanted]
    if kind == "cpu":
        return ["cpu"] * int(rest)
    return [f"{kind}:{index}" for index in rest.split(",")]


class Group:
    """The processes of one trainer. Collective: every rank makes the same calls in the same order."""

    def __init__(self, rank: int, size: int, store: str, device: torch.device) -> None:
        import torch
        import torch.distributed as dist

        self.rank, self.size, self.device = rank, size, device
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        if device.type == "cuda":
            torch.cuda.set_device(device)
        dist.init_process_group(
            backend,
            store=dist.FileStore(store, size),  # type: ignore[attr-defined]
            rank=rank,
            world_size=size,
            timeout=FOR_EVER,
        )

    def own_copy(self, path: Path) -> Path:
        """A file that rank 0 keeps; the others keep a copy of their own, begun from it."""
        if not self.rank:
            return path
        own = path.with_name(f"{path.name}.{self.rank}")
        own.unlink(missing_ok=True)
        if path.exists():
            shutil.copyfile(path, own)
        return own

    def mesh(self) -> Any:
        """For fully_shard."""
        from torch.distributed.device_mesh import init_device_mesh

        return init_device_mesh(self.device.type, (self.size,))

    def sum(self, value: float) -> float:
        """Of all ranks' values, in f64."""
        import torch

        total = torch.tensor([value], dtype=torch.float64)
        self.add_up(total)
        return float(total)

    def each(self, value: float) -> list[float]:
        """Every rank's value, by rank; in f64."""
        import torch

        values = torch.zeros(self.size, dtype=torch.float64)
        values[self.rank] = value
        self.add_up(values)
        return [float(one) for one in values]

    def add_up(self, x: Tensor) -> None:
        """In place, the sum of all ranks' tensors."""
        import torch.distributed as dist

        dist.all_reduce(x)

    def tell(self, data: bytes) -> None:
        """Rank 0: to all others."""
        import torch
        import torch.distributed as dist

        dist.broadcast(torch.tensor([len(data)]), 0)
        if data:
            dist.broadcast(torch.frombuffer(bytearray(data), dtype=torch.uint8), 0)

    def hear(self) -> bytes:
        """The others: what rank 0 tells."""
        import torch
        import torch.distributed as dist

        length = torch.zeros(1, dtype=torch.int64)
        dist.broadcast(length, 0)
        data = torch.zeros(int(length), dtype=torch.uint8)
        if data.numel():
            dist.broadcast(data, 0)
        return bytes(data.numpy())


class LeadingChannel:
    """Rank 0's: the node's commands, told to all."""

    def __init__(self, channel: Channel, group: Group) -> None:
        self._channel, self._group = channel, group

    def send(self, report: Report) -> None:
        """To the node."""
        self._channel.send(report)

    def send_last(self, report: Report) -> None:
        """To the node, if it listens."""
        self._channel.send_last(report)

    def receive(self, wait: bool) -> Command | None:
        """The node's; an Initialise is rank 0's alone."""
        command = self._channel.receive(wait)
        if not isinstance(command, Initialise):
            self._group.tell(b"" if command is None else pack(command))
        return command


class FollowingChannel:
    """The others': what rank 0 has heard. They have nobody to speak to."""

    def __init__(self, group: Group | None = None) -> None:
        self._group = group

    def send(self, report: Report) -> None:
        """Rank 0 says it."""

    def send_last(self, report: Report) -> None:
        """Rank 0 says it, or has been killed with us."""

    def receive(self, wait: bool) -> Command | None:
        """At the same moment as rank 0; before they have met, what it wrote to our standard input."""
        if self._group is None:
            return _read_configure()
        frame = self._group.hear()
        return unpack_command(frame[HEADER.size :]) if frame else None


def meet(
    configure: Configure, devices: Sequence[str], fds: dict[str, int], rank: int, store: str
) -> Group | None:
    """The group, once all are there, whom rank 0 starts; None for one device. `store` is a file of ours."""
    import torch

    if len(devices) == 1:
        return None
    if not rank:
        Path(store).parent.mkdir(parents=True, exist_ok=True)
        Path(store).unlink(missing_ok=True)
        _start_followers(configure, devices, fds, store)
    return Group(rank, len(devices), store, torch.device(devices[rank]))


def _start_followers(
    configure: Configure,
    devices: Sequence[str],
    fds: dict[str, int],
    store: str,
) -> None:
    """A process for each other device."""
    for rank in range(1, len(devices)):
        child = subprocess.Popen(
            [
                *(sys.executable, "-P", "-m", "tapestry.node.trainer.worker"),
                *("--channel=-1", f"--parent={os.getpid()}"),
                *(f"--{name}={fd}" for name, fd in fds.items()),
                *(f"--rank={rank}", f"--store={store}"),
            ],
            stdin=subprocess.PIPE,
            pass_fds=tuple(fds.values()),
        )
        assert child.stdin is not None
        child.stdin.write(pack(configure))
        child.stdin.close()
        threading.Thread(target=_end_with, args=(child, rank), daemon=True).start()


def _read_configure() -> Command:
    header = sys.stdin.buffer.read(HEADER.size)
    return unpack_command(sys.stdin.buffer.read(body_length(header)))


def _end_with(child: subprocess.Popen[bytes], rank: int) -> None:
    """A rank has died, whatever of: the trainer dies of it, whatever it waits for.

    If all have failed alike, rank 0 tells the node why; that takes it no time.
    """
    status = child.wait()
    if status:
        time.sleep(FAILED_ALIKE_S)
        sys.stderr.write(f"rank {rank} of the trainer has ended with status {status}\n")
        sys.stderr.flush()
        os._exit(EXIT_RANK_DIED)
