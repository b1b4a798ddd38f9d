"""In which order windows are seen: none twice before all of its source were seen once, for any number of
epochs.

Each pass over a source is a keyed permutation of its windows: a Feistel network over the next even number
of bits, walked until it falls inside (Black and Rogaway, "Ciphers with arbitrary finite domains", 2002,
section 3). So the whole state of a pass is one counter; nothing is shuffled, stored or remembered, at any
size.

Sources are mixed by their weights without chance: the next window comes from the source that is furthest
behind its share. With weights in proportion to sizes, all sources end their passes at the same time.

Everything here is a pure function on integers, equal on every machine and in every version of NumPy.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

ROUNDS = 6  # Guess: 4 are enough against chance (Luby and Rackoff, 1988), and six cost nothing


class Permutation:
    """A permutation of 0 .. count - 1."""

    def __init__(self, count: int, key: bytes) -> None:
        if count < 1:
            raise ValueError("nothing to permute")
        half_bits = max(1, ((count - 1).bit_length() + 1) // 2)
        self._count = np.uint64(count)
        self._shift = np.uint64(half_bits)
        self._mask = np.uint64((1 << half_bits) - 1)
        digest = hashlib.blake2b(key, digest_size=8 * ROUNDS).digest()
        self._keys = np.frombuffer(digest, dtype="<u8").astype(np.uint64)

    def __call__(
        self,
        numbers: np.ndarray,  # int64 (k,), from 0 to count - 1
    ) -> np.ndarray:  # int64 (k,)
        values = self._network(numbers.astype(np.uint64))
        while (outside := values >= self._count).any():
            values[outside] = self._network(values[outside])
        return values.astype(np.int64)

    def _network(self, values: np.ndarray) -> np.ndarray:
        left, right = values >> self._shift, values & self._mask
        for key in self._keys:
            left, right = right, left ^ (_mixed(right ^ key) & self._mask)
        return (left << self._shift) | right


def _mixed(values: np.ndarray) -> np.ndarray:
    """The finalizer of splitmix64 (Steele, Lea and Flood, 2014)."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    mixed: np.ndarray = values ^ (values >> np.uint64(31))
    return mixed


@dataclass(frozen=True, slots=True)
class Position:
    """How many windows of each source came before: all there is to remember."""

    before: tuple[int, ...]  # of other mixtures: before a source was added or a weight changed
    drawn: tuple[int, ...]  # of this one

    @property
    def seen(self) -> tuple[int, ...]:
        return tuple(a + b for a, b in zip(self.before, self.drawn, strict=True))


@dataclass(frozen=True, slots=True)
class WindowOrder:
    """The order of the training windows of several sources."""

    counts: tuple[int, ...]  # windows of each source
    shares: tuple[int, ...]  # how often each is drawn, relative to the others; integers, so that they add up
    keys: tuple[bytes, ...]  # of each source's permutations

    def start(self) -> Position:
        nothing = (0,) * len(self.counts)
        return Position(nothing, nothing)

    def draw(self, position: Position, count: int) -> tuple[list[tuple[int, int]], Position]:
        """The next `count` windows as (source, window), and the position after them."""
        drawn = list(position.drawn)
        chosen: list[tuple[int, int]] = []  # source, and the number of the window in its order
        for _ in range(count):
            source = self._next_source(drawn)
            chosen.append((source, position.before[source] + drawn[source]))
            drawn[source] += 1
        return self._permuted(chosen), Position(position.before, tuple(drawn))

    def advance(self, position: Position, count: int) -> Position:
        """The position after `count` more windows."""
        drawn = list(position.drawn)
        if len(drawn) == 1:
            return Position(position.before, (drawn[0] + count,))
        for _ in range(count):
            drawn[self._next_source(drawn)] += 1
        return Position(position.before, tuple(drawn))

    def passes(self, position: Position) -> float:
        """Over all sources together: windows seen, by windows there are."""
        return sum(position.seen) / sum(self.counts)

    def _next_source(self, drawn: Sequence[int]) -> int:
        """The one furthest behind its share of one more window than there are; of equals, the first."""
        if len(drawn) == 1:
            return 0
        total, whole = sum(drawn) + 1, sum(self.shares)
        behind = [share * total - count * whole for share, count in zip(self.shares, drawn, strict=True)]
        return behind.index(max(behind))

    def _permuted(self, chosen: list[tuple[int, int]]) -> list[tuple[int, int]]:
        """Each number within its pass as the window that stands there."""
        permuted = list(chosen)
        groups: dict[tuple[int, int], list[int]] = {}
        for place, (source, number) in enumerate(chosen):
            groups.setdefault((source, number // self.counts[source]), []).append(place)
        for (source, nth_pass), places in groups.items():
            permutation = Permutation(self.counts[source], self.keys[source] + b"/%d" % nth_pass)
            numbers = np.array([chosen[place][1] % self.counts[source] for place in places], dtype=np.int64)
            for place, window in zip(places, permutation(numbers).tolist(), strict=True):
                permuted[place] = (source, window)
        return permuted


def shares_of(
    counts: Sequence[int],
    weights: Sequence[float],
    rehearsal: Sequence[bool],
    rehearsal_share: float,
) -> tuple[int, ...]:
    """Integers in proportion to windows times weight, with the rehearsing part made rehearsal_share."""
    if len(set(weights)) == 1 and not any(rehearsal):
        return tuple(counts)
    sized = [count * weight for count, weight in zip(counts, weights, strict=True)]
    parts = {
        flag: sum(one for one, r in zip(sized, rehearsal, strict=True) if r == flag) for flag in (False, True)
    }
    part_shares = {False: 1.0 - rehearsal_share, True: rehearsal_share}
    shares = [part_shares[flag] * one / parts[flag] for one, flag in zip(sized, rehearsal, strict=True)]
    return tuple(max(1, round(share * (1 << 40))) for share in shares)
