"""The architecture, as rules over the imports in the sources (docs/architecture.md).

The sources are read, not imported: what is imported only inside a function counts too. Every rule is shown
to fail on a small source that breaks it.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("compression", "dht", "node")

# They execute what they read.
FORBIDDEN_MODULES = ("pickle", "cPickle", "dill", "cloudpickle", "joblib", "marshal", "shelve")
FORBIDDEN_BUILTINS = ("eval", "exec", "compile", "__import__")
FORBIDDEN_CALLS = ("torch.load", "yaml.load", "yaml.unsafe_load", "numpy.load", "importlib.import_module")

HIVEMIND_MODULES = (
    "tapestry.dht.p2pd",
    "tapestry.dht.control",
    "tapestry.dht.swarm",
    "tapestry.dht.directory",
    "tapestry.dht.guard",
    "tapestry.node.net.links",
)
NODE_SIDE_OF_TRAINER = ("tapestry.node.trainer.buffers", "tapestry.node.trainer.process")
PURE_OF_DHT = ("tapestry.dht.presence",)
PURE_OF_PROTOCOL = "tapestry.node.protocol.strict"  # checks of values, which the trainer's messages need too

# From the ground up: a module imports from its own room and from those below it. The longest name counts, so
# that disk.files and disk.lock, which know of no home, lie below home, and the rest of disk above state.
ROOMS = (
    "tapestry.compression",
    "tapestry.dht",
    "tapestry.node.errors",
    "tapestry.node.progress",
    "tapestry.node.protocol",
    "tapestry.node.disk.files",
    "tapestry.node.disk.lock",
    "tapestry.node.home",
    "tapestry.node.spec",
    "tapestry.node.state",
    "tapestry.node.disk",
    "tapestry.node.net",
    "tapestry.node.trainer",
    "tapestry.node.lineage",
    "tapestry.node.sovereign",
    "tapestry.node.surface",
    "tapestry.node.daemon",
    "tapestry.node.cli",
    "tapestry.node.library",
    "tapestry.node.api",
    "tapestry.node.library.transformers",
    "tapestry.node.library.lightning",
)


@dataclass(frozen=True, slots=True)
class Source:
    """One module: what it imports by full name, what it calls by full name, and from which line."""

    name: str
    is_package: bool
    imports: tuple[tuple[str, int], ...]  # modules, and names that may be modules: a.b for `from a import b`
    calls: tuple[tuple[str, int], ...]


def test_the_sources_keep_every_rule() -> None:
    sources = {source.name: source for source in _project()}
    assert len(sources) > 30 and "tapestry.node.protocol.core" in sources  # it read what it should
    assert [fault for rule in RULES for fault in rule(sources)] == []


# ---- the rules ---------------------------------------------------------------------------------------

Rule = Callable[[Mapping[str, Source]], list[str]]


def compression_imports_none_of_ours(sources: Mapping[str, Source]) -> list[str]:
    allowed = ("tapestry.compression",)
    return _outside(sources, "tapestry.compression", "tapestry", allowed)


def compression_does_no_io(sources: Mapping[str, Source]) -> list[str]:
    return [
        fault
        for module in ("asyncio", "socket", "os", "io", "pathlib", "subprocess", "tempfile")
        for fault in _outside(sources, "tapestry.compression", module, ())
    ]


def dht_imports_of_ours_only_dht(sources: Mapping[str, Source]) -> list[str]:
    return _outside(sources, "tapestry.dht", "tapestry", ("tapestry.dht",))


def the_protocol_is_pure(sources: Mapping[str, Source]) -> list[str]:
    """Standard library, the protocol and presence only; of the standard library, nothing that acts."""
    allowed = ("tapestry.node.protocol", *PURE_OF_DHT)
    acting = (
        "asyncio",
        "time",
        "random",
        "os",
        "io",
        "socket",
        "threading",
        "subprocess",
        "datetime",
        "uuid",
    )
    return [
        f"{source.name}:{line}: imports {name}"
        for source in _below(sources, "tapestry.node.protocol")
        for name, line in source.imports
        if not _is_below(name, *allowed)
        and not (_package(name) in sys.stdlib_module_names and not _is_below(name, *acting))
    ] + [
        f"{source.name}:{line}: calls open"
        for source in _below(sources, "tapestry.node.protocol")
        for name, line in source.calls
        if name == "open"
    ]


def presence_is_pure(sources: Mapping[str, Source]) -> list[str]:
    """The protocol may import it, so it must be as light: of others, msgpack only."""
    return [
        f"{source.name}:{line}: imports {name}"
        for source in _below(sources, *PURE_OF_DHT)
        for name, line in source.imports
        if not _is_below(name, *PURE_OF_DHT, "msgpack") and _package(name) not in sys.stdlib_module_names
    ]


def only_swarm_and_links_know_hivemind(sources: Mapping[str, Source]) -> list[str]:
    return [
        f"{source.name}:{line}: imports {name}"
        for source in sources.values()
        if source.name not in HIVEMIND_MODULES
        for name, line in source.imports
        if _is_below(name, "hivemind")
    ]


def nothing_executes_what_it_reads(sources: Mapping[str, Source]) -> list[str]:
    return [
        f"{source.name}:{line}: imports {name}"
        for source in sources.values()
        for name, line in source.imports
        if _is_below(name, *FORBIDDEN_MODULES) or name in FORBIDDEN_CALLS
    ] + [
        f"{source.name}:{line}: calls {name}"
        for source in sources.values()
        for name, line in source.calls
        if name in FORBIDDEN_BUILTINS or name in FORBIDDEN_CALLS
    ]


def nobody_uses_the_bare_folder_names(sources: Mapping[str, Source]) -> list[str]:
    """They would be second copies of the modules; from Python 3.14 on `compression` is the library's."""
    return [
        f"{source.name}:{line}: imports {name}"
        for source in sources.values()
        for name, line in source.imports
        if _is_below(name, *PACKAGES)
    ]


