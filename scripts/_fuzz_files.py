"""Targets of fuzz.py that are files: of people, of a home that a restore may give, of a base, of an export.

A target writes its input as the file, and reads it as the product does. What is sealed or linked (a vote,
the lines of the chain, an export's manifest) is the value alone: the target seals it, as whoever means harm
would.
"""

from __future__ import annotations

import contextlib
import datetime
import io
import json
import os
import re
import shutil
import struct
import sys
import tarfile
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

from _fuzzing import JSON, LINES, TOML, Form, Target
from bases import make_base
from homes import MadeHome, make_run
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from tapestry.dht.identity import Identity, IdentityError
from tapestry.node.disk.checkpoints import read_checkpoint
from tapestry.node.disk.files import seal, unseal
from tapestry.node.disk.home_mark import new_mark, read_mark, require_original, write_mark
from tapestry.node.disk.linked import LinkedFile
from tapestry.node.disk.lock import Holder
from tapestry.node.disk.store import read_update_file, read_vote
from tapestry.node.errors import UserError
from tapestry.node.home import Home, NodeInfo
from tapestry.node.lineage.anchor import Anchor
from tapestry.node.lineage.backup import TOP, restore
from tapestry.node.lineage.crypto import ReaderCrypto
from tapestry.node.lineage.egress import lines as egress_lines
from tapestry.node.lineage.egress import read_egress
from tapestry.node.lineage.export import export_home
from tapestry.node.lineage.follow import Broken, island_from, read_genesis, read_records
from tapestry.node.lineage.manifest import write_manifest
from tapestry.node.lineage.proof import Proof
from tapestry.node.lineage.uses import Started, events, named, note, note_use, own_ids, spans, training_uses
from tapestry.node.lineage.verify import _derivatives, verify_export
from tapestry.node.net.descriptions import Descriptions
from tapestry.node.net.known_peers import KnownPeers
from tapestry.node.net.network import last_listen
from tapestry.node.progress import silent
from tapestry.node.protocol.canon import InvalidRecord
from tapestry.node.protocol.record import record_from_dict
from tapestry.node.sovereign.derivative import DataUse, Parent
from tapestry.node.sovereign.gates import Gates
from tapestry.node.sovereign.plans import Plan, Trained, begun_plan, read_held_out, read_trained
from tapestry.node.sovereign.recipe import Recipe
from tapestry.node.sovereign.suite import Suite
from tapestry.node.spec.declared import Declaration, Declared, Revoked, append
from tapestry.node.spec.listen import Listening, write_listening
from tapestry.node.spec.node import NodeConfig, NodeToml
from tapestry.node.spec.run import RunSpec, preset_spec
from tapestry.node.spec.tables import plain
from tapestry.node.surface.history import look_at_history, read_history
from tapestry.node.surface.log_levels import read_levels, write_level
from tapestry.node.surface.stopped import stopped_peers
from tapestry.node.trainer.models.pretrained import check_base, described_config
from tapestry.node.trainer.models.refusal import ModelError
from tapestry.node.trainer.models.stored import StoredWeights
from tapestry.node.trainer.tokenizers.api import TokenizerError
from tapestry.node.trainer.tokenizers.base import BaseTokenizer, adds_bos, bos_id_of, eos_id_of
from tapestry.node.trainer.tokenizers.ids import check_tokenizer

SOURCE = "/texts"
LISTEN = ("/ip4/0.0.0.0/tcp/0",)
Read = Callable[[Path], object]


@cache
def _work() -> tempfile.TemporaryDirectory[str]:
    """Gone at the end of the process."""
    return tempfile.TemporaryDirectory(prefix="fuzz-", dir=os.environ.get("TMPDIR", memory()))


def memory() -> str | None:
    """A folder in memory, where there is one: a disk is slower than what is tested."""
    return "/dev/shm" if os.access("/dev/shm", os.W_OK) else None


def folder(name: str) -> Path:
    """Of one target."""
    path = Path(_work().name) / name
    path.mkdir(parents=True, exist_ok=True)
    return path


