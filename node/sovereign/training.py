"""One stage of training, by trl's trainers and peft's adapters: a model's folder, examples and a recipe in; a
model's folder out.

What trl is given is tokenized already (but for dpo, which it tokenizes itself, from rows that spell no
special token), so that what is trained on and what is measured on are cut alike. Its checkpoints lie in the
work folder; a call after a kill goes on from the newest whole one, with the same order of data, and ends at
the same step.

Heavy, and an extra: trl is imported here, within functions.
"""

from __future__ import annotations

import json
import math
import shutil
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from tapestry.node.errors import ExitCode, UserError
from tapestry.node.progress import Told
from tapestry.node.sovereign.asked import require_extra
from tapestry.node.sovereign.plans import Trained
from tapestry.node.sovereign.recipe import Recipe
from tapestry.node.sovereign.rows import Prepared
from tapestry.node.sovereign.tokens import of_vocabulary
from tapestry.node.spec.training import TransformersSpec
from tapestry.node.trainer.models.lora import lora_config
from tapestry.node.trainer.models.pretrained import quiet
from tapestry.node.trainer.models.weights import load_base

LOG_STEPS = 10  # guess: a line of history a few times a minute
CHECKPOINTS_KEPT = 2  # the newest may be torn


def train(
    base: Path,
    prepared: Prepared,
    recipe: Recipe,
    sequence_length: int,
    work: Path,  # of this training alone; kept until it ends
    out: Path,  # is made: model/, and of LoRA adapters/
    progress: Told,
    steps: int = 0,  # 0: as the recipe says; a repair is shorter
    rows: Sequence[int] = (),  # of own tokens: train these rows alone
    is_repair: bool = False,  # of a model that is almost there
) -> Trained:
    """Train and write the model. Raises UserError; on Ctrl-C what was saved stays in `work`."""
    require_extra()
    from transformers import PrinterCallback

    work.mkdir(mode=0o700, parents=True, exist_ok=True)
    total = steps or steps_of(recipe, prepared.examples)
    clock = _Clock(work / "seconds.json")
    with _quietly():
        model = load_base(base, torch.float32)
        dataset = _dataset(prepared, recipe, work)
        common = _common(recipe, sequence_length, work, total, is_repair)
        trainer = _trainer(model, dataset, base, recipe, rows, common)
        trainer.remove_callback(PrinterCallback)
        trainer.add_callback(_teller(progress, total, clock))
        try:
            trainer.train(resume_from_checkpoint=_newest_whole(work))
        except torch.OutOfMemoryError as error:
            raise UserError(
                "the device has too little memory for this recipe",
                exit_code=ExitCode.FAILED,
                hint="a smaller --batch-size, gradient_checkpointing, or --method lora",
            ) from error
        _require_finite(trainer.model)
        _write(trainer.model, recipe.method == "lora" and not rows, out)
    (out / "history.json").write_text(json.dumps(trainer.state.log_history, indent=1) + "\n")
    tokens = total * recipe.batch_size * recipe.accumulation * sequence_length
    return Trained(trainer.state.global_step, tokens, clock.total_s)


def steps_of(recipe: Recipe, examples: int) -> int:
    """Of the whole recipe."""
    if recipe.steps:
        return recipe.steps
    return max(1, math.ceil(recipe.passes * examples / (recipe.batch_size * recipe.accumulation)))


def device_of() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def _dataset(prepared: Prepared, recipe: Recipe, work: Path) -> Any:
    """On disk, mapped: the examples need not fit into memory. Made again only if the data are others.

    Raises UserError if a file has changed since it was judged."""
    import datasets

    datasets.disable_progress_bars()
    folder = work / f"data-{prepared.digest[:16]}"
    if recipe.stage == "dpo":
        features = None
    else:
        ids = datasets.Sequence(datasets.Value("int32"))
        features = datasets.Features({"input_ids": ids, "labels": ids})
    try:
        return datasets.Dataset.from_generator(
            prepared.train, features=features, cache_dir=str(folder), fingerprint=prepared.digest[:32]
        )
    except datasets.exceptions.DatasetGenerationError as error:
        if isinstance(error.__cause__, UserError):
            raise error.__cause__ from None
        raise


def _trainer(
    model: Any,
    dataset: Any,
    base: Path,
    recipe: Recipe,
    rows: Sequence[int],
    common: dict[str, Any],
) -> Any:
    import trl
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(base, local_files_only=True)
    peft_config = None
    if rows:
        _train_rows_alone(model, rows)
    elif recipe.method == "lora":
        settings = TransformersSpec(
            "transformers", (), "", 1, lora_rank=recipe.lora_rank, lora_alpha=recipe.lora_alpha
        )
        peft_config = lora_config(model, settings)
    if rows:
        common = common | {"weight_decay": 0.0}  # it would change the other rows
    if recipe.stage == "dpo":
        return trl.DPOTrainer(
            model,
            args=_on_one_device(trl.DPOConfig(**common, beta=recipe.beta)),
            train_dataset=dataset,
            processing_class=tokenizer,
            peft_config=peft_config,
        )
    return trl.SFTTrainer(
        model,
        args=_on_one_device(trl.SFTConfig(**common, dataset_kwargs={"skip_prepare_dataset": True})),
        train_dataset=dataset,
        processing_class=tokenizer,
        peft_config=peft_config,
    )


