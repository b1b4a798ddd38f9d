"""What is trained, on what, and how: the sections of run.toml that a trainer needs, and a trainer's own.

`TrainingSpec` is what all members of a run agree on; `WorkerSettings` adds what is this node's own affair.
Every key is declared here once, with its bounds, its default and its comment. run.py puts the sections into
the run spec; the node sends WorkerSettings to its trainer as plain values, and the trainer reads them with
the same strict reader as a file.

Must not import torch, or anything of ours but tables.py and data.py: reading settings costs nothing.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Final, Literal

from tapestry.node.protocol.settings import Settings, bounds_of, number_of
from tapestry.node.spec.data import DataSettings, Located, Protection
from tapestry.node.spec.tables import Between, Pattern, TableError

TENSORS_CHARS_MAX = 24 << 10  # of an external module, in a spec of 64 kB that is quoted in its genesis
BELOW_ONE = 0.999999  # a decay rate of 1 would never forget its start
BASE_FILE_BYTES_MAX = 64 << 20  # a tokenizer.json; Gemma 3's, of 262,144 ids, has 33 MB
WEIGHTS = "model.safetensors"
FILE_NAMES = (  # of a base's directory that members need; what else lies there is not taken
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "README.md",
    WEIGHTS,
)
BASE_FILE = Pattern(
    rf"({'|'.join(FILE_NAMES).replace('.', '[.]')}) [0-9]{{1,15}} [0-9a-f]{{64}}",
    "a name, a size in bytes and a blake3 digest, for one of " + ", ".join(FILE_NAMES),
)
DIGEST = Pattern(r"|[0-9a-f]{64}", "64 hex digits, or empty")


# ---- [model] -----------------------------------------------------------------------------------------

MODEL_COMMENT = (
    "llama: a Llama of the sizes below, from random parameters. transformers: any causal language model that "
    "the transformers library builds from a config.json without remote code; see `tapestry init --base`."
)


@dataclass(frozen=True, slots=True)
class LlamaSpec:
    """[model] with architecture = "llama". The defaults here, in [data] and [train] are those of `tiny`."""

    architecture: Annotated[Literal["llama"], MODEL_COMMENT] = "llama"
    hidden_size: Annotated[int, Between(8, 16_384), "Width. heads divides it, with an even quotient."] = 128
    intermediate_size: Annotated[int, Between(8, 65_536), "Width inside the feed-forward layers."] = 432
    layers: Annotated[int, Between(1, 256), "Number of transformer layers."] = 4
    heads: Annotated[int, Between(1, 256), "Attention heads."] = 4
    kv_heads: Annotated[int, Between(1, 256), "Key and value heads; divides heads."] = 2
    tie_embeddings: Annotated[bool, "Use one matrix as input embedding and output layer."] = True
    seed: Annotated[int, Between(0, 2**32 - 1), "Seed of the initial parameters."] = 0


@dataclass(frozen=True, slots=True)
class TransformersSpec:
    """[model] with architecture = "transformers": a base that every member has as files in HOME/base."""

    architecture: Annotated[Literal["transformers"], MODEL_COMMENT]
    files: Annotated[
        tuple[str, ...],
        BASE_FILE,
        "What every member has in HOME/base: name, bytes, blake3 digest. A joiner takes them from its peer.",
    ]
    weights: Annotated[
        str,
        DIGEST,
        "Digest of the base's weights as f32, whatever files they lie in; empty: random parameters.",
    ]
    parameters: Annotated[int, Between(1, 2**50), "Parameters of the whole model."]
    seed: Annotated[int, Between(0, 2**32 - 1), "Seed of random parameters, and of new adapters."] = 0
    lora_rank: Annotated[
        int,
        Between(0, 1_024),
        "0 trains all parameters. Above, the base is frozen and only adapters of this rank (LoRA) are "
        "trained and averaged.",
    ] = 0
    lora_alpha: Annotated[
        float, Between(0, 10_000, above=True), "Scale of the adapters: alpha / rank (2106.09685)."
    ] = 32.0
    lora_targets: Annotated[
        tuple[str, ...],
        Pattern(r"[A-Za-z0-9_.]{1,128}", "letters, digits, _ and ."),
        "Names of the layers that get adapters; none: every linear layer but the output.",
    ] = ()

    def file(self, name: str) -> tuple[int, str] | None:
        """Bytes and digest of a file of the base, or None if the run has none of this name."""
        for text in self.files:
            file_name, size_bytes, digest = text.split(" ")
            if file_name == name:
                return int(size_bytes), digest
        return None


TENSOR = re.compile(r"(?P<name>[^\s]{1,200}) (?P<shape>scalar|[0-9]{1,15}(x[0-9]{1,15}){0,7})")


@dataclass(frozen=True, slots=True)
class ExternalSpec:
    """[model] with architecture = "external": the run knows names and shapes, each member's script the rest.

    Nothing of the module itself crosses the network: no code, no pickle. `of` makes one from a layout.
    """

    architecture: Annotated[Literal["external"], MODEL_COMMENT]
    schema: Annotated[
        str,
        Pattern(r"[0-9a-f]{64}", "64 hex digits"),
        "Digest of the names and shapes of the module's trained parameters, in the module's order.",
    ]
    parameters: Annotated[int, Between(1, 2**50), "How many numbers are trained."]
    tensors: Annotated[
        tuple[str, ...],
        Pattern(TENSOR.pattern, "a name and a shape, such as layer.weight 64x32"),
        "Those names and shapes; none where they would make the spec too long. The digest says it all.",
    ] = ()

    @classmethod
    def of(cls, schema: str, names: Sequence[str], shapes: Sequence[tuple[int, ...]]) -> ExternalSpec:
        """The spec of a module with this layout, whose digest is `schema`."""
        tensors = tuple(map(tensor_text, names, shapes))
        listed = sum(map(len, tensors)) <= TENSORS_CHARS_MAX and all(map(TENSOR.fullmatch, tensors))
        parameters = sum(math.prod(shape) for shape in shapes)
        return cls("external", schema, parameters, tensors if listed else ())


def tensor_text(name: str, shape: tuple[int, ...]) -> str:
    """As `ExternalSpec.tensors` has it."""
    return f"{name} {'x'.join(map(str, shape)) or 'scalar'}"


ModelSpec = LlamaSpec | TransformersSpec | ExternalSpec


# ---- [data] and [train] ------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class DataSpec:
    """[data]."""

    tokenizer: Annotated[
        Literal["byte", "base"],
        "byte: UTF-8 bytes and three special tokens. base: the tokenizer.json of the base.",
    ] = "byte"
    sequence_length: Annotated[int, Between(2, 65_536), "Tokens in one training sample."] = 128
    attend_across_documents: Annotated[
        bool,
        "Documents are packed into samples one after the other. Whether attention reaches from one into the "
        "one before.",
    ] = True
    add_bos: Annotated[
        bool,
        "Put the tokenizer's BOS before each document, where the base was pretrained so; `tapestry init "
        "--base` asks the base's tokenizer. A tokenizer without BOS, and byte, take false alone.",
    ] = False


@dataclass(frozen=True, slots=True)
class TrainSpec:
    """[train]. The inner optimizer's numbers have no effect with inner_steps = 0."""

    batch_size: Annotated[int, bounds_of("train.batch_size"), "Samples in one inner step."] = 4
    inner_steps: Annotated[
        int,
        Between(0, 100_000),
        "Local steps before each round (DiLoCo, 2311.08105: 30 to 500). "
        "0 sends a mean gradient instead, and the inner optimizer is not used.",
    ] = 64
    overlap: Annotated[
        bool,
        "Go on with the next inner steps while the round exchanges, take its result one round late, and keep "
        "them: slow links cost no training time, while a round is shorter than the inner steps. "
        "Needs inner_steps > 0.",
    ] = False
    accumulation: Annotated[
        int,
        bounds_of("train.accumulation"),
        "With inner_steps = 0: batches whose mean gradient is one contribution.",
    ] = 1
    optimizer: Annotated[
        Literal["adamw", "muon", "adamw8bit"],
        "The inner optimizer; its state never leaves the member. adamw: 8 bytes of state a parameter. "
        "muon: Muon for the matrices inside the network, 4 bytes each, and AdamW for the rest. "
        "adamw8bit: AdamW with 2 bytes of state a parameter, by bitsandbytes.",
    ] = "adamw"
    lr: Annotated[float, bounds_of("train.lr"), "Learning rate of the inner optimizer."] = 1e-3
    muon_lr: Annotated[
        float,
        Between(0, 10),
        "With muon, the matrices' learning rate; their updates are scaled to the size of AdamW's "
        "(2502.16982), so it is of AdamW's order. 0: lr.",
    ] = 0.0
    muon_momentum: Annotated[
        float, Between(0, BELOW_ONE), "With muon, the matrices' Nesterov momentum. Jordan 2024: 0.95."
    ] = 0.95
    betas: Annotated[tuple[float, float], Between(0, BELOW_ONE), "AdamW's decay rates."] = (0.9, 0.99)
    eps: Annotated[float, Between(1e-30, 1), "AdamW's epsilon."] = 1e-8
    weight_decay: Annotated[
        float,
        Between(0, 10),
        "The inner optimizer's weight decay; biases, norms and what has one dimension are left out. "
        "DiLoCo, table 5: 0.1.",
    ] = 0.1
    warmup_steps: Annotated[
        int,
        Between(0, 1_000_000),
        "Inner steps, counted over the whole run, in which lr rises from 0; for a member whose optimizer "
        "starts afresh in a later epoch, counted from there.",
    ] = 30
    schedule: Annotated[
        Literal["constant", "cosine", "wsd"],
        "What lr does after the warm-up. constant: it stays. cosine: it falls by a cosine over "
        "schedule_steps. wsd: it stays, and falls by a straight line in the last decay_share of "
        "schedule_steps.",
    ] = "constant"
    schedule_steps: Annotated[
        int,
        Between(0, 1_000_000_000),
        "With cosine and wsd: the run's length in inner steps, warm-up included; an epoch has inner_steps of "
        "them. After it lr stays at its lowest.",
    ] = 0
    min_lr_ratio: Annotated[float, Between(0, 1), "With cosine and wsd: the lowest lr, as a share of lr."] = (
        0.1
    )
    decay_share: Annotated[
        float, Between(0, 1), "With wsd: the share of schedule_steps in which lr falls. 2405.18392: 0.2."
    ] = 0.2
    grad_clip: Annotated[
        float,
        Between(1e-9, 1e9),
        "Largest L2 norm of a step's gradient (DiLoCo, table 5: 1); a large number does not clip.",
    ] = 1.0

    @property
    def batches(self) -> int:
        """How many batches a whole epoch takes: the unit that progress is counted in."""
        return self.inner_steps if self.inner_steps else self.accumulation


