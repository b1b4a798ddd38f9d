"""LoRA: low-rank adapters on a frozen base (Hu et al., 2106.09685), by PEFT.

A linear layer with the weight W of shape (out, in) becomes W + (alpha / rank) B A, with A of shape (rank, in)
and B of shape (out, rank). Only A and B are trained and averaged. A begins random, B at zero, so that state 0
is the base (section 4.1). The adapters are f32 whatever the base is stored in; the base keeps its own dtype.

The mean of the members' A and B is not the mean of their products. That is the usual compromise (FedIT,
2305.05644), and exact where members agree.

PEFT takes seconds to import: only functions do it.
"""

from __future__ import annotations

import functools
import math
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from tapestry.compression.shards import Layout
from tapestry.node.spec.training import TransformersSpec
from tapestry.node.trainer.models.refusal import ModelError

PREFIX = "base_model.model."
# Their fused kernels read these weights directly, without the layer's forward: PEFT refuses them.
_READ_DIRECTLY = ("out_proj", "conv1d")
_STATE_SPACE = ("falcon_h1", "falcon_mamba", "mamba", "mamba2", "nemotron_h")
_A, _B = ".lora_A.default.weight", ".lora_B.default.weight"


def adapt(base: nn.Module, settings: TransformersSpec) -> nn.Module:
    """The base with adapters, f32, the only parameters that are trained. Raises ModelError."""
    peft = _peft()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # PEFT's advice on settings that are the run's, not ours
            model: nn.Module = peft.get_peft_model(base, lora_config(base, settings))
    except (ValueError, TypeError) as error:
        raise ModelError(
            f"no adapters can be put there: {' '.join(str(error).split())[:200]}",
            "lora_targets names linear layers of the base; empty means all of them but the output",
        ) from error
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    unknown = [name for name in trained if not name.endswith((_A, _B))]
    if unknown or not trained:
        raise ModelError(f"lora_targets: adapters of another kind than A and B ({', '.join(unknown[:1])})")
    return model


def lora_config(base: nn.Module, settings: TransformersSpec) -> Any:
    """PEFT's configuration: no dropout, no biases. Dropout would differ from member to member."""
    from transformers.pytorch_utils import Conv1D

    model: Any = base
    model_type = model.config.model_type
    return _peft().LoraConfig(
        r=settings.lora_rank,
        lora_alpha=settings.lora_alpha,
        target_modules=list(settings.lora_targets) or "all-linear",
        exclude_modules=list(_READ_DIRECTLY) if model_type in _STATE_SPACE else None,
        lora_dropout=0.0,
        bias="none",
        fan_in_fan_out=any(isinstance(part, Conv1D) for part in base.modules()),
        task_type="CAUSAL_LM",
    )


def initial_adapters(layout: Layout, seed: int, out: Tensor) -> None:
    """Write A as PEFT draws it, Kaiming uniform with a = sqrt(5), in the layout's order; and B = 0.

    `out`: f32 (n,). The base is not needed for it.
    """
    generator = torch.Generator().manual_seed(seed)
    for name, view in layout.views(out).items():
        if name.endswith(_A):
            nn.init.kaiming_uniform_(view, a=math.sqrt(5), generator=generator)
        else:
            view.zero_()


def deltas(
    model: nn.Module,  # with adapters; its base may be on the meta device
    views: Mapping[str, Tensor],  # of the flat vector, by the layout's names
) -> dict[str, Callable[[], Tensor]]:
    """What the adapters add to which parameter of the base, by the base's own names; f32, made when called.

    PEFT computes it: for layers that store (in, out), and for the experts of a mixture in one tensor, too.
    """
    from peft.tuners.lora import LoraLayer

    for name, view in views.items():
        layer, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(layer), leaf, nn.Parameter(view, requires_grad=False))
    found: dict[str, Callable[[], Tensor]] = {}
    for path, part in model.named_modules():
        if isinstance(part, LoraLayer):
            parameter = getattr(part, "parameter_name", "weight")  # of a ParamWrapper; else of a layer
            name = f"{path.removeprefix(PREFIX).replace('.base_layer', '')}.{parameter}"
            _place_on_cpu(part.get_base_layer(), parameter)
            found[name] = functools.partial(part.get_delta_weight, "default")
    return found


def _place_on_cpu(layer: nn.Module, parameter: str) -> None:
    """PEFT puts what is added where the weight lies: a stand-in of its shape that takes no memory."""
    shape = layer.get_parameter(parameter).shape
    setattr(layer, parameter, nn.Parameter(torch.empty((), device="cpu").expand(shape), requires_grad=False))


def saved_names(layout: Layout) -> dict[str, str]:
    """The layout's names -> those in a PEFT directory, which leave out the adapter's own name."""
    return {name: name.replace(".default.weight", ".weight") for name in layout.names}


def import_peft() -> None:
    """What `adapt` imports, before it is known whether it is needed."""
    _peft()


def _peft() -> Any:
    import peft

    return peft
