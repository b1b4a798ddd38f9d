"""The state in memory: its digest, its step, and what it says of itself when it is torn."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from blake3 import blake3
from hypothesis import given
from hypothesis import strategies as st
from state.kit import SCHEMA, arithmetic, new_state, state_bytes

from tapestry.compression.refusals import RefusedPayload
from tapestry.node.protocol.agreement import ALIKE, PPM, Agreement
from tapestry.node.protocol.record import Body, Member, Record
from tapestry.node.spec.run import AdamWSpec, NesterovSpec, OuterSpec, preset_spec
from tapestry.node.state.model import Arithmetic, DigestMismatch, ModelState, TornState, spans

HEAD = "aa" * 32


def _payloads(state: ModelState, seed: int = 0) -> list[torch.Tensor]:
    rng = torch.Generator().manual_seed(seed)
    codec = state.arithmetic.codec
    return [codec.encode(torch.randn(shard.n, generator=rng)) for shard in state.arithmetic.shards]


def record(agreement: Agreement = ALIKE, contributors: int = 4) -> Record:
    """Of epoch 1; a voter that contributed nothing is in it too."""
    members = tuple(Member(f"p{index}", 3, "c0" * 32) for index in range(contributors))
    body = Body(HEAD, 1, HEAD, HEAD, (*members, Member("voter", 0, "")), HEAD, agreement=agreement)
    return Record(body, HEAD, 0, ())


def test_the_digest_is_of_schema_names_and_bytes_and_not_of_the_epoch() -> None:
    state = new_state(300, fill=1.5)
    params, momentum = blake3(np.full(300, 1.5, "<f4").tobytes()).hexdigest(), blake3(bytes(1200)).hexdigest()
    text = f'["tapestry state 2","{SCHEMA}",300,[["params","{params}"],["momentum","{momentum}"]]]'
    expected = blake3(text.encode()).hexdigest()
    assert state.vector_digests() == {"params": params, "momentum": momentum}
    assert state.digest() == expected
    state.epoch, state.head = 5, HEAD
    assert state.digest() == expected


@pytest.mark.parametrize("vector", [0, 1])
def test_one_bit_in_any_vector_changes_the_digest(vector: int) -> None:
    state = new_state(1000)
    before = state.digest()
    state.vectors()[vector][-1] ^= 1
    assert state.digest() != before


def test_apply_is_the_outer_step_on_the_decoded_mean() -> None:
    state, expected = new_state(700, fill=0.5), new_state(700, fill=0.5)
    payloads = _payloads(state)
    state.apply(payloads, record())
    codec = state.arithmetic.codec
    decoded = [codec.decode(p, s.n) for p, s in zip(payloads, state.arithmetic.shards, strict=True)]
    expected.arithmetic.outer.step(expected.params, expected.buffers, torch.cat(decoded), 0, 700, 1)
    assert state_bytes(state) == state_bytes(expected)
    assert (state.epoch, state.head, state.torn) == (1, HEAD, False)


@pytest.mark.parametrize("outer", [NesterovSpec(norm="members"), AdamWSpec()])
def test_a_step_taken_aside_is_the_step_to_the_bit_and_changes_nothing(outer: OuterSpec) -> None:
    settings = {"outer.lr": 0.25}
    made = dataclasses.replace(arithmetic(700, outer), outer_spec=outer, lengthens=True)
    state = new_state(700, made, fill=0.5)
    first, found = record(), Agreement(0, 0, 600_000)
    state.apply(_payloads(state, 1), first)
    body = dataclasses.replace(first.body, epoch=2, agreement=found)
    before, out = state_bytes(state), torch.empty(700)
    state.aside(_payloads(state, 2), body, settings, out)
    assert state_bytes(state) == before
    state.apply(_payloads(state, 2), dataclasses.replace(first, body=body), settings)
    assert torch.equal(state.params, out)


@pytest.mark.parametrize(
    ("norm_kept_ppm", "divisor"), [(600_000, 0.6), (PPM, 1.0), (1, 0.5), (0, 0.5), (333_333, 0.5)]
)
def test_with_the_members_norm_the_mean_is_divided_by_what_the_record_says_is_kept(
    norm_kept_ppm: int, divisor: float
) -> None:
    """Bit for bit as numpy divides, and never by less than four unrelated members keep, which is a half."""
    state, expected = (
        new_state(700, dataclasses.replace(arithmetic(700), lengthens=True), fill=0.5) for _ in range(2)
    )
    payloads = _payloads(state)
    state.apply(payloads, record(Agreement(0, 0, norm_kept_ppm)))
    codec = state.arithmetic.codec
    decoded = [codec.decode(p, s.n) for p, s in zip(payloads, state.arithmetic.shards, strict=True)]
    mean = torch.from_numpy(torch.cat(decoded).numpy() / np.float32(divisor))
    expected.arithmetic.outer.step(expected.params, expected.buffers, mean, 0, 700, 1)
    assert state_bytes(state) == state_bytes(expected)


def test_one_contributor_alone_has_its_own_norm_whatever_the_record_says() -> None:
    longer = dataclasses.replace(arithmetic(10), lengthens=True)
    assert longer.divisor(record(Agreement(0, 0, 5), contributors=1).body) == 1.0


@pytest.mark.parametrize(("norm", "divisor"), [("mean", 1.0), ("members", 0.5)])
def test_the_run_spec_says_whose_norm_the_mean_has(norm: str, divisor: float) -> None:
    spec = dataclasses.replace(preset_spec("nano", "n"), outer=NesterovSpec(norm=norm))  # type: ignore[arg-type]
    assert Arithmetic.of(spec, 300).divisor(record(Agreement(0, 0, 5)).body) == divisor


def test_a_step_that_fails_half_way_leaves_a_torn_state_that_says_so() -> None:
    state = new_state(700)
    payloads = _payloads(state)
    payloads[-1] = payloads[-1][:-1]
    with pytest.raises(RefusedPayload):
        state.apply(payloads, record())
    with pytest.raises(TornState, match="loaded again"):
        state.digest()
    with pytest.raises(TornState, match="loaded again"):
        state.apply(_payloads(state), record())


def test_adopt_takes_only_the_announced_numbers() -> None:
    source, state = new_state(10, fill=2.0), new_state(10)
    for ours, theirs in zip(state.overwrite(), source.vectors(), strict=True):
        ours[:] = theirs
    with pytest.raises(DigestMismatch):
        state.adopt(3, HEAD, "00" * 32)
    assert state.torn
    state.adopt(3, HEAD, source.digest())
    assert (state.torn, state.epoch, state.head) == (False, 3, HEAD)


def test_adamw_keeps_two_buffers_and_they_count_in_the_bytes() -> None:
    state = new_state(10, arithmetic(10, AdamWSpec()))
    assert state.names == ("params", "m", "v")
    assert state.size_bytes == 120 == len(state_bytes(state))


@given(
    sizes=st.lists(st.integers(0, 9), min_size=1, max_size=4),
    start=st.integers(0, 30),
    more=st.integers(0, 30),
)
def test_spans_are_the_slice_of_the_concatenation(sizes: list[int], start: int, more: int) -> None:
    vectors = [memoryview(bytearray(range(10 * i, 10 * i + size))) for i, size in enumerate(sizes)]
    whole = b"".join(bytes(vector) for vector in vectors)
    got = b"".join(bytes(span) for span in spans(vectors, start, start + more))
    assert got == whole[start : start + more]
