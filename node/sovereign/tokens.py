"""Tokens of one's own: ids that the base's tokenizer lacks, for text that it cuts into many pieces.

    learned       those that save most ids, of a tokenizer that transformers trains anew on one's own text;
                  without those that lie inside a token of the base: they would cut it up
    extend        a base with them: an id each, added to its tokenizer; the id's rows, of the embedding and of
                  the output layer, are the mean of its pieces' rows. A function of base and tokens alone, so
                  a rebase makes the same of the old base and of the new one, and transplants as ever
    in_base_ids   an example in the base's own ids: each own token as the pieces that it replaces

`tokens.json` in a derivative's folder keeps them, in the order of their ids; all its versions have the same.

The loss of a model with own tokens is given per id of the base, over the same text: the two can then be
compared, while a loss per own id would be higher for every token that says more.

Imports torch and transformers.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from tapestry.node.disk.files import atomic_write
from tapestry.node.errors import UserError, printable
from tapestry.node.sovereign.plans import copy_beside
from tapestry.node.sovereign.rows import IGNORED, Example
from tapestry.node.trainer.models.pretrained import quiet
from tapestry.node.trainer.models.weights import load_base

NAME = "tokens.json"
TOKENS_MAX = 65_536
TEXT_CHARS_MAX = 64 << 20  # of one's own text that is looked at; guess: ten times what the figures need
CANDIDATES = 8  # for each token that is wanted; guess: most lie inside tokens of the base
ALPHABET = 512  # ids of a new tokenizer that stand for single bytes and characters
CHARS_MIN = 2

Pieces = Mapping[int, Sequence[int]]  # of an own id, in ids of the base


# --- a derivative's tokens ----------------------------------------------------------------------------


def kept_tokens(folder: Path) -> tuple[str, ...]:
    """Those of the derivative whose folder this is; none if it has none."""
    try:
        return tuple(json.loads((folder / NAME).read_bytes()))
    except FileNotFoundError:
        return ()


def keep_tokens(folder: Path, tokens: Sequence[str]) -> None:
    """For all versions to come."""
    atomic_write(folder / NAME, json.dumps(list(tokens), ensure_ascii=False).encode(), 0o600)


def read_tokens(path: Path, base: Path) -> tuple[str, ...]:
    """A person's list: one in each line, a leading blank is part of it. Raises UserError."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read: {error}") from error
    tokens = tuple(dict.fromkeys(line for line in lines if line.strip()))
    if not 0 < len(tokens) <= TOKENS_MAX:
        raise UserError(f"{path} has {len(tokens)} tokens: from 1 to {TOKENS_MAX:,} can be added")
    tokenizer = tokenizer_of(base)
    known = tokenizer.get_vocab()
    fit = set(_fitting(tokenizer, [token for token in tokens if token not in known]))
    wrong = [token for token in tokens if token not in fit]
    if wrong:
        raise UserError(
            f"{path}: {printable(wrong[0])!r} is no new token: the base has it, or cannot write it",
            hint=f"leave out {len(wrong)} of them: " + ", ".join(printable(one) for one in wrong[:5]),
        )
    return tokens


def learned(base: Path, texts: Callable[[], Iterable[str]], count: int) -> tuple[str, ...]:
    """At most `count` tokens, those that save most ids of these texts; fewer where little can be saved."""
    tokenizer = tokenizer_of(base)
    size = ALPHABET + CANDIDATES * count
    new = tokenizer.train_new_from_iterator(_bounded(texts()), vocab_size=size, show_progress=False)
    inside = "\0".join(_texts(tokenizer))
    found = [
        text
        for text in _texts(new)
        if len(text.strip()) >= CHARS_MIN
        and text.isprintable()
        and "\ufffd" not in text
        and text not in inside
        and len(_ids(tokenizer, text)) > 1
    ]
    fitting = list(_fitting(tokenizer, list(dict.fromkeys(found))))
    saved = _saved(tokenizer, fitting, _bounded(texts()))
    return tuple(
        sorted((token for token in fitting if saved[token]), key=lambda token: -saved[token])[:count]
    )


def _saved(tokenizer: Any, tokens: Sequence[str], texts: Iterable[str]) -> dict[str, int]:
    """How many ids of the texts each token saves, if all are there: of several at one place the longest."""
    extended = with_tokens(tokenizer, tokens)
    seen: Counter[int] = Counter()
    for text in texts:
        seen.update(_ids(extended, text))
    first = len(tokenizer)
    return {
        token: seen[first + index] * (len(_ids(tokenizer, token)) - 1) for index, token in enumerate(tokens)
    }


