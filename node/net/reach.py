"""Whether others can dial this node, who carries it if they cannot, and who is linked through a relay.

A node behind NAT dials out, and its links with all who can be dialled are as good as any. Two such nodes meet
through a relay: a member that both can dial. So this node asks linked peers to dial it back, and unless one
of them got through it keeps a place at RELAYS_MAX of those that it reaches itself; the addresses through them
are told to others with its own. libp2p tries a direct address first, but a connection through a relay stays
one: so a node waits a moment for the first answer, before it tells of relays that it may not need.

Reach (one loop on one swarm) looks at the connections, asks, and tells; `Verdicts` and `Relays` decide, and
are pure: `now` comes in.
"""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from tapestry.dht.addresses import CIRCUIT, Scope, circuit_address, is_usable, scope
from tapestry.dht.p2pd import SwarmError
from tapestry.dht.reachability import NotCarried, can_dial_us, reserve
from tapestry.dht.swarm import Swarm

LOOK_S = 2.0  # Guess: a peer that lost its relay is dialled through another within so long
RELAYS_MAX = 2  # Guess: one may vanish
PATIENCE_S = 8.0  # Guess: who can dial us says so within; who was told of a relay may stay with it for long
ASK_S = 25.0  # for a dial-back: libp2p gives up after 15 s where nothing answers
RESERVE_S = 5.0
RENEW_S = 60.0  # Guess: a place is lost with a connection, and a new one looks like the old
REFUSED_S = 300.0  # Guess: after so long a peer may carry us after all
MISSED_S = 3 * LOOK_S  # Guess: who gave no answer, or is not linked with us yet, is asked again after so long
SURE_S = 300.0  # Guess: between two questions once others have answered. libp2p asks every 15 minutes
JUDGES = 3  # Guess: so many say whether we can be dialled; one that lies is outvoted by two
SAID_S = (JUDGES + 1) * SURE_S  # how long an answer counts
ASKED_KEPT = 256  # Guess: peers whose turn is remembered; more than four times as many as are linked
UNSURE_S = 30.0  # before that. libp2p answers one peer three times a minute, and all 30 times

_log = logging.getLogger("tapestry.network")


class Linked(Protocol):
    """What links.Links knows."""

    @property
    def linked(self) -> list[str]: ...

    @property
    def addresses(self) -> dict[str, tuple[str, ...]]: ...

    @property
    def given(self) -> Mapping[str, tuple[str, ...]]: ...


class Verdicts:
    """Whether others can dial us, by the word of those who tried: the majority of the newest JUDGES answers.

    A false "no" costs a place at a relay that was not needed, a false "yes" makes a node behind NAT give up
    what carries it: so of equals the "no" counts, and no peer is asked again before the others were. Where
    there are fewer members than JUDGES a "yes" takes all: a lone member may lie, and the others can be
    anybody.
    """

    def __init__(self) -> None:
        self._takes_all = False
        self._said: dict[
            str, tuple[bool, float]
        ] = {}  # peer -> what it said last, and when; the oldest first
        self._asked_at: dict[str, float] = {}  # also of who is not linked now: coming back is no new turn
        self._first_asked_at: float | None = None

    def reachable(self, now: float) -> bool | None:
        said = [yes for yes, at in self._said.values() if now - at < SAID_S][-JUDGES:]
        if not said:
            return None
        return all(said) if self._takes_all else 2 * sum(said) > len(said)

    def needs_relay(self, now: float) -> bool:
        """Whether others cannot dial us, or nobody could say for a while after we first asked."""
        reachable = self.reachable(now)
        if reachable is None:
            return self._first_asked_at is not None and now - self._first_asked_at >= PATIENCE_S
        return not reachable

    def next_to_ask(self, judges: Sequence[str], takes_all: bool, now: float) -> str | None:
        """Somebody else each time; seldom once JUDGES were asked, or all there are, and one answered.

        `takes_all`: from now on a "yes" takes all of the newest answers, not most.
        """
        self._takes_all = takes_all
        self._said = {p: said for p, said in self._said.items() if now - said[1] < SAID_S}
        asked = sum(now - at < SAID_S for at in self._asked_at.values())
        is_sure = bool(self._said) and asked >= min(JUDGES, len(judges))
        last_at = max(self._asked_at.values(), default=-math.inf)
        if not judges or now - last_at < (SURE_S if is_sure else UNSURE_S):
            return None
        peer = min(judges, key=lambda p: self._asked_at.get(p, -math.inf))
        if len(self._asked_at) >= ASKED_KEPT:
            del self._asked_at[min(self._asked_at, key=self._asked_at.__getitem__)]
        self._asked_at[peer] = now
        if self._first_asked_at is None:
            self._first_asked_at = now
        return peer

    def says(self, peer: str, reachable: bool | None, now: float) -> None:
        if reachable is not None:
            self._said.pop(peer, None)
            self._said[peer] = (reachable, now)

    def forget(self) -> None:
        """We are somewhere else now."""
        self._said.clear()
        self._asked_at.clear()
        self._first_asked_at = None


