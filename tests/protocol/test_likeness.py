"""The cosine of each contribution to the others' mean: every node has the same, and no reducer makes it."""

from __future__ import annotations

import dataclasses
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from simulation.shell import EXECUTE
from simulation.world import Faults, Node, World

from tapestry.node.protocol import events as ev
from tapestry.node.protocol.agreement import SUM_MAX, ShardSums
from tapestry.node.protocol.likeness import cosines, likeness_in


def sums(vectors: list[list[float]], scales: list[float] | None = None) -> ShardSums:
    """Of contributions of equal weight; each is in the mean with its scale."""
    scales = scales or [1.0] * len(vectors)
    mean = [
        sum(s * v for s, v in zip(scales, column, strict=True)) / len(vectors)
        for column in zip(*vectors, strict=True)
    ]
    squares = tuple([dot(v, v) for v in vectors])
    return ShardSums(
        squares, dot(mean, mean), squares, tuple([dot(v, mean) for v in vectors]), dot(mean, mean), 0, 0
    )


def dot(a: list[float], b: list[float]) -> float:
    return sum(p * q for p, q in zip(a, b, strict=True))


def by_the_definition(vectors: list[list[float]]) -> list[float]:
    found = []
    for index, one in enumerate(vectors):
        rest = [
            sum(column) for column in zip(*(v for at, v in enumerate(vectors) if at != index), strict=True)
        ]
        found.append(dot(one, rest) / math.sqrt(dot(one, one) * dot(rest, rest)))
    return found


@given(st.integers(3, 7), st.randoms(use_true_random=False))
def test_cosines_are_those_to_the_mean_of_all_others(count, rng):
    drawn = [[rng.uniform(-1, 1) for _ in range(20)] + [1.0] for _ in range(count)]
    vectors = [[value / math.sqrt(dot(one, one)) for value in one] for one in drawn]
    found = cosines([sums([v[:5] for v in vectors]), sums([v[5:] for v in vectors])], [3] * count)
    assert found == pytest.approx(by_the_definition(vectors), abs=1e-9)


def test_who_is_a_hundred_times_as_long_and_clipped_is_judged_by_its_direction():
    vectors = [[1.0, 0.1], [1.0, -0.1], [1.0, 0.0], [100.0, 0.0]]
    found = cosines([sums(vectors, [1.0, 1.0, 1.0, 0.015])], [1] * 4)
    assert found == pytest.approx(by_the_definition(vectors), abs=0.01) and min(found) > 0.99


def test_zeros_and_sums_that_no_vectors_have_are_no_error():
    assert cosines([sums([[0.0], [0.0], [0.0]])], [1, 1, 1]) == [0.0] * 3
    false = ShardSums((0.0, SUM_MAX), SUM_MAX, (1.0, 0.0), (SUM_MAX, -SUM_MAX), 0.0, 0, 0)
    assert all(-1.0 <= cosine <= 1.0 for cosine in cosines([false], [1, 1]))


@dataclasses.dataclass
class Named:
    peer: str
    weight: int = 1


@dataclasses.dataclass
class Exchanged:
    """A whole result, as the exchange has it."""

    said: dict[str, list[ShardSums]]
    names: list[str]
    complete: bool = True

    def result_digest(self) -> str:
        return "result"

    def sums_by_reducer(self) -> dict[str, list[ShardSums]]:
        return self.said

    def contributors(self) -> list[Named]:
        return [Named(name) for name in self.names]


def test_a_reducer_says_nothing_of_itself_and_has_one_voice_about_each_other():
    honest = [sums([[1.0, 0.1], [1.0, 0.0], [1.0, -0.1], [0.0, 1.0]])]
    liar = [sums([[0.0, 1.0], [1.0, 0.0], [1.0, 0.0], [1.0, 0.0]])] * 20
    said = {"a": honest, "b": honest, "c": honest, "d": liar}
    found = dict(likeness_in(Exchanged(said, list("abcd")), "result"))
    assert min(found[peer] for peer in "abc") > 0.8 and abs(found["d"]) < 0.1


def test_one_lying_reducer_of_three_makes_nobody_unlike():
    honest = [sums([[1.0, 0.1], [1.0, 0.0], [1.0, -0.1]])]
    liar = [sums([[1.0, 0.0], [-1.0, 0.0], [1.0, 0.0]])]
    found = dict(likeness_in(Exchanged({"a": honest, "b": honest, "c": liar}, list("abc")), "result"))
    assert min(found.values()) > 0.9


def test_of_another_result_or_of_a_part_nothing_is_said():
    said = {name: [sums([[1.0], [1.0], [1.0]])] for name in "abc"}
    exchanged = Exchanged(said, ["a", "b", "c"])
    assert likeness_in(exchanged, "result") and not likeness_in(exchanged, "another")
    exchanged.complete = False
    assert not likeness_in(exchanged, "result")
    assert not likeness_in(Exchanged({"a": said["a"]}, ["a", "b", "c"]), "result"), "one reducer's word"


def test_every_node_that_has_the_result_says_the_same_of_all_contributors(monkeypatch):
    told: dict[int, list[dict[str, float]]] = {}
    honest = EXECUTE[ev.EndRound]

    def heard(node: Node, out: ev.EndRound) -> None:
        if out.likeness:
            told.setdefault(out.epoch, []).append(dict(out.likeness))
        honest(node, out)

    monkeypatch.setitem(EXECUTE, ev.EndRound, heard)
    world = World(7, peers=4, faults=Faults()).start_all()
    world.until(lambda: world.epoch() >= 6, 120)
    chain = next(iter(world.nodes.values())).core.chain
    complete = [epoch for epoch, all_of in told.items() if len(all_of) == 4]
    assert len(complete) >= 3
    for epoch in complete:
        contributors = {m.peer for m in chain.after(epoch, 1)[0].body.members if m.weight}
        assert all(one == told[epoch][0] and one.keys() == contributors for one in told[epoch])