@cache
def made() -> MadeHome:
    """A run of two members, as small as one can be, that was at work."""
    made = make_run(folder("made") / "home", preset_spec("nano", "fuzzed"), members=2)
    made.advance(2, checkpoint=True)
    home = made.home
    write_mark(home, replace(new_mark(home), path="/elsewhere"))
    known = KnownPeers(home.peers)
    known.remember({one.peer_id: (f"/ip4/1.2.3.4/tcp/1/p2p/{one.peer_id}",) for one in made.identities})
    write_listening(home, Listening(LISTEN, (), (LISTEN, ()), ("/ip4/127.0.0.1/tcp/4001",)))
    write_level(home.log_levels, "links", "debug")
    run_id = made.chain.genesis.run_id
    note_use(home, "base", [SOURCE], run_id, 1, Started(made.identities[0].peer_id))
    note(home, "left", run_id=run_id, epoch=1)
    note(home, "brought", run_id=run_id, epoch=2, sources=[SOURCE])
    note(home, "given", epoch=2)
    return made


def file(
    name: str, read: Read, refuses: tuple[type[Exception], ...], form: Form | None, *inputs: bytes
) -> Target:
    """A file of this name, alone in a folder that may be a home."""
    path = folder(name) / name

    def run(data: bytes) -> None:
        path.write_bytes(data)
        read(path)

    return Target(run, refuses, inputs, form)


def sealed(name: str, read: Read, refuses: tuple[type[Exception], ...], *inputs: object) -> Target:
    """The same; an input is the JSON of what is sealed."""
    target = file(name, read, refuses, JSON, *map(JSON.write, inputs))

    def run(data: bytes) -> None:
        with contextlib.suppress(ValueError, RecursionError):
            data = seal(JSON.read(data)) + b"\n"
        target.run(data)

    return replace(target, run=run)


def linked(name: str, read: Read, refuses: tuple[type[Exception], ...], *values: object) -> Target:
    """The same; an input is the JSON of one line's value after another."""
    path = folder(name) / name

    def run(data: bytes) -> None:
        path.unlink(missing_ok=True)
        try:
            said = LINES.read(data)
            line = LinkedFile(path)
            try:
                line.append(said)
            finally:
                line.close()
        except (ValueError, RecursionError):
            path.write_bytes(data)
        read(path)

    return Target(run, refuses, (LINES.write(list(values)),), LINES)


def headed(name: str, read: Read, whole: Path) -> Target:
    """The same; an input is the beginning of a file that is otherwise, and as long as, this one."""
    target, length = file(name, read, (ValueError,), None, whole.read_bytes()[:2048]), whole.stat().st_size
    path = folder(name) / name

    def run(data: bytes) -> None:
        path.write_bytes(data)
        os.truncate(path, max(length, len(data)))
        read(path)

    return replace(target, run=run)


def bare(text: str) -> bytes:
    """TOML without its comments: they are most of it, and nothing reads them."""
    return re.sub(r"(?m)^#.*\n|^\n", "", text).encode()


# --- what people write ---------------------------------------------------------------------------------


def _node_toml(path: Path) -> None:
    NodeConfig.resolve(Home(path.parent), {}, {})


