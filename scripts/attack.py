"""What hostile processes can do to real nodes: strangers at the door, and members that lie.

    .venv/bin/python -P scripts/attack.py NAME... [--members N] [--seconds 20] [--json FILE] [--keep DIR]
        of strangers: [--repeat 2] [--strength 200] [--slower-max 0.10] [--open] [--nice 19]
        of members: [--alone FILE] [--no-alone]
    .venv/bin/python -P scripts/attack.py list

NAME is an attack, `strangers` or `liars` for all of a kind. Members of the model `nano` run on loopback.

**Strangers.** Members (2 unless told otherwise) have their default settings. Who attacks is none, and has no
link to one: what it says on members' streams is refused at the door. With `--open` the run is open, so that
it has a link, and is heard; `list` marks the attacks that are worth trying there too. Quiet times and times
under attack alternate; hostile processes attack the first member. They share this machine's cores, so they
have a low priority, and in the quiet times runs `busy` in their place, a process of the same priority that
reaches nobody: what it takes from a round is no attack's doing. Printed: the median round in either, how
much slower it was, what of a core the member's daemon took (which says what an attack costs it also where
others use the machine; give --nice 0 there, or the attack gets no time), its memory, whom it turned away and
what it refused. Exit 1 if a round was slower than --slower-max, a member ended, its memory grew by more than
MEMORY_MAX, or its log has a traceback.

**Members.** Of four, the last is a real node in whose process scripts/liars changes the product. Each file of
that folder is an attack, and says what it promises. Printed: whether the honest members are at one head and
digest, how much slower a round was than before the lie, the loss beside a run without the liar, what honest
members refused, who was proven to lie and removed. Exit 1 if the promise does not hold, the honest members do
not go on at one head, or one of them is accused, ends, or has a traceback.

A stranger's attack is one function of this file: `async def name(target)` under `@attack("what it does")`. It
runs until it is cancelled, in a process of its own.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import hashlib
import json
import math
import os
import random
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TypeVar

sys.path.insert(0, str(Path(__file__).resolve().parent))

import psutil
from _liars import attacked_by_member, read_alone, write_alone
from _liars import say as say_seen
from _members import (
    Node,
    ended_or_broken,
    founder_in,
    in_words,
    member_in,
    refusals,
    rounds_s,
    slower,
    window,
)
from _nodes import end_with_parent
from _run import exit_by_signal, work_folder
from liars.registry import MODULES, what
from liars.seen import Seen

WAIT_S = 120.0
MEMORY_MAX = 100 << 20  # Guess: what a member may grow under attack
SETTLE_S = 2.0
Answer = TypeVar("Answer")

BEGUN, BUSY = "begun", "busy"


@dataclass(frozen=True, slots=True)
class Target:
    """The member under attack, as anybody can know it who was told its address."""

    address: str  # /ip4/.../p2p/...
    run_id: str
    http: str
    strength: int  # connections, or whatever an attack has many of
    folder: Path  # of the hostile process: identities and sockets

    @property
    def endpoint(self) -> tuple[str, int]:
        host, port = self.http.removeprefix("http://").split(":")
        return host, int(port)

    def begin(self) -> None:
        """Said by an attack when it begins: what comes before is the start of its process."""
        (self.folder / BEGUN).touch()

    @property
    def p2p_port(self) -> int:
        return int(self.address.split("/tcp/")[1].split("/")[0])

    @property
    def peer_id(self) -> str:
        return self.address.rsplit("/", 1)[1]


Attack = Callable[[Target], Awaitable[None]]
ATTACKS: dict[str, tuple[str, Attack]] = {}
LINK = " (try --open too)"  # of an attack that is heard only by who has a link with the attacker


def attack(what: str, heard: str = "") -> Callable[[Attack], Attack]:
    """Names an attack; its function's name is how it is called. `heard`: LINK, where a link matters."""

    def add(function: Attack) -> Attack:
        ATTACKS[function.__name__.replace("_", "-")] = (what + heard, function)
        return function

    return add


# --- at the endpoint --------------------------------------------------------------------------------


