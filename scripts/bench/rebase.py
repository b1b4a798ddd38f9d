"""What is left of a derivative after its base has moved on, and what that costs beside making it again.

    OMP_NUM_THREADS=1 .venv/bin/python -P scripts/bench/rebase.py --base DIR --members FOLDER... \
        --own FOLDER... [--rebases task:0.05 ties:0.05]

Members with one folder of text each continue a base for --epochs rounds, in one process and without a
network: the product's inner loop, codec, reduce and outer step, with the settings that `init --base` writes
but for the length of a round; the rounds become signed records and updates in a home. From its epoch 0 a
derivative is made of each --own folder by `derive`; when the base has moved, it is brought there by `rebase`,
once for each of --rebases (a way and the repair as a share of the steps), and made again by `derive` from the
new base. All that is measured and timed is in the derivatives' own files. An --own folder that is a member's
too is parted: every fourth of its files is the derivative's, up to --own-bytes, the others are the member's.

    loss        held out of the derivative's own text, per token
    of the old  the gain over the new base, as a share of what the derivative had gained over the old one
    left        the loss below the old base's, as a share of the same: with what the base has learnt
                meanwhile; what gain_kept_min in gates.toml looks at
    of again    the gain over the new base, as a share of what the one that was made again has over it
    cost        seconds of training, as a share of making it again
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent / "tests"))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
sys.path.insert(0, str(Path(__file__).resolve().parent))

import numpy as np
import torch
from _bench import into, machine, table, write_json
from homes import MadeHome, make_run
from learning import Text, load_text
from torch import Tensor

from tapestry.compression.reduce import reduce_shard
from tapestry.node.lineage.adopt import adopt
from tapestry.node.sovereign import build
from tapestry.node.sovereign.derivative import Shelf, Transplant, Version
from tapestry.node.sovereign.recipe import REPAIR_SHARE, Recipe
from tapestry.node.spec.declared import append, parse_declaration
from tapestry.node.spec.recipe import recipe as as_init_writes
from tapestry.node.spec.run import RunSpec
from tapestry.node.trainer.data.corpus import Batch
from tapestry.node.trainer.inner import InnerLoop
from tapestry.node.trainer.models import registry
from tapestry.node.trainer.tokenizers.base import BaseTokenizer, eos_id_of

OWN_EVERY = 4  # files; guess: a derivative has less text than its member


def main() -> int:
    options = parse()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="tapestry-rebase-", dir=options.folder) as folder:
        bench = Bench(options, Path(folder))
        derived = [bench.derive(own) for own in bench.own]
        bench.move()
        rows: list[list[object]] = []
        for own, version in zip(bench.own, derived, strict=True):
            rows += bench.rows(own, version)
            write_json(options.json, {"machine": machine(), "options": str(options), "rows": rows})
    print(f"{machine()}\n")
    print(table(HEAD, rows))
    return 0


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--base", required=True, metavar="HFDIR")
    parser.add_argument(
        "--members", nargs="+", required=True, metavar="FOLDER", help=".txt files of a member"
    )
    parser.add_argument("--own", nargs="+", required=True, metavar="FOLDER", help="a derivative's text")
    parser.add_argument("--lora", type=int, default=16, help="of the run; 0: it trains all parameters")
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--inner-steps", type=int, default=4)
    parser.add_argument("--member-batch", type=int, default=2, help="windows of a member's step")
    parser.add_argument("--length", type=int, default=64, help="tokens of a window")
    parser.add_argument("--method", choices=["full", "lora"], default="lora", help="of the derivatives")
    parser.add_argument("--steps", type=int, default=80, help="of making a derivative")
    parser.add_argument("--batch", type=int, default=4, help="windows of its step")
    parser.add_argument("--own-bytes", type=int, default=500_000, help="text of a derivative")
    parser.add_argument(
        "--rebases", nargs="+", default=["task:0", f"task:{REPAIR_SHARE}"], metavar="WAY:REPAIR"
    )
    parser.add_argument("--folder", help="where homes are made: 5 GB; default: the temporary folder")
    parser.add_argument("--json", type=Path)
    return parser.parse_args()


HEAD = ("own text", "", "loss", "gain", "of the old %", "left %", "of again %", "steps", "s", "cost %")


class Bench:
    """A home whose base moves, and the derivatives in it."""

    def __init__(self, options: argparse.Namespace, folder: Path) -> None:
        self.options = options
        self.own = [Path(one) for one in options.own]
        self._folder = folder
        texts = [self._parted(Path(one)) for one in options.members]
        for one in self.own:
            self._parted(one)
        spec = self._spec()
        weights = None if options.lora else Path(options.base)
        self._made = make_run(folder / "home", spec, members=len(texts), weights=weights)
        base = self._made.home.base
        tokenizer = BaseTokenizer(base / "tokenizer.json", eos_id_of(base))
        self._texts = [load_text(text, tokenizer) for text in texts]
        for one in self.own:
            source = self._own_text(one)
            append(self._made.home, [parse_declaration("us, CC0-1.0, open", str(source), "derive:*")])

    def _spec(self) -> RunSpec:
        options = self.options
        adopted = adopt(
            options.base, self._folder / "home" / "base", "rebase", weights=True, lora_rank=options.lora
        )
        spec = as_init_writes(adopted.spec)
        train = dataclasses.replace(
            spec.train, inner_steps=options.inner_steps, batch_size=options.member_batch
        )
        data = dataclasses.replace(spec.data, sequence_length=options.length)
        return dataclasses.replace(spec, train=train, data=data)

    # --- text -------------------------------------------------------------------------------------------

    def _own_text(self, folder: Path) -> Path:
        return self._folder / "own" / folder.name

    def _parted(self, folder: Path) -> Path:
        """Copies; gives the member's part. A folder that is parted already stays as it is."""
        own, member = self._own_text(folder), self._folder / "members" / folder.name
        if own.exists():
            return member
        own.mkdir(parents=True)
        member.mkdir(parents=True)
        taken = 0
        for number, path in enumerate(sorted(folder.rglob("*.txt"))):
            mine = number % OWN_EVERY == 0
            if mine and taken >= self.options.own_bytes:
                continue
            shutil.copyfile(path, (own if mine else member) / path.name)
            taken += path.stat().st_size if mine else 0
        return member

    # --- the base moves ---------------------------------------------------------------------------------

    def move(self) -> None:
        began_s = time.monotonic()
        members = [_Member(self._made, text) for text in self._texts]
        for epoch in range(self.options.epochs):
            contributions = [member.contribution(epoch, self._made.params) for member in members]
            self._made.take(_reduced(self._made, contributions), self._made.identities)
            said = " ".join(f"{member.loss:.3f}" for member in members)
            tell(f"epoch {epoch + 1} after {time.monotonic() - began_s:.0f} s: training loss {said}")

    # --- derivatives ------------------------------------------------------------------------------------

    def derive(self, own: Path, name: str = "old") -> Version:
        options = self.options
        recipe = Recipe(
            "cpt",
            options.method,
            (str(self._own_text(own)),),
            steps=options.steps,
            batch_size=options.batch,
            sequence_length=options.length,
        )
        built = build.derive(self._made.home, f"{name}-{own.name}", recipe, None, told=quiet)
        tell(f"{own.name} {name}: {_loss(built.version):.4f}, its base {_base_loss(built.version):.4f}")
        return built.version

    def rows(self, own: Path, old: Version) -> list[list[object]]:
        """The table's, of one derivative."""
        brought = [(one, self._rebased(own, *one.split(":"))) for one in self.options.rebases]
        again = self.derive(own, "again")
        rows: list[list[object]] = [
            [own.name, "the old base", f"{_base_loss(old):.4f}"],
            [
                "",
                "on it",
                f"{_loss(old):.4f}",
                f"{_gain(old):.4f}",
                "",
                "",
                "",
                old.steps,
                f"{old.seconds:.0f}",
            ],
            ["", "the new base", f"{_base_loss(again):.4f}"],
        ]
        rows += [["", what, *_figures(version, old, again)] for what, version in brought]
        rows.append(["", "made again", *_figures(again, old, again)])
        return [row + [""] * (len(HEAD) - len(row)) for row in rows]

    def _rebased(self, own: Path, way: str, repair: str) -> Version:
        """Of a copy: a version stands on one base."""
        shelf, name = Shelf(self._made.home), f"{way}-{round(1000 * float(repair))}-{own.name}"
        shutil.copytree(shelf.of(f"old-{own.name}"), shelf.of(name), copy_function=os.link)
        (shelf.of(name) / "derivative.json").unlink()
        shelf.write(dataclasses.replace(shelf.require(f"old-{own.name}"), name=name), 1)
        how = Transplant(way)  # type: ignore[arg-type]  # the command line says what there is
        built = build.rebase(self._made.home, name, None, how, repair_share=float(repair), told=quiet)
        tell(f"{own.name} {way} {repair}: {_loss(built.version):.4f} in {built.version.seconds:.0f} s")
        return built.version


