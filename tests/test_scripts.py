"""scripts/quickstart and scripts/_env.py, as processes. The quickstart's nodes are tests/fake_tapestry.py.

That the real nodes pass the quickstart is the quickstart's own business; here is what it makes of nodes
that do not keep their promises, and that it leaves nothing behind.
"""

from __future__ import annotations

import ast
import dataclasses
import importlib.util
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
import tomllib
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from bases import make_base

ROOT = Path(__file__).resolve().parent.parent
FAKE = f"{shlex.quote(sys.executable)} -P {shlex.quote(str(ROOT / 'tests' / 'fake_tapestry.py'))}"
LIMIT_S = 180.0  # on a busy machine


@pytest.fixture
def quickstart(tmp_path: Path) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Starts scripts/quickstart.py with fake nodes; its temporary files go into tmp_path/tmp."""
    (tmp_path / "tmp").mkdir()
    started = []

    def start(*flags: str, fault: str = "") -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [sys.executable, "-P", ROOT / "scripts" / "quickstart.py", "--tapestry", FAKE, *flags],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env={**os.environ, "TMPDIR": str(tmp_path / "tmp"), "FAKE_FAULT": fault},
        )
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()


# ---- all of them -------------------------------------------------------------------------------------


FOREIGN = {"torchft", "mlx", "mlx_lm"}  # what they measure against, in a Python of its own


def test_every_module_that_a_script_imports_is_there() -> None:
    folders = [ROOT / folder for folder in ("scripts", "scripts/bench", "tests")]
    known = {path.stem for folder in folders for path in folder.iterdir()} | FOREIGN
    missing = []
    for script in sorted((ROOT / "scripts").rglob("*.py")):
        for line in ast.parse(script.read_text()).body:
            if isinstance(line, ast.ImportFrom):
                names = [line.module or ""]
            else:
                names = [one.name for one in line.names] if isinstance(line, ast.Import) else []
            first = [name.partition(".")[0] for name in names]
            missing += [(script.name, name) for name in first if name not in known and not find_spec(name)]
    assert missing == []


@pytest.mark.parametrize("browser", [None, "chromium", "google-chrome"])
def test_tests_of_the_page_are_run_or_said_to_be_left_out(tmp_path: Path, browser: str | None) -> None:
    """scripts/test with a Python that only says what it is asked for."""
    bins = tmp_path / "bin", tmp_path / ".venv" / "bin"
    for folder in (*bins, tmp_path / "scripts"):
        folder.mkdir(parents=True)
    for tool in ("dirname", "nice"):
        (bins[0] / tool).symlink_to(shutil.which(tool) or "")
    for program in (bins[1] / "python", bins[1] / "ruff", *([bins[0] / browser] if browser else [])):
        program.write_text('#!/bin/sh\necho "asked: $*"\n')
        program.chmod(0o755)
    (tmp_path / "scripts" / "_env.sh").write_text(f"root={tmp_path}\nvenv=$root/.venv\n")
    script = shutil.copy(ROOT / "scripts" / "test", tmp_path / "scripts")
    bash = shutil.which("bash") or ""
    done = subprocess.run([bash, script], env={"PATH": str(bins[0])}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    asked = "-m browser tests/surface/test_browser.py" in done.stdout
    left_out = "# browser: left out, there is no chromium" in done.stdout
    assert (asked, left_out) == (bool(browser), not browser), done.stdout


# ---- the quickstart as a process ---------------------------------------------------------------------


def test_the_story_is_told_to_its_end(quickstart: Any, tmp_path: Path) -> None:
    process = quickstart("--minutes", "0", "--keep", str(tmp_path / "kept"))
    output = process.communicate(timeout=LIMIT_S)[0]
    assert process.returncode == 0, output
    for part in (
        r"node 2: killed with SIGKILL at epoch \d+",
        r"nodes 1 and 3: went on by themselves to epoch \d+",
        r"node 2: caught up at epoch \d+",
        r"node 2: contributes again",
        r"node 1: validation loss \d\.\d{3} \(epoch \d+\) -> \d\.\d{3} \(epoch \d+\)",
        r"contributions and results: [\d.]+ MB sent in 8 bits; .* [\d.]+ MB \(x 3\.94\)",
        r"200 bytes of the exported model after 'def ':",
        r"OK: epoch \d+ has the same bits on all three nodes",
    ):
        assert re.search(part, output), part
    assert (tmp_path / "kept" / "node2" / "chain.jsonl").exists()
    assert _left_in(tmp_path / "tmp") == [] and _processes_in(tmp_path) == []


@pytest.mark.parametrize(
    ("fault", "line"),
    [
        ("digest:3", r"FAILED: epoch \d+ has two state digests: \w+ \(node \d\) and \w+ \(node \d\)"),
        ("gap:2", r"FAILED: node 2: the epochs of its chain are not 1, 2, 3 \.\.\.: \[1, 3"),
        ("loss:3", r"FAILED: node 3: validation loss 5\.500 is not 30% below \d\.\d{3}"),
        ("dies:3", r"FAILED: node 3 ended with exit code 3\n  node 3 \| error: no peer could be reached"),
        ("orphan:2", r"FAILED: waited \d+ s in vain for the children of node 2 to be gone"),
    ],
)
def test_a_broken_promise_ends_it_with_1_and_nothing_left(
    quickstart: Any, tmp_path: Path, fault: str, line: str
) -> None:
    process = quickstart("--minutes", "0", fault=fault)
    output = process.communicate(timeout=LIMIT_S)[0]
    assert process.returncode == 1 and re.search(line, output), output
    assert _left_in(tmp_path / "tmp") == [] and _processes_in(tmp_path) == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_ends_the_nodes_and_removes_their_homes(
    quickstart: Any, tmp_path: Path, number: signal.Signals
) -> None:
    process = quickstart()
    _wait_for_nodes(tmp_path, 3)
    process.send_signal(number)
    output = process.communicate(timeout=LIMIT_S)[0]
    assert process.returncode == 128 + number and number.name in output
    assert _left_in(tmp_path / "tmp") == [] and _processes_in(tmp_path) == []


def test_a_second_signal_does_not_wait_for_a_deaf_node(quickstart: Any, tmp_path: Path) -> None:
    process = quickstart(fault="deaf:1")
    _wait_for_nodes(tmp_path, 3)
    process.send_signal(signal.SIGINT)
    while "ended by SIGINT" not in process.stdout.readline():
        pass
    began_s = time.monotonic()
    process.send_signal(signal.SIGINT)
    output = process.communicate(timeout=LIMIT_S)[0]
    assert time.monotonic() - began_s < 6 and "node 1: does not end, killed with SIGKILL" in output
    assert _left_in(tmp_path / "tmp") == [] and _processes_in(tmp_path) == []


def test_the_nodes_end_also_when_the_quickstart_is_killed(quickstart: Any, tmp_path: Path) -> None:
    process = quickstart()
    _wait_for_nodes(tmp_path, 3)
    process.kill()
    _wait_for_nodes(tmp_path, 0)


@pytest.mark.parametrize(
    ("flags", "line"),
    [
        (["--minutes", "nan"], "--minutes: from 0 to 1440"),
        (["--seed", "-1"], "--seed: from 0 to"),
        (["--keep", str(ROOT / "scripts")], "name a new or an empty folder"),
        (["--base", str(ROOT / "tests")], "holds no config.json; scripts/real-base makes"),
        (["--epochs", "0"], "--epochs: from 1 to 1000"),
        (["--no-such-flag"], "unrecognized arguments: --no-such-flag"),
    ],
)
def test_a_wrong_command_line_ends_it_with_2(quickstart: Any, flags: list[str], line: str) -> None:
    process = quickstart(*flags)
    output = process.communicate(timeout=LIMIT_S)[0]
    assert process.returncode == 2 and line in output and "Traceback" not in output


# ---- its judgement -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def script() -> ModuleType:
    return _module_from(ROOT / "scripts" / "quickstart.py")


@pytest.fixture(scope="module")
def chains() -> ModuleType:
    return _module_from(ROOT / "scripts" / "_chains.py")


def _chain(chains: ModuleType, count: int) -> list[Any]:
    heads = ["run", *(f"head{epoch}" for epoch in range(1, count + 1))]
    return [
        chains.ChainRecord(epoch, heads[epoch - 1], heads[epoch], f"s{epoch - 1}", frozenset(), False)
        for epoch in range(1, count + 1)
    ]


def _digests_of(epochs: int) -> dict[int, dict[str, list[str]]]:
    return {epoch: {f"s{epoch}": ["node 1"]} for epoch in range(epochs + 1)}


def test_a_whole_chain_has_no_fault(chains: ModuleType) -> None:
    assert chains.chain_faults("node 1", _chain(chains, 5), "run", _digests_of(5)) == []


def test_an_epoch_that_was_shown_but_is_not_in_the_chain_is_lost(chains: ModuleType) -> None:
    faults = chains.chain_faults("node 1", _chain(chains, 4), "run", _digests_of(5))
    assert faults == ["node 1: its chain ends at epoch 4, epoch 5 was shown"]


def test_a_record_that_does_not_follow_is_found(chains: ModuleType) -> None:
    chain = _chain(chains, 5)
    chain[2] = dataclasses.replace(chain[2], prev="another")
    assert chains.chain_faults("node 1", chain, "run", _digests_of(5)) == [
        "node 1: record 3 does not follow the one before"
    ]


def test_a_signed_digest_that_is_not_the_shown_one_is_found(chains: ModuleType) -> None:
    chain = _chain(chains, 5)
    chain[2] = dataclasses.replace(chain[2], state_digest="another")
    assert chains.chain_faults("node 1", chain, "run", _digests_of(5)) == [
        "node 1: state 2 was shown with another digest than the signed one"
    ]


@pytest.mark.parametrize(("last", "falls"), [(3.5, True), (3.51, False), (float("nan"), False)])
def test_the_loss_must_fall_by_30_percent_of_where_the_run_started(
    script: ModuleType, last: float, falls: bool
) -> None:
    first, late = (
        SimpleNamespace(label="node 1", losses=[(0, 5.0), (9, 1.0)]),
        SimpleNamespace(label="node 2"),
    )
    late.losses = [(2, 4.0), (9, last)]
    assert (script.loss_faults([first, late]) == []) is falls


def test_a_node_without_a_loss_is_a_fault(script: ModuleType) -> None:
    assert script.loss_faults([SimpleNamespace(label="node 2", losses=[])]) == [
        "node 2: never showed a validation loss"
    ]


# ---- the story on a base ------------------------------------------------------------------------------

# What the models are worth is given, for no fake node makes one: FAKE_LOSSES, by the folder's name.
TELL_WITH_GIVEN_LOSSES = """
import json, os, sys
sys.path.insert(0, sys.argv.pop(1))
import quickstart, quickstart_base

