"""bnb-dynamic8 against bitsandbytes itself, against the map searched naively, and quiet on the screen."""

import logging
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tapestry.compression.bnb import BNB_DYNAMIC8, ERROR_BOUND, dynamic_map
from tapestry.compression.refusals import RefusedPayload, RefusedVector

CHECKED = settings(max_examples=40, deadline=None)


@pytest.fixture(scope="module")
def functional():
    level = logging.getLogger("bitsandbytes").level
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    import bitsandbytes.functional

    logging.getLogger("bitsandbytes").setLevel(level)
    return bitsandbytes.functional


@st.composite
def vectors(draw: st.DrawFn) -> np.ndarray:  # f32 (n,)
    n = draw(st.sampled_from((0, 1, 255, 256, 257, 700)))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    magnitude = draw(st.sampled_from((1e-44, 1e-40, 1e-37, 1e-30, 1.0, 1e30, 3.4e38)))
    x = rng.uniform(-1, 1, n) ** draw(st.sampled_from((1, 3, 9))) * magnitude
    x[rng.uniform(size=n) < draw(st.sampled_from((0.0, 0.5, 1.0)))] = 0
    return x.astype(np.float32)


def per_element(x: np.ndarray, payload: torch.Tensor) -> np.ndarray:  # f64 (n,)
    scales = payload[len(x) :].numpy().view("<f4").astype(np.float64)
    return np.repeat(scales, 256)[: len(x)]


def test_the_map_is_that_of_bitsandbytes(functional) -> None:
    theirs = functional.create_dynamic_map()
    # linspace differs in its last bits between processors, so a unit in the last place is allowed.
    assert torch.allclose(dynamic_map(), theirs, rtol=2**-23, atol=0)
    assert torch.equal(dynamic_map(), dynamic_map().sort().values)


def test_decode_gives_the_bits_of_bitsandbytes(functional) -> None:
    x = torch.from_numpy(np.random.default_rng(1).normal(size=4096).astype(np.float32))
    payload = BNB_DYNAMIC8.encode(x)
    scales = payload[4096:].clone().view(torch.float32)
    theirs = functional.dequantize_blockwise(payload[:4096], absmax=scales, code=dynamic_map(), blocksize=256)
    assert torch.equal(BNB_DYNAMIC8.decode(payload, 4096), theirs)


def test_encode_gives_the_codes_of_bitsandbytes_away_from_zero(functional) -> None:
    x = torch.from_numpy(np.random.default_rng(2).normal(size=65536).astype(np.float32))
    payload = BNB_DYNAMIC8.encode(x)
    codes, state = functional.quantize_blockwise(x, code=dynamic_map(), blocksize=256)
    away = (x.view(-1, 256).abs() > 1e-4 * state.absmax[:, None]).view(-1)
    assert torch.equal(payload[:65536][away], codes[away])
    assert payload[65536:].numpy().tobytes() == state.absmax.numpy().tobytes()


@CHECKED
@given(vectors())
def test_decode_looks_up_and_multiplies_once(x: np.ndarray) -> None:
    payload = BNB_DYNAMIC8.encode(torch.from_numpy(x))
    scales = np.repeat(payload[len(x) :].numpy().view("<f4"), 256)[: len(x)].astype(np.float32)
    expected = dynamic_map().numpy()[payload[: len(x)].numpy()] * scales
    assert BNB_DYNAMIC8.decode(payload, len(x)).numpy().tobytes() == expected.tobytes()


@CHECKED
@given(vectors())
def test_the_error_is_within_the_bound_at_any_magnitude(x: np.ndarray) -> None:
    payload = BNB_DYNAMIC8.encode(torch.from_numpy(x))
    decoded = BNB_DYNAMIC8.decode(payload, len(x)).numpy().astype(np.float64)
    subnormal_step = 2.0**-149  # decode cannot hit a target between two subnormals
    assert (np.abs(x - decoded) <= ERROR_BOUND * per_element(x, payload) + subnormal_step / 2).all()


@CHECKED
@given(vectors())
def test_the_scale_of_a_block_is_its_absolute_maximum(x: np.ndarray) -> None:
    payload = BNB_DYNAMIC8.encode(torch.from_numpy(x))
    naive = [max(abs(v) for v in x[start : start + 256]) for start in range(0, len(x), 256)]
    assert payload[len(x) :].numpy().tobytes() == np.array(naive, "<f4").tobytes()


def test_values_near_zero_get_the_nearest_code() -> None:
    x = np.concatenate([[1.0], np.geomspace(1e-9, 5e-5, 100), -np.geomspace(1e-9, 5e-5, 100)])
    codes = BNB_DYNAMIC8.encode(torch.from_numpy(x.astype(np.float32)))[: len(x)].numpy()
    naive = np.abs(x.astype(np.float32).astype(np.float64)[:, None] - dynamic_map().double().numpy())
    assert (codes == naive.argmin(1)).all()


def test_zeros_come_back_as_zeros_beside_anything() -> None:
    x = torch.zeros(1000)
    x[::300] = torch.tensor([1.0, -1e-40, 3e38, 1e-45])
    decoded = BNB_DYNAMIC8.decode(BNB_DYNAMIC8.encode(x), 1000)
    assert not decoded[x == 0].any()
    assert not BNB_DYNAMIC8.decode(BNB_DYNAMIC8.encode(torch.zeros(300)), 300).view(torch.int32).any()


def test_a_power_of_two_changes_only_the_scales() -> None:
    x = torch.from_numpy(np.random.default_rng(3).uniform(0.5, 1, 512).astype(np.float32))
    codes = BNB_DYNAMIC8.encode(x)[:512]
    for exponent in (-120, -101, 101, 127):
        assert torch.equal(BNB_DYNAMIC8.encode(x * 2.0**exponent)[:512], codes)


def test_a_heavy_tail_costs_less_than_with_int8() -> None:
    from tapestry.compression.blockwise import INT8_BLOCK

    x = torch.full((256,), 1e-3)
    x[0] = 1.0
    errors = [
        (codec.decode(codec.encode(x), 256) - x)[1:].abs().max() for codec in (BNB_DYNAMIC8, INT8_BLOCK)
    ]
    assert errors[0] < errors[1] / 10


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_nan_or_infinity_is_refused(bad: float) -> None:
    x = torch.ones(300)
    x[299] = bad
    with pytest.raises(RefusedVector) as refused:
        BNB_DYNAMIC8.encode(x)
    assert refused.value.reason == "not_finite"


@pytest.mark.parametrize(
    ("scale", "reason"),
    [(float("nan"), "not_finite"), (float("inf"), "not_finite"), (-1.0, "scale"), (-0.0, "scale")],
)
def test_a_scale_that_is_no_magnitude_is_refused(scale: float, reason: str) -> None:
    payload = BNB_DYNAMIC8.encode(torch.ones(10))
    payload[10:] = torch.from_numpy(np.array([scale], "<f4").view(np.uint8))
    with pytest.raises(RefusedPayload) as refused:
        BNB_DYNAMIC8.decode(payload, 10)
    assert refused.value.reason == reason


def test_the_first_encoding_imports_bitsandbytes_and_prints_nothing() -> None:
    program = (
        "import sys, torch\n"
        "from tapestry.compression.codecs import get_codec\n"
        "codec = get_codec('bnb-dynamic8')\n"
        "assert 'bitsandbytes' not in sys.modules\n"
        "codec.encode(torch.ones(300))\n"
        "assert 'bitsandbytes' in sys.modules\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
