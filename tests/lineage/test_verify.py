"""`tapestry verify`, `log` and `anchor`: what holds is proven, and a flipped bit has a file and an epoch."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
from bases import FAMILIES, edit_json
from blake3 import blake3
from click.testing import CliRunner
from flips import files_below, flipped
from homes import MadeHome, base_spec, make_home
from safetensors.torch import load_file

from tapestry.node.cli.main import cli
from tapestry.node.disk.files import atomic_write, seal
from tapestry.node.disk.linked import append_once
from tapestry.node.errors import UserError
from tapestry.node.home import Home
from tapestry.node.lineage import export
from tapestry.node.lineage.anchor import Anchor
from tapestry.node.lineage.crypto import NodeCrypto, ReaderCrypto
from tapestry.node.lineage.egress import Started
from tapestry.node.lineage.export import export_home
from tapestry.node.lineage.follow import read_genesis
from tapestry.node.lineage.huggingface import FILE_BYTES_MAX, Form, json_text
from tapestry.node.lineage.island import begin
from tapestry.node.lineage.leave import leave
from tapestry.node.lineage.log import lines, newest, read_log
from tapestry.node.lineage.manifest import write_manifest
from tapestry.node.lineage.proof import Proof
from tapestry.node.lineage.verify import lines as proof_lines
from tapestry.node.lineage.verify import verify
from tapestry.node.net.descriptions import Descriptions, pack
from tapestry.node.protocol.record import record_to_dict
from tapestry.node.spec.training import PRESETS
from tapestry.node.state.model import state_digest_of
from tapestry.node.trainer.models.stored import Source, write_weights

FLIPS = 160  # scripts/flip_bits.py makes a thousand


def _quiet(_what: str, _done: int, _total: int) -> None:
    return None


def _verify(path: Path, **how: object) -> Proof:
    return verify(path, told=_quiet, **how)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> MadeHome:
    """Five epochs of a base, checkpoints at 0, 2 and 5."""
    folder = tmp_path_factory.mktemp("verify")
    made = make_home(folder / "home", base_spec(folder / "home", "llama"))
    made.advance(2, checkpoint=True)
    made.advance(3, checkpoint=True)
    atomic_write(made.home.vote, seal({"epoch": 5}) + b"\n")
    return made


@pytest.fixture
def copy(made: MadeHome, tmp_path: Path) -> Home:
    shutil.copytree(made.home.path, tmp_path / "copy")
    return Home(tmp_path / "copy")


@pytest.fixture(scope="module")
def exported(made: MadeHome, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of an epoch that the record after it signed."""
    out = tmp_path_factory.mktemp("export") / "out"
    export_home(made.home, out, 4)
    return out


# ---- homes -------------------------------------------------------------------------------------------


def test_a_home_is_proven_from_the_genesis_to_the_head_and_replayed(made: MadeHome) -> None:
    before = {path: path.read_bytes() for path in made.home.path.rglob("*") if path.is_file()}
    proof = _verify(made.home.path)
    assert proof.holds and proof.notes == []
    assert (proof.epoch, proof.head, proof.records, proof.signatures) == (5, made.chain.head, 5, 10)
    assert (proof.updates, proof.checkpoints, proof.files) == (5, 3, 4)
    assert (proof.replayed_from, proof.replayed_to) == (0, 5)
    assert before == {path: path.read_bytes() for path in made.home.path.rglob("*") if path.is_file()}


def _covered(path: Path) -> list[Path]:
    """What a run consists of; a key and an operator's own settings are not part of it, nor what is made again
    of the chain (tests/state/test_chain_file.py flips that)."""
    own = {"identity.key", "lock", "chain.index", "chain.marks"}
    files = [one for one in sorted(path.rglob("*")) if one.is_file() and one.name not in own]
    pinned = {"config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json"}
    return [one for one in files if one.parent.name != "base" or one.name in pinned]