def the_worker_knows_no_runtime(sources: Mapping[str, Source]) -> list[str]:
    """What runs in the trainer's process: the trainer's own side and compression, nothing of the node."""
    allowed = (
        "tapestry.compression",
        PURE_OF_PROTOCOL,
        "tapestry.node.spec.data",
        "tapestry.node.spec.tables",
        "tapestry.node.spec.training",
        "tapestry.node.trainer",
    )
    return [
        f"{source.name}:{line}: imports {name}"
        for source in _below(sources, "tapestry.node.trainer")
        if not _is_below(source.name, *NODE_SIDE_OF_TRAINER)
        for name, line in source.imports
        if _is_below(name, "tapestry")
        and (not _is_below(name, *allowed) or _is_below(name, *NODE_SIDE_OF_TRAINER))
        and name not in ("tapestry.node.spec", "tapestry.node", "tapestry")
    ]


def imports_point_downward(sources: Mapping[str, Source]) -> list[str]:
    """Every module is in a room, and imports nothing of a room above its own; TYPE_CHECKING counts too."""
    faults = []
    for source in sources.values():
        room = _room(source.name)
        if room is None and not source.is_package:
            faults.append(f"{source.name}:1: is in no room of ROOMS")
            continue
        for name, line in source.imports:
            above = _room(name)
            if room is not None and above is not None and ROOMS.index(above) > ROOMS.index(room):
                faults.append(f"{source.name}:{line}: imports {name}, which is above it")
    return faults


def _room(name: str) -> str | None:
    rooms = [room for room in ROOMS if _is_below(name, room)]
    return max(rooms, key=len) if rooms else None


def no_module_imports_in_a_circle(sources: Mapping[str, Source]) -> list[str]:
    """Imports inside functions count: a circle that is put off is still a circle."""
    graph = {
        source.name: sorted(
            {
                target
                for name, _ in source.imports
                if (target := _module(name, sources)) not in ("", source.name)
            }
        )
        for source in sources.values()
    }
    return [f"a circle: {' -> '.join(circle)}" for circle in _circles(graph)]


