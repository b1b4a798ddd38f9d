"""Held-out loss: what a model gives to ids that it was not trained on.

The mean over all counted ids of -log p, natural, in f32: sets of unequal lengths are weighed by their ids,
not by their rows. Of preferences also the share of pairs whose chosen end the model holds likelier than the
other, each divided by its length (so that a long answer is not lost for being long).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from tapestry.node.sovereign.derivative import Measure
from tapestry.node.sovereign.rows import IGNORED, Example

BATCH_TOKENS = 8192  # guess: with a vocabulary of 250,000 ids their logits take 8 GB at most; see _batches


def measure_set(
    model: Any,
    name: str,
    examples: Sequence[Example],
    *,
    own: bool,
    tick: Callable[[int], None],
    count: int = 0,  # what the loss is divided by; 0: the ids that are counted
) -> list[Measure]:
    """The measures of one set; `tick` is told of each example done. The model is on its device, and stays."""
    pairs = [one for one in examples if "prompt" in one]
    singles = [one for one in examples if "prompt" not in one]
    measures = []
    if singles:
        total, found = _summed(model, singles, tick)
        count = count or found
        measures.append(Measure(f"{name}/loss", total / max(count, 1), False, count, own))
    if pairs:
        chosen = [_scores(model, [_end(pair, "chosen")]) for pair in pairs]
        rejected = [_scores(model, [_end(pair, "rejected")]) for pair in pairs]
        tick(len(pairs))
        count = sum(counted for _, counted in chosen)
        loss = sum(total for total, _ in chosen) / max(count, 1)
        wins = sum(a / max(n, 1) < b / max(m, 1) for (a, n), (b, m) in zip(chosen, rejected, strict=True))
        measures.append(Measure(f"{name}/chosen-loss", loss, False, count, own))
        measures.append(Measure(f"{name}/prefers", wins / len(pairs), True, len(pairs), own))
    return measures


def _end(pair: Example, which: str) -> Example:
    return {
        "ids": pair["prompt"] + pair[which],
        "labels": [IGNORED] * len(pair["prompt"]) + pair[which],
    }


def _summed(model: Any, examples: Sequence[Example], tick: Callable[[int], None]) -> tuple[float, int]:
    total, count = 0.0, 0
    for batch in _batches(examples):
        loss, counted = _scores(model, batch)
        total, count = total + loss, count + counted
        tick(len(batch))
    return total, count


def _batches(examples: Sequence[Example]) -> Iterator[list[Example]]:
    """Of like lengths together, so that little is padding."""
    batch: list[Example] = []
    for example in sorted(examples, key=lambda one: len(one["ids"])):
        if batch and (len(batch) + 1) * len(example["ids"]) > BATCH_TOKENS:
            yield batch
            batch = []
        batch.append(example)
    if batch:
        yield batch


@torch.no_grad()
def _scores(model: Any, batch: Sequence[Example]) -> tuple[float, int]:
    """The sum of -log p over the counted ids, and their number."""
    longest = max(len(one["ids"]) for one in batch)
    ids, labels, mask = (torch.zeros(len(batch), longest, dtype=torch.long) for _ in range(3))
    labels.fill_(IGNORED)
    for row, one in enumerate(batch):
        length = len(one["ids"])
        ids[row, :length] = torch.tensor(one["ids"])
        labels[row, :length] = torch.tensor(one["labels"])
        mask[row, :length] = 1
    device = next(model.parameters()).device
    logits: Tensor = model(input_ids=ids.to(device), attention_mask=mask.to(device)).logits[:, :-1]
    targets = labels[:, 1:].to(device)
    losses = torch.nn.functional.cross_entropy(
        logits.reshape(-1, logits.shape[-1]).float(),
        targets.reshape(-1),
        ignore_index=IGNORED,
        reduction="sum",
    )
    return float(losses), int((targets != IGNORED).sum())
