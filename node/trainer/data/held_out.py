"""Which windows of a source are measured on and never trained on.

A window is held out by its place alone: the second one, and every 50th from there on. So a source that grows
keeps what was held out, and gets none that was trained on before. Beyond HELD_OUT_MAX of them they lie
thinner: half as many of each next stretch, which is as long as all before it.

Must not import torch.
"""

from __future__ import annotations

import numpy as np

HELD_OUT_DIVISOR = 50  # 2 %
HELD_OUT_MAX = 4096  # windows at full density; Guess: more would measure hardly better


def held_out_of(
    windows: int,  # of the source
    evenly: int = 0,  # of a home that version 1 of cursor.json is of: windows that it had then
) -> np.ndarray:  # int64 (k,), sorted window numbers; none of a single window
    """What is held out of a source. That of `windows` begins with that of any smaller number."""
    by_place = _by_place(windows)
    return np.concatenate((_as_before(min(evenly, windows)), by_place[by_place >= evenly]))


def _by_place(windows: int) -> np.ndarray:
    start, end, step = 1, HELD_OUT_DIVISOR * HELD_OUT_MAX, HELD_OUT_DIVISOR
    stretches = [np.arange(start, min(end, windows), step, dtype=np.int64)]
    while end < windows:
        start, end, step = end + 1, 2 * end, 2 * step
        stretches.append(np.arange(start, min(end, windows), step, dtype=np.int64))
    return np.concatenate(stretches)


def _as_before(windows: int) -> np.ndarray:
    """As it was chosen by the whole length: another length gave others."""
    if windows < 2:
        return np.zeros(0, np.int64)
    return evenly_over(windows, min(max(1, windows // HELD_OUT_DIVISOR), HELD_OUT_MAX))


def evenly_over(count: int, chosen: int) -> np.ndarray:
    """int64 (chosen,): from each of `chosen` equal stretches of 0 .. count - 1 its middle."""
    return (2 * np.arange(chosen, dtype=np.int64) + 1) * count // (2 * chosen)


def spread_of(
    held_out: np.ndarray,  # int64 (k,), sorted, below windows
    windows: int,
    count_max: int,
) -> np.ndarray:  # int64 (at most count_max,)
    """Some of them, evenly over the source."""
    if len(held_out) <= count_max:
        return held_out
    nearest = np.searchsorted(held_out, evenly_over(windows, count_max))
    chosen: np.ndarray = held_out[np.unique(np.minimum(nearest, len(held_out) - 1))]
    return chosen