RULES: tuple[Rule, ...] = (
    compression_imports_none_of_ours,
    compression_does_no_io,
    dht_imports_of_ours_only_dht,
    the_protocol_is_pure,
    presence_is_pure,
    only_swarm_and_links_know_hivemind,
    nothing_executes_what_it_reads,
    nobody_uses_the_bare_folder_names,
    the_worker_knows_no_runtime,
    imports_point_downward,
    no_module_imports_in_a_circle,
)

# ---- every rule can fail, and says where -------------------------------------------------------------

BROKEN = [
    (compression_imports_none_of_ours, "compression/codecs.py", "from tapestry.dht import presence"),
    (compression_imports_none_of_ours, "compression/codecs.py", "from tapestry.node.errors import UserError"),
    (compression_does_no_io, "compression/codecs.py", "import asyncio"),
    (compression_does_no_io, "compression/codecs.py", "from os import path"),
    (dht_imports_of_ours_only_dht, "dht/swarm.py", "import tapestry.node.home"),
    (dht_imports_of_ours_only_dht, "dht/swarm.py", "from tapestry.compression.codecs import pack"),
    (dht_imports_of_ours_only_dht, "dht/swarm.py", "from ..node import home"),
    (the_protocol_is_pure, "node/protocol/core.py", "import torch"),
    (the_protocol_is_pure, "node/protocol/core.py", "import time"),
    (the_protocol_is_pure, "node/protocol/core.py", "from asyncio import sleep"),
    (the_protocol_is_pure, "node/protocol/core.py", "def f():\n    import random"),
    (the_protocol_is_pure, "node/protocol/core.py", "from tapestry.node import home"),
    (the_protocol_is_pure, "node/protocol/core.py", "from tapestry.dht.swarm import Swarm"),
    (the_protocol_is_pure, "node/protocol/core.py", "from .. import wire"),
    (the_protocol_is_pure, "node/protocol/core.py", "open('vote.json')"),
    (presence_is_pure, "dht/presence.py", "import hivemind"),
    (presence_is_pure, "dht/presence.py", "from tapestry.dht import swarm"),
    (only_swarm_and_links_know_hivemind, "node/daemon/runtime.py", "from hivemind.p2p import P2P"),
    (only_swarm_and_links_know_hivemind, "dht/identity.py", "def f():\n    import hivemind"),
    (nothing_executes_what_it_reads, "node/net/wire.py", "import pickle"),
    (nothing_executes_what_it_reads, "node/net/wire.py", "from marshal import loads"),
    (nothing_executes_what_it_reads, "node/net/wire.py", "import torch\ntorch.load('x')"),
    (nothing_executes_what_it_reads, "node/net/wire.py", "import torch as t\nt.load('x')"),
    (nothing_executes_what_it_reads, "node/net/wire.py", "from torch import load"),
    (nothing_executes_what_it_reads, "node/net/wire.py", "import yaml\nyaml.load('x')"),
    (nothing_executes_what_it_reads, "node/net/wire.py", "eval('1')"),
    (nothing_executes_what_it_reads, "node/net/wire.py", "exec('1')"),
    (nothing_executes_what_it_reads, "node/net/wire.py", "import builtins\nbuiltins.exec('1')"),
    (nobody_uses_the_bare_folder_names, "node/net/wire.py", "import compression"),
    (nobody_uses_the_bare_folder_names, "node/net/wire.py", "from dht.presence import Presence"),
    (
        the_worker_knows_no_runtime,
        "node/trainer/worker.py",
        "from tapestry.node.daemon.runtime import Runtime",
    ),
    (the_worker_knows_no_runtime, "node/trainer/inner.py", "from tapestry.node import home"),
    (
        the_worker_knows_no_runtime,
        "node/trainer/inner.py",
        "from tapestry.node.trainer.process import Trainer",
    ),
    (imports_point_downward, "compression/codecs.py", "from tapestry.dht import presence"),
    (imports_point_downward, "node/surface/status.py", "from tapestry.node.daemon.runtime import Runtime"),
    (
        imports_point_downward,
        "node/surface/status.py",
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from tapestry.node.daemon import runtime",
    ),
    (imports_point_downward, "node/disk/store.py", "def f():\n    from tapestry.node.net import wire"),
    (imports_point_downward, "node/disk/files.py", "from tapestry.node.home import Home"),
    (imports_point_downward, "node/protocol/core.py", "from ..spec import run"),
    (no_module_imports_in_a_circle, "dht/identity.py", "from tapestry.dht import identity2"),
]


