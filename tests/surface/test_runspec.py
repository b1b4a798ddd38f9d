"""run.toml: strict reading, the canonical form, differences, and the file that `init` writes."""

from __future__ import annotations

import json
import tomllib
import unicodedata
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tapestry.compression.means.registry import mean_names
from tapestry.node.errors import ExitCode, UserError
from tapestry.node.protocol.settings import SETTINGS
from tapestry.node.spec.run import (
    LATER,
    LATER_KEYS,
    AdamWSpec,
    ClippedSpec,
    CompressionSpec,
    DataSpec,
    LimitsSpec,
    MeanSpec,
    NesterovSpec,
    RoundSpec,
    RunSpec,
    TrainSpec,
    diff,
    preset_spec,
    proposals,
    training_spec,
)
from tapestry.node.spec.tables import FILE_BYTES_MAX, Between, Key, is_section, keys_of, plain, read_table
from tapestry.node.spec.training import PRESETS, TrainingSpec
from tapestry.node.state.means import mean_of

DEFAULT = RunSpec.from_dict({"name": "demo"})


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({}, "name: missing"),
        ({"name": ""}, 'name: "" is not a string of 1 to 64 letters'),
        ({"name": "a\x1b[31m"}, 'name: "a\\u001b[31m" is not a string of 1 to 64 letters'),
        ({"name": "-x"}, 'name: "-x" is not a string of 1 to 64 letters'),
        ({"name": 3}, "name: 3 is not a string"),
        ({"name": "x", "trian": {}}, "trian: unknown key; did you mean train?"),
        ({"name": "x", "qqqq": 1}, "qqqq: unknown key; known here: name, model, data, train,"),
        ({"name": "x", "train": 3}, "train: 3 is not a table"),
        ({"name": "x", "train": [1]}, "train: [1] is not a table"),
        (
            {"name": "x", "train": {"inner_step": 3}},
            "train.inner_step: unknown key; did you mean train.inner_steps?",
        ),
        (
            {"name": "x", "train": {"inner_steps": -1}},
            "train.inner_steps: -1 is not an integer from 0 to 100000",
        ),
        ({"name": "x", "train": {"inner_steps": 1.5}}, "train.inner_steps: 1.5 is not an integer"),
        ({"name": "x", "train": {"inner_steps": True}}, "train.inner_steps: true is not an integer"),
        ({"name": "x", "train": {"inner_steps": "50"}}, 'train.inner_steps: "50" is not an integer'),
        (
            {"name": "x", "train": {"inner_steps": 10**5000}},
            "train.inner_steps: a number of many digits is not an integer",
        ),
        ({"name": "x", "train": {"inner_steps": {}}}, "train.inner_steps: a table is not an integer"),
        ({"name": "x", "train": {"lr": 0}}, "train.lr: 0.0 is not a number above 0, at most 10"),
        ({"name": "x", "train": {"lr": float("nan")}}, "train.lr: nan is not a number"),
        ({"name": "x", "train": {"lr": float("inf")}}, "train.lr: inf is not a number"),
        ({"name": "x", "train": {"lr": 10**400}}, "train.lr: inf is not a number"),
        ({"name": "x", "train": {"lr": False}}, "train.lr: false is not a number"),
        ({"name": "x", "train": {"betas": 0.9}}, "train.betas: 0.9 is not a list of 2"),
        ({"name": "x", "train": {"betas": [0.9]}}, "train.betas: [0.9] is not a list of 2"),
        ({"name": "x", "train": {"betas": [0.9, 1]}}, "train.betas: 1.0 is not a number from 0"),
        ({"name": "x", "train": {"betas": [0.9, [[]]]}}, "train.betas: [[...]] is not a number"),
        ({"name": "x", "model": {"tie_embeddings": 1}}, "model.tie_embeddings: 1 is not true or false"),
        ({"name": "x", "data": {"tokenizer": ["byte"]}}, 'data.tokenizer: ["byte"] is not "byte"'),
        (
            {"name": "x", "compression": {"codec": "int8"}},
            'compression.codec: "int8" is not "int8-block" or "bnb-dynamic8"',
        ),
        (
            {"name": "x", "compression": {"shard_elements": 1000}},
            "compression.shard_elements: 1000 is not an integer from 256 to 67108864, a multiple of 256",
        ),
        ({"name": "x", "round": {"max_influence": 0.0}}, "round.max_influence: 0.0 is not a number above 0"),
        ({"name": "x", "outer": {"optimizer": "sgd"}}, 'outer.optimizer: "sgd" is not "nesterov" or "adamw"'),
        ({"name": "x", "outer": {"optimizer": []}}, 'outer.optimizer: [] is not "nesterov" or "adamw"'),
        (
            {"name": "x", "outer": {"optimizer": "adamw", "momentum": 0.9}},
            'outer.momentum: no key of optimizer = "adamw", which takes lr, betas, eps, weight_decay',
        ),
        (
            {"name": "x", "mean": {"rule": "mean", "norm_max": 2.0}},
            'mean.norm_max: no key of rule = "mean", which takes nothing else',
        ),
        (
            {"name": "x", "mean": {"norm_max": 0}},
            "mean.norm_max: 0.0 is not a number above 0, at most 1000",
        ),
        (
            {"name": "x", "outer": {"betas": [0.9, 0.9]}},
            'outer.betas: no key of optimizer = "nesterov", which takes lr, momentum',
        ),
        (
            {"name": "x", "model": {"hidden_size": 100, "heads": 3}},
            "model.hidden_size: 100 with model.heads = 3; must be a multiple of 6",
        ),
        (
            {"name": "x", "model": {"heads": 4, "kv_heads": 3}},
            "model.kv_heads: 3 with model.heads = 4; must divide model.heads",
        ),
        ({"name": "e\u200b"}, "name: "),  # a blank of no width
        ({"name": "\u0301a"}, "name: "),  # a mark without its letter
        (
            {"name": "x", "train": {"inner_steps": 0, "overlap": True}},
            "train.overlap: true with train.inner_steps = 0; a mean gradient waits for its round",
        ),
        (
            {"name": "x", "round": {"min_members": 9}, "limits": {"max_peers": 8}},
            "round.min_members: 9 with limits.max_peers = 8; must not be larger",
        ),
        (
            {"name": "x", "limits": {"max_peers": 64, "max_control_frame_bytes": 30_000}},
            "limits.max_control_frame_bytes: 30000 with limits.max_peers = 64; must be at least 148480, ",
        ),
    ],
)
def test_a_wrong_key_or_value_is_named_with_what_is_allowed(table: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as caught:
        RunSpec.from_dict(table, "run.toml")
    assert caught.value.line.startswith(f"run.toml: {message}")
    assert caught.value.exit_code == ExitCode.USAGE
    assert len(caught.value.line) < 250


def test_an_integer_will_do_for_a_number_and_makes_the_same_spec() -> None:
    one = RunSpec.from_dict({"name": "x", "outer": {"lr": 1}})
    assert one.canonical() == RunSpec.from_dict({"name": "x", "outer": {"lr": 1.0}}).canonical()


def test_a_wait_is_auto_or_a_number_and_keeps_its_bounds(tmp_path: Path) -> None:
    assert (DEFAULT.round.straggler_wait_s, DEFAULT.round.exchange_max_s) == ("auto", "auto")
    fixed = RunSpec.from_dict({"name": "x", "round": {"straggler_wait_s": 7, "quorum_loss_s": "auto"}})
    assert (fixed.round.straggler_wait_s, fixed.round.quorum_loss_s) == (7.0, "auto")
    (tmp_path / "run.toml").write_text(fixed.to_toml(), encoding="utf-8")
    assert RunSpec.load(tmp_path / "run.toml") == RunSpec.from_canonical(fixed.canonical()) == fixed
    for wrong in (-1, "automatic", True, [5.0]):
        with pytest.raises(UserError, match=r'straggler_wait_s: .* is not "auto" or a number from 0'):
            RunSpec.from_dict({"name": "x", "round": {"straggler_wait_s": wrong}})


def test_minus_zero_is_zero_so_that_equal_specs_have_equal_bytes() -> None:
    minus = RunSpec.from_dict({"name": "x", "train": {"weight_decay": -0.0}})
    assert minus.canonical() == RunSpec.from_dict({"name": "x", "train": {"weight_decay": 0}}).canonical()


def test_each_outer_optimizer_has_its_own_keys_and_defaults() -> None:
    assert DEFAULT.outer == NesterovSpec("nesterov", lr=0.7, momentum=0.9)
    assert RunSpec.from_dict({"name": "x", "outer": {"optimizer": "adamw"}}).outer == AdamWSpec()


def test_a_new_run_clips_and_every_mean_of_the_spec_can_be_made() -> None:
    assert DEFAULT.mean == ClippedSpec(norm_max=1.5)
    specs = [kind() for kind in get_args(MeanSpec)]
    assert sorted(spec.rule for spec in specs) == sorted(mean_names())
    for spec in specs:
        assert mean_of(RunSpec.from_dict({"name": "x", "mean": {"rule": spec.rule}}).mean) is not None


# ---- files -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"name = ", "not valid TOML: "),
        (b'name = "a"\nname = "b"', "not valid TOML: "),
        (b'name = "\xff"', "not UTF-8 text"),
        (b"x = " + b"[" * 5000, "not valid TOML: "),
        (b"x = " + b"1" * 5000, "not valid TOML: "),
        (b"#" * (FILE_BYTES_MAX + 1), "larger than 65536 bytes"),
        (b'name = "x"\n[train]\nlr = 1979-05-27', "train.lr: "),
    ],
)
def test_a_broken_file_is_one_line_that_names_it(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "run.toml"
    path.write_bytes(content)
    with pytest.raises(UserError) as caught:
        RunSpec.load(path)
    assert caught.value.line.startswith(f"{path}: {message}")
    assert caught.value.exit_code == ExitCode.USAGE


def test_a_missing_file_or_a_folder_is_named(tmp_path: Path) -> None:
    for path in (tmp_path / "none.toml", tmp_path):
        with pytest.raises(UserError, match=str(path)):
            RunSpec.load(path)


@pytest.mark.parametrize("preset", PRESETS)
def test_a_preset_survives_run_toml_and_gives_the_trainer_its_own_numbers(
    tmp_path: Path, preset: str
) -> None:
    spec = preset_spec(preset, "demo")
    path = tmp_path / "run.toml"
    path.write_text(spec.to_toml(), encoding="utf-8")
    assert RunSpec.load(path) == spec
    assert training_spec(RunSpec.load(path)) == PRESETS[preset]


def test_the_defaults_are_the_preset_tiny() -> None:
    assert preset_spec("tiny", "demo") == DEFAULT


def test_an_unknown_preset_is_refused_with_the_known_ones() -> None:
    with pytest.raises(UserError, match='"huge" is no preset; there are nano, tiny, small'):
        preset_spec("huge", "demo")


def test_every_key_of_the_file_has_a_comment_above_it() -> None:
    lines = DEFAULT.to_toml().splitlines()
    for index, line in enumerate(lines):
        if line and not line.startswith("#"):
            assert lines[index - 1].startswith("#") or lines[index - 1].startswith("["), line
    assert max(map(len, lines)) <= 100


# ---- the canonical form ------------------------------------------------------------------------------


def _values(key: Key) -> st.SearchStrategy[Any]:
    kind = key.kind
    if get_origin(kind) is Literal:
        return st.sampled_from(get_args(kind))
    if get_origin(kind) is tuple:
        element = Key(get_args(kind)[0], key.rule, "")
        return st.lists(_values(element), min_size=2, max_size=2)
    if kind is bool:
        return st.booleans()
    assert isinstance(key.rule, Between)
    if kind is int:
        step = key.rule.multiple_of
        return st.integers(-(-int(key.rule.low) // step), int(key.rule.high) // step).map(lambda n: n * step)
    return st.floats(key.rule.low, key.rule.high, exclude_min=key.rule.above)


def _section(kind: type) -> st.SearchStrategy[dict[str, Any]]:
    return st.fixed_dictionaries({name: _values(key) for name, key in keys_of(kind)})


@st.composite
def _specs(draw: st.DrawFn) -> RunSpec:
    kv_heads, group, half_width = draw(st.integers(1, 8)), draw(st.integers(1, 4)), draw(st.integers(4, 40))
    heads = kv_heads * group
    limits = draw(_section(LimitsSpec))
    rounds = draw(_section(RoundSpec))
    train = draw(_section(TrainSpec))
    llama = {"hidden_size": 2 * half_width * heads, "heads": heads, "kv_heads": kv_heads}
    digest = draw(st.from_regex(r"[0-9a-f]{64}", fullmatch=True))
    files = [f"{name} 9 {digest}" for name in ("config.json", "tokenizer.json", "model.safetensors")]
    base = {
        "architecture": "transformers",
        "files": files,
        "weights": digest,
        "parameters": 7,
        "lora_rank": 2,
    }
    data = draw(_section(DataSpec))
    table = {
        "name": draw(st.from_regex(r"[A-Za-z0-9][A-Za-z0-9 ._-]{0,63}", fullmatch=True)),
        "model": draw(st.sampled_from([llama, base])),
        "data": data,
        "train": train
        | {
            "overlap": train["overlap"] and train["inner_steps"] > 0,
            "schedule_steps": max(1, train["schedule_steps"]),
        },
        "compression": draw(_section(CompressionSpec)),
        "mean": draw(st.one_of(*(_section(kind) for kind in get_args(MeanSpec)))),
        "outer": draw(st.one_of(_section(NesterovSpec), _section(AdamWSpec))),
        "round": rounds | {"min_members": min(rounds["min_members"], limits["max_peers"])},
        "limits": limits | {"max_control_frame_bytes": max(2**21, limits["max_control_frame_bytes"])},
    }
    if table["model"] is llama:
        table["data"] = data | {"tokenizer": "byte"}
    if table["data"]["tokenizer"] == "byte":
        table["data"] = table["data"] | {"add_bos": False}
    return RunSpec.from_dict(table)


@settings(deadline=None, max_examples=100)
@given(_specs())
def test_any_spec_survives_canonical_bytes_dict_and_toml_unchanged(spec: RunSpec) -> None:
    data = spec.canonical()
    assert RunSpec.from_canonical(data) == spec
    assert RunSpec.from_canonical(data).canonical() == data
    assert RunSpec.from_dict(spec.to_dict()) == spec
    assert RunSpec.from_dict(tomllib.loads(spec.to_toml())) == spec
    assert diff(spec, spec) == []


@settings(deadline=None, max_examples=50)
@given(_specs())
def test_the_trainer_takes_every_spec_that_can_be_read(spec: RunSpec) -> None:
    assert read_table(TrainingSpec, plain(training_spec(spec))) == training_spec(spec)


def test_the_canonical_form_is_sorted_ascii_json_without_blanks_and_names_every_key() -> None:
    table = json.loads(DEFAULT.canonical())
    assert DEFAULT.canonical() == json.dumps(table, sort_keys=True, separators=(",", ":")).encode("ascii")
    for section, key in keys_of(RunSpec):
        if is_section(key.kind):
            named = {name for name, _ in keys_of(type(getattr(DEFAULT, section)))}
            assert set(table[section]) == named - set(LATER_KEYS.get(section, ()))


@settings(deadline=None, max_examples=100)
@given(st.data())
def test_a_changed_byte_never_passes_for_the_same_spec(data: st.DataObject) -> None:
    canonical = DEFAULT.canonical()
    index = data.draw(st.integers(0, len(canonical) - 1))
    changed = bytearray(canonical)
    changed[index] ^= data.draw(st.integers(1, 255))
    try:
        spec = RunSpec.from_canonical(bytes(changed))
    except UserError as error:
        assert error.exit_code == ExitCode.REFUSED
    else:
        assert spec != DEFAULT


def test_every_truncation_of_a_peers_spec_is_refused() -> None:
    canonical = DEFAULT.canonical()
    for length in range(len(canonical)):
        with pytest.raises(UserError) as caught:
            RunSpec.from_canonical(canonical[:length])
        assert caught.value.exit_code == ExitCode.REFUSED


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"null",
        b"[]",
        b"\xff\xfe",
        b"[" * 60_000,
        b'{"name":"x"}',  # defaults are for people, not for peers
        b'{"name":"x","name":"y"}',
        DEFAULT.canonical() + b" ",
        DEFAULT.canonical().replace(b'"lr":0.7', b'"lr":0.70'),
        DEFAULT.canonical().replace(b'"lr":0.7', b'"lr":NaN'),
        DEFAULT.canonical().replace(b'"lr":0.7', b'"lr":1e999'),
        DEFAULT.canonical().replace(b'"layers":4', b'"layers":' + b"9" * 5000),
        DEFAULT.canonical().replace(b'"layers":4', b'"layers":4.0'),
        b'{"name":"' + b"x" * FILE_BYTES_MAX + b'"}',
    ],
)
def test_what_a_peer_sends_in_another_form_is_refused_with_exit_code_4(data: bytes) -> None:
    with pytest.raises(UserError, match="the run's spec is not one of this version") as caught:
        RunSpec.from_canonical(data)
    assert caught.value.exit_code == ExitCode.REFUSED


@pytest.mark.parametrize(("lacks", "says"), [("mean", "it has no mean"), ("train.lr", "it has no train.lr")])
def test_a_run_of_another_version_is_told_by_what_its_spec_lacks(lacks: str, says: str) -> None:
    table = json.loads(DEFAULT.canonical())
    name, _, key = lacks.partition(".")
    if key:
        del table[name][key]
    else:
        del table[name]
    data = json.dumps(table, sort_keys=True, separators=(",", ":")).encode()
    with pytest.raises(UserError, match=f"{says}$") as caught:
        RunSpec.from_canonical(data)
    assert caught.value.hint is not None and "changelog" in caught.value.hint


def test_a_run_that_is_older_than_a_section_is_read_as_nodes_behaved_before_it() -> None:
    table = json.loads(DEFAULT.canonical())
    assert set(LATER) <= set(table)
    del table["gate"]
    data = json.dumps(table, sort_keys=True, separators=(",", ":")).encode()
    spec = RunSpec.from_canonical(data)
    assert (spec.gate.margin, spec.gate.windows) == (0.0, 8)
    with pytest.raises(UserError, match="a value is written differently"):
        RunSpec.from_canonical(data + b" ")


def test_a_spec_that_does_not_need_a_later_key_has_the_text_that_it_had_before_the_key(
    tmp_path: Path,
) -> None:
    """Run ids of runs that were founded before it, and a run.toml that was written before it, stay."""
    base = _of_a_base(add_bos=False)
    before = tmp_path / "run.toml"
    before.write_text("".join(line for line in base.to_toml().splitlines(True) if "add_bos =" not in line))
    data = RunSpec.load(before).canonical()
    assert "add_bos" not in json.loads(data)["data"] and data == base.canonical()
    assert RunSpec.from_canonical(data) == RunSpec.load(before) == base
    begun = _of_a_base(add_bos=True)
    assert json.loads(begun.canonical())["data"]["add_bos"] is True
    assert RunSpec.from_canonical(begun.canonical()) == begun
    assert diff(base, begun) == ["data.add_bos: false here, true at the peer"]
    twice = begun.canonical().replace(b'"add_bos":true', b'"add_bos":false')
    with pytest.raises(UserError, match="a value is written differently"):
        RunSpec.from_canonical(twice)  # one spec, one text


def _of_a_base(*, add_bos: bool) -> RunSpec:
    files = [f"{name} 9 {'ab' * 32}" for name in ("config.json", "tokenizer.json")]
    model = {"architecture": "transformers", "files": files, "weights": "", "parameters": 7}
    data = {"tokenizer": "base", "add_bos": add_bos}
    return RunSpec.from_dict({"name": "demo", "model": model, "data": data})


# ---- differences -------------------------------------------------------------------------------------


def test_a_difference_is_a_line_with_both_values() -> None:
    here = RunSpec.from_dict({"name": "demo", "train": {"inner_steps": 50, "betas": [0.9, 0.95]}})
    peer = RunSpec.from_dict({"name": "demo", "train": {"inner_steps": 100, "betas": [0.8, 0.9]}})
    assert diff(here, peer) == [
        "train.inner_steps: 50 here, 100 at the peer",
        "train.betas: [0.9, 0.95] here, [0.8, 0.9] at the peer",
    ]


def test_a_key_that_only_one_side_has_is_a_difference() -> None:
    peer = RunSpec.from_dict({"name": "demo", "outer": {"optimizer": "adamw", "lr": 0.7}})
    assert diff(DEFAULT, peer) == [
        'outer.optimizer: "nesterov" here, "adamw" at the peer',
        "outer.momentum: 0.9 here, not at the peer",
        'outer.norm: "mean" here, not at the peer',
        "outer.betas: not here, [0.9, 0.95] at the peer",
        "outer.eps: not here, 1e-08 at the peer",
        "outer.weight_decay: not here, 0.0 at the peer",
    ]


def test_only_what_a_record_can_change_within_its_bounds_is_proposed() -> None:
    run = RunSpec.from_dict({"name": "demo"})
    here = RunSpec.from_dict({"name": "demo", "train": {"inner_steps": 0}, "outer": {"optimizer": "adamw"}})
    assert proposals(here, run) == ["outer.lr 0.001"], "0 inner steps make another kind of run"
    waits = RunSpec.from_dict({"name": "demo", "round": {"stall_s": 0.2, "quorum_loss_s": 60.0}})
    assert proposals(waits, run) == ["round.quorum_loss_s 60.0"]
    assert proposals(run, waits) == ["round.stall_s 5.0", 'round.quorum_loss_s "auto"']


def test_a_change_is_judged_by_the_bounds_of_run_toml() -> None:
    sections = dict(keys_of(RunSpec))
    for name, setting in SETTINGS.items():
        section, field = name.split(".")
        kinds = get_args(sections[section].kind) or (sections[section].kind,)
        for key in [dict(keys_of(kind))[field] for kind in kinds]:
            words = [word for kind in (key.kind, *get_args(key.kind)) for word in get_args(kind)]
            assert setting.whole == (key.kind is int)
            assert set(setting.words) == {word for word in words if isinstance(word, str)}
            if name in ("train.inner_steps", "round.stall_s"):  # narrower: see there
                assert key.rule.admits(setting.bounds.low) and key.rule.high == setting.bounds.high
            else:
                assert key.rule is setting.bounds


@pytest.mark.parametrize("name", ["Tiếng Việt", "日本語のラン", "हिन्दी", "فارسی می‌شود", "Ελληνικά", "Été 2"])
def test_a_run_has_a_name_in_the_language_of_its_people(name, tmp_path):
    spec = RunSpec.from_dict({"name": unicodedata.normalize("NFD", name)})
    assert spec.name == unicodedata.normalize("NFC", name), "one name has one spelling, whatever the keyboard"
    assert RunSpec.from_canonical(spec.canonical()) == spec
    path = tmp_path / "run.toml"
    path.write_text(spec.to_toml())
    assert RunSpec.load(path) == spec


@pytest.mark.parametrize(
    ("table", "said"),
    [
        ({"outer": {"optimizer": "adamw"}}, 'outer.optimizer: "adamw" with train.inner_steps = 64'),
        ({"train": {"inner_steps": 0}}, 'outer.optimizer: "nesterov" with train.inner_steps = 0'),
        ({"train": {"accumulation": 4}}, "train.accumulation: 4 with train.inner_steps = 64"),
    ],
)
def test_a_run_is_not_founded_on_settings_that_mean_nothing_and_goes_on_if_it_was(table, said, tmp_path):
    spec = RunSpec.from_dict({"name": "x"} | table)
    path = tmp_path / "run.toml"
    path.write_text(spec.to_toml())
    with pytest.raises(UserError) as refused:
        RunSpec.load_to_found(path)
    assert said in refused.value.line and "set " in refused.value.line
    assert RunSpec.load(path) == RunSpec.from_canonical(spec.canonical()) == spec
