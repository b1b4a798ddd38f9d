"""What the core's outputs mean for disk and parameters: one place that knows chain, state and their files.

The methods without `async` block, and run in the node's disk thread one after the other; those that touch
the parameters run under the runtime's state lock as well. An OSError means that the disk cannot be written:
it is passed on, and ends the node. The core's chain is the truth while the node runs; the keeper follows it
with one of its own, because its thread must not read what the loop changes.
"""

from __future__ import annotations

import logging
import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from tapestry.node.disk import signed_means
from tapestry.node.disk.accusations import Accusation
from tapestry.node.disk.base import BaseFolder
from tapestry.node.disk.branches import BRANCH_LIMITS, Branches, BranchLimits
from tapestry.node.disk.checkpoints import Abandoned, Checkpoints, Restoration, leads_to, restore
from tapestry.node.disk.store import LoadedStore, Store, UpdateMissing
from tapestry.node.home import Home
from tapestry.node.lineage.uses import note_left
from tapestry.node.net.donor import Donor
from tapestry.node.net.download import Wanted, fetch_state
from tapestry.node.net.throttle import Throttles
from tapestry.node.net.transfer import OpenStream, TransferLimits, WantedUpdate, fetch_update
from tapestry.node.progress import Told, silent
from tapestry.node.protocol.audit import SignedMean
from tapestry.node.protocol.canon import Crypto
from tapestry.node.protocol.chain import Chain
from tapestry.node.protocol.core import Restored, founding_vote
from tapestry.node.protocol.events import Vote
from tapestry.node.protocol.members import rollback_of
from tapestry.node.protocol.record import Body, Genesis, Record, found
from tapestry.node.protocol.settings import Settings, number_of
from tapestry.node.protocol.sync import NO_STATE
from tapestry.node.spec.run import RunSpec
from tapestry.node.state.means import payload_digest, payload_of
from tapestry.node.state.model import ModelState, TornState

GENESIS_SERVES_MAX = 64  # Guess: of the stream of the genesis at once; each is one frame, within 10 s

_log = logging.getLogger("tapestry.keeper")


class KeeperError(Exception):
    """The state cannot be had from our own disk; one line that says why."""


@dataclass(frozen=True, slots=True)
class Left:
    """What a fork cost."""

    records: int  # of ours
    tokens: int  # behind them
    branch: str  # the name under which they are kept; "" if they are not


