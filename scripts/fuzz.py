"""What peers and people may send, mutated: nothing may come out of a decoder but its own refusal.

    .venv/bin/python -P scripts/fuzz.py all --runs 100000          # every target, one after the other
    .venv/bin/python -P scripts/fuzz.py control --runs 10000000    # one

atheris (`pip install atheris==3.0.0`) mutates inputs so that they reach code which none before them reached.
A target is a function of bytes, the exceptions by which it refuses, and inputs that it takes. Another
exception ends with its traceback, the input in a file crash-..., and exit code 1. tests/node/test_fuzz.py
gives each target its inputs and simple mutations of them, without atheris.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import runpy
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import msgpack
import torch

from tapestry.compression.codecs import get_codec, pack, unpack
from tapestry.compression.refusals import Refused
from tapestry.dht import presence
from tapestry.dht.p2pd import SwarmError
from tapestry.dht.reachability import hop_answer, hop_request, stop_request, stop_status
from tapestry.node.disk import accusations, signed_means
from tapestry.node.errors import UserError
from tapestry.node.lineage.crypto import ReaderCrypto
from tapestry.node.net import checkup, wire
from tapestry.node.net.admission import Reception
from tapestry.node.net.vocabulary import Reader, encode_message
from tapestry.node.net.wire import RemoteProtocolError
from tapestry.node.protocol.audit import SignedMean
from tapestry.node.protocol.canon import InvalidRecord
from tapestry.node.protocol.chain import (
    Member,
    canonical,
    found,
    genesis_from_dict,
    genesis_to_dict,
    record_from_dict,
)
from tapestry.node.protocol.members import (
    Change,
    Charter,
    change_from,
    change_to_list,
    changes_fault,
    first_roll,
)
from tapestry.node.protocol.messages import Closing, GetRecords, Shard, Stage, Status
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
MAX_BYTES = 4096  # of an input


@dataclass(frozen=True, slots=True)
class Target:
    """One decoder."""

    run: Callable[[bytes], object]
    refuses: tuple[type[Exception], ...]
    inputs: tuple[bytes, ...]


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


def _record(data: bytes) -> None:
    record_from_dict(json.loads(data), NoCrypto())


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


def targets() -> dict[str, Target]:
    """By name."""
    spec = preset_spec("nano", "fuzzed")
    status = Status(3, HEX, 3, "training", Stage.TRAINING, 0, 0, ())
    shown = presence.Presence(HEX, PEER, 3, HEX, "training", ("/ip4/203.0.113.7/tcp/4001",), 990.0, 1100.0)
    accused = accusations.Accusation(
        HEX, 3, (Member(PEER, 1, HEX, ""),), 0, HEX, OTHER, "ab", (((HEX,), b"x"),)
    )
    body = {"ballot": 0, "signatures": [[PEER, "ab"]], "body": {"run_id": HEX, "epoch": 1, "members": []}}
    line = Invitation(f"/ip4/1.2.3.4/tcp/1/p2p/{PEER}", HEX, b"s" * 32).line
    refusals = (InvalidRecord, UserError, ValueError, RecursionError)
    ready = {"ask": "admission", "name": "lab", "admission": change_to_list(_changes()[0])}
    return {
        "control": Target(
            READER.control,
            (RemoteProtocolError,),
            tuple(map(encode_message, (status, GetRecords(((0, HEX),)), Closing(3, HEX, 0)))),
        ),
        "data": Target(
            lambda data: READER.data(data, None, HEX),
            (RemoteProtocolError,),
            (encode_message(Shard(3, HEX, 0, None, (HEX,))),),
        ),
        "presence": Target(
            _presence, (presence.PresenceError,), (presence.encode(shown, lambda message: b"s" * 64),)
        ),
        "genesis": Target(_genesis, refusals, (_genesis_of(spec),)),
        "record": Target(_record, (InvalidRecord, ValueError, RecursionError), (json.dumps(body).encode(),)),
        "spec": Target(RunSpec.from_canonical, (UserError,), (spec.canonical(),)),
        "change": Target(
            _change,
            (Malformed, RemoteProtocolError),
            tuple([msgpack.packb(change_to_list(change)) for change in _changes()]),
        ),
        "invitation": Target(_invitation, (UserError,), (line.encode(),)),
        "admission": Target(_admission, (RemoteProtocolError,), (msgpack.packb(ready),)),
        "accusation": Target(accusations.unpack, (accusations.FalseAccusation,), (accused.pack(),)),
        "means": Target(
            lambda data: signed_means.unpack(data, 2),
            (ValueError,),
            (signed_means.pack([SignedMean(PEER, HEX, "ab"), SignedMean(OTHER, HEX, "cd")]),),
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
        ),
        "command": Target(unpack_command, (MessageError,), (body_of(Begin(3, 1, False, 0, 0)),)),
        "report": Target(unpack_report, (MessageError,), (body_of(Notice("text")),)),
    }


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("target", choices=["all", *targets()])
    parser.add_argument("--runs", type=int, default=100_000)
    options = parser.parse_args()
    if options.target != "all":
        return fuzz(options.target, options.runs)
    codes = {}
    for name in targets():
        sys.stdout.write(f"\n# {name}\n")
        sys.stdout.flush()
        command = [sys.executable, "-P", __file__, name, "--runs", str(options.runs)]
        codes[name] = subprocess.run(command, check=False).returncode
    broken = [name for name, code in codes.items() if code]
    told = ", ".join(broken) or "none"
    sys.stdout.write(f"\n{len(codes)} targets, {options.runs} inputs each; broken: {told}\n")
    return 1 if broken else 0


def fuzz(name: str, runs: int) -> int:
    """With our own modules imported once more, so that atheris sees which lines an input reaches."""
    import atheris

    for module in [one for one in sys.modules if one.startswith("tapestry")]:
        del sys.modules[module]
    with atheris.instrument_imports(include=["tapestry"]):
        target = runpy.run_path(__file__, run_name="instrumented")["targets"]()[name]

    def one(data: bytes) -> None:
        with contextlib.suppress(*target.refuses):
            target.run(data)

    with tempfile.TemporaryDirectory() as folder:
        for number, data in enumerate(target.inputs):
            (Path(folder) / f"input-{number}").write_bytes(data)
        flags = [f"-runs={runs}", f"-max_len={MAX_BYTES}", "-print_final_stats=1"]
        atheris.Setup([sys.argv[0], *flags, folder], one)
        atheris.Fuzz()
    return 0


if __name__ == "__main__":
    sys.exit(main())
