"""The start of a node that is no member yet: it asks a peer it was given, says so, and waits to be admitted.

By its home's records, that is: those who admit may have done so since, or once more after they removed it. So
without a peer that was given it asks those whom it was linked with before.

A peer that only keeps the DHT knows no run. Where no other can be asked, it leads to the members that this
node knows of, by their presence.

No peer has the last word, for it may be behind, removed itself, or on an island that gets no records. One
that takes this node for a member is enough. That it was removed is believed if all say so that answer. While
it is an applicant it asks the next one every few seconds.

Nothing else is begun before: no trainer is configured, nothing is downloaded, and no round is heard of.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable, Sequence

from tapestry.dht.addresses import AddressError, PeerAddress, parse_peer
from tapestry.dht.control import Unreachable
from tapestry.dht.p2pd import SwarmError
from tapestry.dht.swarm import Swarm
from tapestry.node.errors import ExitCode, UserError
from tapestry.node.home import Home
from tapestry.node.net.admission import COMING, TAKEN, Answer, Streams, admission_protocol, ask_until_member
from tapestry.node.net.known_peers import KnownPeers
from tapestry.node.net.wire import RemoteProtocolError, StreamEnded
from tapestry.node.protocol.members import LIFETIME_EPOCHS_MAX, NAME_CHARS_MAX, Change, Roll
from tapestry.node.protocol.waits import Wait
from tapestry.node.spec.node import NodeConfig

CONNECT_S = 10.0
AGAIN_S = 2.0  # Guess: after no peer could be asked
ASKED_MAX = 16  # Guess: addresses that were known, or members that the DHT shows
ADDRESSES_OF_ONE = 2  # of each member that the DHT shows, so that none keeps us busy with its own. Guess
FOUNDERS_ALONE = (
    "give a member's address with --peer: of those that the DHT shows a new home asks the founders alone"
)
TURN_ANSWERS = 5  # Guess: of one peer, one a second (net/admission.py), before the next one is asked

_log = logging.getLogger("tapestry.join")


async def be_admitted(
    config: NodeConfig,
    roll: Roll,  # by the records of this home, or the genesis
    swarm: Swarm,
    peers: Sequence[PeerAddress],
    say: Callable[[Wait], None],
) -> Sequence[PeerAddress]:
    """Return once this node may take part; `say` is told what it waits for. Returns whom it may ask further:
    who was given, and members that the DHT showed.

    Raises UserError: 3 if no peer that was given can be asked, 4 if it may not.
    """
    me = swarm.peer_id
    if roll.may_contribute(me):
        _say_if_it_finds_nobody(config, roll, me)
        return peers
    asked = list(peers) or _known(config.home)
    if not asked:
        raise _no_member(config, roll, me)
    applicant = _Applicant(config, me, say, is_for_one=len({peer.peer_id for peer in asked}) == 1)
    while True:
        failures: list[str] = []
        without_run: list[PeerAddress] = []
        applicant.answers.clear()
        for peer in asked:
            if peer.peer_id in applicant.answers:
                continue  # another address of it

            async def open_stream(peer: PeerAddress = peer) -> Streams:
                await swarm.connect(peer, CONNECT_S)
                return await swarm.open_stream(peer.peer_id, admission_protocol(roll.run_id), CONNECT_S)

            applicant.begin_turn(peer.peer_id)
            try:
                await ask_until_member(open_stream, applicant.name, applicant.admission, applicant.hear)
                _log.info("admitted peer=%s", peer.peer_id[-6:])
                return asked
            except _NextPeer:
                continue
            except (SwarmError, RemoteProtocolError, StreamEnded, TimeoutError, OSError) as error:
                failures.append(f"{peer.peer_id[-6:]}: {error or type(error).__name__}")
                if isinstance(error, Unreachable) and error.reason == "unsupported":
                    without_run.append(peer)
        answers = list(applicant.answers.values())
        waiting = [answer for answer in answers if answer.standing != "removed"]
        if answers and not waiting:
            raise removed(answers[0].why)
        if waiting and not config.waits:
            raise _not_yet(waiting[0], me)
        if not applicant.heard:
            shown = await _shown(swarm, roll, without_run) if without_run else []
            if more := [peer for peer in shown if peer not in asked]:
                asked += more
                applicant.is_for_one = len({peer.peer_id for peer in more}) == 1
                continue
            if not peers or me in roll.removed:
                raise _no_member(config, roll, me)
            raise UserError(
                f"no peer could be asked for admission: {'; '.join(failures)}",
                exit_code=ExitCode.UNREACHABLE,
                hint=FOUNDERS_ALONE if without_run else None,
            )
        await asyncio.sleep(AGAIN_S)


def _say_if_it_finds_nobody(config: NodeConfig, roll: Roll, me: str) -> None:
    """Warn of a member's start that was given no peer, in a home that knows no address of one."""
    others = len(roll.members.keys() - {me})
    if others and not config.island and not config.peers and not _known(config.home):
        _log.warning(
            "others=unknown members=%d and this home knows no address of one of them; unless they find this "
            "node it trains alone: start it with --peer ADDRESS",
            others,
        )


