"""Losses and gradients of a batch: whatever a member chooses for itself, they are those of the batch."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from tapestry.node.trainer.gradients import DocumentsLeak, Gradients, Windows, positions_in
from tapestry.node.trainer.memory import Footing, OutOfMemory, advice, is_out_of_memory

CPU = torch.device("cpu")
WHOLE = Footing(micro_batch=64, checkpointing=False)
SIZES: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "max_position_embeddings": 64,
    "initializer_range": 0.3,  # so that a cap or a scale shows
}


def llama() -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    return build(LlamaForCausalLM, LlamaConfig(**SIZES, tie_word_embeddings=True))


def gemma2() -> nn.Module:
    """A soft cap on the logits, and windows that slide in every other layer."""
    from transformers import Gemma2Config, Gemma2ForCausalLM

    config = Gemma2Config(**SIZES, final_logit_softcapping=3.0, sliding_window=4, query_pre_attn_scalar=16)
    return build(Gemma2ForCausalLM, config)


def granite() -> nn.Module:
    """A scale on the logits."""
    from transformers import GraniteConfig, GraniteForCausalLM

    return build(GraniteForCausalLM, GraniteConfig(**SIZES, logits_scaling=4.0))


def gpt2() -> nn.Module:
    """Learned positions, and linear layers that are transposed."""
    from transformers import GPT2Config, GPT2LMHeadModel

    sizes = {"vocab_size": 97, "n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 64}
    dropouts = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    return build(GPT2LMHeadModel, GPT2Config(**sizes, **dropouts, initializer_range=0.3))


def mamba() -> nn.Module:
    """No attention, and so no mask."""
    from transformers import MambaConfig, MambaForCausalLM

    return build(
        MambaForCausalLM, MambaConfig(vocab_size=97, hidden_size=32, state_size=4, num_hidden_layers=1)
    )


MODELS = [llama, gemma2, granite, gpt2]


def build(kind: Any, config: Any) -> nn.Module:
    torch.manual_seed(1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model: nn.Module = kind(config)
    return model


def windows(rows: int = 5, length: int = 12) -> Windows:
    return Windows(np.random.default_rng(2).integers(0, 97, size=(rows, length + 1)))


def reference(model: nn.Module, batch: Windows) -> tuple[float, Tensor]:
    """Loss and gradient by transformers' own loss, all at once."""
    model.zero_grad()
    ids = torch.from_numpy(batch.ids)
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    return loss.item(), gradient(model)


def gradient(model: nn.Module) -> Tensor:
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def added(model: nn.Module, batch: Windows, gradients: Gradients | None = None) -> tuple[float, Tensor]:
    model.zero_grad()
    loss, _ = (gradients or Gradients(model, CPU, WHOLE)).add(batch)
    return loss, gradient(model)


def assert_same(got: tuple[float, Tensor], expected: tuple[float, Tensor]) -> None:
    assert got[0] == pytest.approx(expected[0], rel=1e-5)
    torch.testing.assert_close(got[1], expected[1], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("make", MODELS)
def test_loss_and_gradient_are_transformers_own(make: Any) -> None:
    model, batch = make(), windows()
    expected = reference(model, batch)
    gradients = Gradients(model, CPU, WHOLE)
    assert_same(added(model, batch, gradients), expected)
    assert gradients._head is not None
    assert gradients.loss(batch)[0] == pytest.approx(expected[0], rel=1e-5)


@pytest.mark.parametrize("make", MODELS)
def test_logits_made_for_a_few_positions_at_a_time_give_the_same(make: Any) -> None:
    model, batch = make(), windows()
    gradients = Gradients(model, CPU, WHOLE)
    gradients._logits_at_a_time = 7 * 97 + 5  # 7 positions of 60
    assert_same(added(model, batch, gradients), reference(model, batch))
    assert gradients.loss(batch)[0] == pytest.approx(reference(model, batch)[0], rel=1e-5)


@pytest.mark.parametrize("micro_batch", [1, 2, 5])
@pytest.mark.parametrize("documents", [False, True])
def test_micro_batches_add_up_to_the_batch(micro_batch: int, documents: bool) -> None:
    model, batch = llama(), windows()
    if documents:
        segments = np.cumsum(np.random.default_rng(3).random((5, 12)) < 0.3, axis=1)
        segments[0] = 0
        batch = Windows(batch.ids, segments)
    expected = added(model, batch)
    small = Gradients(model, CPU, Footing(micro_batch, checkpointing=False))
    assert_same(added(model, batch, small), expected)


@pytest.mark.parametrize("make", [llama, gpt2])
def test_checkpointing_gives_the_same_and_keeps_less(make: Any) -> None:
    model, batch = make(), windows()
    expected = added(model, batch)
    plain = kept_bytes(model, batch, WHOLE)
    assert kept_bytes(model, batch, Footing(64, checkpointing=True)) < plain / 2
    assert_same(added(model, batch, Gradients(model, CPU, Footing(64, checkpointing=True))), expected)


def kept_bytes(model: nn.Module, batch: Windows, footing: Footing) -> int:
    """What autograd keeps for the way back, parameters left out."""
    gradients, kept = Gradients(model, CPU, footing), [0]
    gradients.add(batch)  # what is tried with a first batch does not count
    known = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}

    def count(tensor: Tensor) -> Tensor:
        kept[0] += tensor.nbytes if tensor.untyped_storage().data_ptr() not in known else 0
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
        gradients.add(batch)
    return kept[0]


