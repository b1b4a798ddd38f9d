"""What each mean costs a reducer beside `mean`: one shard, in turns, medians.

    OMP_NUM_THREADS=1 .venv/bin/python -P scripts/bench/means.py [--elements 1048576] [--members 4 7 16]
        [--repeat 7] [--json FILE]

`unequal` is with members of voices 1, 2, 3 and so on, where that makes a difference.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from _bench import machine, table, write_json
from bench_codec import medians

from tapestry.compression.codecs import codec_names, get_codec
from tapestry.compression.means.registry import make_mean
from tapestry.compression.reduce import reduce_shard
from tapestry.node.daemon.averaging import mean_of
from tapestry.node.spec.run import AlignedSpec, ClippedSpec, SignElectedSpec, TrimmedSpec

PLAIN = make_mean("mean", {})
MEANS = {
    "mean": (PLAIN, False),
    "clipped": (mean_of(ClippedSpec()), False),
    "aligned": (mean_of(AlignedSpec()), False),
    "sign-elected": (mean_of(SignElectedSpec()), False),
    "trimmed": (mean_of(TrimmedSpec()), False),
    "trimmed, unequal": (mean_of(TrimmedSpec()), True),
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--elements", type=int, default=1 << 20)
    parser.add_argument("--members", type=int, nargs="+", default=[4, 7, 16])
    parser.add_argument("--repeat", type=int, default=7)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows, found = [], []
    for codec in codec_names():
        for members in options.members:
            taken = measure(codec, members, options.elements, options.repeat)
            found.append({"codec": codec, "members": members, "seconds": taken})
            ratios = [taken[name] / taken["mean"] for name in MEANS if name != "mean"]
            rows.append([f"{codec}, {members} members", 1e3 * taken["mean"], *ratios])
    print(f"{machine()}; {options.elements:,} elements, one thread\n")
    print(table(["shard", "mean, ms", *(f"{name}, x" for name in MEANS if name != "mean")], rows))
    write_json(options.json, found)


def measure(codec_name: str, members: int, n: int, repeat: int) -> dict[str, float]:
    """Median seconds of each mean."""
    codec = get_codec(codec_name)
    random = torch.Generator().manual_seed(members)
    payloads = [codec.encode(torch.randn(n, generator=random)) for _ in range(members)]
    out = torch.empty_like(payloads[0])
    jobs: dict[str, Callable[[], object]] = {}
    for name, (mean, unequal) in MEANS.items():
        weights = list(range(1, members + 1)) if unequal else [1] * members
        jobs[name] = lambda mean=mean, weights=weights: reduce_shard(
            payloads, weights, codec, n, out, mean=mean
        )
    return medians(jobs, repeat)


if __name__ == "__main__":
    main()