class Measure:
    def __init__(self, base, texts):
        assert len(texts) == 3 and all(len(text) > 1000 for text in texts)
    def losses(self, folder):
        return json.loads(os.environ["FAKE_LOSSES"])[folder.name]
    def sample(self, folder, seed):
        return os.environ["FAKE_SAMPLE"]

quickstart_base.Measure = Measure
sys.exit(quickstart.main(sys.argv[1:]))
"""
WORDS = "to read the text of a file and to return what is in it, or else none when there is no such object"
LOSSES = {
    "base": [2.0, 1.5, 3.0],
    "model": [1.8, 1.0, 2.9],
    "model-of-lone1": [1.75, 1.25, 3.25],
    "model-of-lone2": [2.25, 0.75, 3.5],
    "model-of-lone3": [2.0, 1.5, 2.95],
}


@pytest.fixture
def base_story(tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Runs scripts/quickstart.py --base with fake nodes and given losses."""
    (tmp_path / "tmp").mkdir()
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "config.json").write_text("{}")

    def run(fault: str = "", sample: str = WORDS, **losses: list[float]) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [
                *(sys.executable, "-P", "-c", TELL_WITH_GIVEN_LOSSES, ROOT / "scripts"),
                *("--tapestry", FAKE, "--base", tmp_path / "base", "--epochs", "2"),
            ],
            env={
                **os.environ,
                "TMPDIR": str(tmp_path / "tmp"),
                "FAKE_FAULT": fault,
                "FAKE_LOSSES": json.dumps(LOSSES | losses),
                "FAKE_SAMPLE": sample,
            },
            capture_output=True,
            text=True,
            timeout=LIMIT_S,
            check=False,
        )

    return run


