"""The command line: through click's runner, and as a process where the process matters."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import resource
import signal
import subprocess
import sys
import time
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

import tapestry.node.daemon as daemon_package
import tapestry.node.lineage as lineage_package
from tapestry.node.cli import interrupt, said
from tapestry.node.cli import lineage as lineage_commands
from tapestry.node.cli import start as start_commands
from tapestry.node.cli.main import cli
from tapestry.node.cli.start import start_detached
from tapestry.node.errors import ExitCode, UserError
from tapestry.node.home import Home, Liveness, NodeInfo, NodeState
from tapestry.node.protocol.settings import SETTINGS
from tapestry.node.spec.declared import Declared
from tapestry.node.spec.node import Ending, NodeConfig
from tapestry.node.spec.recipe import preset_recipe
from tapestry.node.spec.run import RunSpec
from tapestry.node.surface.http import start_http
from tapestry.node.surface.metrics import Metrics
from tapestry.node.trainer.schedule import lr_factor

COMMAND = [sys.executable, "-P", "-m", "tapestry.node.cli"]

# A node as far as the command line can see: takes the home, says so, ends with SIGTERM (or does not).
NODE = """
import os, signal, sys, time
from pathlib import Path
from tapestry.node.home import Home, NodeInfo
home, behaviour = Home(Path(sys.argv[1])), sys.argv[2]
signal.signal(signal.SIGTERM, lambda *_: None if behaviour == "deaf" else sys.exit(0))
lock = home.lock()
print("peer id  12D3KooW", flush=True)
if behaviour == "fails":
    print("error: no such luck", file=sys.stderr)
    sys.exit(3)
if behaviour != "slow":
    home.write_node_json(NodeInfo(os.getpid(), "12D3KooW", "ab", (), "http://127.0.0.1:1", "0.1.0", "now"))
while True:
    time.sleep(0.02)  # not signal.pause(): a signal that comes just before it would not wake it
