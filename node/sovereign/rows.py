"""A member's own data for a stage -> examples to train on, and examples held out to measure on.

cpt reads text as the node does (trainer/data), into the same cache, and cuts it into windows of L + 1 ids.
sft and dpo read rows, from jsonl (also packed), csv and parquet:

    sft   {"prompt": TEXT, "completion": TEXT}, or {"messages": [{"role": ..., "content": ...}, ...]}
    dpo   {"prompt": TEXT, "chosen": TEXT, "rejected": TEXT}; or all three as messages

Messages need the base's chat template. Of messages the last one is the completion: only completions count in
the loss. A row that spells a special token is left out: data must not speak as the system or end a document.
So is one whose prompt fills the whole sequence. What is left out is counted and named, and more than 1 % of
malformed rows is refused.

Every k-th row is held out, as `held_out_share` says, and no row that equals one of those is trained on. The
files are read several times, in bounded memory: the first time every row is judged, and what is read later is
used only where it is what was judged. Must not import torch or trl.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice, zip_longest
from pathlib import Path
from typing import Any

import numpy as np
from blake3 import blake3

from tapestry.node.errors import UserError
from tapestry.node.sovereign.derivative import DataUse
from tapestry.node.sovereign.recipe import Recipe
from tapestry.node.spec.data import DataSettings, Domain, Protection, reals_of, resolved_data
from tapestry.node.trainer.data.corpus import Part, Use, open_corpus
from tapestry.node.trainer.data.errors import DamagedFile, DataError
from tapestry.node.trainer.data.files import SourceFile, decoded
from tapestry.node.trainer.data.protected import Judge, judge_of
from tapestry.node.trainer.data.readers.csv import fields, rows_of
from tapestry.node.trainer.data.readers.jsonl import valid
from tapestry.node.trainer.data.readers.parquet import plain_rows
from tapestry.node.trainer.data.readers.registry import format_in, format_of, require
from tapestry.node.trainer.data.sources import files_below
from tapestry.node.trainer.data.tally import Group
from tapestry.node.trainer.data.tally import Tally as Files
from tapestry.node.trainer.tokenizers.api import Tokenizer

HELD_OUT_MAX = 1024  # of a source; guess: more would measure no better
MALFORMED_MAX = 0.01  # as of text: spec/data.py
LINE_CHARS_MAX = 64 << 20  # guess: a longer line is no row
BLOCK_ROWS = 64  # read again, compared, then used; guess: 32 bytes are kept for each block
IGNORED = -100  # the label that counts in no loss, by transformers' convention

Row = dict[str, Any]
Example = dict[str, list[int]]  # ids and labels; or of a preference, prompt, chosen and rejected
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True, slots=True)
class Prepared:
    """What a recipe's data are."""

    rows: Callable[[], Iterator[tuple[Row, Example]]]  # in the form that the trainer takes, and as measured
    examples: int
    uses: tuple[DataUse, ...]
    held_out: dict[str, list[Example]]  # by the set's name

    @property
    def digest(self) -> str:
        """Of all sources, in order."""
        return blake3("".join(use.digest for use in self.uses).encode()).hexdigest()

    def train(self) -> Iterator[Row]:
        """What the trainer takes: ids and labels; of dpo, texts."""
        return (row for row, _ in self.rows())

    def without(self, held_out: Mapping[str, Sequence[Example]]) -> Prepared:
        """The same, but for these examples: also if the files grew, and other rows are held out now."""
        kept = {_ids_of(one) for examples in held_out.values() for one in examples}
        rows = self.rows
        return replace(self, rows=lambda: (pair for pair in rows() if _ids_of(pair[1]) not in kept))


def _ids_of(example: Example) -> tuple[tuple[int, ...], ...]:
    return tuple(tuple(example[name]) for name in ("ids", "prompt", "chosen", "rejected") if name in example)


