"""Two processes that are one trainer, on the CPU with gloo: the same contribution, and one death for both.

Real processes: each imports torch and transformers, which takes seconds.
"""

from __future__ import annotations

import asyncio
import dataclasses
import os
import signal
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from tapestry.compression.codecs import get_codec
from tapestry.compression.payloads import PayloadLayout
from tapestry.node.spec.training import LocalTraining, WorkerSettings
from tapestry.node.trainer.group import devices_of
from tapestry.node.trainer.messages import Contribution, Saved, Validation
from tapestry.node.trainer.models.llama import initial_state
from tapestry.node.trainer.process import Died, Event, ProcessLimits, TrainerProcess

DEADLINE_S = 120.0  # only ever waited for by a test that fails
QUICK = ProcessLimits(backoff_initial_s=0.01, backoff_max_s=0.04)


def test_a_device_for_each_process() -> None:
    assert devices_of("auto") == ["auto"]
    assert devices_of("cuda:1") == ["cuda:1"]
    assert devices_of("cuda:0,3") == ["cuda:0", "cuda:3"]
    assert devices_of("cpu:2") == ["cpu", "cpu"]


class Heard:
    """What the trainer told."""

    def __init__(self) -> None:
        self.all: list[Event] = []
        self.more = asyncio.Event()

    def __call__(self, event: Event) -> None:
        self.all.append(event)
        self.more.set()

    async def until(self, cls: type, count: int = 1) -> Event:
        async with asyncio.timeout(DEADLINE_S):
            while len(found := [event for event in self.all if isinstance(event, cls)]) < count:
                self.more.clear()
                await self.more.wait()
        return found[count - 1]


def settings_for(settings: WorkerSettings, folder: Path, device: str) -> WorkerSettings:
    """Five windows a batch, which two processes cannot share evenly."""
    train = dataclasses.replace(settings.training.train, inner_steps=3, batch_size=5)
    return dataclasses.replace(
        settings,
        training=dataclasses.replace(settings.training, train=train),
        device=device,
        shard_elements=4096,
        local=LocalTraining(micro_batch=2),
        inner_state_path=str(folder / device.replace(":", "-") / "inner.safetensors"),
    )


async def two_epochs(settings: WorkerSettings, after: Callable[[TrainerProcess], None]) -> list[Tensor]:
    """The contributions of epochs 0, 1, and, after `after` has had its way, of epoch 1 again; decoded.

    Also the loss of the base, and what was told of the first contribution.
    """
    heard = Heard()
    trainer = await TrainerProcess.start(settings, heard, QUICK)
    payloads = PayloadLayout.of(get_codec(settings.codec), trainer.layout.n, settings.shard_elements)
    try:
        trainer.params.copy_(initial_state(settings.training.model, settings.training.data.sequence_length))
        trainer.evaluate(0)
        vectors = []
        for count, epoch in enumerate((0, 1, 1), start=1):
            trainer.begin(epoch)
            told = await heard.until(Contribution, count)
            assert isinstance(told, Contribution)
            vectors.append(decoded(trainer.contribution, payloads))
            vectors.append(torch.tensor([told.norm, told.loss, told.tokens]))
            if count == 2:
                trainer.save(1)
                assert await heard.until(Saved) == Saved(1, "")
                after(trainer)
        validation = await heard.until(Validation)
        assert isinstance(validation, Validation)
        vectors.append(torch.tensor([validation.loss]))
    finally:
        await trainer.stop(DEADLINE_S)
    assert len([event for event in heard.all if isinstance(event, Died)]) == trainer.restarts
    return vectors


def decoded(buffer: Tensor, payloads: PayloadLayout) -> Tensor:
    pairs = zip(payloads.views(buffer.clone()), payloads.shards, strict=True)
    return torch.cat([payloads.codec.decode(payload, shard.n) for payload, shard in pairs])


def kill_a_rank(trainer: TrainerProcess) -> None:
    """The newest child of the worker is its other rank."""
    assert trainer.pid is not None
    children = Path(f"/proc/{trainer.pid}/task/{trainer.pid}/children").read_text().split()
    assert len(children) == 1
    os.kill(int(children[0]), signal.SIGKILL)


def test_two_processes_contribute_what_one_does_and_start_again_together(
    worker_settings: WorkerSettings, tmp_path: Path
) -> None:
    """One rank is killed before epoch 1 is begun again: both are new, and both have their saved state."""
    one = asyncio.run(two_epochs(settings_for(worker_settings, tmp_path, "cpu"), lambda trainer: None))
    two = asyncio.run(two_epochs(settings_for(worker_settings, tmp_path, "cpu:2"), kill_a_rank))
    for got, expected in zip(two, one, strict=True):
        scale = expected.abs().max().item()
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=scale / 60)  # a step or two of the codec
        if got.numel() > 3:
            assert torch.nn.functional.cosine_similarity(got, expected, dim=0) > 0.9999
    assert torch.equal(two[2], two[4])  # the same bits, after the death as before it
    assert {path.name for path in (tmp_path / "cpu-2").iterdir()} == {
        "inner.safetensors",
        "inner.1.safetensors",
        "inner.safetensors.meet",
    }
