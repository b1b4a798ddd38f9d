"""`rebase --watch N`: says when the base has moved N epochs beyond what a derivative stands on.

Looks at the home's chain now and then, beside a running node or after it: only at the end of the file, so it
costs the same however long the chain is. A version whose gate failed counts as tried: the next look comes N
epochs later, not at once again. Must not import torch.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path

from tapestry.node.disk.files import unseal
from tapestry.node.errors import UserError
from tapestry.node.home import Home
from tapestry.node.sovereign.derivative import Shelf

LOOK_S = 15.0  # guess: an epoch takes minutes where a rebase is worth anything
TAIL_BYTES = 1 << 20  # guess: a record of 1,024 members has 0.4 MB


def watch(
    home: Home, name: str, every_epochs: int, sleep: Callable[[float], None] = time.sleep
) -> Iterator[int]:
    """The base's epoch, each time it has moved so far since the newest version was made. Raises UserError."""
    shelf = Shelf(home)
    tried = max(version.parent.epoch for version in shelf.require(name).versions)
    while True:
        epoch = newest_epoch(home.chain)
        if epoch >= tried + every_epochs:
            tried = epoch
            yield epoch
        else:
            sleep(LOOK_S)


def newest_epoch(chain: Path) -> int:
    """Of the last whole record; 0 if there is none. Raises UserError."""
    try:
        with chain.open("rb") as file:
            size = file.seek(0, 2)
            file.seek(max(0, size - TAIL_BYTES))
            lines = file.read().split(b"\n")[:-1]  # what follows the last line's end is being written
    except FileNotFoundError:
        return 0
    except OSError as error:
        raise UserError(f"cannot read {chain}: {error.strerror}") from error
    if not lines:
        return 0
    try:
        epoch: int = unseal(lines[-1])["body"]["epoch"]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{chain}: its last record does not hold: {error}") from error
    return epoch
