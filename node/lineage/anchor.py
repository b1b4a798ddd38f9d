"""One line that fixes a chain: head, epoch, and who signed them. Published anywhere (a newspaper, a gazette,
a repository, another chain), it holds everybody to it who later shows a chain of this run.

    tapestry-anchor-1 RUN_ID EPOCH HEAD BALLOT PEER:SIGNATURE PEER:SIGNATURE ...

An anchor is checked with nothing but itself as far as its signatures go; that those are a quorum's, the chain
shows.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from tapestry.node.errors import UserError
from tapestry.node.protocol.canon import MEMBERS_MAX, Crypto
from tapestry.node.protocol.record import Genesis, Record, accept_message

WORD = "tapestry-anchor-1"
TEXT_BYTES_MAX = 512 * MEMBERS_MAX
_LINE = re.compile(
    r"(\S+) ([0-9a-f]{64}) ([0-9]{1,16}) ([0-9a-f]{64}) ([0-9]{1,16})((?: [^\s:]+:[0-9a-f]+)*)"
)


@dataclass(frozen=True, slots=True)
class Anchor:
    """Of an epoch that was committed."""

    run_id: str
    epoch: int
    head: str
    ballot: int
    signatures: tuple[tuple[str, str], ...]  # (peer, signature)

    @classmethod
    def of(cls, genesis: Genesis, record: Record | None) -> Anchor:
        """Of the newest record; of a run without any, of its genesis."""
        if record is None:
            return cls(genesis.run_id, 0, genesis.run_id, 0, ())
        return cls(genesis.run_id, record.body.epoch, record.head, record.ballot, record.signatures)

    @classmethod
    def parse(cls, text: str) -> Anchor:
        """The first line of it that is an anchor. Raises UserError."""
        for line in text[:TEXT_BYTES_MAX].splitlines():
            found = _LINE.fullmatch(line.strip())
            if found and found[1] == WORD:
                pairs = [word.partition(":") for word in found[6].split()]
                signatures = tuple((peer, signature) for peer, _, signature in pairs)
                return cls(found[2], int(found[3]), found[4], int(found[5]), signatures)
        raise UserError(f"no anchor: a line that begins with {WORD}")

    def __str__(self) -> str:
        signed = "".join(f" {peer}:{signature}" for peer, signature in self.signatures)
        return f"{WORD} {self.run_id} {self.epoch} {self.head} {self.ballot}{signed}"

    def bad_signatures(self, crypto: Crypto) -> Iterator[str]:
        """Who did not sign it, though it says so."""
        message = accept_message(self.head, self.ballot)
        for peer, signature in self.signatures:
            if not crypto.verify(peer, signature, message):
                yield peer