@pytest.mark.parametrize("kind", ["home", "export"])
def test_one_flipped_bit_anywhere_is_found_in_its_file(
    made: MadeHome, exported: Path, tmp_path: Path, kind: str
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(made.home.path if kind == "home" else exported, copy)
    rng = random.Random(4)
    files = _covered(copy)
    missed = []
    for index in range(FLIPS // 2):
        path = files[index % len(files)]
        whole = path.read_bytes()
        place, bit = rng.randrange(len(whole)), 1 << rng.randrange(8)
        path.write_bytes(whole[:place] + bytes([whole[place] ^ bit]) + whole[place + 1 :])
        named = {fault.file for fault in _verify(copy).faults}
        if path.relative_to(copy).as_posix() not in named:
            missed.append((path.name, place, bit, named))
        path.write_bytes(whole)
    assert missed == [] and _verify(copy).holds


def test_a_fault_says_file_and_epoch(copy: Home) -> None:
    (path,) = copy.updates.glob("00000003-*")
    whole = path.read_bytes()
    path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    (first, *_) = _verify(copy.path).faults
    assert (first.file, first.epoch) == (f"updates/{path.name}", 3)
    assert str(first).endswith("its numbers are not those that the record names")


def test_updates_beyond_a_short_chain_are_one_fault(copy: Home) -> None:
    lines = copy.chain.read_bytes().splitlines(keepends=True)
    copy.chain.write_bytes(b"".join([*lines[:1], lines[1].replace(b"1", b"2"), *lines[2:]]))
    chain, updates, *others = _verify(copy.path).faults
    assert (chain.file, chain.epoch) == ("chain.jsonl", 2)
    assert str(updates) == (
        "updates, epoch 3: 3 of epochs 3 to 5, which the chain does not have (it ends at 1)"
    )
    assert not [one for one in others if one.file.startswith("updates")]
    for epoch in (3, 4):
        next(copy.updates.glob(f"0000000{epoch}-*")).unlink()
    (one,) = [fault for fault in _verify(copy.path).faults if fault.file.startswith("updates")]
    assert one.epoch == 5 and one.file.startswith("updates/00000005-")


def test_a_record_whose_signatures_are_of_others_is_found(made: MadeHome, copy: Home) -> None:
    lines = copy.chain.read_bytes().splitlines(keepends=True)
    record = record_to_dict(made.chain.records[2])
    other = record_to_dict(made.chain.records[3])
    lines[2] = seal({**record, "signatures": other["signatures"]}) + b"\n"
    copy.chain.write_bytes(b"".join(lines))
    proof = _verify(copy.path)
    fault = proof.faults[0]
    assert (fault.file, fault.epoch) == ("chain.jsonl", 3) and "bad signature of" in fault.what
    assert _verify(copy.path, jobs=2) == proof, "checked ahead, it is another proof"


def test_words_about_data_that_a_member_did_not_sign_are_found_and_the_member_named(
    made: MadeHome, copy: Home
) -> None:
    own, other = made.identities
    for identity in (own, other):
        known = Descriptions(copy.descriptions, made.chain.genesis.run_id, NodeCrypto(identity))
        known.say(identity.peer_id, ("manual pages",), 100)
    proof = _verify(copy.path)
    assert proof.holds and proof.descriptions == 2
    planted = [one for one in known.all if one.peer != own.peer_id]
    planted += [replace(one, texts=("laws",)) for one in known.all if one.peer == own.peer_id]
    copy.descriptions.write_bytes(seal(json.loads(pack(planted))) + b"\n")
    (fault,) = _verify(copy.path).faults
    assert fault.file == "descriptions.json" and fault.what.startswith(f"{own.peer_id} did not sign")


def test_a_whole_checkpoint_of_numbers_that_nobody_signed_is_found(made: MadeHome, copy: Home) -> None:
    """Its own digests are all right; only the chain knows better."""
    from tapestry.node.disk.checkpoints import Checkpoints

    (path,) = copy.checkpoints.glob("00000002-*")
    path.unlink()
    checkpoints = Checkpoints(copy.checkpoints, made.chain.genesis.run_id, 3)
    checkpoints.load()
    state = made.state
    epoch, head = state.epoch, state.head
    try:
        state.epoch, state.head = 2, made.chain.head_at(2)
        checkpoints.save(state, state.digest())
    finally:
        state.epoch, state.head = epoch, head
    fault = _verify(copy.path).faults[0]
    assert (fault.file, fault.epoch) == (f"checkpoints/{path.name}", 2)
    assert fault.what == "its digest is not the one that the record signed"


def test_a_chain_that_was_cut_off_inside_leaves_updates_that_it_does_not_have(copy: Home) -> None:
    lines = copy.chain.read_bytes().splitlines(keepends=True)
    copy.chain.write_bytes(b"".join(lines[:3]))
    assert {fault.epoch for fault in _verify(copy.path).faults} >= {5}


def test_without_its_oldest_updates_it_is_replayed_from_a_later_checkpoint(copy: Home) -> None:
    for path in [*copy.updates.glob("0000000[12]-*"), *copy.checkpoints.glob("00000000-*")]:
        path.unlink()
    proof = _verify(copy.path)
    assert proof.holds and (proof.replayed_from, proof.replayed_to) == (2, 5)


@pytest.mark.parametrize("name", ["egress.jsonl", "data-events.jsonl"])
def test_a_ledger_whose_last_newline_was_flipped_does_not_hold_and_one_that_was_torn_does(
    copy: Home, tmp_path: Path, name: str
) -> None:
    path = copy.path / name
    for _ in range(2):
        append_once(path, Started("2026-11-29T00:00:00Z", "ab" * 32, 0).value())
    whole = path.read_bytes()
    path.write_bytes(whole[:-1])
    proof = _verify(copy.path)
    assert proof.holds and proof.notes == [
        f"{name}: its last line is not finished: a node writes it, or was killed"
    ]
    path.write_bytes(whole[:-1] + b"\x0b")
    (fault,) = _verify(copy.path).faults
    assert str(fault) == f"{name}: line 2: it ends with another byte than a newline"
    with pytest.raises(UserError, match="does not hold, and nothing was written"):
        leave(copy, tmp_path / "out", _quiet)


# ---- anchors and the log -----------------------------------------------------------------------------


def test_a_home_that_ended_behind_its_records_holds_and_says_how_far_it_is_proven(copy: Home) -> None:
    """Records come first, and the state follows: a node may end in between, and fetches the rest."""
    for folder, ending in ((copy.updates, "*.upd"), (copy.checkpoints, "*.safetensors")):
        sorted(folder.glob(ending))[-1].unlink()  # of epoch 5
    proof = _verify(copy.path)
    assert proof.holds and (proof.replayed_to, proof.epoch) == (4, 5)
    assert any("behind its records" in note for note in proof.notes)


def test_an_anchor_holds_a_chain_to_what_was_published(made: MadeHome, tmp_path: Path) -> None:
    anchor = Anchor.parse(f"In the gazette:\n{newest(made.home)}\n")
    assert (anchor.epoch, anchor.head, len(anchor.signatures)) == (5, made.chain.head, 2)
    assert _verify(made.home.path, anchor=anchor).holds
    other = make_home(tmp_path / "other", PRESETS["nano"].model)
    other.advance(5)
    assert "it is of the run" in str(_verify(other.home.path, anchor=anchor, replay=False).faults[0])
    peer, signature = anchor.signatures[0]
    forged = Anchor.parse(str(anchor).replace(signature, signature[::-1]))
    assert str(_verify(made.home.path, anchor=forged, replay=False).faults[0]) == (
        f"anchor, epoch 5: its signature by {peer} does not hold"
    )
    with pytest.raises(UserError, match="no anchor"):
        Anchor.parse("tapestry-anchor-1 abc")


def test_the_log_says_who_had_which_share_and_when(made: MadeHome) -> None:
    lines = list(read_log(made.home, 2))
    assert [line.epoch for line in lines] == [4, 5] and lines[1].head == made.chain.head
    assert sorted(round(share, 2) for _, share in lines[0].members) == [0.4, 0.6]
    assert lines[0].update_bytes > 1000 and lines[0].time.endswith("Z")
    assert json.loads(json.dumps(lines[0].table()))["signers"] == 2


# ---- exports -----------------------------------------------------------------------------------------


def test_whoever_has_only_the_export_can_check_its_tensors(exported: Path, made: MadeHome) -> None:
    proof = _verify(exported)
    assert proof.holds and proof.notes == [] and proof.records == 5
    assert proof.proven and _last_line(proof) == "it holds, tensors proven: they are what the members signed"
    table = json.loads((exported / "tapestry.json").read_text())
    assert table["state_digest"] == made.chain.state_digest_at(4)


def test_tensors_of_another_state_are_found_though_the_manifest_was_made_again(
    made: MadeHome, exported: Path, tmp_path: Path
) -> None:
    forged = tmp_path / "forged"
    shutil.copytree(exported, forged)
    export_home(made.home, tmp_path / "three", 3)
    shutil.copyfile(tmp_path / "three" / "model.safetensors", forged / "model.safetensors")
    write_manifest(forged)
    (fault,) = _verify(forged).faults
    assert str(fault) == "model.safetensors, epoch 4: its tensors are not those of the signed state"


def _other_numbers(folder: Path) -> None:
    """model.safetensors with the same names and other numbers."""
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    save_file({name: tensor + 1 for name, tensor in tensors.items()}, folder / "model.safetensors")


def _behind_an_index(folder: Path) -> None:
    """The signed tensors where an index names them, and others where transformers looks first."""
    from safetensors.torch import load_file

    weights = folder / "model.safetensors"
    names = list(load_file(weights))
    shutil.copyfile(weights, folder / "honest.safetensors")
    index = {"metadata": {}, "weight_map": dict.fromkeys(names, "honest.safetensors")}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    _other_numbers(folder)


def _beside_the_index(folder: Path) -> None:
    """The signed tensors in the one file, and an index for loaders that look for that first."""
    honest = (folder / "model.safetensors").read_bytes()
    _behind_an_index(folder)
    (folder / "model.safetensors").rename(folder / "honest.safetensors")
    (folder / "model.safetensors").write_bytes(honest)


def _named_by_the_config(folder: Path) -> None:
    shutil.copyfile(folder / "model.safetensors", folder / "honest.safetensors")
    _other_numbers(folder)
    (folder / "model.safetensors").rename(folder / "other.safetensors")
    (folder / "honest.safetensors").rename(folder / "model.safetensors")
    edit_json(folder / "config.json", lambda config: config.update(transformers_weights="other.safetensors"))


def _with_an_adapter(folder: Path) -> None:
    (folder / "adapter_config.json").write_text("{}")
    shutil.copyfile(folder / "model.safetensors", folder / "adapter_model.safetensors")


def _with_a_pickle(folder: Path) -> None:
    (folder / "pytorch_model.bin").write_bytes(b"x")


def _untied(folder: Path) -> None:
    """An output layer of one's own: the signed tensors are all there, and transformers takes one more."""
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] + 1
    save_file(tensors, folder / "model.safetensors")
    edit_json(folder / "config.json", lambda config: config.update(tie_word_embeddings=False))


def _one_tensor_more(folder: Path) -> None:
    _untied(folder)
    edit_json(folder / "config.json", lambda config: config.update(tie_word_embeddings=True))


@pytest.fixture(scope="module")
def tied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An export whose output layer is its embedding."""
    folder = tmp_path_factory.mktemp("tied")
    made = make_home(folder / "home", base_spec(folder / "home", "qwen2"))
    made.advance(2)
    export_home(made.home, folder / "out", 1)
    return folder / "out"


def _with_another_tokenizer(folder: Path) -> None:
    edit_json(folder / "tokenizer_config.json", lambda config: config.update(chat_template="obey"))


def _with_a_template_of_its_own(folder: Path) -> None:
    (folder / "chat_template.jinja").write_text("obey")


def _with_other_angles(folder: Path) -> None:
    edit_json(folder / "config.json", lambda config: config["rope_parameters"].update(rope_theta=5e5))


def _with_another_end(folder: Path) -> None:
    edit_json(folder / "config.json", lambda config: config.update(eos_token_id=7))


def _with_another_config_of_the_base(folder: Path) -> None:
    """Both: that of the export is then what follows from it."""
    for path in (folder / "config.json", folder / "lineage" / "config.json"):
        table = json.loads(path.read_bytes())
        path.write_text(json.dumps(table | {"rms_norm_eps": 0.5}, indent=2, sort_keys=True) + "\n")


def _with_another_member(folder: Path) -> None:
    path = folder / "tapestry.json"
    table = json.loads(path.read_bytes())
    table["members"][0]["share"] = 0.99
    path.write_text(json.dumps(table, indent=2, sort_keys=True) + "\n")


FORGERIES = (
    _with_other_angles,
    _with_another_end,
    _with_another_config_of_the_base,
    _with_another_member,
    _with_another_tokenizer,
    _with_a_template_of_its_own,
    _behind_an_index,
    _beside_the_index,
    _named_by_the_config,
    _with_an_adapter,
    _with_a_pickle,
    _untied,
    _one_tensor_more,
)


@pytest.mark.parametrize("forge", FORGERIES)
def test_an_export_that_loads_other_numbers_or_texts_than_the_signed_ones_does_not_hold(
    tied: Path, tmp_path: Path, forge: Callable[[Path], None]
) -> None:
    """The signed tensors lie in all of them, and the manifest was made again."""
    forged = tmp_path / "forged"
    shutil.copytree(tied, forged)
    assert _verify(forged).holds
    forge(forged)
    write_manifest(forged)
    assert _verify(forged).faults


# ---- one bit in each file of each kind of export -----------------------------------------------------


@dataclass(frozen=True)
class Kind:
    """An export of a run of its own."""

    family: str  # of bases.py; "" for a preset
    rank: int = 0  # of adapters
    dtype: str = "f32"
    apart: bool = False
    file_bytes_max: int = FILE_BYTES_MAX
    unproven: tuple[str, ...] = ()  # files of which somebody may write others, with a manifest of his own


KINDS = {
    "preset": Kind(""),
    "base": Kind("qwen2"),
    "rounded": Kind("llama", dtype="bf16", unproven=("model.safetensors",)),
    "several files": Kind("gpt2", file_bytes_max=30_000),
    "adapters": Kind("llama", rank=4, apart=True),
    "merged": Kind("llama", rank=4, unproven=("model.safetensors",)),
}


@pytest.fixture(scope="module", params=KINDS)
def kind(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Kind, Path]:
    """Of each kind one that holds, of an epoch that was signed."""
    kind, folder = KINDS[request.param], tmp_path_factory.mktemp("kind")
    rank = {"lora_rank": kind.rank, "pin_weights": True} if kind.rank else {}
    spec = base_spec(folder / "home", kind.family, **rank) if kind.family else PRESETS["nano"].model  # type: ignore[arg-type]
    made = make_home(folder / "home", spec)
    made.advance(2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(export, "Form", lambda *how: Form(*how, file_bytes_max=kind.file_bytes_max))
        export_home(made.home, folder / "out", 1, dtype=kind.dtype, adapters=kind.apart)
    assert _verify(folder / "out").faults == []
    return kind, folder / "out"


def _missed(out: Path, files: list[Path], forge: bool) -> list[str]:
    """Flips of which `verify` does not name the file; `forge`: with a manifest that was made again."""
    rng, missed = random.Random(7), []
    for path in files:
        for _ in range(3):
            with flipped(path, rng) as flip:
                if forge:
                    write_manifest(out)
                named = {fault.file for fault in _verify(out).faults}
                cut = {path.name, "model.safetensors"} if path.name.startswith("model-0") else set()
                if not named & {path.relative_to(out).as_posix(), *cut}:
                    missed.append(f"{flip}: {sorted(named)}")
    write_manifest(out)
    return missed


def test_a_flipped_bit_is_found_and_its_file_named_in_every_file_of_every_kind_of_export(
    kind: tuple[Kind, Path],
) -> None:
    _, out = kind
    assert _missed(out, files_below(out), forge=False) == []


def test_with_a_manifest_that_was_made_again_it_is_found_but_in_the_card_and_in_what_was_rounded_or_merged(
    kind: tuple[Kind, Path],
) -> None:
    how, out = kind
    unproven = {"README.md", "manifest.json", *how.unproven}
    files = [path for path in files_below(out) if path.name not in unproven]
    assert _missed(out, files, forge=True) == []


def test_a_name_in_what_a_stranger_gave_moves_no_terminal(kind: tuple[Kind, Path]) -> None:
    _, out = kind
    foreign = out / "\x1b[2J\nit holds"
    foreign.touch()
    try:
        told = [*proof_lines(_verify(out))]
    finally:
        foreign.unlink()
    assert any("?[2J it holds" in line for line in told) and all(line.isprintable() for line in told)


def _last_line(proof: Proof) -> str:
    return [*proof_lines(proof)][-1]


def _says(*words: object) -> tuple[int, str]:
    """Exit code and last line."""
    run = CliRunner().invoke(cli, [str(word) for word in words])
    return run.exit_code, run.stdout.splitlines()[-1]


def _forge(out: Path, *, digests: bool) -> None:
    """Other numbers, with a manifest that fits them; `digests`: those of tapestry.json, too."""
    weights = out / "model.safetensors"
    tensors = load_file(weights)
    for tensor in tensors.values():
        tensor += 0.5
    layout = [name for name, _ in json.loads((out / "tapestry.json").read_bytes())["layout"]]
    write_weights(
        weights.with_suffix(".new"), [Source(n, tuple(t.shape), t.dtype, t.clone) for n, t in tensors.items()]
    )
    weights.with_suffix(".new").rename(weights)
    digest = blake3(b"".join(tensors[name].float().numpy().tobytes() for name in layout)).hexdigest()
    if digests:
        table = json.loads((out / "tapestry.json").read_bytes())
        vectors = {**dict(table["vectors"]), "params": digest}
        genesis, _ = read_genesis(out / "lineage" / "genesis.json", ReaderCrypto())
        table["vectors"] = [list(pair) for pair in vectors.items()]
        table["state_digest"] = state_digest_of(genesis.schema, genesis.params, vectors)
        (out / "tapestry.json").write_bytes(json_text(table))
    write_manifest(out)


def test_what_is_exported_by_default_is_proven_by_signatures(made: MadeHome, tmp_path: Path) -> None:
    out = tmp_path / "out"
    run = CliRunner().invoke(cli, ["export", str(out), "--home", str(made.home.path)])
    assert run.exit_code == 0 and run.stdout.splitlines() == [
        f"wrote {out}: epoch 4, the newest whose state was signed; the head, 5, is --epoch head",
        "tapestry verify proves its tensors by what members signed",
    ]
    assert _says("verify", out) == (0, "it holds, tensors proven: they are what the members signed")
    for digests, what in ((False, "tensors are not those"), (True, "another state digest than the record")):
        _forge(out, digests=digests)
        assert _says("verify", out) == (1, "it does not hold: 1 fault")
        assert what in _verify(out).faults[0].what


@pytest.mark.parametrize(
    ("how", "why"),
    [
        (("--epoch", "head"), "epoch 5 was the head, whose state nobody had signed yet"),
        (("--dtype", "bf16"), "they were rounded to bfloat16"),
        (("--epoch", "head", "--dtype", "bf16"), "epoch 5 was the head"),
    ],
    ids=["head", "bf16", "both"],
)
def test_what_signatures_do_not_reach_is_not_taken_for_proven_and_a_home_proves_it(
    made: MadeHome, tmp_path: Path, how: tuple[str, ...], why: str
) -> None:
    out, home = tmp_path / "out", made.home.path
    run = CliRunner().invoke(cli, ["export", str(out), "--home", str(home), *how])
    assert run.exit_code == 0 and f"are NOT proven: {why}" in run.stdout
    code, last = _says("verify", out)
    assert code == 1 and last.startswith(f"no file is damaged, but tensors NOT proven: {why}")
    assert _says("verify", out, "--allow-unproven") == (0, last)
    told = json.loads(CliRunner().invoke(cli, ["verify", str(out), "--json"]).stdout)
    assert (told["holds"], told["proven"]) == (True, False) and told["unproven"].startswith(why)
    assert _says("verify", out, "--against", home) == (
        0,
        "it holds, tensors proven: they are what the members signed",
    )
    _forge(out, digests="head" in how)  # which nobody can tell from the export alone
    assert _says("verify", out)[0] == 1 and _verify(out).holds
    code, last = _says("verify", out, "--against", home)
    assert code == 1 and last.startswith("it does not hold: ")
    (first, *_) = _verify(out, against=home).faults
    assert first.file in ("tapestry.json", "model.safetensors") and str(home) in first.what


def test_a_rounded_export_is_proven_by_one_in_f32_of_the_same_epoch(
    made: MadeHome, exported: Path, tmp_path: Path
) -> None:
    half, head = tmp_path / "half", tmp_path / "head"
    export_home(made.home, half, None, dtype="bf16")
    proof = _verify(half, against=exported)
    assert proof.proven and proof.unproven == ""
    assert proof.notes == [f"its tensors were compared with those of {exported}, which are proven"]
    export_home(made.home, head, "head")
    export_home(made.home, tmp_path / "three", 3)
    for other, why in ((head, "they are not proven in it either"), (tmp_path / "three", "of another state")):
        proof = _verify(half, against=other)
        assert proof.holds and not proof.proven and why in proof.unproven
    (weights,) = half.glob("*.safetensors")
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    write_manifest(half)
    assert _verify(half).holds and not _verify(half).proven
    (fault,) = _verify(half, against=exported).faults
    assert fault.file == "model.safetensors" and fault.what.endswith(f"is not that of {exported}, rounded")


def test_a_home_that_does_not_hold_or_is_of_another_run_proves_nothing(
    made: MadeHome, copy: Home, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    export_home(made.home, out, None, dtype="bf16")
    (path,) = copy.updates.glob("00000003-*")
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    other = make_home(tmp_path / "other", PRESETS["nano"].model)
    other.advance(5)
    for home, why in ((copy.path, "does not hold itself"), (other.home.path, "is of the run")):
        proof = _verify(out, against=home)
        assert proof.holds and proof.proven is False and why in proof.unproven
    with pytest.raises(UserError, match="--against is for exports"):
        _verify(made.home.path, against=out)


def test_a_head_that_no_replay_leads_to_proves_nothing(made: MadeHome, copy: Home, tmp_path: Path) -> None:
    """Only its checkpoint is there, and nobody has signed that."""
    export_home(made.home, tmp_path / "head", "head")
    for path in [*copy.updates.iterdir(), *copy.checkpoints.glob("0000000[0-4]-*")]:
        path.unlink()
    proof = _verify(tmp_path / "head", against=copy.path)
    assert (
        proof.holds and not proof.proven and "nothing in it leads to the state of epoch 5" in proof.unproven
    )


@pytest.mark.parametrize("members", [2, 3], ids=["two", "an island of three"])
def test_what_one_member_made_alone_is_not_what_the_members_signed(tmp_path: Path, members: int) -> None:
    """Two go on alone if they lose each other; where three wait, one is on an island."""
    home, out, half = tmp_path / "home", tmp_path / "out", tmp_path / "half"
    made = make_home(home, PRESETS["nano"].model, members=members)
    made.advance(3)
    if members > 2:
        begin(made.home)
    made.advance(2, alone=True)
    on = ", on an island" if members > 2 else ""
    alone = (
        f"from epoch 4 on made by 1 of {members} members alone{on}; members signed the states up to epoch 2"
    )
    for epoch in (3, 4, 5):  # record 4 is one member's, and it is what says which state that of epoch 3 is
        run = CliRunner().invoke(cli, ["export", str(out), "--home", str(home), "--epoch", str(epoch)])
        assert run.stdout.splitlines()[-1].endswith(f"NOT proven: {alone}")
        assert _says("verify", out) == (1, f"no file is damaged, but tensors NOT proven: {alone}")
        proof = _verify(out, against=home)
        assert proof.holds and not proof.proven
        assert proof.unproven.endswith("its records from epoch 4 on were made by fewer than a majority")
        shutil.rmtree(out)
    export_home(made.home, out, 2)
    assert _verify(out).proven
    export_home(made.home, half, 2, dtype="bf16")
    assert _verify(half, against=home).proven
    told = _verify(home)
    assert told.holds and told.alone_from == 4 and "from epoch 4 on made" in told.notes[0]
    export_home(made.home, tmp_path / "torn", 4)
    chain = tmp_path / "torn" / "lineage" / "chain.jsonl"
    chain.write_bytes(chain.read_bytes().replace(b'"forced":true', b'"forced":false', 1))
    write_manifest(tmp_path / "torn")
    assert not _verify(tmp_path / "torn").holds


def test_what_was_made_alone_is_proven_once_a_majority_stands_behind_it(tmp_path: Path) -> None:
    made = make_home(tmp_path / "home", PRESETS["nano"].model)
    made.advance(2)
    made.advance(2, alone=True)
    export_home(made.home, tmp_path / "alone", 3)
    made.advance(3)  # record 6 says that both signed record 5
    assert _verify(made.home.path).alone_from is None and _verify(made.home.path).notes == []
    assert not _verify(tmp_path / "alone").proven
    assert _verify(tmp_path / "alone", against=made.home.path).proven
    written = export_home(made.home, tmp_path / "again", 3)
    proof = _verify(tmp_path / "again")
    assert (written.unprovable, proof.proven, proof.records) == ("", True, 6)


def test_a_home_whose_node_prunes_while_it_is_verified_proves_no_less(made: MadeHome, copy: Home) -> None:
    """Its oldest files go when all were listed: before their turn, after it, and while they are replayed."""
    half, home = copy.path.parent / "half", Home(copy.path.parent / "live")
    export_home(made.home, half, None, dtype="bf16")
    for when, path in (
        *((("updates", 1), (2, 5)), (("checkpoints", 3), (2, 5))),
        (("replaying", 1), (0, 1)),
    ):

        def prune(what: str, done: int, _total: int, when: tuple[str, int] = when) -> None:
            if (what, done) == when:
                for one in (*home.updates.glob("0000000[12]-*"), *home.checkpoints.glob("00000000-*")):
                    one.unlink()

        for verified in (home.path, half):
            shutil.copytree(copy.path, home.path)
            proof = verify(verified, against=None if verified == home.path else home.path, told=prune)
            assert len([*home.updates.iterdir()]) == 3 and proof.faults == []
            assert proof.proven if verified == half else (proof.replayed_from, proof.replayed_to) == path
            shutil.rmtree(home.path)


def test_what_is_not_compared_is_said(made: MadeHome, exported: Path, tmp_path: Path) -> None:
    """Of an export that is proven already, of one that does not hold, and where there is nothing there."""
    with pytest.raises(UserError, match="nowhere is neither a home with a run nor an export"):
        _verify(exported, against=tmp_path / "nowhere")
    proof, home = _verify(exported, against=made.home.path), made.home.path
    assert proof.proven
    assert proof.notes == [
        f"nothing was compared with {home}: what members signed proves its tensors already"
    ]
    shutil.copytree(exported, tmp_path / "torn")
    (tmp_path / "torn" / "config.json").unlink()
    proof = _verify(tmp_path / "torn", against=home)
    assert proof.faults and proof.notes == [f"nothing was compared with {home}: the export does not hold"]


@pytest.mark.parametrize("family", ["qwen2", "mixtral"])
def test_rounded_weights_of_tied_and_of_mixed_models_are_compared_too(tmp_path: Path, family: str) -> None:
    made = make_home(tmp_path / "home", base_spec(tmp_path / "home", family))
    made.advance(2)
    export_home(made.home, tmp_path / "half", None, dtype="bf16")
    export_home(made.home, tmp_path / "whole", None)
    for other in ("home", "whole"):
        assert _verify(tmp_path / "half", against=tmp_path / other).proven


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_exports_of_every_family_hold_in_one_file_and_in_several(
    tmp_path: Path, family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Mixtures are stored in other pieces than they are built of."""
    made = make_home(tmp_path / "home", base_spec(tmp_path / "home", family))
    made.advance(2)
    export_home(made.home, tmp_path / "out", 1)
    monkeypatch.setattr(export, "Form", lambda *how: Form(*how, file_bytes_max=30_000))
    export_home(made.home, tmp_path / "cut", 1)
    assert (tmp_path / "cut" / "model.safetensors.index.json").exists()
    for name in ("out", "cut"):
        proof = _verify(tmp_path / name)
        assert proof.holds and proof.notes == [], proof.faults


def test_adapters_apart_are_checked_and_merged_ones_say_how(tmp_path: Path) -> None:
    spec = base_spec(tmp_path / "home", "llama", lora_rank=4, pin_weights=True)
    made = make_home(tmp_path / "home", spec)
    made.advance(2)
    export_home(made.home, tmp_path / "apart", 1, adapters=True)
    proof = _verify(tmp_path / "apart")
    assert proof.holds and proof.notes == [] and proof.proven
    export_home(made.home, tmp_path / "half", 1, dtype="bf16", adapters=True)
    assert not _verify(tmp_path / "half").proven
    for other in ("apart", "home"):
        assert _verify(tmp_path / "half", against=tmp_path / other).proven
    export_home(made.home, tmp_path / "merged", 1)
    for against in (None, tmp_path / "home"):
        proof = _verify(tmp_path / "merged", against=against)
        assert proof.holds and not proof.proven and "with --adapters can be proven" in proof.unproven
        assert against is None or "nothing was compared with" in proof.notes[0]


def test_what_is_neither_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="neither a home with a run nor an export"):
        _verify(tmp_path)


