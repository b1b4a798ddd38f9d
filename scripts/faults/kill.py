"""SIGKILL of one of 4 nodes while it exchanges shards; then its restart."""

from __future__ import annotations

import random
import signal
import time
from pathlib import Path

from faults.row import Row
from faults.swarm import Swarm, sent_bytes

# Of 4, each sends 3/4 of a vector; a quarter of it goes once more to 2 of 3: 1.22. All of it again: 1.89.
MOVED_MAX = 1.45


def kill(folder: Path, repeat: int, rng: random.Random) -> list[Row]:
    """SIGKILL in the middle of a round, and the restart."""
    # Up to the kill the round was a normal one: what comes after bounds what the death has cost.
    died = Row("SIGKILL of one of 4", "the same round commits without it, from the kill", 2.0)
    moved = Row(
        "SIGKILL of one of 4", "only its shards move: bytes sent, as a share of a normal round's", None
    )
    back = Row("restart after SIGKILL", "contributes again, from exec to the record that counts it", 10.0)
    swarm = Swarm(folder, 4)
    try:
        for index in range(repeat):
            victim = swarm.nodes[index % 4]
            survivors = swarm.others(victim)
            normal_s, normal_bytes, begun = swarm.normal_rounds()
            before = sent_bytes(swarm.nodes)
            epoch, led = swarm.catch_exchanging(victim)
            process = victim.process
            assert process is not None
            process.send_signal(signal.SIGKILL)
            killed_at = time.monotonic()
            process.wait()
            record, last = swarm.wait_commit(epoch + 1, survivors), swarm.first_commit(epoch, swarm.nodes)
            assert last is not None
            after = sent_bytes(survivors)
            if record.at < killed_at:
                died.notes.append("killed too late: the round was over")
            else:
                died.add(record.at - killed_at)
                counted = bool(record.weights.get(swarm.ids[victim]))
                whole_s = record.at - last.at
                died.notes.append(
                    f"round={whole_s:.2f} s normal={normal_s:.2f} s led={led} counted={counted}"
                )
                usual = normal_bytes * 3 / 4  # of three of four
                share = sum(after[n] - before[n] for n in survivors) / usual - (epoch - begun)
                moved.add(share)
                moved.check(share < MOVED_MAX, f"{share:.2f} times the bytes: more than its shards moved")
            time.sleep(rng.uniform(0, 3))
            newest = max(swarm.tails[n].epoch for n in survivors)
            began = time.monotonic()
            victim.start("--peer", survivors[0].address)
            back.add(swarm.wait_contribution(victim, newest, survivors).at - began)
            victim.wait_ready()
    finally:
        swarm.close()
    return [died, moved, back]
