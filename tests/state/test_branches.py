"""What lost at a fork is kept: through a kill at any step, within limits, and with what makes its states."""

from __future__ import annotations

import dataclasses
import logging
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from state.kit import CRYPTO, Run, flip, state_bytes

from tapestry.node.disk import branches as branches_module
from tapestry.node.disk.branches import Branches, BranchLimits, found, read_about
from tapestry.node.disk.checkpoints import Checkpoints, restore
from tapestry.node.disk.files import seal
from tapestry.node.disk.store import Store
from tapestry.node.lineage.branches import as_home
from tapestry.node.protocol.chain import Chain
from tapestry.node.protocol.place import Tip, why_lost
from tapestry.node.protocol.record import Record, head_of
from tapestry.node.spec.run import LimitsSpec


class Killed(BaseException):
    """SIGKILL: nothing after it is done, and no `except OSError` sees it."""


def opened(run: Run, limits: BranchLimits | None = None) -> Branches:
    branches = Branches(run.home, limits or BranchLimits())
    branches.load(chain_on_disk(run))
    return branches


def chain_on_disk(run: Run) -> Chain:
    """As the disk has it."""
    store = Store(run.home, CRYPTO)
    store.load()
    return store.chain(run.chain.genesis)


def other_side(run: Run, common: int, count: int = 1, result: str = "ab" * 32) -> list[Record]:
    """Records after `common`, unsigned: nothing here checks that."""
    records = list(run.chain.records[:common])
    for _ in range(count):
        body = run.chain.records[0].body
        prev = records[-1].head if records else run.chain.genesis.run_id
        body = dataclasses.replace(body, epoch=len(records) + 1, prev=prev, result=result)
        records.append(Record(body, head_of(body, CRYPTO), 0, ()))
    return records[common:]


def switch(run: Run, branches: Branches, common: int, theirs: list[Record]) -> str:
    """As the keeper does it."""
    name = branches.keep(run.chain, common, theirs, run.store, run.checkpoints)
    run.store.switch_chain(common, theirs)
    run.chain.switch(common, theirs)
    run.store.prune(run.chain, LimitsSpec(), 0)
    run.checkpoints.prune(run.chain)
    branches.fit()
    return name


def test_what_is_left_keeps_its_records_and_what_makes_its_states(run: Run, tmp_path: Path) -> None:
    head, lines = run.chain.head, run.home.chain.read_bytes().splitlines(keepends=True)
    theirs, before = other_side(run, 3, 2), run.chain.tip
    name = switch(run, opened(run), 3, theirs)
    assert name == f"00000004-{head[:16]}"
    (kept,) = found(run.home)
    folder = run.home.branches / name
    assert (kept.name, kept.path) == (name, folder)
    about = kept.about
    assert (about.since, about.since_head, about.lacks) == (3, run.chain.head_at(3), "")
    assert (about.lost.epoch, about.lost.tip) == (4, before) and about.won.head == theirs[-1].head
    assert about.why == "4 records by most of the last full electorate, against 5"
    assert (folder / "chain.jsonl").read_bytes() == lines[3]
    assert sorted(p.name[:8] for p in (folder / "updates").iterdir()) == ["00000003", "00000004"]
    assert [p.name[:8] for p in (folder / "checkpoints").iterdir()] == ["00000002"]
    assert not list(run.home.updates.glob("00000004-*")), "moved, not copied"
    _leads_to(run, name, tmp_path / "as-home", 4)


def _leads_to(run: Run, name: str, folder: Path, epoch: int) -> None:
    """The branch, as a home, makes the state that there was."""
    home = as_home(run.home, name, folder)
    store = Store(home, CRYPTO)
    store.load()
    checkpoints = Checkpoints(home.checkpoints, run.chain.genesis.run_id, 3)
    checkpoints.load()
    chain, state = store.chain(run.chain.genesis), run.fresh()
    assert chain.epoch == epoch
    restored = restore(chain, epoch, store, checkpoints, state)
    assert restored is not None and restored.epoch == epoch
    assert state_bytes(state) == run.numbers[epoch]


