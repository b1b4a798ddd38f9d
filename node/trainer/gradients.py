"""A batch -> its mean loss, and its gradient added to the parameters'.

The loss is the cross entropy in nats per predicted token, over all the batch's windows. They may be worked on
some at a time (`Footing`): each part's loss is divided by the whole batch's tokens, so the gradients add up
to those of the batch at once, to float error. So it is with what else a member chooses for itself: bf16
autocast, whose parameters and gradients stay f32; activation checkpointing; torch.compile.

The logits of a vocabulary of 49k to 262k would be the largest tensor of a step by far. They are made for
some positions at a time, and each piece's gradient is taken at once: the decoder's output is cut off from
the graph, the output layer is run on pieces of it forward and backward, and what comes to stand in its
gradient then goes back through the decoder in one pass. Nothing is computed twice. What a model does
between its output layer and its logits (a soft cap, a scale) is read from its config, and believed only if
a few tokens then get the logits that the model itself gives; else the model makes all logits at once.

Documents that must not see one another get positions that begin again at 0 with each: from them every
attention of transformers makes a block-diagonal mask, its sliding windows included. Whether this model does
is tried with a few tokens (`DocumentsLeak`).

Plain torch.autocast, not `accelerate`: it is one line here, where an Accelerator is one object for the whole
process, wraps model and optimizer, reads the environment, and would want the parameters that our flat vector
owns.

Knows of no epoch and no optimizer.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from tapestry.node.trainer.group import Group
from tapestry.node.trainer.memory import Footing

# Logits that are made at a time, by kind of device: three such tensors in f32 live at once. Guesses: 64 MiB
# each stay near a processor's cache, 256 MiB keep a GPU busy.
LOGITS_AT_A_TIME = {"cpu": 1 << 24, "cuda": 1 << 26}
IGNORED = -100  # the target of a window that fills up a process's share: torch's cross_entropy


class Batch(Protocol):
    """Windows of token ids, and where documents begin and end in them."""

    @property
    def ids(self) -> np.ndarray:
        """int64 (batch, sequence_length + 1)."""

    @property
    def segments(self) -> np.ndarray | None:
        """int (batch, sequence_length): the document of each id that is read; None: attention may cross."""


@dataclass(frozen=True, slots=True)
class Windows:
    """The plainest Batch."""

    ids: np.ndarray  # int64 (batch, sequence_length + 1)
    segments: np.ndarray | None = None  # int (batch, sequence_length)


class DocumentsLeak(ValueError):
    """The model lets a document see the one before it, whatever it is told."""

    def __init__(self) -> None:
        super().__init__(
            "this architecture cannot keep the documents of one window apart: "
            "a run of it needs data.attend_across_documents = true"
        )


@dataclass(frozen=True, slots=True)
class Inputs:
    """A batch as the model takes it, on its device."""

    ids: Tensor  # int64 (rows, sequence_length)
    targets: Tensor  # int64 (rows, sequence_length)
    positions: Tensor | None  # int64 (rows, sequence_length); None: the model's own

    def rows(self, start: int, stop: int) -> Inputs:
        """Some of the windows."""
        positions = None if self.positions is None else self.positions[start:stop]
        return Inputs(self.ids[start:stop], self.targets[start:stop], positions)

    def share(self, rank: int, size: int) -> Inputs:
        """A process's windows: for each process as many, the last ones perhaps with nothing to predict."""
        count = -(-len(self.ids) // size)
        places = torch.arange(rank * count, (rank + 1) * count, device=self.ids.device)
        taken = places.clamp(max=len(self.ids) - 1)
        targets = self.targets[taken].masked_fill((places != taken)[:, None], IGNORED)
        return Inputs(self.ids[taken], targets, None if self.positions is None else self.positions[taken])


def inputs_of(batch: Batch, device: torch.device) -> tuple[Inputs, int]:
    """With the number of tokens that it predicts."""
    ids = torch.from_numpy(batch.ids)
    targets, positions = ids[:, 1:], None
    count = targets.numel()
    if batch.segments is not None:
        segments = torch.from_numpy(np.ascontiguousarray(batch.segments))
        positions = positions_in(segments).to(device)
    return Inputs(ids[:, :-1].to(device), targets.to(device), positions), count


def positions_in(
    segments: Tensor,  # int (rows, length)
) -> Tensor:  # int64 (rows, length)
    """Each token's place in its document, from 0."""
    places = torch.arange(segments.shape[1]).expand(segments.shape)
    begins = torch.zeros_like(places)
    begins[:, 1:] = torch.where(segments[:, 1:] != segments[:, :-1], places[:, 1:], 0)
    return places - begins.cummax(dim=1).values


class Gradients:
    """One model's losses and gradients, and how much of a batch it takes at a time.

    The model's parameters and their gradients are whoever's who made it; gradients are added to.
    """

    def __init__(
        self,
        model: nn.Module,
        device: torch.device,
        footing: Footing,
        bf16: bool = False,
        compiled: bool = False,
        group: Group | None = None,
    ) -> None:
        self._model = model
        self._device = device
        self._bf16 = bf16
        self._group = group
        self._wrap: Callable[[Any], Any] = torch.compile if compiled else lambda function: function
        self._balance = _balance_of(model)
        self._head: _Head | None = None  # of the model, once it has been tried
        self._whole = self._wrap(model)
        # FSDP2 gathers parameters for the model's own call, and a mixture tells there of its experts.
        self._tried_head = group is not None or self._balance > 0
        self._tried_documents = False
        self._logits_at_a_time = LOGITS_AT_A_TIME.get(device.type, LOGITS_AT_A_TIME["cpu"])
        self.on_part: Callable[[], None] = lambda: None  # a forward pass is over: a step may have many
        self.footing = footing
        self.take(footing)

    @property
    def can_checkpoint(self) -> bool:
        """Whether the model knows activation checkpointing."""
        return bool(getattr(_causal(self._model), "supports_gradient_checkpointing", False))

    def take(self, footing: Footing) -> None:
        """Work so from now on."""
        if footing.checkpointing and self.can_checkpoint:
            _causal(self._model).activation_checkpointing_enable({"use_reentrant": False})
        self.footing = footing

    def add(self, batch: Batch) -> tuple[float, int]:
        """Mean loss and the number of predicted tokens; the gradient of the mean is added."""
        self._prepare(batch)
        inputs, count = inputs_of(batch, self._device)
        self._model.train()
        total = sum(self._backward(part, count) for part in self._parts(inputs))
        return self._of_all(float(total)), count

    def loss(self, batch: Batch) -> tuple[float, int]:
        """The same without a gradient, and as the model is used: without dropout."""
        self._prepare(batch)
        inputs, count = inputs_of(batch, self._device)
        self._model.eval()
        with torch.no_grad():
            total = sum(self._sum(part) for part in self._parts(inputs))
        return self._of_all(float(total)) / max(count, 1), count

    def _of_all(self, total: float) -> float:
        return total if self._group is None else self._group.sum(total)

    def _parts(self, inputs: Inputs) -> Iterator[Inputs]:
        """This process's windows, so many at a time; each process of a group has as many parts."""
        if self._group is not None:
            inputs = inputs.share(self._group.rank, self._group.size)
        for start in range(0, len(inputs.ids), self.footing.micro_batch):
            yield inputs.rows(start, start + self.footing.micro_batch)
            self.on_part()

    def _backward(self, inputs: Inputs, count: int) -> Tensor:
        """Scalar: this part's share of the mean."""
        if self._head is None:
            with self._autocast():
                logits, unbalance = self._logits(inputs)
                share = _cross_entropy(logits, inputs.targets) / count
            # FSDP2 takes the mean over the ranks of what is to be added up.
            ranks = 1 if self._group is None else self._group.size
            scaled = (share + self._balance * unbalance * inputs.targets.numel() / count) * ranks
            scaled.backward()  # type: ignore[no-untyped-call]
            return share.detach()
        with self._autocast():
            hidden = self._head.hidden(inputs)
        cut = hidden.detach().requires_grad_()
        shares = []
        for piece, targets in self._pieces(cut, inputs.targets):
            with self._autocast():
                share = self._head.loss(piece, targets) / count
            share.backward()  # type: ignore[no-untyped-call]
            shares.append(share.detach())
        hidden.backward(cut.grad)  # type: ignore[no-untyped-call]
        return torch.stack(shares).sum()

    def _sum(self, inputs: Inputs) -> Tensor:
        """Scalar: the sum of this part's losses."""
        with self._autocast():
            if self._head is None:
                return _cross_entropy(self._logits(inputs)[0], inputs.targets)
            pieces = self._pieces(self._head.hidden(inputs), inputs.targets)
            return torch.stack([self._head.loss(*piece) for piece in pieces]).sum()

    def _logits(self, inputs: Inputs) -> tuple[Tensor, Tensor | float]:
        """(rows, sequence_length, vocabulary); and how unevenly a mixture used its experts, 0 for others."""
        if not self._balance:
            logits: Tensor = self._whole(**_arguments(inputs)).logits
            return logits, 0.0
        out = self._whole(**_arguments(inputs), output_router_logits=True)
        return out.logits, out.aux_loss

    def _pieces(
        self,
        hidden: Tensor,  # (rows, sequence_length, width)
        targets: Tensor,  # int64 (rows, sequence_length)
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """(positions, width) and (positions,): as many positions as may have logits at a time."""
        assert self._head is not None
        positions = max(1, self._logits_at_a_time // self._head.vocabulary)
        yield from zip(
            torch.split(hidden.flatten(0, 1), positions),
            torch.split(targets.flatten(), positions),
            strict=True,
        )

    def _autocast(self) -> contextlib.AbstractContextManager[Any]:
        return torch.autocast(self._device.type, torch.bfloat16) if self._bf16 else contextlib.nullcontext()

    def _prepare(self, batch: Batch) -> None:
        """Try, with parameters that are not all zero yet, what is not known of every model."""
        if not self._tried_head:
            self._tried_head = True
            head = _Head.of(self._model, self._wrap)
            if head is not None and head.agrees_with(self._model, self._device):
                self._head = head
        if batch.segments is not None and not self._tried_documents:
            if not _keeps_documents_apart(self._model, self._device):
                raise DocumentsLeak
            self._tried_documents = True


class _Head:
    """A causal model in two: the decoder, and what makes logits of its output."""

    @classmethod
    def of(cls, model: nn.Module, wrap: Callable[[Any], Any]) -> _Head | None:
        causal = _causal(model)
        decoder = getattr(causal, "base_model", None)
        output = getattr(causal, "get_output_embeddings", lambda: None)()
        if not isinstance(output, nn.Linear) or not isinstance(decoder, nn.Module) or decoder is causal:
            return None
        return cls(decoder, output, causal.config, wrap)

    def __init__(
        self, decoder: nn.Module, output: nn.Linear, config: Any, wrap: Callable[[Any], Any]
    ) -> None:
        self._decoder = decoder
        self._compiled = wrap(decoder)
        self._output = output
        self._factor = getattr(config, "logit_scale", None) or 1.0  # Cohere
        self._factor /= getattr(config, "logits_scaling", None) or 1.0  # Granite
        self._cap = getattr(config, "final_logit_softcapping", None)  # Gemma 2
        self.loss: Callable[[Tensor, Tensor], Tensor] = wrap(self._loss)
        self.vocabulary = output.out_features

    def hidden(self, inputs: Inputs) -> Tensor:  # (rows, sequence_length, width)
        """What the output layer is given."""
        out: Tensor = self._compiled(**_arguments(inputs))[0]
        return out

    def logits(
        self,
        hidden: Tensor,  # (..., width)
    ) -> Tensor:  # (..., vocabulary)
        logits: Tensor = self._output(hidden)
        if self._factor != 1.0:
            logits = logits * self._factor
        return logits if self._cap is None else self._cap * torch.tanh(logits / self._cap)

    def _loss(
        self,
        hidden: Tensor,  # (positions, width)
        targets: Tensor,  # int64 (positions,)
    ) -> Tensor:
        """Scalar: the sum over the positions."""
        return _cross_entropy(self.logits(hidden), targets)

    def agrees_with(self, model: nn.Module, device: torch.device) -> bool:
        """Whether a few tokens get the model's own logits, to float error."""
        model.eval()
        with torch.no_grad():
            ids = torch.arange(2, device=device)[None]
            ours = self.logits(self._decoder(input_ids=ids, use_cache=False)[0])
            theirs = model(input_ids=ids, use_cache=False).logits
        return ours.shape == theirs.shape and torch.allclose(ours, theirs, rtol=1e-4, atol=1e-5)


def _keeps_documents_apart(model: nn.Module, device: torch.device) -> bool:
    """Whether another first document leaves the second one's logits as they are."""
    model.eval()
    documents = torch.tensor([[0, 1, 0, 1], [1, 0, 0, 1]], device=device)
    positions = torch.tensor([[0, 1, 0, 1]], device=device).expand(2, 4)
    try:
        with torch.no_grad():
            logits = model(input_ids=documents, position_ids=positions, use_cache=False).logits
    except TypeError:  # it takes no positions
        return False
    return torch.allclose(logits[0, 2:], logits[1, 2:], rtol=1e-4, atol=1e-5)


def _balance_of(model: nn.Module) -> float:
    """By how much a mixture of experts weighs the loss that keeps them all in use; 0 for what is none.

    It is the base's own figure (router_aux_loss_coef), whether or not its configuration turns it on: without
    that loss a mixture that trains for long comes to use a few experts alone (2101.03961, section 2.2).
    """
    causal = _causal(model)
    takes = "output_router_logits" in inspect.signature(causal.forward).parameters
    return (
        float(getattr(getattr(causal, "config", None), "router_aux_loss_coef", None) or 0.0) if takes else 0.0
    )


def _causal(model: nn.Module) -> Any:
    """The model itself; without what adapters have put around it."""
    unwrap = getattr(model, "get_base_model", None)
    return unwrap() if unwrap is not None else model


def _arguments(inputs: Inputs) -> dict[str, Any]:
    positions = {} if inputs.positions is None else {"position_ids": inputs.positions}
    return {"input_ids": inputs.ids, "use_cache": False, **positions}


def _cross_entropy(
    logits: Tensor,  # (..., vocabulary)
    targets: Tensor,  # int64 (...)
) -> Tensor:
    """Scalar: the sum, in f32."""
    return nn.functional.cross_entropy(
        logits.flatten(0, -2).float(), targets.flatten(), ignore_index=IGNORED, reduction="sum"
    )
