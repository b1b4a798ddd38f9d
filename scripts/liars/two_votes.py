"""votes twice in every ballot: for the result, and for another that nobody made

Promise: every honest member has a proof that the liar signed two values, and it is removed; nobody else is
accused. The run goes on, at one head.
"""

from __future__ import annotations

from dataclasses import replace

from liars import lying
from liars.seen import Seen, proof_fault
from tapestry.node.protocol.acceptor import Acceptor
from tapestry.node.protocol.record import Body, head_of


def lie() -> None:
    honest = Acceptor.accept

    def accept(self: Acceptor, body: Body, head: str) -> str | None:
        fault = honest(self, body, head)
        if fault is None and lying.now() and not body.forced and not self.state.leading:
            other = replace(body, result=self.ctx.crypto.digest(body.result.encode()))
            self.ctx.send(self.state.leader, self._vote_for(other, head_of(other, self.ctx.crypto)))
        return fault

    Acceptor.accept = accept  # type: ignore[method-assign]


def broken(seen: Seen) -> list[str]:
    return proof_fault(seen, "signed two values")
