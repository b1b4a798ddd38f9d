"""A visit to a peer, for `tapestry doctor`: whether it can be reached, its run, its clock, can it dial back.

It is made under a key for the purpose, listening as the node would, and asks what a stranger may ask
(net/join.py, net/checkup.py). Nothing of it is kept.
"""

from __future__ import annotations

import contextlib
import re
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tapestry.dht.addresses import PeerAddress
from tapestry.dht.control import Unreachable
from tapestry.dht.identity import Identity, IdentityError
from tapestry.dht.p2pd import SwarmConfig, SwarmError
from tapestry.dht.presence import CLOCK_SKEW_S
from tapestry.dht.swarm import Swarm
from tapestry.node.daemon.assembly import swarm_config
from tapestry.node.lineage.crypto import ReaderCrypto
from tapestry.node.net.checkup import ASK_S, CHECKUP_PROTOCOL, PORTS_MAX, Answer, ask
from tapestry.node.net.join import CONNECT_S, genesis_of
from tapestry.node.net.wire import RemoteProtocolError, StreamEnded
from tapestry.node.protocol.record import Genesis
from tapestry.node.spec.node import NodeConfig
from tapestry.node.spec.run import RunSpec
from tapestry.node.surface.findings import Finding, Verdict, passed, unknown, wrong

CLOCK_WARN_S = 5.0  # Guess: NTP keeps a machine within milliseconds
_PORT = re.compile(r"/tcp/([0-9]+)")


@dataclass(frozen=True, slots=True)
class Run:
    """The run that the home is of, or that is to be founded or joined."""

    spec: RunSpec
    trained: int  # parameters in the flat vector
    whose: str
    run_id: str = ""  # "" of one that is not founded


@dataclass(frozen=True, slots=True)
class Visit:
    """What a peer gave."""

    findings: tuple[Finding, ...]
    run: Run | None = None


async def visit(config: NodeConfig, peers: Sequence[PeerAddress], held: bool) -> Visit:
    """Listen as the node would, under another key, and ask the first peer that can be reached."""
    if not peers:
        return Visit((unknown("peer", "reachability and clock: give --peer ADDRESS"),))
    with tempfile.TemporaryDirectory(prefix="tapestry-doctor-") as folder:
        key = Path(folder) / "key"
        Identity.load_or_create(key)
        listen = ("/ip4/0.0.0.0/tcp/0",) if held else config.listen
        nat_port_map = swarm_config(config).nat_port_map
        try:
            swarm = await Swarm.start(SwarmConfig(key, listen, nat_port_map=nat_port_map))
        except (SwarmError, IdentityError) as error:
            return Visit((wrong("p2pd", str(error), "see the lines above on ports and limits"),))
        try:
            return await _ask_first(swarm, peers, held)
        finally:
            await swarm.close()


async def _ask_first(swarm: Swarm, peers: Sequence[PeerAddress], held: bool) -> Visit:
    failures = []
    for peer in peers:
        try:
            await swarm.connect(peer, CONNECT_S)
        except Unreachable as error:
            failures.append(str(error))
            continue
        findings = [passed("peer", f"…{peer.peer_id[-6:]} answers")]
        genesis = await genesis_of(swarm, peer.peer_id, ReaderCrypto())
        run = None
        if isinstance(genesis, Genesis):
            spec = RunSpec.of_genesis(genesis)
            run = Run(spec, genesis.params, f"…{peer.peer_id[-6:]}", genesis.run_id)
        else:
            findings.append(wrong("peer", genesis, "join by the address of a member of the run"))
        findings += await _check_up(swarm, peer.peer_id, held)
        return Visit(tuple(findings), run)
    cure = "is the peer running, and is its port open to this machine? See a firewall's rules on both sides"
    return Visit((wrong("peer", f"cannot be reached: {'; '.join(failures)}", cure),))


async def _check_up(swarm: Swarm, peer_id: str, held: bool) -> list[Finding]:
    """Its clock, its version, and whether it can dial back."""
    found = [int(port) for address in await swarm.addresses() for port in _PORT.findall(address)[:1]]
    ports = list(dict.fromkeys(found))[:PORTS_MAX]
    try:
        reader, writer = await swarm.open_stream(peer_id, CHECKUP_PROTOCOL, ASK_S)
        with contextlib.closing(writer):
            answer = await ask(reader, writer, ports)
    except (Unreachable, StreamEnded, RemoteProtocolError, TimeoutError, OSError) as error:
        return [
            unknown("clock", f"the peer does not say: {error}"),
            unknown("dialled", "the peer did not try"),
        ]
    return [judged_clock(answer), judged_dial(answer, ports, held)]


def judged_clock(answer: Answer) -> Finding:
    off, sure = answer.offset_s, answer.uncertain_s
    text = f"the peer's is {abs(off):.1f} s {'ahead' if off > 0 else 'behind'} (±{sure:.1f} s)"
    cure = "set this machine's clock (systemctl status systemd-timesyncd, or chronyc tracking), or the peer's"
    if abs(off) - sure > CLOCK_SKEW_S:
        return wrong("clock", f"{text}: the two do not find each other in the DHT", cure)
    if abs(off) - sure > CLOCK_WARN_S:
        return Finding("clock", Verdict.PASSED, f"{text}; {cure}")
    return passed("clock", text)


def judged_dial(answer: Answer, ports: Sequence[int], held: bool) -> Finding:
    if held:
        return unknown(
            "dialled", "the node that runs here has the ports: see its addresses in `tapestry status`"
        )
    if not answer.host:
        return unknown("dialled", "the peer does not see where we come from")
    opened = [port for port, is_open in zip(ports, answer.open, strict=False) if is_open]
    if opened:
        return passed("dialled", f"the peer reaches this machine at {answer.host}, port {opened[0]}")
    closed = ", ".join(map(str, ports))
    text = (
        f"the peer sees us at {answer.host} and cannot open port {closed} there: members that can be dialled "
        "will carry this node (docs/networks.md). For direct links open the port in the firewall, or forward "
        f"it on the router (--listen /ip4/0.0.0.0/tcp/PORT --announce /ip4/{answer.host}/tcp/PORT)"
    )
    return passed("dialled", text)
