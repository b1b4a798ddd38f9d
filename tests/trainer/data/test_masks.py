"""Packed documents do not see one another, and a model's logits are those of each document alone."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from tapestry.node.trainer.data.corpus import segments_of
from tapestry.node.trainer.data.masks import additive, document_mask, document_positions

EOS = 31
DOCUMENTS = [[1, 2, 3, EOS], [4, EOS], [5, 6, 7, 8, 9, EOS], [EOS], [10, 11]]


def test_positions_begin_again_with_each_document() -> None:
    segments = torch.tensor([[0, 0, 1, 1, 1, 2], [0, 0, 0, 0, 0, 0]])
    assert document_positions(segments).tolist() == [[0, 1, 0, 1, 2, 0], [0, 1, 2, 3, 4, 5]]


def test_an_id_sees_what_came_before_it_in_its_own_document_and_in_the_window() -> None:
    segments = torch.tensor([[0, 0, 1, 1, 1]])
    seen = [[key for key in range(5) if row[key]] for row in document_mask(segments)[0, 0]]
    assert seen == [[0], [0, 1], [2], [2, 3], [2, 3, 4]]
    near = [[key for key in range(5) if row[key]] for row in document_mask(segments, 2)[0, 0]]
    assert near == [[0], [0, 1], [2], [2, 3], [3, 4]]


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_a_packed_document_has_the_logits_that_it_has_alone(attention: str) -> None:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        attn_implementation=attention,
    )
    model = LlamaForCausalLM(config).eval()
    ids = torch.tensor([[one for document in DOCUMENTS for one in document]])
    segments = torch.from_numpy(segments_of(ids.numpy(), EOS))
    mask = document_mask(segments)
    if attention == "eager":
        mask = additive(mask, torch.float32)
    with torch.no_grad():
        packed = model(
            input_ids=ids, attention_mask=mask, position_ids=document_positions(segments), use_cache=False
        ).logits[0]
        alone = torch.cat([model(input_ids=torch.tensor([one])).logits[0] for one in DOCUMENTS])
        crossing = model(input_ids=ids).logits[0]
    torch.testing.assert_close(packed, alone, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(crossing, alone, atol=1e-3)  # without the mask they do see one another
