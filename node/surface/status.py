"""What /status, /peers and /readyz say of a node: asked for when somebody looks, nothing kept.

It is given a function that says what there is to show, as plain values; it knows nothing of the daemon. What
it says in words may quote peers: each text is one line without control characters, for terminal and page.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from tapestry.dht.conduct import Ban
from tapestry.node.errors import printable
from tapestry.node.home import way_back
from tapestry.node.protocol.snapshot import RoundSnapshot, Snapshot
from tapestry.node.protocol.waits import Wait

BANS_SHOWN_MAX = 64
SAME_WAIT_S = 1.0  # two looks at one wait find its beginning this near
WORKING = ("training", "averaging")  # phases of a node that has joined and contributes


@dataclass(frozen=True, slots=True)
class Traffic:
    """Bytes with peers since the start, and what they were if contributions and results went as float32."""

    sent: int
    received: int
    sent_float32: int
    received_float32: int

    @classmethod
    def of(
        cls, sent: Mapping[str, int], received: Mapping[str, int], float32_ratio: float
    ) -> Traffic:  # bytes by kind, as metrics.BYTE_KINDS
        def float32(kinds: Mapping[str, int]) -> int:
            encoded = kinds["contribution"] + kinds["result"]
            return sum(kinds.values()) + round(encoded * (float32_ratio - 1))

        return cls(sum(sent.values()), sum(received.values()), float32(sent), float32(received))


def _up_s() -> float:
    """Seconds of a clock that nobody sets, and that goes on while the machine sleeps."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


NO_TRAFFIC = Traffic(0, 0, 0, 0)


@dataclass(frozen=True, slots=True)
class Shown:
    """A running node at one moment."""

    core: Snapshot
    loss: float  # nats; nan until there is one; mean over the epoch's steps
    loss_epoch: int  # of the state that these steps began from; -1: there is none
    val_loss: float  # mean of the sets'
    val_loss_epoch: int  # of the state that was measured; -1: there is none
    val_losses: Mapping[str, float]  # by the set's name
    data_passes: float  # over this member's data
    tokens_total: int
    tokens_per_second: float
    dropped_records: int  # given up since the start, because a chain on the other side of a fork was better
    dropped_weight: int
    branches: tuple[str, ...]  # names of what is kept of that, and of earlier forks; oldest first
    addresses: tuple[str, ...]  # where the node is reached, through relays too
    reachable: bool | None  # whether peers can dial it; None: none of them could say
    relays: tuple[str, ...]  # the peers that carry it
    routes: Mapping[str, str]  # linked peer -> "direct" or "relayed"
    traffic: Traffic
    trainer_trouble: str  # why the trainer does not contribute; "" if it does
    accused: tuple[dict[str, str | int], ...] = ()  # peer, name, epoch, shard of lies that were proven
    withheld: tuple[dict[str, str | int], ...] = ()  # peer, name, count: what it did not give our audits
    unlike: tuple[dict[str, str | float], ...] = ()  # peer, name, cosine, others: whose contributions are
    applicants: tuple[dict[str, Any], ...] = ()  # peer, name, since of those who wait to be admitted
    name_of: Callable[[str], str] = lambda peer: ""  # peer -> its name in the roll, fit to be shown
    last_contributions: Mapping[str, int] = field(default_factory=dict)  # peer -> epoch, where it is known
    loss_trouble: str = ""  # its losses say that something is wrong, and what to do; "" if not
    versions: Mapping[str, str] = field(default_factory=dict)  # linked peer -> its version, where it is known


@dataclass(frozen=True, slots=True)
class _Begun:
    """When a wait began, noted when it was first seen: somebody may set the clock meanwhile."""

    kind: str
    began_s: float  # as _up_s
    at: int  # unix time, s


