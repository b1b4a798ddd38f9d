"""What a peer tells a machine that wants to join, and what `doctor` makes of it."""

from __future__ import annotations

import asyncio
import contextlib
import shutil
import socket
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgpack
import pytest

from tapestry.dht.identity import Identity
from tapestry.node.daemon import doctor, visit
from tapestry.node.daemon.visit import Run
from tapestry.node.disk.home_mark import claim
from tapestry.node.home import Home
from tapestry.node.net import checkup
from tapestry.node.net.checkup import Answer, Checkup, ask
from tapestry.node.net.wire import FRAME, RemoteProtocolError, StreamEnded, unpack
from tapestry.node.spec.node import NodeConfig
from tapestry.node.spec.run import preset_spec
from tapestry.node.spec.size import parameters_of
from tapestry.node.surface.findings import Verdict


async def _asked(port: int, host: str, times: int = 1) -> list[Answer]:
    """Through two connected sockets, as through a stream of libp2p."""

    async def hosts_of(peer: str) -> tuple[str, ...]:
        return (host,) if host else ()

    answering, answers = Checkup("ab" * 32, "9.9", hosts_of), []
    for _ in range(times):
        ours, theirs = socket.socketpair()
        reader, writer = await asyncio.open_connection(sock=ours)
        other_reader, other_writer = await asyncio.open_connection(sock=theirs)
        serving = asyncio.create_task(answering.serve("peer", other_reader, other_writer))
        serving.add_done_callback(lambda _, writer=other_writer: writer.close())
        try:
            answers.append(await ask(reader, writer, [port]))
        finally:
            writer.close()
            await serving
    return answers


def test_a_peer_says_its_time_and_dials_only_where_the_question_came_from() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        port = listening.getsockname()[1]
        answer = asyncio.run(_asked(port, "127.0.0.1"))[0]
        assert (answer.host, answer.open, answer.version) == ("127.0.0.1", (True,), "9.9")
        assert abs(answer.offset_s) < 1 and answer.uncertain_s < 1
        assert asyncio.run(_asked(port, ""))[0].open == ()  # by a relay: nobody is dialled
    assert asyncio.run(_asked(port, "127.0.0.1"))[0].open == (False,)


def test_who_asks_all_the_time_gets_no_answer() -> None:
    with pytest.raises(StreamEnded):
        asyncio.run(_asked(1, "", times=2))


async def _pair(cleanup: contextlib.AsyncExitStack) -> list[Any]:
    """Two ends, each a reader and a writer."""
    ends = [await asyncio.open_connection(sock=one) for one in socket.socketpair()]

    async def close() -> None:
        for _, writer in ends:
            writer.close()
        await asyncio.sleep(0.01)  # the loop closes them in its next turns

    cleanup.push_async_callback(close)
    return ends


async def _opened_to(answering: Checkup, peer: str, cleanup: contextlib.AsyncExitStack) -> Any:
    """The asker's end of a stream that `peer` has opened."""
    mine, (reader, writer) = await _pair(cleanup)

    async def serve() -> None:
        try:
            await answering.serve(peer, reader, writer)
        finally:
            writer.close()

    serving = asyncio.create_task(serve())

    async def end() -> None:
        serving.cancel()
        await asyncio.gather(serving, return_exceptions=True)

    cleanup.push_async_callback(end)
    return mine


def test_silent_peers_keep_nobody_from_an_answer() -> None:
    async def hosts_of(peer: str) -> tuple[str, ...]:
        return ()

    async def main() -> None:
        async with contextlib.AsyncExitStack() as cleanup:
            answering = Checkup("ab" * 32, "9.9", hosts_of)
            for count in range(checkup.AT_A_TIME_MAX):
                await _opened_to(answering, f"silent {count}", cleanup)
            streams = await _opened_to(answering, "honest", cleanup)
            assert (await ask(*streams, [])).version == "9.9"

    asyncio.run(main())


