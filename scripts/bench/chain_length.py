"""What a long chain costs: the start of a node, its memory, and `tapestry verify`.

    .venv/bin/python -P scripts/bench/chain_length.py start --records 10000,100000,1000000
    .venv/bin/python -P scripts/bench/chain_length.py start --records 10000000 --indexed --folder /20/GB/free
    .venv/bin/python -P scripts/bench/chain_length.py verify --records 1000,4000 --members 64 --signed

It makes a home with so many ordinary records, in the very form in which a node writes them, and takes it away
again. `start` reads it as a node does (the store, then the keeper's chain and the core's) in a process of its
own: first with nothing but chain.jsonl, as a home of an older version is (left out with --indexed, which
makes index and marks as well), then as a node leaves it; and a page of 64 records from the middle of the
chain, as a peer that joins asks for them. A start checks no signature, so by default the records have none
that hold: --signed makes real ones.

    first      the start with nothing but chain.jsonl
    seconds    until the chain can be asked, imports aside
    memory     resident then, over what the process had before
    page       milliseconds for 64 records from the middle

`verify` reads it as `tapestry verify --no-replay` does. Without --signed every signature is taken to hold:
what is told then is the memory, and the seconds of all but the signatures.
"""

from __future__ import annotations

import argparse
import json
import resource
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from blake3 import blake3
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from tapestry.dht.identity import Identity
from tapestry.node.disk.chain_file import EVERY, MARKS_VERSION
from tapestry.node.disk.files import seal
from tapestry.node.home import Home
from tapestry.node.lineage.crypto import NodeCrypto, ReaderCrypto
from tapestry.node.protocol.canon import canonical, quorum
from tapestry.node.protocol.members import UNIT
from tapestry.node.protocol.place import Place, Standing, genesis_place
from tapestry.node.protocol.places import place_to_dict
from tapestry.node.protocol.record import (
    VERSION,
    Genesis,
    accept_message,
    draw_message,
    found,
    genesis_to_dict,
    seat_message,
)
from tapestry.node.spec.run import MembersSpec, new_spec
from tapestry.node.spec.training import PRESETS

PAGE_RECORDS = 64  # RECORDS_MAX of node/protocol/messages.py
PARAMS = 48_448  # of preset nano
WRITE_BYTES = 1 << 22
LIFE = "1f" * 16  # of every member's disk

Sign = Callable[[int, bytes], str]  # member's number, message


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=["start", "verify", "read", "check"])
    parser.add_argument("--records", default="10000,100000", help="several with commas")
    parser.add_argument("--members", type=int, default=3)
    parser.add_argument("--signed", action="store_true", help="with signatures that hold")
    parser.add_argument("--indexed", action="store_true", help="make index and marks too, of `start`")
    parser.add_argument("--jobs", type=int, default=1, help="of `verify`, with --signed")
    parser.add_argument("--folder", help="where the home is made; default: the temporary folder")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--home", help=argparse.SUPPRESS)  # of `read` and `check`
    options = parser.parse_args()
    if options.what in ("read", "check"):
        told = _read(Path(options.home)) if options.what == "read" else _check(options)
        print(json.dumps(told))
        return 0
    for count in map(int, options.records.split(",")):
        with tempfile.TemporaryDirectory(prefix="tapestry-chain-", dir=options.folder) as folder:
            measured = _measure(options, count, Path(folder) / "home")
        print(json.dumps(measured) if options.json else "  ".join(f"{k}={v}" for k, v in measured.items()))
        sys.stdout.flush()
    return 0


