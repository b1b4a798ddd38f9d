"""The same job on a real base: three members with different text go on training one open model, through LoRA.

One node holds the base; two others join it with nothing but its address and take the base from it. One has
Python sources, one C++ headers, one English prose, and none sends any of it. Then each trains once more from
the same base, alone, with the same numbers, on the same tokens. Held-out text of each kind is measured before
and after by `transformers`, on the models that `tapestry export` wrote.

What must hold is in `Members.conclude`: every epoch has the same bits on all three, none was lost, all three
contributed to each, the loss fell for every member, and the model writes words. That together beats alone is
shown, not demanded: it takes more tokens than a quarter of an hour has on two cores.

Run by scripts/quickstart --base DIR; scripts/real-base makes such a directory.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from _chains import chain_faults
from _nodes import EXPORT_S, Failed, Node, replace_key, run_command
from _show import Show, bytes_text
from _story import Options, Signals, told
from _texts import DECLARATION, NoText, Text, copied_texts
from _watch import Watch, end_faults, verdict

EPOCHS = 6
RANK = 16
SEQUENCE_LENGTH = 128
# What differs from a new run's numbers, for a run as short as this: section, key, value.
NUMBERS: tuple[tuple[str, str, object], ...] = (
    ("data", "sequence_length", SEQUENCE_LENGTH),
    ("train", "batch_size", 2),
    ("train", "inner_steps", 4),
    ("train", "warmup_steps", 4),
    ("train", "lr", 1e-3),
    ("limits", "checkpoint_every_epochs", 1),
)
READY_S = 300.0  # with the base on its way from the first node: 30 s on two cores
EPOCH_S = 150.0  # at most; 25 s on two cores
MEASURED_WINDOWS = 16  # of each held-out text, as long as a training sample: 2,048 tokens
MEASURED_AT_ONCE = 4
PROMPT = "The history of the city begins"  # code would follow what the members' own texts begin with
SAMPLE_TOKENS = 120
WORDS_KNOWN_MIN = 0.6  # of the sample's words; what a broken model writes has none
WORDS_MIN = 15


def main(options: Options, base: Path) -> int:
    return told(lambda place, show: Members(options, base, place, show), "Tapestry on a real base", options)


@dataclass
class Losses:
    """Mean loss in nats a token on the held-out text of each member, in their order."""

    before: list[float] = field(default_factory=list)
    together: list[float] = field(default_factory=list)
    alone: list[list[float]] = field(default_factory=list)  # [member whose model it is][whose text]


class Members:
    """The three members, together and then each alone, and what became of their losses."""

    def __init__(self, options: Options, base: Path, place: Path, show: Show) -> None:
        self.options, self.base, self.place, self.show = options, base, place, show
        began_s = time.monotonic()
        try:
            self.texts = copied_texts(place / "text", options.seed)
        except (NoText, OSError) as error:
            raise Failed(str(error)) from error
        self.together = Watch([self._node("node", number) for number in (1, 2, 3)], show, began_s)
        self.alone = Watch([self._node("lone", number) for number in (1, 2, 3)], show, began_s, one_run=False)

    def _node(self, kind: str, number: int) -> Node:
        text = self.texts[number - 1]
        flags = ["--data", str(text.folder), "--validation", f"held-out={text.held_out_file}"]
        flags += ["--declare", DECLARATION]
        lone = kind == "lone"
        if lone:
            flags += ["--epochs", str(self.options.epochs)]
        return Node(f"{kind} {number}", self.place, self.options.tapestry, tuple(flags), ends_by_itself=lone)

    def stop(self, signals: Signals) -> None:
        self.together.stop_all(signals)
        self.alone.stop_all(signals)

    def tell(self, signals: Signals) -> None:
        for node, text in zip(self.together.nodes, self.texts, strict=True):
            self.show.event(f"{node.label}: has {text.what}, {_bytes_in(text.folder) / 1e3:.0f} kB")
        self._make_homes()
        self._train_together()
        self.together.stop_all(signals)
        signals.ending = False
        self._train_alone()

    def _make_homes(self) -> None:
        """One `tapestry init` for all: who trains alone starts from a copy of the same run spec and base."""
        founder = self.together.nodes[0]
        began_s = time.monotonic()
        founder.make_home("--base", str(self.base), "--lora", str(RANK), "--name", "quickstart")
        self.show.event(
            f"node 1: tapestry init --base {self.base} --lora {RANK}: {time.monotonic() - began_s:.0f} s"
        )
        spec = founder.home / "run.toml"
        for section, key, value in (*NUMBERS, ("model", "seed", self.options.seed)):
            replace_key(spec, key, value, section)
        for lone in self.alone.nodes:
            shutil.copytree(founder.home, lone.home)
        # So that all three train from epoch 0 on: without, the first would begin by itself.
        replace_key(spec, "min_members", len(self.together.nodes), "round")
        others = self.together.nodes[1:]
        for node in others:
            node.make_home_of_joiner()
        replace_key(spec, "founders", json.dumps([node.make_id() for node in others]), "members")

    def _train_together(self) -> None:
        watch, epochs = self.together, self.options.epochs
        founder = watch.nodes[0]
        self.show.event(f"{founder.label}: {founder.start([])}")
        watch.wait(lambda: founder.ready, "node 1 to be ready", READY_S)
        for node in watch.nodes[1:]:
            self.show.event(f"{node.label}: {node.start([founder.address])}")
        watch.wait(lambda: all(node.digest for node in watch.nodes), "all three to have the base", READY_S)
        self.show.event(f"all three have the base: {self._elapsed_s():.0f} s")
        watch.wait(
            lambda: watch.agreed() and founder.epoch >= epochs,
            f"epoch {epochs}, with one state digest on all three",
            READY_S + EPOCH_S * epochs,
        )
        self.show.event(
            f"all three: epoch {founder.epoch}, state digest {founder.digest[:16]}: {self._elapsed_s():.0f} s"
        )

    def _train_alone(self) -> None:
        """Each from the same base, on its own text, as many tokens; without peers."""
        watch, epochs = self.alone, self.options.epochs
        self.show.event("now each trains alone from the same base, with the same numbers")
        for lone in watch.nodes:
            self.show.event(f"{lone.label}: {lone.start([])}")
        watch.wait(
            lambda: not any(lone.running for lone in watch.nodes),
            f"three times {epochs} epochs alone",
            READY_S + EPOCH_S * epochs,
        )
        self.show.event(f"all three have trained alone: {self._elapsed_s():.0f} s")

    # -- the end

    def conclude(self, signals: Signals) -> None:
        self.show.finish()
        self._judge(verdict(self.together) + self._faults_of_epochs())
        self._judge([fault for lone in self.alone.nodes for fault in self._faults_of_lone(lone)])
        for line in self._epoch_lines():
            self.show.event(line)
        self.show.event("\nmeasuring the held-out texts, and letting the model write; a minute or two")
        measure = Measure(self.base, [text.held_out for text in self.texts])
        losses = self._measured(measure)
        for line in loss_table(self.texts, losses):
            self.show.event(line)
        sample = measure.sample(self.place / "model", self.options.seed)
        self.show.event(f"\nthe shared model after {PROMPT!r}:\n\n{PROMPT}{sample}\n")
        self._judge(loss_faults(self.texts, losses) + sample_faults(sample, self.texts))
        self.show.event(
            f"OK: epoch {self.options.epochs} has the same bits on all three members, as every epoch before "
            f"it; none was lost, the loss fell for each; {self._elapsed_s():.0f} s in all"
        )

    def _judge(self, faults: list[str]) -> None:
        if faults:
            more = [*self.together.last_words(), *self.alone.last_words()]
            raise Failed(faults[0], [*faults[1:], *more])

    def _faults_of_epochs(self) -> list[str]:
        everyone = {node.peer_id for node in self.together.nodes}
        chain = self.together.nodes[0].records()[: self.options.epochs]
        return [
            f"epoch {record.epoch}: {len(record.contributors)} of {len(everyone)} members contributed"
            for record in chain
            if record.contributors != everyone
        ]

    def _faults_of_lone(self, lone: Node) -> list[str]:
        chain = lone.records()
        faults = chain_faults(lone.label, chain, lone.info["run_id"], {}) + end_faults([lone])
        if len(chain) != self.options.epochs:
            faults.append(f"{lone.label}: made {len(chain)} epochs in place of {self.options.epochs}")
        return faults

    def _epoch_lines(self) -> list[str]:
        nodes = self.together.nodes
        seen = [
            f"epoch {epoch:2}: state digest {digest[:16]} on {len(labels)} of {len(nodes)} nodes"
            for epoch, digests in sorted(self.together.digests.items())
            for digest, labels in digests.items()
            if epoch <= self.options.epochs
        ]
        sent = [f"{node.label}: sent {bytes_text(node.bytes_sent)}" for node in nodes]
        return ["", *seen, *sent]

    def _measured(self, measure: Measure) -> Losses:
        model = self._exported(self.together.nodes[0], "model")
        self._judge(self._faults_of_export(model))
        losses = Losses(before=measure.losses(self.base), together=measure.losses(model))
        for lone in self.alone.nodes:
            folder = self._exported(lone, f"model-of-{lone.home.name}")
            losses.alone.append(measure.losses(folder))
            shutil.rmtree(folder)  # half a GB
        return losses

    def _faults_of_export(self, model: Path) -> list[str]:
        """Whether it is of the state that all three showed."""
        digest = json.loads((model / "tapestry.json").read_bytes())["state_digest"]
        if digest in self.together.digests.get(self.options.epochs, {digest}):
            return []
        return [f"the exported model has state digest {digest[:16]}, not the one that the nodes showed"]

    def _exported(self, node: Node, name: str) -> Path:
        out = self.place / name
        where = ["--home", str(node.home), "--epoch", str(self.options.epochs)]
        run_command([*self.options.tapestry, "export", str(out), *where], "tapestry export", EXPORT_S)
        return out

    def _elapsed_s(self) -> float:
        return time.monotonic() - self.together.began_s


# ---- what the models are worth -------------------------------------------------------------------------


class Measure:
    """The held-out texts, tokenized, and what a model makes of them. With torch, 5 s to import."""

    def __init__(self, base: Path, texts: Sequence[str]) -> None:
        import torch
        import transformers

        transformers.logging.set_verbosity_error()
        transformers.logging.disable_progress_bar()
        torch.set_num_threads(len(os.sched_getaffinity(0)))  # the nodes have ended: all cores are free
        tokenizer = transformers.AutoTokenizer.from_pretrained(base)
        self._windows = [_windows(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in texts]

    def losses(self, folder: Path) -> list[float]:
        """Of each text, in nats a token."""
        model = _loaded(folder)
        return [self._loss(model, windows) for windows in self._windows]

    def _loss(self, model: Any, windows: list[list[int]]) -> float:
        import torch

        total = 0.0
        with torch.no_grad():
            for start in range(0, len(windows), MEASURED_AT_ONCE):
                ids = torch.tensor(windows[start : start + MEASURED_AT_ONCE])  # int64 (n, length + 1)
                logits = model(input_ids=ids[:, :-1]).logits
                loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
                total += loss.item() * len(ids)
        return total / len(windows)

    def sample(self, folder: Path, seed: int) -> str:
        """What the model writes after the prompt, read with the tokenizer that was exported with it."""
        import torch
        import transformers

        tokenizer, model = transformers.AutoTokenizer.from_pretrained(folder), _loaded(folder)
        torch.manual_seed(seed)
        prompt = tokenizer(PROMPT, return_tensors="pt", add_special_tokens=False)
        ids = model.generate(
            input_ids=prompt["input_ids"],
            attention_mask=prompt["attention_mask"],
            max_new_tokens=SAMPLE_TOKENS,
            do_sample=True,
            temperature=0.6,
            pad_token_id=0,
        )
        written = ids[0, prompt["input_ids"].shape[1] :]
        return str(tokenizer.decode(written, skip_special_tokens=True))


def _loaded(folder: Path) -> Any:
    import torch
    import transformers

    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def _windows(ids: list[int]) -> list[list[int]]:
    """Windows of SEQUENCE_LENGTH + 1 tokens from all over the text, at most MEASURED_WINDOWS."""
    length = SEQUENCE_LENGTH + 1
    windows = [ids[start : start + length] for start in range(0, len(ids) - length + 1, length)]
    return windows[:: -(-len(windows) // MEASURED_WINDOWS)] if windows else [ids]


def loss_table(texts: Sequence[Text], losses: Losses) -> list[str]:
    """Each member's own text; then all texts, for that is what the shared model is for."""
    tokens = MEASURED_WINDOWS * SEQUENCE_LENGTH
    lines = [
        "",
        f"loss on held-out text, nats a token, about {tokens:,} tokens of each member's own:",
        "",
        f"{'member':8}{'text':18}{'before':>8}{'together':>10}{'alone':>8}",
    ]
    for index, text in enumerate(texts):
        row = losses.before[index], losses.together[index], losses.alone[index][index]
        lines.append(f"{f'node {index + 1}':8}{text.what:18}{row[0]:8.3f}{row[1]:10.3f}{row[2]:8.3f}")
    mean = statistics.fmean
    everywhere = mean(losses.before), mean(losses.together), mean(mean(row) for row in losses.alone)
    lines.append(f"{'':8}{'all three texts':18}{everywhere[0]:8.3f}{everywhere[1]:10.3f}{everywhere[2]:8.3f}")
    better = sum(losses.together[index] < losses.alone[index][index] for index in range(len(texts)))
    return [
        *lines,
        "",
        "together: the one model that all three hold. alone: from the same base, with the same numbers,",
        "on as many tokens of the member's own text, nothing averaged; in the last line the mean of the",
        "three lone models over all three texts. On its own text the loss is lower together than alone for",
        f"{better} of {len(texts)} members.",
    ]


def loss_faults(texts: Sequence[Text], losses: Losses) -> list[str]:
    return [
        f"node {index + 1}: its loss on {text.what} is {after:.3f}, not below {before:.3f}"
        for index, (text, before, after) in enumerate(zip(texts, losses.before, losses.together, strict=True))
        if not after < before
    ]


def sample_faults(sample: str, texts: Sequence[Text]) -> list[str]:
    """Whether it reads like language: words that occur in the members' texts, and more than a few."""
    known = {word for text in texts for word in _words(f"{text.trained} {text.held_out}")}
    words = _words(sample)
    share = sum(word in known for word in words) / max(len(words), 1)
    if len(set(words)) < WORDS_MIN or share < WORDS_KNOWN_MIN:
        return [f"the sample does not read like language: {len(set(words))} words, {share:.0%} of them known"]
    return []


def _words(text: str) -> list[str]:
    return re.findall(r"[a-z]+", text.lower())


def _bytes_in(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.iterdir())
