"""The main job: three nodes on this machine train one language model, and one of them is killed.

Each node has another third of the Python standard library's sources. What this script demands of them is in
`Swarm.conclude`. With --base the story is another one: quickstart_base.py tells it.

Run by scripts/quickstart, which makes the environment. Exit codes: 0 all held; 1 something did not, said in
one line; 2 the command line is wrong; 128 + n ended by signal n.
"""

from __future__ import annotations

import argparse
import math
import random
import shlex
import sys
import time
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

import quickstart_base
from _chains import ChainRecord
from _nodes import INSTALLED, Failed, Node, replace_key, run_command
from _processes import alive
from _show import Show, bytes_text, megabytes
from _story import Options, Signals, told
from _watch import GONE_S, Watch, verdict

NODES = 3
READY_S = 90.0  # to import, start p2pd and join: 10 s on two cores; a slow machine takes longer
PROGRESS_S = 90.0  # for what takes two or three epochs of 5 s each
ENDING_S = 40.0  # of the whole time, for stopping, exporting and sampling: 20 s on two cores
EPOCHS_BEFORE_KILL = 3
EPOCHS_WITHOUT = 2
LOSS_FALL_MIN = 0.30
INT8_BLOCK_BYTES_PER_VALUE = 1 + 4 / 256  # a code each, and a float32 scale per block of 256
FLOAT32_BYTES_PER_VALUE = 4
SAMPLE_BYTES = 200


def main(arguments: Sequence[str]) -> int:
    options = parsed(arguments)
    if options.base is not None:
        return quickstart_base.main(options, options.base)
    return told(lambda place, show: Swarm(options, place, show), "Tapestry quickstart", options)


def parsed(arguments: Sequence[str]) -> Options:
    parser = argparse.ArgumentParser(
        prog="scripts/quickstart",
        description="Three nodes on this machine train one model; one is killed and comes back. With --base "
        "they go on training an open base, each with another kind of text, and are compared with three that "
        "train alone.",
    )
    parser.add_argument(
        "--minutes", type=float, default=3.5, help="the whole length, about (default: 3.5); not with --base"
    )
    parser.add_argument("--base", type=Path, metavar="HFDIR", help="a Hugging Face directory to go on from")
    parser.add_argument(
        "--epochs",
        type=int,
        default=quickstart_base.EPOCHS,
        metavar="N",
        help=f"with --base: how many (default: {quickstart_base.EPOCHS})",
    )
    parser.add_argument(
        "--keep", type=Path, metavar="DIR", help="put homes, logs and model there, and leave them"
    )
    parser.add_argument(
        "--seed",
        type=int,
        default=0,
        help="of the model, of who is killed and when (default: 0, kills node 2)",
    )
    parser.add_argument("--plain", action="store_true", help="plain lines also on a terminal")
    parser.add_argument(
        "--tapestry", metavar="COMMAND", help="the command to run (default: the installed one)"
    )
    given = parser.parse_args(arguments)
    if not (math.isfinite(given.minutes) and 0 <= given.minutes <= 24 * 60):
        parser.error("--minutes: from 0 to 1440")
    if not 0 <= given.seed < 2**32:
        parser.error("--seed: from 0 to 4294967295")
    if (
        given.keep is not None
        and given.keep.exists()
        and (not given.keep.is_dir() or any(given.keep.iterdir()))
    ):
        parser.error(f"--keep: {given.keep} is there already: name a new or an empty folder")
    if not 1 <= given.epochs <= 1_000:
        parser.error("--epochs: from 1 to 1000")
    if given.base is not None and not (given.base / "config.json").is_file():
        parser.error(f"--base: {given.base} holds no config.json; scripts/real-base makes such a directory")
    return Options(
        minutes=given.minutes,
        base=None if given.base is None else given.base.absolute(),
        epochs=given.epochs,
        keep=given.keep,
        seed=given.seed,
        plain=given.plain,
        tapestry=tuple(shlex.split(given.tapestry)) if given.tapestry else INSTALLED,
    )


# ---- the story ---------------------------------------------------------------------------------------


