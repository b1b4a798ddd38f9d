"""Whole homes for tests: a run of some epochs with real signatures, real updates and checkpoints, on a preset
or on a small base (bases.py), written by the modules with which a node writes."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
from bases import make_base
from torch import Tensor

from tapestry.dht.identity import Identity
from tapestry.node.disk.base import BaseFile
from tapestry.node.disk.branches import Branches, BranchLimits
from tapestry.node.disk.checkpoints import Checkpoints, restore
from tapestry.node.disk.held import bare_state
from tapestry.node.disk.store import Store, result_digest
from tapestry.node.home import Home
from tapestry.node.lineage.crypto import NodeCrypto
from tapestry.node.protocol.chain import Chain
from tapestry.node.protocol.members import Change, change_message, rollback_value
from tapestry.node.protocol.place import behind_of, seat_of
from tapestry.node.protocol.record import (
    Body,
    Member,
    Record,
    accept_message,
    draw_message,
    found,
    head_of,
    seat_message,
)
from tapestry.node.spec.run import MembersSpec, RunSpec, new_spec
from tapestry.node.spec.training import (
    PRESETS,
    WEIGHTS,
    DataSpec,
    ModelSpec,
    TrainingSpec,
    TransformersSpec,
)
from tapestry.node.state.model import Arithmetic, ModelState
from tapestry.node.trainer.models import registry
from tapestry.node.trainer.models.pretrained import check_base
from tapestry.node.trainer.models.weights import weights_digest

LENGTH = 32
PINNED = ("config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json")


@dataclass
class MadeHome:
    """A home, and a run in it that can go on."""

    home: Home
    spec: RunSpec
    identities: tuple[Identity, ...]  # the founder first
    chain: Chain
    store: Store
    checkpoints: Checkpoints
    state: ModelState
    rng: torch.Generator = field(default_factory=lambda: torch.Generator().manual_seed(3))

    @property
    def params(self) -> Tensor:
        return self.state.params

    def advance(
        self, epochs: int = 1, *, scale: float = 0.05, checkpoint: bool = False, alone: bool = False
    ) -> None:
        """So many epochs of random updates, each signed by all; or by the founder alone, on an island."""
        for _ in range(epochs):
            self._epoch(scale, self.identities[:1] if alone else self.identities)
        if checkpoint:
            self.checkpoints.save(self.state, self.state.digest())

    def fresh_copy(self) -> list[bytes]:
        """The numbers of the state as they are."""
        return [bytes(vector) for vector in self.state.vectors()]

    def roll_back(self, to: int, why: str) -> None:
        """An epoch whose state is that of `to` again."""
        change = Change("rollback", "", rollback_value(to, self.chain.head_at(to), why), 99, f"{to:032x}")
        message, founder = change_message(self.chain.genesis.run_id, change), self.identities[0]
        change = change.signed(founder.peer_id, NodeCrypto(founder).sign(message))
        self._epoch(0.05, self.identities, (change,))
        restored = restore(self.chain, self.chain.epoch, self.store, self.checkpoints, self.state)
        assert restored is not None and restored.epoch == self.chain.epoch

    def leave_fork(self, common: int, epochs: int) -> str:
        """So many epochs, by all, that another side made after `common`, in the place of what is there. The
        name of the branch that is kept."""
        chain, elsewhere = self.chain, _Elsewhere()
        other = replace(self, chain=Chain(chain.genesis, chain.records[:common]), store=elsewhere)  # type: ignore[arg-type]
        other.state = held_state(self.spec, self.state)
        assert restore(chain, common, self.store, self.checkpoints, other.state) is not None
        other.advance(epochs)
        theirs, left = list(other.chain.records[common:]), list(chain.records[common:])
        branches = Branches(self.home, BranchLimits())
        branches.load(chain)
        name = branches.keep(chain, common, theirs, self.store, self.checkpoints)
        self.store.switch_chain(common, theirs)
        chain.switch(common, theirs)
        self.store.drop_updates([record.head for record in left])
        self.checkpoints.drop_left(chain, common)
        for record in theirs:
            self.store.write_update(record.body.epoch, record.head, elsewhere.updates[record.head])
        restored = restore(chain, chain.epoch, self.store, self.checkpoints, self.state)
        assert restored is not None and restored.epoch == chain.epoch
        return name

    def _epoch(
        self, scale: float, identities: tuple[Identity, ...], changes: tuple[Change, ...] = ()
    ) -> None:
        codec, shards = self.state.arithmetic.codec, self.state.arithmetic.shards
        payloads = [codec.encode(torch.randn(shard.n, generator=self.rng) * scale) for shard in shards]
        self.take(payloads, identities, changes)

    def take(
        self, payloads: list[Tensor], identities: tuple[Identity, ...], changes: tuple[Change, ...] = ()
    ) -> None:
        """One epoch: what the members' contributions came to, encoded, signed by `identities`."""
        epoch = self.chain.epoch + 1
        members = tuple(
            Member(one.peer_id, 300 - 100 * index, f"{epoch:062x}{index:02x}", "", 300 - 100 * index)
            for index, one in enumerate(identities)
        )
        forced = 2 * len(identities) <= len(self.chain.place.electorate)
        word = seat_message(self.chain.head, "")
        members = tuple(
            replace(m, seat=seat_of(self.chain.place, m, forced, NodeCrypto(one).sign(word)))
            for m, one in zip(members, identities, strict=True)
        )
        body = Body(
            self.chain.genesis.run_id,
            epoch,
            self.chain.head,
            self.state.digest(),
            tuple(sorted(members, key=lambda member: member.peer)),
            result_digest(payloads),
            forced=forced,
            behind=behind_of(self.chain.place, self.chain.records[-1] if epoch > 1 else None),
            changes=changes,
        )
        crypto = NodeCrypto(self.identities[0])
        head = head_of(body, crypto)
        votes, draws = (
            tuple(sorted((one.peer_id, NodeCrypto(one).sign(message)) for one in identities))
            for message in (accept_message(head, 0), draw_message(head))
        )
        record = Record(body, head, 0, votes, None, draws)
        self.store.write_update(epoch, head, payloads)
        self.store.append_record(record)
        self.chain.append(record)
        if not changes:
            self.state.apply(payloads, record)


