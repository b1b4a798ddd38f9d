"""Settings: strict, and the same after a trip through plain values."""

from __future__ import annotations

import dataclasses

import msgpack
import pytest

from tapestry.node.spec.training import (
    PRESETS,
    InnerSettings,
    SettingsError,
    WorkerSettings,
    inner_settings_from,
    model_settings_from,
    to_plain,
    training_settings_from,
    worker_settings_from,
)


@pytest.mark.parametrize("preset", sorted(PRESETS))
def test_every_preset_survives_a_trip_through_plain_values(preset: str) -> None:
    settings = PRESETS[preset]
    assert training_settings_from(msgpack.unpackb(msgpack.packb(to_plain(settings)))) == settings


def test_worker_settings_survive_a_trip_through_plain_values(worker_settings: WorkerSettings) -> None:
    assert worker_settings_from(msgpack.unpackb(msgpack.packb(to_plain(worker_settings)))) == worker_settings


def test_an_unknown_key_is_refused_with_the_one_that_was_meant() -> None:
    plain = to_plain(PRESETS["nano"].inner) | {"warmup_step": 3}
    with pytest.raises(SettingsError, match="unknown key 'warmup_step', did you mean 'warmup_steps'"):
        inner_settings_from(plain)


def test_a_missing_key_is_named() -> None:
    plain = to_plain(PRESETS["nano"].model)
    del plain["layers"]
    with pytest.raises(SettingsError, match="model: key 'layers' is missing"):
        model_settings_from(plain)


@pytest.mark.parametrize(
    ("key", "value"), [("batch_size", "4"), ("batch_size", True), ("lr", "fast"), ("steps", 1.5)]
)
def test_a_value_of_the_wrong_type_is_refused(key: str, value: object) -> None:
    with pytest.raises(SettingsError, match=f"inner: {key} must be of type"):
        inner_settings_from(to_plain(PRESETS["nano"].inner) | {key: value})


@pytest.mark.parametrize("lr", [float("nan"), float("inf"), -1.0])
def test_a_rate_that_is_no_rate_is_refused(lr: float) -> None:
    with pytest.raises(SettingsError, match="lr must be between"):
        InnerSettings(steps=1, batch_size=1, lr=lr)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"heads": 3}, "multiple of"),
        ({"kv_heads": 3, "heads": 4}, "kv_heads 3"),
        ({"architecture": "x"}, "one of"),
    ],
)
def test_a_model_that_cannot_be_built_is_refused(changes: dict[str, object], reason: str) -> None:
    with pytest.raises(SettingsError, match=reason):
        dataclasses.replace(PRESETS["nano"].model, **changes)  # type: ignore[arg-type]
