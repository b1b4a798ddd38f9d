"""What a trainer writes for its node: bytes, norm and residual against the naive way, over whole vectors."""

from __future__ import annotations

import dataclasses
from typing import NoReturn, cast

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from tapestry.compression.blocks import DEVICE_PIECE, PIECE
from tapestry.compression.codecs import codec_names, get_codec
from tapestry.compression.payloads import PayloadLayout
from tapestry.compression.refusals import RefusedVector
from tapestry.compression.shards import Layout
from tapestry.node.spec.training import TrainSpec
from tapestry.node.trainer.encoder import Encoder, Write, alike
from tapestry.node.trainer.group import Group
from tapestry.node.trainer.inner import Diverged, InnerLoop

CHECKED = settings(max_examples=60, deadline=None)
CPU = torch.device("cpu")
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device")
DEVICES = ["cpu", pytest.param("cuda", marks=[pytest.mark.gpu, needs_gpu])]
INNER = TrainSpec(inner_steps=1, batch_size=1, lr=0.01, warmup_steps=0)


@st.composite
def states(draw: st.DrawFn) -> tuple[Tensor, Tensor]:
    """Base and local parameters, f32 (n,): of very different magnitude, some equal."""
    n = draw(st.sampled_from([1, 255, 256, 257, 1000, 2048, 5000]))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    magnitudes = rng.choice([1e-42, 1e-38, 1e-20, 1e-3, 1.0, 1e30], n)
    base = (rng.uniform(-1, 1, n) * magnitudes).astype(np.float32)
    local = (base + rng.normal(0, 1e-3, n) * magnitudes).astype(np.float32)
    local[rng.uniform(size=n) < draw(st.sampled_from([0.0, 0.5, 1.0]))] = 0
    return torch.from_numpy(base), torch.from_numpy(local)


def layout_of(n: int, codec: str = "int8-block", shard_elements: int = 512) -> PayloadLayout:
    return PayloadLayout.of(get_codec(codec), n, shard_elements)


def naive(layout: PayloadLayout, vector: Tensor) -> Tensor:
    """All payloads, of a vector that is whole."""
    return torch.cat([layout.codec.encode(vector[s.start : s.stop].clone()) for s in layout.shards])


def decoded(layout: PayloadLayout, buffer: Tensor) -> Tensor:
    parts = zip(layout.shards, layout.views(buffer), strict=True)
    return torch.cat([layout.codec.decode(payload, shard.n) for shard, payload in parts])


def writer(vector: Tensor) -> Write:
    def write(start: int, stop: int, out: Tensor) -> None:
        out.copy_(vector[start:stop])

    return write


def encoded(encoder: Encoder, vector: Tensor, generation: int = 1) -> Tensor:
    out = torch.full((encoder._layout.size,), 77, dtype=torch.uint8)
    encoder.encode(writer(vector), out, generation)
    return out


def no_batch(epoch: int, step: int) -> NoReturn:
    raise AssertionError("nobody takes a step here")


def loop_at(local: Tensor, device: torch.device, steps: int = 1) -> InnerLoop:
    """An inner loop whose epoch is over; its parameters, or its gradient without steps, are `local`."""
    model = nn.Module()
    model.weight = nn.Parameter(torch.zeros(local.numel()))
    layout = Layout.from_named([("weight", (local.numel(),))])
    inner = dataclasses.replace(INNER, inner_steps=steps)
    loop = InnerLoop(model, layout, inner, no_batch, device)
    loop.begin(0, torch.zeros(local.numel()))
    loop._losses, loop._tokens = [1.0, 1.0, 1.0], 3
    (loop._held.pieces[0].values if steps else loop._held.pieces[0].gradient).copy_(local)
    return loop


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("codec", codec_names())
@CHECKED
@given(state=states())
def test_a_pseudo_gradient_is_encoded_to_the_bytes_of_the_whole_vector(
    device: str, codec: str, state: tuple[Tensor, Tensor]
) -> None:
    (base, local), place = state, torch.device(device)
    layout = layout_of(base.numel(), codec)
    out = torch.full((layout.size,), 77, dtype=torch.uint8)
    encoder = Encoder(layout, place, residual=False)
    outcome = loop_at(local, place).finish(base, lambda write: encoder.encode(write, out, 1))
    vector = base - local
    assert torch.equal(out, naive(layout, vector))
    norm = float(torch.linalg.vector_norm(vector, dtype=torch.float64))
    assert outcome.norm == pytest.approx(norm, rel=1e-13)


