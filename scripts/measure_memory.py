"""Memory of the node process per parameter, over what it takes with hardly any.

    .venv/bin/python -P scripts/measure_memory.py [--params 10000000,100000000] [--rounds 4] [--model small]

Two nodes on loopback found and join a run and commit some rounds together. Their trainers are stand-ins
without a model (scripts/_standin.py), so that the number of parameters is free. With `--model PRESET` the
real trainer trains that preset, cut to two tiny steps. First the same is done with 48,448 parameters, and
that is taken off.

What is told is the node process alone (its trainer and p2pd are processes of their own), of both nodes the
larger, as the kernel counts it in /proc/PID/status, looked at every 10 ms:

  anonymous   what only swap could take back; the peak from the first round's start to the last one's end
  joining     the same from the start of the second node's process to its first round
  file        pages of files that are mapped: parameters, outer state. The kernel writes them out when it must
  shmem       memory shared with the trainer: the contribution, 1 byte
  round       median seconds between two commits, without the stand-in's pause
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import re
import statistics
import sys
import tempfile
import threading
import time
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent / "tests"))

from e2e import harness  # noqa: E402

SMALL = 48_448  # parameters of preset nano
STEP_S = 0.5  # what the stand-in trains, and for each PARAMS_PER_S as much as a second more
PARAMS_PER_S = 40_000_000
LOOK_EVERY_S = 0.01
FIELDS = {"RssAnon": "anonymous", "RssFile": "file", "RssShmem": "shmem"}
STEPS = {"inner_steps": "2", "batch_size": "1", "sequence_length": "16", "checkpoint_every_epochs": "2"}
PATIENCE = {"stall_s": "60.0", "exchange_max_s": "1800.0", "min_members": "2"}
DEADLINE_S = 3600.0


@dataclass
class Peaks:
    """Of one process, in bytes; since `reset`."""

    pid: int
    bytes: dict[str, int] = field(default_factory=dict)
    over: bool = False

    def watch(self) -> None:
        """In a thread of its own, until the process is gone."""
        while not self.over:
            try:
                text = Path(f"/proc/{self.pid}/status").read_text()
            except OSError:
                return
            for key, name in FIELDS.items():
                found = re.search(rf"{key}:\s+(\d+) kB", text)
                if found:
                    self.bytes[name] = max(self.bytes.get(name, 0), int(found[1]) * 1024)
            time.sleep(LOOK_EVERY_S)

    def reset(self) -> dict[str, int]:
        """What the peaks were."""
        told, self.bytes = self.bytes, {}
        return told


@dataclass(frozen=True)
class Measured:
    params: int
    rounds: dict[str, int]  # bytes: the larger of the two nodes
    joining: int
    round_s: float


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--params", default="10000000,100000000", help="of the stand-in, with commas")
    parser.add_argument("--rounds", type=int, default=4, help="committed by both nodes, of each size")
    parser.add_argument("--model", default="", help="a preset, with its real trainer, in place of --params")
    parser.add_argument("--folder", type=Path, help="where the homes shall lie; a temporary one unless given")
    parser.add_argument("--checkpoint-every", default="2", help="epochs")
    arguments = parser.parse_args()
    if arguments.model:
        sizes = [("nano", 0), (arguments.model, 0)]
    else:
        sizes = [("nano", int(n)) for n in [str(SMALL), *arguments.params.split(",")]]
    base = None
    for preset, params in sizes:
        with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
            measured = measure(Path(folder), preset, params, arguments)
        if base is None:
            base = measured
            tell_base(base)
        else:
            tell(measured, base)


def tell_base(base: Measured) -> None:
    mib = ", ".join(f"{name} {size / 2**20:.0f}" for name, size in base.rounds.items())
    print(f"{base.params:,} parameters: {mib} MiB; round {base.round_s:.2f} s. Bytes each over that:")
    columns = f"{'parameters':>13} {'anonymous':>9} {'joining':>8} {'file':>6} {'shmem':>6} {'round s':>8}"
    print(columns, flush=True)


def tell(one: Measured, base: Measured) -> None:
    more = one.params - base.params
    each = {name: (size - base.rounds[name]) / more for name, size in one.rounds.items()}
    print(
        f"{one.params:>13,} {each['anonymous']:>9.2f} {(one.joining - base.joining) / more:>8.2f} "
        f"{each['file']:>6.2f} {each['shmem']:>6.2f} {one.round_s:>8.2f}",
        flush=True,
    )


def measure(folder: Path, preset: str, params: int, arguments: argparse.Namespace) -> Measured:
    """Two nodes from the founding to the last round."""
    changes = STEPS | PATIENCE | {"checkpoint_every_epochs": arguments.checkpoint_every}
    home = harness.init(folder / "a", "--preset", preset, is_open=True, **changes)
    pause_s = STEP_S + params / PARAMS_PER_S if params else 0.0
    extra = {"STANDIN_PARAMS": str(params), "STANDIN_STEP_S": str(pause_s)}
    if params:
        harness.TAPESTRY = (sys.executable, "-P", str(HERE / "_standin.py"))
    founder = harness.Node(home, "--log-format", "json")
    founder.environment = extra
    with founder:
        founder.wait_ready(DEADLINE_S)
        second = harness.Node(
            folder / "b", "--peer", founder.address, "--log-format", "json", data="stdlib:2/3"
        )
        second.environment = extra
        with second:
            watched = [watch(founder.pid), watch(second.pid)]
            second.wait_ready(DEADLINE_S)
            digests = harness.Digests(founder, second)
            digests.wait("a first round of both", lambda: together(second) >= 1, DEADLINE_S)
            joining = watched[1].reset()["anonymous"]
            watched[0].reset()
            digests.wait(
                "rounds", lambda: together(second) >= 1 + arguments.rounds and at_rest(second), DEADLINE_S
            )
            peaks = [each.reset() for each in watched]
            for each in watched:
                each.over = True
            n = founder.status()["params"]
            rounds = {name: max(peak[name] for peak in peaks) for name in FIELDS.values()}
            return Measured(n, rounds, joining, statistics.median(commits(second)) - pause_s)


def watch(pid: int) -> Peaks:
    peaks = Peaks(pid)
    threading.Thread(target=peaks.watch, daemon=True).start()
    return peaks


def together(node: harness.Node) -> int:
    """Rounds that both contributed to, as the node's log tells."""
    return node.log.read_text().count("contributions=2")


def at_rest(node: harness.Node) -> bool:
    """The last result has been applied."""
    status = node.status()
    return bool(status["epoch"] >= 1)


def commits(node: harness.Node) -> list[float]:
    """Seconds between two commits with two contributions."""
    lines = [line for line in node.log.read_text().splitlines() if "contributions=2" in line]
    times = [datetime.fromisoformat(json.loads(line)["time"]).timestamp() for line in lines]
    return [later - earlier for earlier, later in itertools.pairwise(times)]


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main()