@dataclass(frozen=True, slots=True)
class Changed:
    """What records have changed of a run's training since its spec, from some epoch on; 0: nothing."""

    lr: float = 0.0
    batches: int = 0  # of an epoch: inner_steps, or accumulation where there are none
    batch_size: int = 0

    @classmethod
    def of(cls, train: TrainSpec, settings: Settings) -> Changed:
        """From what records have changed of the spec."""
        batches = number_of(settings, "train.inner_steps" if train.inner_steps else "train.accumulation", 0)
        batch_size = number_of(settings, "train.batch_size", 0)
        return cls(number_of(settings, "train.lr", 0.0), int(batches), int(batch_size))

    def of_spec(self, train: TrainSpec) -> TrainSpec:
        """The spec's training as it is in force."""
        batches = self.batches or train.batches
        return replace(
            train,
            lr=self.lr or train.lr,
            inner_steps=batches if train.inner_steps else 0,
            accumulation=train.accumulation if train.inner_steps else batches,
            batch_size=self.batch_size or train.batch_size,
        )


UNCHANGED: Final = Changed()


def without_effect(key: str, training: TrainingSpec) -> str:
    """Why a record that changes this setting would change nothing in a run trained so; "" if it would."""
    if key == "train.inner_steps" and not training.train.inner_steps:
        return "this run averages gradients (inner_steps = 0): change train.accumulation"
    if key == "train.accumulation" and training.train.inner_steps:
        return "this run takes inner steps: change train.inner_steps"
    if key in ("train.lr", "train.batch_size") and isinstance(training.model, ExternalSpec):
        return "in this run each member's script brings its own"
    if key == "gate.margin" and isinstance(training.model, ExternalSpec):
        return "in this run each member's script trains, which measures no result"
    return ""