@attack("idle connections to the endpoint, opened again when they are closed")
async def http_idle(target: Target) -> None:
    await _many(target, lambda i: _held(target.endpoint, b""))


@attack("requests to the endpoint that never end")
async def http_slow(target: Target) -> None:
    async def drip(writer: asyncio.StreamWriter) -> None:
        while True:
            writer.write(b"X-Slow: 1\r\n")
            await writer.drain()
            await asyncio.sleep(0.2)

    await _many(
        target, lambda i: _held(target.endpoint, b"GET /status HTTP/1.1\r\nHost: localhost\r\n", drip)
    )


@attack("requests to the endpoint with headers and bodies of megabytes, packed ones too")
async def http_huge(target: Target) -> None:
    head = b"POST /status HTTP/1.1\r\nHost: localhost\r\nContent-Encoding: gzip\r\n"
    bodies = (
        head + b"Content-Length: 1000000000\r\n\r\n" + os.urandom(1 << 20),
        b"GET /" + b"a" * (1 << 20) + b" HTTP/1.1\r\nHost: localhost\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: localhost\r\n" + b"X: y\r\n" * (1 << 16),
    )
    await _many(target, lambda i: _held(target.endpoint, bodies[i % 3]))


@attack("300 scrapes of /metrics a second, each on a connection of its own")
async def http_scrapes(target: Target) -> None:
    async def one() -> None:
        with contextlib.suppress(OSError, TimeoutError):
            async with asyncio.timeout(10):
                reader, writer = await asyncio.open_connection(*target.endpoint)
                writer.write(b"GET /metrics HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
                await reader.read(-1)
                writer.close()

    target.begin()
    async with asyncio.TaskGroup() as tasks:
        while True:
            tasks.create_task(one())
            await asyncio.sleep(1 / 300)


# --- at the peers' door -----------------------------------------------------------------------------


@attack("TCP connections to the peers' port that say nothing or nonsense, opened again when they are closed")
async def connections(target: Target) -> None:
    words = (b"", b"\x13/multistream/1.0.0\n", os.urandom(4096))
    await _many(target, lambda i: _held(("127.0.0.1", target.p2p_port), words[i % 3]))


@attack("streams of every protocol, opened and closed without end")
async def streams(target: Target) -> None:
    async with _stranger(target) as stranger:
        await _many(target, lambda i: stranger.opened_and_closed(i), width=16)


@attack("valid STATUS messages as fast as they go", LINK)
async def messages(target: Target) -> None:
    from tapestry.node.net.vocabulary import encode_message
    from tapestry.node.protocol.messages import Stage, Status

    status = Status(0, "ab" * 32, 0, "training", Stage.AWAY, 0, 0, ())
    async with _stranger(target) as stranger:
        await stranger.pour("control", _framed(encode_message(status)) * 500)


@attack("questions for records, whose answers are many times as long, none of them taken", LINK)
async def records(target: Target) -> None:
    from tapestry.node.net.vocabulary import encode_message
    from tapestry.node.protocol.messages import GetRecords

    ask = _framed(encode_message(GetRecords(((0, target.run_id),))))
    async with _stranger(target) as stranger:
        await stranger.pour("control", ask * 500)


@attack("junk on the bulk stream, as fast as it goes", LINK)
async def junk(target: Target) -> None:
    async with _stranger(target) as stranger:
        await stranger.pour("bulk", _framed(b"\x93\xa5shard\x00\x00", os.urandom(1 << 16)) * 8)


@attack("streams whose answers are asked for and never read", LINK)
async def slow_readers(target: Target) -> None:
    import msgpack

    ask = _framed(msgpack.packb({"ask": "checkpoint", "epoch_max": 2**40}))
    async with _stranger(target) as stranger:

        async def one() -> None:
            _, writer = await stranger.open("state")
            writer.write(ask * 100)
            await asyncio.sleep(30.0)
            writer.close()

        await _many(target, lambda i: one(), width=16)


@attack("applications for membership without end, each under another name")
async def applications(target: Target) -> None:
    import msgpack

    names = (f"name {number}" for number in range(10**9))
    async with _stranger(target) as stranger:

        async def one() -> None:
            reader, writer = await stranger.open("admission")
            for _ in range(100):
                writer.write(
                    _framed(msgpack.packb({"ask": "admission", "name": next(names), "admission": None}))
                )
            while await reader.read(1 << 16):
                pass
            writer.close()

        await _many(target, lambda i: one(), width=16)


@attack("calls to the DHT with 20,000 equal keys, ids out of range, forged dictionaries")
async def dht_calls(target: Target) -> None:
    from hivemind.dht.routing import DHTID
    from hivemind.proto import dht_pb2

    from tapestry.dht.directory import presence_key

    key = DHTID.generate(source=presence_key(target.run_id)).to_bytes()
    async with _stranger(target) as stranger:
        find = dht_pb2.FindRequest(keys=[key] * 20_000, peer=dht_pb2.NodeInfo(node_id=key))
        ping = dht_pb2.PingRequest(peer=dht_pb2.NodeInfo(node_id=b"\xff" * 40), validate=True)
        small = dht_pb2.FindRequest(keys=[key])
        calls = (("rpc_find", find), ("rpc_ping", ping), ("rpc_find", small))

        async def one(index: int) -> None:
            name, request = calls[index % 3]
            await stranger.call(name, request, dht_pb2)

        await _many(target, one, width=16)


@attack("pings of the DHT under ids without number: an eclipse")
async def pings(target: Target) -> None:
    from hivemind.proto import dht_pb2

    async with _stranger(target) as stranger:

        async def one() -> None:
            node = dht_pb2.NodeInfo(node_id=random.randbytes(20))
            await stranger.call("rpc_ping", dht_pb2.PingRequest(peer=node), dht_pb2)

        await _many(target, lambda i: one(), width=16)


@attack("presence of 300 made-up peers that name a third party's address")
async def presence(target: Target) -> None:
    from tapestry.dht.identity import Identity
    from tapestry.dht.presence import Presence, encode

    async with _stranger(target) as stranger:
        await stranger.swarm.join_dht(target.run_id, [stranger.member])
        made = [Identity.load_or_create(target.folder / f"made-up-{i}") for i in range(300)]
        target.begin()
        while True:
            now = time.time()
            for one in made:
                said = Presence(
                    target.run_id,
                    one.peer_id,
                    1,
                    "cd" * 32,
                    "training",
                    (f"/ip4/127.0.0.1/tcp/9/p2p/{one.peer_id}",),
                    now,
                    now + 500.0,
                )
                await stranger.store(one.peer_id, encode(said, one.sign), said.expires_at)
            await asyncio.sleep(1.0)


# --- what attacks are made of -----------------------------------------------------------------------


async def _many(target: Target, one: Callable[[int], Awaitable[None]], width: int | None = None) -> None:
    """So many at a time, each again when it has ended."""
    target.begin()

    async def again(index: int) -> None:
        while True:
            with contextlib.suppress(Exception):
                await one(index)
            await asyncio.sleep(0.01)

    await asyncio.gather(*(again(index) for index in range(width or target.strength)))


async def _held(
    where: tuple[str, int],
    first: bytes,
    then: Callable[[asyncio.StreamWriter], Awaitable[None]] | None = None,
) -> None:
    """A connection that is held until the other side ends it."""
    reader, writer = await asyncio.open_connection(*where)
    try:
        writer.write(first)
        talking = asyncio.ensure_future(then(writer)) if then else None
        try:
            while await reader.read(1 << 16):
                pass
        finally:
            if talking is not None:
                talking.cancel()
    finally:
        writer.close()


def _framed(header: bytes, payload: bytes = b"") -> bytes:
    from tapestry.node.net.wire import frame_parts

    return b"".join(bytes(part) for part in frame_parts(header, [payload] if payload else ()))


class _Stranger:
    """A libp2p peer that is no member."""

    def __init__(self, swarm: object, target: Target) -> None:
        from tapestry.dht.addresses import parse_peer
        from tapestry.node.net.admission import admission_protocol
        from tapestry.node.net.join import GENESIS_PROTOCOL, state_protocol

        self.swarm, self.target, self.member = swarm, target, parse_peer(target.address)
        run = f"/tapestry/{target.run_id}"
        self.protocols = {
            "control": f"{run}/control/1",
            "bulk": f"{run}/bulk/1",
            "peers": f"{run}/peers/1",
            "state": state_protocol(target.run_id),
            "genesis": GENESIS_PROTOCOL,
            "admission": admission_protocol(target.run_id),
        }

    async def open(self, name: str) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        await self.swarm.connect(self.member, 5.0)
        return await self.swarm.open_stream(self.target.peer_id, self.protocols[name], 5.0)

    async def opened_and_closed(self, index: int) -> None:
        names = list(self.protocols)
        _, writer = await self.open(names[index % len(names)])
        writer.close()

    async def pour(self, name: str, data: bytes) -> None:
        """This, again and again, on as few streams as it takes."""
        self.target.begin()
        while True:
            with contextlib.suppress(Exception):
                _, writer = await self.open(name)
                try:
                    while True:
                        writer.write(data)
                        await writer.drain()
                finally:
                    writer.close()
            await asyncio.sleep(0.1)

    async def call(self, name: str, request: object, dht_pb2: object) -> None:
        from hivemind.p2p import PeerID

        kind = getattr(dht_pb2, {"rpc_find": "FindResponse", "rpc_ping": "PingResponse"}[name])
        peer = PeerID.from_base58(self.target.peer_id)
        await asyncio.wait_for(
            self.swarm._p2p.call_protobuf_handler(peer, f"DHTProtocol.{name}", request, kind), 5.0
        )

    async def store(self, subkey: str, record: bytes, expires_at: float) -> None:
        from hivemind.dht.routing import DHTID
        from hivemind.p2p import PeerID
        from hivemind.utils import MSGPackSerializer

        from tapestry.dht.directory import presence_key

        key = DHTID.generate(source=presence_key(self.target.run_id))
        peer, value = PeerID.from_base58(self.target.peer_id), MSGPackSerializer.dumps(record)
        await self.swarm._dht.protocol.call_store(peer, [key], [value], [expires_at], [subkey])


def _group_like_process(pid: int) -> None:
    """Gives the session of `pid` the priority of this process: where the kernel groups processes by session
    (sched(7), autogroup), niceness counts within one only."""
    with contextlib.suppress(OSError):  # it does not group
        Path(f"/proc/{pid}/autogroup").write_text(f"{os.nice(0)}")


@contextlib.asynccontextmanager
async def _stranger(target: Target) -> AsyncIterator[_Stranger]:
    from tapestry.dht.identity import Identity
    from tapestry.dht.p2pd import SwarmConfig
    from tapestry.dht.swarm import Swarm

    key = target.folder / "stranger.key"
    Identity.load_or_create(key)
    swarm = await Swarm.start(SwarmConfig(key, ("/ip4/127.0.0.1/tcp/0",), nat_port_map=False))
    for child in psutil.Process().children():
        _group_like_process(child.pid)  # p2pd has a session of its own
    try:
        stranger = _Stranger(swarm, target)
        for name in ("control", "bulk"):
            await swarm.serve(stranger.protocols[name], _swallow)
        await swarm.connect(stranger.member, 10.0)
        yield stranger
    finally:
        await swarm.close()


async def _swallow(peer: str, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    while await reader.read(1 << 16):
        pass


async def busy(target: Target) -> None:
    """No attack: a process that takes what the cores leave it, in the quiet times."""
    target.begin()
    while True:
        hashlib.sha256(bytes(1 << 16))
        await asyncio.sleep(0)


def hostile(name: str, about: str, niceness: int) -> None:
    """The process that attacks, until SIGTERM."""
    os.nice(niceness)
    _group_like_process(os.getpid())
    table = json.loads(about)
    target = Target(**{**table, "folder": Path(table["folder"])})

    async def main() -> None:
        running = asyncio.ensure_future(busy(target) if name == BUSY else ATTACKS[name][1](target))
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, running.cancel)
        with contextlib.suppress(asyncio.CancelledError):
            await running

    asyncio.run(main())


# --- the measurement --------------------------------------------------------------------------------


@dataclass(slots=True)
class Outcome:
    """What an attack did."""

    name: str
    quiet_round_s: float  # median
    attacked_round_s: float
    slower: float  # a share of the round; negative: faster
    grown_mb: float
    banned: int
    refused: dict[str, int]
    faults: list[str]
    rounds: tuple[int, int] = (0, 0)  # that were measured, of either kind
    cores: tuple[float, float] = (0.0, 0.0)  # that the daemon and its p2pd took, of either kind


@contextlib.contextmanager
def attacked(name: str, node: Node, folder: Path, options: argparse.Namespace) -> Iterator[None]:
    """A hostile process attacks `node` inside: it has begun."""
    about = node.json()
    folder.mkdir(exist_ok=True)
    begun = folder / BEGUN
    begun.unlink(missing_ok=True)
    target = Target(node.address, about["run_id"], about["http"], options.strength, folder)
    table = json.dumps({**asdict(target), "folder": str(folder)})
    with (folder / "hostile.log").open("ab") as log:
        command = [sys.executable, "-P", __file__, "--hostile", name, "--about", table]
        process = subprocess.Popen(
            [*command, "--nice", str(options.nice)],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            preexec_fn=end_with_parent,
            start_new_session=True,  # whose priority is its own, where the kernel groups by sessions
        )
    try:
        node.wait(f"beginning of {name}", begun.exists, WAIT_S)
        yield
    finally:
        process.terminate()
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def measured(name: str, members: list[Node], folder: Path, options: argparse.Namespace) -> Outcome:
    """Quiet, attacked, quiet, attacked ..."""
    node = members[0]
    process = psutil.Process(node.pid)
    quiet: list[float] = []
    under: list[float] = []
    cores: tuple[list[float], list[float]] = ([], [])
    banned = 0
    before = process.memory_info().rss
    most = before

    def watch(rounds: list[float], cores: list[float]) -> None:
        used_s = cpu_s(node)
        began, ended = window(node, options.seconds)
        rounds += rounds_s(node, began, ended)
        cores.append((cpu_s(node) - used_s) / (ended - began))

    for _ in range(options.repeat):
        with attacked(BUSY, node, folder, options):
            watch(quiet, cores[0])
        with attacked(name, node, folder, options):
            watch(under, cores[1])
            most = max(most, process.memory_info().rss)
            banned = max(banned, banned_by(node))
        time.sleep(SETTLE_S)
    calm_s, busy_s = (statistics.median(some) if some else math.nan for some in (quiet, under))
    outcome = Outcome(name, calm_s, busy_s, slower(quiet, under), (most - before) / 1e6, banned, {}, [])
    outcome.rounds = len(quiet), len(under)
    outcome.cores = statistics.median(cores[0]), statistics.median(cores[1])
    outcome.refused = answered(node, lambda: refusals(members[:1]))
    outcome.faults = faults_of(outcome, members, options.slower_max)
    return outcome


def answered(node: Node, ask: Callable[[], Answer]) -> Answer:
    """What `ask` gets of the endpoint: one under attack may turn us away too, and is asked again."""
    answers: list[Answer] = []

    def asked() -> bool:
        answers.append(ask())
        return True

    node.wait("answer", asked, WAIT_S)
    return answers[0]


def banned_by(node: Node) -> int:
    """How many peers."""
    peers = answered(node, lambda: json.loads(node.get("/peers")))
    return sum(peer["phase"] == "banned" for peer in peers)


def cpu_s(node: Node) -> float:
    """Of the daemon and its p2pd, since their start: not of the trainer, whose work is no stranger's."""
    p2pd = node.p2pd()
    processes = [psutil.Process(node.pid), *([p2pd] if p2pd is not None else [])]
    times = [process.cpu_times() for process in processes]
    return sum(one.user + one.system for one in times)


def faults_of(outcome: Outcome, members: list[Node], slower_max: float) -> list[str]:
    faults = ended_or_broken(members)
    if not outcome.slower <= slower_max:
        faults.append(f"a round was {outcome.slower:.0%} slower, at most {slower_max:.0%} is wanted")
    if outcome.grown_mb > MEMORY_MAX / 1e6:
        faults.append(f"the member grew by {outcome.grown_mb:.0f} MB")
    return faults


def run(names: list[str], options: argparse.Namespace, place: Path) -> list[Outcome]:
    """Attacks by strangers, all on the same members."""
    outcomes, count = [], options.members or 2
    with contextlib.ExitStack() as stack:
        founder = founder_in(place, count, is_open=options.open)
        members = [stack.enter_context(founder).wait_ready()]
        for index in range(1, count):
            line = founder.address if options.open else founder.invitation()
            node = member_in(place, index, count, line)
            members.append(stack.enter_context(node).wait_ready())
        for node in members:
            node.wait_epoch(3, WAIT_S)
            node.wait("a run of members", lambda node=node: node.status()["members"] == count, WAIT_S)
        for name in names:
            outcomes.append(measured(name, members, place / f"hostile-{name}", options))
            say(outcomes[-1])
    return outcomes


def say(outcome: Outcome) -> None:
    lengths = f"a round {outcome.quiet_round_s:.2f} -> {outcome.attacked_round_s:.2f} s"
    print(
        f"{outcome.name:14} {lengths} ({outcome.slower:+.1%}; medians of {outcome.rounds[0]} and "
        f"{outcome.rounds[1]}), {outcome.cores[0]:.0%} -> {outcome.cores[1]:.0%} of a core, "
        f"memory {outcome.grown_mb:+.0f} MB, banned {outcome.banned}, "
        f"refused so far: {in_words(outcome.refused)}",
        flush=True,
    )
    for fault in outcome.faults:
        print(f"  FAULT: {fault}", flush=True)


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help="attacks, `strangers`, `liars`, or `list`")
    parser.add_argument("--members", type=int, help="2 for strangers, 4 with a liar")
    parser.add_argument("--seconds", type=float, default=20.0, help="of each quiet time and each attack")
    parser.add_argument("--repeat", type=int, default=2)
    parser.add_argument("--strength", type=int, default=200, help="hostile connections at once")
    parser.add_argument("--nice", type=int, default=19, help="priority of the hostile process")
    parser.add_argument("--slower-max", type=float, default=0.10)
    parser.add_argument("--open", action="store_true", help="an open run: who attacks has a link")
    parser.add_argument("--no-alone", action="store_true", help="no run without the liar, for its loss")
    parser.add_argument("--alone", type=Path, help="keeps the losses without a liar for the next call")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--keep", type=Path)
    parser.add_argument("--hostile", help=argparse.SUPPRESS)
    parser.add_argument("--about", help=argparse.SUPPRESS)
    options = parser.parse_args()
    kinds = {"strangers": list(ATTACKS), "liars": list(MODULES)}
    options.names = [one for name in options.names for one in kinds.get(name, [name])]
    unknown = [name for name in options.names if name not in (*ATTACKS, *MODULES, "list")]
    if unknown or not (options.names or options.hostile):
        parser.error(f"no attack {unknown[0]!r}" if unknown else "name an attack")
    return options


def main() -> int:
    options = parsed()
    if options.hostile:
        hostile(options.hostile, options.about, options.nice)
        return 0
    if options.names == ["list"]:
        for name, (does, _) in ATTACKS.items():
            print(f"{name:14} a stranger: {does}")
        for name in MODULES:
            print(f"{name:14} a member: {what(name)}")
        return 0
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, exit_by_signal)
    strangers = [name for name in options.names if name in ATTACKS]
    found: list[Outcome | Seen] = []
    with work_folder(options.keep, "tapestry-attack-") as place:
        found += run(strangers, options, place) if strangers else []
        alone = read_alone(options.alone)
        for name in options.names:
            if name in MODULES:
                seen = attacked_by_member(name, options, place, alone)
                say_seen(seen)
                found.append(seen)
                write_alone(options.alone, alone)
    if options.json:
        options.json.write_text(json.dumps([asdict(one) for one in found], indent=1) + "\n")
    return int(any(one.faults for one in found))


if __name__ == "__main__":
    sys.exit(main())
