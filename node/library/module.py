"""A torch module's trained parameters, seen as the run's one flat vector.

The parameters stay where they are, on whatever device and in whatever float type; the vector is f32 on the
CPU, and is nowhere whole but where the node keeps the base. Frozen parameters and buffers (a batch norm's
means) are each member's own.

Numeric contract: `load` rounds the base to each parameter's type. `difference` is (that rounded base) -
local, so a parameter that was not trained contributes exactly 0, in bf16 too.
"""

from __future__ import annotations

import hashlib
import math
from bisect import bisect_right
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from tapestry.compression.refusals import RefusedLayout
from tapestry.compression.shards import Layout
from tapestry.node.library.errors import SwarmError
from tapestry.node.trainer.encoder import Write


class Trained:
    """Of one module. Raises SwarmError for what cannot be trained so."""

    def __init__(self, module: nn.Module) -> None:
        named = {name: value for name, value in module.named_parameters() if value.requires_grad}
        for name, value in named.items():
            _require_plain(name, value)
        if not named:
            raise SwarmError("the module has no parameter that is trained", "set requires_grad before Swarm")
        try:
            self.layout = Layout.from_named([(name, tuple(value.shape)) for name, value in named.items()])
        except RefusedLayout as refused:
            raise SwarmError(f"the module cannot be trained: {refused}") from refused
        self._module = module
        self._parameters = list(named.values())
        self._sum: Tensor | None = None  # f32 (n,), CPU: of gradients, where these are what is contributed

    @contextmanager
    def modes_kept(self) -> Iterator[None]:
        """Each part of the module is in training or evaluation mode afterwards as it was before."""
        modes = [(part, part.training) for part in self._module.modules()]
        try:
            yield
        finally:
            for part, training in modes:
                part.training = training

    @property
    def device(self) -> str:
        """For people: where the parameters lie, as far as the first one tells."""
        return self._parameters[0].device.type

    def require_unchanged(self) -> None:
        """What is trained must be what is read and loaded. Raises SwarmError if the module has changed since.

        What was frozen meanwhile does no harm: it contributes 0.
        """
        ours = {id(value) for value in self._parameters}
        there = dict(self._module.named_parameters())
        new = next(
            (name for name, value in there.items() if value.requires_grad and id(value) not in ours), ""
        )
        held = {id(value) for value in there.values()}
        gone = next(
            (
                n
                for n, value in zip(self.layout.names, self._parameters, strict=True)
                if id(value) not in held
            ),
            "",
        )
        if new or gone:
            raise SwarmError(
                f"the module is not what it was when Swarm was made: {new or gone} "
                + ("is trained, and was not there or was frozen" if new else "is no longer in it"),
                "change, wrap or unfreeze it before Swarm(module, ...); nothing of it was contributed",
            )

    def schema_of(self, optimizer: torch.optim.Optimizer) -> str:
        """What a saved state of it is of: this layout, and which parameters the optimizer has in which order.

        Its state goes by their numbers, which another group, or one parameter less, changes.
        """
        names = {id(value): name for name, value in self._module.named_parameters()}
        parameters = [value for group in optimizer.param_groups for value in group["params"]]
        order = [(names.get(id(value), ""), tuple(value.shape)) for value in parameters]
        return hashlib.sha256(repr((self.layout.schema_hash, order)).encode()).hexdigest()

    @torch.no_grad()
    def load(
        self,
        base: Tensor,  # f32 (n,), CPU
    ) -> None:
        """Be the base, rounded to each parameter's type."""
        for parameter, start, stop in self._places():
            parameter.copy_(base[start:stop].view(parameter.shape))

    @torch.no_grad()
    def read(
        self,
        out: Tensor,  # f32 (n,), CPU, written
    ) -> None:
        """The parameters as they are."""
        for parameter, start, stop in self._places():
            out[start:stop].view(parameter.shape).copy_(parameter)

    def difference(
        self,
        base: Tensor,  # f32 (n,), CPU: what was loaded
    ) -> Write:
        """The pseudo-gradient, base minus local; to be encoded, while the module does not change."""
        places, offsets = [*self._places()], self.layout.offsets
        latest = (-1, base)  # a parameter's index, and all of it in one row: a copy, if it does not lie so

        @torch.no_grad()
        def write(start: int, stop: int, out: Tensor) -> None:
            nonlocal latest
            index = bisect_right(offsets, start) - 1
            while index < len(places) and offsets[index] < stop:
                parameter, first, last = places[index]
                low, high = max(start, first), min(stop, last)
                if low < high:
                    latest = latest if latest[0] == index else (index, parameter.reshape(-1))
                    local = latest[1][low - first : high - first].to("cpu")
                    began = base[low:high].to(local.dtype).to(torch.float32)
                    torch.sub(began, local.to(torch.float32), out=out[low - start : high - start])
                index += 1

        return write

    @torch.no_grad()
    def add_gradients(self) -> None:
        """Take the gradients of one batch into the sum, and leave none in their place. Raises SwarmError if
        there are none."""
        if all(parameter.grad is None for parameter in self._parameters):
            raise SwarmError(
                "no parameter has a gradient",
                "swarm.step(loss) comes after loss.backward(), and before zero_grad()",
            )
        if self._sum is None:
            self._sum = torch.zeros(self.layout.n, dtype=torch.float32, device="cpu")
        for parameter, start, stop in self._places():
            if parameter.grad is not None:
                gradient = parameter.grad.to_dense() if parameter.grad.is_sparse else parameter.grad
                self._sum[start:stop].view(parameter.shape).add_(gradient.to("cpu"))
                parameter.grad = None

    def mean_gradient(self, batches: int) -> Write:
        """The sum over so many batches, divided; to be encoded."""
        total = self._sum
        assert total is not None and batches

        def write(start: int, stop: int, out: Tensor) -> None:
            torch.div(total[start:stop], float(batches), out=out)

        return write

    def forget_gradients(self) -> None:
        """The sum of another base's is nothing to add to; nor are gradients that lie in the module."""
        if self._sum is not None:
            self._sum.zero_()
        for parameter in self._parameters:
            parameter.grad = None

    def _places(self) -> Iterator[tuple[nn.Parameter, int, int]]:
        """Each parameter, and from where to where it lies in the vector."""
        for parameter, start, shape in zip(
            self._parameters, self.layout.offsets, self.layout.shapes, strict=True
        ):
            yield parameter, start, start + math.prod(shape)


def _require_plain(name: str, value: nn.Parameter) -> None:
    if isinstance(value, nn.parameter.UninitializedParameter):
        raise SwarmError(
            f"the parameter {name} has no shape yet", "run the module once on a batch before Swarm"
        )
    if value.is_meta:
        raise SwarmError(f"the parameter {name} has no numbers: it is on the meta device", "load it first")
    if not value.is_floating_point():
        raise SwarmError(f"the parameter {name} is {value.dtype}, which cannot be averaged", "freeze it")
    if hasattr(value, "placements"):  # DTensor: FSDP2 and tensor parallelism
        raise SwarmError(
            f"the parameter {name} is spread over several processes",
            "train it in one process for each member",
        )
