"""How long a joiner's checkpoint takes from one donor, two and four, whose upload is capped.

    .venv/bin/python -P scripts/bench/joining.py --params 100000000 --donors 1,2,4 --cap 30
    .venv/bin/python -P scripts/bench/joining.py --params 100000000 --donors 4 --caps 60,30,20,10

One process gives and one fetches, over TCP on loopback; each donor has its own budget of --cap MB/s, as
`--max-upload` makes one, of one checkpoint file that they share. No p2pd, no training: what is measured is
node/net/download.py and donor.py.

    bytes' time   of parameters and outer momentum, at all the donors' caps together
    ratio         what it took, by that; verified to the last digest, with the checkpoint synced on the disk
    cpu           seconds of processor time, of the fetching process
    giving        seconds of processor time, of the process of all the donors: what giving costs without p2pd
"""

from __future__ import annotations

import argparse
import asyncio
import json
import logging
import re
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil
import torch
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from tapestry.dht.identity import Identity
from tapestry.node.disk.checkpoints import Checkpoints
from tapestry.node.disk.held import bare_state
from tapestry.node.disk.store import Store
from tapestry.node.home import Home
from tapestry.node.lineage.crypto import NodeCrypto, ReaderCrypto
from tapestry.node.net.donor import Donor
from tapestry.node.net.download import Wanted, fetch_state
from tapestry.node.net.throttle import Throttle, Throttles
from tapestry.node.net.transfer import OpenStream, TransferLimits
from tapestry.node.protocol.canon import canonical
from tapestry.node.protocol.chain import Chain
from tapestry.node.protocol.record import Genesis, found, genesis_from_dict, genesis_to_dict
from tapestry.node.spec.run import new_spec
from tapestry.node.spec.training import PRESETS
from tapestry.node.state.model import ModelState

STALL_S = 30.0
MB = 1e6


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", nargs="?", default="measure", choices=["measure", "give"])
    parser.add_argument("--params", type=int, default=10_000_000)
    parser.add_argument("--donors", default="1,2,4", help="several with commas")
    parser.add_argument("--cap", type=float, default=30.0, help="MB/s of each donor")
    parser.add_argument("--caps", help="MB/s of each, for one number of donors")
    parser.add_argument("--folder", help="where the files lie; default: the temporary folder")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.what == "give":
        asyncio.run(_give(Path(options.folder), [float(cap) for cap in options.caps.split(",")]))
        return 0
    with tempfile.TemporaryDirectory(prefix="tapestry-joining-", dir=options.folder) as folder:
        genesis, state = _make(Path(folder), options.params)
        for count in map(int, options.donors.split(",")):
            caps = options.caps.split(",") if options.caps else [str(options.cap)] * count
            with tempfile.TemporaryDirectory(prefix="joiner-", dir=folder) as joiner:
                print("  ".join(_measure(Path(folder), Path(joiner), genesis, state, caps)), flush=True)
    return 0


def _make(folder: Path, params: int) -> tuple[Genesis, ModelState]:
    """A home with a run of so many parameters and the checkpoint of its state 0; a state to fetch into."""
    home = Home(folder)
    spec = new_spec("a large run", PRESETS["nano"])
    state = bare_state(spec, torch.randn(params), "5c" * 32, folder=folder)
    for buffer in state.buffers.values():
        buffer.normal_()  # else its chunks would be known: zeros, as the holes of the file are
    founder, charter = Identity(Ed25519PrivateKey.generate()), spec.members.charter()
    text, digest, schema = spec.canonical().decode(), state.digest(), state.schema
    genesis = found(text, founder.peer_id, digest, schema, params, "0" * 32, NodeCrypto(founder), charter)
    state.head = genesis.run_id
    home.genesis.write_bytes(canonical(genesis_to_dict(genesis)) + b"\n")
    _checkpoints(home, genesis).save(state, genesis.state_digest)
    return genesis, state


def _checkpoints(home: Home, genesis: Genesis) -> Checkpoints:
    checkpoints = Checkpoints(home.checkpoints, genesis.run_id, 3)
    checkpoints.load()
    return checkpoints


# --- the donors ---------------------------------------------------------------------------------------


async def _give(folder: Path, caps: list[float]) -> None:
    """Until the process is ended; the ports are on the first line of stdout."""
    home, crypto = Home(folder), ReaderCrypto()
    genesis = genesis_from_dict(json.loads(home.genesis.read_bytes()), crypto)
    store = Store(home, crypto)
    servers = []
    for cap in caps:
        limits = TransferLimits(STALL_S, throttles=Throttles(upload=Throttle(cap * MB)))
        donor = Donor(genesis, store, _checkpoints(home, genesis), limits, lambda direction, count: None)
        servers.append(await asyncio.start_server(_serving(donor), "127.0.0.1", 0))
    print(json.dumps([server.sockets[0].getsockname()[1] for server in servers]), flush=True)
    await asyncio.Event().wait()


def _serving(donor: Donor):  # type: ignore[no-untyped-def]
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            await donor.serve(reader, writer)
        except Exception as error:  # a joiner that has all it wants ends its streams
            logging.getLogger("tapestry").debug("a stream ended: %s", error)
        finally:
            writer.close()

    return serve


# --- the joiner ---------------------------------------------------------------------------------------


def _measure(folder: Path, joiner: Path, genesis: Genesis, state: ModelState, caps: list[str]) -> list[str]:
    command = [sys.executable, "-P", __file__, "give", "--folder", str(folder), "--caps", ",".join(caps)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as giving:
        try:
            assert giving.stdout is not None
            ports = json.loads(giving.stdout.readline())
            shares = _Shares()
            logging.getLogger("tapestry.transfer").addHandler(shares)
            logging.getLogger("tapestry.transfer").setLevel(logging.INFO)
            cpu, began = _cpu_s(), time.monotonic()
            gave = psutil.Process(giving.pid).cpu_times()
            asyncio.run(_fetch(ports, genesis, state, joiner))
            took_s, cpu_s = time.monotonic() - began, _cpu_s() - cpu
            given = psutil.Process(giving.pid).cpu_times()
            giving_s = given.user + given.system - gave.user - gave.system
        finally:
            giving.terminate()
    bytes_s = state.size_bytes / (MB * sum(map(float, caps)))
    return [
        f"donors={len(caps)}",
        f"caps_MB_s={','.join(caps)}",
        f"MB={state.size_bytes / MB:.0f}",
        f"took_s={took_s:.2f}",
        f"bytes_time_s={bytes_s:.2f}",
        f"ratio={took_s / bytes_s:.3f}",
        f"cpu_s={cpu_s:.1f}",
        f"giving_s={giving_s:.1f}",
        f"chunks={shares.told}",
    ]


async def _fetch(ports: list[int], genesis: Genesis, state: ModelState, joiner: Path) -> None:
    def opener(port: int) -> OpenStream:
        return lambda: asyncio.open_connection("127.0.0.1", port)

    def on_fault(donor: str, error: Exception) -> None:
        raise AssertionError(f"{donor}: {error}")

    donors = {f"donor{number}": opener(port) for number, port in enumerate(ports)}
    wanted = Wanted(0, Chain(genesis), state, _checkpoints(Home(joiner), genesis))
    await fetch_state(donors, wanted, TransferLimits(STALL_S), lambda direction, count: None, on_fault)


class _Shares(logging.Handler):
    """What each donor gave, as the log says it."""

    told = ""

    def emit(self, record: logging.LogRecord) -> None:
        self.told = ",".join(re.findall(r":(\d+)", record.getMessage()))


def _cpu_s() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


if __name__ == "__main__":
    sys.exit(main())