def _loss(version: Version) -> float:
    return version.report[0].value


def _base_loss(version: Version) -> float:
    return version.base_report[0].value


def _gain(version: Version) -> float:
    return _base_loss(version) - _loss(version)


def _figures(version: Version, old: Version, again: Version) -> list[object]:
    left = (_base_loss(old) - _loss(version)) / _gain(old)
    return [
        f"{_loss(version):.4f}",
        f"{_gain(version):.4f}",
        f"{100 * _gain(version) / _gain(old):.1f}",
        f"{100 * left:.1f}",
        f"{100 * _gain(version) / _gain(again):.1f}",
        version.steps,
        f"{version.seconds:.0f}",
        f"{100 * version.seconds / again.seconds:.1f}",
    ]


# --- a round ------------------------------------------------------------------------------------------


class _Member:
    """One that trains: its text, and the product's inner loop."""

    def __init__(self, made: MadeHome, text: Text) -> None:
        spec = made.spec
        model = registry.build(spec.model, made.home.base, spec.data.sequence_length).float()
        self._text, self._length = text, spec.data.sequence_length + 1
        self._batch, self._steps = spec.train.batch_size, spec.train.inner_steps
        layout = registry.layout_of(model)
        self._loop = InnerLoop(model, layout, spec.train, self._draw, torch.device("cpu"))
        self._vector = torch.empty(layout.n)
        self.loss = 0.0

    def _draw(self, epoch: int, step: int) -> Batch:
        first = (epoch * self._steps + step) * self._batch
        return Batch(self._text.windows(0, first + np.arange(self._batch), self._length), None)

    def contribution(self, epoch: int, base: Tensor) -> Tensor:
        self._loop.begin(epoch, base)
        while not self._loop.done:
            self._loop.step()
        self.loss = self._loop.finish(base, into(self._vector)).loss
        return self._vector


def _reduced(made: MadeHome, contributions: Sequence[Tensor]) -> list[Tensor]:
    arithmetic = made.state.arithmetic
    codec, payloads = arithmetic.codec, []
    for shard in arithmetic.shards:
        parts = [codec.encode(vector[shard.start : shard.stop]) for vector in contributions]
        payloads.append(reduce_shard(parts, [1] * len(parts), codec, shard.n))
    return payloads


def quiet(_what: str, _done: int, _total: int) -> None:
    return None


def tell(text: str) -> None:
    print(f"# {text}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
