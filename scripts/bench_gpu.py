"""What a contribution costs where the parameters lie on a GPU: encoded there, or brought down whole.

    .venv/bin/python -P scripts/bench_gpu.py [--elements 100000000] [--repeat 7] [--json FILE]

Seconds are medians of `--repeat` runs in which the jobs take turns, the device synchronized before and after
each; GB/s are of float32, 4 * elements / time, and `bus` is what crosses the bus, of 4 bytes an element.
`contribution` is what a trainer does at the end of an epoch (node/trainer/encoder.py): the base comes up,
each shard is subtracted, measured and encoded, and its payload goes down, into memory shared with its node.
All payloads are compared with those of the CPU, bit by bit.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent))

from _bench import machine, table, write_json
from bench_codec import medians, normal

from tapestry.compression.codecs import get_codec
from tapestry.compression.payloads import PayloadLayout
from tapestry.node.trainer.encoder import Encoder
from tapestry.node.trainer.shared import create_buffer, lock_for_gpu, map_buffer, size_buffer

SHARD_ELEMENTS = 1 << 18  # the default of a run
GPU = torch.device("cuda")
PCT_PAYLOAD = 100 * 260 / 1024  # of float32: 256 codes and a scale of a block


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--elements", type=int, default=100_000_000)
    parser.add_argument("--repeat", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("torch sees no CUDA device: there is nothing to measure")
    torch.set_num_threads(arguments.threads)
    jobs = make_jobs(arguments.elements)
    taken = medians({name: synchronized(job) for name, (job, _) in jobs.items()}, arguments.repeat)
    print(f"{machine()}, {torch.cuda.get_device_name()}, {arguments.threads} thread(s)")
    print(f"{arguments.elements:,} elements\n")
    rows = [
        [name, 1e3 * taken[name], 4 * arguments.elements / taken[name] / 1e9, bus]
        for name, (_, bus) in jobs.items()
    ]
    print(table(["what", "ms", "GB/s of float32", "bus, %"], rows))
    write_json(arguments.json, {"elements": arguments.elements, "seconds": taken})


def make_jobs(n: int) -> dict[str, tuple[Callable[[], object], float]]:
    """Name -> (job, percent of float32 that crosses the bus)."""
    codec = get_codec("int8-block")
    base, step = normal(n), 1e-3 * normal(n).flip(0)
    local = (base - step).to(GPU)
    x = step.to(GPU)
    payload = torch.empty(codec.payload_size(n), dtype=torch.uint8)
    pinned, whole = payload.pin_memory(), torch.empty(n)
    whole_pinned = whole.pin_memory()
    assert torch.equal(codec.encode(x), codec.encode(step))

    layout = PayloadLayout.of(codec, n, SHARD_ELEMENTS)
    shared = torch.empty(layout.size, dtype=torch.uint8).share_memory_()
    on_gpu, on_cpu = (
        Encoder(layout, GPU, residual=False),
        Encoder(layout, torch.device("cpu"), residual=False),
    )

    def write(start: int, stop: int, out: Tensor) -> None:
        torch.sub(base[start:stop].to(out.device), local[start:stop].to(out.device), out=out)

    on_cpu.encode(write, shared, 1)
    expected = shared.clone()
    on_gpu.encode(write, shared, 1)
    assert torch.equal(shared, expected)
    base_locked, shared_locked = mapped(base, writable=False), mapped(shared, writable=True)

    def write_locked(start: int, stop: int, out: Tensor) -> None:
        torch.sub(base_locked[start:stop].to(out.device), local[start:stop], out=out)

    return {
        "f32 down, to pinned memory": (lambda: whole_pinned.copy_(x), 100.0),
        "f32 down, to memory as it is": (lambda: whole.copy_(x), 100.0),
        "f32 down, then encoded on the CPU": (lambda: codec.encode(whole_pinned.copy_(x), payload), 100.0),
        "encoded, stays on the GPU": (lambda: codec.encode_on_device(x), 0.0),
        "encoded, payload to pinned memory": (lambda: codec.encode(x, pinned), PCT_PAYLOAD),
        "encoded, payload to memory as it is": (lambda: codec.encode(x, payload), PCT_PAYLOAD),
        "contribution, encoded on the GPU": (
            lambda: on_gpu.encode(write_locked, shared_locked, 1),
            100 + PCT_PAYLOAD,
        ),
        "the same, shared memory not locked": (lambda: on_gpu.encode(write, shared, 1), 100 + PCT_PAYLOAD),
        "contribution, encoded on the CPU": (lambda: on_cpu.encode(write, shared, 1), 100.0),
    }


def mapped(
    values: Tensor,  # (n,), CPU
    writable: bool,
) -> Tensor:  # (n,)
    """The values in memory that is shared, and locked, as a trainer's is."""
    fd = create_buffer("bench")
    size_buffer(fd, values.nbytes)
    map_buffer(fd, values.nbytes, True).copy_(values.view(torch.uint8))
    shared = map_buffer(fd, values.nbytes, writable)
    if not lock_for_gpu(shared, writable):
        print(f"# CUDA does not lock shared memory here, writable={writable}", file=sys.stderr)
    return shared.view(values.dtype)


def synchronized(job: Callable[[], object]) -> Callable[[], object]:
    def run() -> None:
        torch.cuda.synchronize()
        job()
        torch.cuda.synchronize()

    return run


if __name__ == "__main__":
    main()
