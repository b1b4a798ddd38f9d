"""Sizes by arithmetic: what is too much is refused before anything is built."""

from __future__ import annotations

import dataclasses

import pytest

from tapestry.node.spec.run import RunSpec, preset_spec
from tapestry.node.spec.size import Machine, parameters_of, size_fault, size_lines
from tapestry.node.trainer.models.llama import build_model, model_layout
from tapestry.node.trainer.tokenizers.byte import VOCAB_SIZE

LARGE = Machine(memory_bytes=2**40, disk_bytes=2**40, params_max=None)


def spec(**model: int) -> RunSpec:
    table = preset_spec("nano", "test").to_dict()
    table["model"] |= model
    return RunSpec.from_dict(table)


@pytest.mark.parametrize("preset", ["nano", "tiny", "small"])
def test_the_arithmetic_is_that_of_the_model(preset: str) -> None:
    run = preset_spec(preset, "test")
    assert parameters_of(run) == model_layout(build_model(run.model, run.data.sequence_length)).n
    assert VOCAB_SIZE == 259


def test_a_run_that_fits_is_joined() -> None:
    run = spec()
    assert size_fault(run, parameters_of(run), LARGE) == ""


def test_a_genesis_that_claims_less_than_its_spec_means_is_refused() -> None:
    run = spec(hidden_size=16_384, layers=256, intermediate_size=65_536, heads=128, kv_heads=128)
    assert parameters_of(run) > 4 * 10**9
    assert size_fault(run, 1000, LARGE).startswith("its genesis claims 1,000 parameters, its run spec means ")


def test_more_than_memory_disk_or_the_operator_allow_is_refused_in_one_line() -> None:
    run = spec()
    n = parameters_of(run)
    for machine, words in (
        (dataclasses.replace(LARGE, params_max=n - 1), f"--max-params is {n - 1:,}"),
        (dataclasses.replace(LARGE, memory_bytes=4 * n - 1), "of memory at least"),
        (dataclasses.replace(LARGE, disk_bytes=8 * n - 1), "of disk"),
    ):
        fault = size_fault(run, n, machine)
        assert words in fault and "\n" not in fault


def test_a_person_is_shown_parameters_memory_disk_traffic_and_time() -> None:
    run = spec()
    text = "\n".join(size_lines(run, parameters_of(run)))
    for word in (f"{parameters_of(run):,} parameters", "memory", "disk", "each round", "at most 300 s"):
        assert word in text
