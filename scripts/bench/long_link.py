"""One pair of nodes at the ends of a long, fast line: how much of it they use, and whether a joiner keeps up.

    sudo .venv/bin/python -P scripts/bench/long_link.py streams --rtt 100,200,300 --streams 1,4
    sudo .venv/bin/python -P scripts/bench/long_link.py rounds --rtt 200 --params 10000000
    sudo .venv/bin/python -P scripts/bench/long_link.py joiner --rtt 300

The line is scripts/_line.py: real TCP of two network namespaces, each packet late by half the round trip.
--buffers is how much TCP may have in flight (net.ipv4.tcp_wmem and tcp_rmem): `default` is this machine's
setting, 4 MB of a sender where nobody changed it; `large` is 64 MB, as docs/networks.md advises.

streams   two p2pd, nothing else: --bytes from one to the other over so many streams, timed from the first
          byte to the answer that the last has come; `line` is the share of what it could carry meanwhile.
rounds    scripts/bench_averaging.py's round of two nodes, with all that makes it safe.
joiner    a founder with epochs of a second; a node joins at the other end and must contribute.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE.parent.parent / "tests")]

from _chains import ChainRecord, chain_record  # noqa: E402
from _line import Line  # noqa: E402
from _netns import NetError, parse_link  # noqa: E402
from _run import exit_by_signal, work_folder  # noqa: E402

TRANSPORTS = {"tcp": "tcp/0", "quic": "udp/0/quic-v1"}
PROTOCOL = "/tapestry/bench/1"
LARGE_BYTES = 64 << 20
PIECE_BYTES = 1 << 18
REPEATS = 3
SOLO_S, CATCH_UP_S = 240.0, 120.0  # for a founder to make epochs, and for a joiner to contribute


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=["streams", "rounds", "joiner", "send", "receive"])
    parser.add_argument("--rtt", default="200", help="milliseconds, several with commas")
    parser.add_argument("--link", default="1gbit")
    parser.add_argument("--buffers", default="default,large")
    parser.add_argument("--streams", default="1,2,4,8")
    parser.add_argument("--transport", choices=TRANSPORTS, default="tcp", help="of `streams`")
    parser.add_argument("--bytes", type=int, default=100_000_000)
    parser.add_argument("--params", type=int, default=10_000_000)
    parser.add_argument(
        "--first", action="store_true", help="both ends go before what else runs here (real-time priority)"
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", type=Path, help="(of the peers that this script starts)")
    parser.add_argument("--address", help="(of the peers that this script starts)")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, exit_by_signal)
    if options.what in ("send", "receive"):
        asyncio.run({"send": send, "receive": receive}[options.what](options))
        return 0
    measure = {"streams": streams, "rounds": rounds, "joiner": joiner}[options.what]
    rows: list[dict[str, Any]] = []
    try:
        for rtt_ms in map(float, options.rtt.split(",")):
            for buffers in options.buffers.split(","):
                for row in measure(options, rtt_ms / 1000, buffers):
                    row = {"rtt_ms": rtt_ms, "buffers": buffers, "load": round(os.getloadavg()[0], 1)} | row
                    rows.append(row)
                    print("  ".join(f"{key}={value}" for key, value in row.items()), flush=True)
    except NetError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1) + "\n")
    return 0


@contextlib.contextmanager
def line_of(options: argparse.Namespace, rtt_s: float, buffers: str) -> Iterator[Line]:
    with Line(rtt_s, parse_link(options.link)) as line:
        if buffers == "large":
            line.set(tcp_wmem=f"4096 65536 {LARGE_BYTES}", tcp_rmem=f"4096 131072 {LARGE_BYTES}")
        yield line


# --- streams ------------------------------------------------------------------------------------------


def streams(options: argparse.Namespace, rtt_s: float, buffers: str) -> Iterator[dict[str, Any]]:
    for count in map(int, options.streams.split(",")):
        with line_of(options, rtt_s, buffers) as line, tempfile.TemporaryDirectory() as folder:
            shared = ["--folder", folder, "--streams", str(count), "--bytes", str(options.bytes)]
            shared += ["--transport", options.transport]
            ends = [
                subprocess.Popen(
                    [
                        *line.prefix(i),
                        *(["chrt", "-r", "1"] if options.first else []),
                        sys.executable,
                        "-P",
                        __file__,
                        role,
                        "--address",
                        line.address(i),
                        *shared,
                    ],
                    stdout=subprocess.PIPE,
                    text=True,
                )
                for i, role in enumerate(("receive", "send"))
            ]
            try:
                out, _ = ends[1].communicate(timeout=300)
            finally:
                for end in ends:
                    end.terminate()
                    end.wait()
            times = json.loads(out)
        median_s = statistics.median(times)
        mbit = options.bytes * 8 / median_s / 1e6
        yield {
            "transport": options.transport,
            "streams": count,
            "s": round(median_s, 2),
            "mbit_s": round(mbit),
            "line": f"{mbit * 1e6 / line.link_bps:.0%}",
        }


async def receive(options: argparse.Namespace) -> None:
    async def take(peer: str, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        left = int.from_bytes(await reader.readexactly(8), "big")
        while left:
            left -= len(await reader.read(min(left, 1 << 20)))
        writer.write(b"k")
        await writer.drain()

    swarm = await _swarm(options, "receive")
    await swarm.serve(PROTOCOL, take)
    (options.folder / "address.new").write_text((await swarm.addresses())[0])
    (options.folder / "address.new").rename(options.folder / "address")
    await asyncio.get_running_loop().create_future()


async def send(options: argparse.Namespace) -> None:
    from tapestry.dht.addresses import parse_peer

    swarm = await _swarm(options, "send")
    while not (options.folder / "address").exists():  # noqa: ASYNC110  # another process writes it
        await asyncio.sleep(0.05)
    peer = parse_peer((options.folder / "address").read_text())
    await swarm.connect(peer, 30)
    count = int(options.streams)
    opened = [await swarm.open_stream(peer.peer_id, PROTOCOL, 30) for _ in range(count * (REPEATS + 1))]
    times = []
    for repeat in range(REPEATS + 1):  # the first finds TCP's pace
        used = opened[repeat * count : (repeat + 1) * count]
        began_at = time.monotonic()
        await asyncio.gather(*(_send(*stream, options.bytes // count) for stream in used))
        times.append(time.monotonic() - began_at)
    print(json.dumps(times[1:]), flush=True)
    await swarm.close()


async def _send(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, count: int) -> None:
    writer.write(count.to_bytes(8, "big"))
    piece = bytes(PIECE_BYTES)
    for start in range(0, count, PIECE_BYTES):
        writer.write(piece[: count - start])
        await writer.drain()
    await reader.readexactly(1)
    writer.close()


async def _swarm(options: argparse.Namespace, name: str) -> Any:
    from tapestry.dht.identity import Identity
    from tapestry.dht.p2pd import SwarmConfig
    from tapestry.dht.swarm import Swarm

    key = options.folder / name
    Identity.load_or_create(key)
    listen = (f"/ip4/{options.address}/{TRANSPORTS[options.transport]}",)
    return await Swarm.start(SwarmConfig(identity_path=key, listen=listen, nat_port_map=False))


# --- rounds -------------------------------------------------------------------------------------------


def rounds(options: argparse.Namespace, rtt_s: float, buffers: str) -> Iterator[dict[str, Any]]:
    from bench_averaging import System, default_shard

    with line_of(options, rtt_s, buffers) as line, tempfile.TemporaryDirectory() as folder:
        asked = argparse.Namespace(
            peers=2,
            params=options.params,
            codec="int8-block",
            shard_elements=default_shard(),
            first=options.first,
        )
        with System("tapestry", asked, Path(folder), line) as system:
            system.start()
            for round_ in range(options.rounds + 1):
                system.round(warm_up=round_ == 0)
            report = system.report(line.link_bps)
    # Each sends one half of its vector to the other, and gets the other half's mean: one vector each way.
    exchange_s = report["mean_s"]
    carried = options.params * 8 * 260 / 256
    yield {
        "params": options.params,
        "round_s": round(report["median_s"], 2),
        "mean_s": round(exchange_s, 2),
        "mbit_s": round(carried / exchange_s / 1e6),
        "line": f"{carried / exchange_s / line.link_bps:.0%}",
        "states": report["states"],
    }


# --- a joiner -----------------------------------------------------------------------------------------


def joiner(options: argparse.Namespace, rtt_s: float, buffers: str) -> Iterator[dict[str, Any]]:
    from e2e.harness import Node, init

    with (
        line_of(options, rtt_s, buffers) as line,
        work_folder(None, "tapestry-long-") as folder,
        contextlib.ExitStack() as stack,
    ):
        founder, late = (
            Node(folder / f"n{i}", data=f"stdlib:{i + 1}/2", prefix=line.prefix(i), address=line.address(i))
            for i in range(2)
        )
        stack.callback(founder.end)
        stack.callback(late.end)
        init(founder.home, is_open=True)
        founder.start().wait_ready()
        founder.wait_epoch(8, SOLO_S)
        late.home.mkdir()
        (late.home / "node.toml").write_text("threads = 1\n")
        began_at = time.monotonic()
        late.start("--peer", founder.address).wait_ready()
        joined_s = time.monotonic() - began_at
        peer_id = late.json()["peer_id"]
        late.wait("contribution of the joiner", lambda: _contributions(founder.home, peer_id), CATCH_UP_S)
        first_s = time.monotonic() - began_at
        before = _epochs(founder.home)
        time.sleep(30.0)
        made = _epochs(founder.home) - before
        done = _contributions(founder.home, peer_id)
        founder.stop(), late.stop()
        yield {
            "joined_s": round(joined_s, 1),
            "first_contribution_s": round(first_s, 1),
            "epochs_after": made,
            "contributed": done,
            "epoch_s": round(30.0 / max(made, 1), 2),
        }


def _records(home: Path) -> list[ChainRecord]:
    return [chain_record(line) for line in (home / "chain.jsonl").read_bytes().split(b"\n")[:-1]]


def _epochs(home: Path) -> int:
    return len(_records(home))


def _contributions(home: Path, peer_id: str) -> int:
    """In how many records it is a contributor."""
    return sum(peer_id in record.contributors for record in _records(home))


if __name__ == "__main__":
    sys.exit(main())
