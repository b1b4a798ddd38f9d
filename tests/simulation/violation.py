"""What the simulator raises: an invariant is broken, our bug or a planted one."""

from __future__ import annotations


class Violation(AssertionError):
    """One seed's failure: when, at whom, what."""

    def __init__(self, seed: int, now: float, name: str, text: str) -> None:
        super().__init__(f"seed {seed} t={now:.3f} {name}: {text}")