@dataclass(frozen=True, slots=True)
class TrainingSpec:
    """What all members of a run agree on about training. `check` it where it was not read from a run spec."""

    model: Annotated[ModelSpec, "The network that everyone trains. All sizes are part of the run id."]
    data: Annotated[DataSpec, "How text becomes training samples. The text itself is each member's own."]
    train: Annotated[TrainSpec, "What a member does between two rounds."]

    def check(self) -> None:
        """What single keys cannot say. Raises TableError."""
        if isinstance(self.model, LlamaSpec):
            _check_llama(self.model)
        elif isinstance(self.model, TransformersSpec):
            _check_base(self.model)
        else:
            _check_external(self.model, self.train)
        if self.data.tokenizer == "base" and not (
            isinstance(self.model, TransformersSpec) and self.model.file("tokenizer.json")
        ):
            raise TableError('data.tokenizer: "base", but the model names no tokenizer.json')
        if self.data.add_bos and self.data.tokenizer == "byte":
            raise TableError(
                'data.add_bos: true with data.tokenizer = "byte", which has no BOS: set it to false'
            )
        if self.train.overlap and not self.train.inner_steps:
            raise TableError(
                "train.overlap: true with train.inner_steps = 0; a mean gradient waits for its round: "
                "set train.inner_steps above 0, or train.overlap = false"
            )
        if self.train.schedule != "constant" and not self.train.schedule_steps:
            raise TableError(
                f'train.schedule_steps: 0 with train.schedule = "{self.train.schedule}", '
                "which needs the run's length in inner steps"
            )