def _on_one_device(arguments: Any) -> Any:
    """The first GPU. transformers would take all that are visible, by DataParallel: trl refuses that, and the
    batches would be larger than the recipe says. Set as transformers itself does for a model in parts."""
    if arguments.n_gpu > 1:
        arguments._n_gpu = 1
    return arguments


def _train_rows_alone(model: Any, rows: Sequence[int]) -> None:
    """The rows of these ids, in the embedding and in the output layer, and nothing else.

    Not by PEFT's trainable tokens: trl computes its loss from the output layer's weight, and refuses them.
    """
    model.requires_grad_(False)
    for tensor in of_vocabulary(model):
        mask = torch.zeros(len(tensor), *[1] * (tensor.dim() - 1))
        mask[list(rows)] = 1
        tensor.requires_grad_(True)
        hooked: Any = tensor  # torch does not type `register_hook`
        hooked.register_hook(lambda gradient, mask=mask: gradient * mask.to(gradient.device))


def _common(recipe: Recipe, length: int, work: Path, total: int, is_repair: bool) -> dict[str, Any]:
    """What both trainers are told. Nothing is reported anywhere: no tracker, no hub.

    A first training's rate rises and falls by a cosine. A repair's stays at the highest of that: with so few
    steps, half of what they could do is lost under a cosine (docs/learning.md, "What a repair needs").
    """
    bf16 = recipe.precision == "bf16" or (
        recipe.precision == "auto" and torch.cuda.is_available() and torch.cuda.is_bf16_supported()
    )
    return {
        "output_dir": str(work),
        "max_length": length + 1,  # windows of text hold one id more than they predict
        "per_device_train_batch_size": recipe.batch_size,
        "gradient_accumulation_steps": recipe.accumulation,
        "max_steps": total,
        "learning_rate": recipe.learning_rate,
        "warmup_steps": 0 if is_repair else int(recipe.warmup_share * total),
        "lr_scheduler_type": "constant" if is_repair else "cosine",
        "weight_decay": recipe.weight_decay,
        "bf16": bf16,
        "gradient_checkpointing": recipe.gradient_checkpointing,
        "seed": recipe.seed,
        "data_seed": recipe.seed,
        "use_cpu": device_of() == "cpu",
        "dataloader_pin_memory": device_of() != "cpu",
        "save_strategy": "steps",
        "save_steps": recipe.save_every_steps,
        "save_total_limit": CHECKPOINTS_KEPT,
        "logging_steps": LOG_STEPS,
        "logging_nan_inf_filter": False,  # it would hide a loss that is no number
        "report_to": [],
        "push_to_hub": False,
        "disable_tqdm": True,
    }


def _newest_whole(work: Path) -> str | None:
    """A checkpoint that was written to its end: its trainer_state.json comes last, and must be JSON."""
    found = sorted(work.glob("checkpoint-*"), key=lambda path: int(path.name.rpartition("-")[2]))
    for path in reversed(found):
        try:
            json.loads((path / "trainer_state.json").read_bytes())
            return str(path)
        except (OSError, ValueError):
            shutil.rmtree(path, ignore_errors=True)
    return None


def _write(model: Any, adapters: bool, out: Path) -> None:
    quiet()  # trl and transformers have turned their bars on again
    if adapters:
        model.save_pretrained(out / "adapters")
        model = model.merge_and_unload()
    model.to("cpu", torch.float32).save_pretrained(out / "model")


def _require_finite(model: Any) -> None:
    """Raises UserError: such a model is worth nothing, and no figure of it can be written down."""
    if not all(bool(tensor.isfinite().all()) for tensor in model.parameters()):
        raise _diverged("there are weights that are no numbers")


def _diverged(what: str) -> UserError:
    return UserError(
        f"the training diverged: {what}",
        exit_code=ExitCode.FAILED,
        hint="derive: a smaller --lr and --restart; rebase: --repair 0",
    )


class _Clock:
    """Seconds of training over restarts, beside the checkpoints."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._before_s = 0.0
        try:
            self._before_s = float(json.loads(path.read_bytes()))
        except (OSError, ValueError, TypeError):
            self._before_s = 0.0
        self._began_s = time.monotonic()

    @property
    def total_s(self) -> float:
        return self._before_s + time.monotonic() - self._began_s

    def save(self) -> None:
        self._path.write_text(json.dumps(self.total_s))


def _teller(progress: Told, total: int, clock: _Clock) -> Any:
    from transformers import TrainerCallback

    class Teller(TrainerCallback):  # type: ignore[misc]  # transformers is not typed here
        def on_step_end(self, _args: Any, state: Any, _control: Any, **_: Any) -> None:
            progress("training", state.global_step, total)

        def on_log(self, _args: Any, state: Any, _control: Any, logs: Any = None, **_: Any) -> None:
            if not math.isfinite((logs or {}).get("loss", 0.0)):
                raise _diverged(f"its loss is no number at step {state.global_step}")

        def on_save(self, *_args: Any, **_: Any) -> None:
            clock.save()

    return Teller()


@contextmanager
def _quietly() -> Iterator[None]:
    """Libraries' advice is about settings that are ours to know; what goes wrong is raised."""
    import logging

    quiet()
    logger = logging.getLogger("trl")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
