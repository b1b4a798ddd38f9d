"""Makes .venv ready: the pinned packages of constraints.txt, and this project as it is now, installed.

Runs on a bare Python 3.11 with the standard library only. It does nothing when nothing has changed, puts an
interrupted installation right, and may be started twice at once. The project is installed from a copy of
its sources, not in development mode: what the tests see is what a user gets.
"""

from __future__ import annotations

import configparser
import contextlib
import fcntl
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import time
import venv
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
PYTHON = VENV / "bin" / "python"
PACKAGES_STAMP = VENV / ".packages"  # the key that was installed last; absent while installing
PROJECT_STAMP = VENV / ".project"
UNFINISHED = VENV / ".unfinished"  # there while a new .venv is being filled
PROJECT_FILES = ("setup.cfg", "pyproject.toml", "README.md", "LICENSE")
PIP = ("-m", "pip", "--disable-pip-version-check", "--quiet", "--quiet")  # errors only
SAID_EVERY_S = 10.0  # how long an installation goes on so far


def main() -> None:
    with (ROOT / "setup.cfg").open("r+b") as lock:  # a lock needs a file that nobody removes
        fcntl.flock(lock, fcntl.LOCK_EX)
        make_ready()


def make_ready() -> None:
    began_s = time.monotonic()
    if UNFINISHED.exists() or not _usable():
        _make_venv()
    packages, project = _packages_key(), _project_key()
    if _stamp(PACKAGES_STAMP) != packages:
        _say("installing the packages of constraints.txt into .venv; the first time takes a minute or more")
        _forget(PACKAGES_STAMP, PROJECT_STAMP)
        _pip("install", "-c", ROOT / "constraints.txt", "setuptools")
        _install_project("-c", str(ROOT / "constraints.txt"), extra="[dev]")
        _check()
    elif _stamp(PROJECT_STAMP) != project or _in_development_mode():
        _say("installing this project into .venv")
        _forget(PROJECT_STAMP)
        _install_project("--no-deps", "--force-reinstall")
    else:
        return
    PACKAGES_STAMP.write_text(packages)
    PROJECT_STAMP.write_text(project)
    UNFINISHED.unlink(missing_ok=True)
    _say(f".venv is ready ({time.monotonic() - began_s:.0f} s)")


def _usable() -> bool:
    """Whether .venv has a Python that runs and is new enough, with pip."""
    probe = "import sys, pip; sys.exit(sys.version_info < (3, 11))"
    try:
        done = subprocess.run([PYTHON, "-I", "-c", probe], stderr=subprocess.DEVNULL, check=False)
    except OSError:
        return False
    return done.returncode == 0


def _make_venv() -> None:
    _say(f"making .venv with Python {sys.version.split()[0]}")
    try:
        if VENV.is_symlink() or VENV.is_file():
            _fail(f"{VENV} is not a folder", "remove it")
        shutil.rmtree(VENV, ignore_errors=True)
        VENV.mkdir()
        UNFINISHED.touch()
        venv.create(VENV, with_pip=True)
    except OSError as error:
        _fail(f"cannot make {VENV}: {error}")
    except subprocess.CalledProcessError:
        _fail(
            "this Python cannot make virtual environments", "on Debian and Ubuntu: apt install python3-venv"
        )


def _install_project(*options: str, extra: str = "") -> None:
    """From a copy: pip would leave build folders in the checkout, with files that are long gone."""
    with tempfile.TemporaryDirectory(prefix="tapestry-build-") as folder:
        for path in _project_sources():
            target = Path(folder) / path.relative_to(ROOT)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, target)
        _pip("install", "--no-build-isolation", *options, folder + extra)


def _project_sources() -> Iterator[Path]:
    """Every file that goes into the installed project, sorted."""
    yield from (ROOT / name for name in PROJECT_FILES if (ROOT / name).exists())
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    lines = config["options"]["package_dir"].split("\n")
    for folder in sorted(line.partition("=")[2].strip() for line in lines if "=" in line):
        yield from sorted(
            path
            for path in (ROOT / folder).rglob("*")
            if path.is_file() and "__pycache__" not in path.parts and path.suffix != ".pyc"
        )


def _packages_key() -> str:
    paths = [ROOT / name for name in ("constraints.txt", "setup.cfg", "pyproject.toml")]
    version = subprocess.run([PYTHON, "-I", "-V"], capture_output=True, text=True, check=True).stdout
    return _digest(paths, version)


def _project_key() -> str:
    return _digest(list(_project_sources()), "")


def _digest(paths: list[Path], more: str) -> str:
    digest = hashlib.sha256(f"{ROOT}\0{more}".encode())  # a copied .venv still points at its old place
    for path in paths:
        digest.update(f"{path.relative_to(ROOT)}\0".encode() + hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()


def _in_development_mode() -> bool:
    return any(
        '"editable": true' in path.read_text()
        for path in VENV.glob("lib/python*/site-packages/tapestry_node-*.dist-info/direct_url.json")
    )


def _check() -> None:
    _pip("check")


def _pip(*arguments: object) -> None:
    # Errors only: a second index that lacks a package is no news.
    environment = {key: value for key, value in os.environ.items() if key != "PIP_USER"}
    command = [str(PYTHON), "-I", *PIP, *(str(argument) for argument in arguments)]
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
    began_s = time.monotonic()
    while True:
        try:
            said, _ = process.communicate(timeout=SAID_EVERY_S)
            break
        except subprocess.TimeoutExpired:  # pip knows neither how much it is nor how fast
            megabytes = _bytes_in(VENV) / 1e6
            _say(f"pip {arguments[0]}: {time.monotonic() - began_s:.0f} s, .venv has {megabytes:,.0f} MB")
    if process.returncode:
        sys.stderr.write(said)
        _fail(
            f"pip {arguments[0]} failed; its reason is above",
            "what is there is kept: run the same command again",
        )


def _bytes_in(folder: Path) -> int:
    """While files come and go there."""
    paths = (Path(place) / name for place, _, names in os.walk(folder) for name in names)
    count = 0
    for path in paths:
        with contextlib.suppress(OSError):
            count += path.lstat().st_size
    return count


def _stamp(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""


def _forget(*stamps: Path) -> None:
    for stamp in stamps:
        stamp.unlink(missing_ok=True)


def _say(text: str) -> None:
    print(f"# {text}", file=sys.stderr, flush=True)


def _fail(problem: str, hint: str = "") -> NoReturn:
    print(f"error: {problem}" + (f"\nhint: {hint}" if hint else ""), file=sys.stderr)
    sys.exit(1)


if __name__ == "__main__":
    main()
