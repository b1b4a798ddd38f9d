"""Settings: strict, and the same after a trip through plain values."""

from __future__ import annotations

import dataclasses

import msgpack
import pytest

from tapestry.node.spec.tables import TableError, plain, read_table
from tapestry.node.spec.training import (
    PRESETS,
    DataSpec,
    LlamaSpec,
    ModelSpec,
    TrainingSpec,
    TrainSpec,
    TransformersSpec,
    WorkerSettings,
)

DIGEST = "ab" * 32
CONFIG = f"config.json 712 {DIGEST}"
TOKENIZER = f"tokenizer.json 20000 {DIGEST}"
WEIGHTS = f"model.safetensors 99 {DIGEST}"


@pytest.mark.parametrize("preset", sorted(PRESETS))
def test_every_preset_survives_a_trip_through_plain_values_and_passes_its_checks(preset: str) -> None:
    settings = PRESETS[preset]
    settings.check()
    assert read_table(TrainingSpec, _trip(plain(settings))) == settings


def test_worker_settings_survive_a_trip_through_plain_values(worker_settings: WorkerSettings) -> None:
    assert read_table(WorkerSettings, _trip(plain(worker_settings))) == worker_settings


def test_a_base_survives_the_trip_and_tells_its_files() -> None:
    model = TransformersSpec("transformers", (CONFIG, TOKENIZER), DIGEST, 10**9)
    assert read_table(TrainingSpec, _trip(plain(_training(model)))).model == model
    assert model.file("tokenizer.json") == (20000, DIGEST)
    assert model.file("model.safetensors") is None


def test_an_unknown_key_is_refused_with_the_one_that_was_meant() -> None:
    table = plain(PRESETS["nano"]) | {"train": {"warmup_step": 3}}
    with pytest.raises(TableError, match=r"train.warmup_step: unknown key; did you mean train.warmup_steps"):
        read_table(TrainingSpec, table)


@pytest.mark.parametrize(
    ("key", "value"), [("batch_size", "4"), ("batch_size", True), ("lr", float("nan")), ("inner_steps", 1.5)]
)
def test_a_value_of_the_wrong_type_is_refused(key: str, value: object) -> None:
    with pytest.raises(TableError, match=f"train.{key}: "):
        read_table(TrainingSpec, plain(PRESETS["nano"]) | {"train": {key: value}})


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (LlamaSpec(heads=3), "model.hidden_size: 128 with model.heads = 3"),
        (LlamaSpec(kv_heads=3), "model.kv_heads: 3 with model.heads = 4"),
        (TransformersSpec("transformers", (TOKENIZER,), "", 1), "config.json is missing"),
        (TransformersSpec("transformers", (CONFIG, CONFIG), "", 1), "named twice"),
        (TransformersSpec("transformers", (CONFIG,), DIGEST, 1, lora_rank=4), "model.safetensors is missing"),
        (TransformersSpec("transformers", (CONFIG, WEIGHTS), "", 1, lora_rank=4), "adapters need a base"),
    ],
)
def test_a_model_that_cannot_be_built_is_refused(model: ModelSpec, reason: str) -> None:
    with pytest.raises(TableError, match=reason):
        _training(model).check()


@pytest.mark.parametrize(
    "file",
    [f"../config.json 1 {DIGEST}", f"model.bin 1 {DIGEST}", "config.json 1 abc", f"config.json {DIGEST}"],
)
def test_a_file_that_no_base_has_is_refused(file: str) -> None:
    table = plain(_training(TransformersSpec("transformers", (file,), "", 1)))
    with pytest.raises(TableError, match=r"model.files: "):
        read_table(TrainingSpec, table)


def test_the_tokenizer_of_a_base_needs_a_base_with_one() -> None:
    for model in (LlamaSpec(), TransformersSpec("transformers", (CONFIG,), "", 1)):
        with pytest.raises(TableError, match=r"names no tokenizer.json"):
            TrainingSpec(model, DataSpec(tokenizer="base"), TrainSpec()).check()


def test_bytes_have_no_bos() -> None:
    training = dataclasses.replace(PRESETS["nano"], data=DataSpec(add_bos=True))
    with pytest.raises(TableError, match=r'data.add_bos: true with data.tokenizer = "byte"'):
        training.check()


def test_overlap_needs_inner_steps() -> None:
    training = dataclasses.replace(PRESETS["nano"], train=TrainSpec(inner_steps=0, overlap=True))
    with pytest.raises(TableError, match=r"train.overlap: true with train.inner_steps = 0"):
        training.check()


def _training(model: ModelSpec) -> TrainingSpec:
    return TrainingSpec(model, DataSpec(), TrainSpec())


def _trip(table: object) -> object:
    return msgpack.unpackb(msgpack.packb(table))