"""


def _run(*args: str, env: dict[str, str] | None = None) -> Result:
    return CliRunner().invoke(cli, args, env={"TAPESTRY_HOME": None, "TAPESTRY_HTTP": None, **(env or {})})


def _node_command(home: Home, behaviour: str) -> list[str]:
    return [sys.executable, "-c", NODE, str(home.path), behaviour]


@pytest.fixture
def node(tmp_path: Path) -> Iterator[Callable[[str], subprocess.Popen[str]]]:
    """Starts a NODE in tmp_path and returns when it holds the home; kills it after the test."""
    started: list[subprocess.Popen[str]] = []

    def start(behaviour: str) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            _node_command(Home(tmp_path), behaviour), stdout=subprocess.PIPE, text=True
        )
        started.append(process)
        assert process.stdout is not None and process.stdout.readline().startswith("peer id")
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()


@pytest.fixture
def daemon(monkeypatch: pytest.MonkeyPatch) -> types.SimpleNamespace:
    """Stands in for tapestry.node.daemon.launch and lineage.export; keeps what it was called with."""
    calls = types.SimpleNamespace(config=None, exported=None, form=None, outcome=0)

    def run(config: NodeConfig) -> int:
        calls.config = config
        if isinstance(calls.outcome, Exception):
            raise calls.outcome
        return int(calls.outcome)

    def export_home(home: Home, out: Path, epoch: int | str | None, **form: object) -> object:
        form.pop("progress")
        calls.exported, calls.form = (home, out, epoch), form
        return types.SimpleNamespace(epoch=7, newest=9, signed=True, unprovable="")

    for package, name, function in (
        (daemon_package, "launch", run),
        (lineage_package, "export", export_home),
    ):
        fake = types.ModuleType(f"{package.__name__}.{name}")
        setattr(fake, function.__name__, function)
        monkeypatch.setitem(sys.modules, fake.__name__, fake)
        monkeypatch.setattr(package, name, fake, raising=False)
    return calls


# ---- the frame ---------------------------------------------------------------------------------------


def test_help_lists_the_commands_that_work_and_no_others() -> None:
    result = _run("--help")
    assert result.exit_code == 0
    listed = re.findall(r"^  ([\w-]+)  ", result.stdout.partition("Commands:")[2], re.MULTILINE)
    making = ["data", "derivatives", "derive", "evaluate", "merge", "rebase"]
    proving = ["anchor", "exit", "log", "rejoin", "verify"]
    watching = ["backup", "completion", "restore", "top", "doctor", "log-level", "peers", "status"]
    belonging = ["admit", "approve", "id", "invite", "members", "propose", "remove"]
    assert listed == sorted(["export", "init", "start", "stop", *watching, *making, *proving, *belonging])


def test_start_has_the_flags_of_the_contract() -> None:
    flags = re.findall(r"--[a-z-]+", _run("start", "--help").stdout.partition("Options:")[2])
    assert list(dict.fromkeys(flag for flag in flags)) == [
        "--home",
        "--run",
        "--run-id",
        "--peer",
        "--base",
        "--data",
        "--validation",
        "--declare",
        "--allow-doubtful-data",
        "--listen",
        "--announce",
        "--http",
        "--device",
        "--max-upload",
        "--max-download",
        "--max-params",
        "--show-spec",
        "--epochs",
        "--until-epoch",
        "--external",
        "--island",
        "--log-format",
        "--no-wait",
        "--detach",
        "--help",
    ]


def test_version_is_that_of_the_package() -> None:
    assert re.fullmatch(r"tapestry \d+\.\d+\.\d+\n", _run("--version").stdout)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["strat"], "error: No such command 'strat'. (Did you mean one of: 'start', 'status'?)"),
        (["start", "--peers", "x"], "error: No such option '--peers'. Did you mean '--peer'?"),
        (["start", "--epochs", "many"], "error: Invalid value for '--epochs'"),
        (["start", "--device", "tpu"], "error: Invalid value for '--device'"),
        (["stop", "--timeout", "-1"], "error: Invalid value for '--timeout'"),
        (["init"], "error: Missing argument 'DIR'."),
        (["export"], "error: Missing argument 'OUT'."),
        ([], "error: Missing command."),
    ],
)
def test_a_wrong_command_line_is_one_line_a_hint_and_exit_code_2(args: list[str], message: str) -> None:
    result = _run(*args)
    assert result.exit_code == ExitCode.USAGE
    assert result.stderr.startswith(message)
    assert result.stderr.splitlines()[-1].startswith("hint: tapestry ")
    assert "Traceback" not in result.output


def test_the_entry_point_ends_with_the_exit_code_and_no_traceback(tmp_path: Path) -> None:
    done = subprocess.run([*COMMAND, "status", "--home", str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == ExitCode.FAILED
    error, hint = done.stderr.splitlines()
    assert (done.stdout, error) == ("", f"error: no node is running in {tmp_path}")
    assert hint.startswith("hint: ")


def test_a_reader_that_goes_away_gets_no_traceback() -> None:
    read_end, write_end = os.pipe()
    os.close(read_end)
    try:
        done = subprocess.run([*COMMAND, "--help"], stdout=write_end, stderr=subprocess.PIPE, text=True)
    finally:
        os.close(write_end)
    assert (done.returncode, done.stderr) == (ExitCode.FAILED, "")


def test_no_module_of_the_surface_imports_the_heavy_packages() -> None:
    code = (
        "import sys\n"
        "import tapestry.node.cli.main, tapestry.node.spec.node, tapestry.node.errors, tapestry.node.home\n"
        "import tapestry.node.surface.http, tapestry.node.surface.metrics, tapestry.node.spec.run\n"
        "heavy = {'torch', 'hivemind', 'transformers', 'bitsandbytes', 'numpy'} & set(sys.modules)\n"
        "print(*heavy)\n"
    )
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "\n", "")


def test_status_takes_less_than_half_a_second_of_processor_time(tmp_path: Path) -> None:
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([*COMMAND, "status", "--home", str(tmp_path)], capture_output=True, check=False)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert (after.ru_utime - before.ru_utime) + (after.ru_stime - before.ru_stime) < 0.5


# ---- init --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("preset", ["nano", "tiny", "small"])
def test_init_writes_files_that_start_can_use(
    tmp_path: Path, preset: str, daemon: types.SimpleNamespace
) -> None:
    home = tmp_path / "new" / "home"
    result = _run("init", str(home), "--preset", preset, "--name", "demo")
    assert result.exit_code == 0
    assert result.stdout.splitlines()[-1].strip() == f"tapestry start --home {home} --data PATH"
    assert RunSpec.load(home / "run.toml") == preset_recipe(preset, "demo")
    assert _run("start", "--home", str(home), "--data", "stdlib").exit_code == 0
    assert daemon.config.run == home / "run.toml"


def test_a_run_of_a_known_length_lets_its_rate_fall_over_it(tmp_path: Path) -> None:
    home = tmp_path / "home"
    assert _run("init", str(home), "--preset", "nano", "--epochs", "40").exit_code == 0
    train = RunSpec.load_to_found(home / "run.toml").train
    assert (train.schedule, train.schedule_steps) == ("cosine", 40 * train.inner_steps)
    assert lr_factor(train, train.schedule_steps, 10**6) == train.min_lr_ratio


def test_init_names_the_run_after_the_directory_if_that_is_a_name(tmp_path: Path) -> None:
    for directory, name in (
        ("my-run.1", "my-run.1"),
        (".hidden", "tapestry"),
        ("häuser", "häuser"),
        ("a;b", "tapestry"),
    ):
        assert _run("init", str(tmp_path / directory)).exit_code == 0
        assert RunSpec.load(tmp_path / directory / "run.toml").name == name


@pytest.mark.parametrize("existing", ["run.toml", "node.toml"])
def test_init_overwrites_nothing_and_then_writes_nothing(tmp_path: Path, existing: str) -> None:
    (tmp_path / existing).write_text("mine")
    result = _run("init", str(tmp_path))
    assert result.exit_code == ExitCode.USAGE
    assert f"error: {tmp_path / existing} is there already" in result.stderr
    assert os.listdir(tmp_path) == [existing]
    assert (tmp_path / existing).read_text() == "mine"


def test_init_refuses_a_bad_name_and_an_unknown_preset(tmp_path: Path) -> None:
    result = _run("init", str(tmp_path / "a"), "--name", "no/slash")
    assert result.exit_code == ExitCode.USAGE
    assert result.stderr.startswith('error: a new run: name: "no/slash" is not a string of 1 to 64 letters')
    result = _run("init", str(tmp_path / "a"), "--preset", "huge")
    assert result.exit_code == ExitCode.USAGE and "'nano', 'tiny', 'small'" in result.stderr
    assert not (tmp_path / "a").exists()


# ---- start and export --------------------------------------------------------------------------------


def test_start_gives_the_daemon_its_configuration_and_ends_with_its_exit_code(
    tmp_path: Path, daemon: types.SimpleNamespace
) -> None:
    daemon.outcome = 4
    texts = tmp_path / "texts.txt"
    texts.write_text("text")
    args = ["--data", "stdlib", "--data", str(texts), "--http", "127.0.0.1:0", "--epochs", "2"]
    refused = _run("start", *args, env={"TAPESTRY_HOME": str(tmp_path)})
    assert refused.exit_code == ExitCode.USAGE and f"{texts} is not declared for base" in refused.stderr
    assert "--declare own" in refused.stderr and daemon.config is None
    args += ["--declare", "INA, CC-BY-4.0"]
    result = _run("start", *args, env={"TAPESTRY_HOME": str(tmp_path)})
    assert (result.exit_code, result.stdout) == (4, "")
    assert result.stderr == f"declared {texts} for base: INA, CC-BY-4.0, participant-private\n"
    assert Declared.load(Home(tmp_path)).source[0].path == str(texts)
    assert daemon.config.home == Home(tmp_path)
    assert [one.path for one in daemon.config.data.source] == ["stdlib", str(texts)]
    assert (daemon.config.http_port, daemon.config.ending) == (0, Ending(epochs=2))


def test_an_error_of_the_daemon_is_printed_with_details_and_hint(
    tmp_path: Path, daemon: types.SimpleNamespace
) -> None:
    daemon.outcome = UserError(
        "run.toml differs from the peer's",
        exit_code=ExitCode.REFUSED,
        details=["train.inner_steps: 50 here, 100 at the peer"],
        hint="use the peer's: remove run.toml",
    )
    result = _run("start", "--home", str(tmp_path), "--data", "stdlib")
    assert result.exit_code == ExitCode.REFUSED
    assert result.stderr.splitlines() == [
        "error: run.toml differs from the peer's",
        "  train.inner_steps: 50 here, 100 at the peer",
        "hint: use the peer's: remove run.toml",
    ]


def test_a_mistake_is_found_before_the_daemon_is_imported(
    tmp_path: Path, daemon: types.SimpleNamespace
) -> None:
    result = _run("start", "--home", str(tmp_path))
    assert result.exit_code == ExitCode.USAGE and "no data to train on" in result.stderr
    assert daemon.config is None


def test_export_hands_home_out_and_epoch_to_the_daemon(
    tmp_path: Path, daemon: types.SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lineage_commands, "require_epoch", lambda home, epoch: None)
    result = _run("export", "model", "--home", str(tmp_path), "--epoch", "7")
    proves = "tapestry verify proves its tensors by what members signed"
    assert (result.exit_code, result.stdout) == (0, f"wrote model: epoch 7\n{proves}\n")
    assert daemon.exported == (Home(tmp_path), Path("model"), 7)
    assert _run("export", "model", "--home", str(tmp_path), "--epoch", "head").exit_code == 0
    assert daemon.exported == (Home(tmp_path), Path("model"), "head")
    for wrong in ("-1", "tail"):
        assert _run("export", "model", "--home", str(tmp_path), "--epoch", wrong).exit_code == ExitCode.USAGE


def test_a_detached_start_prints_what_the_node_prints_and_leaves_it_running(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    home = Home(tmp_path)
    assert start_detached(_node_command(home, "runs"), home) == ExitCode.DONE
    pid = home.holder()
    assert pid is not None
    try:
        assert capfd.readouterr() == ("peer id  12D3KooW\n", "")
        assert os.getsid(pid) == pid
        with pytest.raises(UserError, match=rf"in use by a live node \(pid {pid}\)"):
            start_detached(_node_command(home, "runs"), home)
    finally:
        os.kill(pid, signal.SIGTERM)
        assert os.waitpid(pid, 0)[1] == 0


def test_a_detached_node_that_fails_shows_its_last_lines_and_gives_its_exit_code(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    home = Home(tmp_path / "home")
    home.create()
    home.output.write_text("of an earlier start\n")
    assert start_detached(_node_command(home, "fails"), home) == 3
    assert capfd.readouterr() == ("", "peer id  12D3KooW\nerror: no such luck\n")


def test_a_detached_node_that_is_long_in_starting_goes_on_unwatched(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    home = Home(tmp_path)
    command = [sys.executable, "-c", "import signal; signal.pause()"]
    before = _children()
    assert start_detached(command, home, wait_s=0.0) == ExitCode.DONE
    assert f"goes on in the background; see {home.log}" in capfd.readouterr().out
    _end_the_new_child(before)


def test_a_detached_start_that_is_given_up_leaves_no_node_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun: list[subprocess.Popen[bytes]] = []

    def pressed(child: subprocess.Popen[bytes], *_: object) -> None:
        begun.append(child)
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(60)

    monkeypatch.setattr(start_commands, "_wait_until_ready", pressed)
    monkeypatch.setattr(interrupt, "CTRL_C", interrupt.Key())  # it remembers
    with pytest.raises(KeyboardInterrupt):
        start_detached([sys.executable, "-c", "import signal; signal.pause()"], Home(tmp_path))
    assert begun[0].returncode == -signal.SIGTERM


def test_detach_starts_the_same_command_without_the_flag(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commands: list[list[str]] = []

    def keep(command: list[str], home: Home) -> int:
        commands.append(command)
        return 0

    monkeypatch.setattr("tapestry.node.cli.start.start_detached", keep)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "-x").mkdir()
    (tmp_path / "-x" / "text.md").write_text("text")
    flags = [
        "--data",
        "stdlib",
        "--data",
        "-x",
        "--http",
        "127.0.0.1:0",
        "--epochs",
        "3",
        "--log-format",
        "json",
        "--allow-doubtful-data",
    ]
    assert _run("start", "--home", str(tmp_path), *flags, "--declare", "own", "--detach").exit_code == 0
    assert commands == [
        [
            *COMMAND,
            "start",
            f"--home={tmp_path}",
            "--data=stdlib",
            "--data=-x",
            "--http=127.0.0.1:0",
            "--epochs=3",
            "--log-format=json",
            "--allow-doubtful-data",
        ]
    ]


# ---- stop --------------------------------------------------------------------------------------------


def test_stop_ends_the_node_and_says_so(tmp_path: Path, node: Callable[[str], subprocess.Popen[str]]) -> None:
    process = node("runs")
    result = _run("stop", "--home", str(tmp_path))
    assert (result.exit_code, result.stdout) == (0, f"stopped the node (pid {process.pid})\n")
    assert process.wait() == 0


def test_stop_reaches_a_node_that_is_still_starting(
    tmp_path: Path, node: Callable[[str], subprocess.Popen[str]]
) -> None:
    node("slow")
    assert _run("stop", "--home", str(tmp_path)).exit_code == 0


def test_stop_with_nothing_to_stop_is_done(tmp_path: Path) -> None:
    result = _run("stop", "--home", str(tmp_path))
    assert (result.exit_code, result.stdout) == (0, f"no node is running in {tmp_path}\n")


@pytest.mark.parametrize("command", ["stop", "status", "peers", "members", "invite"])
def test_of_a_home_of_another_user_no_command_says_that_no_node_runs_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    real, lock = os.open, os.fspath(Home(tmp_path).lock_file)

    def refused(path: Any, *more: Any, **named: Any) -> int:
        if os.fspath(path) == lock:  # root may read what others may not
            raise PermissionError(13, "Permission denied", lock)
        return real(path, *more, **named)

    monkeypatch.setattr(os, "open", refused)
    result = _run(command, "--home", str(tmp_path))
    assert (result.exit_code, result.stdout) == (ExitCode.FAILED, "")
    assert result.stderr.startswith(f"error: no permission for {lock}\nhint: run this as the user whose home")


def test_what_cannot_be_read_is_said_without_a_heading(tmp_path: Path) -> None:
    result = _run("log", "--home", str(tmp_path))
    assert (result.exit_code, result.stdout) == (ExitCode.USAGE, "")
    assert result.stderr == f"error: {tmp_path} holds no run\n"


def test_stop_gives_up_after_its_timeout_with_exit_code_1(
    tmp_path: Path, node: Callable[[str], subprocess.Popen[str]]
) -> None:
    process = node("deaf")
    result = _run("stop", "--home", str(tmp_path), "--timeout", "0")
    assert result.exit_code == ExitCode.FAILED
    assert f"error: the node (pid {process.pid}) has not stopped within 0 s" in result.stderr


def test_stop_says_what_it_waits_for(
    tmp_path: Path, node: Callable[[str], subprocess.Popen[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(said, "QUIET_S", 0.0)
    monkeypatch.setattr(said, "DRAWN_EVERY_S", 0.01)
    process = node("deaf")
    result = _run("stop", "--home", str(tmp_path), "--timeout", "0.5")
    waits = f"waiting for the node (pid {process.pid}) to finish its round and save its state, 0 s\n"
    assert result.stderr.startswith(waits) and result.stdout == ""


def test_stop_of_a_copied_home_signals_nobody(
    tmp_path: Path, node: Callable[[str], subprocess.Popen[str]]
) -> None:
    process = node("runs")
    copy = tmp_path / "copy"
    copy.mkdir()
    for name in ("lock",):
        (copy / name).write_bytes((tmp_path / name).read_bytes())
    assert "no node is running" in _run("stop", "--home", str(copy)).stdout
    assert process.poll() is None


def test_stop_leaves_word_for_a_node_that_no_signal_reaches(
    tmp_path: Path, node: Callable[[str], subprocess.Popen[str]]
) -> None:
    process = node("runs")
    words = (tmp_path / "lock").read_text().split()
    (tmp_path / "lock").write_text(" ".join([*words[:3], "pid:[1]", "elsewhere"]) + "\n")
    result = _run("stop", "--home", str(tmp_path), "--timeout", "0")
    assert result.exit_code == ExitCode.FAILED and "the node on elsewhere" in result.stderr
    assert process.poll() is None and (tmp_path / "stop").exists()  # which daemon/life.py looks for


def test_stop_returns_when_the_process_is_gone_and_not_only_its_lock(tmp_path: Path) -> None:
    slow = NODE.replace("sys.exit(0)", "(lock.release(), time.sleep(0.3), os._exit(7))")
    command = [sys.executable, "-c", slow, str(tmp_path), "runs"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stdout.readline()
        assert _run("stop", "--home", str(tmp_path)).exit_code == 0
        assert process.poll() == 7


# Sends itself a Ctrl-C when a module is looked for, or at Python's own end.
INTERRUPTED_AT = """
import atexit, os, signal, sys
def interrupt():
    os.kill(os.getpid(), signal.SIGINT)
