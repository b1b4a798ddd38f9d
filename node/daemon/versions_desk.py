"""The desk of versions: asks each linked peer which version it runs, and says what does not work with it.

A peer is asked once for each link, by the check-up (net/checkup.py): that protocol is of no run, and every
version answers it. A protocol of the run that a peer did not serve although it had answered a while before is
one that its version lacks: who is still starting answers no check-up either. A member of another run, as
after an upgrade that founded one anew, has no link with us, and is found by the same sign.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from tapestry.dht.p2pd import SwarmError
from tapestry.node.net.checkup import ASK_S, CHECKUP_PROTOCOL, DIAL_S, ask
from tapestry.node.net.repeats import Repeats
from tapestry.node.net.transfer import OpenStream
from tapestry.node.net.wire import RemoteProtocolError, StreamEnded

LOOK_S = 5.0  # Guess: between two looks at who is linked
ASKED_AT_ONCE = 16  # Guess: who is silent keeps its place for ASK_S + DIAL_S
AGAIN_S = 60.0  # Guess: a peer that gave no answer
SURE_S = 10.0  # Guess: after its answer a node serves everything, a slow machine too
TOLD_EVERY_S = 86_400.0  # of one peer, its version and what is wrong
VERSION_CHARS_MAX = 32
WITHOUT = {  # a protocol that members open to each other -> what fails without it
    "control": "no round with it, nor news of the run",
    "bulk": "no round with it",
    "state": "it gives no state to this node",
    "audit": "this node cannot audit with it",
    "descriptions": "it passes no descriptions on",
    "peers": "it tells of no other peers",
}
ONE_VERSION = "run one version on all members: docs/operating.md, Members of different versions"

_log = logging.getLogger("tapestry.node")


@dataclass(frozen=True, slots=True)
class Answered:
    """What a peer said of itself, and when."""

    at: float
    version: str
    run_id: str


class VersionsDesk:
    """Of one node. `now` is of the loop's clock."""

    def __init__(self, own: str, run_id: str) -> None:
        self._own, self._run_id = own, run_id
        self._answered: dict[str, Answered] = {}
        self._next_at: dict[str, float] = {}  # who is asked not before then
        self._told = Repeats(TOLD_EVERY_S)

    @property
    def known(self) -> dict[str, str]:
        """Peer -> its version, of those who are linked and have answered."""
        return {peer: one.version for peer, one in self._answered.items()}

    def beside(self, peer: str) -> str:
        """For a line about what it sent: "" if it is of our version, or has not said."""
        one = self._answered.get(peer)
        if one is None or one.version == self._own:
            return ""
        return f" (it runs version {one.version}, this node {self._own})"

    async def run(
        self,
        linked: Callable[[], Sequence[str]],
        lacks: Callable[[], Mapping[tuple[str, str], float]],
        matters: Callable[[str], bool],  # it is a member, or the operator named it
        opener: Callable[[str, str], OpenStream],
    ) -> None:
        """Until cancelled. `lacks`: dht/swarm.py."""
        now = asyncio.get_running_loop().time
        places = asyncio.Semaphore(ASKED_AT_ONCE)

        async def ask(peer: str) -> None:
            async with places:
                await self.ask(peer, opener(peer, CHECKUP_PROTOCOL), now)

        while True:
            missing = {key: at for key, at in lacks().items() if matters(key[0])}
            due = self.due([*linked(), *(peer for peer, _ in missing)], now())
            await asyncio.gather(*map(ask, due))
            self.tell(missing, now())
            await asyncio.sleep(LOOK_S)

    def forget(self, peer: str) -> None:
        """Its link has come or gone: it may be another version from now on."""
        self._answered.pop(peer, None)
        self._next_at.pop(peer, None)

    def due(self, peers: Sequence[str], now: float) -> list[str]:
        """Whom to ask; all but `peers` are forgotten."""
        met = dict.fromkeys(peers)
        self._answered = {peer: one for peer, one in self._answered.items() if peer in met}
        self._next_at = {peer: at for peer, at in self._next_at.items() if peer in met}
        return [p for p in met if p not in self._answered and now >= self._next_at.get(p, now)]

    async def ask(self, peer: str, open_stream: OpenStream, now: Callable[[], float]) -> None:
        """One peer, once. No answer is no fault: it may be starting, or too old for the question."""
        self._next_at[peer] = now() + AGAIN_S
        try:
            async with asyncio.timeout(ASK_S + DIAL_S):
                reader, writer = await open_stream()
                try:
                    answer = await ask(reader, writer, [])
                finally:
                    writer.close()
        except (SwarmError, RemoteProtocolError, StreamEnded, TimeoutError, OSError) as error:
            _log.debug("version=not_told peer=%s reason=%r", peer[-6:], str(error))
            return
        if peer in self._next_at:  # its link may have gone meanwhile
            self.answered(peer, Answered(now(), _printed(answer.version), answer.run_id))

    def answered(self, peer: str, one: Answered) -> None:
        """It said which version it is."""
        self._answered[peer] = one
        other = one.version != self._own and one.run_id == self._run_id
        if other and self._told.may_tell((peer, one.version), one.at):
            _log.info(
                "version=other peer=%s theirs=%s ours=%s; %s",
                *(peer[-6:], one.version, self._own, ONE_VERSION),
            )

    def tell(self, missing: Mapping[tuple[str, str], float], now: float) -> None:
        """Warn once of what keeps a peer and us from one run."""
        for (peer, protocol), at in missing.items():
            one = self._answered.get(peer)
            if one is None or at < one.at + SURE_S:
                continue
            if one.run_id != self._run_id:
                self._tell_other_run(peer, one, now)
                continue
            name, number = protocol.rpartition("/")[0].rpartition("/")[2], protocol.rpartition("/")[2]
            if not protocol.startswith(f"/tapestry/{self._run_id}/") or name not in WITHOUT:
                continue
            if self._told.may_tell((peer, one.version, protocol), now):
                _log.warning(
                    "version=lacks peer=%s theirs=%s ours=%s protocol=%s/%s means=%r; %s",
                    *(peer[-6:], one.version, self._own, name, number, WITHOUT[name], ONE_VERSION),
                )

    def _tell_other_run(self, peer: str, one: Answered, now: float) -> None:
        if self._told.may_tell((peer, one.version, one.run_id), now):
            _log.warning(
                "run=other peer=%s theirs=%s ours=%s version=%s; no round with it. Agree on one of the two "
                "runs, and join it with --peer and a new home",
                *(peer[-6:], _printed(one.run_id)[:12], self._run_id[:12], one.version),
            )


def _printed(word: str) -> str:
    """A peer's word in one of ours: letters, digits and what stands between them in a version."""
    ours = (c if c.isascii() and (c.isalnum() or c in ".+-_!") else "?" for c in word[:VERSION_CHARS_MAX])
    return "".join(ours)