class Keeper:
    """Disk and parameters of one node, of a run that has its genesis."""

    def __init__(
        self,
        home: Home,
        spec: RunSpec,
        store: Store,
        loaded: LoadedStore,
        genesis: Genesis,
        state: ModelState,
        throttles: Throttles | None = None,  # the node's; None: no caps
        base: BaseFolder | None = None,  # of a run that continues one
        begins: bool = False,  # `state` was made just now: it is the genesis' and lies in a checkpoint
        branches: BranchLimits = BRANCH_LIMITS,
    ) -> None:
        self.run_id = genesis.run_id
        self.spec = spec
        self._home = home
        self._base = base
        self._begins = begins
        self.store = store
        self.state = state
        self.checkpoints = Checkpoints(home.checkpoints, genesis.run_id, spec.limits.checkpoints_kept)
        self.branches = Branches(home, branches)
        self._limits = spec.limits
        self._transfer = TransferLimits(spec.round.stall_s, throttles=throttles or Throttles())
        self._chain = store.chain(genesis)
        self._vote = loaded.vote
        self._digest = ""  # of the state, unless it is torn
        self._draft = store.draft(state.arithmetic.payload_sizes)
        self._voted_for: tuple[str, Sequence[Tensor]] = ("", ())  # head and payloads of the newest result

    # --- the disk thread -----------------------------------------------------------------------

    def restore(self) -> Restored:
        """As far as the disk takes us: chain, state, vote. Raises OSError."""
        self.checkpoints.load()
        chain = self._chain
        self.branches.load(chain)
        if self._begins and chain.epoch == 0:  # to read it back would take as long as to write it did
            restored: Restoration | None = Restoration(0, chain.genesis.state_digest, "")
        else:
            restored = restore(chain, chain.epoch, self.store, self.checkpoints, self.state)
        if restored is not None:
            self._digest = restored.state_digest
            if restored.reason:
                _log.warning(
                    "restored epoch=%d of=%d %s; the rest comes from the others. Check the disk if no "
                    "power cut explains it",
                    *(restored.epoch, chain.epoch, restored.reason),
                )
        return Restored(
            self.store.chain(chain.genesis),
            restored.epoch if restored is not None else NO_STATE,
            restored.state_digest if restored is not None else "",
            self._vote,
            self.store.heads_with_updates(),
            secrets.token_hex(16),
        )

    def copy_of_chain(self) -> Chain:
        """The chain as it is on disk now, for the loop, where this one must not be read."""
        return self.store.chain(self._chain.genesis)

    def write_vote(self, vote: Vote) -> None:
        self.store.write_vote(vote)

    def put_result(self, shard: int, payload: Any, digest: str) -> None:
        """A shard of the round's result (ResultPayload), written before all of it is there. In its thread.

        From then on it is read from there: its memory is free.
        """
        payload.tensor = self._draft.put(shard, payload.tensor, digest)

    def write_update(
        self, epoch: int, head: str, payloads: Sequence[Any], means: Sequence[SignedMean]
    ) -> None:
        """In the result's thread; held as well till it is applied or the round ends."""
        tensors = [payload.tensor for payload in payloads]
        self.store.drop_means(epoch - 1)
        self.store.write_update(epoch, head, tensors, self._draft, signed_means.pack(means))
        self._voted_for = (head, tensors)

    def drop_result(self, committed: bool) -> None:
        """The round is over. In the result's thread."""
        self._draft.drop()
        if not committed:
            self._voted_for = ("", ())

    def append_record(self, record: Record) -> None:
        self.store.append_record(record)
        self._chain.append(record)

    def switch_chain(self, epoch: int, records: Sequence[Record]) -> Left:
        """Leave a fork at `epoch` for `records`. What is left is kept as a branch first, in the order of
        disk/branches.py: a kill leaves the one chain, or the other and the branch."""
        if self._home.data_events.exists():  # what contributes from now on does so to earlier epochs
            note_left(self._home, self.run_id, epoch)
        chain = self._chain
        branch = self.branches.keep(chain, epoch, records, self.store, self.checkpoints)
        left = [chain.head_at(one) for one in range(epoch + 1, chain.epoch + 1)]
        self.store.switch_chain(epoch, records)
        count, tokens = chain.switch(epoch, records)
        self.store.drop_updates(left)
        self.checkpoints.drop_left(chain, epoch)
        self.branches.fit()
        return Left(count, tokens, branch)

    def apply(self, record: Record) -> tuple[int, str]:
        """State epoch - 1 becomes state `epoch`: gives epoch and digest. Raises KeeperError."""
        body = record.body
        if self.state.torn or self.state.head != body.prev:
            self._reload(body.epoch - 1)
        try:
            head, payloads = self._voted_for  # what we voted for has the digest that its head names
            if head != record.head:
                payloads = self.store.read_update(body.epoch, record.head, body.result)
            self.state.apply(payloads, record, self._chain.settings_of(record))
        except (UpdateMissing, TornState) as error:
            raise KeeperError(str(error)) from error
        finally:
            self._voted_for = ("", ())
        self._digest = self.state.digest()
        return body.epoch, self._digest

    def take_aside(
        self,
        body: Body,
        payloads: Sequence[Any],
        out: Tensor,  # f32 (n,)
    ) -> bool:
        """The parameters that the step of `body` makes of the state, into `out`. Nothing else changes.

        False if the state is not the one before it. Raises Refused.
        """
        if self.state.torn or self.state.head != body.prev or self._chain.head != body.prev:
            return False
        self.state.aside([p.tensor for p in payloads], body, self._chain.roll.settings, out)
        return True

    def _reload(self, epoch: int) -> None:
        """A step was broken off: take it again from what lies on disk. Raises KeeperError."""
        if self.rollback(epoch)[0] != epoch:
            raise KeeperError(f"our disk no longer leads to state {epoch}")

    def rollback(self, epoch: int) -> tuple[int, str]:
        """To state `epoch`, or one before it on the path there if that is all there is. Raises KeeperError.

        All there is may be less than was asked: an earlier record may have been left for another since.
        """
        epoch = min(epoch, self._chain.epoch)
        to = self._chain.rolled.get(epoch, -1)
        if not self.state.torn and to >= 0 and self.state.head == self._chain.head_at(to):
            self.state.rename(epoch, self._chain.head_at(epoch))  # we never left it, or had got it for this
            return epoch, self._digest
        restored = restore(self._chain, epoch, self.store, self.checkpoints, self.state)
        if restored is None:
            raise KeeperError(f"no checkpoint up to epoch {epoch}")
        self._digest = restored.state_digest
        return restored.epoch, restored.state_digest

    def rolled_back(self, epoch: int) -> tuple[int, str] | None:
        """Which state record `epoch` says that its state is, and why; None if it does not."""
        if epoch not in self._chain.rolled:
            return None
        (record,) = self._chain.after(epoch - 1, 1)
        return rollback_of(record.body.changes)

    def checkpoint_due(self, epoch: int) -> bool:
        """A state that was rolled back to is one that joiners can be given at once."""
        return epoch % self._limits.checkpoint_every_epochs == 0 or epoch in self._chain.rolled

    def checkpoint(self, chain: Chain) -> bool:
        """Write the state; whether there was one to keep. A torn one is none, and to what was abandoned, the
        update log leads. In a thread of its own, for it takes as long as the disk does: so it has a chain of
        its own, and nobody changes the state meanwhile."""
        if self.state.torn or self.state.epoch > chain.epoch:
            return False
        if chain.head_at(self.state.epoch) != self.state.head:
            return False  # on the way back from a fork
        if not chain.leads(self.state.epoch):
            return False  # on the way to an earlier state
        try:
            self.checkpoints.save(self.state, self._digest)
        except Abandoned:
            return False
        return True

    def prune(self, back_to: int | None = None) -> None:
        """Drop what the limits no longer allow. What leads to state `back_to` stays as well."""
        self.checkpoints.prune(self._chain, back_to)
        base = self.checkpoints.base_epoch(self._chain)
        if back_to is not None:
            base = min(base, self.checkpoints.base_of(self._chain, back_to))
        self.store.prune(self._chain, self._limits, base)
        self.branches.fit()

    # --- what a proof is against (accusation_desk.Evidence): for any thread ---------------------

    @property
    def epoch(self) -> int:
        """Of the newest record."""
        return self.store.epoch

    def of_a_record(self, lie: Accusation) -> bool:
        """Whether it is of the contributions of a record in our chain, and of a member of that."""
        return self._record_of(lie) is not None

    def in_the_state(self, lie: Accusation) -> bool:
        """Whether the wrong mean is in the update of that record. Reads the shard from our disk."""
        record = self._record_of(lie)
        if record is None:
            return False
        try:
            payload = self.store.read_shard(record.body.epoch, record.head, record.body.result, lie.shard)
        except (UpdateMissing, OSError):
            return False
        return payload_digest(payload_of(payload)) == lie.digest

    def settings_at(self, epoch: int) -> Settings:
        """What records up to `epoch` have changed of the spec; where we are not so far, up to our newest.
        Raises LookupError while a fork is left in the disk's thread."""
        try:
            chain = self.copy_of_chain()
        except AssertionError as error:
            raise LookupError("the chain is being changed") from error
        return chain.place_at(min(epoch, chain.epoch)).roll.settings

    def _record_of(self, lie: Accusation) -> Record | None:
        record = self.store.record(lie.epoch + 1)  # not our chain's: the disk thread changes that
        if record is None:
            return None
        members = record.body.members
        named = [(m.peer, m.contribution, m.weight) for m in members if m.weight]
        said = [(m.peer, m.contribution, m.weight) for m in lie.members]
        of_one = any(m.peer == lie.reducer for m in members)
        return record if record.body.prev == lie.head and named == said and of_one else None

    # --- the loop ------------------------------------------------------------------------------

    def held_back_to(self, chain: Chain, epoch: int) -> str:
        """The head of state `epoch` of the core's chain, if the disk has what makes it; else ""."""
        held = 0 <= epoch <= chain.epoch and leads_to(chain, epoch, self.store, self.checkpoints)
        return chain.head_at(epoch) if held else ""

    def abandon_checkpoint(self) -> None:
        """End the one that is being written, and write no more: the node leaves."""
        self.checkpoints.abandon()

    def donor(self, on_bytes: Callable[[str, int], None], genesis_only: bool = False) -> Donor:
        """What serves others from this disk: members, or whoever asks what the run is."""
        limits = replace(self._transfer, serves_max=GENESIS_SERVES_MAX) if genesis_only else self._transfer
        donor = Donor(
            self._chain.genesis, self.store, self.checkpoints, limits, on_bytes, self._base, genesis_only
        )
        donor.stall_s = lambda: self._stall_s(self._chain)
        return donor

    async def fetch_update(
        self, open_stream: OpenStream, wanted: WantedUpdate, on_bytes: Callable[[str, int], None]
    ) -> tuple[SignedMean, ...]:
        """Into the update log. Returns and raises as transfer.py says."""
        arithmetic = self.state.arithmetic
        limits = replace(self._transfer, stall_s=self._stall_s(self._chain))
        return await fetch_update(open_stream, wanted, arithmetic, self.store, limits, on_bytes)

    async def fetch_state(
        self,
        donors: Mapping[str, OpenStream],
        epochs: tuple[int, int],  # from, to
        chain: Chain,
        on_bytes: Callable[[str, int], None],
        on_fault: Callable[[str, Exception], None],
        told: Told = silent,
    ) -> None:
        """Into the parameters and a checkpoint, as `chain` signed them. Raises as download.py says."""
        wanted = Wanted(epochs[1], chain, self.state, self.checkpoints, told, epochs[0])
        limits = replace(self._transfer, stall_s=self._stall_s(chain))
        self._digest = await fetch_state(donors, wanted, limits, on_bytes, on_fault)

    def _stall_s(self, chain: Chain) -> float:
        """As the members have changed it since: a transfer over a line that they made room for goes on."""
        return number_of(chain.place.roll.settings, "round.stall_s", self._transfer.stall_s)

    @property
    def committed_tokens(self) -> int:
        """Behind the chain as it is on disk: of all members, since the genesis."""
        return self._chain.tokens

    @property
    def reached(self) -> tuple[int, str]:
        """Epoch and digest of the state."""
        return self.state.epoch, self._digest


