"""The codecs beside memcpy, hivemind's, bitsandbytes and torch's quantized operators: speed and error.

    .venv/bin/python -P scripts/bench_codec.py [--elements 16777216] [--repeat 7] [--threads 1] [--json FILE]

GB/s are of float32, 4 * elements / time, the median of `--repeat` runs in which the subjects take turns.
`decode` writes into a vector that exists, as every user in this project does, and `fresh` makes a new one:
its page faults cost more than the arithmetic. `in cache` decodes one piece of 128k elements again and
again: what an outer step sees, which reads each piece at once. `add` is what a reducer does for each
member: acc += f32(coefficient * decoded). Where a library has no such call, its decoded vector is
multiplied and added in place. Checks of what came in are part of decoding in ours, and in no other.

The error is ||x - decoded|| / ||x||: of N(0, 1), of Student's t with 2 degrees of freedom (seeded), and of a
pseudo-gradient: preset tiny, 30 steps of AdamW on the standard library's sources. hivemind's codecs are
called directly, without its network. With NumPy >= 2.4 their `extract` raises (int() of an array of one):
it is mended here, in this process.

Other users of the codecs are in a second table: a reducer's shard of four members, the outer steps.
"""

from __future__ import annotations

import argparse
import logging
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent))

from _bench import machine, table, write_json

from tapestry.compression.blocks import PIECE
from tapestry.compression.codecs import Codec, get_codec
from tapestry.compression.reduce import reduce_shard
from tapestry.node.spec.run import AdamWSpec, NesterovSpec
from tapestry.node.state.outer import make_outer

MEMBERS = 4
SHARD = 1 << 20
STEPS = 30
COEFFICIENT = 0.25


