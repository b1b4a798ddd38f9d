"""The process that attacks, until SIGTERM: hostile.py NAME TARGET NICENESS, of which TARGET is JSON."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import os
import signal
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from _processes import group_like_process

from strangers.registry import ATTACKS
from strangers.target import BUSY, Target


async def busy(target: Target) -> None:
    """No attack: a process that takes what the cores leave it, in the quiet times."""
    target.begin()
    while True:
        hashlib.sha256(bytes(1 << 16))
        await asyncio.sleep(0)


def hostile(name: str, about: str, niceness: int) -> None:
    """The process that attacks, until SIGTERM."""
    os.nice(niceness)
    group_like_process(os.getpid())
    table = json.loads(about)
    target = Target(**{**table, "folder": Path(table["folder"])})

    async def main() -> None:
        running = asyncio.ensure_future(busy(target) if name == BUSY else ATTACKS[name][1](target))
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, running.cancel)
        with contextlib.suppress(asyncio.CancelledError):
            await running

    asyncio.run(main())


if __name__ == "__main__":
    hostile(sys.argv[1], sys.argv[2], int(sys.argv[3]))
