"""A long line between two peers on one machine: two network namespaces, each packet late by half the trip.

    with Line(rtt_s=0.2, link_bps=10**9) as line:
        subprocess.Popen([*line.prefix(0), "tapestry", "start", ...])  # its address is line.address(0)

Linux has `netem` for this where the kernel was built with it; here a process does it. Each namespace's eth0
is a TUN device, whose packets that process reads, holds and writes into the other one; so the TCP of both is
real, with its windows, congestion control and 1,500-byte packets (in bursts, as a network card with
segmentation offload gets them). What does not fit in `queue_s` of the line's rate before the line is dropped.

Needs Linux, root, iproute2 and /dev/net/tun. All is removed at the end, as in _netns.py.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import os
import select
import signal
import struct
import subprocess
import sys
import time
from collections import deque
from pathlib import Path
from types import TracebackType
from typing import Self

sys.path.insert(0, str(Path(__file__).resolve().parent))

from _netns import NAME, NetError, ip, missing, remove, run, sweep

MTU = 1500
QUEUE_S = 0.05  # as much as a home router's queue holds
CLONE_NEWNET = 0x40000000  # linux/sched.h
TUNSETIFF, TUNSETOFFLOAD = 0x400454CA, 0x400454D0  # linux/if_tun.h, and the flags
IFF_TUN, IFF_NO_PI, IFF_VNET_HDR = 0x0001, 0x1000, 0x4000
TUN_F_CSUM, TUN_F_TSO4, TUN_F_TSO6 = 0x01, 0x02, 0x04
TUN_F_USO4, TUN_F_USO6 = 0x20, 0x40  # the same for UDP, since Linux 6.2
VNET_HEADER_BYTES = 10
FRAME_BYTES_MAX = VNET_HEADER_BYTES + 65535 + 64
READS_MAX = 64  # in a turn
START_S = 10.0


class Line:
    """As _netns.Net with two peers. Use in a `with`."""

    def __init__(self, rtt_s: float, link_bps: int, queue_s: float = QUEUE_S) -> None:
        why = missing() or (None if os.path.exists("/dev/net/tun") else "a long line needs /dev/net/tun")
        if why:
            raise NetError(why)
        self.rtt_s, self.link_bps, self.queue_s = rtt_s, link_bps, queue_s
        self.count = 2
        self._name = f"{NAME}-{os.getpid()}"
        self._process: subprocess.Popen[bytes] | None = None

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
        """The IPv4 address of a peer."""
        return f"10.78.0.{peer + 1}"

    def prefix(self, peer: int) -> list[str]:
        """What to put before a command that is to run at a peer."""
        return ["ip", "netns", "exec", f"{self._name}-{peer}"]

    def sent_bytes(self, peer: int) -> int:
        """What has left a peer's interface so far, all headers included."""
        return int(run([*self.prefix(peer), "cat", "/sys/class/net/eth0/statistics/tx_bytes"]))

    def set(self, **settings: str) -> None:
        """Kernel settings of both peers: `set(tcp_congestion_control="cubic")` of net.ipv4."""
        for peer in range(2):
            for name, value in settings.items():
                run([*self.prefix(peer), "sysctl", "-qw", f"net.ipv4.{name}={value}"])

    def close(self) -> None:
        """Remove everything. Processes in the namespaces stay, without a network: end them before."""
        if self._process is not None:
            self._process.terminate()
            self._process.wait()
            self._process = None
        remove(f"{self._name}-")

    def _make(self) -> None:
        spaces = [f"{self._name}-{peer}" for peer in range(2)]
        for space in spaces:
            ip("netns", "add", space)
        words = [*spaces, str(self.rtt_s / 2), str(self.link_bps), str(self.queue_s)]
        self._process = subprocess.Popen(
            [sys.executable, "-P", __file__, *words], stdout=subprocess.PIPE, stdin=subprocess.DEVNULL
        )
        assert self._process.stdout is not None
        if not self._process.stdout.readline():
            raise NetError("the process that delays packets has ended; what it said is above")
        for peer, space in enumerate(spaces):
            ip("-n", space, "link", "set", "lo", "up")
            ip("-n", space, "address", "add", f"{self.address(peer)}/24", "dev", "eth0")
            ip("-n", space, "link", "set", "eth0", "mtu", str(MTU), "up")


# --- the process that delays packets -----------------------------------------------------------------


class Way:
    """One direction: a rate, a queue before it, and a delay after it."""

    def __init__(self, source: int, target: int, delay_s: float, link_bps: float, queue_s: float) -> None:
        self.source, self.target = source, target
        self._delay_s, self._bytes_per_s, self._queue_s = delay_s, link_bps / 8, queue_s
        self._flying: deque[tuple[float, bytes]] = deque()
        self._free_at = 0.0
        self.dropped = 0

    def take(self, now: float) -> None:
        """What the sender's kernel has for us."""
        for _ in range(READS_MAX):
            try:
                frame = os.read(self.source, FRAME_BYTES_MAX)
            except BlockingIOError:
                return
            begins_at = max(now, self._free_at)
            if begins_at - now > self._queue_s:
                self.dropped += 1
                continue
            self._free_at = begins_at + (len(frame) - VNET_HEADER_BYTES) / self._bytes_per_s
            self._flying.append((self._free_at + self._delay_s, frame))

    def deliver(self, now: float) -> None:
        """What has arrived by now."""
        while self._flying and self._flying[0][0] <= now:
            with contextlib.suppress(OSError):  # the interface is not up yet
                os.write(self.target, self._flying.popleft()[1])

    @property
    def next_at(self) -> float:
        return self._flying[0][0] if self._flying else float("inf")


def carry(spaces: list[str], delay_s: float, link_bps: float, queue_s: float) -> None:
    """Until SIGTERM."""
    ends = [_open_tun(space) for space in spaces]
    with contextlib.suppress(PermissionError):  # what runs on this machine must not make the line longer
        os.sched_setscheduler(0, os.SCHED_RR, os.sched_param(2))
    ways = [Way(ends[i], ends[1 - i], delay_s, link_bps, queue_s) for i in range(2)]
    poll = select.poll()
    for way in ways:
        poll.register(way.source, select.POLLIN)
    signal.signal(signal.SIGTERM, lambda *_: os._exit(0))
    print("ready", flush=True)
    by_source = {way.source: way for way in ways}
    while True:
        wait_s = min(way.next_at for way in ways) - time.monotonic()
        ready = poll.poll(None if wait_s == float("inf") else max(0.0, wait_s * 1000))
        now = time.monotonic()
        for source, _ in ready:
            by_source[source].take(now)
        for way in ways:
            way.deliver(now)


def _open_tun(space: str) -> int:
    """A TUN device named eth0 in that namespace; it stays there, and the descriptor here."""
    with Path(f"/run/netns/{space}").open() as its:
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.setns(its.fileno(), CLONE_NEWNET):
            raise OSError(ctypes.get_errno(), "setns")
    tun = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
    fcntl.ioctl(tun, TUNSETIFF, struct.pack("16sH22x", b"eth0", IFF_TUN | IFF_NO_PI | IFF_VNET_HDR))
    offload = TUN_F_CSUM | TUN_F_TSO4 | TUN_F_TSO6
    try:
        fcntl.ioctl(tun, TUNSETOFFLOAD, offload | TUN_F_USO4 | TUN_F_USO6)
    except OSError:
        fcntl.ioctl(tun, TUNSETOFFLOAD, offload)
    return tun


if __name__ == "__main__":
    carry(sys.argv[1:3], *map(float, sys.argv[3:6]))
