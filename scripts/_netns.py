"""Peers on one machine with links of their own: network namespaces, joined by a bridge.

    with Net(4, parse_link("100mbit")) as net:
        subprocess.Popen([*net.prefix(0), "tapestry", "start", ...])  # its address is net.address(0)
        net.cut(0, 1)  # nothing of what 0 sends reaches 1; what 1 sends still reaches 0

The bridge lies in a namespace of its own, so nothing of the machine's own network is touched. What a peer
sends is limited, not what it receives. Needs Linux, root and iproute2.

All is removed at the end, at exceptions, SIGINT and SIGTERM; what a killed process left, the next one sweeps.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import threading
from types import TracebackType
from typing import Self

from _run import exit_by_signal

NAME = "tapestry"  # of the namespaces: NAME-<pid of who made it>-<peer or "bridge">
BURST_S = 0.004  # of a limited link, at its rate: two ticks of a kernel at 500 Hz
BURST_BYTES_MIN = 64 * 1024  # one segmentation offload: smaller, and tbf cuts each one up
QUEUE_S = 0.05  # as much as a home router's queue holds
UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9}


class NetError(Exception):
    """What is missing, in one line."""


class Net:
    """`count` peer namespaces, each with one interface on a common bridge. Use in a `with`."""

    def __init__(self, count: int, link_bps: int | None = None) -> None:
        if not 0 < count < 255:
            raise NetError(f"a net has 1 to 254 peers, not {count}")
        why = missing()
        if why:
            raise NetError(why)
        self.count = count
        self.link_bps = link_bps
        self._name = f"{NAME}-{os.getpid()}"
        self._subnet = f"10.77.{os.getpid() % 256}"
        self._sigterm: object = None

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            self._sigterm = signal.signal(signal.SIGTERM, exit_by_signal)
        try:
            sweep()
            self._make()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def address(self, peer: int) -> str:
        """The IPv4 address of a peer."""
        return f"{self._subnet}.{self._index(peer) + 1}"

    def prefix(self, peer: int) -> list[str]:
        """What to put before a command that is to run at a peer. Its pid is then the command's."""
        return ["ip", "netns", "exec", self._space(self._index(peer))]

    def cut(self, sender: int, receiver: int) -> None:
        """Nothing of what `sender` sends reaches `receiver`, and nobody is told.

        The sender's frames go to its own hardware address, and a bridge never returns a frame.
        """
        ip(
            *("-n", self._space(self._index(sender)), "neigh", "replace", self.address(receiver)),
            *("lladdr", _hardware(sender), "nud", "permanent", "dev", "eth0"),
        )

    def join(self, sender: int, receiver: int) -> None:
        """The end of a cut; nothing happens where there is none."""
        ip(
            *("-n", self._space(self._index(sender)), "neigh", "del", self.address(receiver), "dev", "eth0"),
            fails=True,
        )

    def sent_bytes(self, peer: int) -> int:
        """What has left a peer's interface so far, all headers included."""
        return self._counted(peer, "tx_bytes")

    def received_bytes(self, peer: int) -> int:
        """What has come to a peer's interface so far, all headers included."""
        return self._counted(peer, "rx_bytes")

    def _counted(self, peer: int, counter: str) -> int:
        return int(run([*self.prefix(peer), "cat", f"/sys/class/net/eth0/statistics/{counter}"]))

    def close(self) -> None:
        """Remove everything. Processes in the namespaces stay, without a network: end them before."""
        remove(f"{self._name}-")
        if self._sigterm is not None:
            signal.signal(signal.SIGTERM, self._sigterm)  # type: ignore[arg-type]
            self._sigterm = None

    def _index(self, peer: int) -> int:
        if not 0 <= peer < self.count:
            raise NetError(f"there is no peer {peer}; there are {self.count}")
        return peer

    def _space(self, peer: int | str) -> str:
        return f"{self._name}-{peer}"

    def _make(self) -> None:
        bridge = self._space("bridge")
        ip("netns", "add", bridge)
        ip("-n", bridge, "link", "add", "bridge0", "type", "bridge", "stp_state", "0", "forward_delay", "0")
        ip("-n", bridge, "link", "set", "bridge0", "up")
        for peer in range(self.count):
            space, port = self._space(peer), f"peer{peer}"
            ip("netns", "add", space)
            ip(
                *("-n", bridge, "link", "add", port, "type", "veth", "peer", "name", "eth0"),
                *("address", _hardware(peer), "netns", space),
            )
            ip("-n", bridge, "link", "set", port, "master", "bridge0", "up")
            ip("-n", space, "address", "add", f"{self.address(peer)}/24", "dev", "eth0")
            ip("-n", space, "link", "set", "lo", "up")
            ip("-n", space, "link", "set", "eth0", "up")
            if self.link_bps is not None:
                _limit(space, self.link_bps)