# ---- which epoch is exported ----


def test_of_a_run_of_one_epoch_the_head_is_exported_and_of_one_of_none_what_it_began_from(
    tmp_path: Path,
) -> None:
    made = make_home(tmp_path / "home", PRESETS["nano"].model)
    made.advance(0, checkpoint=True)
    written = export_home(made.home, tmp_path / "none", None)
    assert (written.epoch, written.signed, written.unprovable) == (0, True, "")
    assert _verify(tmp_path / "none").proven, "the founder signed it in the genesis"
    made.advance(1)
    code, last = _says("export", tmp_path / "one", "--home", made.home.path)
    assert code == 0 and "NOT proven: epoch 1 was the head" in last
    assert _verify(tmp_path / "one").epoch == 1


def test_a_home_that_does_not_lead_to_what_was_signed_exports_the_newest_that_it_has(
    copy: Home, tmp_path: Path
) -> None:
    for path in [*copy.updates.iterdir(), *copy.checkpoints.glob("0000000[0-4]-*")]:
        path.unlink()
    run = CliRunner().invoke(cli, ["export", str(tmp_path / "out"), "--home", str(copy.path)])
    assert "epoch 5, the head, for this home does not lead to the one below" in run.stdout
    assert "NOT proven: epoch 5 was the head" in run.stdout


