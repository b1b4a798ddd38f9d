"""Segments of packed windows -> what a model needs so that documents do not see one another.

For a model of `transformers` with attn_implementation "sdpa" or "eager":

    mask, positions = document_mask(segments), document_positions(segments)
    logits = model(input_ids=ids[:, :-1], attention_mask=mask, position_ids=positions).logits

The logits of a document in a packed window are then those of the document alone. A 4-dimensional mask
replaces the model's own, the causal one included, so `document_mask` is causal. A model that looks back
over a sliding window needs the window given, or it would see further than it was trained to. State-space
models and convolutions take no such mask: a run on one of them must attend across documents.
"""

from __future__ import annotations

import torch
from torch import Tensor


def document_mask(
    segments: Tensor,  # int (count, L)
    sliding_window: int | None = None,
) -> Tensor:  # bool (count, 1, L, L): True where the query of a row may see the key of a column
    """Each id sees itself and what came before it in its own document, at most `sliding_window` ids back."""
    place = torch.arange(segments.shape[1], device=segments.device)
    behind = place[:, None] - place[None, :]
    near = behind >= 0 if sliding_window is None else (behind >= 0) & (behind < sliding_window)
    return ((segments[:, :, None] == segments[:, None, :]) & near)[:, None]


def additive(
    mask: Tensor,  # bool, any shape
    dtype: torch.dtype,
) -> Tensor:  # dtype, the same shape
    """0 where the mask is True, else the lowest number: what eager attention adds to its scores."""
    lowest = torch.finfo(dtype).min
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill(~mask, lowest)


def document_positions(
    segments: Tensor,  # int (count, L), never falling along a row
) -> Tensor:  # int64 (count, L)
    """How many ids of its own document stand before each id in its window."""
    place = torch.arange(segments.shape[1], device=segments.device).expand_as(segments)
    begins = torch.ones_like(segments, dtype=torch.bool)
    begins[:, 1:] = segments[:, 1:] != segments[:, :-1]
    return place - torch.where(begins, place, 0).cummax(dim=1).values
