"""Random bits of a home or an export are flipped, one at a time, and `tapestry verify` must name each file.

    scripts/flip_bits.py PATH [--count 1000] [--seed 0]

It works on a copy. Of a home it flips what belongs to the run: genesis (with the spec), chain, updates,
checkpoints, vote and the pinned files of the base; of an export every file. Exit 1 if one was missed.
"""

from __future__ import annotations

import argparse
import random
import shutil
import sys
import tempfile
import time
from pathlib import Path

from tapestry.node.disk.base import pinned
from tapestry.node.lineage.crypto import ReaderCrypto
from tapestry.node.lineage.follow import read_genesis
from tapestry.node.lineage.verify import verify
from tapestry.node.spec.training import TransformersSpec


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("path", type=Path)
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="tapestry-flips-") as folder:
        copy = Path(folder) / "copy"
        shutil.copytree(options.path, copy, ignore=shutil.ignore_patterns("state", "cache", "derivatives"))
        return _flip(copy, options.count, random.Random(options.seed))


def _flip(copy: Path, count: int, rng: random.Random) -> int:
    files = _files(copy)
    if not verify(copy, told=_quiet).holds:
        print("it does not hold as it is: run tapestry verify")
        return 1
    began_s, missed, told = time.monotonic(), 0, dict.fromkeys(files, 0)
    for _ in range(count):
        path = rng.choice(files)
        place, bit = rng.randrange(path.stat().st_size), 1 << rng.randrange(8)
        _turn(path, place, bit)
        named = {fault.file for fault in verify(copy, told=_quiet).faults}
        _turn(path, place, bit)
        name = path.relative_to(copy).as_posix()
        told[path] += 1
        if name not in named:
            missed += 1
            print(f"MISSED {name} byte {place} bit {bit}: {sorted(named) or 'nothing was found'}")
    for path in files:
        print(f"{told[path]:6} flips in {path.relative_to(copy)}")
    print(f"{count} flips, {missed} missed, {(time.monotonic() - began_s) / count * 1e3:.0f} ms each")
    return int(missed > 0)


def _files(copy: Path) -> list[Path]:
    if not (copy / "genesis.json").exists():
        return [path for path in sorted(copy.rglob("*")) if path.is_file() and path.stat().st_size]
    _, spec = read_genesis(copy / "genesis.json", ReaderCrypto())
    base = {file.name for file in pinned(spec.model)} if isinstance(spec.model, TransformersSpec) else set()
    wanted = [copy / "genesis.json", copy / "chain.jsonl", copy / "vote.json"]
    wanted += [
        *sorted((copy / "updates").glob("*.upd")),
        *sorted((copy / "checkpoints").glob("*.safetensors")),
    ]
    wanted += [copy / "base" / name for name in sorted(base)]
    return [path for path in wanted if path.exists()]


def _turn(path: Path, place: int, bit: int) -> None:
    with path.open("r+b") as file:
        file.seek(place)
        (byte,) = file.read(1)
        file.seek(place)
        file.write(bytes([byte ^ bit]))


def _quiet(_what: str, _done: int, _total: int) -> None:
    return None


if __name__ == "__main__":
    sys.exit(main())
