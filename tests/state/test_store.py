"""What a node must not forget: through kill -9, damage and a full disk."""

from __future__ import annotations

import dataclasses
import errno
import io
import json
import logging
import os
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest
import torch
from state.kit import CRYPTO, IDENTITY, Run, flip, unreadable

from tapestry.node.disk.files import seal
from tapestry.node.disk.store import LoadedStore, Store, UpdateMissing, read_update_file
from tapestry.node.errors import UserError
from tapestry.node.home import Home
from tapestry.node.lineage.crypto import NodeCrypto
from tapestry.node.protocol.canon import canonical
from tapestry.node.protocol.events import Vote
from tapestry.node.protocol.record import Record, head_of
from tapestry.node.spec.run import LimitsSpec


def _load(run: Run) -> LoadedStore:
    return Store(run.home, CRYPTO).load()


def _records(run: Run) -> tuple[Record, ...]:
    """As the next start finds them."""
    store = Store(run.home, CRYPTO)
    loaded = store.load()
    records = tuple(store.chain(run.chain.genesis).records)
    assert loaded.epoch == len(records)
    return records


def _same(payloads: list[torch.Tensor], others: list[torch.Tensor]) -> bool:
    return len(payloads) == len(others) and all(map(torch.equal, payloads, others))


def test_a_new_home_holds_nothing(tmp_path: Path) -> None:
    assert Store(Home(tmp_path), CRYPTO).load() == LoadedStore(None, 0, None, ())


def test_what_was_written_is_what_is_loaded(run: Run) -> None:
    loaded = _load(run)
    assert loaded.genesis == run.chain.genesis
    assert _records(run) == tuple(run.chain.records)
    assert loaded.updates == tuple(record.head for record in run.chain.records)


def test_records_go_on_after_a_restart(run: Run) -> None:
    run.store, _ = run.reopened()
    run.advance()
    assert _records(run) == tuple(run.chain.records)


# --- genesis --------------------------------------------------------------------------------------------


def test_a_home_of_another_version_is_told_so_and_nothing_in_it_is_touched(run: Run) -> None:
    genesis = json.loads(run.home.genesis.read_bytes()) | {"version": 2}
    run.home.genesis.write_bytes(canonical(genesis) + b"\n")
    before = {path: path.read_bytes() for path in run.home.path.rglob("*") if path.is_file()}
    with pytest.raises(UserError, match=r"\.json: the run is of version 2 of the chain, .* 3 only$"):
        run.reopened()
    assert {path: path.read_bytes() for path in run.home.path.rglob("*") if path.is_file()} == before


def test_a_damaged_genesis_is_refused_in_one_line(run: Run) -> None:
    flip(run.home.genesis, 20)
    with pytest.raises(UserError, match=r"genesis\.json is damaged"):
        _load(run)


# --- chain ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cut", [1, 2, 100])
def test_a_record_that_a_kill_left_unfinished_is_cut_off(
    run: Run, cut: int, caplog: pytest.LogCaptureFixture
) -> None:
    data = run.home.chain.read_bytes()
    run.home.chain.write_bytes(data[:-cut])
    assert _records(run) == tuple(run.chain.records[:3])
    assert "records_kept=3" in caplog.text
    assert run.home.chain.read_bytes() == b"".join(data.splitlines(keepends=True)[:3])


def test_a_last_record_whose_newline_was_flipped_is_damage_and_no_crash_explains_it(
    run: Run, caplog: pytest.LogCaptureFixture
) -> None:
    data = run.home.chain.read_bytes()
    last = data.splitlines(keepends=True)[-1]
    run.home.chain.write_bytes(data[:-1] + b"\x0b")
    assert _records(run) == tuple(run.chain.records[:3])
    assert "another byte than a newline" in caplog.text and "Check the disk" in caplog.text
    assert (run.folder / "chain.jsonl.corrupt").read_bytes() == last[:-1] + b"\x0b"


