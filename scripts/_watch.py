"""Several nodes that are watched together, stopped together, and judged once they have stopped.

`Watch` ends the story when a node ends unasked or when an epoch is shown with two state digests; `verdict`
reads their chains.
"""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Callable, Sequence

from _chains import chain_faults
from _nodes import Failed, Node
from _processes import alive, start_ticks_of
from _show import Show
from _story import Signals

SWEEP_S = 0.5  # between two looks at the nodes
STOP_S = 12.0  # the daemon promises 10
GONE_S = 5.0  # after kill -9 of a node, for its own children to be gone


class Watch:
    """Some nodes, and what was seen of them."""

    def __init__(self, nodes: Sequence[Node], show: Show, began_s: float, *, one_run: bool = True) -> None:
        self.nodes = nodes
        self.show = show
        self.began_s = began_s
        self.one_run = one_run  # else each trains alone, and their digests are not compared
        self.digests: dict[
            int, dict[str, list[str]]
        ] = {}  # epoch -> state digest -> the nodes that showed it

    def agreed(self) -> bool:
        return len({(node.epoch, node.digest) for node in self.nodes}) == 1 and bool(self.nodes[0].digest)

    def wait(self, condition: Callable[[], bool], what: str, limit_s: float) -> None:
        deadline_s = time.monotonic() + limit_s
        while True:
            self.sweep()
            if condition():
                return
            if time.monotonic() >= deadline_s:
                raise Failed(f"waited {limit_s:.0f} s in vain for {what}", self.last_words())
            time.sleep(SWEEP_S)

    def sleep(self, duration_s: float) -> None:
        end_s = time.monotonic() + duration_s
        while (left_s := end_s - time.monotonic()) > 0:
            self.sweep()
            time.sleep(min(SWEEP_S, left_s))

    def sweep(self) -> None:
        """Look at every node once; an end that nobody asked for, or a second digest of an epoch, raises."""
        for node in self.nodes:
            code = node.ended()
            if code is not None:
                raise Failed(f"{node.label} ended with exit code {code}", node.log_tail())
            node.look()
            if self.one_run:
                self._compare(node)
        self.show.update(self.nodes, time.monotonic() - self.began_s)

    def _compare(self, node: Node) -> None:
        if not node.digest:
            return
        seen = self.digests.setdefault(node.epoch, {})
        shown_by = seen.setdefault(node.digest, [])
        if node.label not in shown_by:
            shown_by.append(node.label)
        if len(seen) > 1:
            both = " and ".join(f"{digest[:16]} ({labels[0]})" for digest, labels in seen.items())
            raise Failed(f"epoch {node.epoch} has two state digests: {both}")

    def last_words(self) -> list[str]:
        return [line for node in self.nodes for line in node.log_tail(8)]

    def stop_all(self, signals: Signals) -> None:
        """SIGTERM, and SIGKILL for who does not end in time or when a second signal says to hurry."""
        signals.ending = True  # what follows must run to its end
        for node in self.nodes:
            node.terminate()
        deadline_s = time.monotonic() + STOP_S
        while any(node.running for node in self.nodes) and time.monotonic() < deadline_s:
            if signals.hasten:
                break
            time.sleep(0.05)
        for node in self.nodes:
            if node.running:
                self.show.event(f"{node.label}: does not end, killed with SIGKILL", bad=True)
                node.killed_at_end = True
                node.kill()
        self._kill_orphans()

    def _kill_orphans(self) -> None:
        families = {member for node in self.nodes for member in node.family}
        deadline_s = time.monotonic() + GONE_S
        while alive(families) and time.monotonic() < deadline_s:
            time.sleep(0.05)
        for pid, start_ticks in alive(families):
            if start_ticks_of(pid) == start_ticks:
                self.show.event(f"process {pid} outlived its node: killed", bad=True)
                self.nodes[0].orphans += 1
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)


def verdict(watch: Watch) -> list[str]:
    """What did not hold of what every run promises, in one line each. The nodes have been stopped."""
    chains = {node.label: node.records() for node in watch.nodes}
    run_id = watch.nodes[0].info["run_id"]
    faults = [
        fault
        for label, chain in chains.items()
        for fault in chain_faults(label, chain, run_id, watch.digests)
    ]
    shortest = min(len(chain) for chain in chains.values())
    heads = {tuple(record.head for record in chain[:shortest]) for chain in chains.values()}
    if len(heads) != 1:
        faults.append("the nodes' chains differ")
    return faults + end_faults(watch.nodes)


def end_faults(nodes: Sequence[Node]) -> list[str]:
    faults = []
    if any(node.killed_at_end for node in nodes):
        faults.append("a node did not end within its time after SIGTERM")
    if any(node.orphans for node in nodes):
        faults.append("a process outlived its node")
    return faults