@dataclass(frozen=True, slots=True)
class Subject:
    """What is measured. `encode` gives whatever `decode` takes; `into` decodes into a vector that exists."""

    name: str
    encode: Callable[[Tensor], Any]
    decode: Callable[[Any], Tensor]
    into: Callable[[Any, Tensor], object] | None = None
    add: Callable[[Any, Tensor], object] | None = None
    cached: Callable[[Any, Tensor], object] | None = None  # decode the first piece


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--elements", type=int, default=1 << 24)
    parser.add_argument("--repeat", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    subjects = [ours("int8-block"), ours("bnb-dynamic8"), *hivemind(), bitsandbytes(), rowwise()]
    gigabytes = 4 * arguments.elements / 1e9
    vectors = {
        "normal": normal(arguments.elements),
        "t2": heavy(arguments.elements),
        "pseudo-gradient": pseudo_gradient(),
    }
    speeds = measure_codecs(subjects, vectors["normal"], arguments.repeat)
    errors = {s.name: {name: error(s, x) for name, x in vectors.items()} for s in subjects}
    users = measure_users(arguments.repeat)
    print(f"{machine()}; NumPy {np.__version__}, torch {torch.__version__}, {arguments.threads} thread(s)")
    print(f"{arguments.elements:,} elements, GB/s of float32; error in %\n")
    kinds = ("encode", "decode", "fresh", "in cache", "add")
    rows = []
    for name in dict.fromkeys(name for name, _ in speeds):
        row: list[object] = [name]
        for kind in kinds:
            seconds = speeds.get((name, kind))
            size = 4 * PIECE / 1e9 if kind == "in cache" else gigabytes
            row.append(None if seconds is None else size / seconds)
        rows.append([*row, *(100 * value for value in errors.get(name, {}).values())])
        rows[-1] += [None] * (len(kinds) + 4 - len(rows[-1]))
    print(table(["subject", *kinds, *vectors], rows))
    print()
    print(
        table(
            ["who uses it", "ms", "GB/s of float32"],
            [[k, 1e3 * s, b / s / 1e9] for k, (s, b) in users.items()],
        )
    )
    write_json(
        arguments.json,
        {
            "elements": arguments.elements,
            "threads": arguments.threads,
            "seconds": {f"{name}/{kind}": seconds for (name, kind), seconds in speeds.items()},
            "errors": errors,
            "users": {name: {"seconds": s, "bytes": b} for name, (s, b) in users.items()},
        },
    )


def measure_codecs(subjects: list[Subject], x: Tensor, repeat: int) -> dict[tuple[str, str], float]:
    """Median seconds of each subject and kind."""
    y = torch.zeros_like(x)
    jobs: dict[tuple[str, str], Callable[[], object]] = {
        ("memcpy", "decode"): lambda: y.copy_(x),
        ("memcpy", "fresh"): lambda: x.clone(),
        ("fill", "decode"): lambda: y.fill_(0.5),
        ("read", "encode"): lambda: x.view(torch.int32).amax(),
    }
    for s in subjects:
        encoded = s.encode(x)
        jobs[s.name, "encode"] = lambda s=s: s.encode(x)
        jobs[s.name, "fresh"] = lambda s=s, encoded=encoded: s.decode(encoded)
        if s.into is not None:
            jobs[s.name, "decode"] = lambda s=s, encoded=encoded: s.into(encoded, y)
        if s.cached is not None:
            jobs[s.name, "in cache"] = lambda s=s, encoded=encoded: s.cached(encoded, y[:PIECE])
        jobs[s.name, "add"] = lambda s=s, encoded=encoded: add(s, encoded, y)
    return medians(jobs, repeat)


def medians(jobs: Mapping[Any, Callable[[], object]], repeat: int) -> dict[Any, float]:
    """Median seconds; in turns, so that a slow spell of the machine meets everyone. Each once to warm up."""
    for job in jobs.values():
        job()
    taken: dict[Any, list[float]] = {key: [] for key in jobs}
    for _ in range(repeat):
        for key, job in jobs.items():
            if key[1:] == ("in cache",):
                for _ in range(3):
                    job()
            start = time.perf_counter()
            job()
            taken[key].append(time.perf_counter() - start)
    return {key: statistics.median(values) for key, values in taken.items()}


def add(s: Subject, encoded: Any, acc: Tensor) -> None:
    """As a reducer would; with a vector of its own where the library has no way without."""
    if s.add is not None:
        s.add(encoded, acc)
    else:
        acc.add_(s.decode(encoded).mul_(COEFFICIENT))


def error(s: Subject, x: Tensor) -> float:
    """||x - decoded|| / ||x||, in f64."""
    decoded = s.decode(s.encode(x)).view(-1)
    return float((x.double() - decoded.double()).norm() / x.double().norm())


def ours(name: str) -> Subject:
    """A codec of this project, into buffers that exist."""
    codec: Codec = get_codec(name)
    payloads: dict[int, Tensor] = {}
    opened: dict[int, Any] = {}

    def encode(x: Tensor) -> tuple[Tensor, int]:
        n = x.numel()
        if n not in payloads:
            payloads[n] = torch.empty(codec.payload_size(n), dtype=torch.uint8)
        return codec.encode(x, payloads[n]), n

    def cached(encoded: tuple[Tensor, int], out: Tensor) -> None:
        if encoded[1] not in opened:
            opened[encoded[1]] = codec.open(*encoded)
        opened[encoded[1]].decode_piece(0, out)

    return Subject(
        name,
        encode,
        lambda encoded: codec.decode(*encoded),
        lambda encoded, out: codec.decode(*encoded, out),
        lambda encoded, acc: codec.accumulate(*encoded, COEFFICIENT, acc),
        cached,
    )


def hivemind() -> list[Subject]:
    """Its two 8-bit codecs, as its averaging calls them."""
    from hivemind.compression import (
        BlockwiseQuantization,
        CompressionInfo,
        Uniform8BitQuantization,
        quantization,
    )
    from hivemind.utils.tensor_descr import TensorDescriptor

    warnings.filterwarnings("ignore", "torch.quantize_per_tensor")
    quantization.int = lambda value: value.item()  # the mend for NumPy >= 2.4
    uniform, blockwise = Uniform8BitQuantization(), BlockwiseQuantization()

    def info(x: Tensor) -> CompressionInfo:
        return CompressionInfo(key=0, descriptor=TensorDescriptor.from_tensor(x))

    return [
        Subject("hivemind Uniform8Bit", lambda x: uniform.compress(x, info(x)), uniform.extract),
        Subject("hivemind Blockwise", lambda x: blockwise.compress(x, info(x)), blockwise.extract),
    ]


def bitsandbytes() -> Subject:
    """Its blockwise dynamic 8 bits, blocks of 256. On a CPU it has no way to decode into a given vector."""
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    from bitsandbytes.functional import dequantize_blockwise, quantize_blockwise

    return Subject(
        "bitsandbytes, 256",
        lambda x: quantize_blockwise(x, blocksize=256),
        lambda encoded: dequantize_blockwise(*encoded),
    )


def rowwise() -> Subject:
    """torch.ops.quantized.embedding_bag_byte: affine rows of 256. A reference: it checks nothing (FACTS)."""
    prepack = torch.ops.quantized.embedding_bag_byte_prepack
    unpack = torch.ops.quantized.embedding_bag_byte_unpack
    whole = 256

    def encode(x: Tensor) -> tuple[Tensor, int]:
        rows = x if x.numel() % whole == 0 else torch.cat([x, x.new_zeros(-x.numel() % whole)])
        return prepack(rows.view(-1, whole)), x.numel()

    return Subject("embedding_bag_byte", encode, lambda encoded: unpack(encoded[0]).view(-1)[: encoded[1]])


def normal(n: int) -> Tensor:
    return torch.randn(n, generator=torch.Generator().manual_seed(1))


def heavy(n: int) -> Tensor:
    return torch.from_numpy(np.random.default_rng(2).standard_t(2, n).astype(np.float32))


def pseudo_gradient() -> Tensor:
    """Base minus local parameters of preset tiny, after some inner steps."""
    from tapestry.node.spec.training import PRESETS
    from tapestry.node.trainer.data.corpus import load_corpus
    from tapestry.node.trainer.models.llama import build_model, model_layout

    preset = PRESETS["tiny"]
    torch.manual_seed(3)
    model = build_model(preset.model, preset.data.sequence_length)
    layout = model_layout(model)
    base = layout.flatten(dict(model.named_parameters()))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    with tempfile.TemporaryDirectory() as folder:
        corpus = load_corpus(["stdlib:1/8"], Path(folder), preset.data.sequence_length)
        for step in range(STEPS):
            windows = torch.from_numpy(corpus.windows_at(4 * step, 4))
            loss = model(input_ids=windows[:, :-1], labels=windows[:, :-1]).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    return base - layout.flatten(dict(model.named_parameters()))


def measure_users(repeat: int) -> dict[str, tuple[float, int]]:
    """Median seconds and bytes of f32 decoded: a reducer's shard, and outer steps on 10M parameters."""
    codec = get_codec("int8-block")
    n = 10 * SHARD
    x = normal(n)
    members = [codec.encode(x[i * SHARD : (i + 1) * SHARD]) for i in range(MEMBERS)]
    result = torch.empty_like(members[0])
    shards = [codec.encode(x[i * SHARD : (i + 1) * SHARD]) for i in range(10)]
    jobs: dict[Any, Callable[[], object]] = {
        f"reduce_shard, {MEMBERS} members of 1M": lambda: reduce_shard(
            members, [1, 2, 3, 4], codec, SHARD, result
        )
    }
    sizes = [4 * MEMBERS * SHARD]
    for spec in (NesterovSpec(), AdamWSpec()):
        outer = make_outer(spec)
        params, buffers = torch.zeros(n), {name: torch.zeros(n) for name in outer.buffer_names}

        def step(outer=outer, params=params, buffers=buffers) -> None:
            apply(codec, shards, outer, params, buffers)

        jobs[f"{type(outer).__name__} on 10M, decoding included"] = step
        sizes.append(4 * n)
    return {key: (s, size) for (key, s), size in zip(medians(jobs, repeat).items(), sizes, strict=True)}


def apply(codec: Codec, shards: list[Tensor], outer: Any, params: Tensor, buffers: dict[str, Tensor]) -> None:
    """ModelState.apply without the state's book-keeping."""
    from tapestry.compression.blocks import pieces, thread_scratch

    for shard, payload in enumerate(shards):
        opened = codec.open(payload, SHARD)
        for index, (start, stop) in enumerate(pieces(SHARD)):
            mean = thread_scratch("mean", stop - start)
            opened.decode_piece(index, mean)
            outer.step(params, buffers, mean, shard * SHARD + start, shard * SHARD + stop, 1)


if __name__ == "__main__":
    main()