def _data_toml(path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # of re, for what may mean something else one day
        declared = Declared.load(Home(path.parent))
    for source in ("stdlib", SOURCE):
        declared.refusal(source, "base", datetime.date(2026, 1, 1))
    declared.protections([SOURCE])


def _declared() -> bytes:
    """As `tapestry data declare` and `data revoke` write it."""
    home = Home(folder("declared"))
    one = Declaration(SOURCE, "us", "CC-BY-4.0", "open", ("base", "derive:*"), until="2027-01-01")
    append(home, [one, Revoked("/gone", "2026-01-01T00:00:00+00:00")])
    text = home.data_toml.read_text() + '[[domain]]\nname = "exam"\npatterns = ["[a-z]+ exam"]\n'
    return bare(text)


GATES = b'gain_kept_min = 0.95\n[[gate]]\nmeasure = "*/loss"\nown = true\ngain_min = 0.02\n'
SUITE = (
    b'[[set]]\nname = "general"\nstage = "cpt"\npath = "general.txt"\n[[tasks]]\ninclude = "mine"\n'
    b'names = ["quiz"]\n[[command]]\nname = "culture"\nrun = ["python", "score.py", "{model}"]\n'
)


def of_people() -> dict[str, Target]:
    """What somebody writes with an editor."""
    spec, user = preset_spec("nano", "fuzzed"), (UserError,)
    node = NodeToml().to_toml().replace("paths = []", 'paths = ["stdlib", "~/texts"]')
    source = b'[[data.source]]\npath = "more"\nweight = 2.0\nencoding = "latin-1"\n'
    return {
        "run.toml": file("run.toml", RunSpec.load_to_found, user, TOML, bare(spec.to_toml())),
        "node.toml": file("node.toml", _node_toml, user, TOML, bare(node) + source),
        "data.toml": file("data.toml", _data_toml, user, TOML, _declared()),
        "gates.toml": file("gates.toml", Gates.load, user, TOML, GATES),
        "suite.toml": file("suite.toml", Suite.load, user, TOML, SUITE),
    }


# --- what a home holds ---------------------------------------------------------------------------------


def _record(data: bytes) -> None:
    record_from_dict(JSON.read(data), ReaderCrypto())


def _home_json(path: Path) -> None:
    read_mark(Home(path.parent))
    require_original(Home(path.parent))


def _peers_json(path: Path) -> None:
    KnownPeers(path)
    stopped_peers(Home(path.parent))


def _history(path: Path) -> None:
    look_at_history(path)
    read_history(path, made().chain.genesis.run_id)


def _data_events(path: Path) -> None:
    home = Home(path.parent)
    spans(home, lambda source: source == SOURCE)
    list(training_uses(home))
    list(named(home))
    own_ids(home)


def _identity(path: Path) -> None:
    path.chmod(0o600)
    Identity.load(path)


def _in_derivatives(data: bytes) -> None:
    home = Home(folder("derivatives"))
    path = home.path / "derivatives" / "one" / "derivative.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    _derivatives(home, Proof("home"))


def of_home() -> dict[str, Target]:
    """What lies in a home that was moved, copied or restored."""
    home, genesis = made().home, made().chain.genesis
    crypto, updates, checkpoints = ReaderCrypto(), home.updates, home.checkpoints
    read = lambda path: path.read_bytes()  # noqa: E731
    chain = [unseal(line) for line in read(home.chain).splitlines()]
    left = {"at": "2026-01-01", "kind": "start", "run_id": genesis.run_id, "cut_bytes": 0}
    run_id = genesis.run_id
    vote = {"epoch": 2, "head": run_id, "promised": 3, "accepted_ballot": -1, "accepted": None, "life": ""}
    info = NodeInfo(7, "12D3", run_id, ("/ip4/1.2.3.4/tcp/1/p2p/12D3",), "http://127.0.0.1:1", "0.1", "2026")
    parent = Parent(run_id, "fuzzed", 1, run_id, run_id, run_id)
    plan = plain(Plan(Recipe("cpt", "full", ("x",)), parent, ("a:1",), weights=(1.0,), steps=3))
    trained = {"uses": [plain(DataUse("x", run_id, 1, 1))], "trained": plain(Trained(1, 2, 3.0))}
    version = {"number": 1, "digest": run_id, "parent": {"run_id": run_id, "epoch": 1, "head": run_id}}
    history = [
        {"run_id": run_id},
        {"event": {"at": 1.0, "text": "x", "level": "info"}},
        {"point": {"epoch": 1}},
    ]
    return {
        "record": Target(
            _record, (InvalidRecord, ValueError, RecursionError), (JSON.write(chain[-1]),), JSON
        ),
        "home.json": file("home.json", _home_json, (UserError,), JSON, read(home.mark)),
        "peers.json": file("peers.json", _peers_json, (), JSON, read(home.peers)),
        "listen.json": file(
            "listen.json", lambda p: last_listen(Home(p.parent), LISTEN), (), JSON, read(home.listen)
        ),
        "log-levels.json": file("log-levels.json", read_levels, (ValueError,), JSON, read(home.log_levels)),
        "history.jsonl": file("history.jsonl", _history, (), LINES, LINES.write(history)),
        "node.json": file(
            "node.json", lambda p: Home(p.parent)._node_info(), (), JSON, JSON.write(plain(info))
        ),
        "lock": file("lock", lambda p: Holder.parse(p.read_bytes()), (), None, b"7 99 boot pid:[1] host\n"),
        "identity.key": file("identity.key", _identity, (IdentityError,), None, read(home.identity_key)),
        "genesis.json": file(
            "genesis.json", lambda p: read_genesis(p, crypto), (Broken, UserError), JSON, read(home.genesis)
        ),
        "chain.jsonl": sealed("chain.jsonl", lambda p: list(read_records(p, crypto)), (Broken,), *chain),
        "vote.json": sealed(
            "vote.json", lambda p: read_vote(Home(p.parent)), (UserError,), {**vote, "standing": [0, 0, 0]}
        ),
        "descriptions.json": sealed(
            "descriptions.json", lambda p: Descriptions(p, run_id, crypto), (), [["12D3", 1, ["x"], "ab"]]
        ),
        "egress.jsonl": linked(
            "egress.jsonl", lambda p: list(egress_lines(read_egress(Home(p.parent)))), (UserError,), left
        ),
        "data-events.jsonl": linked("data-events.jsonl", _data_events, (UserError,), *events(home)),
        "island.json": file(
            "island.json", lambda p: island_from(Home(p.parent)), (), JSON, b'{"since_epoch": 3}'
        ),
        "plan.json": file("plan.json", lambda p: begun_plan(p.parent), (), JSON, JSON.write(plan)),
        "trained.json": file("trained.json", read_trained, (), JSON, JSON.write(trained)),
        "held-out.jsonl": file(
            "held-out.jsonl",
            lambda p: read_held_out(p.parent),
            (UserError,),
            LINES,
            LINES.write([{"set": "x", "ids": [1]}]),
        ),
        "derivative.json": Target(_in_derivatives, (), (JSON.write({"versions": [version]}),), JSON),
        "checkpoint": headed("checkpoint", lambda p: read_checkpoint(p, run_id), min(checkpoints.iterdir())),
        "update": headed("update", read_update_file, min(updates.iterdir())),
    }


# --- a base from a Hugging Face directory ----------------------------------------------------------------


@cache
def _base() -> Path:
    """Two layers, and a tokenizer of a few tokens."""
    path = make_base(
        folder("base"), "llama", vocab=8, hidden_size=8, intermediate_size=8, num_attention_heads=2
    )
    tokenizer = Tokenizer(models.BPE({"a": 0, "b": 1, "ab": 2, "<|end|>": 3}, [("a", "b")]))
    tokenizer.add_special_tokens(["<|end|>"])
    tokenizer.save(str(path / "tokenizer.json"), pretty=False)
    return path


def _tokenizers() -> tuple[bytes, ...]:
    """One of each kind of part that tokenizer.json may have."""
    plain = (_base() / "tokenizer.json").read_bytes()
    unigram = Tokenizer(models.Unigram([("<unk>", 0.0), ("a", -1.0), ("b", -2.0)], unk_id=0))
    unigram.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Replace(Regex(" {2,}"), " ")])
    unigram.pre_tokenizer = pre_tokenizers.Metaspace()
    unigram.post_processor = processors.TemplateProcessing("$A <unk>", special_tokens=[("<unk>", 0)])
    word = Tokenizer(models.WordPiece({"[UNK]": 0, "a": 1, "##b": 2}, unk_token="[UNK]"))
    word.normalizer, word.decoder = normalizers.BertNormalizer(), decoders.WordPiece()
    word.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.ByteLevel(), pre_tokenizers.Split("a", "isolated")]
    )
    return plain, *(one.to_str().encode() for one in (unigram, word))