class Finder:
    def find_spec(self, name, path=None, target=None):
        if name == {at!r}:
            interrupt()
sys.meta_path.insert(0, Finder())
if {at!r} == "its end":
    atexit.register(interrupt)
sys.argv = ["tapestry", *{args!r}]
from tapestry.node.cli.entry import main
main()
"""
START = ("start", "--data", "stdlib:1/30", "--declare", "own", "--http", "127.0.0.1:0", "--home")
IN_A_LINE = [
    ("status", "tapestry.node.cli.main"),
    ("status", "click"),
    ("status", "tapestry.node.cli.look"),
    ("init", "tapestry.node.trainer.imports"),
    ("init", "tapestry.node.cli.init"),
    ("init", "tapestry.node.spec.run"),
    ("start", "click"),
    ("start", "tapestry.node.cli.start"),
    ("start", "tapestry.node.cli.data"),
    ("start", "tapestry.node.spec.run"),
    ("start", "tapestry.node.daemon.launch"),
    ("start", "uvloop"),
    ("start", "tapestry.node.trainer.process"),
    ("start", "torch"),
    ("detach", "tapestry.node.cli.start"),
    ("detach", "tapestry.node.trainer.data.sources"),
]


def _interrupted(home: Path, command: str, at: str) -> subprocess.CompletedProcess[str]:
    if at == "torch":  # a start without a run does not come so far
        home.mkdir()
        (home / "run.toml").write_text(preset_recipe("nano", "run", 0).to_toml())
    args = {
        "start": (*START, str(home)),
        "detach": (*START, str(home), "--detach"),
        "init": ("init", str(home)),
        "status": ("status", "--home", str(home)),
    }
    return subprocess.run(
        [sys.executable, "-P", "-c", INTERRUPTED_AT.format(at=at, args=args[command])],
        capture_output=True,
        text=True,
        timeout=30,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # who runs us may ignore it
    )


@pytest.mark.parametrize(("command", "at"), IN_A_LINE)
def test_ctrl_c_ends_a_command_with_a_line_at_whatever_moment(tmp_path: Path, command: str, at: str) -> None:
    done = _interrupted(tmp_path / "h", command, at)
    assert (done.stdout, done.stderr, done.returncode) == ("", "\nerror: interrupted\n", 1)


@pytest.mark.parametrize("error", [ModuleNotFoundError("no module"), UserError("the base does not read")])
def test_an_error_that_a_library_makes_of_a_ctrl_c_is_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def swallowed(*_: object) -> None:
        with contextlib.suppress(KeyboardInterrupt):
            key(signal.SIGINT, None)
        raise error

    key = interrupt.Key()
    monkeypatch.setattr(interrupt, "CTRL_C", key)
    monkeypatch.setattr(lineage_commands, "require_epoch", swallowed)
    result = _run("export", "model", "--home", str(tmp_path))
    assert (result.exit_code, result.stderr) == (ExitCode.FAILED, "\nerror: interrupted\n")


def test_ctrl_c_while_python_ends_changes_nothing_any_more(tmp_path: Path) -> None:
    done = _interrupted(tmp_path, "init", "its end")
    assert (done.returncode, done.stderr) == (0, "") and "Found the run" in done.stdout


def test_little_is_imported_before_a_command_heeds_ctrl_c() -> None:
    """Until then Python's own handler prints a traceback."""
    code = "import sys; old = {*sys.modules}; import tapestry.node.cli.entry; print(*{*sys.modules} - old)"
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, timeout=30)
    assert {one for one in done.stdout.split() if not one.startswith("tapestry")} <= {"__future__", "atexit"}