def prepare(
    recipe: Recipe,
    sequence_length: int,
    text_tokenizer: Tokenizer,  # cpt: the run's, as the node reads text
    row_tokenizer: Any,  # sft, dpo: the same as transformers loads it, with its chat template
    cache: Path,
    progress: Progress,
    protected: Sequence[Protection] = (),
    settings: DataSettings | None = None,  # of cpt: how node.toml says that these sources are read
) -> Prepared:
    """Raises UserError."""
    try:
        if recipe.stage == "cpt":
            settings = settings or DataSettings(paths=recipe.data)
            return _windows(recipe, settings, sequence_length, text_tokenizer, cache, progress, protected)
        return _rows(recipe, sequence_length, row_tokenizer, {one.path: one.domains for one in protected})
    except (DataError, DamagedFile) as error:
        raise UserError(str(error)) from error
    except OSError as error:
        raise UserError(f"cannot read {error.filename}: {error.strerror}") from error


# --- text -------------------------------------------------------------------------------------------


def _windows(
    recipe: Recipe,
    settings: DataSettings,
    length: int,
    tokenizer: Tokenizer,
    cache: Path,
    progress: Progress,
    protected: Sequence[Protection],
) -> Prepared:
    settings = resolved_data(settings, "name text with --data")
    use = Use(length, windows_per_epoch=1, seed=recipe.seed)
    cache.mkdir(mode=0o700, parents=True, exist_ok=True)
    corpus = open_corpus(
        settings, tokenizer, cache, use, lambda done, total: progress("reading", done, total), protected
    )
    uses = tuple(
        DataUse(
            source.path,
            _digest_of(part.tokens),
            part.train_windows,
            len(part.held_out),
            _left_out(corpus.summary, part.name),
            reals_of((source.path,)),
        )
        for source, part in zip(settings.source, corpus.parts, strict=True)
    )
    held_out = {
        part.name: [{"ids": ids.tolist(), "labels": ids.tolist()} for ids in part.validation(HELD_OUT_MAX)]
        for part in corpus.sets
    }

    def rows() -> Iterator[tuple[Row, Example]]:
        for part in corpus.parts:
            for ids in _training(part):
                yield {"input_ids": ids, "labels": ids}, {"ids": ids, "labels": ids}

    return Prepared(rows, sum(use.examples for use in uses), uses, held_out)


def _left_out(summary: Sequence[str], name: str) -> tuple[str, ...]:
    """What the corpus says of a source beside what was taken of it."""
    lines = [line.removeprefix(f"data {name}: ") for line in summary if line.startswith(f"data {name}: ")]
    return tuple(lines[1:])


def _training(part: Part) -> Iterator[list[int]]:
    for start in range(0, part.train_windows, 256):
        numbers = np.arange(start, min(start + 256, part.train_windows), dtype=np.int64)
        yield from part.training(numbers).tolist()


def _digest_of(tokens: np.ndarray) -> str:
    hasher = blake3()
    for start in range(0, len(tokens), 1 << 20):
        hasher.update(np.ascontiguousarray(tokens[start : start + (1 << 20)], dtype="<u4").tobytes())
    return hasher.hexdigest()


# --- rows -------------------------------------------------------------------------------------------


@dataclass(slots=True)
class _Tally:
    """Rows that were seen, and those that cannot be used."""

    rows: int = 0
    malformed: Group = field(default_factory=Group)
    special: Group = field(default_factory=Group)
    filled: Group = field(default_factory=Group)
    repeated: Group = field(default_factory=Group)
    cut: Group = field(default_factory=Group)  # used, but not to their end
    protected: dict[str, Group] = field(default_factory=dict)  # by the domain

    def lines(self) -> tuple[str, ...]:
        said = (
            ("without what the stage needs", self.malformed),
            ("that spell a special token", self.special),
            ("whose prompt fills the sequence", self.filled),
            ("that equal a held-out row", self.repeated),
            ("used, but cut at the sequence's end", self.cut),
        )
        protected = tuple(
            f"{group.count} rows of the protected domain {name}"
            for name, group in sorted(self.protected.items())
        )
        return protected + tuple(f"{group} rows {what}" for what, group in said if group.count)