class InBase:
    """One file of a base takes the input; the rest is as it was."""

    def __init__(self, name: str, read: Read) -> None:
        self.path = folder(f"in-base-{name}") / name
        self.read = read
        shutil.copytree(_base(), self.path.parent, dirs_exist_ok=True)

    def run(self, data: bytes) -> None:
        self.path.write_bytes(data)
        self.read(self.path.parent)

    def target(self, form: Form | None, *inputs: bytes, tries: int = 100) -> Target:
        return Target(self.run, (ModelError, TokenizerError), inputs, form, tries)


def _check(folder: Path) -> None:
    check_base(folder, memory_bytes=1 << 40)
    described_config(folder)


def _tokenize(folder: Path) -> None:
    check_tokenizer(folder, 8)
    bos_id = bos_id_of(folder) if adds_bos(folder) else None
    tokenizer = BaseTokenizer(folder / "tokenizer.json", eos_id_of(folder), bos_id)
    tokenizer.encode_batch(["ab <|end|>", "\ud83d"[:0]])


def _weights(folder: Path) -> None:
    stored = StoredWeights.find(folder)
    for name in stored.tensors:
        if len(name) < 100:
            stored.read(name)


def _header(data: bytes) -> bytes:
    """A safetensors file of this header, as long as the base's."""
    return struct.pack("<Q", len(data)) + data + bytes(64)


