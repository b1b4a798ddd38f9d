"""Checkpoint + updates = state, to the bit; and what is done about checkpoints that cannot be used."""

from __future__ import annotations

import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from state.kit import Run, flip, new_state, state_bytes, unreadable

from tapestry.node.disk.checkpoints import Abandoned, leads_to, restore
from tapestry.node.protocol.chain import Chain
from tapestry.node.spec.run import AdamWSpec, LimitsSpec, NesterovSpec, OuterSpec


@settings(max_examples=25, deadline=None)
@given(
    n=st.integers(1, 900),
    epochs=st.integers(0, 5),
    saved=st.sets(st.integers(0, 5), max_size=3),
    target=st.integers(0, 5),
    outer=st.sampled_from([NesterovSpec(), AdamWSpec(weight_decay=0.1)]),
    seed=st.integers(0, 2**32),
)
def test_checkpoint_and_updates_are_the_state_to_the_bit(
    n: int, epochs: int, saved: set[int], target: int, outer: OuterSpec, seed: int
) -> None:
    target = min(target, epochs)
    with tempfile.TemporaryDirectory() as folder:
        run = Run(Path(folder), n=n, outer=outer, seed=seed)
        run.save()
        for epoch in range(1, epochs + 1):
            run.advance()
            if epoch in saved:
                run.save()
        store, checkpoints = run.reopened()
        state = run.fresh()
        restored = restore(run.chain, target, store, checkpoints, state)
        assert restored is not None and restored.reason == ""
        assert (restored.epoch, restored.state_digest) == (target, run.digests[target])
        assert state_bytes(state) == run.numbers[target]
        assert state.head == run.chain.head_at(target)


@pytest.fixture
def rolled(run: Run) -> Run:
    """Four epochs, checkpoints at 0, 2 and 4; epoch 5 is state 3 again; then one more."""
    run.save()
    run.roll_back(3)
    run.advance()
    return run


@pytest.mark.parametrize("target", range(7))
def test_the_path_to_a_state_goes_by_what_was_rolled_back(rolled: Run, target: int) -> None:
    store, checkpoints = rolled.reopened()
    state = rolled.fresh()
    restored = restore(rolled.chain, target, store, checkpoints, state)
    assert restored is not None
    assert (restored.epoch, restored.state_digest) == (target, rolled.digests[target])
    assert state_bytes(state) == rolled.numbers[target] and state.head == rolled.chain.head_at(target)
    assert rolled.digests[5] == rolled.digests[3] != rolled.digests[4]


def test_a_checkpoint_that_was_rolled_back_is_no_use_and_goes(rolled: Run) -> None:
    assert [c.epoch for c in rolled.checkpoints.list()] == [4, 2, 0]
    assert rolled.checkpoints.base_epoch(rolled.chain) == 2
    rolled.checkpoints.prune(rolled.chain)
    assert [c.epoch for c in rolled.checkpoints.list()] == [2, 0]


def led_to(run: Run) -> list[int]:
    """The epochs whose states the disk has."""
    return [e for e in range(6) if leads_to(run.chain, e, *run.reopened())]


def test_what_leads_to_a_state_that_may_be_gone_back_to_is_kept(run: Run) -> None:
    run.kept = 1
    _, run.checkpoints = run.reopened()
    run.save()
    assert led_to(run) == [0, 1, 2, 3, 4]
    run.checkpoints.prune(run.chain, back_to=1)
    assert led_to(run) == [0, 1, 2, 3, 4] and run.checkpoints.base_of(run.chain, 1) == 0
    run.checkpoints.prune(run.chain)
    assert led_to(run) == [2, 3, 4]
    next(run.home.updates.glob("00000003-*")).unlink()
    assert led_to(run) == [2, 4]


def test_restore_stops_where_the_updates_end_and_says_why(run: Run) -> None:
    next(run.home.updates.glob("00000004-*")).unlink()
    store, checkpoints = run.reopened()
    restored = restore(run.chain, 4, store, checkpoints, run.state)
    assert restored is not None
    assert (restored.epoch, restored.state_digest) == (3, run.digests[3])
    assert restored.reason.startswith("missing")


def test_without_a_checkpoint_there_is_no_state(run: Run) -> None:
    for path in run.home.checkpoints.iterdir():
        path.unlink()
    store, checkpoints = run.reopened()
    assert restore(run.chain, 4, store, checkpoints, run.state) is None
    assert run.state.torn


@pytest.mark.parametrize("offset", [0, 12, -1, -3000])
def test_a_damaged_checkpoint_is_set_aside_and_the_one_before_used(
    run: Run, offset: int, caplog: pytest.LogCaptureFixture
) -> None:
    (path,) = run.home.checkpoints.glob("00000002-*")
    flip(path, offset)
    store, checkpoints = run.reopened()
    restored = restore(run.chain, 4, store, checkpoints, run.state)
    assert restored is not None and restored.state_digest == run.digests[4]
    assert state_bytes(run.state) == run.numbers[4]
    assert not path.exists() and path.with_name(path.name + ".corrupt").exists()
    assert [r.levelname for r in caplog.records] == ["WARNING"]
    assert str(path) in caplog.text


@pytest.mark.parametrize("kept_bytes", [0, 5, 100, 5000])
def test_a_cut_checkpoint_is_set_aside_and_the_one_before_used(run: Run, kept_bytes: int) -> None:
    (path,) = run.home.checkpoints.glob("00000002-*")
    path.write_bytes(path.read_bytes()[:kept_bytes])
    store, checkpoints = run.reopened()
    restored = restore(run.chain, 4, store, checkpoints, run.state)
    assert restored is not None and restored.state_digest == run.digests[4]
    assert [c.epoch for c in checkpoints.list()] == [0]


