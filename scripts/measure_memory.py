"""Memory of the node process per parameter, over what it takes with hardly any.

    .venv/bin/python -P scripts/measure_memory.py [--rounds 4]

Starts two nodes of preset nano and then two of preset small (about 10M parameters) on loopback, lets each
pair commit some rounds together, and compares the peak resident memory (VmHWM: shared buffers counted in
full) of the founder's node process. Training is cut to two tiny steps: the node does not depend on it.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

from e2e.harness import Digests, Node, init

STEPS = {"inner_steps": "2", "batch_size": "1", "sequence_length": "16", "checkpoint_every_epochs": "2"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=4, help="committed by both nodes, of each size")
    rounds = parser.parse_args().rounds
    with tempfile.TemporaryDirectory() as folder:
        small = measure(Path(folder) / "nano", "nano", rounds)
        large = measure(Path(folder) / "small", "small", rounds)
    extra = (large[0] - small[0]) / (large[1] - small[1])
    for name, (peak, params) in (("nano", small), ("small", large)):
        print(f"{name:6} {params:>11,} parameters  peak {peak / 2**20:7.1f} MiB")
    print(f"{extra:.1f} bytes per parameter")


def measure(folder: Path, preset: str, rounds: int) -> tuple[int, int]:
    """Peak bytes of the founder's node process, and the number of parameters."""
    folder.mkdir()
    with Node(init(folder / "a", preset, **STEPS)) as founder:
        founder.wait_ready()
        with Node(folder / "b", "--peer", founder.address, data="stdlib:2/3") as second:
            second.wait_ready()
            start = second.status()["epoch"]
            digests = Digests(founder, second)
            digests.wait("rounds", lambda: second.status()["epoch"] >= start + rounds, deadline_s=300)
            return peak_bytes(founder.pid), founder.status()["params"]


def peak_bytes(pid: int) -> int:
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise SystemExit("this system does not tell VmHWM")


if __name__ == "__main__":
    main()