# ---- status and peers --------------------------------------------------------------------------------


class FakeView:
    def __init__(self, status: dict[str, Any], peers: list[dict[str, Any]]) -> None:
        self._status, self._peers = status, peers

    def status(self) -> dict[str, Any]:
        return self._status

    def peers(self) -> list[dict[str, Any]]:
        return self._peers

    def ready(self) -> tuple[bool, str]:
        return True, ""


STATUS = {
    "peer_id": "12D3KooW",
    "run_name": "demo\x1b[31m",
    "epoch": 12,
    "loss": 2.34567,
    "val_loss": None,
    "tokens_per_second": 12345.6,
    "addresses": ["/ip4/127.0.0.1/tcp/1", "/ip4/10.0.0.1/tcp/1"],
    "round": {"ballot": 1, "waiting_on": []},
    "uptime_s": 9012.3,
}
PEERS: list[dict[str, Any]] = [
    {"peer_id": "12D3KooWa", "phase": "training", "epoch": 12},
    {"peer_id": "12D3KooWlonger", "phase": None, "epoch": 9, "addresses": ["/ip4/1.2.3.4/tcp/1", "x"]},
]


def _ask(home: Home, *args: str, peers: list[dict[str, Any]] = PEERS) -> Result:
    """Run the command against an endpoint of this process, which holds the home as a node would."""

    async def run() -> Result:
        server = await start_http(FakeView(STATUS, peers), Metrics("0.1.0"), "127.0.0.1", 0)
        try:
            home.write_node_json(NodeInfo(os.getpid(), "12D3KooW", "ab", (), server.url, "0.1.0", "now"))
            return await asyncio.to_thread(_run, *args, "--home", str(home.path))
        finally:
            await server.close()

    with home.lock():
        return asyncio.run(run())


