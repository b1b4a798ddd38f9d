"""Disk and parameters: the state follows the chain, and a torn one is loaded again from what lies on disk."""

import asyncio
import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

from tapestry.dht.identity import Identity
from tapestry.node.daemon import keeper as keeper_module
from tapestry.node.daemon.averaging import ResultPayload
from tapestry.node.daemon.keeper import Keeper, KeeperError, found_run
from tapestry.node.daemon.restored import chain_of
from tapestry.node.disk.accusations import Accusation
from tapestry.node.disk.store import Store, result_digest
from tapestry.node.disk.update_header import update_name
from tapestry.node.home import Home
from tapestry.node.lineage.crypto import NodeCrypto
from tapestry.node.lineage.uses import note_use, spans
from tapestry.node.net.transfer import TransferLimits
from tapestry.node.protocol.chain import Chain
from tapestry.node.protocol.core import Core
from tapestry.node.protocol.events import Tick
from tapestry.node.protocol.members import Change, change_message, rollback_value
from tapestry.node.protocol.place import seat_of
from tapestry.node.protocol.record import (
    Body,
    Member,
    Record,
    accept_message,
    draw_message,
    head_of,
    seat_message,
)
from tapestry.node.protocol.rules import Rules
from tapestry.node.spec.declared import BASE
from tapestry.node.spec.run import MembersSpec, RunSpec, preset_spec
from tapestry.node.state.means import payload_digest
from tapestry.node.state.model import Arithmetic, ModelState

N = 700
SPEC: RunSpec = dataclasses.replace(preset_spec("nano", "test"), members=MembersSpec(voice="tokens"))


class Run:
    """A founder's keeper, and records made by hand."""

    def __init__(self, folder: Path) -> None:
        self.home = Home(folder)
        self.home.create()
        self.identity = Identity.load_or_create(self.home.identity_key)
        self.crypto = NodeCrypto(self.identity)
        self.keeper = self.open(found=True)

    def open(self, found: bool = False) -> Keeper:
        store = Store(self.home, self.crypto)
        loaded = store.load()
        params = torch.arange(N, dtype=torch.float32) / N
        state = ModelState(params, "ef" * 32, Arithmetic.of(SPEC, N), 0, "")
        if found:
            loaded = found_run(SPEC, self.identity.peer_id, state, self.home, store, self.crypto)
        genesis = loaded.genesis
        assert genesis is not None
        state.head = genesis.run_id
        return Keeper(self.home, SPEC, store, loaded, genesis, state, begins=found)

    def checkpoint(self) -> None:
        if self.keeper.checkpoint(self.keeper.copy_of_chain()):
            self.keeper.prune()

    def commit(self, keeper: Keeper, seed: int, *changes: Change) -> Record:
        """The next record, with an update, on disk; not yet applied."""
        chain = keeper.restore().chain
        codec = keeper.state.arithmetic.codec
        x = torch.randn(N, generator=torch.Generator().manual_seed(seed))
        payloads = [codec.encode(x)]
        line = Member(self.identity.peer_id, 1, f"{seed:064x}", "", 1)
        word = self.crypto.sign(seat_message(chain.head, ""))
        members = (dataclasses.replace(line, seat=seat_of(chain.place, line, False, word)),)
        body = Body(
            chain.genesis.run_id,
            chain.epoch + 1,
            chain.head,
            keeper.reached[1],
            members,
            result_digest(payloads),
            changes=tuple([self.signed(chain.genesis.run_id, change) for change in changes]),
        )
        head = head_of(body, self.crypto)
        signature, draw = (self.crypto.sign(said) for said in (accept_message(head, 0), draw_message(head)))
        me = self.identity.peer_id
        record = Record(body, head, 0, ((me, signature),), None, ((me, draw),))
        chain.check(record, self.crypto)
        keeper.write_update(body.epoch, head, [*map(ResultPayload, payloads)], ())
        keeper.append_record(record)
        return record

    def signed(self, run_id: str, change: Change) -> Change:
        return change.signed(self.identity.peer_id, self.crypto.sign(change_message(run_id, change)))


def back(chain: Chain, to: int) -> Change:
    return Change("rollback", "", rollback_value(to, chain.head_at(to), "a lie"), 99, f"{to:032x}")


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return Run(tmp_path / "home")


