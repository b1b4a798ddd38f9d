"""`tapestry export`: a home's state at some epoch -> a Hugging Face directory (node/export.py).

Works beside a live node: it reads a snapshot of the home (hard links of the files that never change, a copy
of the chain), so that neither disturbs the other.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from tapestry.dht.identity import Identity, IdentityError
from tapestry.node.disk.held import bare_state, open_run
from tapestry.node.errors import ExitCode, UserError
from tapestry.node.home import Home
from tapestry.node.lineage.crypto import NodeCrypto
from tapestry.node.lineage.huggingface import ExportError, export_model
from tapestry.node.spec.training import LlamaSpec
from tapestry.node.trainer.models.llama import build_model, model_layout


def export_home(home: Home, out: Path, epoch: int | None) -> None:
    """Write the state of `epoch` (None: the newest on disk) to `out`. Raises UserError."""
    if not home.genesis.exists():
        raise UserError(f"{home.path} holds no run to export")
    try:
        identity = Identity.load(home.identity_key)
    except IdentityError as error:
        raise UserError(str(error)) from error
    with _snapshot(home) as copy:
        run = open_run(copy, NodeCrypto(identity))
        assert run is not None
        chain, spec, genesis = run.chain, run.spec, run.chain.genesis
        wanted = chain.epoch if epoch is None else epoch
        if wanted > chain.epoch:
            raise UserError(f"there is no epoch {wanted} yet: the run is at {chain.epoch} in {home.path}")
        assert isinstance(spec.model, LlamaSpec)
        layout = model_layout(build_model(spec.model, spec.data.sequence_length))
        state = bare_state(spec, torch.zeros(layout.n), layout.schema_hash, genesis.run_id)
        restored = run.restore(state, wanted)
        if restored is None or (epoch is not None and restored.epoch != epoch):
            reached = "nothing" if restored is None else f"epoch {restored.epoch}: {restored.reason}"
            raise UserError(
                f"{home.path} no longer holds what makes epoch {wanted} (reached {reached})",
                exit_code=ExitCode.FAILED,
            )
    meta = {
        "run_id": genesis.run_id,
        "run_name": spec.name,
        "epoch": restored.epoch,
        "head": chain.head_at(restored.epoch),
        "state_digest": restored.state_digest,
    }
    try:
        export_model(out, spec.model, spec.data.sequence_length, layout, state.params, meta=meta)
    except ExportError as error:
        raise UserError(str(error)) from error


@contextmanager
def _snapshot(home: Home) -> Iterator[Home]:
    """A home of links to this one's files, gone afterwards."""
    folder = Path(tempfile.mkdtemp(prefix=".export-", dir=home.path))
    try:
        copy = Home(folder)
        for source, target in ((home.genesis, copy.genesis), (home.chain, copy.chain)):
            if source.exists():
                shutil.copyfile(source, target)
        for source, target in ((home.checkpoints, copy.checkpoints), (home.updates, copy.updates)):
            target.mkdir()
            for path in sorted(source.glob("*")) if source.exists() else ():
                if path.suffix in (".safetensors", ".upd"):
                    _link(path, target / path.name)
        yield copy
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _link(path: Path, target: Path) -> None:
    try:
        os.link(path, target)
    except FileNotFoundError:
        return  # pruned a moment ago
    except OSError:  # no hard links here
        shutil.copyfile(path, target)
