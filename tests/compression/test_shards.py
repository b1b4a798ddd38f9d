"""Layouts go there and back without a copy too many; shards cover the vector and respect blocks."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tapestry.compression.blockwise import INT8_BLOCK
from tapestry.compression.refusals import RefusedLayout, RefusedVector
from tapestry.compression.shards import Layout, Shard, shard_bounds

CHECKED = settings(max_examples=60, deadline=None)
PAIRS = [("embed", (5, 3)), ("scale", ()), ("norm", (4,)), ("empty", (0, 7)), ("head", (2, 1, 3))]


def tensors(layout: Layout) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    pairs = zip(layout.names, layout.shapes, strict=True)
    return {name: torch.randn(shape, generator=generator) for name, shape in pairs}


def reason_of(call) -> str:
    with pytest.raises(RefusedLayout) as refused:
        call()
    return refused.value.reason


@CHECKED
@given(
    st.lists(
        st.tuples(st.text(max_size=8), st.lists(st.integers(0, 4), max_size=3)),
        unique_by=lambda pair: pair[0],
    )
)
def test_flatten_and_views_are_inverse(pairs: list[tuple[str, list[int]]]) -> None:
    layout = Layout.from_named(pairs)
    named = tensors(layout)
    views = layout.views(layout.flatten(named))
    assert list(views) == [name for name, _ in pairs]
    assert all(torch.equal(views[name], named[name]) for name in named)


def test_tensors_lie_in_the_order_given_without_gaps() -> None:
    layout = Layout.from_named(PAIRS)
    assert layout.offsets == (0, 15, 16, 20, 20)
    assert layout.n == 26
    named = tensors(layout)
    joined = torch.cat([named[name].reshape(-1) for name, _ in PAIRS])
    assert torch.equal(layout.flatten(dict(reversed(named.items()))), joined)


def test_views_share_memory_with_the_vector() -> None:
    layout = Layout.from_named(PAIRS)
    flat = torch.zeros(layout.n)
    layout.views(flat)["norm"].fill_(3)
    assert flat.nonzero().view(-1).tolist() == [16, 17, 18, 19]


def test_flatten_fills_the_vector_given_and_records_no_gradient() -> None:
    layout = Layout.from_named(PAIRS)
    out = torch.zeros(layout.n)
    named = {name: value.requires_grad_() for name, value in tensors(layout).items()}
    assert layout.flatten(named, out) is out
    assert out.count_nonzero() == layout.n
    assert not out.requires_grad


def test_the_schema_hash_is_pinned() -> None:
    # Members of one run may run different versions: the hash must not change by accident.
    layout = Layout.from_named([("a", (2, 3)), ("b", ())])
    assert layout.schema_hash == "64dd521e5dc18bb35f8ed8be0884d0c335438eb9fd5c824996630a8f4fd954b9"


def test_any_change_of_name_shape_or_order_changes_the_schema_hash() -> None:
    variants = [
        PAIRS,
        PAIRS[::-1],
        PAIRS[:-1],
        [*PAIRS[:-1], ("head", (2, 3, 1))],
        [*PAIRS[:-1], ("head", (6,))],
        [*PAIRS[:-1], ("heads", (2, 1, 3))],
        [("a", (1,)), ("b", ())],
        [("a", ()), ("b", (1,))],
        [('a",[1]],["b', (1,))],
        [],
    ]
    assert len({Layout.from_named(pairs).schema_hash for pairs in variants}) == len(variants)
    assert Layout.from_named(PAIRS).schema_hash == Layout.from_named(list(PAIRS)).schema_hash


def test_a_name_twice_is_refused() -> None:
    assert reason_of(lambda: Layout.from_named([("a", (1,)), ("b", (1,)), ("a", (2,))])) == "name"


def test_a_negative_size_is_refused() -> None:
    assert reason_of(lambda: Layout.from_named([("a", (2, -1))])) == "shape"


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"norm": None}, "name"),
        ({"extra": torch.zeros(1)}, "name"),
        ({"norm": None, "Norm": torch.zeros(4)}, "name"),
        ({"norm": torch.zeros(5)}, "shape"),
        ({"norm": torch.zeros(1)}, "shape"),
        ({"norm": torch.zeros(4, 1)}, "shape"),
        ({"norm": torch.zeros(4, dtype=torch.bfloat16)}, "dtype"),
        ({"norm": torch.zeros(4, dtype=torch.float64)}, "dtype"),
    ],
)
def test_tensors_that_do_not_fit_are_refused_and_nothing_is_written(change: dict, reason: str) -> None:
    layout = Layout.from_named(PAIRS)
    named = {name: value for name, value in (tensors(layout) | change).items() if value is not None}
    out = torch.zeros(layout.n)
    assert reason_of(lambda: layout.flatten(named, out)) == reason
    assert not out.any()


def test_a_vector_that_does_not_fit_is_refused() -> None:
    layout = Layout.from_named(PAIRS)
    assert reason_of(lambda: layout.views(torch.zeros(layout.n + 1))) == "length"
    with pytest.raises(RefusedVector, match="dtype"):
        layout.views(torch.zeros(layout.n, dtype=torch.float64))


@CHECKED
@given(st.integers(0, 10_000), st.integers(1, 12).map(lambda blocks: 256 * blocks))
def test_shards_cover_every_element_once_and_start_at_blocks(n: int, shard_elements: int) -> None:
    shards = shard_bounds(n, shard_elements)
    assert [i for shard in shards for i in range(shard.start, shard.stop)] == list(range(n))
    assert [shard.index for shard in shards] == list(range(len(shards)))
    assert all(shard.start % 256 == 0 and 0 < shard.n <= shard_elements for shard in shards)
    assert all(shard.n == shard_elements for shard in shards[:-1])


def test_shards_of_a_small_vector_are_as_written_here() -> None:
    assert shard_bounds(1030, 512) == (Shard(0, 0, 512), Shard(1, 512, 1024), Shard(2, 1024, 1030))


def test_shards_encoded_one_by_one_decode_to_the_same_vector() -> None:
    x = torch.randn(1030, generator=torch.Generator().manual_seed(2))
    parts = [x[shard.start : shard.stop] for shard in shard_bounds(1030, 512)]
    decoded = torch.cat([INT8_BLOCK.decode(INT8_BLOCK.encode(part), part.numel()) for part in parts])
    assert torch.equal(decoded, INT8_BLOCK.decode(INT8_BLOCK.encode(x), 1030))


@pytest.mark.parametrize("shard_elements", [0, -256, 1, 255, 257, 1000])
def test_a_shard_size_that_is_no_multiple_of_the_block_is_refused(shard_elements: int) -> None:
    assert reason_of(lambda: shard_bounds(1000, shard_elements)) == "shard"


def test_a_negative_number_of_elements_is_refused() -> None:
    assert reason_of(lambda: shard_bounds(-1, 256)) == "shard"