class Swarm:
    """The three nodes, what was seen of them, and the story they are taken through."""

    def __init__(self, options: Options, place: Path, show: Show) -> None:
        self.options = options
        self.place = place
        self.show = show
        self.random = random.Random(options.seed)
        self.nodes = [
            Node(f"node {number}", place, options.tapestry, ("--data", f"stdlib:{number}/{NODES}"))
            for number in range(1, NODES + 1)
        ]
        self.watch = Watch(self.nodes, show, time.monotonic())

    def stop(self, signals: Signals) -> None:
        self.watch.stop_all(signals)

    def tell(self, signals: Signals) -> None:
        self._start_all()
        self._train_together()
        victim = self.random.choice(self.nodes)
        self._kill(victim)
        self._go_on_without(victim)
        self._bring_back(victim)
        self._train_until_time_is_up()

    def _start_all(self) -> None:
        founder = self.nodes[0]
        founder.make_home("--preset", "tiny", "--name", "quickstart")
        replace_key(founder.home / "run.toml", "seed", self.options.seed)
        self._start(founder, [])
        line = founder.invitation(uses=NODES - 1)
        for node in self.nodes[1:]:
            node.make_home_of_joiner()
            self._start(node, [line], wait=False)
        for node in self.nodes[1:]:
            self._wait_ready(node)

    def _start(self, node: Node, peers: list[str], *, wait: bool = True) -> None:
        self.show.event(f"{node.label}: {node.start(peers)}")
        if wait:
            self._wait_ready(node)

    def _wait_ready(self, node: Node) -> None:
        self.watch.wait(lambda: node.ready, f"{node.label} to be ready", READY_S)

    def _train_together(self) -> None:
        def together() -> bool:
            return sum(len(record.contributors) == NODES for record in self.records()) >= EPOCHS_BEFORE_KILL

        self.watch.wait(
            together, f"{EPOCHS_BEFORE_KILL} epochs with contributions of all three", READY_S + PROGRESS_S
        )

    def _kill(self, victim: Node) -> None:
        self.watch.sleep(self.random.uniform(0.0, 3.0))  # so that it falls into any phase of a round
        family = victim.kill()
        self.show.event(f"{victim.label}: killed with SIGKILL at epoch {victim.epoch}", bad=True)
        self.watch.wait(lambda: not alive(family), f"the children of {victim.label} to be gone", GONE_S)

    def _go_on_without(self, victim: Node) -> None:
        epoch = max(node.epoch for node in self.nodes)
        others = [node for node in self.nodes if node is not victim]

        def went_on() -> bool:
            without = [
                r for r in self.records(others[0]) if r.epoch > epoch and victim.peer_id not in r.contributors
            ]
            return len(without) >= EPOCHS_WITHOUT and all(
                n.epoch >= without[EPOCHS_WITHOUT - 1].epoch for n in others
            )

        self.watch.wait(went_on, f"{EPOCHS_WITHOUT} epochs of the other two", PROGRESS_S)
        numbers = " and ".join(node.label.removeprefix("node ") for node in others)
        self.show.event(
            f"nodes {numbers}: went on by themselves to epoch {min(node.epoch for node in others)}"
        )

    def _bring_back(self, victim: Node) -> None:
        """The same command again. A founder names one of the others: it has no peer to start from."""
        others = [node for node in self.nodes if node is not victim]
        self._start(victim, victim.peers or [others[0].address])
        epoch = max(node.epoch for node in others)

        def caught_up() -> bool:
            return victim.epoch >= epoch and victim.digest in self.watch.digests.get(victim.epoch, {})

        self.watch.wait(caught_up, f"{victim.label} to catch up with epoch {epoch}", PROGRESS_S)
        self.show.event(f"{victim.label}: caught up at epoch {victim.epoch}, the same bits as the others")

        def contributes() -> bool:
            return any(r.epoch > epoch and victim.peer_id in r.contributors for r in self.records(others[0]))

        self.watch.wait(contributes, f"a contribution of {victim.label}", PROGRESS_S)
        self.show.event(f"{victim.label}: contributes again")

    def _train_until_time_is_up(self) -> None:
        end_s = self.watch.began_s + self.options.minutes * 60 - ENDING_S
        self.watch.wait(lambda: time.monotonic() >= end_s, "the time to be up", 24 * 3600.0)
        self.watch.wait(self.watch.agreed, "all three to show one epoch and one state digest", PROGRESS_S)
        self.show.event(f"all three: epoch {self.nodes[0].epoch}, state digest {self.nodes[0].digest}")

    def records(self, node: Node | None = None) -> list[ChainRecord]:
        return (node or self.nodes[0]).records()

    # -- looking
    # -- the end

    def conclude(self, signals: Signals) -> None:
        agreed = self.nodes[0].epoch, self.nodes[0].digest
        self.show.finish()
        self.show.event("stopping the nodes")
        self.stop(signals)
        signals.ending = False
        self._report()
        faults = verdict(self.watch) + loss_faults(self.nodes)
        if faults:
            raise Failed(faults[0], [*faults[1:], *self.watch.last_words()])
        self._show_sample()
        took_s = time.monotonic() - self.watch.began_s
        self.show.event(
            f"OK: epoch {agreed[0]} has the same bits on all three nodes, as every epoch seen before it; "
            f"none was lost, the validation loss fell on all; {took_s:.0f} s in all"
        )

    def _report(self) -> None:
        show = self.show
        show.event("")
        for node in self.nodes:
            chain = node.records()
            contributed = sum(node.peer_id in record.contributors for record in chain)
            losses = " -> ".join(f"{loss:.3f} (epoch {epoch})" for epoch, loss in node.losses)
            show.event(f"{node.label}: validation loss {losses or 'never shown'}")
            show.event(f"        state digest {node.digest} at epoch {node.epoch}")
            show.event(f"        contributed to {contributed} of the {len(chain)} epochs in its chain")
            show.event(f"        sent {bytes_text(node.bytes_sent)}")
        chain = self.nodes[0].records()
        forced = sum(record.forced for record in chain)
        show.event(f"epochs  {len(chain)} committed, {forced} of them without a quorum")
        payload = sum(
            node.bytes_sent.get(kind, 0) for node in self.nodes for kind in ("contribution", "result")
        )
        as_float32 = payload / INT8_BLOCK_BYTES_PER_VALUE * FLOAT32_BYTES_PER_VALUE
        show.event(
            f"bytes   contributions and results: {megabytes(payload)} sent in 8 bits; float32 would have "
            f"been {megabytes(as_float32)} (x {as_float32 / payload if payload else math.nan:.2f})"
        )
        show.event(
            "        (sent bytes / 1.015625 bytes per value of int8-block * 4 bytes per float32; a killed"
        )
        show.event("        process counts up to the last look at it)")

    def _show_sample(self) -> None:
        """Export the shared base as a Hugging Face model and let it write. Raises Failed."""
        out = self.place / "model"
        self.show.event("\nexporting the model of node 1, to let it write; some seconds")
        command = [*self.options.tapestry, "export", str(out), "--home", str(self.nodes[0].home)]
        run_command(command, "tapestry export", READY_S)
        import torch

        from tapestry.node.lineage.huggingface import sample  # with torch and transformers 3 s to import

        torch.set_num_threads(1)  # for one byte after another, more threads cost more than they bring
        prompt = "def "
        text = sample(out, prompt, SAMPLE_BYTES, self.options.seed)
        self.show.event(f"\n{SAMPLE_BYTES} bytes of the exported model after {prompt!r}:\n\n{prompt}{text}\n")


def loss_faults(nodes: Sequence[Node]) -> list[str]:
    """Measured from the run's start: who joins later sees a model that has learned already."""
    if not all(node.losses for node in nodes):
        return [f"{node.label}: never showed a validation loss" for node in nodes if not node.losses]
    _, start = min(node.losses[0] for node in nodes)
    return [
        f"{node.label}: validation loss {node.losses[-1][1]:.3f} is not {LOSS_FALL_MIN:.0%} below {start:.3f}"
        for node in nodes
        if not node.losses[-1][1] <= (1 - LOSS_FALL_MIN) * start
    ]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