@dataclass(frozen=True, slots=True)
class _Reader:
    """Rows of a stage -> examples."""

    stage: str
    length: int
    tokenizer: Any
    special: tuple[str, ...]

    def example(self, row: Row, where: str, tally: _Tally) -> tuple[Row, Example] | None:
        """The row in the form that trl takes, and its ids; None, and counted, if it cannot be used."""
        try:
            shaped = _shaped(row, self.stage)
            if any(word in text for text in _texts(shaped) for word in self.special):
                tally.special.add(where)
                return None
            example = self._encoded(shaped)
        except (KeyError, TypeError, ValueError, IndexError):
            tally.malformed.add(where)
            return None
        prompt = len(example["prompt"]) if "prompt" in example else _prompt_length(example["labels"])
        longest = max(len(ids) for name, ids in example.items() if name != "prompt")
        longest += prompt if "prompt" in example else 0
        if prompt >= self.length:
            tally.filled.add(where)
            return None
        if longest > self.length:
            tally.cut.add(where)
        return shaped, self._cut(example, prompt)

    def _cut(self, example: Example, prompt: int) -> Example:
        if "prompt" not in example:
            return {name: ids[: self.length] for name, ids in example.items()}
        room = self.length - prompt
        return {name: ids if name == "prompt" else ids[:room] for name, ids in example.items()}

    def _encoded(self, row: Row) -> Example:
        if self.stage == "sft":
            prompt, whole = self._pair(row["prompt"], row["completion"])
            return {"ids": whole, "labels": [IGNORED] * prompt + whole[prompt:]}
        chosen_prompt, chosen = self._pair(row["prompt"], row["chosen"])
        rejected_prompt, rejected = self._pair(row["prompt"], row["rejected"])
        prompt = min(chosen_prompt, rejected_prompt)
        return {"prompt": chosen[:prompt], "chosen": chosen[prompt:], "rejected": rejected[prompt:]}

    def _pair(self, prompt: Any, completion: Any) -> tuple[int, list[int]]:
        """How many ids of the whole are the prompt's, and all of them."""
        if isinstance(prompt, list):
            before = self._chat(prompt, True)
            whole = self._chat(prompt + completion, False)
        else:
            before = self.tokenizer(prompt)["input_ids"]
            whole = [*self.tokenizer(prompt + completion)["input_ids"]]
            if not whole or whole[-1] != self.tokenizer.eos_token_id:
                whole.append(self.tokenizer.eos_token_id)
        common = next((i for i, (a, b) in enumerate(zip(before, whole, strict=False)) if a != b), None)
        return (min(len(before), len(whole)) if common is None else common), whole

    def _chat(self, messages: list[Row], open_end: bool) -> list[int]:
        """Raises ValueError for messages that the template refuses, UserError where there is none."""
        from jinja2 import TemplateError

        if not self.tokenizer.chat_template:
            raise UserError("the base has no chat template, and these rows are messages")
        try:
            ids: list[int] = self.tokenizer.apply_chat_template(
                messages, add_generation_prompt=open_end, tokenize=True, return_dict=True
            )["input_ids"]
        except TemplateError as error:
            raise ValueError(str(error)) from error
        return ids


def _rows(recipe: Recipe, length: int, tokenizer: Any, protected: Mapping[str, Sequence[Domain]]) -> Prepared:
    if tokenizer.eos_token_id is None:
        raise UserError("the base's tokenizer has no end of a text: rows cannot be ended")
    special = tuple(sorted({text for text in tokenizer.all_special_tokens if text}))
    reader = _Reader(recipe.stage, length, tokenizer, special)
    every = round(1 / recipe.held_out_share)
    uses, held_out, chosen = [], {}, []
    for path, name in zip(recipe.data, _names(recipe.data), strict=True):
        with judge_of(protected.get(path, ())) as judge:
            use, kept, judged = _look_through(path, reader, every, judge)
        uses.append(use)
        held_out[name] = kept
        chosen.append(judged)

    def rows() -> Iterator[tuple[Row, Example]]:
        for judged in chosen:
            for shaped, example in judged.training(reader):
                yield _for_trainer(shaped, example), example

    return Prepared(rows, sum(use.examples for use in uses), tuple(uses), held_out)