def test_damage_in_the_middle_keeps_the_records_before_it_and_says_so(
    run: Run, caplog: pytest.LogCaptureFixture
) -> None:
    lines = run.home.chain.read_bytes().splitlines(keepends=True)
    flip(run.home.chain, len(lines[0]) + len(lines[1]) // 2)
    assert _records(run) == tuple(run.chain.records[:1])
    assert "records_kept=1" in caplog.text
    assert (run.folder / "chain.jsonl.corrupt").read_bytes()[-len(lines[3]) :] == lines[3]
    assert _records(run) == tuple(run.chain.records[:1])


def test_a_record_out_of_place_is_damage(run: Run) -> None:
    lines = run.home.chain.read_bytes().splitlines(keepends=True)
    run.home.chain.write_bytes(lines[0] + lines[2])
    assert _records(run) == tuple(run.chain.records[:1])


def test_a_record_of_another_run_is_damage(run: Run, tmp_path: Path) -> None:
    other = Run(tmp_path / "other", n=700, seed=1)
    other.advance()
    run.home.chain.write_bytes(other.home.chain.read_bytes())
    assert _records(run) == ()


def _other_side(run: Run) -> list[Record]:
    """Records that follow record 2 in the place of 3 and 4. Unsigned: a store asks for links only."""
    records = run.chain.records[:2]
    for last in run.chain.records[2:]:
        prev = records[-1]
        body = dataclasses.replace(last.body, epoch=prev.body.epoch + 1, prev=prev.head, result="ab" * 32)
        records.append(Record(body, head_of(body, CRYPTO), 0, ()))
    return records[2:]


@pytest.mark.parametrize("common", [0, 2, 4])
def test_a_chain_is_switched_to_the_other_side_of_a_fork(run: Run, common: int) -> None:
    theirs = _other_side(run) if common == 2 else []
    run.store.switch_chain(common, theirs)
    expected = (*run.chain.records[:common], *theirs)
    assert _records(run) == expected
    if common == 2:
        run.store.switch_chain(3, ())
        run.store.append_record(theirs[1])
        assert _records(run) == expected


def test_a_switch_happens_or_does_not(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """A crash in the middle of it must not leave a head that was left before: a vote there is overwritten."""
    before = run.home.chain.read_bytes()

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    for call in ("fsync", "replace"):
        with monkeypatch.context() as patch, pytest.raises(OSError, match="No space"):
            patch.setattr(os, call, full)
            run.store.switch_chain(2, _other_side(run))
        assert run.home.chain.read_bytes() == before
    run.store.switch_chain(3, ())
    run.store.append_record(run.chain.records[3])
    assert run.home.chain.read_bytes() == before


# --- vote -----------------------------------------------------------------------------------------------


def test_votes_come_back_and_the_last_one_counts(run: Run) -> None:
    head, body = run.chain.head, run.chain.records[-1].body
    for vote in (Vote(4, head, 0, -1, None), Vote(4, head, 3, 3, body)):
        run.store.write_vote(vote)
        assert _load(run).vote == vote


@pytest.mark.parametrize("offset", [0, 30, 80, 150, 300, -2])
def test_a_damaged_vote_is_refused_loudly(run: Run, offset: int) -> None:
    run.store.write_vote(Vote(4, run.chain.head, 3, 3, run.chain.records[-1].body))
    flip(run.home.vote, offset)
    with pytest.raises(UserError, match="vote twice"):
        _load(run)


def test_an_emptied_vote_is_refused_and_not_taken_for_none(run: Run) -> None:
    run.home.vote.write_bytes(b"")
    with pytest.raises(UserError, match="vote twice"):
        _load(run)


def test_a_sealed_value_that_is_no_vote_is_refused(run: Run) -> None:
    run.store.write_vote(Vote(4, run.chain.head, 0, -1, None))
    sealed = json.loads(run.home.vote.read_bytes())
    for field in dataclasses.fields(Vote):
        wrong = dict(sealed["value"], **{field.name: "x"})
        run.home.vote.write_bytes(seal(wrong))
        with pytest.raises(UserError, match="vote twice"):
            _load(run)


# --- updates --------------------------------------------------------------------------------------------


def test_updates_come_back_to_the_byte_and_against_the_record(run: Run) -> None:
    store, _ = run.reopened()
    for record, payloads in zip(run.chain.records, run.payloads, strict=True):
        assert store.has_update(record.head)
        assert _same(store.read_update(record.body.epoch, record.head, record.body.result), payloads)


@pytest.mark.parametrize("offset", [0, 17, 50, 100, -1])
def test_a_damaged_update_is_never_returned(run: Run, offset: int, caplog: pytest.LogCaptureFixture) -> None:
    record = run.chain.records[1]
    (path,) = run.home.updates.glob("00000002-*")
    flip(path, offset)
    with pytest.raises(UpdateMissing) as raised:
        run.store.read_update(2, record.head, record.body.result)
    assert raised.value.reason == "corrupt"
    assert not run.store.has_update(record.head) and not path.exists()
    assert "damaged" in caplog.text


@pytest.mark.parametrize("known", [True, False])
def test_an_update_that_the_disk_no_longer_gives_is_dropped(run: Run, known: bool) -> None:
    """To map it would be a signal that ends the process; its header was an end of every start."""
    record = run.chain.records[1]
    (path,) = run.home.updates.glob("00000002-*")
    unreadable(path)
    if known:
        with pytest.raises(UpdateMissing) as raised:
            run.store.read_update(2, record.head, record.body.result)
        assert raised.value.reason == "corrupt"
    else:
        assert record.head not in _load(run).updates
    assert not path.exists()


def test_an_update_is_read_before_it_is_mapped(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    (path,) = run.home.updates.glob("00000002-*")
    size = path.stat().st_size
    header = read_update_file(path)[0]

    class BadSector(io.BytesIO):
        fileno = lambda self: os.open(path, os.O_RDONLY)  # noqa: E731

        def readinto(self, piece: Any) -> int:
            raise OSError(errno.EIO, "Input/output error")

    opened = BadSector(path.read_bytes())
    monkeypatch.setattr(Path, "open", lambda *args, **more: opened)
    with pytest.raises(OSError, match="Input/output"):
        read_update_file(path)
    assert header.size_bytes == size


def test_an_update_that_the_record_does_not_name_is_never_returned(run: Run) -> None:
    with pytest.raises(UpdateMissing) as raised:
        run.store.read_update(2, run.chain.records[1].head, "00" * 32)
    assert raised.value.reason == "foreign"
    with pytest.raises(UpdateMissing) as raised:
        run.store.read_update(9, "ab" * 32)
    assert raised.value.reason == "missing"


def test_a_cut_update_is_dropped_at_the_start_and_the_rest_stays(
    run: Run, caplog: pytest.LogCaptureFixture
) -> None:
    (path,) = run.home.updates.glob("00000002-*")
    path.write_bytes(path.read_bytes()[:-1])
    (run.home.updates / "00000009-ab.upd.tmp").write_bytes(b"half")
    with caplog.at_level(logging.INFO):
        updates = _load(run).updates
    assert updates == tuple(r.head for r in run.chain.records if r.body.epoch != 2)
    assert "update dropped" in caplog.text
    assert not list(run.home.updates.glob("*.tmp"))


def test_prune_keeps_the_newest_epochs(run: Run) -> None:
    limits = LimitsSpec(updates_kept_epochs=2)
    run.store.prune(run.chain, limits, base_epoch=4)
    heads = tuple(record.head for record in run.chain.records[2:])
    assert run.store.heads_with_updates() == heads == _load(run).updates


def test_prune_keeps_the_bytes_within_the_limit(run: Run) -> None:
    total = run.store.updates_bytes
    assert total == sum(path.stat().st_size for path in run.home.updates.iterdir())
    limits = dataclasses.replace(LimitsSpec(), updates_kept_bytes=total - 1)
    run.store.prune(run.chain, limits, base_epoch=4)
    assert len(run.store.heads_with_updates()) == 3
    assert run.store.updates_bytes <= total - 1


def test_prune_never_parts_a_checkpoint_from_the_updates_after_it(run: Run) -> None:
    run.store.prune(run.chain, LimitsSpec(updates_kept_epochs=1), base_epoch=2)
    heads = tuple(record.head for record in run.chain.records[2:])
    assert run.store.heads_with_updates() == heads


def test_prune_drops_what_lost_and_keeps_what_may_yet_win(run: Run) -> None:
    lost, open_ = "ab" * 32, "cd" * 32
    run.store.write_update(4, lost, run.random_payloads())
    run.store.write_update(5, open_, run.random_payloads())
    run.store.prune(run.chain, LimitsSpec(), base_epoch=0)
    assert not run.store.has_update(lost)
    assert run.store.has_update(open_)


# --- a full disk ----------------------------------------------------------------------------------------


def test_a_full_disk_raises_and_leaves_the_last_good_state(
    run: Run, full_disk: Callable[[], AbstractContextManager[None]]
) -> None:
    vote = Vote(4, run.chain.head, 1, -1, None)
    run.store.write_vote(vote)
    before = {path: path.read_bytes() for path in run.folder.rglob("*") if path.is_file()}
    payloads = run.random_payloads()
    record = run.next_record(payloads)
    for write in (
        lambda: run.store.append_record(record),
        lambda: run.store.write_vote(Vote(4, run.chain.head, 2, -1, None)),
        lambda: run.store.write_update(5, record.head, payloads),
        run.save,
    ):
        with full_disk(), pytest.raises(OSError, match="No space left"):
            write()
    assert {path: path.read_bytes() for path in run.folder.rglob("*") if path.is_file()} == before
    assert not run.store.has_update(record.head)
    assert _load(run).vote == vote
    run.advance()
    assert _records(run) == tuple(run.chain.records)


# --- crypto ---------------------------------------------------------------------------------------------


def test_signatures_hold_for_their_signer_and_message_alone() -> None:
    crypto = NodeCrypto(IDENTITY)
    signature = crypto.sign(b"message")
    assert crypto.verify(IDENTITY.peer_id, signature, b"message")
    assert not crypto.verify(IDENTITY.peer_id, signature, b"another")
    assert not crypto.verify("nobody", signature, b"message")
    for wrong in ("", "zz", signature.upper(), " " + signature, signature[:-2]):
        assert not crypto.verify(IDENTITY.peer_id, wrong, b"message")
