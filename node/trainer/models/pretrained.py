"""A Hugging Face directory as the base of a run: what is in it, and whether a run can begin from it.

Any architecture that the installed transformers builds as a causal language model, from a configuration
alone: no remote code, no pickles, no quantized weights. A configuration may come from a peer, so it is
bounded by arithmetic first (folder.py), counted on torch's meta device next (which holds shapes and no
numbers), and compared with the memory that there is, before anything real is built.

transformers takes seconds to import: only functions do it. Used by `init`, by joining and by the worker.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tapestry.node.trainer.imports import meta_device
from tapestry.node.trainer.models.folder import CONFIG, INDEX, SINGLE, look_at, positions_by, read_config
from tapestry.node.trainer.models.refusal import ModelError, one_line
from tapestry.node.trainer.models.stored import StoredWeights
from tapestry.node.trainer.tokenizers.ids import TOKENIZER, TOKENIZER_CONFIG, check_tokenizer

# What every member of a run holds, beside the weights: parsed, never executed. chat_template.jinja is only
# copied into exports.
SHARED_FILES = (
    CONFIG,
    TOKENIZER,
    TOKENIZER_CONFIG,
    "special_tokens_map.json",
    "generation_config.json",
    "chat_template.jinja",
)

FLOAT_BYTES = 4
TRAIN_BYTES_PER_PARAMETER = 16  # parameter, gradient and AdamW's two moments, f32


@dataclass(frozen=True, slots=True)
class BaseFacts:
    """What `check_base` found; everything that a summary or a run spec says of a base."""

    folder: Path
    model_type: str
    architecture: str  # the class that transformers builds, as "LlamaForCausalLM"
    parameters: int  # tied ones once
    dtype: torch.dtype  # in which most weights are stored; f32 without weights
    vocab_size: int  # rows of the input embedding
    tokenizer_ids: int  # ids that the tokenizer may give
    sequence_length_max: int | None  # of the positions; None if the architecture has no limit
    bytes_to_build: int  # all of it in f32, with its buffers
    bytes_to_train: int  # all parameters
    weights_bytes: int  # of the safetensors files; 0 without weights
    licence: str  # as the base says it, "" if it does not
    unused: tuple[str, ...]  # stored tensors that the architecture does not take


@dataclass(frozen=True, slots=True)
class Frame:
    """A model without numbers: what is counted before anything is built."""

    module: nn.Module  # on the meta device
    parameters: int
    buffer_bytes: int


def check_base(
    source: str | Path,
    *,
    need_weights: bool = True,
    lora: bool = False,
    memory_bytes: int | None = None,  # of the device that trains; None: what this machine has free
) -> BaseFacts:
    """Look at a directory, or at a hub id's snapshot, and build nothing. Raises ModelError: one line, a hint.

    `need_weights` false: a configuration and a tokenizer are enough (`init --config`).
    """
    folder = look_at(source, need_weights)
    stored = StoredWeights.find(folder) if need_weights else None
    frame = frame_of(folder)
    tokenizer_ids = check_tokenizer(folder, embedding_rows(frame.module))
    unused = () if stored is None else _require_all_stored(folder, frame.module, stored)
    bytes_to_build = FLOAT_BYTES * frame.parameters + frame.buffer_bytes
    bytes_to_train = TRAIN_BYTES_PER_PARAMETER * frame.parameters + frame.buffer_bytes
    if stored is not None and not lora:
        require_rebuildable(folder, frame.module, stored)
    needed = stored.size_bytes if stored is not None and lora else bytes_to_train
    _require_memory(folder, frame.parameters, needed, memory_bytes, lora)
    config = model_config(frame.module)
    return BaseFacts(
        folder=folder,
        model_type=config.model_type,
        architecture=type(frame.module).__name__,
        parameters=frame.parameters,
        dtype=torch.float32 if stored is None else stored.dtype,
        vocab_size=embedding_rows(frame.module),
        tokenizer_ids=tokenizer_ids,
        sequence_length_max=sequence_length_max(config),
        bytes_to_build=bytes_to_build,
        bytes_to_train=bytes_to_train,
        weights_bytes=0 if stored is None else stored.size_bytes,
        licence=licence_of(folder),
        unused=unused,
    )


def require_claimed(folder: Path, parameters: int) -> None:
    """Files that a peer gave hold, and mean as many parameters as its run claims: by the claim alone was it
    judged whether this machine can have them (spec/size.py). Raises ModelError. Nothing real is built.
    """
    frame = frame_of(folder)
    if frame.parameters != parameters:
        raise ModelError(f"the run claims {parameters:,} parameters, its {CONFIG} means {frame.parameters:,}")
    check_tokenizer(folder, embedding_rows(frame.module))


def require_sequence_length(longest: int | None, sequence_length: int) -> None:
    """Raises ModelError if the base has no positions for so long a sequence."""
    if longest is not None and sequence_length > longest:
        raise ModelError(f"sequence_length {sequence_length} is longer than the base's {longest} positions")


# --- the configuration ------------------------------------------------------------------------------


def frame_of(folder: Path) -> Frame:
    """The architecture on the meta device, after its config was checked. Raises ModelError."""
    config = load_config(folder)
    with meta_device():
        module = construct(config, folder)
    parameters = sum(parameter.numel() for parameter in module.parameters())
    buffer_bytes = sum(buffer.numel() * buffer.element_size() for buffer in module.buffers())
    _require_steady_buffers(folder, module)
    return Frame(module, parameters, buffer_bytes)


def load_config(folder: Path) -> Any:
    """The transformers configuration, made ready for training: no cache, no dropout. Raises ModelError.

    Dropout is off, as in today's pre-training, and because an epoch that is begun again must give the same
    bits: so is the noise that some routers of experts draw.
    """
    from transformers import AutoConfig

    table = read_config(folder)
    quiet()
    try:
        config = AutoConfig.for_model(**_without_dropout(table))
    except Exception as error:  # whatever a model's own configuration raises
        raise ModelError(f"{folder / CONFIG} does not read: {one_line(error)}") from error
    _require_causal(folder, config, table)
    config.use_cache = False
    if hasattr(config, "output_router_logits"):
        config.output_router_logits = False
    return config


def described_config(folder: Path) -> dict[str, Any]:
    """config.json as an export writes it: all numbers, those that the base left to a default too.

    A default that changes in a later transformers then changes no exported model. Raises ModelError.
    """
    from transformers import AutoConfig

    table = read_config(folder)
    history = ("transformers_version", "_name_or_path", "torch_dtype")
    own = {key: value for key, value in table.items() if key not in history}
    try:
        whole = json.loads(AutoConfig.for_model(**own).to_json_string())
    except Exception as error:  # whatever a model's own configuration raises
        raise ModelError(f"{folder / CONFIG} does not read: {one_line(error)}") from error
    return {**{key: value for key, value in whole.items() if key not in history}, **own}


def construct(config: Any, folder: Path) -> nn.Module:
    """The model in f32 on torch's default device, without initialising its parameters. Raises ModelError."""
    from transformers import AutoModelForCausalLM
    from transformers.initialization import no_init_weights

    try:
        with no_init_weights():
            module: Any = AutoModelForCausalLM.from_config(
                config, dtype=torch.float32, trust_remote_code=False
            )
        module.tie_weights()
    except Exception as error:  # whatever a model's own constructor raises
        raise ModelError(f"{folder / CONFIG} does not make a model: {one_line(error)}") from error
    built: nn.Module = module
    return built


