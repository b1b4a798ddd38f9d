"""Imports that take seconds, and what both processes of a node do to shorten them.

torch, hivemind and transformers make 200,000 objects and more, which live as long as the process. While they
come no collection finds anything, and it looks at all there is already; afterwards each full one
would look at them again, and a node's loop would stand still for 100 ms (docs/measurements.md).

Must not import anything heavy itself.
"""

from __future__ import annotations

import gc
import importlib.util
import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def lasting() -> Iterator[None]:
    """What is imported within stays: no collection meanwhile, and none ever looks at it again."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        if was_enabled:
            gc.enable()


def submodules_only(package: str) -> None:
    """Make the submodules of `package` importable without running its `__init__`, which imports many more.

    `import package` then gives a module without names, so only the main module of a process may ask for this.
    No effect where the package is imported already. Raises ModuleNotFoundError.
    """
    if package in sys.modules:
        return
    spec = importlib.util.find_spec(package)
    if spec is None:
        raise ModuleNotFoundError(f"No module named {package!r}", name=package)
    sys.modules[package] = importlib.util.module_from_spec(spec)


def do_without(package: str) -> None:
    """To this process `package` is not installed: find_spec gives None, an import raises ImportError.

    For a library that imports another one where it finds it, for something that we never ask it for. No
    effect where the package is imported already.
    """
    sys.modules.setdefault(package, None)  # type: ignore[arg-type]  # the import system's own sign for it
