"""The start of a node that is no member yet: it asks a peer it was given, says so, and waits to be admitted.

By its home's records, that is: those who admit may have done so since, or once more after they removed it. So
without a peer that was given it asks those whom it was linked with before.

Nothing else is begun before: no trainer is configured, nothing is downloaded, and no round is heard of.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence

from tapestry.dht.addresses import PeerAddress, parse_peer
from tapestry.dht.p2pd import SwarmError
from tapestry.dht.swarm import Swarm
from tapestry.node.errors import ExitCode, UserError
from tapestry.node.home import Home
from tapestry.node.net.admission import Answer, Streams, admission_protocol, ask_until_member
from tapestry.node.net.known_peers import KnownPeers
from tapestry.node.net.wire import RemoteProtocolError, StreamEnded
from tapestry.node.protocol.members import LIFETIME_EPOCHS_MAX, NAME_CHARS_MAX, Change, Roll
from tapestry.node.spec.node import NodeConfig

CONNECT_S = 10.0
AGAIN_S = 2.0  # Guess: after no peer could be asked
ASKED_MAX = 16  # Guess: addresses of those that were known, one after the other

_log = logging.getLogger("tapestry.join")


async def be_admitted(
    config: NodeConfig,
    roll: Roll,  # by the records of this home, or the genesis
    swarm: Swarm,
    peers: Sequence[PeerAddress],
    say: Callable[[str], None],
) -> None:
    """Return once this node may take part; `say` is told what it waits for.

    Raises UserError: 3 if no peer that was given can be asked, 4 if it may not.
    """
    me = swarm.peer_id
    if roll.may_contribute(me):
        return
    asked = list(peers) or _known(config.home)
    if not asked:
        raise _no_member(config, roll, me)
    applicant = _Applicant(config, me, say)
    while True:
        failures = []
        for peer in asked:

            async def open_stream(peer: PeerAddress = peer) -> Streams:
                await swarm.connect(peer, CONNECT_S)
                return await swarm.open_stream(peer.peer_id, admission_protocol(roll.run_id), CONNECT_S)

            try:
                await ask_until_member(open_stream, applicant.name, applicant.admission, applicant.hear)
                _log.info("admitted peer=%s", peer.peer_id[-6:])
                return
            except (SwarmError, RemoteProtocolError, StreamEnded, TimeoutError, OSError) as error:
                failures.append(f"{peer.peer_id[-6:]}: {error or type(error).__name__}")
        if not applicant.heard:
            if not peers or me in roll.removed:
                raise _no_member(config, roll, me)
            raise UserError(
                f"no peer could be asked for admission: {'; '.join(failures)}",
                exit_code=ExitCode.UNREACHABLE,
            )
        await asyncio.sleep(AGAIN_S)


def _known(home: Home) -> list[PeerAddress]:
    """Where the others were found last, those linked last first."""
    known = KnownPeers(home.peers).addresses.values()
    return [parse_peer(address) for addresses in known for address in addresses][:ASKED_MAX]


class _Applicant:
    """What it is told, and tells."""

    def __init__(self, config: NodeConfig, me: str, say: Callable[[str], None]) -> None:
        self._say = say
        self._waits = config.waits
        self._invitation = config.invitation
        self._admission: Change | None = None  # one, however often it is brought
        self._me = me
        self.name = config.home.path.name[:NAME_CHARS_MAX]
        self.heard: Answer | None = None

    def admission(self, epoch: int) -> Change | None:
        """By our invitation, as long as records from `epoch` on may carry it."""
        if self._invitation is None:
            return None
        made = self._admission
        if made is None or not epoch < made.until <= epoch + LIFETIME_EPOCHS_MAX:
            made = self._admission = self._invitation.admission(self._me, self.name, epoch)
        return made

    def hear(self, answer: Answer) -> None:
        """Raises UserError where there is nothing to wait for."""
        if answer.standing == "removed":
            raise _removed(answer.why)
        if answer == self.heard:
            return
        self.heard = answer
        why = f" ({answer.why})" if answer.why else ""
        if not self._waits:
            raise UserError(
                f"not admitted yet{why}: {answer.by} admits; your id is {self._me}",
                exit_code=ExitCode.REFUSED,
                hint=f"ask for: tapestry admit {self._me}",
            )
        waits = f"waiting to be admitted by {answer.by}{why}; your id {self._me}"
        _log.info("%s", waits)
        self._say(waits)


def _no_member(config: NodeConfig, roll: Roll, me: str) -> UserError:
    """Nobody could be asked: what the records of this home say."""
    if me in roll.removed:
        return _removed(roll.removed[me])
    return UserError(
        f"this node is no member of the run in {config.home.path}",
        exit_code=ExitCode.REFUSED,
        hint=f"name a member with --peer, and ask it to run: tapestry admit {me}",
    )


def _removed(why: str) -> UserError:
    return UserError(
        f"this node was removed from the run: {why or 'no reason was given'}",
        exit_code=ExitCode.REFUSED,
        hint="only those who admit can let it in again",
    )
