"""What a person is told of a version that was begun."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tapestry.node.sovereign.plans import repair_share, repair_steps


@given(st.floats(0.0, 2.0), st.integers(0, 10**6))
def test_the_repair_that_is_named_gives_as_many_steps(share: float, behind: int) -> None:
    """The one of before, where the default has become another."""
    steps = repair_steps(share, behind)
    assert repair_steps(float(repair_share(steps, behind)), behind) == steps


@pytest.mark.parametrize(
    ("steps", "behind", "named"), [(5, 100, "0.05"), (29, 100, "0.29"), (0, 100, "0"), (1, 0, "1")]
)
def test_it_is_short(steps: int, behind: int, named: str) -> None:
    assert repair_share(steps, behind).startswith(named)