def _check_llama(model: LlamaSpec) -> None:
    if model.hidden_size % (2 * model.heads):
        raise TableError(
            f"model.hidden_size: {model.hidden_size} with model.heads = {model.heads}; "
            f"must be a multiple of {2 * model.heads}, for an even width of each head"
        )
    if model.heads % model.kv_heads:
        raise TableError(
            f"model.kv_heads: {model.kv_heads} with model.heads = {model.heads}; must divide model.heads"
        )


def _check_base(model: TransformersSpec) -> None:
    names = [text.split(" ")[0] for text in model.files]
    if len(set(names)) != len(names):
        raise TableError("model.files: a file is named twice")
    if "config.json" not in names:
        raise TableError("model.files: config.json is missing")
    for text in model.files:
        name, size_bytes, _ = text.split(" ")
        largest = BASE_FILE_BYTES_MAX + (4 * model.parameters if name == WEIGHTS else 0)
        if int(size_bytes) > largest:
            raise TableError(f"model.files: {name} has {size_bytes} bytes, at most {largest} are allowed")
    if model.lora_rank and WEIGHTS not in names:
        raise TableError("model.files: model.safetensors is missing, which model.lora_rank > 0 freezes")
    if model.lora_rank and not model.weights:
        raise TableError("model.weights: empty with model.lora_rank > 0; adapters need a base")


def _check_external(model: ExternalSpec, train: TrainSpec) -> None:
    shapes = [text.rsplit(" ", 1)[1] for text in model.tensors]
    total = sum(1 if shape == "scalar" else math.prod(map(int, shape.split("x"))) for shape in shapes)
    if shapes and total != model.parameters:
        raise TableError(f"model.parameters: {model.parameters}, but model.tensors has {total}")
    if train.overlap:
        raise TableError(
            "train.overlap: true with an external module, whose script waits for each round: set it to false"
        )


# ---- a member's own ----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class LocalTraining:
    """[training] of node.toml: how this member computes what the run asks for."""

    precision: Annotated[
        Literal["auto", "f32", "bf16"],
        "bf16 computes in bfloat16 where that is safe (autocast); parameters and gradients stay f32. auto: "
        "bf16 on a GPU that has it, f32 elsewhere.",
    ] = "auto"
    micro_batch: Annotated[
        int,
        Between(0, 65_536),
        "Samples in one forward pass; as many passes as it takes add up to the run's batch_size. Fewer need "
        "less memory. 0: all of the batch.",
    ] = 0
    checkpointing: Annotated[
        bool,
        "Activation checkpointing: keep the layers' inputs only and compute the rest again. A third slower, "
        "with much less memory.",
    ] = False
    compile: Annotated[
        bool, "torch.compile: faster steps after a minute or more at each start of the trainer."
    ] = False
    on_out_of_memory: Annotated[
        Literal["stop", "adapt"],
        "A step that does not fit in memory. stop: the trainer says what would fit, and starts again. adapt: "
        "it tries half the micro_batch, down to 1, then checkpointing, and says so in the log.",
    ] = "stop"


