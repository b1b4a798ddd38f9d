"""`tapestry export`: a home's state at some epoch -> a Hugging Face directory (huggingface.py).

It only reads: the home may be read-only, its disk full, its identity key elsewhere. Works beside a live node:
a snapshot of the home (links to the files that never change, a copy of the chain) lies beside OUT for as long
as it takes, and so do the vectors of the state, as mapped files: the state need not fit into memory. A file
that the live node prunes meanwhile is met by another snapshot.

A record signs the state before it, so nobody has signed the head's yet. What is written unless an epoch is
asked for is therefore the newest state that was signed.
"""

from __future__ import annotations

import itertools
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from torch import Tensor

from tapestry.compression.shards import Layout
from tapestry.dht.identity import Identity, IdentityError
from tapestry.node.disk.checkpoints import Restoration
from tapestry.node.disk.held import bare_state, open_run
from tapestry.node.disk.scratch import scratch_vectors
from tapestry.node.errors import ExitCode, UserError
from tapestry.node.home import Home
from tapestry.node.lineage.asked import HEAD, ExportError, Wanted, require_epoch, require_free
from tapestry.node.lineage.card import Lineage, members_of, model_card, settings_of
from tapestry.node.lineage.crypto import ReaderCrypto
from tapestry.node.lineage.exported import described
from tapestry.node.lineage.follow import island_from
from tapestry.node.lineage.huggingface import DTYPES, Form, Progress, export_model, silent
from tapestry.node.lineage.manifest import LINEAGE, write_manifest
from tapestry.node.lineage.provable import alone_at, unprovable, vouched_to, vouching
from tapestry.node.lineage.snapshot import snapshot
from tapestry.node.net.descriptions import Descriptions
from tapestry.node.protocol.chain import Chain, makers, records_from
from tapestry.node.spec.declared import Declared, published
from tapestry.node.spec.run import RunSpec
from tapestry.node.spec.training import TransformersSpec
from tapestry.node.trainer.models import registry
from tapestry.node.trainer.models.folder import CONFIG
from tapestry.node.trainer.models.pretrained import licence_of
from tapestry.node.trainer.models.refusal import ModelError

TRIES = 3  # Guess: a live node prunes once an epoch; two in a row are bad luck


@dataclass(frozen=True, slots=True)
class Written:
    """What an export holds."""

    epoch: int
    newest: int  # epoch of the run's newest record in that home
    signed: bool  # its state, by the genesis or by a record
    unprovable: str  # why `verify` cannot prove its tensors from the export alone; "" if it can


@dataclass(frozen=True, slots=True)
class Restored:
    """A state, and what it is a state of."""

    spec: RunSpec
    layout: Layout
    flat: Tensor  # f32 (n,), a mapped file
    lineage: Lineage
    source: Home  # a snapshot, as long as the export takes
    chain: Chain
    island_from: int | None  # epoch of the record with which an island of the home's begins


def export_home(
    home: Home,
    out: Path,
    epoch: Wanted,
    *,
    dtype: str = "f32",
    adapters: bool = False,
    progress: Progress = silent,
) -> Written:
    """Write the state of `epoch` to `out`. Raises UserError.

    None is the newest epoch whose state was signed, but never 0 where the run is further, and the newest on
    the disk where that cannot be made any more. HEAD is the newest on the disk. `dtype` f32 or bf16, of the
    weights. `adapters`: those of a LoRA run alone, not merged into the base.
    """
    form = Form(DTYPES[dtype], adapters)
    require_epoch(home, epoch)
    try:
        require_free(out)
        with beside(out) as scratch:
            restored = restore(home, scratch, epoch, progress)
            base = base_folder(home, restored.spec)
            export_model(
                out,
                restored.spec.model,
                restored.spec.data.sequence_length,
                restored.layout,
                restored.flat,
                meta=restored.lineage.table()
                | described(restored.layout, _form(restored.spec, form), form.dtype),
                base=base,
                form=form,
                card=model_card(restored.lineage, restored.spec, adapters_apart=form.adapters_apart),
                progress=progress,
                finish=lambda folder: _carry(restored, base, folder),
            )
            return _written(restored, form)
    except ExportError as error:
        raise UserError(str(error)) from error
    except ModelError as error:
        raise UserError(str(error), hint=error.hint or None) from error
    except OSError as error:
        raise UserError(
            f"cannot export to {out}: {error.strerror or error}", exit_code=ExitCode.FAILED
        ) from error


def base_folder(home: Home, spec: RunSpec) -> Path | None:
    """Where a run of a base keeps its files."""
    return home.base if isinstance(spec.model, TransformersSpec) else None


def _form(spec: RunSpec, form: Form) -> str:
    if form.adapters_apart:
        return "adapters"
    return "merged" if isinstance(spec.model, TransformersSpec) and spec.model.lora_rank else "whole"


def _written(restored: Restored, form: Form) -> Written:
    epoch = restored.lineage.epoch
    signed = restored.chain.state_digest_at(epoch) is not None
    table = described(restored.layout, _form(restored.spec, form), form.dtype)
    alone = alone_at(restored.chain.place_at(_carried(restored)), epoch, restored.island_from)
    why = unprovable(table["form"], table["dtype"], epoch, signed, alone)
    return Written(epoch, restored.chain.epoch, signed, why)