def test_the_story_on_a_base_compares_together_with_alone(base_story: Any, tmp_path: Path) -> None:
    done = base_story()
    assert done.returncode == 0, done.stdout + done.stderr
    for part in (
        r"node 1: has Python sources, \d+ kB",
        r"node 3: tapestry start --home \S+/node3 --data \S+/text/prose .* --peer \S+/p2p/peer1",
        r"all three: epoch \d+, state digest \w{16}",
        r"lone 2: tapestry start --home \S+/lone2 --data \S+/text/headers .* --epochs 2",
        r"epoch +\d: state digest \w{16} on \d of 3 nodes",
        r"node 1 +Python sources +2\.000 +1\.800 +1\.750",
        r"node 2 +C\+\+ headers +1\.500 +1\.000 +0\.750",
        r"node 3 +English prose +3\.000 +2\.900 +2\.950",
        r"all three texts +2\.167 +1\.900 +2\.133",
        r"lower together than alone for\s+1 of 3 members",
        re.escape(WORDS),
        r"OK: epoch 2 has the same bits on all three members",
    ):
        assert re.search(part, done.stdout), part
    assert _left_in(tmp_path / "tmp") == [] and _processes_in(tmp_path) == []


@pytest.mark.parametrize(
    ("fault", "line"),
    [
        ({"model": [1.8, 1.5, 2.9]}, r"FAILED: node 2: its loss on C\+\+ headers is 1\.500, not below"),
        ({"fault": "digest:3"}, r"FAILED: epoch \d has two state digests"),
    ],
)
def test_the_story_on_a_base_fails_in_one_line(
    base_story: Any, tmp_path: Path, fault: Any, line: str
) -> None:
    done = base_story(**fault)
    assert done.returncode == 1 and re.search(line, done.stdout), done.stdout + done.stderr
    assert _left_in(tmp_path / "tmp") == [] and _processes_in(tmp_path) == []