def construct_seeded(config: Any, folder: Path, seed: int) -> nn.Module:
    """The model in f32 on torch's default device, with transformers' own random initialisation."""
    from transformers import AutoModelForCausalLM

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            module: nn.Module = AutoModelForCausalLM.from_config(
                config, dtype=torch.float32, trust_remote_code=False
            )
        except Exception as error:  # whatever a model's own constructor raises
            raise ModelError(f"{folder / CONFIG} does not make a model: {one_line(error)}") from error
    return module


def untrained(module: nn.Module) -> list[str]:
    """Names of what a model keeps and does not train: persistent buffers, and parameters it froze itself."""
    return [name for name, tensor in kept_tensors(module) if not tensor.requires_grad]


def require_rebuildable(folder: Path, module: nn.Module, stored: StoredWeights, seed: int = 0) -> None:
    """What is not trained must follow from the config: a joiner without the weights has nothing else.

    Raises ModelError.
    """
    names = untrained(module)
    if not names:
        return
    with torch.device("cpu"):
        built = dict(kept_tensors(construct_seeded(load_config(folder), folder, seed)))
    for name in names:
        if name in stored.tensors and not torch.equal(stored.read(name).float(), built[name].float()):
            raise ModelError(
                f"{folder} keeps numbers in {name} that training leaves alone and no joiner can rebuild",
                "train adapters only (--lora 16): then every member holds the base",
            )