@dataclass(frozen=True, slots=True)
class _Place:
    address: str  # of the relay
    renew_at: float
    until: float  # then it counts as lost


class Relays:
    """Where this node has a place."""

    def __init__(self) -> None:
        self._places: dict[str, _Place] = {}
        self._refused: dict[str, float] = {}  # peer -> until when it is not asked again

    def due(self, candidates: Mapping[str, str], wanted: bool, now: float) -> dict[str, str]:
        """Whom to ask now, and their addresses: who keeps a place already, and others if it takes more.

        A place at a peer that is no candidate any more is lost, and one that was not renewed in time.
        """
        self._places = {
            p: place for p, place in self._places.items() if wanted and p in candidates and now < place.until
        }
        self._refused = {p: until for p, until in self._refused.items() if now < until}
        if not wanted:
            return {}
        renewed = [p for p, place in self._places.items() if now >= place.renew_at]
        others = [p for p in candidates if p not in self._places and p not in self._refused]
        return {p: candidates[p] for p in (*renewed, *others[: RELAYS_MAX - len(self._places)])}

    def granted(self, peer: str, address: str, lifetime_s: float, now: float) -> None:
        self._places[peer] = _Place(address, now + max(1.0, min(RENEW_S, lifetime_s / 2)), now + lifetime_s)

    def refused(self, peer: str, now: float) -> None:
        """It carries nobody, or not us."""
        self._places.pop(peer, None)
        self._refused[peer] = now + REFUSED_S

    def missed(self, peer: str, now: float) -> None:
        """No answer, or not yet: its line may be full, it may be new. A place there is kept for its time."""
        if (place := self._places.get(peer)) is not None:
            self._places[peer] = replace(place, renew_at=now + MISSED_S)
        else:
            self._refused[peer] = now + MISSED_S

    @property
    def peers(self) -> tuple[str, ...]:
        return tuple(self._places)

    def addresses(self, own_id: str) -> tuple[str, ...]:
        """Where others find us through them."""
        return tuple(circuit_address(place.address, own_id) for place in self._places.values())


def judges_of(direct: Sequence[str], is_member: Callable[[str], bool]) -> tuple[list[str], bool]:
    """Of the peers with a direct connection, in the order in which they were linked: those to ask whether
    others can dial us, and whether it takes all of them.

    Members, for in an open run anybody may be linked, under as many names as they like. Where they are fewer
    than JUDGES others are asked beside them, lest one member decide.
    """
    members = [peer for peer in direct if is_member(peer)]
    others = [peer for peer in direct if peer not in members]
    return [*members, *others[: max(0, JUDGES - len(members))]], len(members) < JUDGES


def candidates(
    connections: Mapping[str, Sequence[str]], peers: Linked, reachable: bool | None
) -> dict[str, str]:
    """The linked peers that others can dial as we did, and where; only the most widely reachable.

    Where we dialled a peer is an address of its own, that it tells or that the operator gave; of who dialled
    us we have seen some port. Who cannot be dialled has dialled all its peers.
    """
    found: dict[str, str] = {}
    for peer in peers.linked:
        told = peers.addresses.get(peer, ())
        ours = reachable is False or peer in peers.given
        open_at = [a for a in connections.get(peer, ()) if CIRCUIT not in a and is_usable(a, peer)]
        direct = [a for a in open_at if ours or a in told]
        if direct:
            found[peer] = max(direct, key=scope)
    best = max(map(scope, found.values()), default=Scope.LOOPBACK)
    return {peer: address for peer, address in found.items() if scope(address) is best}


def routes_of(connections: Mapping[str, Sequence[str]]) -> dict[str, str]:
    """peer -> "direct", or "relayed" where all its connections are."""
    return {
        peer: "relayed" if all(CIRCUIT in address for address in addresses) else "direct"
        for peer, addresses in connections.items()
        if addresses
    }


