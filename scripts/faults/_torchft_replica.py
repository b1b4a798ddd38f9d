"""One replica of torchft, for scripts/recovery.py: trains for a while (sleeps), averages a vector, says when.

    PYTHON _torchft_replica.py NAME STORE_PORT LIGHTHOUSE_URL TRAIN_S

Runs in an environment that has torchft. Each line is: monotonic time, members of the committed average.
"""

from __future__ import annotations

import logging
import sys
import time
from datetime import timedelta

import torch
import torch.distributed as dist
from torchft import Manager, ProcessGroupGloo

ELEMENTS = 48_448  # as in the preset nano
TIMEOUT = timedelta(seconds=5)  # as long as our stall_s


def main() -> None:
    name, store_port, lighthouse, train_s = sys.argv[1], int(sys.argv[2]), sys.argv[3], float(sys.argv[4])
    logging.disable(logging.WARNING)
    store = dist.TCPStore("127.0.0.1", store_port, is_master=True, wait_for_workers=False)
    state = {"step": 0}
    manager = Manager(
        pg=ProcessGroupGloo(timeout=TIMEOUT),
        load_state_dict=state.update,
        state_dict=lambda: dict(state),
        min_replica_size=2,
        timeout=TIMEOUT,
        rank=0,
        world_size=1,
        store_addr="127.0.0.1",
        store_port=store.port,
        lighthouse_addr=lighthouse,
        replica_id=name,
        hostname="127.0.0.1",
        use_async_quorum=False,
    )
    while True:
        time.sleep(train_s)
        try:
            manager.start_quorum()
            manager.allreduce(torch.ones(ELEMENTS)).wait()
            if manager.should_commit():
                print(f"{time.monotonic():.3f} {manager.num_participants()}", flush=True)
        except (RuntimeError, TimeoutError) as error:
            print(f"# {type(error).__name__}: {error}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
