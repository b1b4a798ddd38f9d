"""The simulator and the protocol as one C extension, for runs of many seeds: three to four times as fast.

mypyc (it comes with mypy; it needs gcc) compiles copies of node/protocol and tests/simulation into
build/simulator/KEY, where KEY is a digest of the sources. The copies differ in one thing: what `@dataclass`
writes into a frozen class at import (`__init__`, `__eq__`, `__hash__`) is spelt out, since mypyc compiles
what it sees. tests/simulation shows that a seed has the same trace compiled and not.
"""

from __future__ import annotations

import ast
import fcntl
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PROTOCOL = ROOT / "node" / "protocol"
SIMULATION = ROOT / "tests" / "simulation"
MODULES = (
    "audits",
    "autocrats",
    "colluders",
    "consortium",
    "draws",
    "equivocators",
    "faults",
    "forgers",
    "forks",
    "gates",
    "invariants",
    "inventors",
    "lies",
    "mutes",
    "past",
    "rollbacks",
    "shell",
    "usurpers",
    "world",
)  # the rest stays as it is
FLAGS = ("--strict", "--ignore-missing-imports")


class CannotCompile(Exception):
    """With what the compiler said."""


def compiled() -> Path:
    """The folder to put on sys.path, made if it is not there. Raises CannotCompile."""
    folder = ROOT / "build" / "simulator" / _key()
    folder.parent.mkdir(parents=True, exist_ok=True)
    with (folder.parent / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if folder.exists():
            return folder
        draft = Path(tempfile.mkdtemp(dir=folder.parent, prefix="draft-"))
        try:
            _compile(draft)
            return draft.rename(folder)
        finally:
            shutil.rmtree(draft, ignore_errors=True)


def _key() -> str:
    sources = [Path(__file__), *sorted(PROTOCOL.glob("*.py")), *sorted(SIMULATION.glob("*.py"))]
    return hashlib.blake2b(b"".join(p.read_bytes() for p in sources), digest_size=8).hexdigest()


def _compile(draft: Path) -> None:
    protocol, simulation = draft / "tapestry" / "node" / "protocol", draft / "simulation"
    protocol.mkdir(parents=True)
    simulation.mkdir()
    for package in (draft / "tapestry" / "node", simulation):
        (package / "__init__.py").touch()
    # What is not compiled, tapestry.compression, comes from where it is installed.
    (draft / "tapestry" / "__init__.py").write_text(
        "from pkgutil import extend_path\n\n__path__ = extend_path(__path__, __name__)\n"
    )
    for source in PROTOCOL.glob("*.py"):
        (protocol / source.name).write_text(_spelt_out(source.read_text()))
    for source in SIMULATION.glob("[!t]*.py"):
        (simulation / source.name).write_text(_spelt_out(source.read_text()))
    named = [*sorted(protocol.glob("*.py")), *(simulation / f"{name}.py" for name in MODULES)]
    command = [sys.executable, "-m", "mypyc", *FLAGS, *(str(p.relative_to(draft)) for p in named)]
    environment = os.environ | {"MYPYC_OPT_LEVEL": "2", "MYPYC_DEBUG_LEVEL": "0", "MYPYPATH": str(draft)}
    done = subprocess.run(command, cwd=draft, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise CannotCompile("\n".join((done.stdout + done.stderr).strip().splitlines()[-5:]))
    shutil.rmtree(draft / "build", ignore_errors=True)


def _spelt_out(source: str) -> str:
    """The module with `__init__`, `__eq__` and `__hash__` written into its frozen dataclasses."""
    module = ast.parse(source)
    for node in ast.walk(module):
        if not isinstance(node, ast.ClassDef) or not node.decorator_list:
            continue
        decorator = ast.unparse(node.decorator_list[0])
        fields = [a for a in node.body if isinstance(a, ast.AnnAssign) and isinstance(a.target, ast.Name)]
        if decorator == "dataclass(frozen=True, slots=True)" and not any(_is_factory(f) for f in fields):
            node.decorator_list = [_expression("dataclass(init=False, eq=False)")]
            node.body += _methods(node.name, fields)
        elif decorator == "dataclass(slots=True)" and not any(_is_factory(f) for f in fields):
            node.decorator_list = [_expression("dataclass(init=False)")]
            node.body += _methods(node.name, fields)[:1]
        elif decorator.startswith("dataclass(") and "slots=True" in decorator:
            frozen = "frozen=True" in decorator  # hashed by its fields, so that it may be a default
            node.decorator_list = [_expression("dataclass(unsafe_hash=True)" if frozen else "dataclass")]
    return ast.unparse(module)


def _is_factory(field: ast.AnnAssign) -> bool:
    return field.value is not None and ast.unparse(field.value).startswith("field(")


def _methods(name: str, fields: list[ast.AnnAssign]) -> list[ast.stmt]:
    names = [ast.unparse(f.target) for f in fields]
    parameters = [
        f"{ast.unparse(f.target)}: {ast.unparse(f.annotation)}"
        + (f" = {ast.unparse(f.value)}" if f.value is not None else "")
        for f in fields
    ]
    lines = [f"def __init__({', '.join(['self', *parameters])}) -> None:"]
    lines += [f"    self.{n} = {n}" for n in names] or ["    pass"]
    equal = " and ".join([f"isinstance(other, {name})", *(f"self.{n} == other.{n}" for n in names)])
    lines += ["def __eq__(self, other: object) -> bool:", f"    return {equal}"]
    values = "".join(f"self.{n}, " for n in names)
    lines += ["def __hash__(self) -> int:", f"    return hash(({values}))"]
    return ast.parse("\n".join(lines)).body


def _expression(text: str) -> ast.expr:
    return ast.parse(text, mode="eval").body
