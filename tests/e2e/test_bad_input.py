"""What a person can get wrong: one clear line, the right exit code, never a traceback."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from e2e.harness import LOOPBACK, Node, init, tapestry

pytestmark = pytest.mark.e2e

NOBODY = "/ip4/127.0.0.1/tcp/9/p2p/12D3KooWLuBRa9XUvfuQ8VeDVTnBdUXX9LHnNDAkx2gAtXBobPmd"


@pytest.fixture(scope="module")
def founder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Node]:
    with Node(init(tmp_path_factory.mktemp("run") / "a")) as node:
        yield node.wait_ready()


def refused(code: int, *words: str, home: Path, flags: tuple[object, ...]) -> None:
    """`start` ends with this code, and says these words on stderr in few lines."""
    done = tapestry("start", "--home", home, *LOOPBACK, *flags)
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr
    assert done.stderr.count("error: ") == 1 and len(done.stderr.splitlines()) <= 8, done.stderr
    for word in words:
        assert word in done.stderr, done.stderr


def test_an_unreachable_peer(tmp_path: Path) -> None:
    refused(3, "cannot reach", "refused", home=tmp_path, flags=("--data", "stdlib", "--peer", NOBODY))


def test_a_peer_of_another_run(tmp_path: Path, founder: Node) -> None:
    flags = ("--data", "stdlib", "--peer", founder.address, "--run-id", "ab" * 32)
    refused(4, "--run-id", founder.json()["run_id"], home=tmp_path, flags=flags)


def test_a_home_of_another_run(tmp_path: Path, founder: Node) -> None:
    home = init(tmp_path / "other")
    with Node(home) as other:
        other.wait_ready()
        assert other.stop() == 0
    refused(4, "another run", home=home, flags=("--data", "stdlib", "--peer", founder.address))


def test_a_run_toml_that_differs_shows_the_difference(tmp_path: Path, founder: Node) -> None:
    home = init(tmp_path / "b", inner_steps="9")
    flags = ("--data", "stdlib", "--peer", founder.address)
    refused(4, "train.inner_steps: 9 here, 8 at the peer", home=home, flags=flags)


def test_the_peer_id_of_somebody_else(tmp_path: Path, founder: Node) -> None:
    wrong = founder.address.rsplit("/", 1)[0] + "/" + NOBODY.rsplit("/", 1)[1]
    refused(3, "cannot reach", home=tmp_path, flags=("--data", "stdlib", "--peer", wrong))


def test_no_run_at_all(tmp_path: Path) -> None:
    refused(2, "there is no run", "tapestry init", home=tmp_path, flags=("--data", "stdlib"))


def test_no_data(tmp_path: Path) -> None:
    refused(2, "no data", "--data", home=init(tmp_path / "a"), flags=())


def test_data_too_small_for_one_window(tmp_path: Path) -> None:
    (tmp_path / "short.txt").write_text("too short")
    flags = ("--data", tmp_path / "short.txt")
    refused(2, "is not declared", "--declare own", home=init(tmp_path / "a"), flags=flags)
    refused(2, "token", home=tmp_path / "a", flags=(*flags, "--declare", "own"))


def test_a_home_in_use(founder: Node) -> None:
    refused(2, "in use", str(founder.pid), home=founder.home, flags=("--data", "stdlib"))


def test_a_port_in_use(tmp_path: Path, founder: Node) -> None:
    port = founder.json()["http"].rstrip("/").rsplit(":", 1)[1]
    flags = ("--data", "stdlib", "--peer", founder.address, "--http", f"127.0.0.1:{port}")
    refused(2, port, "--http", home=tmp_path, flags=flags)


@pytest.mark.parametrize("mode", [0o600, 0o644])
def test_a_key_file_that_is_corrupt_or_readable_by_others(tmp_path: Path, mode: int, founder: Node) -> None:
    home = tmp_path / "b"
    home.mkdir()
    key = home / "identity.key"
    key.write_bytes(b"garbage" if mode == 0o600 else (founder.home / "identity.key").read_bytes())
    key.chmod(mode)
    refused(2, "identity.key", home=home, flags=("--data", "stdlib", "--peer", founder.address))


def test_a_corrupt_checkpoint_is_named_and_the_one_before_is_used(tmp_path: Path) -> None:
    with Node(init(tmp_path / "a", checkpoint_every_epochs="2")) as node:
        node.wait_ready()
        node.wait_epoch(5)
        assert node.stop() == 0
        newest = max((node.home / "checkpoints").glob("*.safetensors"))
        with newest.open("r+b") as file:
            file.seek(-100, os.SEEK_END)
            file.write(b"\xff" * 50)
        epoch = len((node.home / "chain.jsonl").read_text().splitlines())
        node.start().wait_ready()
        node.wait_epoch(epoch + 1)
        assert newest.name in node.log.read_text()
        assert node.stop() == 0


def test_a_stock_dht_peer_leads_to_the_run_by_its_id(tmp_path: Path) -> None:
    command = shutil.which("hivemind-dht", path=str(Path(os.sys.executable).parent))  # type: ignore[attr-defined]
    assert command is not None
    with subprocess.Popen(
        [command, "--host_maddrs", "/ip4/127.0.0.1/tcp/0", "--refresh_period", "3600"],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    ) as dht:
        try:
            assert dht.stdout is not None
            bootstrap = next(
                word for line in dht.stdout for word in line.split() if word.startswith("/ip4/127.0.0.1")
            )
            refused(3, "--run-id", home=tmp_path / "x", flags=("--data", "stdlib", "--peer", bootstrap))
            with Node(init(tmp_path / "a"), "--peer", bootstrap) as lost:
                assert lost.process is not None and lost.process.wait(60) == 3
            with Node(tmp_path / "a") as founder:
                founder.start() if founder.process is None else None
                founder.wait_ready()
                run_id = founder.json()["run_id"]
                assert founder.stop() == 0
            with Node(tmp_path / "a", "--peer", bootstrap) as founder:
                founder.wait_ready()
                founder.wait("presence", lambda: founder.status()["epoch"] >= 1)
                with Node(
                    tmp_path / "b", "--peer", bootstrap, "--run-id", run_id, data="stdlib:2/3"
                ) as joiner:
                    joiner.wait("its question", lambda: "waiting to be admitted by" in joiner.log.read_text())
                    table = json.loads(tapestry("members", "--home", founder.home, "--json").stdout)
                    admitted = tapestry("admit", table["applicants"][0]["peer"], "--home", founder.home)
                    assert admitted.returncode == 0, admitted.stderr
                    joiner.wait_ready()
                    joiner.wait_epoch(1)
                    assert joiner.json()["run_id"] == run_id
        finally:
            os.killpg(dht.pid, 9)


def test_a_full_disk_ends_the_node_with_its_last_good_state(tmp_path: Path) -> None:
    small = tmp_path / "small"
    small.mkdir()
    if (
        os.geteuid() != 0
        or subprocess.run(
            ["mount", "-t", "tmpfs", "-o", "size=24m", "tmpfs", small], capture_output=True, check=False
        ).returncode
    ):
        pytest.skip("a tmpfs of a few MB cannot be mounted here")
    try:
        home = init(small / "a")
        with Node(home, data="stdlib:1/3") as node:
            node.log = tmp_path / "node.log"
            node.wait_ready()
            node.wait_epoch(2)
            filler = small / "filler"
            with filler.open("wb", buffering=0) as file:
                try:
                    while True:
                        file.write(b"x" * 65536)
                except OSError:
                    pass
            assert node.process is not None
            assert node.process.wait(60) == 1
            said = (small / "a.log").read_text() if (small / "a.log").exists() else node.log.read_text()
            assert "Traceback" not in said
            filler.unlink()
            epoch = len((home / "chain.jsonl").read_text().splitlines())
            node.start().wait_ready()
            node.wait_epoch(epoch + 1)
            assert node.stop() == 0
    finally:
        subprocess.run(["umount", "-l", small], check=False)