@pytest.mark.parametrize("asks", [True, False])
def test_who_drips_its_bytes_is_waited_for_no_longer_than_who_says_nothing(
    monkeypatch: pytest.MonkeyPatch, asks: bool
) -> None:
    """Each byte had seconds of its own: eight questions closed a node to all others for hours."""
    monkeypatch.setattr(checkup, "ASK_S", 0.1)
    monkeypatch.setattr(checkup, "DIAL_S", 0.0)

    async def hosts_of(peer: str) -> tuple[str, ...]:
        return ()

    async def drip(writer: asyncio.StreamWriter) -> None:
        writer.write(FRAME.pack(checkup.FRAME_BYTES_MAX, 0))
        while True:
            writer.write(b"\0")
            await asyncio.sleep(0.02)

    async def main() -> None:
        async with contextlib.AsyncExitStack() as cleanup:
            if asks:
                reader, drips = await _opened_to(Checkup("ab" * 32, "9.9", hosts_of), "peer", cleanup)
            else:
                (reader, writer), (_, drips) = await _pair(cleanup)
            dripping = asyncio.create_task(drip(drips))
            try:
                async with asyncio.timeout(3.0):
                    if asks:
                        assert await reader.read(-1) == b""
                    else:
                        with pytest.raises(TimeoutError):
                            await ask(reader, writer, [])
            finally:
                dripping.cancel()
                await asyncio.gather(dripping, return_exceptions=True)

    asyncio.run(main())


@pytest.mark.parametrize("ports", [None, 4001, [0], [65_536], [True], ["1"], [1, 2, 3, 4, 5], [1.0]])
def test_a_question_that_names_no_ports_is_refused(ports: object) -> None:
    with pytest.raises(RemoteProtocolError):
        checkup._ports(unpack(msgpack.packb({"ports": ports})))


GOOD = {"time": 1.0, "took": 0.5, "version": "1", "run_id": "ab", "host": "", "open": []}


@pytest.mark.parametrize(
    "change",
    [
        {"time": float("nan")},
        {"time": "1"},
        {"took": -1.0},
        {"open": [1]},
        {"open": 3},
        {"host": "x" * 300},
        {"x": 1},
    ],
)
def test_an_answer_of_another_form_is_refused(change: dict[str, object]) -> None:
    assert checkup._answer(unpack(msgpack.packb(GOOD)), 0.0, 2.0).offset_s == pytest.approx(0.25)
    with pytest.raises(RemoteProtocolError):
        checkup._answer(unpack(msgpack.packb(GOOD | change)), 0.0, 2.0)


# ---- the doctor's judgement --------------------------------------------------------------------------


def answer(offset_s: float = 0.0, opened: tuple[bool, ...] = (True,), host: str = "203.0.113.7") -> Answer:
    return Answer(offset_s, 0.5, "1", "ab", host, opened)


def test_clocks_are_judged_by_what_presence_allows_and_by_how_well_they_are_known() -> None:
    assert visit.judged_clock(answer(3.0)).verdict is Verdict.PASSED
    assert "set this machine's clock" in visit.judged_clock(answer(-30.0)).text
    assert visit.judged_clock(answer(-30.0)).verdict is Verdict.PASSED
    behind = visit.judged_clock(answer(-61.0))
    assert behind.verdict is Verdict.WRONG and "61.0 s behind" in behind.text and behind.cure


def test_a_machine_that_cannot_be_dialled_can_train_and_is_told_which_port_to_open_where() -> None:
    assert visit.judged_dial(answer(), [4001], held=False).verdict is Verdict.PASSED
    closed = visit.judged_dial(answer(opened=(False,)), [4001], held=False)
    assert closed.verdict is Verdict.PASSED and "will carry this node" in closed.text
    assert "--announce /ip4/203.0.113.7/tcp/PORT" in closed.text
    assert visit.judged_dial(answer(host=""), [4001], held=False).verdict is Verdict.UNKNOWN


