"""Names and frames: everything but the frame that was expected is refused, with the reason."""

import gc
import struct

import numpy as np
import pytest
import torch

from tapestry.compression.blockwise import INT8_BLOCK
from tapestry.compression.bnb import BNB_DYNAMIC8
from tapestry.compression.codecs import HEADER_BYTES, Codec, codec_names, get_codec, pack, unpack
from tapestry.compression.refusals import Refused, RefusedCodec, RefusedPayload

N = 257  # a ragged last block, and scales that are not aligned


def payload_of(n: int = N) -> torch.Tensor:  # uint8 (payload_size(n),)
    return INT8_BLOCK.encode(torch.from_numpy(np.random.default_rng(n).normal(size=n).astype(np.float32)))


def frame_of(n: int = N) -> bytearray:
    payload = payload_of(n)
    return bytearray(pack(INT8_BLOCK, n, payload) + payload.numpy().tobytes())


def reason_of(buffer: bytes | bytearray, codec: Codec = INT8_BLOCK, n: int = N) -> str:
    with pytest.raises(RefusedPayload) as refused:
        unpack(buffer, codec, n)
    return refused.value.reason


@pytest.mark.parametrize("n", [0, 1, 255, 256, 257, 1000])
@pytest.mark.parametrize("kind", [bytes, bytearray, memoryview])
def test_a_frame_of_any_buffer_gives_its_payload_back(n: int, kind: type) -> None:
    assert torch.equal(unpack(kind(bytes(frame_of(n))), INT8_BLOCK, n), payload_of(n))


def test_the_header_is_what_the_module_says() -> None:
    expected = struct.pack("<4sHHQQ", b"TAPF", 1, 1, N, INT8_BLOCK.payload_size(N))
    assert pack(INT8_BLOCK, N, payload_of()) == expected
    assert len(expected) == HEADER_BYTES == 24


def test_the_payload_is_a_view_of_the_buffer() -> None:
    buffer = frame_of()
    view = unpack(buffer, INT8_BLOCK, N)
    buffer[HEADER_BYTES] = 77
    assert view[0] == 77


def test_the_payload_keeps_its_buffer_alive() -> None:
    view = unpack(bytes(frame_of(100_000)), INT8_BLOCK, 100_000)
    gc.collect()
    filler = [bytes(frame_of(100_001)) for _ in range(5)]
    assert torch.equal(view, payload_of(100_000))
    assert filler


def test_every_truncation_is_refused() -> None:
    frame = frame_of()
    assert {reason_of(frame[:length]) for length in range(len(frame))} == {"length"}


def test_every_extension_is_refused() -> None:
    frame = frame_of()
    assert {reason_of(frame + bytes(extra)) for extra in (1, 2, 3, 4, 24, 260, len(frame))} == {"length"}


def test_every_flipped_bit_of_the_header_is_refused_by_the_field_it_is_in() -> None:
    reasons = ["magic"] * 4 + ["version"] * 2 + ["codec"] * 2 + ["count"] * 8 + ["length"] * 8
    for position, reason in enumerate(reasons):
        for bit in range(8):
            frame = frame_of()
            frame[position] ^= 1 << bit
            assert reason_of(frame) == reason


def test_a_frame_of_another_codec_is_refused() -> None:
    assert INT8_BLOCK.payload_size(N) == BNB_DYNAMIC8.payload_size(N)
    assert reason_of(frame_of(), codec=BNB_DYNAMIC8) == "codec"


def test_a_frame_of_another_size_is_refused() -> None:
    assert reason_of(frame_of(), n=N - 1) == "count"
    assert reason_of(frame_of(), n=N + 1) == "count"


def test_a_header_that_lies_consistently_about_a_huge_vector_is_refused_unread() -> None:
    huge = struct.pack("<4sHHQQ", b"TAPF", 1, 1, 2**60, INT8_BLOCK.payload_size(2**60))
    assert reason_of(huge) == "count"
    assert reason_of(huge, n=2**60) == "length"


def test_a_sign_bit_or_an_exponent_of_ones_in_a_scale_is_refused() -> None:
    for block in range(2):
        top = HEADER_BYTES + N + 4 * block + 3
        negative, infinite = frame_of(), frame_of()
        negative[top] |= 0x80
        infinite[top - 1] |= 0x80
        infinite[top] |= 0x7F
        assert reason_of(negative) == "scale"
        assert reason_of(infinite) == "not_finite"


def test_an_illegal_code_in_any_block_is_refused() -> None:
    for position in (0, 255, 256):
        frame = frame_of()
        frame[HEADER_BYTES + position] = 0x80
        assert reason_of(frame) == "code"


def test_a_header_for_the_wrong_payload_is_never_made() -> None:
    with pytest.raises(RefusedPayload, match="length"):
        pack(INT8_BLOCK, N + 1, payload_of())


def test_codecs_are_found_by_name_and_have_wire_ids_of_their_own() -> None:
    codecs = [get_codec(name) for name in codec_names()]
    assert [codec.name for codec in codecs] == ["int8-block", "bnb-dynamic8"]
    assert [codec.wire_id for codec in codecs] == [1, 2]


def test_an_unknown_name_is_refused_with_the_names_there_are() -> None:
    with pytest.raises(RefusedCodec, match=r"int8-blok.*int8-block, bnb-dynamic8") as refused:
        get_codec("int8-blok")
    assert refused.value.reason == "codec"
    assert isinstance(refused.value, Refused) and isinstance(refused.value, ValueError)
