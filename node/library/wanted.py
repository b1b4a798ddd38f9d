"""What a script wants of the run: its module's layout, and the arguments that it gives.

A founder's become the run spec. Everybody else's are compared with the run's, as far as they are given.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tapestry.compression.shards import Layout
from tapestry.node.errors import UserError
from tapestry.node.library.errors import SwarmError
from tapestry.node.spec.run import RunSpec, diff
from tapestry.node.spec.tables import flat, plain, shown
from tapestry.node.spec.training import ExternalSpec, tensor_text


@dataclass(frozen=True, slots=True)
class Wanted:
    """Make one with `of`."""

    layout: Layout
    given: Mapping[str, Any]  # tables as in run.toml, without [model]
    spec: RunSpec  # all else by default

    @classmethod
    def of(cls, layout: Layout, name: str | None, inner_steps: int | None, run: Mapping[str, Any]) -> Wanted:
        """Raises SwarmError for what no run can have."""
        given: dict[str, Any] = {
            section: dict(table) if isinstance(table, Mapping) else table for section, table in run.items()
        }
        if "model" in given:
            raise SwarmError("run: [model] follows from the module", "leave it out")
        if name is not None:
            given["name"] = name
        if inner_steps is not None:
            given["train"] = {**given.get("train", {}), "inner_steps": inner_steps}
        model = ExternalSpec.of(layout.schema_hash, layout.names, layout.shapes)
        table = {"name": "swarm", **given, "model": plain(model)}
        if not table.get("train", {}).get("inner_steps", 1) and "outer" not in given:
            table["outer"] = {"optimizer": "adamw"}
        try:
            return cls(layout, given, RunSpec.from_dict(table, "Swarm"))
        except UserError as error:
            raise SwarmError(error.line) from error

    def write_run_toml(self, path: Path) -> None:
        """For a node that shall found the run. Raises SwarmError, if another one is there."""
        if path.exists():
            try:
                differences = diff(self.spec, RunSpec.load(path), "in the file")
            except UserError as error:
                raise SwarmError(error.line, error.hint) from error
            if differences:
                raise SwarmError(
                    f"{path} is there, and differs from the script's arguments",
                    "remove it, or give another home",
                    differences,
                )
            return
        path.write_text(self.spec.to_toml(), encoding="utf-8")

    def require(self, spec: RunSpec) -> None:
        """Raises SwarmError unless a script like this one can be a member of that run."""
        model = spec.model
        if not isinstance(model, ExternalSpec):
            raise SwarmError(
                f"the run {spec.name} trains a model that the node builds, not a script's module",
                "join it with `tapestry start --peer ADDRESS --data PATH`",
            )
        if model.schema != self.layout.schema_hash:
            raise SwarmError(
                f"the module is not the run's: {self._difference(model)}",
                "build the module as the founder's script does",
            )
        ours, theirs = dict(flat(self.spec.to_dict())), dict(flat(spec.to_dict()))
        differences = [
            f"{key}: {shown(ours[key])} here, {shown(theirs[key])} in the run"
            if key in theirs
            else f"{key}: {shown(ours[key])} here, not in the run"
            for key in dict(flat(self.given))
            if key in ours and ours[key] != theirs.get(key)
        ]
        if differences:
            raise SwarmError(
                f"the run {spec.name} has agreed on something else: {differences[0]}",
                "leave these arguments out, to take the run as it is",
                differences[1:],
            )

    def _difference(self, model: ExternalSpec) -> str:
        """The first tensor that is another, or what can be said without names."""
        ours = tuple(map(tensor_text, self.layout.names, self.layout.shapes))
        for here, there in zip(ours, model.tensors, strict=False):
            if here != there:
                return f"{here} here, {there} in the run"
        if model.tensors and len(ours) != len(model.tensors):
            return f"{len(ours)} tensors here, {len(model.tensors)} in the run"
        return f"{self.layout.n:,} parameters here, {model.parameters:,} in the run, or other names"