def test_memory_and_disk_are_judged_by_the_model(tmp_path: Path) -> None:
    spec = preset_spec("small", "a")
    run = Run(spec, parameters_of(spec), "run.toml")
    enough, little = doctor.PROGRAM_BYTES + 16 * run.trained, doctor.PROGRAM_BYTES
    assert [f.verdict for f in doctor.look_at_memory(run, enough, False)] == [Verdict.PASSED]
    assert [f.verdict for f in doctor.look_at_memory(run, little, False)] == [Verdict.WRONG]
    assert [f.verdict for f in doctor.look_at_memory(None, 0, False)] == [Verdict.UNKNOWN]
    assert doctor._judged_disk(run, 10**12, (0, 0), 1e8, "").verdict is Verdict.PASSED
    assert doctor._judged_disk(run, 10**6, (0, 0), 1e8, "").verdict is Verdict.WRONG
    slow = doctor._judged_disk(run, 10**12, (0, 0), 1e3, "")
    assert slow.verdict is Verdict.WRONG and "faster disk" in slow.cure


def test_what_a_home_and_its_running_node_have_already_is_not_asked_of_the_machine_again() -> None:
    spec = preset_spec("small", "a")
    run = Run(spec, parameters_of(spec), "the home")
    states, updates = 8 * run.trained * (spec.limits.checkpoints_kept + 2), int(2 * 1.02 * run.trained)
    half = (states // 2, updates)
    enough = doctor._judged_disk(run, states - half[0], half, 1e8, "")
    assert enough.verdict is Verdict.PASSED
    has = f"{doctor.size(states + updates)} needed, of which the home has {doctor.size(sum(half))}"
    assert has in enough.text
    assert doctor._judged_disk(run, states - half[0] - 1, half, 1e8, "").verdict is Verdict.WRONG
    many = (0, 10**12)  # updates of before make no room for states
    assert doctor._judged_disk(run, states - 1, many, 1e8, "").verdict is Verdict.WRONG
    (beside,) = doctor.look_at_memory(run, doctor.PROGRAM_BYTES, True)
    assert beside.verdict is Verdict.PASSED and "beside the node that runs here" in beside.text


def test_the_state_of_a_running_node_which_has_no_name_is_not_asked_of_its_disk_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = preset_spec("nano", "a")
    run = Run(spec, parameters_of(spec), "the home", "ab")
    needed = 8 * run.trained * (spec.limits.checkpoints_kept + 2) + int(2 * 1.02 * run.trained)
    free = needed - 8 * run.trained
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda path: SimpleNamespace(free=free))
    monkeypatch.setattr(doctor, "_disk_speed", lambda folder, size_bytes: (1e8, 0.001))
    for held, verdict in ((True, Verdict.PASSED), (False, Verdict.WRONG)):
        (finding,) = doctor.look_at_disk(Home(tmp_path), run, held)
        assert finding.verdict is verdict
    free -= 1
    (finding,) = doctor.look_at_disk(Home(tmp_path), run, held=True)
    assert finding.verdict is Verdict.WRONG, "one state more is all that it has"


def test_a_running_node_and_full_homes_can_be_in_their_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = preset_spec("nano", "a")
    run = Run(spec, parameters_of(spec), "the home", "ab")
    config = NodeConfig.resolve(Home(tmp_path), {"external": True}, {})
    free = {"memory": 1, "disk": 1}
    monkeypatch.setattr(doctor, "free_memory_bytes", lambda: free["memory"])
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda path: SimpleNamespace(free=free["disk"]))

    def joins(held: bool) -> bool:
        (finding,) = doctor.look_at_join(config, run, run, held)
        return finding.verdict is Verdict.PASSED

    assert joins(held=True), "its state lies in files without a name, as the look at the disk has it"
    free["memory"] = 10**12
    assert not joins(held=False)  # no room for a state
    config.home.checkpoints.mkdir()
    (config.home.checkpoints / "a").write_bytes(b"x" * 8 * run.trained)
    assert joins(held=False)
    free["memory"] = 1
    assert not joins(held=False)


