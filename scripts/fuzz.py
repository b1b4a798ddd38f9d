"""What peers and people may send, mutated: nothing may come out of a decoder but its own refusal.

    .venv/bin/python -P scripts/fuzz.py all --runs 100000          # every target, one after the other
    .venv/bin/python -P scripts/fuzz.py control --runs 10000000    # one

atheris (`pip install atheris==3.0.0`) mutates inputs so that they reach code which none before them
reached; three of four times the value that an input is, where it is one (_fuzzing.py). A target is a
function of bytes, the exceptions by which it refuses, and inputs that it takes. Another exception ends with
its traceback, the input in a file crash-..., and exit code 1; what takes longer than a second is left in a
file slow-unit-.... Files come from _fuzz_files.py, HTTP from _fuzz_http.py. tests/node/test_fuzz.py gives
each target its inputs and some mutations of them, without atheris.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import os
import random
import runpy
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

import _fuzz_files
import _fuzz_http
import msgpack
import torch
from _fuzzing import JSON, MSGPACK, Target, varied

from tapestry.compression.codecs import get_codec, pack, unpack
from tapestry.compression.refusals import Refused
from tapestry.dht import presence
from tapestry.dht.p2pd import SwarmError
from tapestry.dht.reachability import hop_answer, hop_request, stop_request, stop_status
from tapestry.node.disk import accusations, signed_means
from tapestry.node.disk.double_rosters import DoubleRoster
from tapestry.node.errors import UserError
from tapestry.node.lineage.crypto import ReaderCrypto
from tapestry.node.net import checkup, wire
from tapestry.node.net.admission import Reception
from tapestry.node.net.vocabulary import Reader, encode_message
from tapestry.node.net.wire import RemoteProtocolError
from tapestry.node.protocol.audit import SignedMean
from tapestry.node.protocol.canon import InvalidRecord, canonical
from tapestry.node.protocol.members import (
    Change,
    Charter,
    change_from,
    change_to_list,
    changes_fault,
    first_roll,
)
from tapestry.node.protocol.messages import Closing, GetRecords, Ready, Receipt, Roster, Shard, Stage, Status
from tapestry.node.protocol.receipts import TwoRosters
from tapestry.node.protocol.record import Member, found, genesis_from_dict, genesis_to_dict
from tapestry.node.protocol.strict import Malformed
from tapestry.node.spec.invitation import Invitation, read_invitation
from tapestry.node.spec.run import RunSpec, preset_spec
from tapestry.node.trainer.messages import HEADER, Begin, MessageError, Notice, unpack_command, unpack_report
from tapestry.node.trainer.messages import pack as pack_message

PEER = "12D3KooWFAQWzWY2n8KUGGaXykyzafrNgSCsfTmabDmNUZkDoTn5"
OTHER = "12D3KooWKnDdG3iXw9eTFijk3EWSunZcFi54Zka4wmtqtt6rPxc8"
GUEST = "12D3KooWEWAoPG3DFJdqrfWhM5K78hCM1AfxiPqs6GHTiqhZs5GK"
HEX = "ab" * 32
N = 1000  # elements of a frame
ROLL = first_roll(HEX, Charter(admit_by="council 1/2"), [PEER, OTHER])
READER = Reader(ReaderCrypto())
CODEC = get_codec("int8-block")
MAX_BYTES = 4096  # of an input, or twice the longest that a target begins with
MEMORY_MB = 4096  # of a process, most of it torch and transformers
SLOW_S, TIMEOUT_S = 1, 30  # of one input: it is written to slow-unit-...; it is a crash
ANEW = ("tapestry", "_fuzzing", "_fuzz_files", "_fuzz_http", "homes", "bases")


def _change(data: bytes) -> None:
    """What is read may be judged, and applied where it is valid."""
    change = change_from(wire.unpack(data))
    if changes_fault(ROLL, 1, [change], [PEER, OTHER], NoCrypto()) is None:
        ROLL.after(1, HEX, [change], [])


class NoCrypto(ReaderCrypto):
    """Every signature is right: so that what comes after it is reached."""

    def verify(self, peer: str, signature: str, message: bytes) -> bool:
        return True


def _genesis(data: bytes) -> None:
    RunSpec.of_genesis(genesis_from_dict(json.loads(data), NoCrypto()))


def _invitation(data: bytes) -> None:
    read_invitation(data.decode("utf-8", "surrogateescape"))


def _admission(data: bytes) -> None:
    question = wire.unpack(data)
    if type(question) is dict:
        Reception(lambda: ROLL, lambda: 0, lambda change: "")._answer(GUEST, question)


def _presence(data: bytes) -> None:
    presence.decode(data, lambda peer, signature, message: True, run_id=HEX, now=1000.0)


def _changes() -> list[Change]:
    pairs = ((PEER, "ab"),)
    kinds = {
        "admit": ("name", GUEST),
        "remove": ("why", OTHER),
        "rekey": (GUEST, OTHER),
        "voice": ("3", OTHER),
        "invite": ("1 0 name", GUEST),
        "charter": ("admit_by majority", ""),
        "set": ("train.lr 0.001", ""),
    }
    return [Change(kind, peer, value, 9, "0" * 32, pairs) for kind, (value, peer) in kinds.items()]


def _genesis_of(spec: RunSpec) -> bytes:
    charter = spec.members.charter()
    return canonical(
        genesis_to_dict(found(spec.canonical().decode(), PEER, HEX, HEX, N, "0" * 32, Signs(), charter))
    )


class Signs(NoCrypto):
    def sign(self, message: bytes) -> str:
        return "ab" * 64


def body_of(message: Begin | Notice) -> bytes:
    """A message of node and trainer, without its length."""
    return pack_message(message)[HEADER.size :]


def of_peers() -> dict[str, Target]:
    """What comes over the network, and between a node and its trainer."""
    spec = preset_spec("nano", "fuzzed")
    status = Status(3, HEX, 3, "training", Stage.TRAINING, 0, 0, ())
    shown = presence.Presence(HEX, PEER, 3, HEX, "training", ("/ip4/203.0.113.7/tcp/4001",), 990.0, 1100.0)
    accused = accusations.Accusation(
        HEX, 3, (Member(PEER, 1, HEX, ""),), 0, HEX, OTHER, "ab", (((HEX,), b"x"),)
    )
    receipt = Receipt(PEER, 3, HEX, 0, HEX[:32], HEX, "ab")
    twice = DoubleRoster.of(TwoRosters(receipt, receipt))
    line = Invitation(f"/ip4/1.2.3.4/tcp/1/p2p/{PEER}", HEX, b"s" * 32).line
    refusals = (InvalidRecord, UserError, ValueError, RecursionError)
    members = (Member(PEER, 1, HEX, "", 5), Member(OTHER, 0, "", HEX[:32], seat="ab" * 64))
    said = Ready(3, HEX, 0, False, HEX, HEX, 5, 1.0, -1, None, HEX[:32], seat="ab" * 64, receipts=(receipt,))
    roster = Roster(3, HEX, 0, False, HEX, tuple(sorted(members, key=lambda m: m.peer)), (0,))
    ready = {"ask": "admission", "name": "lab", "admission": change_to_list(_changes()[0])}
    return {
        "control": Target(
            READER.control,
            (RemoteProtocolError,),
            tuple(map(encode_message, (status, GetRecords(((0, HEX),)), Closing(3, HEX, 0), said, roster))),
            MSGPACK,
        ),
        "data": Target(
            lambda data: READER.data(data, None, HEX),
            (RemoteProtocolError,),
            (encode_message(Shard(3, HEX, 0, None, (HEX,))),),
            MSGPACK,
        ),
        "presence": Target(
            _presence,
            (presence.PresenceError,),
            (presence.encode(shown, lambda message: b"s" * 64),),
            MSGPACK,
        ),
        "genesis": Target(_genesis, refusals, (_genesis_of(spec),), JSON),
        "spec": Target(RunSpec.from_canonical, (UserError,), (spec.canonical(),), JSON),
        "change": Target(
            _change,
            (Malformed, RemoteProtocolError),
            tuple([msgpack.packb(change_to_list(change)) for change in _changes()]),
            MSGPACK,
        ),
        "invitation": Target(_invitation, (UserError,), (line.encode(),)),
        "admission": Target(_admission, (RemoteProtocolError,), (msgpack.packb(ready),), MSGPACK),
        "accusation": Target(
            accusations.unpack, (accusations.FalseAccusation,), (accused.pack(), twice.pack()), MSGPACK
        ),
        "means": Target(
            lambda data: signed_means.unpack(data, 2),
            (ValueError,),
            (signed_means.pack([SignedMean(PEER, HEX, "ab"), SignedMean(OTHER, HEX, "cd")]),),
            MSGPACK,
        ),
        "frame": Target(
            lambda data: unpack(data, CODEC, N),
            (Refused,),
            (pack(CODEC, N, CODEC.encode(torch.ones(N))) + bytes(CODEC.encode(torch.ones(N)).numpy()),),
        ),
        "relay": Target(hop_request, (SwarmError,), (hop_answer(100, 1000.0), stop_request(PEER))),
        "stop": Target(stop_status, (SwarmError,), (hop_answer(100, 1000.0), stop_request(PEER))),
        "checkup": Target(
            lambda data: checkup._ports(wire.unpack(data)),
            (RemoteProtocolError,),
            (msgpack.packb({"ports": [4001]}),),
            MSGPACK,
        ),
        "command": Target(unpack_command, (MessageError,), (body_of(Begin(3, 1, False, 0, 0)),), MSGPACK),
        "report": Target(unpack_report, (MessageError,), (body_of(Notice("text")),), MSGPACK),
    }


GROUPS = (of_peers, _fuzz_http.of_endpoint, *_fuzz_files.GROUPS)


def targets() -> dict[str, Target]:
    """All, by name."""
    return {name: target for group in GROUPS for name, target in group().items()}


def target_of(name: str) -> Target:
    """One; only the groups before it are made, for some make a base or a home first."""
    return next(made[name] for group in GROUPS if name in (made := group()))


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("target", nargs="+", help="its name, or all")
    parser.add_argument("--runs", type=int, default=100_000, help="inputs of each target")
    parser.add_argument(
        "--seconds", type=int, default=0, help="of each target, at most; 0: until all are run"
    )
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)  # in this process
    options = parser.parse_args()
    if options.here:
        return fuzz(options.target[0], options.runs, options.seconds)
    known = list(targets())
    if unknown := set(options.target) - {"all", *known}:
        parser.error(f"no target {', '.join(sorted(unknown))}; there are {', '.join(known)}")
    names = known if "all" in options.target else options.target
    broken = [name for name in names if _apart(name, options.runs, options.seconds)]
    told = ", ".join(broken) or "none"
    sys.stdout.write(f"\n{len(names)} targets, at most {options.runs} inputs each; broken: {told}\n")
    return 1 if broken else 0


def _apart(name: str, runs: int, seconds: int) -> int:
    """The exit code of a process that runs this target; its files are gone afterwards."""
    sys.stdout.write(f"\n# {name}\n")
    sys.stdout.flush()
    command = [sys.executable, "-P", __file__, name, f"--runs={runs}", f"--seconds={seconds}", "--here"]
    with tempfile.TemporaryDirectory(prefix="fuzz-", dir=_fuzz_files.memory()) as folder:
        return subprocess.run(command, check=False, env={**os.environ, "TMPDIR": folder}).returncode


def fuzz(name: str, runs: int, seconds: int) -> int:
    """With our own modules imported once more, so that atheris sees which lines an input reaches."""
    import atheris

    for module in [one for one in sys.modules if one.split(".")[0] in ANEW]:
        del sys.modules[module]
    with atheris.instrument_imports(include=["tapestry"]):
        target = runpy.run_path(__file__, run_name="instrumented")["target_of"](name)
    logging.disable(logging.ERROR)

    def one(data: bytes) -> None:
        with contextlib.suppress(*target.refuses):
            target.run(data)

    def mutate(data: bytes, max_size: int, seed: int) -> bytes:
        changed = varied(target.form, data, random.Random(seed)) if target.form and seed % 4 else None
        fits = changed is not None and len(changed) <= max_size
        return changed if fits else atheris.Mutate(data, max_size)

    folder = tempfile.mkdtemp()
    for number, data in enumerate(target.inputs):
        (Path(folder) / f"input-{number}").write_bytes(data)
    longest = max(MAX_BYTES, *(2 * len(data) for data in target.inputs))
    limits = [f"-rss_limit_mb={MEMORY_MB}", f"-timeout={TIMEOUT_S}", f"-report_slow_units={SLOW_S}"]
    flags = [
        f"-runs={runs}",
        f"-max_total_time={seconds}",
        f"-max_len={longest}",
        "-print_final_stats=1",
        *limits,
    ]
    atheris.Setup([sys.argv[0], *flags, folder], one, custom_mutator=mutate)
    atheris.Fuzz()
    return 0


if __name__ == "__main__":
    sys.exit(main())