@pytest.mark.parametrize("at", ["header", "data"])
def test_a_checkpoint_that_the_disk_no_longer_gives_is_set_aside_and_the_one_before_used(
    run: Run, at: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One bad sector kept a node from ever starting."""
    (path,) = run.home.checkpoints.glob("00000002-*")
    if at == "header":
        unreadable(path)
    else:
        store, checkpoints = run.reopened()
        unreadable(path)  # after it was found by its header
    if at == "header":
        store, checkpoints = run.reopened()
    restored = restore(run.chain, 4, store, checkpoints, run.state)
    assert restored is not None and restored.state_digest == run.digests[4]
    assert path.with_name(path.name + ".corrupt").is_symlink()


def test_a_checkpoint_whose_digest_the_chain_did_not_sign_is_not_used(run: Run) -> None:
    (path,) = run.home.checkpoints.glob("00000002-*")
    path.unlink()
    _, run.checkpoints = run.reopened()
    wrong = run.fresh()
    wrong.head = run.chain.head_at(2)
    wrong.epoch = 2
    run.checkpoints.save(wrong, wrong.digest())
    loaded = run.checkpoints.load_newest(run.chain, 4, run.state)
    assert loaded is not None and loaded.epoch == 0


def test_a_checkpoint_of_another_run_is_set_aside(run: Run, tmp_path: Path) -> None:
    other = Run(tmp_path / "other", n=700, seed=1)
    path = other.save()
    foreign = run.home.checkpoints / path.name
    foreign.write_bytes(path.read_bytes())
    _, checkpoints = run.reopened()
    assert [c.epoch for c in checkpoints.list()] == [2, 0]
    assert not foreign.exists()


def test_a_checkpoint_of_another_model_is_set_aside(run: Run) -> None:
    assert run.checkpoints.load_newest(run.chain, 4, new_state(701)) is None


def test_a_checkpoint_of_a_fork_is_passed_over_and_kept(run: Run) -> None:
    fork = Chain(run.chain.genesis, run.chain.records[:1])
    loaded = run.checkpoints.load_newest(fork, 4, run.state)
    assert loaded is not None and loaded.epoch == 0
    assert [c.epoch for c in run.checkpoints.list()] == [2, 0]


def test_a_checkpoint_is_a_safetensors_file(run: Run) -> None:
    path = run.save()
    with safe_open(path, "pt") as file:
        assert set(file.keys()) == {"params", "momentum"}
        assert file.metadata()["state_digest"] == run.digest
        assert file.metadata()["run_id"] == run.chain.genesis.run_id
        assert file.get_tensor("params").equal(run.state.params)
        assert file.get_tensor("momentum").equal(run.state.buffers["momentum"])


def test_what_a_killed_writer_left_is_removed(run: Run) -> None:
    left = run.home.checkpoints / "00000009-ab.safetensors.tmp"
    left.write_bytes(b"half")
    run.reopened()
    assert not left.exists()


def test_prune_keeps_the_newest_and_always_one_below_the_head(run: Run) -> None:
    _, checkpoints = run.reopened()
    run.checkpoints = checkpoints
    checkpoints._kept = 1
    checkpoints.prune(run.chain)
    assert [c.epoch for c in checkpoints.list()] == [2]
    run.save()
    checkpoints.prune(run.chain)
    assert [c.epoch for c in checkpoints.list()] == [4, 2]
    assert checkpoints.base_epoch(run.chain) == 2
    run.advance()
    checkpoints.prune(run.chain)
    assert [c.epoch for c in checkpoints.list()] == [4]
    assert len(list(run.home.checkpoints.iterdir())) == 1


def test_after_both_prunes_the_checkpoint_below_the_head_still_leads_to_it(run: Run) -> None:
    run.save()
    run.checkpoints.prune(run.chain)
    base = run.checkpoints.base_epoch(run.chain)
    run.store.prune(run.chain, LimitsSpec(updates_kept_epochs=1), base)
    store, checkpoints = run.reopened()
    checkpoints.refuse(checkpoints.list()[0], "lost")
    restored = restore(run.chain, 4, store, checkpoints, run.state)
    assert restored is not None and restored.state_digest == run.digests[4]


def test_an_abandoned_checkpoint_leaves_no_file_and_the_update_log_leads_there(run: Run) -> None:
    before = {path.name for path in run.home.checkpoints.iterdir()}
    run.advance()
    run.checkpoints.abandon()
    with pytest.raises(Abandoned):
        run.save()
    assert {path.name for path in run.home.checkpoints.iterdir()} == before
    store, checkpoints = run.reopened()
    restored = restore(run.chain, 5, store, checkpoints, run.fresh())
    assert restored is not None and (restored.epoch, restored.state_digest) == (5, run.digests[5])


def test_a_checkpoint_that_is_written_out_piece_by_piece_reads_back(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tapestry.node.disk.checkpoints.WRITE_OUT_BYTES", 1)
    run.advance()
    run.save()
    store, checkpoints = run.reopened()
    assert checkpoints.list()[0].epoch == 5
    restored = restore(run.chain, 5, store, checkpoints, run.fresh())
    assert restored is not None and restored.state_digest == run.digests[5]
