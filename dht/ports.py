"""Whether a port can be listened on: asked before p2pd is started, which would share one that is taken.

Must not import hivemind: a start is refused before that is there.
"""

from __future__ import annotations

import errno
import ipaddress
import socket

import multiaddr


def port_fault(address: str) -> str:
    """Why nobody can listen on a multiaddr, in a line; "" if somebody can.

    p2pd shares a port that is taken (SO_REUSEPORT), and each of the two loses peers to the other.
    """
    values = {protocol.name: value for protocol, value in multiaddr.Multiaddr(address).items()}
    ip = ipaddress.ip_address(values.get("ip4") or values["ip6"])
    family = socket.AF_INET if ip.version == 4 else socket.AF_INET6
    kind = socket.SOCK_STREAM if "tcp" in values else socket.SOCK_DGRAM
    port = int(values.get("tcp") or values["udp"])
    try:
        with socket.socket(family, kind) as probe:
            if kind == socket.SOCK_STREAM:  # only then connections that linger from before do not count
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if family == socket.AF_INET6:
                probe.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            probe.bind((str(ip), port))
    except OSError as error:
        return f"cannot listen on {address}: {_why_not(error)}"
    return ""


def _why_not(error: OSError) -> str:
    if error.errno == errno.EADDRNOTAVAIL:
        return "this machine does not have that address; a router's is for --announce"
    if error.errno == errno.EAFNOSUPPORT:
        return "this machine has no IPv6"
    if error.errno == errno.EADDRINUSE:
        return f"{error.strerror}; --listen with /tcp/0 takes a free port"
    return str(error.strerror)
