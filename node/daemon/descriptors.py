"""File descriptors: as many as the machine allows, and enough of them kept back for votes and checkpoints.

Whoever connects costs one: a stream of a peer (p2pd hands each over by a socket of its own), a client of the
endpoint. If those could use them all, the next vote could not be written, and a vote that is not on disk
cannot be sent. So streams get what is left after KEPT, and surface/door.py bounds the endpoint's.
"""

from __future__ import annotations

import resource

WANTED = 65_536  # Guess: far above what any node uses
# 64 of the endpoint and as many about to be refused, 32 streams of which it is not known yet whose they are,
# p2pd's two, files of home, data and trainer.
KEPT = 256
STREAMS_MAX = 1024
STREAMS_MIN = 64  # Guess: a run of a few members works with it


def raise_limit() -> int:
    """Take what the hard limit allows, up to WANTED; gives the limit that holds now."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = WANTED if hard == resource.RLIM_INFINITY else min(WANTED, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
        return wanted
    return WANTED if soft == resource.RLIM_INFINITY else soft


def streams_max(limit: int) -> int:
    """How many streams peers may have open here at a time, all together."""
    return max(STREAMS_MIN, min(STREAMS_MAX, limit - KEPT))
