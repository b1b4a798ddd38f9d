"""Imports that take seconds, and what both processes of a node do to shorten them.

torch, hivemind and transformers make 200,000 objects and more, which live as long as the process. While they
come no collection finds anything, and it looks at all there is already; afterwards each full one
would look at them again, and a node's loop would stand still for 100 ms (docs/measurements.md).

Most of the seconds go into modules that nobody of ours ever calls: torch's compiler with sympy, its
distributed tensors, its kernels for the meta device. They are there, but their code runs only once somebody
asks for a name in them (`defer`): a trainer starts with 3.9 s of a core instead of 5.7, and in 85 MB less.

Must not import anything heavy itself.
"""

from __future__ import annotations

import gc
import importlib.util
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.abc import Loader
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any

DYNAMO = "torch._dynamo"  # the compiler's front; with sympy, 2 s
SHARDED = "torch.distributed.tensor"  # 0.6 s
META = "torch._meta_registrations"  # what operators do on the meta device, in Python; 0.7 s


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


def spare_torch() -> None:
    """Before torch is imported: what it and transformers import and we rarely need, they get later or never.

    Decorators of the compiler leave their function as it is until then: they only say what it shall not
    compile, in parts of the libraries that we do not compile. `torch.compile` works as ever.
    Shapes without numbers want `meta_device` from then on.
    """
    do_without("scipy")  # transformers takes it, where it is, for the losses of object detection
    do_without("trio")  # httpcore2 takes it, for requests that we never make
    defer(
        DYNAMO,
        {
            "disable": _as_it_is,
            "allow_in_graph": _as_it_is,
            "assume_constant_result": _as_it_is,
            "graph_break": lambda: None,  # of optimizers, at each step
        },
        parts=("_trace_wrapped_higher_order_op",),  # for attention masks
        needs=META,  # torch imports it first, and else they go in a circle
    )
    defer(META)
    defer(SHARDED, needs=META)
    sys.meta_path.insert(0, _BeforeFinder("transformers.distributed", _without_sharded_models))


def _without_sharded_models() -> None:
    """Have transformers find no torch.distributed, for its sharded models: ours have one device each.

    peft and others that look for sharded weights run the deferred module then.
    """
    import torch.distributed.tensor
    from transformers.utils import is_torch_distributed_available

    distributed = torch.distributed
    was = distributed.is_available
    distributed.is_available = lambda: False
    try:
        is_torch_distributed_available()  # which asks once
    finally:
        distributed.is_available = was


@contextmanager
def meta_device() -> Iterator[None]:
    """`torch.device("meta")` as the default, its Python kernels loaded."""
    import torch

    run_deferred(META)
    with torch.device("meta"):
        yield


def defer(
    name: str, stands_in: Mapping[str, Any] | None = None, parts: Sequence[str] = (), needs: str = ""
) -> None:
    """Let the module's own code run when a name is asked for that `stands_in` has not, or by `run_deferred`.

    Or when a submodule is imported: only `parts` can be without it. What it `needs` runs before it, if that
    was deferred too. No effect on a module that is imported already.
    """
    if name not in sys.modules:
        sys.meta_path.insert(0, _DeferringFinder(name, stands_in or {}, parts, needs))


def run_deferred(name: str) -> None:
    """Run the code of an imported module now, if it was deferred and has not run yet."""
    module = sys.modules.get(name)
    if isinstance(module, _Deferred):
        module.run()


def _as_it_is(function: Callable[..., Any] | None = None, *_: Any, **__: Any) -> Any:
    """A decorator, with arguments or without, that does nothing."""
    return function if function is not None else _as_it_is


class _Deferred(ModuleType):
    """A module whose code has not run yet."""

    def run(self) -> None:
        """Become the module that it stands for."""
        assert self.__spec__ is not None and isinstance(self.__spec__.loader, _DeferringLoader)
        needs = self.__spec__.loader.needs
        self.__spec__.loader = self.__loader__ = self.__spec__.loader.real
        self.__class__ = ModuleType  # type: ignore[assignment]
        run_deferred(needs)
        self.__spec__.loader.exec_module(self)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # of those that look through all modules, as inspect does
            raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")
        self.run()
        return getattr(self, name)


class _DeferringLoader(Loader):
    def __init__(self, real: Loader, stands_in: Mapping[str, Any], needs: str) -> None:
        self.real, self.needs = real, needs
        self._stands_in = stands_in

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return _Deferred(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        vars(module).update(self._stands_in)


class _DeferringFinder:
    """For sys.meta_path: finds one module as Python does, and gives it the loader that waits."""

    def __init__(self, name: str, stands_in: Mapping[str, Any], parts: Sequence[str], needs: str) -> None:
        self._name, self._stands_in, self._needs = name, dict(stands_in), needs
        self._parts = [f"{name}.{part}" for part in parts]

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name == self._name:
            spec = PathFinder.find_spec(name, path, target)
            if spec is not None and spec.loader is not None:
                spec.loader = _DeferringLoader(spec.loader, self._stands_in, self._needs)
            return spec
        if name.startswith(self._name + ".") and name not in self._parts:
            run_deferred(self._name)  # which may import this one on its way
            if name in sys.modules:
                return ModuleSpec(name, _ThereLoader(sys.modules[name]))
        return None


class _ThereLoader(Loader):
    """Gives a module that came while it was being looked for."""

    def __init__(self, module: ModuleType) -> None:
        self._module, self._spec = module, module.__spec__
        module.__spec__ = None  # else the import system would load it once more, by that

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return self._module

    def exec_module(self, module: ModuleType) -> None:
        module.__spec__ = self._spec


class _BeforeFinder:
    """For sys.meta_path: finds nothing, but does something before the first import of a module."""

    def __init__(self, name: str, action: Callable[[], None]) -> None:
        self._name, self._action = name, action

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name == self._name:
            sys.meta_path.remove(self)
            self._action()
        return None
