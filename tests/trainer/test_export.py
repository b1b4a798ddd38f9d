"""What is exported is what transformers loads, offline."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from tapestry.node.lineage.asked import ExportError
from tapestry.node.lineage.huggingface import SPECIAL_TOKENS, export_model, sample
from tapestry.node.spec.training import PRESETS, LlamaSpec
from tapestry.node.trainer.models.llama import build_model, initial_state, model_layout
from tapestry.node.trainer.tokenizers.byte import encode

MODEL = dataclasses.replace(PRESETS["nano"].model, seed=3)
LENGTH = PRESETS["nano"].data.sequence_length


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _export(tmp_path_factory.mktemp("export") / "model", MODEL)


@pytest.fixture(scope="module")
def tokenizer(exported: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(exported, local_files_only=True)


@pytest.mark.parametrize("tie", [False, True], ids=["untied", "tied"])
def test_the_exported_model_gives_the_same_logits(tmp_path: Path, tie: bool) -> None:
    from transformers import AutoModelForCausalLM

    settings = dataclasses.replace(MODEL, tie_embeddings=tie)
    out = _export(tmp_path / "model", settings)
    loaded = AutoModelForCausalLM.from_pretrained(out, local_files_only=True)
    ours = build_model(settings, LENGTH)
    for name, view in model_layout(ours).views(initial_state(settings, LENGTH)).items():
        ours.get_parameter(name).data.copy_(view)
    ids = torch.arange(60).reshape(2, 30) * 4
    with torch.no_grad():
        assert torch.equal(loaded.eval()(input_ids=ids).logits, ours.eval()(input_ids=ids).logits)


@given(st.text(max_size=60))
def test_the_exported_tokenizer_is_the_byte_tokenizer(tokenizer: Any, text: str) -> None:
    assume(not any(name in text for name in SPECIAL_TOKENS))
    ids = tokenizer.encode(text)
    assert ids == encode(text)
    assert tokenizer.decode(ids) == text


def test_the_special_tokens_have_our_ids(tokenizer: Any) -> None:
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (256, 257, 258)
    assert len(tokenizer) == 259


def test_the_lineage_is_kept(exported: Path) -> None:
    assert json.loads((exported / "tapestry.json").read_text()) == {"epoch": 4, "run_id": "abc"}


def test_a_sample_has_the_bytes_asked_for_and_repeats_with_its_seed(exported: Path) -> None:
    text = sample(exported, "def ", 40, seed=1)
    assert 10 <= len(text) <= 40
    assert text == sample(exported, "def ", 40, seed=1) != sample(exported, "def ", 40, seed=2)


def test_an_export_overwrites_nothing(exported: Path) -> None:
    before = sorted(path.name for path in exported.parent.iterdir())
    with pytest.raises(ExportError, match="is there already: name a new or an empty folder"):
        _export(exported, MODEL)
    assert sorted(path.name for path in exported.parent.iterdir()) == before


def test_an_export_that_fails_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ExportError, match="cannot write"):
        _export(tmp_path / "file" / "model", MODEL)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def _export(out: Path, settings: LlamaSpec) -> Path:
    with torch.device("meta"):
        layout = model_layout(build_model(settings, LENGTH))
    export_model(
        out, settings, LENGTH, layout, initial_state(settings, LENGTH), meta={"run_id": "abc", "epoch": 4}
    )
    return out
