"""How a derivative is made: every key with its type, bounds and comment. `derive --recipe FILE.toml` reads it
strictly, flags go before it, and derivative.json keeps it whole: a rebase repairs by the same recipe.

Must not import torch or transformers: the command line waits for this module.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from tapestry.node.errors import UserError
from tapestry.node.spec.data import rebased_data, split_field
from tapestry.node.spec.tables import Between, TableError, plain, read_table, read_toml

Stage = Literal["cpt", "sft", "dpo"]
Method = Literal["full", "lora"]

# Where nobody says otherwise. Full: as for continued pre-training of small open models; LoRA wants ten times
# as much (2106.09685, D.4); DPO a tenth of SFT's (2305.18290, B). All guesses for bases under 10B.
_LR: dict[tuple[str, str], float] = {
    ("cpt", "full"): 5e-5,
    ("sft", "full"): 2e-5,
    ("dpo", "full"): 1e-6,
    ("cpt", "lora"): 3e-4,
    ("sft", "lora"): 2e-4,
    ("dpo", "lora"): 1e-5,
}


# Of a rebase, as a share of the steps of its first training: as many as stay below a tenth of making it again
# (docs/learning.md, "What a repair needs").
REPAIR_SHARE = 0.09


@dataclass(frozen=True, slots=True)
class Recipe:
    """One stage of training on a base."""

    stage: Annotated[
        Stage,
        "cpt: goes on pre-training, on text. sft: prompts and completions. dpo: which of two is preferred.",
    ]
    method: Annotated[Method, "full: all parameters. lora: adapters, merged into the model at the end."]
    data: Annotated[
        tuple[str, ...],
        "cpt: as `start --data` takes it. sft and dpo: jsonl, csv or parquet, a row an example.",
    ]
    passes: Annotated[float, Between(0.0, 1000.0, above=True), "How often the data are gone over."] = 1.0
    steps: Annotated[int, Between(0, 100_000_000), "Steps of the optimizer. 0: what `passes` makes."] = 0
    batch_size: Annotated[int, Between(1, 65_536), "Sequences in a step on the device."] = 8
    accumulation: Annotated[int, Between(1, 65_536), "Batches that make one step."] = 1
    sequence_length: Annotated[
        int,
        Between(0, 1 << 20),
        "Tokens of a sequence. 0: 1024, or as many as the base has positions for, less one.",
    ] = 0
    lr: Annotated[float, Between(0.0, 1.0), "Learning rate. 0: by stage and method."] = 0.0
    warmup_share: Annotated[float, Between(0.0, 1.0), "Share of the steps in which the rate rises."] = 0.03
    weight_decay: Annotated[float, Between(0.0, 10.0), "AdamW's."] = 0.0
    lora_rank: Annotated[int, Between(1, 4096), "Of the adapters."] = 16
    lora_alpha: Annotated[float, Between(0.0, 1e6, above=True), "Their scale, over the rank."] = 32.0
    beta: Annotated[float, Between(0.0, 100.0, above=True), "DPO's: how near it keeps to the base."] = 0.1
    held_out_share: Annotated[
        float, Between(0.0, 0.5, above=True), "Of the rows, measured on and not trained on. cpt: always 2 %."
    ] = 0.05
    precision: Annotated[Literal["auto", "f32", "bf16"], "auto: bf16 where a GPU can, else f32."] = "auto"
    gradient_checkpointing: Annotated[bool, "Less memory for more time."] = False
    save_every_steps: Annotated[
        int, Between(1, 1_000_000), "Steps between two saves, from which a killed training goes on."
    ] = 200
    own_tokens: Annotated[
        int, Between(0, 65_536), "Tokens that are learnt from the data and added to the tokenizer. 0: none."
    ] = 0
    tokens_file: Annotated[str, "In place of learning them: a file with one token in each line."] = ""
    rows_share: Annotated[
        float,
        Between(0.0, 1.0),
        "Steps that come first and train the rows of own tokens alone, as a share of the others.",
    ] = 0.1
    seed: Annotated[int, Between(0, 2**31 - 1), "Of the order of the data and of the adapters."] = 0

    @property
    def learning_rate(self) -> float:
        """The one that is used."""
        return self.lr or _LR[self.stage, self.method]


def load_recipe(path: Path | None, flags: Mapping[str, Any]) -> Recipe:
    """A recipe file under the flags that were given (None: not given). Raises UserError."""
    table: dict[str, Any] = {} if path is None else read_toml(path)
    given = {name: value for name, value in flags.items() if value not in (None, ())}
    table |= {name: list(value) if isinstance(value, tuple) else value for name, value in given.items()}
    where = "the recipe" if path is None else str(path)
    for name in ("stage", "method", "data"):
        if not table.get(name):
            raise UserError(f"{where} says no {name}", hint=f"--{name}, or {name} in a --recipe FILE.toml")
    if table.get("own_tokens") and table.get("tokens_file"):
        raise UserError(f"{where}: own_tokens are learnt, or read from a tokens_file: say one of them")
    if table["stage"] == "dpo" and (table.get("own_tokens") or table.get("tokens_file")):
        raise UserError(f"{where}: dpo learns no tokens", hint="stages cpt and sft do")
    try:
        if isinstance(table.get("tokens_file"), str) and table["tokens_file"]:
            table["tokens_file"] = str(Path(table["tokens_file"]).absolute())
        if isinstance(table["data"], list) and all(isinstance(one, str) for one in table["data"]):
            table["data"] = rebased_data({"paths": table["data"]}, Path.cwd())["paths"]
        return read_table(Recipe, table)
    except TableError as error:
        raise UserError(f"{where}: {error}") from error


def recipe_paths(recipe: Recipe) -> tuple[str, ...]:
    """Of its sources, without the fields of tables: what must be declared."""
    return tuple(dict.fromkeys(split_field(one)[0] for one in recipe.data))


def differences(one: Recipe, other: Recipe) -> list[str]:
    """One line a key."""
    pairs = [
        (key.name, getattr(one, key.name), getattr(other, key.name)) for key in dataclasses.fields(Recipe)
    ]
    return [f"{name}: {plain(was)} before, {plain(now)} now" for name, was, now in pairs if was != now]
