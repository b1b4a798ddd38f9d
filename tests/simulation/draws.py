"""What `random.Random` draws, at a fraction of its cost: its own are Python, and not compiled with us.

The same bits give the same results, so that a seed is the same world as ever.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import TypeVar

T = TypeVar("T")


def choice(rng: random.Random, options: Sequence[T]) -> T:
    """As `rng.choice(options)`."""
    return options[_below(rng, len(options))]


def randint(rng: random.Random, low: int, high: int) -> int:
    """As `rng.randint(low, high)`: both may come."""
    return low + _below(rng, high - low + 1)


def hex_digits(rng: random.Random, count: int) -> str:
    """An even number of them."""
    return rng.getrandbits(4 * count).to_bytes(count // 2, "big").hex()


def _below(rng: random.Random, count: int) -> int:
    bits = count.bit_length()
    drawn = rng.getrandbits(bits)
    while drawn >= count:
        drawn = rng.getrandbits(bits)
    return drawn
