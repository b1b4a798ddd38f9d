"""Which states lead to which: the arithmetic of intervals against a list that is cut and goes on."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from tapestry.node.protocol.path import last_before, leads, step_from, stretches, updates_from


@given(st.lists(st.one_of(st.none(), st.integers(0, 30)), max_size=30), st.data())
def test_the_path_to_a_state_is_the_line_that_was_cut_where_it_was_rolled_back(
    asked: list[int | None], data: st.DataObject
) -> None:
    rolled: dict[int, int] = {}
    line, lines = [0], [[0]]  # the epochs that the newest state is made of; those of each state
    for epoch, to in enumerate(asked, 1):
        if to in line[:-1]:
            rolled[epoch] = to
            line = line[: line.index(to) + 1]
        line = [*line, epoch]
        lines.append(line)
    epoch = data.draw(st.integers(0, len(asked)))
    line = lines[epoch]
    assert [at for stretch in stretches(rolled, epoch) for at in stretch] == line
    for at in range(len(lines) + 1):
        assert leads(rolled, at, epoch) == (at in line)
        assert last_before(rolled, at, epoch) == max(on for on in line if on <= at)
        if at < epoch:
            assert step_from(rolled, at, epoch) == _next(rolled, line, at)
        if at in line:
            rest = line[line.index(at) + 1 :]
            count = next((n for n, on in enumerate(rest) if on in rolled), len(rest))
            assert updates_from(rolled, at, epoch) == count


def _next(rolled: dict[int, int], line: list[int], at: int) -> int:
    """Of a state that is not on the line, the next that an earlier one becomes."""
    if at in line:
        return line[line.index(at) + 1]
    return next(on for on in line if on > at and on in rolled)