def test_status_is_an_aligned_table_without_control_characters(tmp_path: Path) -> None:
    result = _ask(Home(tmp_path), "status")
    assert result.exit_code == 0
    assert result.stdout.splitlines() == [
        "peer_id       12D3KooW",
        "run_name      demo?[31m",
        "epoch         12",
        "loss          2.3457",
        "val_loss      -",
        "tokens_per_s  12346",
        "addresses     /ip4/127.0.0.1/tcp/1",
        "              /ip4/10.0.0.1/tcp/1",
        "round         ballot=1",
        "              waiting_on=-",
        "uptime        2.5 h",
    ]


def test_status_as_json_is_what_the_node_says(tmp_path: Path) -> None:
    assert json.loads(_ask(Home(tmp_path), "status", "--json").stdout) == STATUS


def test_peers_are_aligned_columns_and_as_json_what_the_node_says(tmp_path: Path) -> None:
    result = _ask(Home(tmp_path), "peers")
    assert result.stdout.splitlines() == [
        "peer     phase     epoch  head  heard  way  address",
        "…3KooWa  training  12     -     -      -    -",
        "…longer  -         9      -     -      -    /ip4/1.2.3.4/tcp/1",
    ]
    assert json.loads(_ask(Home(tmp_path), "peers", "--json").stdout) == PEERS
    assert _ask(Home(tmp_path), "peers", peers=[]).stdout == "no peers\n"


