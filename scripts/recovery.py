"""How long real daemons take to recover from one fault at a time, and whether they do what is guaranteed.

    .venv/bin/python -P scripts/recovery.py [--only kill,freeze,...] [--repeat 4] [--json FILE] [--keep DIR]

Nodes are the founder of a run and those whom it invited, on loopback with the default timings (stall_s 5,
quorum_loss_s 30), the model `nano`, and epochs of about a second. Times are taken where they count: at the
moment in which a record is on a node's disk. What a round normally takes is the median of the rounds before
the fault, in the same run. The scenarios:

    kill      SIGKILL of one of 4 nodes while it exchanges shards; then its restart
    freeze    SIGSTOP of one of 4 nodes while it exchanges shards; then SIGCONT
    trainer   SIGKILL of a trainer; a trainer that runs out of memory
    quorum    SIGKILL of two of 3 nodes at once, with either policy; then both are started again
    apart     two of 4 nodes in network namespaces cannot reach each other, for a minute (needs root)
    islands   5 nodes in network namespaces, cut into 2 and 3 for a minute, and joined again (needs root)
    parted    the same for five minutes: longer than links are kept up and presence lasts
    torchft   SIGKILL of one of 4 torchft replicas, beside ours; with --torchft PYTHON, which can import it

Exit 1 if a guarantee did not hold or a limit was passed; what and how far is printed.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

from _run import exit_by_signal, work_folder
from faults.apart import apart
from faults.freeze import freeze
from faults.islands import islands, parted
from faults.kill import kill
from faults.quorum import quorum
from faults.row import Row
from faults.torchft import torchft
from faults.trainer import trainer

Scenario = Callable[[Path, int, random.Random], list[Row]]
SCENARIOS: dict[str, Scenario] = {
    "kill": kill,
    "freeze": freeze,
    "trainer": trainer,
    "quorum": quorum,
    "apart": apart,
    "islands": islands,
    "parted": parted,
}
COMPARISONS: dict[str, Scenario] = {"torchft": torchft}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default=",".join(SCENARIOS), help="scenarios, with commas between")
    parser.add_argument("--repeat", type=int, default=4, help="how often each")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--torchft", type=Path, help="the python of an environment that has torchft")
    parser.add_argument("--json", type=Path, help="write the figures there")
    parser.add_argument("--keep", type=Path, help="leave homes and logs in this new folder")
    options = parser.parse_args()
    names = options.only.split(",")
    scenarios = SCENARIOS
    if options.torchft:
        os.environ["TORCHFT_PYTHON"] = str(options.torchft)
        scenarios = SCENARIOS | COMPARISONS
    if not all(name in scenarios for name in names):
        parser.error(f"scenarios are {', '.join(scenarios)}")
    signal.signal(signal.SIGTERM, exit_by_signal)
    rows: list[Row] = []
    with work_folder(options.keep, "tapestry-recovery-") as folder:
        for name in names:
            load = os.getloadavg()[0]
            began = time.monotonic()
            try:
                found = scenarios[name](folder / name, options.repeat, random.Random(options.seed))
            except AssertionError as error:
                found = [Row(name, "ran to its end", None, missed=[str(error)])]
            print(f"# {name}: {time.monotonic() - began:.0f} s, load before {load:.1f}", flush=True)
            for row in found:
                print(
                    row.line(), *(f"    {text}" for text in (*row.notes, *row.missed)), sep="\n", flush=True
                )
            rows += found
    print("\n| fault | what is guaranteed | times | median s | worst s | limit s | |")
    print("|---|---|---:|---:|---:|---:|---|")
    for row in rows:
        print(row.line())
    if options.json is not None:
        options.json.write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n")
    return 1 if any(row.missed for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
