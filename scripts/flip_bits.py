"""Random bits of a home or an export are flipped, one at a time, and `tapestry verify` must name each file.

    scripts/flip_bits.py [PATH] [--count 1000] [--seed 0]

It works on a copy. Of a home it flips what belongs to the run: genesis (with the spec), chain, updates,
checkpoints, vote, what lost at forks, the pinned files of the base, descriptions of data, data events, the
egress ledger, accusations, and the derivatives with their bases; of an export every file. Exit 1 if one was
missed.

Without PATH it makes a home that has all of these, some epochs of two members on a small base, a derivative
with own tokens, its rebase, a branch that lost at a fork, both kinds of proven lies, a ledger of two files
and what a broken download left, and takes what `tapestry exit` makes of it. A flip takes a file at random,
small ones as often as large ones.
"""

from __future__ import annotations

import argparse
import dataclasses
import random
import shutil
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

import torch
from homes import MadeHome, base_spec, make_home

from tapestry.node.daemon.averaging import Averaging
from tapestry.node.disk.accusations import Accusation, keep
from tapestry.node.disk.base import pinned
from tapestry.node.disk.double_rosters import DoubleRoster
from tapestry.node.disk.double_votes import DoubleVote
from tapestry.node.disk.files import atomic_write, seal
from tapestry.node.disk.linked import LinkedFile
from tapestry.node.lineage.crypto import NodeCrypto, ReaderCrypto
from tapestry.node.lineage.egress import Left, Started
from tapestry.node.lineage.follow import read_genesis
from tapestry.node.lineage.leave import leave
from tapestry.node.lineage.verify import verify
from tapestry.node.net.descriptions import Descriptions
from tapestry.node.protocol.audit import inputs_digest, mean_message
from tapestry.node.protocol.equivocation import Equivocation
from tapestry.node.protocol.messages import Receipt
from tapestry.node.protocol.receipts import TwoRosters, roster_message
from tapestry.node.protocol.record import Member, accept_message, head_of
from tapestry.node.sovereign import build
from tapestry.node.sovereign.derivative import Transplant
from tapestry.node.sovereign.recipe import Recipe
from tapestry.node.spec.declared import append, parse_declaration
from tapestry.node.spec.training import TransformersSpec
from tapestry.node.state.means import mean_of


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("path", type=Path, nargs="?")
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="tapestry-flips-") as folder:
        copy = Path(folder) / "copy"
        path = options.path or _home_of_everything(Path(folder) / "made")
        shutil.copytree(path, copy, ignore=shutil.ignore_patterns("state", "cache", ".cache"))
        return _flip(copy, options.count, random.Random(options.seed))


def _flip(copy: Path, count: int, rng: random.Random) -> int:
    files = _files(copy)
    if not verify(copy, told=_quiet).holds:
        print("it does not hold as it is: run tapestry verify")
        return 1
    began_s, missed, told = time.monotonic(), 0, dict.fromkeys(files, 0)
    for _ in range(count):
        path = rng.choice(files)
        place, bit = rng.randrange(path.stat().st_size), 1 << rng.randrange(8)
        _turn(path, place, bit)
        named = {fault.file for fault in verify(copy, told=_quiet).faults}
        _turn(path, place, bit)
        name = path.relative_to(copy).as_posix()
        told[path] += 1
        if name not in named:
            missed += 1
            print(f"MISSED {name} byte {place} bit {bit}: {sorted(named) or 'nothing was found'}")
    for path in files:
        print(f"{told[path]:6} flips in {path.relative_to(copy)}")
    print(f"{count} flips, {missed} missed, {(time.monotonic() - began_s) / count * 1e3:.0f} ms each")
    return int(missed > 0)


def _files(copy: Path) -> list[Path]:
    if not (copy / "genesis.json").exists():
        return [path for path in sorted(copy.rglob("*")) if path.is_file() and path.stat().st_size]
    _, spec = read_genesis(copy / "genesis.json", ReaderCrypto())
    base = {file.name for file in pinned(spec.model)} if isinstance(spec.model, TransformersSpec) else set()
    wanted = [copy / "genesis.json", copy / "chain.jsonl", copy / "vote.json"]
    wanted += [
        *sorted((copy / "updates").glob("*.upd")),
        *sorted((copy / "checkpoints").glob("*.safetensors")),
    ]
    wanted += [copy / "base" / name for name in sorted(base)]
    wanted += [
        copy / "descriptions.json",
        *sorted(copy.glob("egress*.jsonl")),
        *sorted(copy.glob("data-ev*")),
    ]
    wanted += [path for path in sorted((copy / "branches").rglob("*")) if path.is_file()]
    wanted += sorted((copy / "accusations").glob("*.accusation"))
    wanted += [path for path in sorted((copy / "derivatives").rglob("*")) if path.name != "lock"]
    return [path for path in wanted if path.is_file() and path.stat().st_size]


# --- a home that has everything -----------------------------------------------------------------------


