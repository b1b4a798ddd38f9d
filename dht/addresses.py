"""Multiaddrs, the addresses of libp2p: parse them, and say precisely what is wrong with one.

A peer address names where a peer is and who it must be: `/ip4/203.0.113.7/tcp/4001/p2p/12D3KooW...`. Every
function that parses raises AddressError with one line: what is wrong, and what was expected.

py-multiaddr has the last word on the syntax, but not the first: it forgives blanks, doubled slashes and
`/tcp=80`, and its messages name its own classes. Must not import hivemind: the command line parses addresses
before anything starts.
"""

from __future__ import annotations

import difflib
import enum
import functools
import ipaddress
import itertools
import re
from collections.abc import Iterable
from dataclasses import dataclass

import base58
import multiaddr
from multiaddr.exceptions import ParseError

from tapestry.dht.presence import ADDRESS_BYTES_MAX, ADDRESSES_MAX

PEER_FORM = "/ip4/203.0.113.7/tcp/4001/p2p/<peer id>"
LISTEN_FORM = "/ip4/0.0.0.0/tcp/4001"
ANNOUNCE_FORM = "/ip4/203.0.113.7/tcp/4001"

# Longer than a relayed address with two peer ids and a full DNS name; a paste of something else is longer.
_ADDRESS_CHARS_MAX = 600

_IP = ("ip4", "ip6")
_DNS = ("dns", "dns4", "dns6", "dnsaddr")
_PORT = ("tcp", "udp")
_WITH_VALUE = (*_IP, *_DNS, *_PORT, "certhash", "sni", "p2p")
_WITHOUT_VALUE = ("quic-v1", "quic", "ws", "wss", "tls", "webtransport", "p2p-circuit")

_HOST_LABEL = re.compile(r"(?!-)[A-Za-z0-9_-]{1,63}(?<!-)")
_HOST_PORT = re.compile(r"(?P<host>\[[0-9A-Fa-f:.]+\]|[^/\[\]:\s]+):(?P<port>\d+)")
_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")

CIRCUIT = "/p2p-circuit"

Parts = list[tuple[str, str]]  # (protocol, value); the value of a protocol that has none is ""


class AddressError(ValueError):
    """Not a usable address; the message is one line that says what is wrong and what is expected."""


@dataclass(frozen=True, slots=True)
class PeerAddress:
    """Where a peer is and who it must be. `maddr` is the whole text and ends in `/p2p/<peer_id>`."""

    maddr: str
    peer_id: str


class Scope(enum.IntEnum):
    """From how far an address can be reached; the more, the better to tell others."""

    LOOPBACK = 0
    PRIVATE = 1
    PUBLIC = 2


def parse_peer(text: str) -> PeerAddress:
    """The address of a peer to connect to. Raises AddressError unless it ends in `/p2p/<peer id>`."""
    parts = _parse(text, PEER_FORM)
    name, value = parts[-1]
    if name != "p2p":
        raise AddressError(f"'{text}' does not say which peer is there: add /p2p/<peer id> at its end")
    _require_transport(text, parts[:-1], PEER_FORM)
    for port_name, port in parts:
        if port_name in _PORT and int(port) == 0:
            raise AddressError(
                f"'{text}' has port 0, where nobody listens: give the port that the peer prints"
            )
    return PeerAddress(maddr=text, peer_id=value)


def parse_listen(text: str) -> str:
    """An address to listen on; port 0 takes a free one, 0.0.0.0 is every interface. Raises AddressError."""
    parts = _parse(text, LISTEN_FORM)
    _refuse_peer_id(text, parts)
    _require_transport(text, parts, LISTEN_FORM)
    if parts[0][0] not in _IP:
        raise AddressError(f"'{text}' is a name; to listen, give an IP of this machine: {LISTEN_FORM}")
    return text


def parse_announce(text: str) -> str:
    """An address under which others can reach this node. Raises AddressError."""
    parts = _parse(text, ANNOUNCE_FORM)
    chars_max = ADDRESS_BYTES_MAX - len("/p2p/") - 52
    if len(text) > chars_max:
        raise AddressError(
            f"'{text}' has {len(text)} characters, others take {chars_max}: announce a shorter one"
        )
    _refuse_peer_id(text, parts)
    _require_transport(text, parts, ANNOUNCE_FORM)
    host_name, host = parts[0]
    if host_name in _IP and ipaddress.ip_address(host).is_unspecified:
        raise AddressError(
            f"'{text}' is no address that others can dial: give the IP or name they reach you by"
        )
    for name, value in parts:
        if name in _PORT and int(value) == 0:
            raise AddressError(f"'{text}' announces port 0: give the port under which others reach this node")
    return text