def test_a_proxy_in_the_environment_is_not_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")
    assert _ask(Home(tmp_path), "status").exit_code == 0


@pytest.mark.parametrize("command", ["status", "peers"])
@pytest.mark.parametrize("flags", [[], ["--json"]])
def test_without_a_node_there_is_one_line_and_exit_code_1(
    tmp_path: Path, command: str, flags: list[str]
) -> None:
    result = _run(command, "--home", str(tmp_path), *flags)
    assert (result.exit_code, result.stdout) == (ExitCode.FAILED, "")
    error, hint = result.stderr.splitlines()
    assert error == f"error: no node is running in {tmp_path}" and hint.startswith("hint: tapestry start ")


@pytest.mark.parametrize("command", ["status", "peers", "top", "log-level"])
def test_of_a_folder_that_is_not_there_is_said_that_there_is_no_home(tmp_path: Path, command: str) -> None:
    result = _run(command, "--home", str(tmp_path / "slip"))
    assert (result.exit_code, result.stdout) == (ExitCode.USAGE, "")
    error, hint = result.stderr.splitlines()
    assert error == f"error: there is no home {tmp_path / 'slip'}" and "--home DIR" in hint


def test_status_tells_a_node_that_died_from_one_that_is_starting(tmp_path: Path) -> None:
    home = Home(tmp_path)
    home.write_node_json(NodeInfo(1, "12D3KooW", "ab", (), "http://127.0.0.1:1", "0.1.0", "now"))
    died = _run("status", "--home", str(tmp_path))
    assert (died.exit_code, "ended without saying so" in died.stderr) == (1, True)
    lock = home.lock()
    starting = _run("status", "--home", str(tmp_path))
    lock.release()
    assert starting.exit_code == 1
    assert f"is starting (pid {os.getpid()}) and does not answer yet" in starting.stderr


