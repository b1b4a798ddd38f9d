"""What the trainer's desk makes of a contribution that is of no use."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

from tapestry.compression.refusals import RefusedPayload
from tapestry.node.daemon.trainer_desk import TrainerDesk
from tapestry.node.trainer.messages import Contribution


def test_who_makes_a_contribution_that_the_codec_refuses_is_told_so_and_the_core_hears_of_none() -> None:
    """The desk told the core that no trainer was up, and the trainer nothing: neither said a word again."""
    rejected: list[str] = []
    fed: list[object] = []

    async def compute(function: Any, *args: Any) -> Any:
        return function(*args)

    def take(buffer: object, copy: bool) -> None:
        raise RefusedPayload("not_finite", "a scale decodes to no finite value")

    async def scenario() -> None:
        loop = SimpleNamespace(compute=compute, feed=fed.append)
        trainer = SimpleNamespace(contribution=None, must_copy=False, reject=rejected.append)
        reporter = SimpleNamespace(metrics=SimpleNamespace(refused=lambda reason: None))
        averaging, goal = SimpleNamespace(take=take, commit=None), SimpleNamespace(forbidden=lambda: "")
        desk = TrainerDesk(loop, trainer, averaging, reporter, goal, "own")  # type: ignore[arg-type]
        await desk._take(Contribution(4, 1, 5, 1.0, 2.0, 5, 1, 0.0), "")

    asyncio.run(scenario())
    assert rejected == ["not_finite: a scale decodes to no finite value"] and not fed
