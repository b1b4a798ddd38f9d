"""What the trainer must know: the model, the inner optimizer, and this node's own data and device.

Plain values in frozen dataclasses, so that a run spec can be made of them and they can cross the pipe
to the worker. `TrainingSettings` is what all members of a run agree on; `WorkerSettings` adds what is
this node's own affair. Imports neither torch nor anything of ours: reading settings costs nothing.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
from dataclasses import dataclass
from typing import Any

ARCHITECTURES = ("llama",)
TOKENIZERS = ("byte",)
OPTIMIZERS = ("adamw",)
DEVICES = ("auto", "cpu", "cuda")


class SettingsError(ValueError):
    """A setting is unknown, missing, of the wrong type or out of range; one line that says which."""


@dataclass(frozen=True, slots=True)
class ModelSettings:
    """A causal language model by configuration. `kv_heads` < `heads` is grouped-query attention."""

    hidden_size: int
    intermediate_size: int
    layers: int
    heads: int
    kv_heads: int
    sequence_length: int
    architecture: str = "llama"
    tokenizer: str = "byte"
    tie_embeddings: bool = True

    def __post_init__(self) -> None:
        _check_choice("architecture", self.architecture, ARCHITECTURES)
        _check_choice("tokenizer", self.tokenizer, TOKENIZERS)
        for name in ("hidden_size", "intermediate_size", "layers", "heads", "kv_heads"):
            _check_range(name, getattr(self, name), 1, 1 << 20)
        _check_range("sequence_length", self.sequence_length, 2, 1 << 20)
        if self.hidden_size % (2 * self.heads):
            raise SettingsError(
                f"hidden_size {self.hidden_size} must be a multiple of 2 * heads ({2 * self.heads}): "
                "rotary embeddings need an even head size"
            )
        if self.heads % self.kv_heads:
            raise SettingsError(f"heads {self.heads} must be a multiple of kv_heads {self.kv_heads}")


@dataclass(frozen=True, slots=True)
class InnerSettings:
    """The inner loop of one epoch.

    `steps` = H > 0 is DiLoCo: H optimizer steps of one batch each, and the pseudo-gradient goes out.
    `steps` = 0 sends the mean gradient of `accumulation` batches; then only the batch sizes matter here.
    `overlap` goes on with the next epoch's steps while the round runs: docs/decisions/004-overlap.md.
    """

    steps: int
    batch_size: int
    accumulation: int = 1
    optimizer: str = "adamw"
    lr: float = 1e-3
    beta1: float = 0.9
    beta2: float = 0.99
    eps: float = 1e-8
    weight_decay: float = 0.1  # DiLoCo, table 5
    warmup_steps: int = 30
    gradient_clip: float = 1.0  # L2 norm; DiLoCo, table 5
    overlap: bool = False

    def __post_init__(self) -> None:
        _check_choice("optimizer", self.optimizer, OPTIMIZERS)
        _check_range("steps", self.steps, 0, 1_000_000)
        _check_range("batch_size", self.batch_size, 1, 1 << 20)
        _check_range("accumulation", self.accumulation, 1, 1_000_000)
        _check_range("lr", self.lr, 0.0, 1e3)
        _check_range("beta1", self.beta1, 0.0, 0.999999)
        _check_range("beta2", self.beta2, 0.0, 0.999999)
        _check_range("eps", self.eps, 1e-30, 1.0)
        _check_range("weight_decay", self.weight_decay, 0.0, 1e3)
        _check_range("warmup_steps", self.warmup_steps, 0, 1_000_000)
        _check_range("gradient_clip", self.gradient_clip, 1e-9, 1e9)
        if self.overlap and not self.steps:
            raise SettingsError("overlap needs steps > 0: a gradient is of the base it was taken at")

    @property
    def batches(self) -> int:
        """How many batches a whole epoch takes: the unit that progress is counted in."""
        return self.steps if self.steps else self.accumulation


@dataclass(frozen=True, slots=True)
class TrainingSettings:
    """What all members of a run agree on about training."""

    model: ModelSettings
    inner: InnerSettings
    seed: int = 0  # of the founder's random initialisation

    def __post_init__(self) -> None:
        _check_range("seed", self.seed, 0, (1 << 63) - 1)


@dataclass(frozen=True, slots=True)
class WorkerSettings:
    """One node's trainer: the run's training and encoding, and this node's data, places and device."""

    training: TrainingSettings
    data: tuple[str, ...]  # as given with --data; see data.py
    cache_dir: str
    inner_state_path: str
    node_seed: int
    codec: str  # compression.codecs knows the names
    shard_elements: int  # each shard is encoded by itself
    residual: bool  # error feedback: trainer/encoder.py
    device: str = "auto"
    threads: int = 1
    validation_windows: int = 64  # 64 x 128 bytes: 0.3 s for `tiny` on one core

    def __post_init__(self) -> None:
        _check_choice("device", self.device, DEVICES)
        _check_range("node_seed", self.node_seed, 0, (1 << 63) - 1)
        _check_range("shard_elements", self.shard_elements, 1, 1 << 26)
        _check_range("threads", self.threads, 1, 1024)
        _check_range("validation_windows", self.validation_windows, 1, 1 << 16)


