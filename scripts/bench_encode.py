"""How long it takes from the last inner step to a contribution that the node has: two ways, in turns.

    .venv/bin/python -P scripts/bench_encode.py --params 10000000 100000000

  node     as it was: the trainer writes base - local as float32 into shared memory and adds up its norm, the
           node says READY, and encodes shard by shard in a thread of its own
  trainer  as it is (docs/decisions/005-who-encodes.md): one pass that subtracts, adds up, encodes into shared
           memory; the node copies and checks the payloads, and says READY

One process does both parts, on one thread, so what a message between two costs is left out. `ready_ms` is
till READY, `all_ms` till all payloads lie in the node's memory; medians.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent))

from _bench import machine, table

from tapestry.compression.codecs import codec_names, get_codec
from tapestry.compression.payloads import PayloadLayout
from tapestry.compression.reduce import WEIGHTED
from tapestry.node.daemon.averaging import Averaging
from tapestry.node.trainer.encoder import Encoder
from tapestry.node.trainer.shared import create_buffer, map_buffer, size_buffer, vector_size

Way = Callable[[], tuple[float, float]]  # moments: READY, and all there


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--params", type=int, nargs="+", default=[10_000_000])
    parser.add_argument("--codec", choices=codec_names(), default="int8-block")
    parser.add_argument("--shard-elements", type=int, default=1 << 18)
    parser.add_argument("--repeat", type=int, default=15)
    options = parser.parse_args()
    torch.set_num_threads(1)
    print(f"{machine()}; {options.codec}, shards of {options.shard_elements:,}")
    rows = []
    for n in options.params:
        layout = PayloadLayout.of(get_codec(options.codec), n, options.shard_elements)
        for name, times in measure(layout, options.repeat).items():
            ready_ms, all_ms = (1e3 * statistics.median(column) for column in zip(*times, strict=True))
            rows.append([f"{n:,} {name}", ready_ms, all_ms, 1e3 * min(t[1] for t in times)])
    print(table(["parameters, who encodes", "ready_ms", "all_ms", "all_ms least"], rows))


def measure(layout: PayloadLayout, repeat: int) -> dict[str, list[tuple[float, float]]]:
    """Seconds of each round; the first, in which memory is new, is not counted."""
    base = shared(vector_size(layout.n)).view(torch.float32)
    base.normal_()
    local = base + 1e-3 * torch.randn(layout.n)
    ways = {"node": node_encodes(layout, base, local), "trainer": trainer_encodes(layout, base, local)}
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}
    for _ in range(repeat + 1):
        for name, way in ways.items():
            began = time.perf_counter()
            ready, done = way()
            times[name].append((ready - began, done - began))
    return {name: all_times[1:] for name, all_times in times.items()}


def node_encodes(layout: PayloadLayout, base: Tensor, local: Tensor) -> Way:
    out = shared(vector_size(layout.n)).view(torch.float32)

    def way() -> tuple[float, float]:
        torch.sub(base, local.detach().cpu(), out=out)
        torch.linalg.vector_norm(out, dtype=torch.float64).item()
        ready = time.perf_counter()
        payloads = [layout.codec.encode(out[s.start : s.stop]) for s in layout.shards]
        assert len(payloads) == len(layout.shards)
        return ready, time.perf_counter()

    return way


def trainer_encodes(layout: PayloadLayout, base: Tensor, local: Tensor) -> Way:
    out = shared(layout.size)
    encoder = Encoder(layout, torch.device("cpu"), residual=False)
    averaging = Averaging(layout.codec, layout.n, layout.shards[0].n, WEIGHTED)

    def write(start: int, stop: int, piece: Tensor) -> None:
        torch.sub(base[start:stop], local[start:stop], out=piece)

    def way() -> tuple[float, float]:
        encoder.encode(write, out, 1)
        payloads = averaging.take(out, copy=True)
        assert len(payloads) == len(layout.shards)
        done = time.perf_counter()
        return done, done

    return way


def shared(size: int) -> Tensor:  # uint8 (size,)
    fd = create_buffer("bench")
    size_buffer(fd, size)
    return map_buffer(fd, size, writable=True)


if __name__ == "__main__":
    main()