class Reach:
    """Use: `run` in a task; the rest from the same loop."""

    def __init__(
        self,
        swarm: Swarm,
        peers: Linked,
        own_addresses: Callable[[], Sequence[str]],  # direct ones
        announced: bool,  # by the operator, who knows where the node is reached
        on_change: Callable[[], None],  # the addresses through relays are others
        is_member: Callable[[str], bool],  # of the run: in an open one anybody may be linked
    ) -> None:
        self._swarm = swarm
        self._peers = peers
        self._own_addresses = own_addresses
        self._announced = announced
        self._on_change = on_change
        self._is_member = is_member
        self._verdicts = Verdicts()
        self._relays = Relays()
        self._connections: dict[str, tuple[str, ...]] = {}
        self._relayed: tuple[str, ...] = ()
        self._own: tuple[str, ...] = ()
        self._told: bool | None = None
        self._jobs: dict[str, asyncio.Task[None]] = {}  # by peer

    @property
    def relayed_addresses(self) -> tuple[str, ...]:
        return self._relayed

    @property
    def relays(self) -> tuple[str, ...]:
        """Who carries us."""
        return self._relays.peers

    @property
    def reachable(self) -> bool | None:
        return self._verdicts.reachable(_now())

    @property
    def routes(self) -> dict[str, str]:
        """Of the linked peers."""
        routes = routes_of(self._connections)
        return {peer: routes[peer] for peer in self._peers.linked if peer in routes}

    async def run(self) -> None:
        """Until cancelled."""
        async with asyncio.TaskGroup() as tasks:
            while True:
                try:
                    self._connections = await self._swarm.connections()
                except SwarmError as error:
                    _log.debug("connections=unknown reason=%r", str(error))
                else:
                    self._look(tasks)
                await asyncio.sleep(LOOK_S)

    def _look(self, tasks: asyncio.TaskGroup) -> None:
        now, own = _now(), tuple(self._own_addresses())
        if own != self._own:
            self._own = own
            self._verdicts.forget()
        if max(map(scope, own), default=Scope.LOOPBACK) is Scope.LOOPBACK:
            return  # a trial on one machine
        direct = [peer for peer, route in self.routes.items() if route == "direct"]
        judges, takes_all = judges_of(direct, self._is_member)
        if peer := self._verdicts.next_to_ask(judges, takes_all, now):
            self._start(tasks, f"dial {peer}", self._ask_dial(peer, own))
        reachable = self.reachable
        self._tell(reachable)
        wanted = self._verdicts.needs_relay(now) and not (self._announced and reachable is None)
        due = self._relays.due(candidates(self._connections, self._peers, reachable), wanted, now)
        for peer, address in due.items():
            self._start(tasks, f"reserve {peer}", self._reserve(peer, address))
        self._compare()

    def _start(self, tasks: asyncio.TaskGroup, name: str, job: Coroutine[None, None, None]) -> None:
        if name in self._jobs:
            job.close()
            return
        task = self._jobs[name] = tasks.create_task(job)
        task.add_done_callback(lambda _: self._jobs.pop(name, None))

    async def _ask_dial(self, peer: str, own: Sequence[str]) -> None:
        try:
            said = await can_dial_us(self._swarm.open_stream, peer, self._swarm.peer_id, own, ASK_S)
        except SwarmError as error:
            _log.debug("dial_back=no_answer peer=%s reason=%r", peer[-6:], str(error))
        else:
            self._verdicts.says(peer, said, _now())

    async def _reserve(self, peer: str, address: str) -> None:
        try:
            place = await reserve(self._swarm.open_stream, peer, RESERVE_S)
        except SwarmError as error:
            _log.debug("relay=refused peer=%s reason=%r", peer[-6:], str(error))
            if isinstance(error, NotCarried) and error.is_final:
                self._relays.refused(peer, _now())
            else:
                self._relays.missed(peer, _now())
        else:
            # Its clock may be wrong: a place lives an hour, and is asked for again long before.
            self._relays.granted(peer, address, RENEW_S * 2, _now())
            _log.debug("relay=granted peer=%s bytes_max=%d", peer[-6:], place.bytes_max)
        self._compare()

    def _tell(self, reachable: bool | None) -> None:
        if reachable is not self._told:
            self._told = reachable
            _log.info("reachable=%s", {True: "yes", False: "no", None: "unknown"}[reachable])

    def _compare(self) -> None:
        relayed = self._relays.addresses(self._swarm.peer_id)
        if relayed != self._relayed:
            self._relayed = relayed
            _log.info("relays=%s", ",".join(peer[-6:] for peer in self._relays.peers) or "none")
            self._on_change()


def _now() -> float:
    return asyncio.get_running_loop().time()
