"""Two members continue all of a base's parameters: seconds to the first step, three epochs, the export.

    .venv/bin/python -P scripts/bench/full_base.py --base DIR [--batch 2] [--length 128] [--steps 4]

DIR is a Hugging Face directory; the second member joins with a copy of its own. Told are the seconds from
the start of `init` to the founder's first optimizer step, of each epoch, and of the export; whether each
epoch had one state digest, and the largest difference between the logits of the export and those of the
state in the home; and what `verify` of the home, `exit`, and `verify` of what that wrote take, with the
memory of each at its peak. Exit 1 if a digest differs, a difference is above 1e-4, or a verification fails.

Beside the seconds to the first step are those of a processor, of all processes together: where others have
the cores, these say more.
"""

from __future__ import annotations

import argparse
import contextlib
import re
import resource
import sys
import tempfile
import time
from pathlib import Path

import psutil

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent / "tests"))

from e2e.exports import export, logits_of, logits_of_home
from e2e.harness import Digests, Node, init

DEADLINE_S = 1800.0
EPOCHS = 3
DIFFERENCE_MAX = 1e-4


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--base", type=Path, required=True)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--steps", type=int, default=4)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        return story(options, Path(folder))


def story(options: argparse.Namespace, folder: Path) -> int:
    began_s = time.monotonic()
    home = init(
        folder / "a",
        "--base",
        options.base,
        is_open=True,
        inner_steps=str(options.steps),
        batch_size=str(options.batch),
        sequence_length=str(options.length),
        checkpoint_every_epochs="1",
    )
    init_cpu_s = sum(resource.getrusage(resource.RUSAGE_CHILDREN)[:2])
    say("init", began_s, init_cpu_s)
    with Node(home) as founder:
        founder.wait("first step", lambda: steps(founder) > 0, DEADLINE_S)
        say("init to the founder's first step", began_s, init_cpu_s + cpu_s(founder))
        began_s = time.monotonic()
        with Node(
            folder / "b", "--peer", founder.address, "--base", options.base, data="stdlib:2/3"
        ) as second:
            second.wait_ready(DEADLINE_S)
            say("the second member's start to its being ready", began_s)
            three_epochs(founder, second)
            for node in (second, founder):
                began_s = time.monotonic()
                assert node.stop(60) == 0, node.tail()
                say(f"{node.home.name} stops", began_s)
    began_s = time.monotonic()
    export(folder / "model", home)
    say("export", began_s)
    difference = (logits_of(folder / "model") - logits_of_home(home)).abs().max().item()
    print(f"largest difference of logits, export against home: {difference:.2e}")
    proven = [measured("verify", home), measured("exit", folder / "out", "--home", home)]
    proven.append(measured("verify", folder / "out"))
    return int(not difference <= DIFFERENCE_MAX or any(proven))


def measured(command: str, *arguments: str | Path) -> int:
    """The exit code of a `tapestry` command."""
    began_s, before_s = time.monotonic(), sum(resource.getrusage(resource.RUSAGE_CHILDREN)[:2])
    argv = [sys.executable, "-P", "-m", "tapestry.node.cli", command, *map(str, arguments)]
    process = psutil.Popen(argv)
    own = mapped = 0
    while process.poll() is None:
        with contextlib.suppress(psutil.Error):
            memory = process.memory_info()
            own, mapped = max(own, memory.rss - memory.shared), max(mapped, memory.shared)
        time.sleep(0.05)
    used_s = sum(resource.getrusage(resource.RUSAGE_CHILDREN)[:2]) - before_s
    what = f"{command} {Path(arguments[0]).name}, exit code {process.returncode}"
    say(f"{what}, {own / 1e6:.0f} MB of its own, {mapped / 1e6:.0f} MB of mapped files", began_s, used_s)
    return int(process.returncode)


def three_epochs(first: Node, second: Node) -> None:
    """Raises AssertionError if an epoch has two digests."""
    digests = Digests(first, second)
    begin = second.status()["epoch"]
    for epoch in range(begin + 1, begin + EPOCHS + 1):
        began_s = time.monotonic()
        digests.wait(f"epoch {epoch}", lambda epoch=epoch: second.status()["epoch"] >= epoch, DEADLINE_S)
        say(f"epoch {epoch}", began_s)
    digests.wait("an epoch on both", lambda: any(len(n) == 2 for n in digests.shared.values()), DEADLINE_S)
    for epoch, (digest, _) in sorted(digests.seen.items()):
        print(f"epoch {epoch}: state digest {digest[:16]} on {len(digests.shared[epoch])} of 2 nodes")


def steps(node: Node) -> float:
    found = re.search(r"^tapestry_train_steps_total (\S+)", node.get("/metrics"), re.MULTILINE)
    return float(found[1]) if found else 0.0


def cpu_s(node: Node) -> float:
    """Of its processes, since they started."""
    times = [process.cpu_times() for process in (psutil.Process(node.pid), *node.children())]
    return sum(one.user + one.system for one in times)


def say(what: str, began_s: float, processor_s: float | None = None) -> None:
    of_it = f", {processor_s:.1f} s of a processor" if processor_s is not None else ""
    print(f"{time.monotonic() - began_s:7.1f} s  {what}{of_it}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
