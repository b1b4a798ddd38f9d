"""A node's chain as it grows on its disk: when each record came."""

from __future__ import annotations

import contextlib
import json
import threading
import time
from dataclasses import dataclass

from e2e.harness import Node

POLL_S = 0.01


@dataclass(frozen=True, slots=True)
class Committed:
    """A record as it came to lie on a node's disk."""

    at: float
    epoch: int
    weights: dict[str, int]  # peer -> weight
    forced: bool


class Tail:
    """Follows a node's chain.jsonl, whoever writes it: when each record came, and how long the chain was."""

    def __init__(self, node: Node) -> None:
        self.path = node.home / "chain.jsonl"
        self.records: dict[int, Committed] = {}
        self.stop = threading.Event()
        self._read = 0
        threading.Thread(target=self._follow, daemon=True).start()

    @property
    def epoch(self) -> int:
        return max(self.records, default=0)

    def _follow(self) -> None:
        while not self.stop.wait(POLL_S):
            with contextlib.suppress(OSError):
                self._look()

    def _look(self) -> None:
        size = self.path.stat().st_size
        if size < self._read:  # a fork was left
            self._read = 0
        if size == self._read:
            return
        now = time.monotonic()
        with self.path.open("rb") as file:
            file.seek(self._read)
            data = file.read()
        whole = data[: data.rfind(b"\n") + 1]
        try:
            found = [_committed(line, now) for line in whole.splitlines()]
        except (ValueError, KeyError):
            self._read = 0  # rewritten under our eyes
            return
        self._read += len(whole)
        for record in found:
            known = self.records.get(record.epoch)
            if known is None or known.weights != record.weights:
                self.records[record.epoch] = record
        if found:
            for epoch in [e for e in self.records if e > found[-1].epoch]:
                del self.records[epoch]


def _committed(line: bytes, now: float) -> Committed:
    body = json.loads(line)["value"]["body"]
    weights = {peer: weight for peer, weight, *_ in body["members"]}
    return Committed(now, body["epoch"], weights, body["forced"])
