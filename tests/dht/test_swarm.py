"""The swarm on loopback with real p2pd: streams, presence, a hostile DHT node, and sudden death."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any

import pytest
import uvloop
from hivemind.dht.node import DHTNode
from hivemind.dht.routing import DHTID
from hivemind.p2p import PeerID
from hivemind.utils import MSGPackSerializer

from tapestry.dht import door as door_module
from tapestry.dht import streams as streams_module
from tapestry.dht import swarm as swarm_module
from tapestry.dht.addresses import PeerAddress, parse_peer
from tapestry.dht.control import Unreachable
from tapestry.dht.directory import presence_key
from tapestry.dht.guard import id_of
from tapestry.dht.identity import Identity, IdentityError
from tapestry.dht.p2pd import SwarmConfig, SwarmError
from tapestry.dht.presence import Presence, encode
from tapestry.dht.reachability import HOP
from tapestry.dht.swarm import Swarm

pytestmark = pytest.mark.e2e

RUN = "ab" * 32
PROTOCOL = "/tapestry/test/1"
LOOPBACK = ("/ip4/127.0.0.1/tcp/0",)


def run(main: Coroutine[Any, Any, None], timeout_s: float = 40.0) -> None:
    async def within_time() -> None:
        async with asyncio.timeout(timeout_s):
            await main

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(within_time())


class Member:
    """A swarm with its identity and what it refused."""

    def __init__(self, swarm: Swarm, identity: Identity, refused: Counter[str]) -> None:
        self.swarm, self.identity, self.refused = swarm, identity, refused

    async def address(self) -> PeerAddress:
        return parse_peer((await self.swarm.addresses())[0])

    async def publish(self, *, epoch: int = 1, lifetime_s: float = 60.0) -> bool:
        record = self.record(epoch=epoch, lifetime_s=lifetime_s)
        return await self.swarm.publish(record[0], record[1])

    def record(self, *, epoch: int = 1, lifetime_s: float = 60.0) -> tuple[bytes, float]:
        now = time.time()
        presence = Presence(
            RUN, self.identity.peer_id, epoch, "cd" * 32, "training", (), now, now + lifetime_s
        )
        return encode(presence, self.identity.sign), presence.expires_at


def config_in(folder: Path, name: str, **changes: Any) -> SwarmConfig:
    Identity.load_or_create(folder / name)
    values: dict[str, Any] = {"listen": LOOPBACK, "nat_port_map": False} | changes
    return SwarmConfig(identity_path=folder / name, **values)


@contextlib.asynccontextmanager
async def members(folder: Path, count: int) -> AsyncIterator[list[Member]]:
    """So many swarms; afterwards, none of their processes, sockets or folders."""
    started: list[Member] = []
    async with contextlib.AsyncExitStack() as cleanup:
        for index in range(count):
            config, refused = config_in(folder, f"member-{index}"), Counter[str]()
            swarm = await Swarm.start(
                config, on_refused=lambda reason, refused=refused: refused.update([reason])
            )
            cleanup.push_async_callback(swarm.close)
            started.append(Member(swarm, Identity.load(config.identity_path), refused))
        yield started
    for member in started:
        assert not is_running(p2pd_of(member.swarm))
        assert not exists(socket_folder_of(member.swarm))


def p2pd_of(swarm: Swarm) -> int:
    pid: int = swarm._p2p._child.pid
    return pid


def socket_folder_of(swarm: Swarm) -> str:
    return os.path.dirname(swarm._streams_path)


def exists(path: str) -> bool:
    return os.path.exists(path)


def is_running(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


async def eventually(condition: Callable[[], Awaitable[bool]], timeout_s: float = 10.0) -> None:
    async with asyncio.timeout(timeout_s):
        while not await condition():  # noqa: ASYNC110  # what is awaited happens in another process
            await asyncio.sleep(0.05)


async def echo(peer_id: str, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    length = int.from_bytes(await reader.readexactly(8), "big")
    writer.write(peer_id.encode() + await reader.readexactly(length))
    await writer.drain()


def test_a_swarm_has_the_peer_id_of_its_identity_and_prints_where_it_listens(tmp_path: Path) -> None:
    async def main() -> None:
        async with members(tmp_path, 1) as [alone]:
            assert alone.swarm.peer_id == alone.identity.peer_id
            [address] = await alone.swarm.addresses()
            assert re.fullmatch(r"/ip4/127\.0\.0\.1/tcp/[1-9]\d*/p2p/" + alone.swarm.peer_id, address)
            assert await alone.swarm.connected_peers() == ()
            alone.swarm.is_member = lambda peer: peer == "member"
            assert [alone.swarm._guard.is_member(peer) for peer in ("member", "stranger")] == [True, False]
            await alone.swarm.close()
            await alone.swarm.close()

    run(main())


def test_a_stream_carries_bytes_both_ways_and_the_proved_peer_id(tmp_path: Path) -> None:
    async def main() -> None:
        async with members(tmp_path, 2) as [alice, bob]:
            await bob.swarm.serve(PROTOCOL, echo)
            await alice.swarm.connect(await bob.address(), 5.0)
            payload = os.urandom(3 << 20)
            reader, writer = await alice.swarm.open_stream(bob.swarm.peer_id, PROTOCOL, 5.0)
            writer.write(len(payload).to_bytes(8, "big") + payload)
            assert await reader.read(-1) == alice.swarm.peer_id.encode() + payload
            writer.close()
            assert await alice.swarm.connected_peers() == (bob.swarm.peer_id,)
            assert await alice.swarm.known_addresses(bob.swarm.peer_id) == await bob.swarm.addresses()

    run(main())


def test_peers_are_reached_by_name_over_quic_and_by_ip6(tmp_path: Path) -> None:
    listen = {LOOPBACK[0]: "/dns4/localhost/", "/ip4/127.0.0.1/udp/0/quic-v1": "/ip4/127.0.0.1/"}
    with contextlib.suppress(OSError), socket.socket(socket.AF_INET6) as probe:
        probe.bind(("::1", 0))
        listen["/ip6/::1/tcp/0"] = "/ip6/::1/"

    async def main() -> None:
        async with contextlib.AsyncExitStack() as cleanup:
            [caller] = await cleanup.enter_async_context(members(tmp_path, 1))
            for index, (address, host) in enumerate(listen.items()):
                config = config_in(tmp_path, f"other-{index}", listen=(address,))
                other = await Swarm.start(config)
                cleanup.push_async_callback(other.close)
                (found,) = await other.addresses()
                named = "/".join(["", *host.strip("/").split("/"), *found.split("/")[3:]])
                await caller.swarm.connect(parse_peer(named), 5.0)
                assert await caller.swarm.known_addresses(other.peer_id) == (found,)

    run(main())


def test_what_was_written_before_close_arrives_whole(tmp_path: Path) -> None:
    async def main() -> None:
        received = asyncio.get_running_loop().create_future()

        async def slow(peer_id: str, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            received.set_result(len(await reader.read(-1)))

        async with members(tmp_path, 2) as [alice, bob]:
            await bob.swarm.serve(PROTOCOL, slow)
            await alice.swarm.connect(await bob.address(), 5.0)
            _, writer = await alice.swarm.open_stream(bob.swarm.peer_id, PROTOCOL, 5.0)
            writer.write(bytes(8 << 20))
            writer.close()
            assert await received == 8 << 20

    run(main())


def test_a_handler_that_fails_closes_its_stream_and_harms_no_other(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async def failing(peer_id: str, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        raise RuntimeError("a bug")

    async def main() -> None:
        async with members(tmp_path, 2) as [alice, bob]:
            await bob.swarm.serve("/tapestry/failing/1", failing)
            await bob.swarm.serve(PROTOCOL, echo)
            await alice.swarm.connect(await bob.address(), 5.0)
            reader, writer = await alice.swarm.open_stream(bob.swarm.peer_id, "/tapestry/failing/1", 5.0)
            assert await reader.read(-1) == b""
            writer.close()
            reader, writer = await alice.swarm.open_stream(bob.swarm.peer_id, PROTOCOL, 5.0)
            writer.write((0).to_bytes(8, "big"))
            assert await reader.read(-1) == alice.swarm.peer_id.encode()
            writer.close()

    run(main())
    assert "stream handler failed" in caplog.text and "a bug" in caplog.text


def test_p2pd_serves_neither_its_own_kademlia_nor_its_own_relay(tmp_path: Path) -> None:
    """Nobody needs them: one keeps whatever record anybody gives it, the other carries whoever asks."""

    async def serves_kademlia(asking: Swarm, peer: Swarm) -> bool:
        await asking.connect_any(peer.peer_id, await peer.addresses(), 5.0)
        try:
            _, writer = await asking.open_stream(peer.peer_id, "/ipfs/kad/1.0.0", 5.0)
        except Unreachable as error:
            assert error.reason == "unsupported"
            return False
        writer.close()
        return True

    async def asked_for_a_place(asking: Swarm, peer: Swarm) -> bytes:
        reader, writer = await asking.open_stream(peer.peer_id, HOP, 5.0)
        writer.write(b"\x02\x08\x00")  # reserve
        answer = await reader.read(-1)
        writer.close()
        return answer

    async def ours(peer_id: str, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"ours")

    async def main() -> None:
        async with members(tmp_path, 2) as [alice, bob]:
            assert not await serves_kademlia(alice.swarm, bob.swarm)
            assert await asked_for_a_place(alice.swarm, bob.swarm) == b""
            await bob.swarm.serve(HOP, ours)
            assert await asked_for_a_place(alice.swarm, bob.swarm) == b"ours"
            carol = await Swarm.start(config_in(tmp_path, "carol", serve_kademlia=True))
            assert await serves_kademlia(alice.swarm, carol), "asked for, it is there"
            await carol.close()

    run(main())


@pytest.mark.parametrize("fails", [True, False])
def test_who_takes_nothing_of_what_is_written_holds_no_descriptor_for_that(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails: bool
) -> None:
    """It stayed open as long as the peer was connected, and was counted nowhere: 64 more each stall_s."""
    monkeypatch.setattr(streams_module, "LINGER_S", 0.2)
    ended: list[bool] = []

    async def flood(peer_id: str, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            async with asyncio.timeout(0.5):
                while True:
                    writer.write(bytes(1 << 16))
                    await writer.drain()
        except TimeoutError:
            ended.append(writer.transport.get_write_buffer_size() > 0)
            if fails:
                raise

    def descriptors() -> int:
        return len(os.listdir("/proc/self/fd"))

    async def main() -> None:
        async with members(tmp_path, 2) as [alice, bob]:
            await bob.swarm.serve(PROTOCOL, flood)
            await alice.swarm.connect(await bob.address(), 5.0)
            before, writers = descriptors(), []
            for _ in range(4):
                _, writer = await alice.swarm.open_stream(bob.swarm.peer_id, PROTOCOL, 5.0)
                writers.append(writer)

            async def has_ended() -> bool:
                return len(ended) == 4 and descriptors() <= before + len(writers)

            await eventually(has_ended)
            assert all(ended), "more was written than the buffers on the way hold"
            for writer in writers:
                writer.close()

    run(main())


def test_who_takes_nothing_of_many_streams_is_disconnected(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """p2pd keeps its end of each, which it cannot write out, as long as there is a connection."""
    monkeypatch.setattr(streams_module, "LINGER_S", 0.1)
    monkeypatch.setattr(door_module, "STUCK_MAX", 3)

    async def take_nothing(peer_id: str, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await asyncio.sleep(30)

    async def main() -> None:
        async with members(tmp_path, 2) as [alice, bob]:
            await bob.swarm.serve(PROTOCOL, take_nothing)
            await alice.swarm.connect(await bob.address(), 5.0)
            for count in range(1, 5):
                _, writer = await alice.swarm.open_stream(bob.swarm.peer_id, PROTOCOL, 5.0)
                writer.write(bytes(8 << 20))
                alice.swarm.end_stream(bob.swarm.peer_id, writer)
                assert writer.transport.get_write_buffer_size() > 0
                await writer.wait_closed()
                if count < 4:
                    assert await alice.swarm.connected_peers() == (bob.swarm.peer_id,)

            async def is_disconnected() -> bool:
                return not await alice.swarm.connected_peers()

            await eventually(is_disconnected)
            assert alice.refused == {"streams": 1}

    run(main())


def test_streams_above_the_limit_are_closed_at_once(tmp_path: Path) -> None:
    async def hold(peer_id: str, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"!")
        await reader.read(-1)

    async def main() -> None:
        async with members(tmp_path, 1) as [alice]:
            bob = await Swarm.start(config_in(tmp_path, "bob", streams_max=2))
            await bob.serve(PROTOCOL, hold)
            await alice.swarm.connect_any(bob.peer_id, await bob.addresses(), 5.0)
            answers, writers = [], []
            for _ in range(3):
                reader, writer = await alice.swarm.open_stream(bob.peer_id, PROTOCOL, 5.0)
                answers.append(await reader.read(1))
                writers.append(writer)
            for writer in writers:
                writer.close()
            await bob.close()
            assert answers == [b"!", b"!", b""]

    run(main())


def test_who_holds_all_streams_makes_room_for_another_member(tmp_path: Path) -> None:
    """Whose stream it is was not even read when all were taken."""

    async def hold(peer_id: str, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"!")
        await reader.read(-1)

    async def main() -> None:
        async with members(tmp_path, 2) as [alice, carol]:
            bob = await Swarm.start(config_in(tmp_path, "bob", streams_max=20))
            try:
                await bob.serve(PROTOCOL, hold)
                held = []
                for member in [alice] * 21 + [carol]:
                    await member.swarm.connect_any(bob.peer_id, await bob.addresses(), 5.0)
                    reader, writer = await member.swarm.open_stream(bob.peer_id, PROTOCOL, 5.0)
                    held.append((await reader.read(1), reader, writer))
                assert [answer for answer, _, _ in held] == [b"!"] * 20 + [b"", b"!"]
                assert await held[19][1].read(1) == b"", "her newest ends"
                for _, _, writer in held:
                    writer.close()
            finally:
                await bob.close()

    run(main())


def test_why_a_peer_is_unreachable_is_said_in_one_line(tmp_path: Path) -> None:
    async def main() -> None:
        async with members(tmp_path, 2) as [alice, bob]:
            nobody = Identity.load_or_create(tmp_path / "nobody").peer_id
            somebody = Identity.load_or_create(tmp_path / "somebody").peer_id
            bobs = (await bob.address()).maddr.split("/p2p/")[0]
            with socket.socket() as silent:
                silent.bind(("127.0.0.1", 0))
                silent.listen()
                silent_port = silent.getsockname()[1]
                for maddr, reason in (
                    (f"{bobs}/p2p/{nobody}", "wrong_peer"),
                    (f"/ip4/127.0.0.1/tcp/1/p2p/{bob.swarm.peer_id}", "refused"),
                    ((await alice.address()).maddr, "self"),
                    (f"/ip4/127.0.0.1/tcp/{silent_port}/p2p/{somebody}", "timeout"),
                ):
                    with pytest.raises(Unreachable) as caught:
                        await alice.swarm.connect(parse_peer(maddr), 1.0)
                    assert caught.value.reason == reason
                    assert str(caught.value).startswith(maddr) and "\n" not in str(caught.value)
            with pytest.raises(Unreachable, match="no address that can be dialled"):
                await alice.swarm.connect_any(nobody, ["/nonsense"], 1.0)
            await alice.swarm.connect(await bob.address(), 5.0)
            with pytest.raises(Unreachable, match="does not serve this protocol"):
                await alice.swarm.open_stream(bob.swarm.peer_id, "/tapestry/unknown/1", 5.0)
            assert list(alice.swarm.lacks()) == [(bob.swarm.peer_id, "/tapestry/unknown/1")]
            await bob.swarm.serve("/tapestry/unknown/1", echo)
            _, writer = await alice.swarm.open_stream(bob.swarm.peer_id, "/tapestry/unknown/1", 5.0)
            writer.close()
            assert alice.swarm.lacks() == {}

    run(main())


def test_a_taken_port_is_refused_where_p2pd_would_share_it(tmp_path: Path) -> None:
    async def main() -> None:
        async with members(tmp_path, 1) as [first]:
            taken = (await first.address()).maddr.split("/p2p/")[0]
            with pytest.raises(SwarmError, match=f"cannot listen on {taken}: Address already in use"):
                await Swarm.start(config_in(tmp_path, "second", listen=(taken,)))

    run(main())


def test_a_start_that_fails_or_is_cancelled_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folders: list[str] = []

    def make_folder() -> str:
        folders.append(tempfile.mkdtemp(prefix="tapestry-", dir="/tmp"))
        return folders[-1]

    monkeypatch.setattr(swarm_module, "make_socket_folder", make_folder)

    async def main() -> None:
        with pytest.raises(IdentityError):
            await Swarm.start(SwarmConfig(identity_path=tmp_path / "none", listen=LOOPBACK))
        assert not exists(str(tmp_path / "none"))
        with pytest.raises(SwarmError, match="did not start"):
            await Swarm.start(config_in(tmp_path, "slow", startup_timeout_s=0.001))
        starting = asyncio.create_task(Swarm.start(config_in(tmp_path, "cancelled")))
        await asyncio.sleep(0.05)
        starting.cancel()
        await asyncio.wait([starting])
        assert starting.cancelled()
        assert len(folders) == 2 and not any(exists(folder) for folder in folders)

    run(main())


def test_the_folder_of_its_sockets_is_locked_until_its_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """systemd-tmpfiles deletes it after ten days otherwise: p2pd.py, hold_folder."""
    folder = tempfile.mkdtemp(prefix="tapestry-", dir="/tmp")
    looker = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    monkeypatch.setattr(swarm_module, "make_socket_folder", lambda: folder)

    async def main() -> None:
        swarm = await Swarm.start(config_in(tmp_path, "a"))
        try:
            with pytest.raises(BlockingIOError):
                fcntl.flock(looker, fcntl.LOCK_EX | fcntl.LOCK_NB)
        finally:
            await swarm.close()
        fcntl.flock(looker, fcntl.LOCK_EX | fcntl.LOCK_NB)
        assert not exists(folder)

    run(main())
    os.close(looker)


def test_members_see_each_others_presence_through_one_entry(tmp_path: Path) -> None:
    async def main() -> None:
        async with members(tmp_path, 3) as started:
            entry = await started[0].address()
            assert await started[0].swarm.join_dht(RUN) == 0
            for member in started[1:]:
                assert await member.swarm.join_dht(RUN, [entry]) == 1
            for epoch in (1, 2):
                for member in started:
                    assert await member.publish(epoch=epoch, lifetime_s=60.0 + epoch)
            everyone = sorted(member.swarm.peer_id for member in started)
            for member in started:
                listed = await member.swarm.list_presence(time.time())
                assert [(presence.peer_id, presence.epoch) for presence in listed] == [
                    (peer_id, 2) for peer_id in everyone
                ]
                assert not member.refused

    run(main())


def test_the_dht_starts_when_its_entries_are_away_and_heals_by_meeting(tmp_path: Path) -> None:
    async def main() -> None:
        async with members(tmp_path, 2) as [alice, bob]:
            away = parse_peer(f"/ip4/127.0.0.1/tcp/1/p2p/{bob.swarm.peer_id}")
            assert await alice.swarm.join_dht(RUN, [away], timeout_s=5.0) == 0
            assert await bob.swarm.join_dht(RUN) == 0
            assert await alice.publish() and await bob.publish()
            assert len(await alice.swarm.list_presence(time.time())) == 1
            await bob.swarm.connect(await alice.address(), 5.0)
            assert await bob.swarm.meet([alice.swarm.peer_id, bob.swarm.peer_id]) == 1

            async def sees_both() -> bool:
                return len(await alice.swarm.list_presence(time.time())) == 2

            await eventually(sees_both)

    run(main())


def test_an_expired_presence_is_listed_no_more(tmp_path: Path) -> None:
    async def main() -> None:
        async with members(tmp_path, 1) as [alone]:
            await alone.swarm.join_dht(RUN)
            await alone.publish(lifetime_s=0.5)
            assert len(await alone.swarm.list_presence(time.time())) == 1

            async def is_empty() -> bool:
                return not await alone.swarm.list_presence(time.time())

            await eventually(is_empty, 3.0)

    run(main())


def test_a_hostile_dht_node_can_neither_forge_nor_wipe(tmp_path: Path) -> None:
    async def main() -> None:
        async with members(tmp_path, 3) as [alice, bob, mallory]:
            await alice.swarm.join_dht(RUN)
            await bob.swarm.join_dht(RUN, [await alice.address()])
            assert await alice.publish() and await bob.publish()
            await mallory.swarm.connect(await alice.address(), 5.0)
            raw = await DHTNode.create(
                p2p=mallory.swarm._p2p,
                initial_peers=[f"/p2p/{alice.swarm.peer_id}"],
                node_id=id_of(mallory.swarm._p2p.peer_id),
            )
            key, victim = DHTID.generate(source=presence_key(RUN)), PeerID.from_base58(alice.swarm.peer_id)
            record, expires_at = mallory.record()
            packed, later = MSGPackSerializer.dumps(record), expires_at + 300.0

            async def store(value: bytes, expiry: float, subkey: str | None) -> list[bool]:
                accepted: list[bool] = await raw.protocol.call_store(
                    victim, [key], [value], [expiry], [subkey]
                )
                return list(accepted)

            assert await store(packed, expires_at, bob.swarm.peer_id) == [False]
            assert await store(packed, later, mallory.swarm.peer_id) == [False]
            assert await store(MSGPackSerializer.dumps("wiped"), later, None) == [False]
            assert alice.refused == {"forged": 2, "malformed": 1}
            # Mallory keeps lies in its own storage, and is asked for them: its answer is refused too.
            raw.protocol.storage.store(key, MSGPackSerializer.dumps("wiped"), later)
            for member in (alice, bob):
                listed = await member.swarm.list_presence(time.time())
                assert sorted(presence.peer_id for presence in listed) == sorted(
                    [alice.swarm.peer_id, bob.swarm.peer_id]
                )
            assert alice.refused["malformed"] == 2
            assert await store(packed, expires_at, mallory.swarm.peer_id) == [True]

    run(main())


@pytest.fixture
def stock_dht() -> Iterator[str]:
    """The address of a `hivemind-dht` process as it comes with hivemind."""
    script = Path(sys.executable).with_name("hivemind-dht")
    command = [str(script), "--host_maddrs", LOOPBACK[0]]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )
    assert process.stdout is not None
    try:
        found = (re.search(r"/ip4/127\.0\.0\.1/tcp/\d+/p2p/\w+", line) for line in process.stdout)
        yield next(match for match in found if match).group()
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(5.0)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            process.stdout.close()


def test_a_stock_hivemind_dht_serves_as_entry(tmp_path: Path, stock_dht: str) -> None:
    async def main() -> None:
        async with members(tmp_path, 2) as started:
            for member in started:
                assert await member.swarm.join_dht(RUN, [parse_peer(stock_dht)]) == 1
            for member in started:
                assert await member.publish()
            for member in started:

                async def sees_both(member: Member = member) -> bool:
                    return len(await member.swarm.list_presence(time.time())) == 2

                await eventually(sees_both)

    run(main())


def test_the_end_of_hiveminds_connection_with_p2pd_is_noticed_though_p2pd_lives(tmp_path: Path) -> None:
    """Without it the DHT fails in silence: publish says stored, list_presence says nobody."""

    async def main() -> None:
        async with members(tmp_path, 1) as [alice]:
            waiting = asyncio.create_task(alice.swarm.wait_p2pd_death())
            await asyncio.sleep(0.1)
            assert not waiting.done()
            alice.swarm._p2p._client.control._read_task.cancel()
            async with asyncio.timeout(3.0):
                assert await waiting == "hivemind's connection with p2pd has ended"

    run(main())


def test_the_death_of_p2pd_is_noticed_and_nothing_hangs_on_it(tmp_path: Path) -> None:
    async def main() -> None:
        async with members(tmp_path, 2) as [alice, bob]:
            await bob.swarm.serve(PROTOCOL, echo)
            await alice.swarm.join_dht(RUN)
            await alice.swarm.connect(await bob.address(), 5.0)
            reader, writer = await alice.swarm.open_stream(bob.swarm.peer_id, PROTOCOL, 5.0)
            os.kill(p2pd_of(alice.swarm), signal.SIGKILL)
            async with asyncio.timeout(1.0):
                assert await alice.swarm.wait_p2pd_death() == "p2pd was killed by signal 9"
                assert await reader.read(-1) == b""
            writer.close()
            with pytest.raises(SwarmError, match="p2pd does not answer"):
                await alice.swarm.addresses()
            with pytest.raises(SwarmError, match="p2pd does not answer"):
                await alice.swarm.open_stream(bob.swarm.peer_id, PROTOCOL, 1.0)
            async with asyncio.timeout(2.0):
                with contextlib.suppress(SwarmError):
                    await alice.swarm.publish(*alice.record(), timeout_s=1.0)
            async with asyncio.timeout(2.0):
                await alice.swarm.close()

    run(main())


def test_a_killed_node_takes_its_p2pd_with_it(tmp_path: Path) -> None:
    Identity.load_or_create(tmp_path / "child")
    program = f"""
import asyncio, os
from tapestry.dht.swarm import Swarm
from tapestry.dht.p2pd import SwarmConfig
async def main():
    swarm = await Swarm.start(SwarmConfig({str(tmp_path / "child")!r}, listen={LOOPBACK!r}))
    print(swarm._p2p._child.pid, os.path.dirname(swarm._streams_path), flush=True)
    await asyncio.Event().wait()
asyncio.run(main())
"""
    process = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    try:
        pid, folder = process.stdout.readline().split()
        assert is_running(int(pid))
    finally:
        process.kill()
        process.wait()
        process.stdout.close()
    deadline = time.monotonic() + 5.0
    while is_running(int(pid)):
        assert time.monotonic() < deadline, "p2pd has outlived the node"
        time.sleep(0.01)
    for name in os.listdir(folder):
        os.unlink(os.path.join(folder, name))
    os.rmdir(folder)
