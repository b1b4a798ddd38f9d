"""In which order windows are seen: none twice before all of its source were seen once, for any number of
epochs, also where the source grows meanwhile.

Each pass over a source is a keyed permutation of its windows: a Feistel network over the next even number
of bits, walked until it falls inside (Black and Rogaway, "Ciphers with arbitrary finite domains", 2002,
section 3). So the whole state of a pass is one counter, and another one for each time that the source has
grown within the pass; nothing is shuffled or stored, at any size.

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
class Course:
    """The order of one source's training windows: pass after pass.

    A source that grows within a pass, when `place` windows of it have come, has its new windows mixed with
    those that have not come: a permutation of the numbers from `place` to `count` - 1 gives for each number
    either a new window, or the number in whose turn an older window would have come. So each window comes
    once in the pass, however often the source grows.
    """

    key: bytes
    sizes: tuple[tuple[int, int], ...]  # (place in the pass, windows from there on), both rising, from 0 on
    start: int = 0  # windows that came before this pass
    number: int = 0  # of this pass

    @classmethod
    def of(cls, key: bytes, count: int) -> Course:
        """Of so many windows, from the beginning."""
        return cls(key, ((0, count),))

    @property
    def count(self) -> int:
        """How many windows there are."""
        return self.sizes[-1][1]

    @property
    def began(self) -> int:
        """How many windows had come when it became what it is: it has no earlier numbers."""
        return self.start + self.sizes[-1][0]

    def windows(
        self,
        numbers: np.ndarray,  # int64 (k,): which windows come: the first is 0; from `began` on
    ) -> np.ndarray:  # int64 (k,)
        passes, places = np.divmod(numbers - self.start, self.count)
        windows = np.empty_like(places)
        for nth in np.unique(passes).tolist():
            windows[passes == nth] = self._of_pass(nth, places[passes == nth])
        return windows

    def grown(self, seen: int, count: int) -> Course:
        """With `count` windows, of which the first are those of now, from the `seen`-th that comes on."""
        if count == self.count:
            return self
        passes, place = divmod(seen - self.start, self.count)
        sizes = self.sizes if not passes else ((0, self.count),)
        sizes = (*(one for one in sizes if one[0] < place), (place, count))
        return Course(self.key, sizes, self.start + passes * self.count, self.number + passes)

    def anew(self, seen: int, count: int) -> Course:
        """Of other windows, after so many of these: a new pass, in an order of its own."""
        begun = -(-(seen - self.start) // self.count)
        return Course(self.key, ((0, count),), seen, self.number + begun)

    def _of_pass(self, nth: int, places: np.ndarray) -> np.ndarray:
        """Of the `nth` pass after this one; int64 (k,) -> int64 (k,)."""
        key = self.key + b"/%d" % (self.number + nth)
        windows = places
        for growth, (place, count) in reversed([*enumerate(self.sizes if not nth else ((0, self.count),))]):
            permutation = Permutation(count - place, key + b"/%d" % growth if growth else key)
            older = windows < count  # all at first; then those that are not new since
            windows[older] = place + permutation(windows[older] - place)
        return windows


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

    courses: tuple[Course, ...]  # of each source
    shares: tuple[int, ...]  # how often each is drawn, relative to the others; integers, so that they add up

    @property
    def counts(self) -> tuple[int, ...]:
        """Training windows of each source."""
        return tuple(course.count for course in self.courses)

    def start(self) -> Position:
        nothing = (0,) * len(self.courses)
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
        """Each number as the window that comes then."""
        permuted = list(chosen)
        for source, course in enumerate(self.courses):
            places = [place for place, (one, _) in enumerate(chosen) if one == source]
            numbers = np.array([chosen[place][1] for place in places], dtype=np.int64)
            for place, window in zip(places, course.windows(numbers).tolist(), strict=True):
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