@pytest.mark.parametrize(
    ("sample", "faults"),
    [
        (WORDS, []),
        ("the " * 40, ["the sample does not read like language: 1 words, 100% of them known"]),
        ("%& 12", ["the sample does not read like language: 0 words, 0% of them known"]),
    ],
)
def test_a_sample_of_many_known_words_reads_like_language(
    script: Any, sample: str, faults: list[str]
) -> None:
    assert (
        script.quickstart_base.sample_faults(sample, [SimpleNamespace(trained="", held_out=WORDS)]) == faults
    )


def test_a_model_is_measured_on_each_text_and_writes(script: Any, tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", "llama")
    measure = script.quickstart_base.Measure(
        base, ["line 1: the square of 1 is 1\n" * 100, "other words " * 9]
    )
    losses = measure.losses(base)
    assert all(4 < loss < 9 for loss in losses) and len(losses) == 2 and losses == measure.losses(base)
    assert measure.sample(base, seed=0) == measure.sample(base, seed=0) != measure.sample(base, seed=1)


def test_every_kind_of_text_differs_and_none_that_is_held_out_is_trained_on(tmp_path: Path) -> None:
    texts = _module_from(ROOT / "scripts" / "_texts.py")
    copied = texts.copied_texts(tmp_path, seed=0)
    assert [text.name for text in copied] == ["python", "headers", "prose"]
    for text in copied:
        trained = [path.read_text() for path in text.folder.iterdir()]
        assert sum(map(len, trained)) > texts.TRAIN_BYTES / 4
        assert len(text.held_out) > texts.HELD_OUT_BYTES / 2
        assert not any(document in text.held_out for document in trained)


def test_a_base_that_is_there_is_not_written_over(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-P", ROOT / "scripts" / "real_base.py", tmp_path],
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
        check=False,
    )
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr == f"error: {tmp_path} is there already: name a new folder\n"


# ---- the environment ---------------------------------------------------------------------------------


def test_the_project_is_installed_from_every_file_it_has() -> None:
    env = _module_from(ROOT / "scripts" / "_env.py")
    names = {str(path.relative_to(ROOT)) for path in env._project_sources()}
    assert {"setup.cfg", "compression/codecs.py", "dht/py.typed", "node/protocol/core.py"} <= names
    assert not any("__pycache__" in name or name.startswith("tests") for name in names)


def test_an_installation_says_how_long_it_goes_on_already(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    env = _module_from(ROOT / "scripts" / "_env.py")
    (tmp_path / "a").write_bytes(bytes(2_000_000))
    for name, value in (("VENV", tmp_path), ("PYTHON", sys.executable), ("SAID_EVERY_S", 0.2)):
        monkeypatch.setattr(env, name, value)
    monkeypatch.setattr(env, "PIP", ("-c", "import time; time.sleep(1)"))
    env._pip("install")
    said, form = capsys.readouterr().err.splitlines(), re.compile(r"# pip install: \d+ s, .venv has 2 MB")
    assert len(said) >= 2 and all(map(form.fullmatch, said)), said


def test_a_python_that_is_too_old_is_refused_in_one_line(tmp_path: Path) -> None:
    old = tmp_path / "python-old"
    old.write_text("#!/bin/sh\nexit 1\n")
    old.chmod(0o755)
    done = subprocess.run(
        ["bash", ROOT / "scripts" / "test"],
        env={**os.environ, "PYTHON": str(old)},
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
        check=False,
    )
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr == f"error: PYTHON={old} is not a Python 3.11 or newer\n"


# ---- a benchmark of real nodes -----------------------------------------------------------------------


def test_the_nodes_of_bench_averaging_meet_and_agree(tmp_path: Path) -> None:
    """It makes its nodes by hand, so it is the first to break when they change."""
    found = tmp_path / "found.json"
    done = subprocess.run(
        [
            *(sys.executable, "-P", ROOT / "scripts" / "bench_averaging.py"),
            *("--peers", "2", "--params", "100000", "--rounds", "2", "--json", found),
        ],
        env={**os.environ, "TMPDIR": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=LIMIT_S * 2,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    (system,) = json.loads(found.read_text())["systems"].values()
    assert system["max_divergence"] == 0 and 0 < system["error"] < 0.01 and system["median_s"] > 0


# ---- a benchmark of learning -------------------------------------------------------------------------


@pytest.fixture
def learning() -> ModuleType:
    return _module_from(ROOT / "scripts" / "bench" / "learning.py")


@pytest.fixture
def two_languages(tmp_path: Path) -> list[str]:
    for name, words in {"first": "alpha beta gamma ", "second": "un deux trois "}.items():
        (tmp_path / f"{name}.txt").write_text(words * 2000)
    return [str(tmp_path / "first.txt"), str(tmp_path / "second.txt")]


def test_bench_learning_shows_every_variant_and_writes_its_figures(
    learning: ModuleType, two_languages: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = tmp_path / "found.json"
    variants = [
        "pooled",
        "alone",
        "members:inner_steps=1@0.5+2,plain=0.5",
        "mixed:optimizer=muon,moments=second,merge=normed",
    ]
    flags = ["--preset", "nano", "--windows-per-member", "16", "--validation-windows", "4", "--points", "1"]
    assert learning.main([*two_languages, *flags, "--json", str(found), "--variants", *variants]) == 0
    results = json.loads(found.read_text())["results"]
    assert list(results) == variants
    assert all(0 < loss < 7 for (run,) in results.values() for loss in run["losses"])
    assert results[variants[2]][0]["rounds"] == 3 and len(results[variants[2]][0]["cosine"]) == 3
    shown = capsys.readouterr().out
    assert all(f"| {name} " in shown for name in variants)


def test_members_of_bench_learning_see_the_windows_that_pooled_training_sees(
    learning: ModuleType, two_languages: list[str]
) -> None:
    flags = ["--preset", "nano", "--windows-per-member", "32", "--variants", "pooled"]
    options = learning.parse([*two_languages, *flags])
    texts = [learning.load_text(source, options.subject.tokenizer) for source in options.sources]
    bench = learning.Bench(options, texts, options.variants["pooled"], 0)
    members = {w.tobytes() for member in (0, 1) for step in range(8) for w in bench.draw_own(member, step)}
    mixed = {w.tobytes() for member in (0, 1) for step in range(8) for w in bench.draw_mixed(member, step)}
    assert {w.tobytes() for step in range(16) for w in bench.draw_pooled(step)} == members == mixed


@pytest.mark.parametrize(
    ("variant", "line"),
    [
        ("members:inner=4", "no setting is called 'inner'"),
        ("swarm", "kind is one of before, pooled"),
        ("pooled:schedule=warm", "schedule is one of"),
        ("members:inner_steps=four", "invalid literal"),
    ],
)
def test_bench_learning_refuses_a_variant_that_it_does_not_know(
    learning: ModuleType, variant: str, line: str
) -> None:
    with pytest.raises(ValueError, match=line):
        learning.Variant.parse(variant)


def test_the_sketch_of_bench_learning_runs_every_kind_of_variant(
    two_languages: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    sketch = _module_from(ROOT / "scripts" / "bench" / "learning_sketch.py")
    variants = ["pooled", "alone", "members:inner_steps=1,moments=reset,merge=normed", "mixed:optimizer=muon"]
    flags = ["--hidden", "16", "--layers", "1", "--sequence-length", "16", "--windows-per-member", "8"]
    assert sketch.main([*two_languages, *flags, "--validation-windows", "4", "--variants", *variants]) == 0
    shown = capsys.readouterr().out
    assert all(f"| {name} " in shown for name in variants)


def test_inner_steps_by_shares_of_the_run_add_up_to_it(learning: ModuleType) -> None:
    lengths = learning.Variant.parse("members:inner_steps=4@0.25+16@0.5+64").lengths(160)
    assert lengths == [4] * 10 + [16] * 3 + [64, 8] and sum(lengths) == 160


# ---- helpers -----------------------------------------------------------------------------------------


def _module_from(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"scripts_{path.stem}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def _left_in(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir() if path.name.startswith("tapestry-quickstart-")]


def _processes_in(tmp_path: Path) -> list[str]:
    """The command lines that name a path in tmp_path: the fake nodes, by their --home."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = path.read_bytes().split(b"\0")
        except OSError:
            continue
        if b"start" in words and any(word.startswith(os.fsencode(tmp_path)) for word in words):
            found.append(" ".join(os.fsdecode(word) for word in words))
    return found


def _wait_for_nodes(tmp_path: Path, count: int) -> None:
    deadline_s = time.monotonic() + LIMIT_S
    while len(_processes_in(tmp_path)) != count:
        assert time.monotonic() < deadline_s, f"no {count} nodes within {LIMIT_S:.0f} s"
        time.sleep(0.05)


def test_in_an_open_run_under_attack_all_honest_nodes_become_members(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They were newcomers for good, who have no vote and give way to members."""
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    import _members

    node = _members.founder_in(tmp_path, 2, is_open=True)
    rules = tomllib.loads((node.home / "run.toml").read_text())["members"]
    assert (rules["admission"], rules["open_votes_after"]) == ("open", 1)