def to_plain(settings: Any) -> dict[str, Any]:
    """A settings dataclass as nested dicts and lists of plain values, for TOML or msgpack."""
    return {field.name: _plain_value(getattr(settings, field.name)) for field in dataclasses.fields(settings)}


def model_settings_from(plain: Any) -> ModelSettings:
    """Raises SettingsError for anything but exactly the known fields with values in range."""
    return ModelSettings(**_fields_from(ModelSettings, plain, "model"))


def inner_settings_from(plain: Any) -> InnerSettings:
    """Raises SettingsError for anything but exactly the known fields with values in range."""
    return InnerSettings(**_fields_from(InnerSettings, plain, "inner"))


def training_settings_from(plain: Any) -> TrainingSettings:
    """Raises SettingsError for anything but exactly the known fields with values in range."""
    fields = _fields_from(TrainingSettings, plain, "training")
    fields["model"] = model_settings_from(fields["model"])
    fields["inner"] = inner_settings_from(fields["inner"])
    return TrainingSettings(**fields)


def worker_settings_from(plain: Any) -> WorkerSettings:
    """Raises SettingsError for anything but exactly the known fields with values in range."""
    fields = _fields_from(WorkerSettings, plain, "worker")
    fields["training"] = training_settings_from(fields["training"])
    if not all(isinstance(source, str) for source in fields["data"]):
        raise SettingsError("worker: data must be a list of strings")
    return WorkerSettings(**{**fields, "data": tuple(fields["data"])})


def _plain_value(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        return to_plain(value)
    return list(value) if isinstance(value, tuple) else value


def _fields_from(cls: type, plain: Any, where: str) -> dict[str, Any]:
    """The constructor's arguments: no unknown key, none missing that has no default, types exact."""
    if not isinstance(plain, dict):
        raise SettingsError(f"{where}: expected a table, got {type(plain).__name__}")
    known = {field.name: field for field in dataclasses.fields(cls)}
    for key in plain:
        if key not in known:
            raise SettingsError(f"{where}: unknown key {key!r}{_suggestion(str(key), list(known))}")
    values: dict[str, Any] = {}
    for name, field in known.items():
        if name in plain:
            values[name] = _typed(where, name, str(field.type), plain[name])
        elif field.default is dataclasses.MISSING:
            raise SettingsError(f"{where}: key {name!r} is missing")
    return values


_TYPES: dict[str, tuple[type, ...]] = {
    "int": (int,),
    "float": (float, int),
    "str": (str,),
    "bool": (bool,),
    "tuple[str, ...]": (list, tuple),
}


def _typed(where: str, name: str, annotation: str, value: Any) -> Any:
    if annotation not in _TYPES:
        return value  # a nested table, checked by its own reader
    allowed = _TYPES[annotation]
    if not isinstance(value, allowed) or (isinstance(value, bool) and annotation != "bool"):
        raise SettingsError(f"{where}: {name} must be of type {annotation}, got {value!r}")
    if isinstance(value, int) and annotation == "float":
        return float(value)
    return value


def _suggestion(key: str, known: list[str]) -> str:
    close = difflib.get_close_matches(key, known, n=1)
    return f", did you mean {close[0]!r}?" if close else ""


def _check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise SettingsError(f"{name} must be one of {', '.join(choices)}, got {value!r}")


def _check_range(name: str, value: float, low: float, high: float) -> None:
    if not math.isfinite(value) or not low <= value <= high:
        raise SettingsError(f"{name} must be between {low} and {high}, got {value!r}")


# `tiny` comes from simulating 3 members with outer Nesterov (lr 0.7, momentum 0.9) on thirds of the
# standard library's sources: an epoch is 3.5 s of one core, and the validation loss falls from 5.6 to 2.8
# in the first and to 1.9 in seven. lr 7e-4 to 1.5e-3 are equal within 0.05, 2e-3 and 4e-3 are worse by 0.1
# and 0.4; batches of 2 or 8 windows with the same tokens in an epoch are worse by 0.05 and 0.15.
# `nano` is for tests. The inner numbers of `small` are guesses.
PRESETS: dict[str, TrainingSettings] = {
    "nano": TrainingSettings(  # 48k parameters
        ModelSettings(
            hidden_size=32, intermediate_size=96, layers=3, heads=2, kv_heads=2, sequence_length=32
        ),
        InnerSettings(steps=8, batch_size=4, lr=4e-3, warmup_steps=8),
    ),
    "tiny": TrainingSettings(  # 894k parameters
        ModelSettings(
            hidden_size=128, intermediate_size=432, layers=4, heads=4, kv_heads=2, sequence_length=128
        ),
        InnerSettings(steps=64, batch_size=4, lr=1e-3, warmup_steps=30),
    ),
    "small": TrainingSettings(  # 9.9M parameters
        ModelSettings(
            hidden_size=320, intermediate_size=896, layers=8, heads=5, kv_heads=5, sequence_length=256
        ),
        InnerSettings(steps=100, batch_size=8, lr=1e-3, warmup_steps=100),
    ),
}
