"""8 bits against float32: members that train in turn in this process, with the product's own pieces."""

from __future__ import annotations

import dataclasses

import torch
from _bench import into
from torch import Tensor

from tapestry.compression.codecs import get_codec
from tapestry.compression.reduce import reduce_shard
from tapestry.node.spec.run import training_spec
from tapestry.node.state.outer import f32, make_outer
from tapestry.node.trainer.data.corpus import Corpus
from tapestry.node.trainer.gradients import Windows
from tapestry.node.trainer.inner import InnerLoop
from tapestry.node.trainer.models.llama import build_model, initial_state, model_layout
from training.curve import Judge
from training.plan import Plan


def virtual_run(plan: Plan, epochs: int, codec_name: str | None) -> float:
    """The validation loss after `epochs` of DiLoCo by members that train in turn; deterministic."""
    spec = plan.spec(plan.inner_steps)
    settings = training_spec(spec)
    judge = Judge(plan)
    members = []
    for i in range(plan.nodes):
        corpus = plan.corpus(i)

        def windows(epoch: int, step: int, corpus: Corpus = corpus) -> Windows:
            batches = epoch * settings.train.batches + step
            return Windows(corpus.windows_at(batches * plan.batch_size, plan.batch_size))

        model = build_model(settings.model, settings.data.sequence_length)
        members.append(InnerLoop(model, model_layout(model), settings.train, windows, torch.device("cpu")))
    base = initial_state(dataclasses.replace(settings.model, seed=plan.seed), settings.data.sequence_length)
    n = base.numel()
    outer = make_outer(spec.outer)
    buffers = {name: torch.zeros(n) for name in outer.buffer_names}
    for epoch in range(epochs):
        vectors, weights = [], []
        for member in members:
            member.begin(epoch, base)
            while not member.done:
                member.step()
            vectors.append(torch.empty(n))
            weights.append(member.finish(base, into(vectors[-1])).weight)
        mean = mean_of(vectors, weights, codec_name)
        outer.step(base, buffers, mean, 0, n, epoch + 1)
    return judge.loss_of(base)


def mean_of(vectors: list[Tensor], weights: list[int], codec_name: str | None) -> Tensor:
    """The product's mean, of encoded vectors; without a codec the same sum in float32, encoded nowhere."""
    n = vectors[0].numel()
    if codec_name is not None:
        codec = get_codec(codec_name)
        return codec.decode(reduce_shard([codec.encode(v) for v in vectors], weights, codec, n), n)
    acc = torch.zeros(n)
    for vector, weight in zip(vectors, weights, strict=True):
        acc.add_(vector * f32(weight / sum(weights)))
    return acc