def test_bf16_is_near_and_leaves_parameters_and_gradients_in_f32() -> None:
    model, batch = llama(), windows()
    loss, exact = added(model, batch)
    near, rounded = added(model, batch, Gradients(model, CPU, WHOLE, bf16=True))
    assert rounded.dtype == torch.float32
    assert near != loss and near == pytest.approx(loss, rel=0.02)
    assert torch.nn.functional.cosine_similarity(rounded, exact, dim=0) > 0.99


def test_a_model_whose_logits_are_made_otherwise_makes_them_itself() -> None:
    model, batch = llama(), windows()
    own = model.forward

    def twice(**arguments: Any) -> Any:
        out = own(**arguments)
        out.logits = 2 * out.logits
        return out

    model.forward = twice  # type: ignore[method-assign]
    gradients = Gradients(model, CPU, WHOLE)
    loss, _ = gradients.add(batch)
    assert gradients._head is None
    ids = torch.from_numpy(batch.ids)
    logits = model(input_ids=ids[:, :-1]).logits
    expected = nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
    assert loss == pytest.approx(expected.item(), rel=1e-5)


# ---- documents that do not see one another -------------------------------------------------------------


def test_positions_begin_again_with_each_document() -> None:
    segments = torch.tensor([[4, 4, 4, 5, 6, 6], [1, 1, 1, 1, 1, 1], [0, 1, 1, 1, 0, 0]])
    assert positions_in(segments).tolist() == [[0, 1, 2, 0, 0, 1], [0, 1, 2, 3, 4, 5], [0, 0, 1, 2, 0, 1]]


@pytest.mark.parametrize("make", MODELS)
def test_documents_kept_apart_have_the_losses_they_have_alone(make: Any) -> None:
    """The first one's end predicts how the second begins."""
    model, ids = make(), windows(rows=1, length=11).ids
    batch = Windows(ids, np.array([[0] * 5 + [1] * 6]))
    gradients = Gradients(model, CPU, WHOLE)
    loss, tokens = gradients.loss(batch)
    assert tokens == 5 + 6
    first, second = (gradients.loss(Windows(part)) for part in (ids[:, :6], ids[:, 5:]))
    assert loss * 11 == pytest.approx(first[0] * first[1] + second[0] * second[1], rel=1e-5)
    whole, all_tokens = gradients.loss(Windows(ids))
    assert all_tokens == 11 and whole != pytest.approx(loss, rel=1e-3)


def test_a_model_without_attention_cannot_keep_documents_apart_and_says_so() -> None:
    ids = windows(rows=1).ids
    with pytest.raises(DocumentsLeak, match=r"attend_across_documents = true"):
        Gradients(mamba(), CPU, WHOLE).add(Windows(ids, np.zeros_like(ids[:, 1:])))


# ---- out of memory -------------------------------------------------------------------------------------


def test_what_needs_less_is_half_the_windows_and_at_last_checkpointing() -> None:
    tried, footing = [], Footing(5, checkpointing=False)
    while (smaller := footing.smaller(can_checkpoint=True)) is not None:
        footing = smaller
        tried.append((footing.micro_batch, footing.checkpointing))
    assert tried == [(2, False), (1, False), (1, True)]
    assert Footing(1, checkpointing=False).smaller(can_checkpoint=False) is None


def test_an_allocator_that_gives_nothing_is_known_from_other_errors() -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(1 << 60)
    assert is_out_of_memory(caught.value)
    assert is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory"))
    assert is_out_of_memory(OutOfMemory("so many"))
    assert not is_out_of_memory(RuntimeError("shape mismatch"))


def test_the_advice_is_one_line_with_the_keys_to_set() -> None:
    now = Footing(8, checkpointing=False)
    text = advice(now, now.smaller(can_checkpoint=True))
    assert "micro_batch = 4, checkpointing = false" in text and "\n" not in text
    assert "more memory" in advice(Footing(1, checkpointing=True), None)