def keep_initial_state(spec: RunSpec, genesis: Genesis, state: ModelState, home: Home) -> bool:
    """State 0, made of a joiner's own base: kept as a checkpoint if it is the one that the genesis names.

    Raises OSError.
    """
    digest = state.digest()
    if digest != genesis.state_digest:
        return False
    state.head = genesis.run_id
    checkpoints = Checkpoints(home.checkpoints, genesis.run_id, spec.limits.checkpoints_kept)
    checkpoints.load()
    checkpoints.save(state, digest)
    return True


def found_run(
    spec: RunSpec, founder: str, state: ModelState, home: Home, store: Store, crypto: Crypto
) -> LoadedStore:
    """Begin a run with the numbers that `state` holds; returns what the home holds then. Raises OSError.

    The checkpoint is written before the genesis, and so is the first vote: a home with a genesis has a state,
    and a founder's one knows by its vote that it was never lost.
    """
    text = spec.canonical().decode()
    digest = state.digest()
    nonce = secrets.token_hex(16)
    genesis = found(
        text,
        founder,
        digest,
        state.schema,
        state.n,
        nonce,
        crypto,
        spec.members.charter(),
        spec.members.founders,
    )
    state.head = genesis.run_id
    checkpoints = Checkpoints(home.checkpoints, genesis.run_id, spec.limits.checkpoints_kept)
    checkpoints.load()
    checkpoints.save(state, digest)
    vote = founding_vote(genesis.run_id, secrets.token_hex(16))
    store.write_vote(vote)
    store.write_genesis(genesis)
    return LoadedStore(genesis, 0, vote, ())
