"""What each contribution weighs in the mean: by the charter's voice, under the caps that the run has (G9).

All members compute it alike, in whole numbers. Standard library only.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

from tapestry.node.protocol.members import SHARE, UNIT, Roll
from tapestry.node.protocol.settings import number_of

FINE = 1 << 20  # parts of a weight, in which a cap is sought


def voice_weights(roll: Roll, contributors: Sequence[tuple[str, int]], max_influence: float) -> list[int]:
    """What each contribution weighs in the mean, of (peer, tokens) in order: all compute it alike.

    By the charter's voice, never by what the sender says it should be; nobody above `max_influence`, and an
    open run's newcomers together at most `open_share`. Where both cannot be, `open_share` holds: the members
    weigh the same then, and no newcomer more than a member. Without tokens nothing weighs anything, and a
    newcomer does not where no member contributes.
    """
    max_influence = number_of(roll.settings, "round.max_influence", max_influence)
    raw = [_voice(roll, peer, tokens) for peer, tokens in contributors]
    old = [peer in roll.members for peer, _ in contributors]
    if all(old):
        return capped_weights(raw, max_influence)
    return list(_capped_beside(tuple(raw), tuple(old), roll.charter.open_share, max_influence))


def _voice(roll: Roll, peer: str, tokens: int) -> int:
    if tokens <= 0:
        return 0
    if roll.charter.voice == "tokens":
        return tokens
    seat = roll.members.get(peer)
    return UNIT * (seat.voice if seat is not None and roll.charter.voice == "fixed" else 1)


@lru_cache(maxsize=32)  # a leader asks at every message, and of 320 contributions it takes 15 ms
def _capped_beside(
    raw: tuple[int, ...], old: tuple[bool, ...], open_share: int, max_influence: float
) -> list[int]:
    """Of members (`old`) and newcomers: by the highest cap for which nobody has more than `max_influence`.

    Whole numbers only. The cap is sought in parts of FINE, so that what is rounded off decides nothing, and
    counts as kept within a millionth.
    """
    over, under = max_influence.as_integer_ratio()

    def is_kept(cap: int) -> bool:
        weights = _under_cap([w * FINE for w in raw], old, open_share, cap)
        return max(weights) * under * SHARE <= sum(weights) * over * (SHARE + 1)

    kept, broken = 0, max(raw) * FINE
    if is_kept(broken):
        return _under_cap(raw, old, open_share, max(raw))
    while broken - kept > 1:
        middle = (kept + broken) // 2
        if is_kept(middle):
            kept = middle
        else:
            broken = middle
    smallest = min([w for w, is_old in zip(raw, old, strict=True) if is_old and w])
    return _under_cap(raw, old, open_share, kept // FINE or smallest)


def _under_cap(raw: Sequence[int], old: Sequence[bool], open_share: int, cap: int) -> list[int]:
    """Members cut to `cap`; newcomers cut down, all by one factor, so that they have no more than their share
    together, and then to `cap` as well."""
    members = sum([min(w, cap) for w, is_old in zip(raw, old, strict=True) if is_old])
    strangers = sum([w for w, is_old in zip(raw, old, strict=True) if not is_old])
    room = min(strangers, members * open_share // (SHARE - open_share))
    return [
        min(cap, w if is_old or not w else w * room // strangers) for w, is_old in zip(raw, old, strict=True)
    ]


def capped_weights(weights: Sequence[int], max_influence: float) -> list[int]:
    """Weights such that none is more than `max_influence` of their sum (rounding down aside).

    Solves for the cap c with c = max_influence * sum(min(w, c)): the k largest are cut to
    c = m * rest / (1 - k * m). Where m * n <= 1 no such cap exists and all that contribute weigh the same.
    """
    positive = sorted((w for w in weights if w > 0), reverse=True)
    if not positive or max_influence >= 1.0:
        return list(weights)
    cap, rest = positive[-1], sum(positive)
    for k, w in enumerate(positive):
        share = 1.0 - k * max_influence
        if share <= 0.0:
            break
        if w <= int(max_influence * rest / share):
            cap = int(max_influence * rest / share)
            break
        rest -= w
    return [min(w, cap) for w in weights]
