"""What `tapestry init` sets where the defaults of keys are not what was measured best: docs/learning.md.

The defaults of `[train]` and `[outer]` are DiLoCo's (2311.08105), for rounds of 64 steps and more. Members
whose text differs learn better in short rounds whose mean is taken as it is; models from random weights also
with Muon inside. A run that knows its length lets its learning rate fall along a cosine to the end of it.
"""

from __future__ import annotations

from dataclasses import replace

from tapestry.node.spec.run import NesterovSpec, RunSpec, preset_spec

MEAN_AS_IT_IS = NesterovSpec(lr=1.0, momentum=0.0)
INNER_STEPS = 8  # 16: 2 % worse (sketch); 64, AdamW and DiLoCo's step: 35 % (tiny)
RATES = {
    "nano": (4e-3, 2e-2),
    "tiny": (2e-3, 1e-2),
    "small": (1e-3, 5e-3),
}  # AdamW's and Muon's; small: guess


def preset_recipe(preset: str, name: str, epochs: int = 0) -> RunSpec:
    """The spec of a new run of a preset; raises UserError for an unknown preset or a bad name."""
    spec = preset_spec(preset, name)
    lr, muon_lr = RATES[preset]
    train = replace(spec.train, inner_steps=INNER_STEPS, optimizer="muon", lr=lr, muon_lr=muon_lr)
    return recipe(replace(spec, train=train), epochs)


def recipe(
    spec: RunSpec,
    epochs: int = 0,  # the run's planned length; 0: not known, the rate stays
) -> RunSpec:
    """The same run, with the outer step and the schedule that init recommends."""
    train = spec.train
    if epochs:
        steps = epochs * train.inner_steps
        warmup_steps = min(train.warmup_steps, steps // 4)
        train = replace(train, schedule="cosine", schedule_steps=steps, warmup_steps=warmup_steps)
    return replace(spec, train=train, outer=MEAN_AS_IT_IS)
