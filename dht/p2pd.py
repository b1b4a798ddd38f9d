"""The p2pd process: the libp2p daemon that hivemind ships, started, bound to our life, and stopped."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import glob
import logging
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from hivemind.p2p import P2P, P2PContext, PeerID
from hivemind.p2p.p2p_daemon_bindings.utils import P2PDaemonError
from hivemind.utils.logging import use_hivemind_log_handler

from tapestry.dht.guard import Answer, Guard
from tapestry.dht.ports import port_fault

_log = logging.getLogger("tapestry.swarm")
_p2pd_log = logging.getLogger("tapestry.p2pd")


STOP_TIMEOUT_S = 3.0
SPAWN_POLL_S = 0.01
_LOCK = "lock"  # in a folder of sockets


class SwarmError(Exception):
    """The swarm cannot do what was asked; the message is one line that says why."""


@dataclass(frozen=True, slots=True)
class SwarmConfig:
    """How this node takes part. Addresses are what `addresses.parse_listen` and `parse_announce` return."""

    identity_path: str | os.PathLike[str]  # made by Identity.load_or_create
    listen: tuple[str, ...] = ("/ip4/0.0.0.0/tcp/0",)
    announce: tuple[str, ...] = ()  # () = what p2pd finds out by itself
    # hivemind's 15 s is too short on slow machines, the commonest complaint of its users.
    startup_timeout_s: float = 60.0
    use_relay: bool = True  # reach peers behind NAT through relays
    # p2pd's own Kademlia: finds where a peer is by its id alone. Members tell each other their addresses, and
    # it keeps 524 bytes for a day of whatever record anybody gives it, at 34,000 a second.
    serve_kademlia: bool = False
    nat_port_map: bool = True
    streams_max: int = 1024  # inbound, over all protocols; strangers have half of them: places.py
    peer_streams_max: int = 64  # of these, of one peer. A member has two, and some while it catches up


class _P2pd(P2P):  # type: ignore[misc]  # hivemind is untyped
    """hivemind's P2P, with a daemon that cannot outlive us and does not write on the user's screen.

    What peers ask of hivemind's DHT, and what they answer to it, goes through our guard.
    """

    guard: Guard
    config: SwarmConfig

    @classmethod
    def _make_process_args(cls, *args: Any, **kwargs: Any) -> list[str]:
        if not cls.config.serve_kademlia:
            kwargs = {key: value for key, value in kwargs.items() if key != "dhtServer"}
        # It carries others all the same, by libp2p's own limits: swarm.py answers in its place.
        kwargs["relayService"] = False
        daemon_args = P2P._make_process_args(*args, **kwargs)
        return [sys.executable, "-I", "-S", "-c", _BOUND_TO_PARENT, str(os.getpid()), *daemon_args]

    async def _add_protobuf_unary_handler(
        self, handle_name: str, handler: Answer, input_protobuf_type: type, balanced: bool = False
    ) -> None:
        async def serve(data: bytes, remote: PeerID) -> bytes:
            context = P2PContext(handle_name=handle_name, local_id=self.peer_id, remote_id=remote)
            return await self.guard.serve(input_protobuf_type, data, context, handler)

        await self._client.add_unary_handler(handle_name, serve, balanced=balanced)

    async def _call_unary_protobuf_handler(
        self, peer_id: PeerID, handle_name: str, input: Any, output_protobuf_type: type
    ) -> Any:
        answer = await self._client.call_unary_handler(peer_id, handle_name, input.SerializeToString())
        return self.guard.answered(output_protobuf_type, answer, peer_id)

    async def _read_outputs(self, ready: asyncio.Future[None]) -> None:
        """As in hivemind, but a line longer than the buffer does not end the reading, and so block p2pd."""
        last_line = "no output"
        while line := await _read_line(self._child.stdout):
            last_line = line.decode(errors="replace").rstrip()
            _p2pd_log.debug("%s", last_line)
            if last_line.startswith("Peer ID:") and not ready.done():
                ready.set_result(None)
        if not ready.done():
            ready.set_exception(P2PDaemonError(last_line))


# Run by a Python that then becomes p2pd. It asks the kernel to kill p2pd when our thread ends (1 is
# PR_SET_PDEATHSIG), gives up if we are gone already, and takes p2pd out of the terminal's process group: a
# Ctrl-C is for the node, which still needs p2pd to take its leave.
_BOUND_TO_PARENT = """
import ctypes, os, signal, sys
if ctypes.CDLL(None).prctl(1, ctypes.c_ulong(signal.SIGKILL)) != 0 or os.getppid() != int(sys.argv[1]):
    sys.exit("cannot bind p2pd to its parent")