AS_USUAL = LocalTraining()
DEVICE = Pattern(
    r"auto|cpu(:[1-9])?|cuda(:[0-9]{1,2}(,[0-9]{1,2})*)?",
    "the form auto, cpu, cuda, cuda:1, or cuda:0,1 for several; cpu:2 is two processes, for trials",
)


@dataclass(frozen=True, slots=True)
class WorkerSettings:
    """One node's trainer: the run's training and encoding, and this node's data, places and device."""

    training: Annotated[TrainingSpec, "What the run agrees on."]
    data: Annotated[DataSettings, "Resolved: what to train on and to measure on."]
    cache_dir: Annotated[str, "For tokens."]
    inner_state_path: Annotated[str, "Of the inner optimizer."]
    cursor_path: Annotated[str, "Where each epoch begins in the data: trainer/data/cursor.py."]
    node_seed: Annotated[int, Between(0, 2**63 - 1), "Makes this node's random windows its own."]
    codec: Annotated[str, "compression.codecs knows the names."]
    shard_elements: Annotated[int, Between(1, 2**26), "Each shard is encoded by itself."]
    residual: Annotated[bool, "Error feedback: trainer/encoder.py."]
    base_dir: Annotated[str, "HOME/base, where the files of a base are."] = ""
    weights_dir: Annotated[str, "A directory of this member's own with the base's weights, or empty."] = ""
    device: Annotated[str, DEVICE, "Where to compute."] = "auto"
    local: Annotated[LocalTraining, "How to compute."] = AS_USUAL
    threads: Annotated[int, Between(1, 1_024), "CPU threads."] = 1
    run_spec: Annotated[str, "For a script, which looks whether it agrees: the canonical run spec."] = ""
    validation_windows: Annotated[int, Between(1, 2**16), "64 of `tiny`: 0.3 s on one core."] = 64
    gate_windows: Annotated[int, Between(0, 2**16), "To judge a result by: protocol/gate.py. 0: no gate."] = 0
    protected: Annotated[tuple[Protection, ...], "Domains that sources are kept clear of."] = ()
    located: Annotated[
        tuple[Located, ...], "Where sources may be read; one that is a path and not here: nowhere."
    ] = ()
    brought_path: Annotated[str, "What is brought from an island: trainer/brought.py. Or empty."] = ""


# `tiny` comes from simulating 3 members with outer Nesterov (lr 0.7, momentum 0.9) on thirds of the
# standard library's sources: an epoch is 3.5 s of one core, and the validation loss falls from 5.6 to 2.8
# in the first and to 1.9 in seven. lr 7e-4 to 1.5e-3 are equal within 0.05, 2e-3 and 4e-3 are worse by 0.1
# and 0.4; batches of 2 or 8 windows with the same tokens in an epoch are worse by 0.05 and 0.15.
# `nano` is for tests. The inner numbers of `small` are guesses.
PRESETS: dict[str, TrainingSpec] = {
    "nano": TrainingSpec(  # 48k parameters
        LlamaSpec(hidden_size=32, intermediate_size=96, layers=3, heads=2, kv_heads=2),
        DataSpec(sequence_length=32),
        TrainSpec(inner_steps=8, batch_size=4, lr=4e-3, warmup_steps=8),
    ),
    "tiny": TrainingSpec(LlamaSpec(), DataSpec(), TrainSpec()),  # 894k parameters
    "small": TrainingSpec(  # 9.9M parameters
        LlamaSpec(hidden_size=320, intermediate_size=896, layers=8, heads=5, kv_heads=5),
        DataSpec(sequence_length=256),
        TrainSpec(inner_steps=100, batch_size=8, lr=1e-3, warmup_steps=100),
    ),
}
