"""Where payloads lie in one buffer."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tapestry.compression.codecs import codec_names, get_codec
from tapestry.compression.payloads import PayloadLayout
from tapestry.compression.refusals import RefusedLayout


@given(
    st.sampled_from(codec_names()),
    st.integers(0, 5000),
    st.integers(1, 8).map(lambda blocks: 256 * blocks),
)
def test_payloads_follow_one_another_and_fill_the_buffer(codec: str, n: int, shard_elements: int) -> None:
    layout = PayloadLayout.of(get_codec(codec), n, shard_elements)
    buffer = (torch.arange(layout.size) % 251).to(torch.uint8)
    views = layout.views(buffer)
    assert [view.numel() for view in views] == [layout.codec.payload_size(s.n) for s in layout.shards]
    assert torch.equal(torch.cat(views) if views else buffer[:0], buffer)
    assert layout.n == n == sum(shard.n for shard in layout.shards)
    for view in views:
        view.zero_()
    assert not buffer.any()  # they are the buffer


@pytest.mark.parametrize("shard_elements", [0, 255, -256])
def test_shards_that_are_no_whole_blocks_are_refused(shard_elements: int) -> None:
    with pytest.raises(RefusedLayout):
        PayloadLayout.of(get_codec("int8-block"), 1000, shard_elements)
