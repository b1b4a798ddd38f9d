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
) -> np.ndarray:  # int64 (k,), sorted window numbers; none of a single window
    """What is held out of a source. That of `windows` begins with that of any smaller number."""
    start, end, step = 1, HELD_OUT_DIVISOR * HELD_OUT_MAX, HELD_OUT_DIVISOR
    stretches = [np.arange(start, min(end, windows), step, dtype=np.int64)]
    while end < windows:
        start, end, step = end + 1, 2 * end, 2 * step
        stretches.append(np.arange(start, min(end, windows), step, dtype=np.int64))
    return np.concatenate(stretches)


def spread_of(
    held_out: np.ndarray,  # int64 (k,), sorted, below windows
    windows: int,
    count_max: int,
) -> np.ndarray:  # int64 (at most count_max,)
    """Some of them, evenly over the source."""
    if len(held_out) <= count_max:
        return held_out
    # of count_max equal stretches
    middles = (2 * np.arange(count_max, dtype=np.int64) + 1) * windows // (2 * count_max)
    nearest = np.searchsorted(held_out, middles)
    chosen: np.ndarray = held_out[np.unique(np.minimum(nearest, len(held_out) - 1))]
    return chosen