@pytest.mark.parametrize(("rule", "path", "text"), BROKEN, ids=[f"{r.__name__}: {t!r}" for r, _, t in BROKEN])
def test_a_source_that_breaks_a_rule_is_found_with_its_line(rule: Rule, path: str, text: str) -> None:
    sources = _with_second_file(path, f"'''A docstring.'''\n{text}\n")
    faults = rule(sources)
    where = "a circle" if rule is no_module_imports_in_a_circle else f"{_module_name(Path(path))}:"
    assert faults and all(fault.startswith(where) for fault in faults)


def test_what_is_allowed_is_not_found() -> None:
    allowed = {
        "node/protocol/core.py": "import json\nfrom tapestry.dht.presence import encode\nfrom . import chain",
        "node/home.py": "from tapestry.node.disk.files import atomic_write\nfrom tapestry.node import errors",
        "node/net/links.py": "from hivemind.p2p import P2P\nimport torch\nmodel.eval()\nre.compile('x')",
        "node/trainer/worker.py": "from tapestry.node.trainer import model\nimport tapestry.compression",
        "dht/swarm.py": "from tapestry.dht import identity\nimport hivemind",
    }
    sources = {}
    for path, text in allowed.items():
        source = _read(_module_name(Path(path)), text)
        sources[source.name] = source
    assert [fault for rule in RULES for fault in rule(sources)] == []


def test_the_floors_of_single_modules_are_kept_too() -> None:
    texts = {
        "tapestry.node.home": "from tapestry.node.disk import store",
        "tapestry.node.disk.store": "from tapestry.node.home import Home",
        "tapestry.node.attic": "import json",
    }
    sources = {name: _read(name, text) for name, text in texts.items()}
    assert imports_point_downward(sources) == [
        "tapestry.node.home:1: imports tapestry.node.disk.store, which is above it",
        "tapestry.node.attic:1: is in no room of ROOMS",
    ]


def test_circles_are_found_over_several_modules_and_through_functions() -> None:
    texts = {
        "tapestry.node.a": "import tapestry.node.b",
        "tapestry.node.b": "def f():\n    from tapestry.node import c",
        "tapestry.node.c": "from tapestry.node.a import thing",
        "tapestry.node.d": "from . import a",
    }
    sources = {name: _read(name, text) for name, text in texts.items()}
    assert no_module_imports_in_a_circle(sources) == [
        "a circle: tapestry.node.a -> tapestry.node.b -> tapestry.node.c -> tapestry.node.a"
    ]


# ---- what importing costs ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "module",
    [
        "tapestry.node.cli.main",
        "tapestry.node.daemon.launch",
        "tapestry.node.protocol.core",
        "tapestry.dht.presence",
        "tapestry.node.lineage.log",  # of `log`, `anchor`, `members`: people wait for these
        "tapestry.node.lineage.egress",
    ],
)
def test_importing_is_light(module: str) -> None:
    assert _heavy_imports(module) == ""


def test_the_check_for_heavy_imports_can_fail() -> None:
    assert _heavy_imports("torch") == "torch"


def _heavy_imports(module: str) -> str:
    program = (
        f"import sys, {module}; print(*sorted(sys.modules.keys() & {{'torch', 'hivemind', 'transformers'}}))"
    )
    done = subprocess.run(
        [sys.executable, "-P", "-c", program], capture_output=True, text=True, timeout=60, check=True
    )
    return done.stdout.strip()