def _home_of_everything(folder: Path) -> Path:
    """What `tapestry exit` writes of it."""
    folder.mkdir()
    text = folder / "text.txt"
    text.write_text("".join(f"kaffekoppen og sommerfugl er {i % 9}\n" for i in range(900)))
    made = make_home(folder / "home", base_spec(folder / "home", "llama"))
    append(made.home, [parse_declaration("us, CC0-1.0, open", str(text), "derive:*")])
    made.advance(2, checkpoint=True)
    keys = {"steps": 6, "batch_size": 4, "sequence_length": 16, "own_tokens": 2, "rows_share": 0.5}
    build.derive(made.home, "ours", Recipe("cpt", "lora", (str(text),), **keys), None, told=_quiet)  # type: ignore[arg-type]
    made.advance(2, scale=0.005)
    build.rebase(made.home, "ours", None, Transplant(), told=_quiet)
    made.advance(2)
    made.leave_fork(4, 1)
    made.advance(1, checkpoint=True)
    for identity, words in zip(made.identities, ("manual pages", "laws"), strict=True):
        known = Descriptions(made.home.descriptions, made.chain.genesis.run_id, NodeCrypto(identity))
        known.say(identity.peer_id, (words,), 100)
    keep(made.home.accusations, _wrong_mean(made))
    keep(made.home.accusations, _two_votes(made))
    keep(made.home.accusations, _two_rosters(made))
    ledger = LinkedFile(made.home.egress, file_bytes_max=2000)
    for epoch in range(1, 12):
        part = Left("2026-11-29T00:00:00Z", "result", 7, {"peer": 7}, "mean", ((epoch, "ab" * 32),), 0)
        ledger.append([Started("2026-11-29T00:00:00Z", made.chain.genesis.run_id, 0).value(), part.value()])
    ledger.close()
    atomic_write(made.home.vote, seal({"epoch": 5}) + b"\n")
    (made.home.checkpoints / "fetch.part").write_bytes(b"a piece of four donors")
    leave(made.home, folder / "out", _quiet)
    return folder / "out"


def _wrong_mean(made: MadeHome) -> Accusation:
    """Signed by the second member, of the contributions of both."""
    arithmetic, n = made.state.arithmetic, made.state.n
    codec, size = arithmetic.codec, made.spec.compression.shard_elements
    averaging = Averaging(codec, n, size, mean_of(made.spec.mean))
    liar, head, epoch = made.identities[1], made.chain.head, made.chain.epoch
    members, inputs, payloads = [], [], []
    for seed, identity in enumerate(made.identities):
        x = torch.randn(n, generator=torch.Generator().manual_seed(seed))
        taken = averaging.take(
            torch.cat([codec.encode(x[i : i + size]) for i in range(0, n, size)]), copy=False
        )
        name = averaging.commit(identity.peer_id, epoch, taken)
        members.append(Member(identity.peer_id, 1 + seed, name))
        inputs.append((averaging.path(name, 0), bytes(taken[0].numpy())))
        payloads.append(taken[0])
    digest = averaging.mean_digest(0, payloads, [1, 1])
    said = mean_message(head, 0, digest, inputs_digest(tuple(members), NodeCrypto(liar)))
    signature = NodeCrypto(liar).sign(said)
    return Accusation(head, epoch, tuple(members), 0, digest, liar.peer_id, signature, tuple(inputs))


def _two_votes(made: MadeHome) -> DoubleVote:
    """Of the second member, in ballot 3 of the newest round."""
    liar = made.identities[1]
    one = made.chain.records[-1].body
    one = dataclasses.replace(one, members=tuple(dataclasses.replace(m, life="1f" * 16) for m in one.members))
    bodies = (one, dataclasses.replace(one, result="cd" * 32))
    crypto = NodeCrypto(liar)
    a, b = (crypto.sign(accept_message(head_of(body, crypto), 3)) for body in bodies)
    return DoubleVote.of(Equivocation(liar.peer_id, 3, bodies, (a, b)))


def _two_rosters(made: MadeHome) -> DoubleRoster:
    """Of the second member, in ballot 4 of the newest round."""
    liar, run_id = made.identities[1], made.chain.genesis.run_id
    crypto, head = NodeCrypto(liar), made.chain.head
    told = []
    for digest in ("ab" * 32, "cd" * 32):
        one = Receipt(liar.peer_id, made.chain.epoch, head, 4, "1f" * 16, digest, "")
        told.append(dataclasses.replace(one, signature=crypto.sign(roster_message(run_id, one))))
    return DoubleRoster.of(TwoRosters(told[0], told[1]))


def _turn(path: Path, place: int, bit: int) -> None:
    with path.open("r+b") as file:
        file.seek(place)
        (byte,) = file.read(1)
        file.seek(place)
        file.write(bytes([byte ^ bit]))


def _quiet(_what: str, _done: int, _total: int) -> None:
    return None


if __name__ == "__main__":
    sys.exit(main())