os.setsid()
os.execv(sys.argv[2], sys.argv[2:])
"""


async def _read_line(stream: asyncio.StreamReader) -> bytes:
    try:
        return await stream.readline()
    except ValueError:  # longer than the buffer; readline has dropped what it had
        return b"(a line too long to show)\n"


def quiet_hivemind() -> None:
    """hivemind logs to the screen by a handler of its own, and renames a level for the whole process."""
    use_hivemind_log_handler("nowhere")
    logging.getLogger("hivemind").setLevel(logging.ERROR)
    logging.addLevelName(logging.WARNING, "WARNING")
    logging.getLogger("multiaddr").setLevel(logging.INFO)  # py-multiaddr: a dozen debug lines per address


def require_free(address: str) -> None:
    """Raises SwarmError if p2pd would share the port with another process."""
    if why := port_fault(address):
        raise SwarmError(why)


def make_socket_folder() -> str:
    """A folder that only this user can enter, for the sockets between us and p2pd.

    Not in $TMPDIR: the path of a Unix socket has at most 107 characters. What a killed one left is swept up
    by the next: where `hold_folder` had locked it and nobody holds the lock. A pid would not tell: the owner
    may live in another pid namespace, with the same /tmp.
    """
    for left in glob.glob("/tmp/tapestry-*-*"):
        with contextlib.suppress(OSError):  # another node sweeps too
            if os.stat(left).st_uid == os.getuid() and _is_left(left):
                shutil.rmtree(left, ignore_errors=True)
    return tempfile.mkdtemp(prefix=f"tapestry-{os.getpid()}-", dir="/tmp")


@contextlib.contextmanager
def hold_folder(folder: str) -> Iterator[None]:
    """Lock it until the end of the context, or of this process.

    The file in it for whoever sweeps: that lock appears held, or not at all. The folder itself for
    systemd-tmpfiles, which on many systems deletes what has lain in /tmp for ten days. It spares sockets that
    somebody listens on, but not those of a service with PrivateTmp, whose paths are others to it; a locked
    folder, and all in it, it leaves alone: tmpfiles.d(5).
    """
    path = os.path.join(folder, _LOCK)
    with _locked(path + ".new", os.O_RDWR | os.O_CREAT), contextlib.ExitStack() as held:
        os.rename(path + ".new", path)
        try:
            held.enter_context(_locked(folder, os.O_RDONLY | os.O_DIRECTORY))
        except OSError as error:
            _log.warning(
                "folder=%s cannot be locked: %s; if something here deletes old files in /tmp, let it leave "
                "/tmp/tapestry-* alone",
                folder,
                error.strerror,
            )
        yield


@contextlib.contextmanager
def _locked(path: str, flags: int) -> Iterator[None]:
    """Raises OSError."""
    descriptor = os.open(path, flags | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _is_left(folder: str) -> bool:
    """Whether its owner is gone for certain."""
    descriptor = os.open(os.path.join(folder, _LOCK), os.O_RDWR | os.O_CLOEXEC)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    else:
        return True
    finally:
        os.close(descriptor)


async def launch_p2pd(
    config: SwarmConfig, folder: str, guard: Guard, cleanup: contextlib.AsyncExitStack
) -> P2P:
    made: list[_P2pd] = []

    class Launched(_P2pd):
        _UNIX_SOCKET_PREFIX = f"/unix{folder}/"

        def __init__(self) -> None:  # create() keeps to itself a daemon whose start then fails
            super().__init__()
            made.append(self)
            cleanup.push_async_callback(_stop_p2pd, self)

    Launched.guard, Launched.config = guard, config

    creating = asyncio.ensure_future(
        Launched.create(
            identity_path=os.fspath(config.identity_path),
            host_maddrs=config.listen,
            announce_maddrs=config.announce or None,
            startup_timeout=config.startup_timeout_s,
            use_relay=config.use_relay,
            # So that p2pd serves dial-backs: what it finds out by itself of its reach takes it minutes, and
            # needs peers with public addresses.
            force_reachability="public",
            nat_port_map=config.nat_port_map,
            check_if_identity_free=False,
        )
    )
    try:
        return await asyncio.shield(creating)
    except asyncio.CancelledError:
        # A process that is just being started has to be there before it can be ended.
        while not creating.done() and not (made and made[0]._child is not None):  # noqa: ASYNC110
            await asyncio.sleep(SPAWN_POLL_S)  # hivemind sets it and tells nobody
        creating.cancel()
        await asyncio.wait([creating])
        raise
    except P2PDaemonError as error:
        raise SwarmError(f"p2pd did not start: {error}") from error


async def _stop_p2pd(p2p: P2P) -> None:
    try:
        async with asyncio.timeout(STOP_TIMEOUT_S):
            await p2p.shutdown()
    except TimeoutError:
        p2p._child.kill()
        await p2p._child.wait()
    if p2p._client is not None:  # its tasks were cancelled, or broke when p2pd died: nobody else awaits them
        control = p2p._client.control
        await asyncio.gather(control._read_task, control._write_task, return_exceptions=True)