def of_base() -> dict[str, Target]:
    base, config = _base(), JSON.write(json.loads((_base() / "config.json").read_bytes()))
    table = {
        "__metadata__": {"format": "pt"},
        "a": {"dtype": "F32", "shape": [2, 8], "data_offsets": [0, 64]},
    }
    index = {"metadata": {}, "weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}
    header, config_of = InBase("model.safetensors", _weights), (base / "tokenizer_config.json").read_bytes()
    indexed = InBase("model.safetensors.index.json", _weights)
    for name, tensor in (("model-1.safetensors", "a"), ("model-2.safetensors", "b")):
        data = _header(JSON.write({tensor: {"dtype": "F32", "shape": [16], "data_offsets": [0, 64]}}))
        (indexed.path.parent / name).write_bytes(data)
    (indexed.path.parent / "model.safetensors").unlink()
    headers = header.target(JSON, JSON.write(table))
    return {
        "config.json": InBase("config.json", _check).target(JSON, config, tries=50),
        "tokenizer.json": InBase("tokenizer.json", _tokenize).target(JSON, *_tokenizers()),
        "tokenizer_config.json": InBase("tokenizer_config.json", _tokenize).target(JSON, config_of),
        "safetensors": replace(headers, run=lambda data: header.run(_header(data))),
        "weights": header.target(None, _header(JSON.write(table))),
        "index.json": indexed.target(JSON, JSON.write(index)),
    }


# --- what is handed over: an export, an anchor, a backup -------------------------------------------------


@cache
def _export() -> Path:
    out = folder("export") / "out"
    export_home(made().home, out, 1)
    return out


class InExport:
    """One file of an export takes the input, and the manifest says that it is so."""

    def __init__(self, name: str, place: str = "") -> None:
        self.out = folder(f"in-export-{place}{name.replace('/', '-')}") / "out"
        shutil.copytree(_export(), self.out)
        self.path = self.out / name

    def run(self, data: bytes) -> None:
        self.path.write_bytes(data)
        if self.path.name != "manifest.json":
            write_manifest(self.out)
        verify_export(self.out, told=silent)

    def target(self, form: Form | None, tries: int = 50) -> Target:
        return Target(self.run, (UserError,), (self.path.read_bytes(),), form, tries)


def _derived() -> Target:
    """tapestry.json of a derivative's export."""
    run_id = made().chain.genesis.run_id
    parent = {"run_id": run_id, "run_name": "fuzzed", "epoch": 1, "head": run_id}
    said = {
        "derivative": "x",
        "version": {"digest": run_id, "parent": parent},
        "dtype": "f32",
        "weights": run_id,
    }
    return replace(InExport("tapestry.json", "derived").target(JSON, 25), inputs=(JSON.write(said),))


def _manifest() -> Target:
    """Sealed anew."""
    one = InExport("manifest.json")
    value = unseal(one.path.read_bytes()[:-1])

    def run(data: bytes) -> None:
        with contextlib.suppress(ValueError, RecursionError):
            data = seal(JSON.read(data)) + b"\n"
        one.run(data)

    return replace(one.target(JSON), run=run, inputs=(JSON.write(value),))


def _anchor(data: bytes) -> None:
    anchor = Anchor.parse(data.decode("utf-8", "surrogateescape"))
    list(anchor.bad_signatures(ReaderCrypto()))
    assert Anchor.parse(str(anchor)) == anchor


def _restore(data: bytes) -> None:
    place = folder("restore")
    shutil.rmtree(place)
    place.mkdir()
    (place / "archive").write_bytes(_summed(data))
    restore(place / "archive", Home(place / "home"), silent)


def _summed(data: bytes) -> bytes:
    """With the sums that the headers' bytes have: what was changed in them is read, not refused."""
    changed = bytearray(data)
    for at in range(0, len(data) - 511, 512):
        if changed[at + 257 : at + 262] == b"ustar":
            changed[at + 148 : at + 156] = b" " * 8
            changed[at + 148 : at + 156] = b"%06o\0 " % sum(changed[at : at + 512])
    return bytes(changed)


def _archive() -> bytes:
    """Of a home's smallest files, as `backup` writes them; without the zeros that fill the last block."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as tar:
        for name in ("", "genesis.json", "home.json", "peers.json"):
            tar.add(made().home.path / name, f"{TOP}/{name}".rstrip("/"), recursive=False)
    return out.getvalue()[: tar.offset]


def of_hand() -> dict[str, Target]:
    chain = made().chain
    anchor = str(Anchor.of(chain.genesis, chain.records[-1])).encode()
    return {
        "export": InExport("tapestry.json").target(JSON, tries=25),
        "export-derived": _derived(),
        "export-config": InExport("config.json").target(JSON, tries=25),
        "export-chain": InExport("lineage/chain.jsonl").target(LINES, tries=25),
        "manifest": _manifest(),
        "anchor": Target(_anchor, (UserError,), (anchor,)),
        "backup": Target(_restore, (UserError,), (_archive(),), None, 100),
    }


GROUPS = (of_people, of_home, of_base, of_hand)