def _bounded(texts: Iterable[str]) -> Iterator[str]:
    left = TEXT_CHARS_MAX
    for text in texts:
        yield text[:left]
        left -= len(text)
        if left <= 0:
            return


def _texts(tokenizer: Any) -> Iterator[str]:
    """What each id stands for, but special ones; a leading blank is part of it. In the order of the ids."""
    anchor = _ids(tokenizer, "a")
    start = len(tokenizer.decode(anchor))
    for number in sorted(set(tokenizer.get_vocab().values()) - set(tokenizer.all_special_ids)):
        yield tokenizer.decode([*anchor, number])[start:]


def _fitting(tokenizer: Any, tokens: Sequence[str]) -> Iterator[str]:
    """Those that become one id and are written back as they are: not all decoders know all characters."""
    extended = with_tokens(tokenizer, tokens)
    anchor = _ids(extended, "a")
    start = len(extended.decode(anchor))
    for token in tokens:
        ids = _ids(extended, token)
        if len(ids) == 1 and extended.decode([*anchor, *ids])[start:] == token:
            yield token


# --- a base with them ---------------------------------------------------------------------------------


def extend(base: Path, tokens: Sequence[str], out: Path) -> None:
    """Write the base with the tokens into the folder `out`, f32. Raises ModelError, OSError."""
    tokenizer = tokenizer_of(base)
    pieces = pieces_of(base, tokens)
    model = load_base(base, torch.float32)
    rows = max(model.get_input_embeddings().weight.shape[0], max(pieces) + 1)
    model.resize_token_embeddings(rows, mean_resizing=False)
    with torch.no_grad():
        for tensor in of_vocabulary(model):
            means = [tensor[list(ids)].mean(0) for ids in pieces.values()]
            tensor[list(pieces)] = torch.stack(means)
    quiet()
    model.save_pretrained(out)
    with_tokens(tokenizer, tokens).save_pretrained(out)
    copy_beside(base, out)


def pieces_of(base: Path, tokens: Sequence[str]) -> dict[int, list[int]]:
    """By the id that each token gets: the ids of the base that it replaces."""
    if not tokens:
        return {}  # without waiting for a tokenizer
    tokenizer = tokenizer_of(base)
    return {len(tokenizer) + index: _ids(tokenizer, token) for index, token in enumerate(tokens)}


def of_vocabulary(model: Any) -> list[torch.Tensor]:
    """The parameters that have a row for each id; tied ones once."""
    layers = [model.get_input_embeddings(), model.get_output_embeddings()]
    found = [layer.weight for layer in layers if layer is not None]
    found += [layer.bias for layer in layers if getattr(layer, "bias", None) is not None]
    return list({tensor.data_ptr(): tensor for tensor in found}.values())


# --- examples in the base's ids -----------------------------------------------------------------------


def in_base_ids(example: Example, pieces: Pieces, longest: int) -> list[Example]:
    """The same text in ids of the base. Where it has more than `longest` ids, in several parts, each of which
    begins with the last id of the one before. A preference is not cut."""
    if "prompt" in example:
        return [
            {name: [part for one in ids for part in pieces.get(one, (one,))] for name, ids in example.items()}
        ]
    ids: list[int] = []
    labels: list[int] = []
    for number, label in zip(example["ids"], example["labels"], strict=True):
        parts = pieces.get(number, (number,))
        ids += parts
        labels += parts if label != IGNORED else [IGNORED] * len(parts)
    found = []
    for start in range(0, max(len(ids) - 1, 1), longest - 1):
        part = labels[start : start + longest]
        found.append({"ids": ids[start : start + longest], "labels": [IGNORED, *part[1:]]})
    return found


def counted(examples: Iterable[Example]) -> int:
    """The ids that count in their loss: the first of each is predicted from nothing."""
    return sum(label != IGNORED for one in examples if "labels" in one for label in one["labels"][1:])


# --- tokenizers ---------------------------------------------------------------------------------------


def tokenizer_of(folder: Path) -> Any:
    """As transformers loads it from a base's folder."""
    from transformers import AutoTokenizer

    quiet()
    return AutoTokenizer.from_pretrained(folder, local_files_only=True)


def with_tokens(tokenizer: Any, tokens: Sequence[str]) -> Any:
    """The same with an id more for each token."""
    from transformers import AddedToken

    extended = type(tokenizer).from_pretrained(tokenizer.name_or_path, local_files_only=True)
    extended.add_tokens([AddedToken(token, normalized=False, special=False) for token in tokens])
    return extended


def _ids(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer.encode(text, add_special_tokens=False))