def _measure(options: argparse.Namespace, count: int, home: Path) -> dict[str, Any]:
    began = time.monotonic()
    size_bytes = make(home, count, options.members, options.signed, options.indexed)
    measured: dict[str, Any] = {
        "records": count,
        "members": options.members,
        "chain_MB": round(size_bytes / 1e6),
        "made_s": round(time.monotonic() - began),
    }
    if options.what == "verify":
        flags = ["--signed", "--jobs", str(options.jobs)] if options.signed else []
        return measured | _apart("check", home, *flags)
    if not options.indexed:
        first = _apart("read", home)
        measured |= {"first_s": first["seconds"], "first_MB": first["memory_MB"]}
    measured |= _apart("read", home)
    made = sum(p.stat().st_size for p in (Home(home).chain_index, Home(home).chain_marks) if p.exists())
    return measured | {"index_MB": round(made / 1e6, 1)}


def _apart(what: str, home: Path, *flags: str) -> dict[str, Any]:
    command = [sys.executable, "-P", __file__, what, "--home", str(home), *flags]
    return dict(json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout))


# --- in a process of its own --------------------------------------------------------------------------


def _read(home: Path) -> dict[str, Any]:
    """As a node: the store, the keeper's chain, the core's."""
    from tapestry.node.disk.store import Store
    from tapestry.node.protocol.core import Restored

    before, began = _memory_bytes(), time.monotonic()
    store = Store(Home(home), ReaderCrypto())
    genesis = store.load().genesis
    assert genesis is not None
    keeper, core = store.chain(genesis), store.chain(genesis)
    restored = Restored(core, -1, "", None, ())
    seconds, memory = time.monotonic() - began, _memory_bytes() - before
    began = time.monotonic()
    page = restored.chain.after(core.epoch // 2, PAGE_RECORDS)
    paged = time.monotonic() - began
    assert keeper.head == core.head and len(page) == min(PAGE_RECORDS, core.epoch - core.epoch // 2)
    return {
        "seconds": round(seconds, 2),
        "memory_MB": round(memory / 1e6, 1),
        "page_ms": round(paged * 1e3, 1),
    }


def _check(options: argparse.Namespace) -> dict[str, Any]:
    from tapestry.node.lineage.verify import verify_home

    if not options.signed:
        ReaderCrypto.verify = lambda self, peer, signature, message: True  # type: ignore[method-assign]
    before, began = _memory_bytes(), time.monotonic()
    home = Home(Path(options.home))
    proof = verify_home(home, replay=False, jobs=options.jobs, told=lambda what, done, total: None)
    seconds = time.monotonic() - began
    faults = [str(fault) for fault in proof.faults]
    return {
        "epoch": proof.epoch,
        "signatures": proof.signatures,
        "seconds": round(seconds, 1),
        "cpu_s": round(_cpu_s(), 1),
        "memory_MB": round((_memory_bytes("VmHWM") - before) / 1e6, 1),
        "peak_MB": round(_memory_bytes("VmHWM") / 1e6),
        "faults": faults,
    }


def _cpu_s() -> float:
    """Of this process; of those that check signatures, only what they have used when they have ended."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(one.ru_utime + one.ru_stime for one in used)


def _memory_bytes(of: str = "VmRSS") -> int:
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith(of):
            return int(line.split()[1]) * 1024
    raise AssertionError(of)


# --- a home with a chain ------------------------------------------------------------------------------


def make(path: Path, count: int, members: int, signed: bool, indexed: bool = False) -> int:
    """A home with `count` records; the bytes of its chain."""
    path.mkdir(parents=True)
    home = Home(path)
    identities = [
        Identity(Ed25519PrivateKey.from_private_bytes(blake3(b"member %d" % n).digest()))
        for n in range(members)
    ]
    genesis = _genesis(identities)
    home.genesis.write_bytes(canonical(genesis_to_dict(genesis)) + b"\n")
    ordered = sorted(identities, key=lambda one: one.peer_id)
    founder = ordered.index(identities[0])
    sign: Sign = (lambda n, message: ordered[n].sign(message).hex()) if signed else (lambda n, _: "ab" * 64)
    peers = tuple([one.peer_id for one in ordered])
    index = _Index(home, genesis, peers) if indexed else None
    size = 0
    with home.chain.open("wb", buffering=WRITE_BYTES) as file:
        for epoch, (head, line) in enumerate(_lines(genesis, peers, founder, count, sign), 1):
            size += len(line)
            file.write(line)
            if index is not None:
                index.took(epoch, head, size)
    if index is not None:
        index.close()
    return size


class _Index:
    """chain.index and chain.marks of such a chain, in the form of disk/chain_file.py."""

    def __init__(self, home: Home, genesis: Genesis, peers: tuple[str, ...]) -> None:
        self._peers, self._roll = peers, genesis_place(genesis).roll
        self._tokens = sum(1000 + n for n in range(len(peers)))  # of each record
        self._index = home.chain_index.open("wb", buffering=WRITE_BYTES)
        self._marks = home.chain_marks.open("wb", buffering=WRITE_BYTES)
        self._index.write(struct.pack("<Q32s", 0, bytes.fromhex(genesis.run_id)))
        self._block: list[bytes] = []

    def took(self, epoch: int, head: str, end: int) -> None:
        self._block.append(struct.pack("<Q32s", end, bytes.fromhex(head)))
        if len(self._block) == EVERY:
            standing = Standing(epoch, self._peers, self._roll, (), 0, 0)
            seats = frozenset([(peer, LIFE) for peer in self._peers])
            place = place_to_dict(Place(epoch, head, self._peers, self._roll, standing, seats))
            digest = blake3(b"".join(self._block)).hexdigest()
            mark = {"version": MARKS_VERSION, "end": end, "index": digest, "place": place}
            mark["tokens"] = epoch * self._tokens
            self._marks.write(seal(mark) + b"\n")
            self._index.write(b"".join(self._block))
            self._block.clear()

    def close(self) -> None:
        self._index.write(b"".join(self._block))
        self._index.close()
        self._marks.close()


def _genesis(identities: list[Identity]) -> Genesis:
    founders = [one.peer_id for one in identities]
    spec = replace(new_spec("a long run", PRESETS["nano"]), members=MembersSpec(founders=tuple(founders[1:])))
    text, crypto, charter = spec.canonical().decode(), NodeCrypto(identities[0]), spec.members.charter()
    return found(text, founders[0], "0d" * 32, "5c" * 32, PARAMS, "0" * 32, crypto, charter, founders)


def _lines(
    genesis: Genesis, peers: Sequence[str], founder: int, count: int, sign: Sign
) -> Iterator[tuple[str, bytes]]:
    """Heads and lines of chain.jsonl: every member contributes to every record, and a quorum signs it.

    Written as text, since to make the records of a year by the modules that check them would take hours; that
    it is their very text, each reader compares.
    """
    result, state, head = "e5" * 32, "0d" * 32, genesis.run_id
    for epoch in range(1, count + 1):
        word = seat_message(head, LIFE)
        seats = [sign(n, word) if epoch == 1 else "" for n in range(len(peers))]
        named = ",".join(
            f'["{peer}",{UNIT},"{epoch:056x}{n:08x}","{LIFE}",{1000 + n},"{seats[n]}"]'
            for n, peer in enumerate(peers)
        )
        body = (
            f'{{"agreement":[1000000,1000000,1000000],"behind":[],"changes":[],"epoch":{epoch},"forced":false,'
            f'"members":[{named}],"prev":"{head}","result":"{result}","run_id":"{genesis.run_id}",'
            f'"state_digest":"{state}","version":{VERSION}}}'
        )
        head = blake3(body.encode()).hexdigest()
        signers = [founder] if epoch == 1 else range(quorum(len(peers)))
        votes, draws = (
            ",".join(f'["{peers[n]}","{sign(n, message)}"]' for n in signers)
            for message in (accept_message(head, 0), draw_message(head))
        )
        value = f'{{"ballot":0,"body":{body},"draws":[{draws}],"signatures":[{votes}]}}'.encode()
        yield head, b'{"digest":"%s","value":%s}\n' % (blake3(value).hexdigest().encode(), value)


if __name__ == "__main__":
    sys.exit(main())
