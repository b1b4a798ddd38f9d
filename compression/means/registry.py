"""Names of means, as run.toml writes them -> means. A new one is a file and a line here, and its keys in
node/spec/run.py.

Must not import: anything outside this package of ours; asyncio; anything that does I/O.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from tapestry.compression.means.aligned import Aligned
from tapestry.compression.means.api import Mean
from tapestry.compression.means.clipped import Clipped
from tapestry.compression.means.elected import SignElected
from tapestry.compression.means.trimmed import Trimmed
from tapestry.compression.means.weighted import WeightedMean

_MEANS: dict[str, Callable[..., Mean]] = {
    "clipped": Clipped,
    "mean": WeightedMean,
    "aligned": Aligned,
    "trimmed": Trimmed,
    "sign-elected": SignElected,
}


def make_mean(rule: str, settings: Mapping[str, Any]) -> Mean:
    """The mean of that name; raises KeyError for a name that is none."""
    return _MEANS[rule](**settings)


def mean_names() -> tuple[str, ...]:
    """The names that make_mean knows."""
    return tuple(_MEANS)