def _known(home: Home) -> list[PeerAddress]:
    """Where the others were found last, those linked last first."""
    known = KnownPeers(home.peers).addresses.values()
    return [parse_peer(address) for addresses in known for address in addresses][:ASKED_MAX]


async def _shown(swarm: Swarm, roll: Roll, peers: Sequence[PeerAddress]) -> list[PeerAddress]:
    """Where the members of `roll` are, by the DHT that these peers keep; others may write there too."""
    try:
        await swarm.join_dht(roll.run_id, peers)
        found = await swarm.list_presence(time.time())
    except SwarmError:
        return []
    shown = []
    for one in found:
        for address in one.addresses[:ADDRESSES_OF_ONE] if one.peer_id in roll.members else ():
            with contextlib.suppress(AddressError):
                shown.append(parse_peer(address))
    return shown[: ADDRESSES_OF_ONE * ASKED_MAX]


class _NextPeer(Exception):
    """This one has said what it has to say for now."""


class _Applicant:
    """What it is told, and tells."""

    def __init__(self, config: NodeConfig, me: str, say: Callable[[Wait], None], is_for_one: bool) -> None:
        self._say = say
        self.is_for_one = is_for_one  # there is no other peer to ask
        self._waits = config.waits
        self._invitation = config.invitation
        self._admission: Change | None = None  # one, however often it is brought
        self._me = me
        self.name = config.home.path.name[:NAME_CHARS_MAX]
        self.answers: dict[str, Answer] = {}  # peer -> its last one, of this time round
        self.heard: dict[str, Answer] = {}  # peer -> what we wait for, as it said last
        self._peer = ""  # whose turn it is
        self._turn = 0  # its answers

    def admission(self, epoch: int) -> Change | None:
        """By our invitation, as long as records from `epoch` on may carry it."""
        if self._invitation is None:
            return None
        made = self._admission
        if made is None or not epoch < made.until <= epoch + LIFETIME_EPOCHS_MAX:
            made = self._admission = self._invitation.admission(self._me, self.name, epoch)
        return made

    def begin_turn(self, peer: str) -> None:
        self._peer, self._turn = peer, 0

    def hear(self, answer: Answer) -> None:
        """Raises _NextPeer where it is the next one's turn."""
        self.answers[self._peer] = answer
        if answer.standing == "removed" or not self._waits:
            raise _NextPeer
        if answer != self.heard.get(self._peer):
            self.heard[self._peer] = answer
            waits = f"waiting to be admitted by {answer.by}{_because(answer)}; your id {self._me}"
            _log.info("%s", waits)
            ends = f"ends when who admits runs: tapestry admit {self._me}"
            if answer.why in (TAKEN, COMING):
                ends = "ends by itself, with a record of theirs"
            self._say(Wait("admission", waits, ends))
        self._turn += 1
        if self._turn >= TURN_ANSWERS and not self.is_for_one:
            raise _NextPeer


def _because(answer: Answer) -> str:
    return f" ({answer.why})" if answer.why else ""


def _not_yet(answer: Answer, me: str) -> UserError:
    return UserError(
        f"not admitted yet{_because(answer)}: {answer.by} admits; your id is {me}",
        exit_code=ExitCode.REFUSED,
        hint=f"ask for: tapestry admit {me}",
    )


def _no_member(config: NodeConfig, roll: Roll, me: str) -> UserError:
    """Nobody could be asked: what the records of this home say."""
    if me in roll.removed:
        return removed(roll.removed[me])
    return UserError(
        f"this node is no member of the run in {config.home.path}",
        exit_code=ExitCode.REFUSED,
        hint=f"name a member with --peer, and ask it to run: tapestry admit {me}",
    )


def removed(why: str) -> UserError:
    """What ends a node that may take part no more."""
    return UserError(
        f"this node was removed from the run: {why or 'no reason was given'}",
        exit_code=ExitCode.REFUSED,
        hint="only those who admit can let it in again",
    )