def is_usable(address: str, peer_id: str) -> bool:
    """Whether this very peer can be dialled there, as far as the text tells.

    For what peers say: a presence record's signature says who wrote its addresses, not that they are any.
    """
    return len(address) <= ADDRESS_BYTES_MAX and _peer_of(address) == peer_id


@functools.lru_cache(maxsize=4096)  # parsing one takes a third of a ms, and the same ones come again
def _peer_of(address: str) -> str:
    """Whom to dial there; "" if that is nobody."""
    try:
        return parse_peer(address).peer_id
    except AddressError:
        return ""


def usable_addresses(addresses: Iterable[str], peer_id: str) -> tuple[str, ...]:
    """The usable ones, in their order, at most ADDRESSES_MAX."""
    usable = (address for address in addresses if is_usable(address, peer_id))
    return tuple(itertools.islice(usable, ADDRESSES_MAX))


def full_addresses(addresses: Iterable[str], peer_id: str) -> tuple[str, ...]:
    """Each address with `/p2p/<peer_id>` at its end, in the given order."""
    suffix = f"/p2p/{peer_id}"
    return tuple(address if address.endswith(suffix) else address + suffix for address in addresses)


def ranked(addresses: Iterable[str]) -> tuple[str, ...]:
    """The addresses, the most widely reachable first; equals keep their order."""
    return tuple(sorted(addresses, key=lambda address: -scope(address)))


def relay_of(address: str) -> str:
    """The peer that carries what is sent to a relayed address; "" of a direct one."""
    before, circuit, _ = address.partition(CIRCUIT)
    return before.rsplit("/p2p/", 1)[-1] if circuit and "/p2p/" in before else ""


def circuit_address(relay: str, peer_id: str) -> str:
    """Where `peer_id` is found through a relay, whose own address, `/p2p/<its id>` included, is `relay`."""
    return f"{relay}{CIRCUIT}/p2p/{peer_id}"


def reachable_from_outside(address: str) -> bool:
    """Whether a peer in another network could dial `address`, as far as its text tells."""
    return scope(address) is Scope.PUBLIC


def scope(address: str) -> Scope:
    """How far `address` reaches. A DNS name counts as public; a relayed address is where its relay is."""
    parts = _parse(address, PEER_FORM)
    for name, value in parts:
        if name in _IP:
            return _ip_scope(value)
        if name in _DNS:
            return Scope.LOOPBACK if value.rstrip(".").lower() == "localhost" else Scope.PUBLIC
    raise AddressError(f"'{address}' has no host")


def _ip_scope(text: str) -> Scope:
    ip = ipaddress.ip_address(text)
    if ip.is_loopback or ip.is_unspecified:
        return Scope.LOOPBACK
    return Scope.PUBLIC if ip.is_global else Scope.PRIVATE


def _parse(text: str, form: str) -> Parts:
    _refuse_other_notations(text, form)
    parts = _split(text, form)
    for name, value in parts:
        _check_value(text, name, value)
    try:
        canonical = str(multiaddr.Multiaddr(text))
    except ParseError as error:
        raise AddressError(f"'{text}' is not a multiaddr: {error}; expected e.g. {form}") from error
    if canonical != text:
        raise AddressError(f"'{text}' is not written in the usual way: write {canonical}")
    return parts


def _refuse_other_notations(text: str, form: str) -> None:
    if not text.strip():
        raise AddressError(f"the address is empty: expected e.g. {form}")
    if len(text) > _ADDRESS_CHARS_MAX:
        raise AddressError(f"the address has {len(text)} characters, more than any has: expected e.g. {form}")
    if re.search(r"\s", text) or not text.isprintable():
        raise AddressError(f"{text!r} has white space or control characters in it: remove them")
    if _URL.match(text):
        raise AddressError(f"'{text}' is a URL; expected a multiaddr, e.g. {form}")
    host_port = _HOST_PORT.fullmatch(text)
    if host_port:
        suggestion = _multiaddr_of(host_port["host"], host_port["port"])
        peer = "/p2p/<peer id>" if form == PEER_FORM else ""
        raise AddressError(f"'{text}' is host:port; as a multiaddr it is {suggestion}{peer}")
    if not text.startswith("/"):
        raise AddressError(f"'{text}' does not begin with '/': expected e.g. {form}")


def _multiaddr_of(host: str, port: str) -> str:
    bare = host.strip("[]")
    try:
        version = ipaddress.ip_address(bare).version
    except ValueError:
        return f"/dns4/{host}/tcp/{port}"
    return f"/ip{version}/{bare}/tcp/{port}"