def _carried(restored: Restored) -> int:
    """The last record that goes along: the one that signs the state, or, where few made that alone, the first
    that shows that a majority stood behind it later."""
    chain, epoch = restored.chain, restored.lineage.epoch
    last, needed = min(epoch + 1, chain.epoch), vouching(chain.place, epoch)
    if vouched_to(chain.place) < needed:
        return last
    return next(one for one in range(last, chain.epoch + 1) if vouched_to(chain.place_at(one)) >= needed)


def _carry(restored: Restored, base: Path | None, folder: Path) -> None:
    """The genesis, the records that vouch for this state, and the base's config, of which that of
    the export was made; then the manifest of it all."""
    (folder / LINEAGE).mkdir()
    shutil.copyfile(restored.source.genesis, folder / LINEAGE / "genesis.json")
    lines = _carried(restored)
    with (folder / LINEAGE / "chain.jsonl").open("wb") as out:
        if restored.source.chain.exists():
            with restored.source.chain.open("rb") as chain:
                out.writelines(line for line in itertools.islice(chain, lines) if line.endswith(b"\n"))
    if base is not None:
        shutil.copyfile(base / CONFIG, folder / LINEAGE / CONFIG)
    write_manifest(folder)


@contextmanager
def beside(out: Path) -> Iterator[Path]:
    """A folder on the disk that OUT will be on, gone afterwards. Raises ExportError."""
    parent = out.absolute().parent
    try:
        parent.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(prefix=f".{out.name}.export-", dir=parent))
    except OSError as error:
        raise ExportError(f"cannot write {out}: {error}") from error
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def newest_signed(chain: Chain) -> int:
    """The newest epoch whose state was signed; the head of a run of one epoch, which has nothing below but
    what it began from."""
    if chain.epoch <= 1 or chain.state_digest_at(chain.epoch) is not None:  # an earlier state again
        return chain.epoch
    return chain.epoch - 1


def _wanted(chain: Chain, epoch: Wanted, last: bool) -> int:
    if isinstance(epoch, int):
        return epoch
    return chain.epoch if epoch == HEAD or last else newest_signed(chain)


def restore(home: Home, scratch: Path, epoch: Wanted, progress: Progress) -> Restored:
    """Its vectors, and a snapshot of the home, lie in `scratch`. Raises UserError if the home no longer holds
    what makes the epoch."""
    reached = "nothing"
    wanted = 0
    for attempt in range(TRIES):
        last = attempt == TRIES - 1
        folder = scratch / f"home-{attempt}"
        run = open_run(snapshot(home, folder), ReaderCrypto())
        if run is None:
            raise UserError(f"{home.path} holds no run to export")
        chain, spec = run.chain, run.spec
        wanted = _wanted(chain, epoch, last)
        if wanted > chain.epoch:
            raise UserError(f"there is no epoch {wanted} yet: the run is at {chain.epoch} in {home.path}")
        progress("restoring", 0, 1)
        layout = registry.layout(spec.model, base_folder(home, spec), spec.data.sequence_length)
        params = scratch_vectors(folder, ("params",), layout.n)["params"]
        state = bare_state(spec, params, layout.schema_hash, chain.genesis.run_id, folder)
        restored = run.restore(state, wanted)
        progress("restoring", 1, 1)
        enough = epoch == HEAD or (epoch is None and last)  # that the disk leads to
        if restored is not None and (enough or restored.epoch == wanted):
            lineage = replace(
                _lineage(home, spec, chain, restored), vectors=tuple(state.vector_digests().items())
            )
            source = Home(folder)
            return Restored(spec, layout, state.params, lineage, source, chain, island_from(home))
        reached = "" if restored is None else f": it leads to epoch {restored.epoch} ({restored.reason})"
        shutil.rmtree(folder)
    raise UserError(
        f"{home.path} no longer holds what makes epoch {wanted}{reached}",
        exit_code=ExitCode.FAILED,
        hint="take a later epoch; or a home or backup of a member that keeps more (updates_kept_epochs)",
    )


def _lineage(home: Home, spec: RunSpec, chain: Chain, restored: Restoration) -> Lineage:
    base = base_folder(home, spec)
    members = members_of(makers(chain, restored.epoch))
    return Lineage(
        run_id=chain.genesis.run_id,
        run_name=spec.name,
        epoch=restored.epoch,
        head=chain.head_at(restored.epoch),
        state_digest=restored.state_digest,
        members=members,
        licence="" if base is None else licence_of(base),
        data=published(Declared.load(home)),
        others=_said_by_others(home, chain, [one.peer for one in members]),
        settings=settings_of(records_from(chain, 0, restored.epoch)),
    )


def _said_by_others(
    home: Home, chain: Chain, contributors: Sequence[str]
) -> tuple[tuple[str, tuple[str, ...]], ...]:
    """What contributors published of their data, in their order. This home's own is in data.toml."""
    try:
        own = Identity.load(home.identity_key).peer_id
    except (IdentityError, OSError):
        own = ""  # a copy without its key
    known = Descriptions(home.descriptions, chain.genesis.run_id, ReaderCrypto()).all
    said = {one.peer: one.texts for one in known if one.texts and one.peer != own}
    return tuple((peer, said[peer]) for peer in contributors if peer in said)