def test_after_a_rollback_the_state_that_it_went_back_to_is_exported_not_what_it_undid(
    tmp_path: Path,
) -> None:
    made = make_home(tmp_path / "home", PRESETS["nano"].model)
    made.advance(4, checkpoint=True)
    made.roll_back(2, "xyz lied in epoch 3")
    written = export_home(made.home, tmp_path / "out", None)
    table = json.loads((tmp_path / "out" / "tapestry.json").read_bytes())
    assert (written.epoch, table["state_digest"]) == (5, made.chain.state_digest_at(2))
    assert _verify(tmp_path / "out").proven


# ---- rolled back -------------------------------------------------------------------------------------


def test_a_run_that_was_rolled_back_is_proven_logged_and_exported_by_the_path_to_its_state(
    tmp_path: Path,
) -> None:
    made = make_home(tmp_path / "home", PRESETS["nano"].model)
    made.advance(2)
    made.advance(2, checkpoint=True)
    undone = made.state.digest()
    made.roll_back(2, "xyz lied in epoch 3")
    made.advance(1)
    proof = _verify(made.home.path)
    assert proof.holds, proof.faults
    assert (proof.replayed_from, proof.replayed_to) == (0, 6)
    assert proof.notes == ["epoch 5: the state is that of epoch 2 again"]
    apart = _verify(made.home.path, jobs=2)
    assert apart.holds and apart.notes == proof.notes
    told = [line.strip() for line in lines(read_log(made.home, None))]
    assert "epoch 5: the state is that of epoch 2 again, because xyz lied in epoch 3" in told
    export_home(made.home, tmp_path / "out", 5)
    assert _verify(tmp_path / "out").proven
    table = json.loads((tmp_path / "out" / "tapestry.json").read_text())
    assert table["epoch"] == 5 and table["state_digest"] == made.chain.state_digest_at(2) != undone
    founder = made.identities[0].peer_id
    told = {one["peer"]: one["tokens"] for one in table["members"]}
    assert told[founder] == 2 * 300  # of what was undone nothing is in it


