"""A run spec's model -> the network that is trained, its layout, and the state that the run begins with.

The one place that knows which architectures there are: a preset Llama (llama.py), or whatever transformers
builds from a folder (pretrained.py), trained as a whole or through adapters (lora.py). Another kind of model
is another file beside these, and a line in `build` and `initial_state`.

A layout holds what is trained, and nothing else crosses the network. What a model keeps besides (frozen
parameters, persistent buffers) must follow from its configuration alone, so that a joiner without the base's
weights has the same; only a LoRA run, whose members all hold the base, may keep more.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from tapestry.compression.shards import Layout
from tapestry.node.spec.training import ExternalSpec, LlamaSpec, ModelSpec, TransformersSpec
from tapestry.node.trainer.imports import meta_device
from tapestry.node.trainer.models import llama, lora
from tapestry.node.trainer.models.pretrained import (
    construct,
    construct_seeded,
    load_config,
    require_claimed,
    require_rebuildable,
    require_sequence_length,
    sequence_length_max,
    untrained,
)
from tapestry.node.trainer.models.refusal import ModelError
from tapestry.node.trainer.models.stored import StoredWeights
from tapestry.node.trainer.models.weights import (
    WeightsHasher,
    load_base,
    read_weights,
    weights_digest,
    weights_shapes,
)


def build(spec: ModelSpec, folder: Path | None, sequence_length: int) -> nn.Module:
    """The network on torch's default device, f32 in what is trained; `requires_grad` says what that is.

    The values of trained parameters are arbitrary: they come from the flat vector. On the meta device nothing
    is read but the configuration. `folder` is where config.json lies, and for LoRA the base's weights too.
    Raises ModelError.
    """
    if isinstance(spec, ExternalSpec):
        raise ModelError(
            "this run trains a module that each member's script brings",
            "join it from a script: docs/library.md",
        )
    if isinstance(spec, LlamaSpec):
        return llama.build_model(spec, sequence_length)
    folder = _required(folder)
    config = load_config(folder)
    require_sequence_length(sequence_length_max(config), sequence_length)
    if torch.get_default_device().type != "meta":
        require_claimed(folder, spec.parameters)
    if not spec.lora_rank:
        module = construct(config, folder)
        return construct_seeded(config, folder, spec.seed) if untrained(module) else module
    if torch.get_default_device().type == "meta":
        return lora.adapt(construct(config, folder), spec)
    return lora.adapt(load_base(folder, StoredWeights.find(folder).dtype), spec)


def layout_of(module: nn.Module) -> Layout:
    """What is trained, in the module's own order; tied parameters once. Buffers are no part of it."""
    named = [(name, tuple(value.shape)) for name, value in module.named_parameters() if value.requires_grad]
    return Layout.from_named(named)


def layout(spec: ModelSpec, folder: Path | None, sequence_length: int) -> Layout:
    """As `layout_of`, without a model of numbers. Raises ModelError."""
    with meta_device():
        return layout_of(build(spec, folder, sequence_length))


def initial_state(
    spec: ModelSpec, folder: Path | None, sequence_length: int, out: Tensor | None = None
) -> Tensor:
    """State 0, f32 (n,) on the CPU, into `out` if given: the base's weights, or random ones from the seed.

    The weights are streamed, and must have the digest that the spec pins. Raises ModelError; `out` is then
    torn.
    """
    if isinstance(spec, LlamaSpec):
        drawn = llama.initial_state(spec, sequence_length)
        return drawn if out is None else out.copy_(drawn)
    with meta_device():
        frame = build(spec, folder, sequence_length)
    assert isinstance(spec, TransformersSpec), "`build` has refused an external module"
    plan = layout_of(frame)
    flat = torch.empty(plan.n, device="cpu") if out is None else out
    folder = _required(folder)
    if spec.lora_rank:
        require_weights(spec, folder)
        lora.initial_adapters(plan, spec.seed, flat)
    elif spec.weights:
        _read_base(spec, folder, frame, plan, flat)
    else:
        module = construct_seeded(load_config(folder), folder, spec.seed)
        plan.flatten({n: p for n, p in module.named_parameters() if p.requires_grad}, flat)
    return flat


def require_weights(spec: TransformersSpec, folder: Path) -> None:
    """Raises ModelError unless the folder holds the weights that the run began with."""
    if not spec.weights:
        raise ModelError("LoRA trains adapters on a base's weights: this run names none")
    _require_digest(spec, folder, weights_digest(folder))


def holds_weights(spec: TransformersSpec, folder: Path) -> bool:
    """Whether a member's own folder has the base's weights, so that it need not download state 0."""
    return bool(spec.weights) and weights_digest(folder) == spec.weights


def _read_base(spec: TransformersSpec, folder: Path, frame: nn.Module, plan: Layout, flat: Tensor) -> None:
    require_rebuildable(folder, frame, StoredWeights.find(folder), spec.seed)
    hasher, views = WeightsHasher(weights_shapes(frame)), plan.views(flat)
    for name, tensor in read_weights(folder, frame):
        if name in views:
            tensor = views[name].copy_(tensor)  # as f32, which is what is hashed: converted once
        hasher.update(tensor)
    _require_digest(spec, folder, hasher.hexdigest())


def _require_digest(spec: TransformersSpec, folder: Path, found: str) -> None:
    if found != spec.weights:
        raise ModelError(
            f"{folder} holds other weights ({found[:12]}) than the run began with ({spec.weights[:12]})",
            "use the same revision of the base, or leave --base out: the weights then come from the peers",
        )


def _required(folder: Path | None) -> Path:
    if folder is None:
        raise ModelError("a transformers model needs the folder of its config.json")
    return folder
