"""--base DIR: the base's weights from a member's own directory, however they are cut there."""

from __future__ import annotations

import asyncio
import errno
import os
from pathlib import Path

import pytest
from bases import make_base

from tapestry.dht.addresses import PeerAddress
from tapestry.node.daemon import base as base_module
from tapestry.node.daemon.base import _fetch, _take_own
from tapestry.node.disk.base import ANEW, OWN, BaseFile, BaseFolder
from tapestry.node.errors import ExitCode, UserError
from tapestry.node.net.transfer import TransferLimits
from tapestry.node.progress import silent
from tapestry.node.spec.training import WEIGHTS
from tapestry.node.trainer.models.stored import join_files


@pytest.fixture
def own(tmp_path: Path) -> Path:
    return make_base(tmp_path / "own", "llama", shards=2)


@pytest.fixture
def mine(own: Path, tmp_path: Path) -> BaseFolder:
    """HOME/base after downloads that broke off, one of them killed."""
    whole = tmp_path / WEIGHTS
    join_files(own, whole)
    folder = BaseFolder(tmp_path / "mine", [BaseFile.of(whole)])
    for end in (".part", ANEW, OWN):
        folder.append(folder.files[WEIGHTS], b"what came", end)
    return folder


def test_shards_are_joined_where_a_download_broke_off(own: Path, mine: BaseFolder) -> None:
    """It failed with "File exists": the cure that the error of the download itself names."""
    assert _take_own(mine, own, silent) == []
    assert [path.name for path in mine.folder.iterdir()] == [WEIGHTS]


def test_another_base_leaves_what_came(own: Path, mine: BaseFolder, tmp_path: Path) -> None:
    other = make_base(tmp_path / "other", "llama", shards=2, seed=2)
    with pytest.raises(UserError, match="has the digest"):
        _take_own(mine, other, silent)
    for path in other.glob("*.safetensors"):
        os.truncate(path, 100)
    with pytest.raises(UserError):
        _take_own(mine, other, silent)
    weights = mine.files[WEIGHTS]
    left = {mine.part(weights), mine.part(weights, ANEW)}
    assert {*mine.folder.iterdir()} == left
    assert {path.read_bytes() for path in left} == {b"what came"}


def test_shards_that_were_half_joined_are_dropped(
    own: Path, mine: BaseFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    def torn(_: Path, out: Path, __: object) -> None:
        out.write_bytes(b"half")
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(base_module, "join_files", torn)
    with pytest.raises(UserError, match=os.strerror(errno.EIO)):
        _take_own(mine, own, silent)
    assert not mine.part(mine.files[WEIGHTS], OWN).exists()


def test_a_full_disk_while_a_peer_gives_is_one_line_and_what_to_do(
    mine: BaseFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was told as the home's last state, which a joiner has none of, and named no file."""
    weights = mine.files[WEIGHTS]

    async def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(base_module, "fetch_file", full)
    peer = PeerAddress("/ip4/127.0.0.1/tcp/1", "12D3KooWFAQWzWY2n8KUGGaXykyzafrNgSCsfTmabDmNUZkDoTn5")
    limits = TransferLimits(1.0)
    with pytest.raises(UserError) as told:
        asyncio.run(_fetch(mine, weights, "ab" * 32, None, [peer], limits, lambda *_: None, silent))  # type: ignore[arg-type]
    assert told.value.exit_code == ExitCode.FAILED
    assert told.value.line == f"cannot write the base's {WEIGHTS} in {mine.folder}: No space left on device"
    kept = f"9 of {weights.size_bytes} bytes are kept"
    assert told.value.hint == f"make room or mend the disk, and start again: {kept}"