class NodeView:
    """The http.View of a node, from before it has joined until it has stopped."""

    def __init__(
        self,
        version: str,
        upload_bytes_per_second: float | None = None,  # the caps; None: there is none
        download_bytes_per_second: float | None = None,
    ) -> None:
        self.stopping = False
        self.island_since: int | None = None  # epoch where its island began; None: it is on none
        self._wait: Wait | None = None  # of a node that has not joined yet
        self._wait_began_s = 0.0
        self._begun: _Begun | None = None  # of the wait that was seen last
        self._caps = {
            "upload_bytes_per_second": upload_bytes_per_second,
            "download_bytes_per_second": download_bytes_per_second,
        }
        self._version = version
        self._began_s = _up_s()
        self._look: Callable[[], Shown] | None = None
        self._admit: Callable[[str, str], str] | None = None
        self._addresses_of: Callable[[str], tuple[str, ...]]
        self._bans: Callable[[], tuple[Ban, ...]]
        self._run_name = ""

    def attach(
        self,
        look: Callable[[], Shown],
        addresses_of: Callable[[str], tuple[str, ...]],  # of a linked peer, by its own word
        bans: Callable[[], tuple[Ban, ...]],
        run_name: str,
        admit: Callable[[str, str], str],  # peer and name -> what is wrong, or ""
    ) -> None:
        """From now on there is something to show."""
        self._look, self._addresses_of, self._run_name = look, addresses_of, run_name
        self._bans, self._admit = bans, admit

    def wait_for(self, wait: Wait | None) -> None:
        """What the start waits for from now on, or still: since when is kept while it is of one kind."""
        if wait is None or self._wait is None or wait.kind != self._wait.kind:
            self._wait_began_s = _up_s()
        self._wait = wait

    def wait(self) -> Wait | None:
        """What the node waits for; None if for nothing but its own work. Since when is noted as often as this
        is asked: the daemon does so all the time (waits.py)."""
        if self.stopping:
            return None
        if self._look is not None:
            wait = self._look().core.wait
        else:
            wait = None if self._wait is None else replace(self._wait, for_s=_up_s() - self._wait_began_s)
        if wait is not None:
            self._since(wait)
        return wait

    def admit(self, peer: str, name: str) -> str:
        """What is wrong with it, or ""."""
        return self._admit(peer, name) if self._admit is not None else "the node has not joined yet"

    def status(self) -> dict[str, Any]:
        """The contract's keys. `epoch`, `head` and `state_digest` are of one state, the one we hold."""
        wait = self.wait() if self._look is None else None
        joins = wait is not None and wait.kind != "trainer"
        base: dict[str, Any] = {
            "peer_id": "",
            "name": "",
            "run_id": "",
            "run_name": self._run_name,
            "version": self._version,
            "phase": "stopping" if self.stopping else "joining" if joins else "starting",
            "reason": "" if wait is None else printable(wait.text),
            "waiting": self._waiting(wait),
            "island": way_back(self.island_since),
            "epoch": 0,
            "head": "",
            "state_digest": "",
            "params": 0,
            "loss": None,
            "loss_epoch": None,
            "val_loss": None,
            "val_loss_epoch": None,
            "val_losses": {},
            "trainer_trouble": "",
            "loss_trouble": "",
            "data_passes": 0.0,
            "tokens_total": 0,
            "tokens_per_second": 0.0,
            "peers": 0,
            "round": None,
            "agreement": None,
            "dropped_records": 0,
            "dropped_weight": 0,
            "branches": [],
            "accused": [],
            "withheld": [],
            "unlike": [],
            "members": 0,
            "roll": [],
            "settings": {},
            "applicants": [],
            "caps": self._caps,
            "bytes": asdict(NO_TRAFFIC),
            "addresses": [],
            "reachable": None,
            "relays": [],
            "uptime_s": round(_up_s() - self._began_s, 1),
        }
        if self._look is None:
            return base
        shown = self._look()
        core = shown.core
        return base | {
            "peer_id": core.peer_id,
            "name": shown.name_of(core.peer_id),
            "run_id": core.run_id,
            "phase": "stopping" if self.stopping else core.phase,
            "reason": printable(core.reason),
            "waiting": None if self.stopping else self._waiting(core.wait),
            "epoch": max(core.state_epoch, 0),
            "head": core.state_head,
            "state_digest": core.state_digest,
            "params": core.params,
            "loss": shown.loss,
            "loss_epoch": shown.loss_epoch if shown.loss_epoch >= 0 else None,
            "val_loss": shown.val_loss,
            "val_loss_epoch": shown.val_loss_epoch if shown.val_loss_epoch >= 0 else None,
            "trainer_trouble": printable(shown.trainer_trouble),
            "loss_trouble": shown.loss_trouble,
            "val_losses": dict(shown.val_losses),
            "data_passes": shown.data_passes,
            "tokens_total": shown.tokens_total,
            "tokens_per_second": shown.tokens_per_second,
            "peers": len(core.peers),
            "round": _round(core.round),
            "agreement": core.agreement.shares() if core.agreement is not None else None,
            "dropped_records": shown.dropped_records,
            "dropped_weight": shown.dropped_weight,
            "branches": list(shown.branches),
            "accused": list(shown.accused),
            "withheld": list(shown.withheld),
            "unlike": list(shown.unlike),
            "members": len(core.roll.members),
            "roll": _roll(shown),
            "settings": dict(core.roll.settings),
            "applicants": list(shown.applicants),
            "bytes": asdict(shown.traffic),
            "addresses": list(shown.addresses),
            "reachable": shown.reachable,
            "relays": list(shown.relays),
        }

    def _waiting(self, wait: Wait | None) -> dict[str, Any] | None:
        if wait is None:
            return None
        return {
            "kind": wait.kind,
            "what": printable(wait.what),
            "since": self._since(wait),
            "for_s": round(wait.for_s, 1),
            "ends": printable(wait.ends),
            "lasting": wait.lasting,
        }

    def _since(self, wait: Wait) -> int:
        """Unix time, s."""
        began_s = _up_s() - wait.for_s
        begun = self._begun
        if begun is None or begun.kind != wait.kind or abs(begun.began_s - began_s) > SAME_WAIT_S:
            begun = self._begun = _Begun(wait.kind, began_s, round(time.time() - wait.for_s))
        return begun.at

    def peers(self) -> list[dict[str, Any]]:
        """One table per peer that is up, as last heard, and one per peer that is turned away."""
        if self._look is None:
            return []
        shown = self._look()
        live = [
            {
                "peer_id": peer.peer_id,
                "name": shown.name_of(peer.peer_id),
                "phase": peer.phase,
                "epoch": peer.epoch,
                "head": peer.head,
                "same_head": peer.same_head,
                "heard_s": round(peer.heard_s, 1),
                "relayed": _relayed(shown.routes.get(peer.peer_id)),
                "version": shown.versions.get(peer.peer_id, ""),
                "same_version": _same(shown.versions.get(peer.peer_id), self._version),
                "addresses": list(self._addresses_of(peer.peer_id)),
            }
            for peer in shown.core.peers
        ]
        return live + [
            {
                "peer_id": ban.peer,
                "name": shown.name_of(ban.peer),
                "phase": "banned",
                "why": ban.reason,
                "left_s": round(ban.left_s, 1),
            }
            for ban in self._bans()[:BANS_SHOWN_MAX]
        ]

    def ready(self) -> tuple[bool, str]:
        """Whether it has joined, is at the head and contributes; and what is not as it should be, or "".

        A node that waits for others, longer than is usual, is ready all the same: it did its part, and who
        starts them one after the other must not wait for it. It is told beside."""
        if self.stopping:
            return False, "stopping"
        if self._look is None:
            wait = self.wait()
            return False, "starting" if wait is None else printable(wait.text)
        core = self._look().core
        if core.phase not in WORKING:
            return False, f"{core.phase}: {printable(core.reason)}"
        return True, printable(core.reason) if core.wait is not None and core.wait.lasting else ""


def _roll(shown: Shown) -> list[dict[str, Any]]:
    """The run's members, linked or not."""
    core = shown.core
    phases = {peer.peer_id: peer.phase for peer in core.peers} | {core.peer_id: core.phase}
    return [
        {
            "peer_id": peer,
            "name": shown.name_of(peer),
            "since": seat.since,
            "phase": phases.get(peer, ""),
            "last_epoch": shown.last_contributions.get(peer),
        }
        for peer, seat in core.roll.members.items()
    ]


def _relayed(route: str | None) -> bool | None:
    """None: there is no connection at this moment."""
    return None if route is None else route == "relayed"


def _same(version: str | None, own: str) -> bool | None:
    """None: the peer has not said it."""
    return None if version is None else version == own


def _round(shown: RoundSnapshot | None) -> dict[str, Any] | None:
    if shown is None:
        return None
    return {
        "epoch": shown.epoch,
        "ballot": shown.ballot,
        "leader": shown.leader,
        "stage": shown.stage.name.lower(),
        "forced": shown.forced,
        "electorate": shown.electorate,
        "members": shown.members,
        "waiting_on": list(shown.waiting_on),
    }