def test_a_node_that_does_not_answer_is_one_line_and_exit_code_1(tmp_path: Path) -> None:
    home = Home(tmp_path)
    home.write_node_json(NodeInfo(os.getpid(), "12D3KooW", "ab", (), "http://127.0.0.1:1", "0.1.0", "now"))
    with home.lock():
        result = _run("status", "--home", str(tmp_path))
    assert result.exit_code == ExitCode.FAILED
    assert result.stderr.startswith(
        f"error: the node (pid {os.getpid()}) does not answer at http://127.0.0.1:1"
    )


def _children() -> set[int]:
    return set(map(int, Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()))


def _end_the_new_child(before: set[int]) -> None:
    """The process that start_detached left to itself is a child of ours all the same."""
    (child,) = _children() - before
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)


def test_a_home_of_another_user_is_said_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def closed(self: Path, **_: object) -> os.stat_result:
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(Path, "stat", closed)
    result = _run("status", "--home", str(tmp_path / "theirs"))
    assert result.exit_code == ExitCode.FAILED
    assert result.stderr.startswith("error: no permission for ") and "sudo -u USER" in result.stderr


def test_a_setting_is_proposed_as_run_toml_has_it_and_the_help_names_them_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    node = Answering(monkeypatch, {"pending": [WAITS], "done": []})
    propose = ["propose", "--home", str(tmp_path), "--no-wait", "set"]
    for words in (("round.exchange_max_s", "auto"), ("train.lr", "3e-4"), ("audit.on_lie", "mark")):
        assert CliRunner().invoke(cli, [*propose, *words]).exit_code == 0
    assert node.asked == ["round.exchange_max_s auto", "train.lr 0.0003", "audit.on_lie mark"]
    assert CliRunner().invoke(cli, [*propose, "train.lr", "auto"]).exit_code == 2
    text = CliRunner().invoke(cli, ["propose", "--help"]).output
    assert [key for key in SETTINGS if key not in text] == []