class Nats:
    """Public peers on one network, and private peers, each behind a router of its own. Use in a `with`.

    A router masquerades (each connection leaves from another, random port) and drops what nobody inside has
    asked for: the kind of NAT that is the hardest to pass. Peers 0.. are public, the private ones follow. The
    addresses are public ones, since libp2p dials no other kind back; nothing of them leaves the namespaces.
    """

    def __init__(self, public: int, private: int) -> None:
        if not (0 < public < 100 and 0 < private < 100):
            raise NetError("give 1 to 99 public and 1 to 99 private peers")
        why = missing() or (None if shutil.which("nft") else "NAT needs the command nft: install nftables")
        if why:
            raise NetError(why)
        self.public, self.private = public, private
        self._name = f"{NAME}-{os.getpid()}"

    def __enter__(self) -> Self:
        try:
            sweep()
            self._make()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def address(self, peer: int) -> str:
        """Where it is in its own network; of a private peer nobody else can dial that."""
        return f"45.77.0.{peer + 1}" if peer < self.public else f"192.168.{peer}.2"

    def prefix(self, peer: int) -> list[str]:
        """What to put before a command that is to run at a peer."""
        return ["ip", "netns", "exec", f"{self._name}-{peer}"]

    def close(self) -> None:
        """Remove everything."""
        remove(f"{self._name}-")

    def _make(self) -> None:
        bridge = f"{self._name}-bridge"
        ip("netns", "add", bridge)
        ip("-n", bridge, "link", "add", "bridge0", "type", "bridge", "stp_state", "0", "forward_delay", "0")
        ip("-n", bridge, "link", "set", "bridge0", "up")
        for peer in range(self.public + self.private):
            space = f"{self._name}-{peer}"
            ip("netns", "add", space)
            ip("-n", space, "link", "set", "lo", "up")
            if peer < self.public:
                self._plug(space, peer, self.address(peer))
                continue
            router = f"{self._name}-router{peer}"
            ip("netns", "add", router)
            self._plug(router, peer, f"45.77.0.{peer + 101}")
            self._put_behind(router, space, peer)

    def _plug(self, space: str, peer: int, address: str) -> None:
        bridge, port = f"{self._name}-bridge", f"peer{peer}"
        ip("-n", bridge, "link", "add", port, "type", "veth", "peer", "name", "eth0", "netns", space)
        ip("-n", bridge, "link", "set", port, "master", "bridge0", "up")
        ip("-n", space, "address", "add", f"{address}/24", "dev", "eth0")
        ip("-n", space, "link", "set", "eth0", "up")

    def _put_behind(self, router: str, space: str, peer: int) -> None:
        ip("-n", router, "link", "add", "inside", "type", "veth", "peer", "name", "eth0", "netns", space)
        for name, device, last in ((router, "inside", 1), (space, "eth0", 2)):
            ip("-n", name, "address", "add", f"192.168.{peer}.{last}/24", "dev", device)
            ip("-n", name, "link", "set", device, "up")
        ip("-n", space, "route", "add", "default", "via", f"192.168.{peer}.1")
        enter = ["ip", "netns", "exec", router]
        run([*enter, "sysctl", "-qw", "net.ipv4.ip_forward=1"])
        run([*enter, "nft", NAT_RULES])


# Unsolicited packets are dropped, not refused, by the router itself as well.
NAT_RULES = """
add table ip nat
add chain ip nat leave { type nat hook postrouting priority 100 ; }
add rule ip nat leave oifname eth0 masquerade random
add table ip filter
add chain ip filter through { type filter hook forward priority 0 ; policy drop ; }
add rule ip filter through iifname inside accept
add rule ip filter through ct state established,related accept
add chain ip filter into { type filter hook input priority 0 ; policy drop ; }
add rule ip filter into iifname inside accept
add rule ip filter into ct state established,related accept
"""


def missing() -> str | None:
    """Why there can be no net here, in one line; None if there can."""
    if shutil.which("ip") is None or shutil.which("tc") is None:
        return "network namespaces need the commands ip and tc: install iproute2"
    if os.geteuid() != 0:
        return "network namespaces need root: run this again with sudo"
    return None


def parse_link(text: str) -> int:
    """Bits per second: "100mbit", "1gbit", "20mbit", "512kbit". Raises NetError."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([kmg]?)bit", text.strip().lower())
    if match is None or not float(match[1]):
        raise NetError(f"a link is written like 100mbit or 1gbit, not {text!r}")
    return round(float(match[1]) * UNITS[match[2]])


def _limit(space: str, link_bps: int) -> None:
    burst_bytes = max(BURST_BYTES_MIN, round(link_bps / 8 * BURST_S))
    limit_bytes = burst_bytes + round(link_bps / 8 * QUEUE_S)
    sizes = ["rate", f"{link_bps}bit", "burst", f"{burst_bytes}b", "limit", f"{limit_bytes}b"]
    run(["tc", "-n", space, "qdisc", "add", "dev", "eth0", "root", "tbf", *sizes])


def _hardware(peer: int) -> str:
    return f"02:00:00:00:00:{peer + 1:02x}"


def sweep() -> None:
    """Remove what processes made that are no more."""
    for space in _spaces():
        pid = space.split("-")[1] if space.startswith(f"{NAME}-") else ""
        if pid.isdigit() and not os.path.exists(f"/proc/{pid}"):
            ip("netns", "delete", space, fails=True)


def remove(prefix: str) -> None:
    for space in _spaces():
        if space.startswith(prefix):
            ip("netns", "delete", space, fails=True)


def _spaces() -> list[str]:
    return sorted(line.split()[0] for line in ip("netns", "list").splitlines() if line.strip())


def ip(*words: str, fails: bool = False) -> str:
    return run(["ip", *words], fails)


def run(command: list[str], fails: bool = False) -> str:
    # stdin from nowhere: a Ctrl-C must not end the commands that clean up after it
    done = subprocess.run(
        command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False, start_new_session=True
    )
    if done.returncode and not fails:
        raise NetError(f"{' '.join(command)}: {done.stderr.strip() or done.returncode}")
    return done.stdout
