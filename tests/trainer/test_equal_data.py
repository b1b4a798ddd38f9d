"""The ranks of one trainer open the data each by itself: they must have found the same."""

from __future__ import annotations

from typing import Any, cast

import pytest

from tapestry.node.trainer.opening import WorkerFailure
from tapestry.node.trainer.worker import require_equal_data


class Ranks:
    """What the ranks before us said, and what we say."""

    def __init__(self, *others: float) -> None:
        self.others = others

    def each(self, value: float) -> list[float]:
        return [*self.others, value]


def test_ranks_that_found_other_data_do_not_train_together() -> None:
    same = float(int("f" * 12, 16))  # 48 bits: what a float holds
    require_equal_data(cast(Any, Ranks(same, same)), "f" * 32)
    with pytest.raises(WorkerFailure, match="the data have changed"):
        require_equal_data(cast(Any, Ranks(same, same - 1)), "f" * 32)