def model_config(module: nn.Module) -> Any:
    """The transformers configuration that a model was built with."""
    return module.config


def quiet() -> None:
    """Keep transformers' warnings and bars off the operator's screen."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


_NOISE = re.compile(r".*dropout.*|.*_pdrop|router_jitter_noise|input_jitter_noise|layerdrop")


def _without_dropout(table: Mapping[str, Any]) -> dict[str, Any]:
    kept = {
        key: value for key, value in table.items() if key not in ("transformers_version", "_name_or_path")
    }
    config = _config_class(str(table["model_type"]))
    names = {*kept, *_class_fields(config)}
    noises = {
        name: 0.0 for name in names if _NOISE.fullmatch(name) and _is_float(kept.get(name), config, name)
    }
    return {**kept, **noises}


def _config_class(model_type: str) -> Any:
    from transformers import __version__
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    if model_type not in CONFIG_MAPPING:
        raise ModelError(
            f"transformers {__version__} has no architecture {model_type[:60]!r}",
            "a newer transformers may have it; remote code is never run",
        )
    return CONFIG_MAPPING[model_type]


def _class_fields(config_class: Any) -> list[str]:
    return [field.name for field in dataclasses.fields(config_class)]


def _is_float(value: Any, config_class: Any, name: str) -> bool:
    """Whether the key holds a number, in the file or by default: some are flags or names of a kind."""
    default = next((field.default for field in dataclasses.fields(config_class) if field.name == name), None)
    chosen = default if value is None else value
    return isinstance(chosen, int | float) and not isinstance(chosen, bool)


def _require_causal(folder: Path, config: Any, table: Mapping[str, Any]) -> None:
    """Raises ModelError for what is not a decoder of text alone."""
    from transformers import AutoModelForCausalLM
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as NAMES

    path = folder / CONFIG
    if config.is_encoder_decoder:
        raise ModelError(f"{path}: an encoder-decoder ({config.model_type}); runs train decoders")
    if config.sub_configs:
        parts = ", ".join(sorted(config.sub_configs))
        raise ModelError(
            f"{path}: {config.model_type} wraps several models ({parts}); runs train one language model",
            "save its language model alone: model.get_decoder(), or the text-only revision of the same base",
        )
    if type(config) not in AutoModelForCausalLM._model_mapping:
        raise ModelError(f"{path}: transformers builds no causal language model of {config.model_type}")
    names = NAMES[config.model_type]
    expected = (names,) if isinstance(names, str) else tuple(names)
    said = table.get("architectures")
    if said and (not isinstance(said, list) or not any(name in expected for name in said)):
        named = said[0] if isinstance(said, list) else said
        raise ModelError(f"{path}: it is a {str(named)[:60]}, not a {expected[0]}")
    if getattr(config, "is_decoder", True) is False and config.model_type in _BIDIRECTIONAL:
        raise ModelError(f"{path}: {config.model_type} reads in both directions (is_decoder is false)")


# Encoders that transformers also builds as a causal LM, if is_decoder says so.
_BIDIRECTIONAL = (
    *("bert", "bert-generation", "big_bird", "camembert", "data2vec-text", "electra", "ernie"),
    *("megatron-bert", "reformer", "rembert", "roberta", "roberta-prelayernorm", "roc_bert", "roformer"),
    *("xlm-roberta", "xlm-roberta-xl", "xmod"),
)


def _require_steady_buffers(folder: Path, module: nn.Module) -> None:
    """Training must not change a buffer: averaging would leave it different everywhere."""
    for name, part in module.named_modules():
        if isinstance(part, nn.modules.batchnorm._NormBase) and part.track_running_stats:
            raise ModelError(
                f"{folder / CONFIG}: {name} keeps running statistics of each member's own data (batch norm), "
                "which averaging parameters leaves different everywhere"
            )


def sequence_length_max(config: Any) -> int | None:
    """By the positions that the configuration says; None if it says none."""
    return positions_by(lambda name: getattr(config, name, None))


def embedding_rows(module: nn.Module) -> int:
    embedding: Any = module
    return int(embedding.get_input_embeddings().weight.shape[0])


# --- the weights ------------------------------------------------------------------------------------


def same_names(module: nn.Module, stored: StoredWeights) -> bool:
    """Whether the files hold the module's tensors under the module's names: then they can be streamed.

    Not so where transformers joins stored tensors into larger ones (the experts of a mixture) or renames
    them.
    """
    shapes = {name: tuple(tensor.shape) for name, tensor in kept_tensors(module)}
    held = {name: stored.tensors[name].shape for name in shapes if name in stored.tensors}
    return not joins_tensors(module) and held == shapes


def joins_tensors(module: nn.Module) -> bool:
    """Whether transformers joins stored tensors into larger ones: the experts of a mixture."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter

    model: Any = module
    return any(isinstance(one, WeightConverter) for one in get_model_conversion_mapping(model))