def test_a_branch_that_follows_what_was_left_later_is_whole_and_the_oldest_goes_first(
    run: Run, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    branches = opened(run, BranchLimits(2))
    first = switch(run, branches, 3, other_side(run, 3))
    second = switch(run, branches, 1, other_side(run, 1, 4))
    assert branches.names == (first, second)
    _leads_to(run, first, tmp_path / "first", 4)  # its records 2 and 3 lie in the second
    with caplog.at_level(logging.WARNING):
        third = switch(run, branches, 0, other_side(run, 0, 6))
    assert branches.names == (second, third) == opened(run).names
    assert f"branch=dropped name={first}" in caplog.text and "it is the oldest" in caplog.text
    assert not (run.home.branches / first).exists()


def _steps(monkeypatch: pytest.MonkeyPatch, at: int) -> Callable[[], int]:
    """Kill at the step `at`, before it is done: of all that changes what the disk has."""
    count = 0

    def killing(real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal count
            count += 1
            if count >= at:
                raise Killed  # again for what `finally` would tidy up: a killed process does nothing more
            return real(*args, **kwargs)

        return call

    for name in ("fsync", "replace", "rename", "link", "mkdir", "unlink", "rmdir"):
        monkeypatch.setattr(os, name, killing(getattr(os, name)))
    return lambda: count


def _switch_as_a_keeper(run: Run, theirs: list[Record]) -> None:
    store, checkpoints = run.reopened()
    chain = store.chain(run.chain.genesis)
    branches = Branches(run.home, BranchLimits())
    branches.load(chain)
    branches.keep(chain, 2, theirs, store, checkpoints)
    left = [chain.head_at(epoch) for epoch in (3, 4)]
    store.switch_chain(2, theirs)
    chain.switch(2, theirs)
    store.drop_updates(left)
    checkpoints.drop_left(chain, 2)
    branches.fit()


def test_a_kill_at_any_step_leaves_the_chain_that_was_or_the_other_and_the_branch(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    theirs, seen = other_side(run, 2, 3), set()
    before, name = [record.head for record in run.chain.records], f"00000004-{run.chain.head[:16]}"
    for at in range(1, 99):
        killed = run.copy(tmp_path / f"killed-{at}")
        with monkeypatch.context() as patch:
            steps = _steps(patch, at)
            try:
                _switch_as_a_keeper(killed, theirs)
            except Killed:
                done = False
            else:
                done = steps() < at
        chain = chain_on_disk(killed)
        branches = opened(killed)
        heads = [record.head for record in chain.records]
        assert not list(killed.home.branches.glob(".*")), "a kill leaves nothing behind that stays"
        if heads == before:
            assert branches.names == ()
            store, checkpoints = killed.reopened()
            state = killed.fresh()
            assert restore(chain, 4, store, checkpoints, state) is not None and state.epoch == 4
            _switch_as_a_keeper(killed, theirs)
        else:
            assert heads == [*before[:2], *(record.head for record in theirs)]
        assert opened(killed).names == (name,)
        _leads_to(killed, name, tmp_path / f"as-home-{at}", 4)
        seen.add(heads == before)
        if done:
            break
        shutil.rmtree(killed.folder)
    assert done and seen == {True, False} and at > 15


def test_a_kill_before_the_switch_is_given_again_after_the_chain_went_on(run: Run) -> None:
    """The chain of before may grow, and be left later: then all of it is one branch."""
    branches = opened(run)
    branches.keep(run.chain, 2, other_side(run, 2, 3), run.store, run.checkpoints)
    (name,) = branches.names
    run.advance()
    again = opened(run)
    assert again.names == () and not (run.home.branches / name).exists()
    assert switch(run, again, 2, other_side(run, 2, 4)).startswith("00000005-")


def test_the_limits_hold_and_a_full_disk_keeps_the_records_only(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    none = run.copy(tmp_path / "none")
    assert switch(none, opened(none, BranchLimits(0)), 2, other_side(run, 2, 3)) == ""
    assert found(none.home) == []

    tight = run.copy(tmp_path / "tight")
    name = switch(tight, opened(tight, BranchLimits(16, 4000)), 2, other_side(run, 2, 3))
    (kept,) = found(tight.home)
    assert kept.name == name and "more than there was room for" in kept.about.lacks
    assert kept.size_bytes < 4000 and not list((kept.path / "updates").iterdir())

    full = run.copy(tmp_path / "full")
    monkeypatch.setattr(branches_module, "disk_free", lambda home: 100)
    assert switch(full, opened(full), 2, other_side(run, 2, 3)) == ""
    assert "branch=not_kept" in caplog.text and chain_on_disk(full).epoch == 5, "the switch is not held up"


def test_what_follows_records_that_are_not_kept_goes_with_them(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else nobody could prove it: the records before it would be nowhere."""
    branches = opened(run)
    switch(run, branches, 3, other_side(run, 3))
    second = switch(run, branches, 1, other_side(run, 1, 4))
    third = switch(run, branches, 4, other_side(run, 4, 2, "cd" * 32))
    monkeypatch.setattr(branches_module, "disk_free", lambda home: 100)
    room = sum(one.size_bytes for one in found(run.home))
    monkeypatch.setattr(Branches, "_room", lambda self: room)
    assert switch(run, branches, 2, other_side(run, 2, 9, "ef" * 32)) == ""
    assert branches.names == (), "the third follows record 4, and older ones go first"
    assert second != third


def test_a_disk_that_fills_up_takes_the_oldest_branch(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    branches = opened(run)
    first = switch(run, branches, 3, other_side(run, 3))
    second = switch(run, branches, 1, other_side(run, 1, 4))
    sizes = {one.name: one.size_bytes for one in found(run.home)}
    monkeypatch.setattr(branches_module, "disk_free", lambda home: sizes[second] - sizes[first] + 10)
    branches.fit()
    assert branches.names == (second,)


def test_no_disk_holds_up_a_switch_or_a_start(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was left of a branch that could not be deleted ended the node at the next one of that name."""
    branches = opened(run, BranchLimits(count_max=1))
    old = switch(run, branches, 2, other_side(run, 2, 2))
    (run.home.branches / f".gone-{old}").mkdir()
    (run.home.branches / f".gone-{old}" / "file").touch()
    new = switch(run, branches, 2, other_side(run, 2, 3, "cd" * 32))
    branches.fit()
    assert branches.names == (new,) and old != new

    def refuse(*args: object, **kwargs: object) -> int:
        raise OSError("the disk is gone")

    with monkeypatch.context() as patch:
        patch.setattr(branches_module, "disk_free", refuse)
        assert switch(run, branches, 2, other_side(run, 2, 4, "ef" * 32)) == ""
        branches.fit()
    with monkeypatch.context() as patch:
        patch.setattr(branches_module.shutil, "rmtree", refuse)
        (run.home.branches / ".gone").mkdir(exist_ok=True)
        assert opened(run).names == branches.names


def test_a_file_system_without_hard_links_gets_copies(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*_: Any, **__: Any) -> None:
        raise PermissionError(1, "Operation not permitted")

    with monkeypatch.context() as patch:
        patch.setattr(os, "link", refused)
        name = switch(run, opened(run), 3, other_side(run, 3))
    _leads_to(run, name, tmp_path / "as-home", 4)
    assert all(p.stat().st_nlink == 1 for p in (run.home.branches / name).rglob("*") if p.is_file())


@pytest.mark.parametrize(("lost", "lacks"), [("updates", "the update of epoch 4"), ("both", "a checkpoint")])
def test_what_keeps_a_state_from_being_made_again_is_said(run: Run, lost: str, lacks: str) -> None:
    next(run.home.updates.glob("00000004-*")).unlink()
    for path in run.home.checkpoints.glob("*") if lost == "both" else ():
        path.unlink()
    run.store, run.checkpoints = run.reopened()
    switch(run, opened(run), 3, other_side(run, 3))
    (kept,) = found(run.home)
    assert kept.about.lacks == lacks


def test_a_damaged_branch_json_is_said_and_keeps_no_node_from_starting(
    run: Run, caplog: pytest.LogCaptureFixture
) -> None:
    name = switch(run, opened(run), 3, other_side(run, 3))
    path = run.home.branches / name / "branch.json"
    good = path.read_bytes()
    flip(path, 100)
    assert opened(run).names == () and "branch=unreadable" in caplog.text
    raw = dataclasses.asdict(found_of(good, path))
    for wrong in ({"number": 0}, {"since_head": "x"}, {"left_at": 3}, {"lost": {**raw["lost"], "voice": -1}}):
        path.write_bytes(seal({**raw, **wrong}) + b"\n")
        with pytest.raises(ValueError, match="must be"):
            read_about(path.parent)


def found_of(data: bytes, path: Path) -> Any:
    path.write_bytes(data)
    return read_about(path.parent)


def test_why_a_chain_lost_is_the_first_thing_in_which_they_differ() -> None:
    ours = Tip(4, 2, 3, "b")
    assert why_lost(ours, ours._replace(full=5)).startswith("4 records by most")
    assert why_lost(ours, ours._replace(voice=3)).startswith("2 voices of the last full electorate's members")
    assert why_lost(ours, ours._replace(since=9)).endswith("3 records since, against 9")
    assert why_lost(ours, ours._replace(head="a")).endswith("the other head is the lower one")