def test_a_package_that_does_not_fit_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    assert [f.verdict for f in doctor.look_at_versions()] == [Verdict.PASSED]
    there = doctor.metadata.version
    monkeypatch.setattr(doctor.metadata, "version", lambda name: "0.1" if name == "torch" else there(name))
    (finding,) = doctor.look_at_versions()
    assert finding.verdict is Verdict.WRONG and finding.text.startswith("torch is 0.1, not ")


def test_a_home_that_cannot_be_written_and_one_of_a_later_version_are_wrong(tmp_path: Path) -> None:
    home = Home(tmp_path)
    assert [f.verdict for f in doctor.look_at_home(home, False)] == [Verdict.PASSED]
    home.mark.write_text('{"format": 99}')
    (finding,) = doctor.look_at_home(home, False)
    assert finding.verdict is Verdict.WRONG and "later version" in finding.text and finding.cure
    (finding,) = doctor.look_at_home(Home(Path("/proc/none")), False)
    assert finding.verdict is Verdict.WRONG and "cannot be written" in finding.text


def test_whatever_a_start_refuses_in_its_home_is_wrong_and_nothing_is_made(tmp_path: Path) -> None:
    home = Home(tmp_path / "home")
    home.path.mkdir()
    pem = tmp_path / "none.pem"
    pem.write_text("no certificate")
    (home.path / "node.toml").write_text(f'http_cert = "{pem}"\nhttp_key = "{pem}"\n')
    alone, config = (NodeConfig.resolve(home, {"external": True, "island": one}, {}) for one in (True, None))

    def said(config: NodeConfig, held: bool = False) -> list[str]:
        findings = list(doctor.look_at_files(config, held))
        assert all(one.cure for one in findings if one.verdict is Verdict.WRONG)
        return [one.text for one in findings if one.verdict is Verdict.WRONG]

    (tls,) = said(config)
    assert str(pem) in tls and [str(path) for path in home.path.iterdir()] == [f"{home.path}/node.toml"]
    assert "holds no run to go on with alone" in said(alone)[0]
    (home.path / "node.toml").unlink()
    config = NodeConfig.resolve(home, {"external": True}, {})
    assert said(config) == []
    home.island.mkdir()
    assert ["is on an island" in text for text in said(config)] == [True] and said(config, held=True) == []
    home.island.rmdir()
    for path, text in (
        (home.identity_key, "identity.key"),
        (home.vote, "vote.json is damaged"),
        (home.brought, "brought.safetensors"),
        (home.http_token, "can be read by other users"),
    ):
        path.write_text("x" * 64)
        path.chmod(0o644 if path == home.http_token else 0o600)
        (found,) = said(config)
        assert text in found
        path.unlink()


def test_a_copy_of_a_home_and_a_peer_with_its_own_key_are_wrong(tmp_path: Path) -> None:
    home, copy = Home(tmp_path / "home"), Home(tmp_path / "copy")
    home.path.mkdir()
    own = Identity.load_or_create(home.identity_key).peer_id
    claim(home)
    shutil.copytree(home.path, copy.path)
    (finding,) = doctor.look_at_home(copy, False)
    assert finding.verdict is Verdict.WRONG and "is a copy of" in finding.text
    flags = {"external": True, "peers": (f"/ip4/127.0.0.1/tcp/1/p2p/{own}",)}
    (finding,) = doctor.look_at_files(NodeConfig.resolve(home, flags, {}), False)
    assert finding.verdict is Verdict.WRONG and "has the key of this home itself" in finding.text


def test_a_port_that_is_taken_is_wrong_and_a_running_node_has_its_own(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        flags = {"http": f"127.0.0.1:{listening.getsockname()[1]}", "external": True}
        config = NodeConfig.resolve(Home(tmp_path), flags, {})
        (finding,) = doctor.look_at_ports(config, held=False)
        assert finding.verdict is Verdict.WRONG and "--http" in finding.cure
        assert [f.verdict for f in doctor.look_at_ports(config, held=True)] == [Verdict.PASSED]