def renames_tensors(module: nn.Module) -> bool:
    """Whether names on disk are others than the module's."""
    from transformers.conversion_mapping import get_model_conversion_mapping

    model: Any = module
    return bool(get_model_conversion_mapping(model, add_legacy=False))


def as_stored(frame: nn.Module, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """By the names, and in the pieces, in which transformers stores this architecture."""
    if not (joins_tensors(frame) or renames_tensors(frame)):
        return tensors
    from transformers.core_model_loading import revert_weight_conversion

    model: Any = frame
    converted: dict[str, torch.Tensor] = revert_weight_conversion(model, tensors)
    return converted


def kept_tensors(module: nn.Module) -> list[tuple[str, torch.Tensor]]:
    """Parameters in the module's own order, tied ones once, then persistent buffers."""
    stored = module.state_dict(keep_vars=True)
    buffers = [(name, buffer) for name, buffer in module.named_buffers() if name in stored]
    return [*module.named_parameters(), *buffers]


def _require_all_stored(folder: Path, module: nn.Module, stored: StoredWeights) -> tuple[str, ...]:
    """The stored names that nothing takes. Raises ModelError if something has no weights.

    Where names on disk are others than the module's, loading finds that out (registry.py).
    """
    names = [name for name, _ in kept_tensors(module)]
    if not same_names(module, stored):
        if any(name in stored.tensors for name in names[:1]) and not renames_tensors(module):
            missing = next(
                name
                for name, tensor in kept_tensors(module)
                if name not in stored.tensors or stored.tensors[name].shape != tuple(tensor.shape)
            )
            _refuse_missing(folder, module, stored, missing)
        return ()
    whole = module.state_dict(keep_vars=True)
    return tuple(sorted(name for name in stored.tensors if name not in whole))


def _refuse_missing(folder: Path, module: nn.Module, stored: StoredWeights, name: str) -> None:
    if name in stored.tensors:
        shape = tuple(dict(kept_tensors(module))[name].shape)
        raise ModelError(f"{folder} stores {name} as {stored.tensors[name].shape}, its config means {shape}")
    raise ModelError(
        f"{folder} holds no weights for {name}", f"it needs every shard that {INDEX} names, or {SINGLE}"
    )


def _require_memory(folder: Path, parameters: int, needed: int, has: int | None, lora: bool) -> None:
    has = available_bytes() if has is None else has
    if needed > has:
        raise ModelError(
            f"{folder} means {parameters:,} parameters: {_gib(needed)} to train, {_gib(has)} are free",
            "train adapters only (--lora 16), or a smaller base" if not lora else "use a smaller base",
        )


def available_bytes() -> int:
    """Memory that this process may still take: the machine's, or its control group's if that is less."""
    free = [_meminfo()]
    try:
        limit = Path("/sys/fs/cgroup/memory.max").read_text().strip()
        used = int(Path("/sys/fs/cgroup/memory.current").read_text())
        if limit != "max":
            free.append(max(0, int(limit) - used))
    except (OSError, ValueError):
        pass  # no control groups, or those of version 1: the machine's figure counts
    return min(free)


def _meminfo() -> int:
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, ValueError, StopIteration):
        return 1 << 62  # not Linux: unknown, and the operator's affair


def _gib(count: int) -> str:
    return f"{count / (1 << 30):.1f} GiB"


def licence_of(folder: Path) -> str:
    """What README.md's front matter says, else what a LICENSE file seems to be; "" if neither says it."""
    card = _start_of(folder / "README.md")
    if card.startswith("---\n"):
        for line in card[4:].split("\n---", 1)[0].splitlines():
            key, _, value = line.partition(":")
            if key.strip() == "license":
                return value.strip().strip("'\"")[:60]
    text = " ".join(_start_of(folder / "LICENSE").split())
    for phrase, name in (("Apache License", "apache-2.0"), ("MIT License", "mit")):
        if phrase in text[:400]:
            return name
    return ""


def _start_of(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return file.read(8192).decode("utf-8", errors="replace").replace("\r\n", "\n")
    except OSError:
        return ""
