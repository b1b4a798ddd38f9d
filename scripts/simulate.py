#!/usr/bin/env python3
"""Run the protocol in the simulator: every seed is a world with faults of its own.

    scripts/simulate.py --seeds 0:3000                 many worlds
    scripts/simulate.py --seeds 0:500 --peers 5        all of one size (up to 64)
    scripts/simulate.py --seeds 17:18                  one world; if it fails, with its story
    scripts/simulate.py --seeds 0:2000 --plant NAME    with a bug on purpose (--plant list names them)
    scripts/simulate.py --seeds 0:1000000 --compiled --jobs 2   many more: see scripts/_compiled.py

Exit code 1 if an invariant is violated, and then the story of the first failing seed: who sent what to whom,
when, and what broke; 130 if it was interrupted, and then how far it came. The worlds are in tests/simulation;
docs/reliability.md says what is checked in them.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import gc
import json
import multiprocessing
import signal
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))
if "--compiled" in sys.argv:  # before anything of it is imported
    sys.path.insert(1, str(Path(__file__).resolve().parent))
    from _compiled import CannotCompile, compiled

    try:
        sys.path.insert(0, str(compiled()))
    except (CannotCompile, OSError) as why:
        sys.exit(f"cannot compile the simulator: {why}\nrun it without --compiled")

try:
    from simulation.plants import PLANTS, planted
    from simulation.world import Violation, World
except ModuleNotFoundError as missing:
    sys.exit(
        f"{missing}; run it with the environment that scripts/test makes: .venv/bin/python {sys.argv[0]}"
    )

PEERS_MAX = 64
STORY_LINES = 60
TEXT_MAX = 160  # characters of a line's content
BATCH = 100  # seeds that a process of --jobs takes at a time
TELL_EVERY_S = 10.0
INTERRUPTED = 130  # as a shell has it
UNTOLD = ("Status", "Shard", "Result")  # most of what is sent, and least of what explains


Line = tuple[float, str, object, object]  # when, who, to whom, what


@dataclass
class Tally:
    seeds: int = 0
    violations: int = 0
    epochs: int = 0
    seeds_per_s: float = 0.0
    first_failing_seed: int | None = None

    def add(self, batch: Tally, took_s: float) -> None:
        self.seeds += batch.seeds
        self.violations += batch.violations
        self.epochs += batch.epochs
        self.seeds_per_s = round(self.seeds / took_s, 2)
        failing = [s for s in (self.first_failing_seed, batch.first_failing_seed) if s is not None]
        self.first_failing_seed = min(failing, default=None)

    def line(self) -> str:
        return (
            f"seeds={self.seeds} violations={self.violations} epochs={self.epochs} "
            f"seeds_per_s={self.seeds_per_s:.1f} first_failing_seed={self.first_failing_seed}"
        )


def main() -> int:
    options = parse()
    if options.plant == "list":
        for name, plant in PLANTS.items():
            print(f"{name:28} {plant.claim}")
        return 0
    if options.trace:
        for seed in options.seeds:
            print(World(seed, peers=options.peers, keep_trace=True).run().trace_digest())
        return 0
    bug = planted(options.plant) if options.plant else contextlib.nullcontext()
    with bug:
        tally = (
            simulate(options.seeds, options.peers, stop=bool(options.plant), quiet=options.json)
            if options.jobs == 1
            else in_parallel(options.seeds, options.peers, options.jobs, quiet=options.json)
        )
        if tally.first_failing_seed is not None and not options.json:
            tell(tally.first_failing_seed, options.peers)
    if options.json:
        print(json.dumps(vars(tally)))
    else:
        print(tally.line())
    if tally.violations:
        return 1
    return 0 if tally.seeds == len(options.seeds) else INTERRUPTED


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--seeds", type=seed_range, default=range(0, 100), metavar="A:B", help="from A below B"
    )
    parser.add_argument(
        "--peers", type=peer_count, metavar="N", help=f"1 to {PEERS_MAX}; default: drawn, 1 to 12"
    )
    parser.add_argument(
        "--plant",
        choices=["list", *PLANTS],
        metavar="NAME",
        help="plant a bug, and stop when it is caught; or list",
    )
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="processes; default: 1")
    parser.add_argument("--compiled", action="store_true", help="compile the simulator first; needs gcc")
    parser.add_argument(
        "--trace", action="store_true", help="print a digest of all that each world did, and no more"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object and nothing else")
    options = parser.parse_args()
    if options.plant and (options.compiled or options.jobs > 1):
        parser.error("a bug is planted in this process, uncompiled: leave out --compiled and --jobs")
    return options


def seed_range(text: str) -> range:
    try:
        low, high = (int(part) for part in text.split(":"))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not A:B, for example 0:3000") from None
    if low < 0 or high <= low:
        raise argparse.ArgumentTypeError(f"{text!r} holds no seed")
    return range(low, high)


def peer_count(text: str) -> int:
    if not text.isdigit() or not 1 <= int(text) <= PEERS_MAX:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from 1 to {PEERS_MAX}")
    return int(text)


def in_parallel(seeds: range, peers: int | None, jobs: int, quiet: bool) -> Tally:
    """The same, by several processes; what has been done is said now and then, and when interrupted."""
    total, began, told_at = Tally(), time.perf_counter(), 0.0
    batches = [seeds[i : i + BATCH] for i in range(0, len(seeds), BATCH)]
    done: set[range] = set()
    ignore = (signal.SIGINT, signal.SIG_IGN)  # it comes to all of them, and is ours to hear
    with multiprocessing.Pool(jobs, initializer=signal.signal, initargs=ignore) as pool:
        try:
            for batch, tally in pool.imap_unordered(functools.partial(batch_of, peers, quiet), batches):
                done.add(batch)
                took_s = time.perf_counter() - began
                total.add(tally, took_s)
                if not quiet and (took_s - told_at >= TELL_EVERY_S or tally.violations):
                    told_at = took_s
                    print(total.line(), flush=True)
        except KeyboardInterrupt:
            for batch in [batch for batch in batches if batch not in done][:1]:
                tell_interrupted(batch[0])
    return total


def tell_interrupted(next_seed: int) -> None:
    print(f"interrupted: of the seeds asked for, all below {next_seed} were run", file=sys.stderr)


def batch_of(peers: int | None, quiet: bool, seeds: range) -> tuple[range, Tally]:
    return seeds, simulate(seeds, peers, stop=False, quiet=quiet)


def simulate(seeds: range, peers: int | None, stop: bool, quiet: bool) -> Tally:
    """Run the worlds of these seeds one after another. `stop`: at the first violation."""
    tally = Tally()
    start = time.perf_counter()
    gc.disable()  # a world is thrown away whole
    for seed in seeds:
        world = World(seed, peers=peers)
        try:
            world.run()
        except KeyboardInterrupt:
            tell_interrupted(seed)
            break
        except Violation as violation:
            tally.violations += 1
            if tally.first_failing_seed is None:
                tally.first_failing_seed = seed
            if not quiet:
                print(violation)
        tally.seeds += 1
        tally.epochs += world.furthest
        if tally.violations and stop:
            break
        del world
        gc.collect(0)  # it holds cycles; its memory is for the next world, while the cache still has it
    tally.seeds_per_s = round(tally.seeds / (time.perf_counter() - start), 2)
    return tally


def tell(seed: int, peers: int | None) -> None:
    """Run one failing seed again, and print what came before its end."""
    world = World(seed, peers=peers, keep_story=True)
    try:
        world.run()
    except Violation as violation:
        print(f"\nThe end of seed {seed}, without heartbeats and shards. {world.rules}")
        print(f"faults: {drawn(world.faults)}")
        told = without_repeats(line for line in world.story or [] if type(line[3]).__name__ not in UNTOLD)
        for at, name, to, what in told[-STORY_LINES:]:
            print(f"{at:9.3f} {name}{f' -> {to}' if to else ''}  {readable(what)}")
        print(f"BROKEN: {violation}\n")


def without_repeats(lines: Iterable[Line]) -> list[Line]:
    """Everything is said again until it has its effect: here once, unless something was said in between that
    makes it news."""
    said: dict[tuple[str, object, str], object] = {}
    kept = []
    for line in lines:
        _, name, to, what = line
        key = (name, to, type(what).__name__)
        if said.get(key) != what or isinstance(what, str):
            said[key] = what
            kept.append(line)
    return kept


def drawn(faults: object) -> str:
    named = ((f.name, getattr(faults, f.name)) for f in fields(faults))  # type: ignore[arg-type]
    return " ".join(f"{name}={value:.3g}" for name, value in named if value)


def readable(what: object) -> str:
    """A message in one line, with digests cut short."""
    if not is_dataclass(what):
        return str(what)
    parts = [f"{f.name}={short(getattr(what, f.name))}" for f in fields(what)]
    text = f"{type(what).__name__.upper()} {' '.join(parts)}"
    return text if len(text) <= TEXT_MAX else text[:TEXT_MAX] + "..."


def short(value: object) -> str:
    if isinstance(value, str):
        return value[:6] if len(value) >= 32 else value
    if isinstance(value, tuple):
        return f"({','.join(short(v) for v in value)})"
    if is_dataclass(value):
        return f"<{' '.join(short(getattr(value, f.name)) for f in fields(value))}>"
    return getattr(value, "name", None) or str(value)


if __name__ == "__main__":
    sys.exit(main())