@pytest.mark.parametrize("device", DEVICES)
@CHECKED
@given(state=states())
def test_a_mean_gradient_is_encoded_to_the_bytes_of_the_whole_vector(
    device: str, state: tuple[Tensor, Tensor]
) -> None:
    (base, gradient), place = state, torch.device(device)
    layout = layout_of(base.numel())
    out = torch.full((layout.size,), 77, dtype=torch.uint8)
    encoder = Encoder(layout, place, residual=False)
    loop_at(gradient, place, steps=0).finish(base, lambda write: encoder.encode(write, out, 1))
    assert torch.equal(out, naive(layout, gradient / 3))


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("shard_elements", [PIECE, 3 * PIECE - 256, 1 << 26])
def test_vectors_of_many_pieces_give_the_same_bytes_however_they_are_cut(
    threads: int, shard_elements: int
) -> None:
    n, before = 3 * PIECE + 300, torch.get_num_threads()
    x = torch.randn(n, generator=torch.Generator().manual_seed(1))
    layout, out = layout_of(n, shard_elements=shard_elements), torch.zeros(0, dtype=torch.uint8)
    torch.set_num_threads(threads)
    try:
        out = torch.empty(layout.size, dtype=torch.uint8)
        norm = Encoder(layout, CPU, residual=False).encode(writer(x), out, 1)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(out, naive(layout, x))
    assert norm == pytest.approx(float(torch.linalg.vector_norm(x, dtype=torch.float64)), rel=1e-13)


def test_the_cpu_never_asks_for_more_than_a_piece_and_for_each_element_once() -> None:
    n, asked = 3 * PIECE + 300, []

    def write(start: int, stop: int, out: Tensor) -> None:
        asked.append((start, stop))
        out.zero_()

    layout = layout_of(n, shard_elements=2 * PIECE)
    out = torch.empty(layout.size, dtype=torch.uint8)
    assert Encoder(layout, CPU, residual=False).encode(write, out, 1) == 0.0
    assert max(stop - start for start, stop in asked) == PIECE
    assert [start for start, _ in asked] == [0, *(stop for _, stop in asked[:-1])]
    assert asked[-1][1] == n


@CHECKED
@given(state=states(), residual=st.booleans())
def test_the_way_of_a_gpu_gives_the_same_bytes_on_the_cpu(
    state: tuple[Tensor, Tensor], residual: bool
) -> None:
    """What CUDA itself does is tested above, where there is one."""
    layout = layout_of(state[0].numel())
    here, there = (Encoder(layout, CPU, residual) for _ in range(2))
    there._in_pieces = False
    for generation, vector in enumerate(state, start=1):
        assert torch.equal(encoded(here, vector, generation), encoded(there, vector, generation))
        for encoder in (here, there):
            encoder.settle(generation)


