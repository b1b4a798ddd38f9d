"""The draft of a round's result: what it holds early is what is written at last, or it is not used."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tapestry.node.disk import draft as draft_module
from tapestry.node.disk.draft import Draft

SIZES = (300, 200, 7)
HEADER = b"h" * 16


def payloads(seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(0, 255, (n,), dtype=torch.uint8, generator=generator) for n in SIZES]


def whole(parts: list[Tensor]) -> bytes:
    return HEADER + b"".join(part.numpy().tobytes() for part in parts)


def make(tmp_path: Path) -> Draft:
    return Draft(tmp_path, len(HEADER), SIZES)


@pytest.mark.parametrize("early", [(), (1,), (2, 0), (0, 1, 2)])
def test_the_file_is_the_same_whatever_was_written_early(tmp_path, early):
    draft, parts = make(tmp_path), payloads(1)
    for shard in early:
        parts[shard] = draft.put(shard, parts[shard], "")
    draft.finish(tmp_path / "it", HEADER, parts)
    assert (tmp_path / "it").read_bytes() == whole(parts)
    assert os.listdir(tmp_path) == ["it"]


def test_shards_of_another_result_are_in_no_file_and_stay_what_they_were_for_who_reads_them(tmp_path):
    draft, stale, parts = make(tmp_path), payloads(1), payloads(2)
    views = [draft.put(shard, stale[shard], "stale") for shard in range(3)]
    parts[1] = draft.put(1, parts[1], "one")
    assert draft.digests(parts) == {1: "one"}
    draft.finish(tmp_path / "it", HEADER, parts)
    assert (tmp_path / "it").read_bytes() == whole(payloads(2))
    assert all(torch.equal(view, one) for view, one in zip(views, payloads(1), strict=True))


def test_a_result_of_which_nothing_was_put_does_not_change_what_was(tmp_path):
    draft, stale, parts = make(tmp_path), payloads(1), payloads(2)
    views = [draft.put(shard, stale[shard], "stale") for shard in range(3)]
    draft.finish(tmp_path / "it", HEADER, parts)
    assert (tmp_path / "it").read_bytes() == whole(parts)
    assert all(torch.equal(view, one) for view, one in zip(views, payloads(1), strict=True))


def test_what_was_put_is_read_from_the_file_also_when_that_has_its_name_and_when_it_is_gone(tmp_path):
    draft, parts = make(tmp_path), payloads(1)
    views = [draft.put(shard, parts[shard], "") for shard in range(3)]
    assert [view.data_ptr() for view in views] != [part.data_ptr() for part in parts]
    draft.finish(tmp_path / "it", HEADER, views)
    (tmp_path / "it").unlink()
    assert all(torch.equal(view, part) for view, part in zip(views, parts, strict=True))


def test_equal_bytes_in_another_buffer_are_not_taken_for_what_was_put(tmp_path):
    draft, parts = make(tmp_path), payloads(1)
    draft.put(0, parts[0], "zero")
    assert draft.digests(parts) == {}


def test_a_disk_that_fails_early_fails_the_finish_and_leaves_no_file(tmp_path, monkeypatch):
    draft, parts = make(tmp_path), payloads(1)

    def full(*_: object) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(draft_module.os, "pwrite", full)
    assert draft.put(0, parts[0], "zero") is parts[0]
    assert draft.digests(parts) == {}
    with pytest.raises(OSError, match="No space"):
        draft.finish(tmp_path / "it", HEADER, parts)
    assert os.listdir(tmp_path) == []


def test_what_was_put_before_a_sync_failed_is_written_again(tmp_path, monkeypatch):
    """The kernel tells of lost pages once, and takes them for written ever after."""
    draft, parts = make(tmp_path), payloads(1)
    monkeypatch.setattr(draft_module, "SYNC_BYTES", SIZES[0] + 1)
    views = [draft.put(0, parts[0], "zero")]
    lost = os.stat(tmp_path / "draft.tmp").st_ino

    def failing(_: int) -> None:
        raise OSError(5, "Input/output error")

    with monkeypatch.context() as bad:
        bad.setattr(draft_module.os, "fdatasync", failing)
        views.append(draft.put(1, parts[1], "one"))
    assert views[1] is parts[1] and torch.equal(views[0], parts[0])
    draft.finish(tmp_path / "it", HEADER, [*views, parts[2]])
    assert (tmp_path / "it").read_bytes() == whole(parts)
    assert os.stat(tmp_path / "it").st_ino != lost


def test_a_dropped_draft_leaves_nothing_and_can_be_used_again(tmp_path):
    draft, parts = make(tmp_path), payloads(1)
    draft.put(0, parts[0], "zero")
    draft.drop()
    assert os.listdir(tmp_path) == [] and draft.digests(parts) == {}
    draft.put(2, parts[2], "two")
    draft.finish(tmp_path / "it", HEADER, parts)
    assert (tmp_path / "it").read_bytes() == whole(parts)
