"""A run as a home holds it, to read: its spec and chain, and the state of any epoch that the disk leads to.

For export, proofs and benchmarks; the running node has daemon/keeper.py, which writes as well. Nothing here
changes the home, but for `Store.load`, which cuts off a torn last line of the chain.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from tapestry.node.disk.checkpoints import Checkpoints, Restoration, restore
from tapestry.node.disk.scratch import scratch_vectors
from tapestry.node.disk.store import Store
from tapestry.node.home import Home
from tapestry.node.protocol.canon import Crypto
from tapestry.node.protocol.chain import Chain
from tapestry.node.spec.run import RunSpec
from tapestry.node.state.model import Arithmetic, ModelState


@dataclass(frozen=True, slots=True)
class HeldRun:
    """What `open_run` found."""

    spec: RunSpec
    chain: Chain
    store: Store
    checkpoints: Checkpoints

    def state(self, params: Tensor | None = None) -> ModelState:
        """State 0 in `params`; without any, a place for the numbers of a checkpoint."""
        genesis = self.chain.genesis
        numbers = torch.zeros(genesis.params) if params is None else params
        return bare_state(self.spec, numbers, genesis.schema, genesis.run_id)

    def restore(self, state: ModelState, epoch: int) -> Restoration | None:
        """Bring `state` to `epoch`, or as far as the disk leads; as disk/checkpoints.py says."""
        return restore(self.chain, epoch, self.store, self.checkpoints, state)

    def replay(self, state: ModelState) -> Iterator[int]:
        """Go on from `state`, one step on the path to the head at a time; gives each epoch. Raises
        UpdateMissing."""
        while state.epoch < self.chain.epoch:
            step = self.chain.step_from(state.epoch)
            if step in self.chain.rolled:
                state.rename(step, self.chain.head_at(step))
                yield step
                continue
            (record,) = self.chain.after(state.epoch, 1)
            body = record.body
            payloads = self.store.read_update(body.epoch, record.head, body.result)
            state.apply(payloads, record, self.chain.settings_of(record))
            yield body.epoch


def open_run(home: Home, crypto: Crypto) -> HeldRun | None:
    """The run that `home` holds; None if it holds none. Raises UserError, OSError."""
    store = Store(home, crypto)
    loaded = store.load()
    genesis = loaded.genesis
    if genesis is None:
        return None
    spec = RunSpec.of_genesis(genesis)
    checkpoints = Checkpoints(home.checkpoints, genesis.run_id, spec.limits.checkpoints_kept)
    checkpoints.load()
    return HeldRun(spec, store.chain(genesis), store, checkpoints)


def bare_state(
    spec: RunSpec, params: Tensor, schema: str, head: str = "", folder: Path | None = None
) -> ModelState:
    """State 0 of a run with this spec, in `params`; its outer state in files in `folder`, if there is one."""
    arithmetic = Arithmetic.of(spec, params.numel())
    names = arithmetic.outer.buffer_names
    buffers = scratch_vectors(folder, names, params.numel()) if folder is not None else None
    return ModelState(params, schema, arithmetic, 0, head, buffers)