@dataclass(frozen=True, slots=True)
class _Judged:
    """A source as the first pass found it."""

    path: str
    dropped: frozenset[bytes]  # digests of rows that are of a protected domain
    held_out: frozenset[bytes]
    marks: tuple[bytes, ...]  # of all rows but the dropped ones up to the end of each block

    def training(self, reader: _Reader) -> Iterator[tuple[Row, Example]]:
        """What is trained on. Raises UserError before a block is used that is not what was judged."""
        for block, mark in zip_longest(self._blocks(reader), self.marks):
            if block is None or mark is None or block[0] != mark:
                raise UserError(
                    f"data {self.path} changed while it was read: what nobody has judged is not trained on",
                    hint="give the command again when nobody writes to it any more",
                )
            yield from block[1]

    def _blocks(self, reader: _Reader) -> Iterator[tuple[bytes, list[tuple[Row, Example]]]]:
        """The mark of each, and its rows without those that are held out."""
        hasher = blake3()
        digested = ((_row_digest(row[0]), row) for row in _usable(self.path, reader, _Tally()))
        clear = ((digest, row) for digest, row in digested if digest not in self.dropped)
        while block := list(islice(clear, BLOCK_ROWS)):
            for digest, _ in block:
                hasher.update(digest)
            yield hasher.digest(), [row for digest, row in block if digest not in self.held_out]


def _look_through(
    path: str, reader: _Reader, every: int, judge: Judge
) -> tuple[DataUse, list[Example], _Judged]:
    """The first pass: which rows are held out, which are of a protected domain, and what there is."""
    tally, hasher = _Tally(), blake3()
    kept: list[Example] = []
    equal: set[bytes] = set()
    dropped: set[bytes] = set()
    marks: list[bytes] = []
    count = 0
    for shaped, example in _usable(path, reader, tally):
        digest = _row_digest(shaped)
        if domain := judge("\n".join(_texts(shaped))):
            tally.protected.setdefault(domain, Group()).add(path)
            dropped.add(digest)
            continue
        hasher.update(digest)
        if count % every == every // 2 and len(kept) < HELD_OUT_MAX and digest not in equal:
            kept.append(example)
            equal.add(digest)
        count += 1
        if count % BLOCK_ROWS == 0:
            marks.append(hasher.digest())
    if count % BLOCK_ROWS:
        marks.append(hasher.digest())
    if tally.malformed.count > MALFORMED_MAX * tally.rows:
        raise UserError(
            f"data {path}: {tally.malformed} of {tally.rows} rows without what {reader.stage} needs",
            hint=_NEEDS[reader.stage],
        )
    judged = _Judged(path, frozenset(dropped), frozenset(equal), tuple(marks))
    trained = sum(1 for _ in judged.training(reader))
    if not kept or not trained:
        raise UserError(f"data {path}: {count} usable rows: too few to train on some and measure on others")
    for _ in range(count - trained - len(kept)):
        tally.repeated.add(path)
    _files(path, files := Files())
    said = (*tally.lines(), *files.lines()[1:])
    use = DataUse(path, hasher.hexdigest(), trained, len(kept), said, reals_of((path,)))
    return use, kept, judged


_NEEDS = {
    "sft": 'rows are {"prompt": TEXT, "completion": TEXT} or {"messages": [...]} that end with the assistant',
    "dpo": 'rows are {"prompt": ..., "chosen": ..., "rejected": ...}, texts or messages',
}


def _usable(path: str, reader: _Reader, tally: _Tally) -> Iterator[tuple[Row, Example]]:
    for where, row in read_rows(path):
        tally.rows += 1
        if not isinstance(row, dict):
            tally.malformed.add(where)
        elif (found := reader.example(row, where, tally)) is not None:
            yield found


def _for_trainer(shaped: Row, example: Example) -> Row:
    if "prompt" in example:
        return shaped
    return {"input_ids": example["ids"], "labels": example["labels"]}


def _shaped(row: Row, stage: str) -> Row:
    """Only what the stage needs, checked, and of whole characters alone. Raises KeyError, TypeError,
    ValueError, IndexError.
    """
    if stage == "sft" and "messages" in row:
        messages = _messages(row["messages"])
        if len(messages) < 2 or messages[-1]["role"] != "assistant":
            raise ValueError("no answer of the assistant at the end")
        return {"prompt": messages[:-1], "completion": messages[-1:]}
    names = ("prompt", "completion") if stage == "sft" else ("prompt", "chosen", "rejected")
    values = {name: row[name] for name in names}
    if all(isinstance(value, str) for value in values.values()):
        if not all(values[name] for name in names[1:]):
            raise ValueError("nothing to learn")
        return {name: valid(text) for name, text in values.items()}
    shaped = {name: _messages(value) for name, value in values.items()}
    if not all(shaped.values()):
        raise ValueError("no messages")
    return shaped


