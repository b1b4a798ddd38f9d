"""The arithmetic of file descriptors, and what is said when they are used up."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest

from tapestry.node.daemon.descriptors import KEPT, STREAMS_MAX, STREAMS_MIN, streams_max
from tapestry.node.home import Home


@pytest.mark.parametrize(
    ("limit", "streams"), [(1024, 1024 - KEPT), (10**6, STREAMS_MAX), (200, STREAMS_MIN)]
)
def test_streams_never_use_the_descriptors_that_votes_need(limit: int, streams: int) -> None:
    assert streams_max(limit) == streams


def test_no_more_descriptors_is_not_called_a_failed_disk(tmp_path: Path) -> None:
    from tapestry.node.daemon.life import _disk_failed

    error = _disk_failed(Home(tmp_path), OSError(errno.EMFILE, "Too many open files", "vote.json"))
    assert error.line == "cannot go on: Too many open files (vote.json)"
    assert "ulimit -n" in (error.hint or "")