def test_a_checkpoint_of_another_state_than_the_one_that_the_newest_record_goes_back_to_is_found(
    tmp_path: Path,
) -> None:
    """Nobody has signed it under this epoch yet; but it was signed before, under the one that is named."""
    made = make_home(tmp_path / "home", PRESETS["nano"].model)
    made.advance(3)
    undone = made.fresh_copy()
    made.roll_back(1, "")
    for ours, theirs in zip(made.state.overwrite(), undone, strict=True):
        ours[:] = theirs
    made.state.adopt(4, made.chain.head, made.state._hash())
    made.checkpoints.save(made.state, made.state.digest())
    (path,) = made.home.checkpoints.glob("00000004-*")
    (fault, *_) = _verify(made.home.path).faults
    assert (fault.file, fault.epoch) == (f"checkpoints/{path.name}", 4)
    assert fault.what == "its digest is not the one that the record signed"


def test_a_record_that_goes_on_from_what_was_undone_does_not_hold(tmp_path: Path) -> None:
    made = make_home(tmp_path / "home", PRESETS["nano"].model)
    made.advance(3)
    undone = made.fresh_copy()
    made.roll_back(1, "")
    made.state.overwrite()
    for ours, theirs in zip(made.state.overwrite(), undone, strict=True):
        ours[:] = theirs
    made.state.adopt(4, made.chain.head, made.state._hash())
    made.advance(1)
    (fault,) = [fault for fault in _verify(made.home.path).faults if fault.file == "chain.jsonl"]
    assert "its state is not that of epoch 1" in fault.what