class _Elsewhere:
    """The store of other members."""

    def __init__(self) -> None:
        self.updates: dict[str, list[Tensor]] = {}

    def write_update(self, epoch: int, head: str, payloads: list[Tensor]) -> None:
        self.updates[head] = payloads

    def append_record(self, record: Record) -> None: ...


def held_state(spec: RunSpec, like: ModelState) -> ModelState:
    """With room of its own."""
    return bare_state(spec, torch.zeros_like(like.params), like.schema)


def base_spec(home: Path, family: str, *, pin_weights: bool = False, **fields: Any) -> TransformersSpec:
    """A base of bases.py in HOME/base, pinned; of a LoRA run its weights too."""
    folder = make_base(home / "base", family)
    pinned = (*PINNED, WEIGHTS) if pin_weights else PINNED
    files = tuple(str(BaseFile.of(folder / name)) for name in pinned)
    parameters = check_base(folder).parameters
    return TransformersSpec("transformers", files, weights_digest(folder), parameters, **fields)


def make_home(folder: Path, model: ModelSpec, *, members: int = 2, length: int = LENGTH) -> MadeHome:
    """A run of a preset's settings, of tokens' voice."""
    data = DataSpec("base" if isinstance(model, TransformersSpec) else "byte", length)
    spec = new_spec("a run", TrainingSpec(model, data, replace(PRESETS["nano"].train)))
    return make_run(folder, spec, members=members, voice="tokens")


def make_run(
    folder: Path,
    spec: RunSpec,
    *,
    members: int,
    voice: Literal["equal", "tokens"] = "equal",
    weights: Path | None = None,  # where a base's weights lie; None: in HOME/base
) -> MadeHome:
    """Epoch 0, with a checkpoint. A base's weights are left out of HOME/base, as a node leaves them."""
    folder.mkdir(parents=True, exist_ok=True)
    identity = Identity.load_or_create(folder / "identity.key")
    others = [Identity.load_or_create(folder.parent / f"member-{n}.key") for n in range(1, members)]
    home, crypto = Home(folder), NodeCrypto(identity)
    founders = [identity.peer_id, *(one.peer_id for one in others)]
    spec = replace(spec, members=MembersSpec(voice=voice, founders=tuple(founders[1:])))
    model, length = spec.model, spec.data.sequence_length
    base = home.base if isinstance(model, TransformersSpec) else None
    layout = registry.layout(model, base, length)
    params = registry.initial_state(model, weights or base, length)
    state = ModelState(params, layout.schema_hash, Arithmetic.of(spec, layout.n), 0, "")
    digest = state.digest()
    text = spec.canonical().decode()
    charter = spec.members.charter()
    genesis = found(
        text, founders[0], digest, layout.schema_hash, layout.n, "0" * 32, crypto, charter, founders
    )
    state.head = genesis.run_id
    store = Store(home, crypto)
    store.load()
    store.write_genesis(genesis)
    checkpoints = Checkpoints(home.checkpoints, genesis.run_id, 3)
    checkpoints.load()
    checkpoints.save(state, digest)
    return MadeHome(home, spec, (identity, *others), Chain(genesis), store, checkpoints, state)