def _split(text: str, form: str) -> Parts:
    words = text.split("/")[1:]
    parts: Parts = []
    while words:
        name = words.pop(0)
        if name in _WITHOUT_VALUE:
            parts.append((name, ""))
        elif name not in _WITH_VALUE:
            raise AddressError(f"'{text}': {_unknown_protocol(name)}; expected e.g. {form}")
        elif not words or not words[0]:
            raise AddressError(f"'{text}' ends after /{name}: {_value_wanted(name)} is missing")
        else:
            parts.append((name, words.pop(0)))
    return parts


def _unknown_protocol(name: str) -> str:
    if not name:
        return "there is a '/' too many"
    close = difflib.get_close_matches(name, [*_WITH_VALUE, *_WITHOUT_VALUE], n=1)
    return f"unknown protocol '{name}'" + (f", is '{close[0]}' meant?" if close else "")


def _value_wanted(name: str) -> str:
    if name in _IP:
        return "an IP address"
    if name in _DNS:
        return "a host name"
    if name in _PORT:
        return "a port"
    return "a peer id" if name == "p2p" else "a value"


def _check_value(text: str, name: str, value: str) -> None:
    if name in _IP:
        _check_ip(text, name, value)
    elif name in _DNS:
        _check_host_name(text, value)
    elif name in _PORT:
        _check_port(text, value)
    elif name == "p2p":
        _check_peer_id(text, value)


def _check_ip(text: str, name: str, value: str) -> None:
    version = int(name[-1])
    try:
        ip = ipaddress.ip_address(value)
    except ValueError:
        raise AddressError(f"'{text}': '{value}' is not an IPv{version} address") from None
    if ip.version != version:
        raise AddressError(
            f"'{text}': '{value}' is an IPv{ip.version} address: write /ip{ip.version}/{value}"
        )


def _check_host_name(text: str, value: str) -> None:
    labels = value.removesuffix(".").split(".")
    if len(value) > 253 or not all(_HOST_LABEL.fullmatch(label) for label in labels):
        raise AddressError(f"'{text}': '{value}' is not a host name")


def _check_port(text: str, value: str) -> None:
    if not (value.isascii() and value.isdigit()):
        raise AddressError(f"'{text}': port '{value}' is not a number")
    if len(value) > 5 or int(value) > 65535:
        raise AddressError(f"'{text}': port {value} is out of range, the highest is 65535")


def _check_peer_id(text: str, value: str) -> None:
    try:
        raw = base58.b58decode(value)
    except ValueError:
        raise AddressError(f"'{text}': '{value}' is not a peer id (base58, e.g. 12D3KooW...)") from None
    if not _is_peer_multihash(raw):
        raise AddressError(
            f"'{text}': the peer id '{value}' has {len(value)} characters and is not whole; those that begin "
            f"with 12D3KooW have 52, those with Qm 46: was it cut off?"
        )


def _is_peer_multihash(raw: bytes) -> bool:
    """Whether `raw` has the form of a peer id: sha2-256 of a key, or a short key itself (specs, peer-ids)."""
    if raw[:2] == b"\x12\x20":
        return len(raw) == 34
    if raw[:2] in (b"\x00\x24", b"\x00\x25"):  # an Ed25519 or a secp256k1 public key, in protobuf
        return len(raw) == 2 + raw[1]
    return False


def _refuse_peer_id(text: str, parts: Parts) -> None:
    if any(name == "p2p" for name, _ in parts):
        shorter = text.split("/p2p/")[0]
        raise AddressError(f"'{text}' contains a peer id, the node adds its own: write {shorter}")


def _require_transport(text: str, parts: Parts, form: str) -> None:
    """There must be a host and a port in front: not `/p2p/X` alone, not an IP without a port."""
    names = [name for name, _ in parts]
    if names[:1] == ["dnsaddr"]:
        return
    if not names or names[0] not in (*_IP, *_DNS):
        raise AddressError(f"'{text}' has no host to connect to: expected e.g. {form}")
    if len(names) < 2 or names[1] not in _PORT:
        raise AddressError(f"'{text}' has no port: expected e.g. {form}")
    if names[1] == "udp" and (len(names) < 3 or names[2] not in ("quic-v1", "quic")):
        raise AddressError(f"'{text}' is bare UDP: write /udp/<port>/quic-v1")


def short(peer_id: str) -> str:
    """A peer id as log lines show it: its last letters, which differ."""
    return peer_id[-8:]