def test_a_silence_that_the_members_allow_by_now_ends_no_transfer(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken: list[float] = []

    async def fetch(*args: Any) -> str:
        taken.extend(one.stall_s for one in args if isinstance(one, TransferLimits))
        return ""

    monkeypatch.setattr(keeper_module, "fetch_update", fetch)
    monkeypatch.setattr(keeper_module, "fetch_state", fetch)
    run.keeper.restore()
    donor = run.keeper.donor(lambda *_: None)
    assert donor.stall_s() == SPEC.round.stall_s
    run.keeper.apply(run.commit(run.keeper, 0, Change("set", "", "round.stall_s 77", 9, "0" * 32)))
    chain, nothing = run.keeper.restore().chain, None
    asyncio.run(run.keeper.fetch_update(nothing, nothing, nothing))  # type: ignore[arg-type]
    asyncio.run(run.keeper.fetch_state({}, (0, 1), chain, nothing, nothing))  # type: ignore[arg-type]
    assert [donor.stall_s(), *taken] == [77.0, 77.0, 77.0]


def test_a_restart_comes_back_to_the_same_bits(run: Run) -> None:
    run.keeper.restore()
    for seed in range(7):
        epoch, digest = run.keeper.apply(run.commit(run.keeper, seed))
    run.checkpoint()
    again = run.open().restore()
    assert (again.state_epoch, again.state_digest) == (epoch, digest) == (7, run.keeper.state.digest())
    assert again.chain.epoch == 7


def test_killed_in_the_middle_of_a_rollback_a_node_comes_to_the_state_that_the_record_names(run: Run) -> None:
    run.keeper.restore()
    digests = [run.keeper.reached[1]]
    for seed in range(4):
        digests.append(run.keeper.apply(run.commit(run.keeper, seed))[1])
    run.checkpoint()
    run.commit(run.keeper, 4, back(run.keeper.copy_of_chain(), 2))
    killed = run.open().restore()  # the record is on disk, and the state of before
    assert (killed.state_epoch, killed.state_digest) == (5, digests[2])
    assert killed.chain.state_digest_at(5) == digests[2]
    assert run.keeper.rollback(5) == (5, digests[2]) == (5, run.keeper.state.digest())
    assert run.keeper.rolled_back(5) == (2, "a lie") and run.keeper.rolled_back(4) is None
    assert run.keeper.checkpoint_due(5)
    run.checkpoint()
    assert [c.epoch for c in run.keeper.checkpoints.list()] == [5, 0]  # that of 4 is of no use any more
    epoch, digest = run.keeper.apply(run.commit(run.keeper, 6))
    assert run.open().restore().state_digest == digest and epoch == 6


def test_a_proof_is_of_a_record_and_its_wrong_mean_in_the_update_or_it_moves_nothing(run: Run) -> None:
    """Who signs a wrong mean of an old round long after gets nothing undone; a stranger is not heard."""
    run.keeper.restore()
    run.keeper.apply(run.commit(run.keeper, 0))
    record = run.commit(run.keeper, 1)
    run.keeper.apply(record)
    body = record.body
    (payload, *_) = run.keeper.store.read_update(body.epoch, record.head)
    members, own = tuple(dataclasses.replace(m, tokens=0) for m in body.members), run.identity.peer_id
    lie = Accusation(body.prev, body.epoch - 1, members, 0, payload_digest(payload), own, "", ())
    assert run.keeper.of_a_record(lie) and run.keeper.in_the_state(lie)
    later = dataclasses.replace(lie, digest="00" * 32)
    assert run.keeper.of_a_record(later) and not run.keeper.in_the_state(later)
    for forged in (
        dataclasses.replace(lie, reducer="somebody else"),
        dataclasses.replace(lie, head="00" * 32),
        dataclasses.replace(lie, epoch=7),
        dataclasses.replace(lie, members=(dataclasses.replace(members[0], weight=2),)),
    ):
        assert not run.keeper.of_a_record(forged) and not run.keeper.in_the_state(forged)
    (run.home.updates / update_name(body.epoch, record.head)).unlink()
    assert not run.keeper.in_the_state(lie), "nobody knows"


def test_a_proof_is_judged_by_the_records_on_the_disk_while_the_chain_in_memory_changes(run: Run) -> None:
    """The disk thread had moved its beginning half-way: the record of another epoch was compared."""
    run.keeper.restore()
    run.keeper.apply(run.commit(run.keeper, 0))
    body = run.commit(run.keeper, 1).body
    members = tuple(dataclasses.replace(m, tokens=0) for m in body.members)
    lie = Accusation(body.prev, body.epoch - 1, members, 0, "00" * 32, run.identity.peer_id, "", ())
    del run.keeper._chain._tail[:1]  # as in the middle of Chain._let_go
    assert run.keeper.epoch == 2 and run.keeper.of_a_record(lie)


def test_who_could_decide_without_a_node_is_told_by_its_records(run: Run) -> None:
    """A restored home asks it before it gives up its vote: of a lone elector it is nobody else."""
    run.keeper.restore()
    run.keeper.apply(run.commit(run.keeper, 0))
    genesis = run.keeper.copy_of_chain().genesis
    place = chain_of(run.home, genesis, run.crypto).place
    assert (place.electorate, place.epoch) == ((run.identity.peer_id,), 1)


def test_a_state_of_what_is_undone_is_no_checkpoint(run: Run) -> None:
    run.keeper.restore()
    for seed in range(3):
        run.keeper.apply(run.commit(run.keeper, seed))
    run.commit(run.keeper, 3, back(run.keeper.copy_of_chain(), 1))
    run.checkpoint()
    assert [c.epoch for c in run.keeper.checkpoints.list()] == [0]


def test_a_node_knows_how_far_back_its_disk_leads(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    run.keeper.restore()
    for seed in range(3):
        run.keeper.apply(run.commit(run.keeper, seed))
    chain, held = run.keeper.copy_of_chain(), run.keeper.held_back_to
    monkeypatch.setattr(run.keeper, "copy_of_chain", None)  # to read it holds up the loop, and it may change
    assert [held(chain, epoch) for epoch in range(4)] == [chain.head_at(e) for e in range(4)]
    next(run.home.updates.glob("00000002-*")).unlink()
    run.keeper.store.load()
    assert [bool(held(chain, epoch)) for epoch in (-1, 0, 1, 2, 3, 4)] == [
        *(False, True, True, False, False, False)
    ]


def test_a_founder_does_not_read_back_what_it_has_just_written_and_has_the_same_state(run: Run) -> None:
    read_back = run.open().restore()
    (path,) = run.home.checkpoints.glob("*.safetensors")
    path.write_bytes(b"")
    restored = run.keeper.restore()
    assert restored.state_digest == read_back.state_digest == run.keeper.state.digest()
    assert (restored.state_epoch, run.open().restore().state_epoch) == (0, -1)


def test_a_kill_between_record_and_step_loses_nothing(run: Run) -> None:
    run.keeper.restore()
    record = run.commit(run.keeper, 1)
    killed = run.open().restore()
    assert (killed.chain.epoch, killed.state_epoch) == (1, 1)
    assert killed.state_digest == run.keeper.apply(record)[1]


def test_a_torn_state_is_loaded_again_before_the_next_step(run: Run) -> None:
    run.keeper.restore()
    run.keeper.apply(run.commit(run.keeper, 1))
    record = run.commit(run.keeper, 2)
    expected = run.open().restore().state_digest
    run.keeper.state.overwrite()[0][:4] = b"\xff\xff\xff\xff"
    assert run.keeper.apply(record) == (2, expected)


def test_an_update_that_is_gone_is_an_error_of_ours_not_a_crash(run: Run) -> None:
    run.keeper.restore()
    record = run.commit(run.keeper, 1)
    for path in run.home.updates.iterdir():
        path.write_bytes(b"damaged")
    run.keeper.drop_result(committed=False)  # what a vote has kept in memory
    with pytest.raises(KeeperError):
        run.keeper.apply(record)


def test_a_rollback_gives_the_state_as_it_was(run: Run) -> None:
    run.keeper.restore()
    digests = [run.keeper.reached[1]]
    for seed in range(4):
        digests.append(run.keeper.apply(run.commit(run.keeper, seed))[1])
    note_use(run.home, BASE, ["/x"], run.keeper.run_id, 4)
    left = run.keeper.switch_chain(2, ())
    assert (left.records, left.tokens) == (2, 2)
    assert run.keeper.branches.names == (left.branch,) and left.branch.startswith("00000004-")
    assert run.keeper.store.heads_with_updates() == tuple(
        run.keeper.copy_of_chain().head_at(epoch) for epoch in (1, 2)
    ), "what is left lies in the branch alone"
    (span,) = spans(run.home, lambda _: True)  # what is used from now on is used from there on
    assert (span.first, span.last) == (2, None)
    assert run.keeper.rollback(2) == (2, digests[2])
    again = run.open()
    assert again.restore().state_digest == digests[2] and again.branches.names == (left.branch,)


def test_a_rollback_goes_no_further_than_a_chain_that_was_left_meanwhile(run: Run) -> None:
    run.keeper.restore()
    digests = [run.keeper.reached[1]]
    for seed in range(4):
        digests.append(run.keeper.apply(run.commit(run.keeper, seed))[1])
    run.keeper.switch_chain(1, ())
    assert run.keeper.rollback(3) == (1, digests[1])


def test_a_founder_begins_its_first_round_at_once_and_who_lost_its_disk_does_not(run: Run) -> None:
    restored = run.keeper.restore()  # of the start that founds the run
    run_id = restored.chain.genesis.run_id
    for vote, begins in ((restored.vote, True), (None, False)):
        core = Core(
            run.identity.peer_id,
            Rules(run_id, 1),
            run.crypto,
            dataclasses.replace(restored, vote=vote),
            0.0,
        )
        core.handle(Tick(), 0.0)
        assert (core.round is not None) is begins