# ---- reading -----------------------------------------------------------------------------------------


def _project() -> Iterator[Source]:
    for package in PACKAGES:
        for path in sorted((ROOT / package).rglob("*.py")):
            relative = path.relative_to(ROOT)
            yield _read(_module_name(relative), path.read_text(encoding="utf-8"), path.name == "__init__.py")


def _module_name(relative: Path) -> str:
    parts = relative.with_suffix("").parts
    return ".".join(("tapestry", *(parts[:-1] if parts[-1] == "__init__" else parts)))


def _with_second_file(path: str, text: str) -> dict[str, Source]:
    """The source, and another that imports it: the other half of a circle."""
    name = _module_name(Path(path))
    second = _read(f"{name}2", f"import {name}")
    return {name: _read(name, text), second.name: second}


def _read(name: str, text: str, is_package: bool = False) -> Source:
    tree = ast.parse(text)
    imports, aliases = [], {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                imports.append((alias.name, node.lineno))
                aliases[alias.asname or _package(alias.name)] = (
                    alias.name if alias.asname else _package(alias.name)
                )
        elif isinstance(node, ast.ImportFrom):
            base = _absolute(name, is_package, node)
            for alias in node.names:
                imports.append((f"{base}.{alias.name}", node.lineno))
                aliases[alias.asname or alias.name] = f"{base}.{alias.name}"
    calls = [
        (_resolved(node.func, aliases), node.lineno) for node in ast.walk(tree) if isinstance(node, ast.Call)
    ]
    return Source(name, is_package, tuple(imports), tuple(calls))


def _absolute(name: str, is_package: bool, node: ast.ImportFrom) -> str:
    """The full name of what `from ... import` names, relative or not."""
    if not node.level:
        return node.module or ""
    drop = node.level - 1 if is_package else node.level
    base = name.split(".")[: len(name.split(".")) - drop]
    return ".".join([*base, *([node.module] if node.module else [])])


def _resolved(function: ast.expr, aliases: Mapping[str, str]) -> str:
    """`t.load` as torch.load where `t` is torch; "" for what is no plain name."""
    parts: list[str] = []
    while isinstance(function, ast.Attribute):
        parts.append(function.attr)
        function = function.value
    if not isinstance(function, ast.Name):
        return ""
    full = ".".join([aliases.get(function.id, function.id), *reversed(parts)])
    return full.removeprefix("builtins.")


# ---- names and graphs --------------------------------------------------------------------------------


def _package(name: str) -> str:
    return name.partition(".")[0]


def _is_below(name: str, *prefixes: str) -> bool:
    return any(name == prefix or name.startswith(f"{prefix}.") for prefix in prefixes)


def _below(sources: Mapping[str, Source], *prefixes: str) -> list[Source]:
    return [source for source in sources.values() if _is_below(source.name, *prefixes)]


def _outside(sources: Mapping[str, Source], where: str, what: str, allowed: tuple[str, ...]) -> list[str]:
    """Imports of `what` in the modules below `where` that are not below one of `allowed`."""
    return [
        f"{source.name}:{line}: imports {name}"
        for source in _below(sources, where)
        for name, line in source.imports
        if _is_below(name, what) and not _is_below(name, *allowed)
    ]


def _module(name: str, sources: Mapping[str, Source]) -> str:
    """The module that an imported name is, or is in; "" if it is none of ours."""
    if name in sources:
        return name
    parent = name.rpartition(".")[0]
    return parent if parent in sources and not sources[parent].is_package else ""


def _circles(graph: Mapping[str, list[str]]) -> list[list[str]]:
    """One circle through each module that first closes one, depth first."""
    done: set[str] = set()
    circles: list[list[str]] = []

    def visit(name: str, path: list[str]) -> None:
        if name in path:
            circles.append([*path[path.index(name) :], name])
        elif name not in done:
            for target in graph[name]:
                visit(target, [*path, name])
            done.add(name)

    for name in sorted(graph):
        visit(name, [])
    return circles
