"""The checker's own arithmetic for what contributions weigh, written from docs/members.md.

Nobody has more than `max_influence` of the whole, and newcomers together no more than `open_share`. Where
both cannot be, `open_share` holds: the members weigh the same, and a newcomer no more than a member. In
floats, and by going down from the largest voice until the cap fits: the protocol halves whole numbers.
"""

from __future__ import annotations

from collections.abc import Sequence

CLOSE = 1e-6  # relative: a cap is kept
NO_CAP = 1e-6  # of the smallest voice of a member: below it there is none


def weights_of(voices: Sequence[tuple[int, bool]], influence: float, open_share: float) -> list[float]:
    """`voices`: (voice, whether it is a member's), all positive. `influence`, `open_share`: 0 to 1."""
    members = [voice for voice, is_member in voices if is_member]
    if not members:
        return [0.0] * len(voices)
    cap = float(max(voice for voice, _ in voices))
    while cap > NO_CAP * min(members):
        weights = _with_cap(voices, cap, open_share)
        allowed = influence * sum(weights)
        if max(weights) <= allowed * (1 + CLOSE):
            return weights
        cap = allowed
    return _with_cap(voices, float(min(members)), open_share)


def _with_cap(voices: Sequence[tuple[int, bool]], cap: float, open_share: float) -> list[float]:
    members = sum(min(voice, cap) for voice, is_member in voices if is_member)
    strangers = sum(voice for voice, is_member in voices if not is_member)
    room = members * open_share / (1 - open_share)
    cut = min(1.0, room / strangers) if strangers else 1.0
    return [min(cap, voice if is_member else voice * cut) for voice, is_member in voices]


def agree(weights: Sequence[int], expected: Sequence[float]) -> bool:
    """Within what whole numbers round off."""
    slack = 2 + len(weights)
    return all(abs(w - e) <= slack + 1e-5 * e for w, e in zip(weights, expected, strict=True))