class Answering:
    """A running node, as commands see it: `tables` one after the other, the last for good."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *tables: dict[str, object]) -> None:
        self.tables = list(tables)
        self.asked: list[str] = []  # values
        self.about: list[str] = []  # whom
        monkeypatch.setattr("tapestry.node.surface.control.ask", self.ask)
        monkeypatch.setattr("tapestry.node.cli.members.POLL_S", 0.0)

    def ask(self, home: object, request: dict[str, str]) -> dict[str, object]:
        if request["do"] != "members":
            self.asked.append(request["value"])
            self.about.append(request["peer"])
            return {"id": CHANGE, "needs": 1}
        table = self.tables.pop(0) if len(self.tables) > 1 else self.tables[0]
        return {"members": [{"peer": "a" * 52}], "invites": [], "epoch": 7, **table}


CHANGE = "ab" * 16
WAITS = {"id": CHANGE, "signed": 0, "needs": 1, "enough": True}


@pytest.mark.parametrize("command", [["admit"], ["propose", "admit"]])
def test_who_was_removed_is_admitted_again_by_the_end_of_its_id(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: list[str]
) -> None:
    peer = "12D3KooW" + "a" * 38 + "JhHe5k"
    table = {"applicants": [], "removed": {peer: "agreed"}, "pending": [WAITS], "done": []}
    node = Answering(monkeypatch, table)
    result = CliRunner().invoke(cli, [*command, "JhHe5k", "--home", str(tmp_path), "--no-wait"])
    assert (result.exit_code, node.about) == (0, [peer]), result.stderr


def test_who_leaves_is_told_when_it_is_out_and_not_that_others_must_sign(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before: dict[str, object] = {"pending": [WAITS], "done": []}
    Answering(monkeypatch, before, before, {"pending": [], "done": [CHANGE]})
    told = CliRunner().invoke(cli, ["remove", "a" * 52, "--home", str(tmp_path)])
    assert "from epoch 7 on" in told.output, told.output
    Answering(monkeypatch, {"pending": [WAITS | {"enough": False}], "done": []})
    told = CliRunner().invoke(cli, ["remove", "a" * 52, "--home", str(tmp_path)])
    assert "0 of 1 have signed; the others run: tapestry approve abababab" in told.output, told.output


def test_a_line_is_printed_once_it_is_good_or_with_what_it_waits_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    info = NodeInfo(1, "12D3", "ab" * 32, ("/ip4/1.2.3.4/tcp/1/p2p/12D3",), "", "0", "")
    running = NodeState(Liveness.RUNNING, 1, info)
    monkeypatch.setattr("tapestry.node.home.Home.read_node_json", lambda self: running)
    invite = ["invite", "--home", str(tmp_path)]
    taken: dict[str, object] = {"pending": [], "done": [CHANGE]}
    waits: dict[str, object] = {"pending": [WAITS], "done": []}
    node = Answering(monkeypatch, waits, waits, taken)
    good = CliRunner().invoke(cli, invite)
    assert (good.exit_code, good.stderr, len(node.tables)) == (0, "", 1) and good.stdout.startswith("/ip4/")

    Answering(monkeypatch, *[waits] * 40, taken)
    monkeypatch.setattr("tapestry.node.cli.members.POLL_S", 0.01)
    monkeypatch.setattr(said, "QUIET_S", 0.0)
    monkeypatch.setattr(said, "DRAWN_EVERY_S", 0.01)
    slow = CliRunner().invoke(cli, invite)
    assert slow.stderr == "waiting for the next record, which makes it good, 0 s\n"
    assert len(slow.stdout.splitlines()) == 1, "the line alone"
    monkeypatch.setattr(said, "QUIET_S", 60.0)

    Answering(monkeypatch, waits)
    at_once = CliRunner().invoke(cli, [*invite, "--no-wait"])
    assert at_once.stdout.startswith("/ip4/") and "not good yet: asked for" in at_once.stderr
    Answering(monkeypatch, {"pending": [WAITS | {"enough": False}], "done": []})
    of_several = CliRunner().invoke(cli, invite)
    assert of_several.stdout.startswith("/ip4/") and "not good yet: 0 of 1 have signed" in of_several.stderr

    Answering(monkeypatch, waits, {"pending": [], "done": []})
    dropped = CliRunner().invoke(cli, invite)
    assert (dropped.exit_code, dropped.stdout) == (ExitCode.REFUSED, "") and "dropped" in dropped.stderr