def _messages(value: Any) -> list[Row]:
    if not isinstance(value, Sequence) or isinstance(value, str):
        raise TypeError("no messages")
    messages = [{"role": one["role"], "content": one["content"]} for one in value]
    if not all(isinstance(text, str) for one in messages for text in one.values()):
        raise TypeError("a message is a role and a text")
    return [{name: valid(text) for name, text in one.items()} for one in messages]


def _texts(shaped: Mapping[str, Any]) -> Iterator[str]:
    for value in shaped.values():
        if isinstance(value, str):
            yield value
        else:
            for message in value:
                yield from message.values()


def _prompt_length(labels: Sequence[int]) -> int:
    return next((place for place, label in enumerate(labels) if label != IGNORED), len(labels))


def _row_digest(shaped: Row) -> bytes:
    return blake3(
        json.dumps(shaped, sort_keys=True, separators=(",", ":")).encode("utf-8", "replace")
    ).digest()


def _names(paths: Sequence[str]) -> list[str]:
    settings = resolved_data(DataSettings(paths=tuple(paths)), "name rows with --data")
    return [source.name for source in settings.source]


# --- files ------------------------------------------------------------------------------------------


def read_rows(path: str) -> Iterator[tuple[str, Any]]:
    """Where each row stands, and the row; None for one that cannot be read. Raises UserError, OSError."""
    left_out = Files()
    # In a folder a .json of one line is what describes the rows, not one of them.
    lines_min = 2 if os.path.isdir(path) else 1
    forms = {file: format_in(str(file), "", lines_min).name for file in _files(path, left_out)}
    tables = [file for file, form in forms.items() if form in _READERS]
    if not tables:
        why = "; ".join(left_out.lines()[1:])
        raise UserError(
            f"data {path}: no rows there (jsonl, csv, tsv or parquet){': ' + why if why else ''}",
            hint="name the file, or the folder that its links lead to" if why else "",
        )
    for file in tables:
        yield from _READERS[forms[file]](file)


def _files(path: str, left_out: Files) -> list[Path]:
    """As `start` finds them: nothing hidden, and no link that leads out, for that was not declared."""
    if os.path.isdir(path):
        return [Path(one) for one in files_below(path, left_out)]
    return [Path(path)] if os.path.isfile(path) else []


def _json_rows(path: Path) -> Iterator[tuple[str, Any]]:
    with decoded(_source_file(path, "jsonl")) as text:
        number = 0
        while line := text.readline(LINE_CHARS_MAX):
            number += 1
            if line.strip():
                try:
                    yield f"{path}:{number}", json.loads(line)
                except (ValueError, RecursionError):
                    yield f"{path}:{number}", None


def _csv_rows(path: Path) -> Iterator[tuple[str, Any]]:
    file = _source_file(path, "csv")
    header = fields(file)
    for number, row in rows_of(file):
        yield f"{path}:{number}", None if row is None else dict(zip(header, row, strict=False))


def _parquet_rows(path: Path) -> Iterator[tuple[str, Any]]:
    require(format_of(str(path)), str(path))
    import pyarrow
    import pyarrow.parquet

    try:
        number = 0
        for batch in pyarrow.parquet.ParquetFile(path).iter_batches(batch_size=512):
            for row in plain_rows(batch):
                number += 1
                yield f"{path}:{number}", row
    except (pyarrow.ArrowException, OSError) as error:  # OSError: of a page that it cannot unpack
        raise UserError(f"data {path}: broken parquet: {str(error)[:200]}") from error


def _source_file(path: Path, form: str) -> SourceFile:
    info = path.stat()
    return SourceFile(str(path.absolute()), info.st_size, info.st_mtime_ns, form)


_READERS: dict[str, Callable[[Path], Iterator[tuple[str, Any]]]] = {
    "jsonl": _json_rows,
    "csv": _csv_rows,
    "tsv": _csv_rows,
    "parquet": _parquet_rows,
}