@pytest.mark.parametrize(
    ("n", "shard_elements", "spans"),
    [
        (DEVICE_PIECE * 2 + 1, DEVICE_PIECE // 4, [(0, 4), (4, 8), (8, 9)]),
        (DEVICE_PIECE * 2, DEVICE_PIECE * 2, [(0, 1)]),
        (1024, 512, [(0, 2)]),
        (1025, 512, [(0, 2), (2, 3)]),
    ],
)
def test_a_gpu_encodes_together_what_is_alike_and_fits(n: int, shard_elements: int, spans: list) -> None:
    assert alike(layout_of(n, shard_elements=shard_elements)) == spans


def test_a_codec_that_cannot_work_on_the_device_gets_its_pieces_on_the_cpu() -> None:
    places = {
        name: Encoder(layout_of(256, name), torch.device("cuda"), False)._device for name in codec_names()
    }
    assert {name: place.type for name, place in places.items()} == {
        "int8-block": "cuda",
        "bnb-dynamic8": "cpu",
    }


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("codec", codec_names())
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("place", [0, 700, 999])
def test_what_is_not_finite_diverges(device: str, codec: str, bad: float, place: int) -> None:
    layout, there = layout_of(1000, codec), torch.device(device)
    out = torch.empty(layout.size, dtype=torch.uint8)
    local = torch.ones(1000)
    local[place] = bad
    encoder = Encoder(layout, there, residual=False)
    with pytest.raises(Diverged, match="the contribution is not finite"):
        loop_at(local, there).finish(torch.ones(1000), lambda write: encoder.encode(write, out, 1))


# ---- the residual -------------------------------------------------------------------------------------


def vectors(*seeds: int) -> list[Tensor]:
    return [torch.randn(1000, generator=torch.Generator().manual_seed(seed)) for seed in seeds]


def rounded_away(layout: PayloadLayout, vector: Tensor) -> Tensor:
    return vector - decoded(layout, naive(layout, vector))


@pytest.fixture(params=DEVICES)
def encoder(request: pytest.FixtureRequest) -> Encoder:
    return Encoder(layout_of(1000), torch.device(request.param), residual=True)


def test_what_was_rounded_away_of_a_committed_contribution_is_added_to_the_next(encoder: Encoder) -> None:
    layout = encoder._layout
    x, y, z = vectors(1, 2, 3)
    assert torch.equal(encoded(encoder, x, 1), naive(layout, x))
    encoder.settle(1)
    sent = y + rounded_away(layout, x)
    assert torch.equal(encoded(encoder, y, 2), naive(layout, sent))
    encoder.settle(2)
    assert torch.equal(encoded(encoder, z, 3), naive(layout, z + rounded_away(layout, sent)))


def test_what_was_rounded_away_of_a_contribution_that_did_not_count_is_dropped(encoder: Encoder) -> None:
    """And what had been added to it is added again."""
    layout = encoder._layout
    x, y, z = vectors(1, 2, 3)
    encoded(encoder, x, 1)
    encoder.settle(1)
    encoded(encoder, y, 2)
    encoder.settle(0)
    assert torch.equal(encoded(encoder, z, 3), naive(layout, z + rounded_away(layout, x)))


@pytest.mark.parametrize("counted", [1, -1])
def test_if_another_than_the_newest_counted_nothing_is_kept(encoder: Encoder, counted: int) -> None:
    x, y, z = vectors(1, 2, 3)
    encoded(encoder, x, 1)
    encoded(encoder, y, 2)
    encoder.settle(counted)
    assert torch.equal(encoded(encoder, z, 3), naive(encoder._layout, z))


def test_the_norm_is_that_of_the_vector_without_the_residual(encoder: Encoder) -> None:
    x, y = vectors(1, 2)
    encoded(encoder, x, 1)
    encoder.settle(1)
    norm = encoder.encode(writer(y), torch.empty(encoder._layout.size, dtype=torch.uint8), 2)
    assert norm == pytest.approx(float(torch.linalg.vector_norm(y, dtype=torch.float64)), rel=1e-13)


class OneOfTwo:
    """The second of two ranks, for which nobody adds up."""

    rank, size = 1, 2

    def sum(self, value: float) -> float:
        return value


def test_of_several_processes_each_looks_at_its_own_shards_alone() -> None:
    """The others' may be half written at that moment."""
    layout = layout_of(3 * DEVICE_PIECE, shard_elements=DEVICE_PIECE)
    encoder = Encoder(layout, torch.device("cpu"), residual=True, group=cast(Group, OneOfTwo()))
    x = torch.randn(layout.n, generator=torch.Generator().manual_seed(1))
    out = torch.full((layout.size,), 0x80, dtype=torch.uint8)  # no payload has such codes
    encoder.encode(writer(x), out, 1)
    encoder.settle(1)
    (theirs, mine, also_theirs), expected = layout.views(out), layout.views(naive(layout, x))
    assert torch.equal(mine, expected[1])
    assert bool((theirs == 0x80).all() and (also_theirs == 0x80).all())
    place = slice(DEVICE_PIECE, 2 * DEVICE_PIECE)
    assert encoder._residual is not None
    assert torch.equal(encoder._residual[place], x[place] - layout.codec.decode(mine, DEVICE_PIECE))


def test_a_residual_that_makes_a_finite_vector_infinite_is_refused(encoder: Encoder) -> None:
    x = torch.full((1000,), 3.4e38)
    encoder._residual = x
    with pytest.raises(RefusedVector):
        encoded(encoder, x)
