"""Addresses: what is accepted, and the exact words for what is not."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tapestry.dht.addresses import (
    AddressError,
    Scope,
    full_addresses,
    parse_announce,
    parse_listen,
    parse_peer,
    ranked,
    reachable_from_outside,
    scope,
    usable_addresses,
)
from tapestry.dht.presence import ADDRESS_BYTES_MAX, ADDRESSES_MAX

ID = "12D3KooWD3eckifWpRn9wQpMG9R9hX3sD158z7EqHWmweQAJU5SA"
OTHER = "12D3KooWJyG4viiT1L9VJ26oBefwMTSnYptGinSwD4WTEi7gHC7s"
RSA_ID = "QmcgpsyWgH8Y8ajJz1Cu72KnS5uo2Aa2LpzU7kinSupNKC"
PEER = "/ip4/203.0.113.7/tcp/4001/p2p/<peer id>"


@pytest.mark.parametrize(
    "transport",
    [
        "/ip4/1.2.3.4/tcp/4001",
        "/ip6/2001:db8::1/tcp/4001",
        "/dns4/node.example.org/tcp/4001",
        "/dns/node.example.org/tcp/4001",
        "/dnsaddr/bootstrap.example.org",
        "/ip4/1.2.3.4/udp/4001/quic-v1",
        "/ip4/1.2.3.4/udp/4001/quic",
        "/ip4/1.2.3.4/tcp/443/wss",
        f"/ip4/1.2.3.4/tcp/4001/p2p/{OTHER}/p2p-circuit",
    ],
)
@pytest.mark.parametrize("peer_id", [ID, RSA_ID])
def test_a_peer_address_is_its_text_and_the_last_peer_id(transport: str, peer_id: str) -> None:
    address = parse_peer(f"{transport}/p2p/{peer_id}")
    assert (address.maddr, address.peer_id) == (f"{transport}/p2p/{peer_id}", peer_id)


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("", f"the address is empty: expected e.g. {PEER}"),
        ("  ", f"the address is empty: expected e.g. {PEER}"),
        (f" /ip4/1.2.3.4/tcp/1/p2p/{ID}", "white space or control characters in it: remove them"),
        (f"/ip4/1.2.3.4/tcp/ 1/p2p/{ID}", "white space or control characters in it: remove them"),
        (f"/ip4/1.2.3.4/tcp/1/p2p/{ID}\n", "white space or control characters in it: remove them"),
        ("1.2.3.4:4001", "is host:port; as a multiaddr it is /ip4/1.2.3.4/tcp/4001/p2p/<peer id>"),
        ("[::1]:4001", "is host:port; as a multiaddr it is /ip6/::1/tcp/4001/p2p/<peer id>"),
        ("a.org:4001", "is host:port; as a multiaddr it is /dns4/a.org/tcp/4001/p2p/<peer id>"),
        ("http://a.org:80/", f"'http://a.org:80/' is a URL; expected a multiaddr, e.g. {PEER}"),
        ("node.example.org", f"'node.example.org' does not begin with '/': expected e.g. {PEER}"),
        ("/", f"'/': there is a '/' too many; expected e.g. {PEER}"),
        ("/ip4/1.2.3.4/tcp/1", "does not say which peer is there: add /p2p/<peer id> at its end"),
        ("/ip4/1.2.3.4/tcp/1/p2p", "ends after /p2p: a peer id is missing"),
        ("/ip4/1.2.3.4/tcp/1/p2p/", "ends after /p2p: a peer id is missing"),
        ("/ip4/1.2.3.4/tcp", "ends after /tcp: a port is missing"),
        ("/ip4//tcp/1", "ends after /ip4: an IP address is missing"),
        (f"/ip4/1.2.3.400/tcp/1/p2p/{ID}", "'1.2.3.400' is not an IPv4 address"),
        (f"/ip4/::1/tcp/1/p2p/{ID}", "'::1' is an IPv6 address: write /ip6/::1"),
        (f"/ip6/1.2.3.4/tcp/1/p2p/{ID}", "'1.2.3.4' is an IPv4 address: write /ip4/1.2.3.4"),
        (f"/dns4/a_b!/tcp/1/p2p/{ID}", "'a_b!' is not a host name"),
        (f"/ip4/1.2.3.4/tcp/65536/p2p/{ID}", "port 65536 is out of range, the highest is 65535"),
        (f"/ip4/1.2.3.4/tcp/{'9' * 99}/p2p/{ID}", "out of range"),
        (f"/ip4/1.2.3.4/tcp/-1/p2p/{ID}", "port '-1' is not a number"),
        (f"/ip4/1.2.3.4/tcp/²/p2p/{ID}", "port '²' is not a number"),
        (f"/ip4/1.2.3.4/tcp/0/p2p/{ID}", "has port 0, where nobody listens"),
        (f"/ip4/1.2.3.4/tpc/1/p2p/{ID}", "unknown protocol 'tpc', is 'tcp' meant?"),
        (f"/ip4/1.2.3.4/xyzzy/p2p/{ID}", "unknown protocol 'xyzzy'; expected e.g."),
        (f"/ip4=1.2.3.4/tcp/1/p2p/{ID}", "unknown protocol 'ip4=1.2.3.4'"),
        (f"/ip4/1.2.3.4/tcp/01/p2p/{ID}", f"write /ip4/1.2.3.4/tcp/1/p2p/{ID}"),
        (f"/ip4/1.2.3.4/tcp/1/p2p/{ID}/", "there is a '/' too many"),
        (f"/ip4/1.2.3.4/tcp/1/p2p/{ID[:-1]}", "has 51 characters and is not whole"),
        (f"/ip4/1.2.3.4/tcp/1/p2p/{ID[:9]}", "has 9 characters and is not whole"),
        (f"/ip4/1.2.3.4/tcp/1/p2p/{RSA_ID[:-3]}", "was it cut off?"),
        (f"/ip4/1.2.3.4/tcp/1/p2p/{ID[:-1]}0", "is not a peer id (base58, e.g. 12D3KooW...)"),
        (f"/p2p/{ID}", f"has no host to connect to: expected e.g. {PEER}"),
        (f"/ip4/1.2.3.4/p2p/{ID}", f"has no port: expected e.g. {PEER}"),
        (f"/ip4/1.2.3.4/udp/1/p2p/{ID}", "is bare UDP: write /udp/<port>/quic-v1"),
        (f"/ip4/1.2.3.4/tcp/1/p2p/{ID}/p2p-circuit", "does not say which peer is there"),
        ("/ip4/1.2.3.4" * 60, "more than any has"),
    ],
)
def test_a_bad_peer_address_is_explained_in_one_line(text: str, error: str) -> None:
    with pytest.raises(AddressError) as caught:
        parse_peer(text)
    assert error in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["/ip4/0.0.0.0/tcp/0", "/ip6/::/tcp/4001", "/ip4/127.0.0.1/udp/0/quic-v1"])
def test_a_listen_address_may_be_unspecified_and_of_port_0(text: str) -> None:
    assert parse_listen(text) == text


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("0.0.0.0:4001", "as a multiaddr it is /ip4/0.0.0.0/tcp/4001"),
        (f"/ip4/1.2.3.4/tcp/1/p2p/{ID}", "the node adds its own: write /ip4/1.2.3.4/tcp/1"),
        ("/dns4/a.org/tcp/1", "is a name; to listen, give an IP of this machine"),
        ("/ip4/0.0.0.0", "has no port"),
    ],
)
def test_a_bad_listen_address_is_explained(text: str, error: str) -> None:
    with pytest.raises(AddressError) as caught:
        parse_listen(text)
    assert str(caught.value).endswith(error) or error in str(caught.value)
    assert "<peer id>" not in str(caught.value)


@pytest.mark.parametrize("text", ["/ip4/203.0.113.7/tcp/4001", "/dns4/node.example.org/tcp/443"])
def test_an_announced_address_is_an_ip_or_a_name_with_a_port(text: str) -> None:
    assert parse_announce(text) == text


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("/ip4/203.0.113.7/tcp/0", "announces port 0"),
        ("/ip4/0.0.0.0/tcp/1", "is no address that others can dial"),
        ("/ip6/::/tcp/1", "is no address that others can dial"),
        (f"/ip4/203.0.113.7/tcp/1/p2p/{ID}", "contains a peer id"),
        (f"/dns4/{'a' * 60}.{'b' * 60}.{'c' * 20}.org/tcp/1", "has 158 characters, others take 143"),
    ],
)
def test_a_bad_announced_address_is_explained(text: str, error: str) -> None:
    with pytest.raises(AddressError, match=error):
        parse_announce(text)


def test_only_addresses_of_this_peer_that_can_be_dialled_are_usable_and_not_too_many() -> None:
    good = [f"/ip4/1.2.3.4/tcp/{port}/p2p/{ID}" for port in range(1, 2 * ADDRESSES_MAX)]
    bad = [
        f"/ip4/1.2.3.4/tcp/0/p2p/{ID}",
        "/ip4/1.2.3.4/tcp/1",
        f"/ip4/999.2.3.4/tcp/1/p2p/{ID}",
        f"/ip4/1.2.3.4/tcp/1/p2p/{OTHER}",
        f"/dns4/{'a.' * ADDRESS_BYTES_MAX}org/tcp/1/p2p/{ID}",
        "",
    ]
    assert usable_addresses([*bad, *good], ID) == tuple(good[:ADDRESSES_MAX])


def test_full_addresses_add_the_peer_id_once() -> None:
    assert full_addresses(["/ip4/1.2.3.4/tcp/1", f"/ip4/1.2.3.4/tcp/2/p2p/{ID}"], ID) == (
        f"/ip4/1.2.3.4/tcp/1/p2p/{ID}",
        f"/ip4/1.2.3.4/tcp/2/p2p/{ID}",
    )


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("/ip4/127.0.0.1/tcp/1", Scope.LOOPBACK),
        ("/ip6/::1/tcp/1", Scope.LOOPBACK),
        ("/dns4/localhost/tcp/1", Scope.LOOPBACK),
        ("/ip4/192.168.1.5/tcp/1", Scope.PRIVATE),
        ("/ip4/100.64.0.1/tcp/1", Scope.PRIVATE),
        ("/ip6/fe80::1/tcp/1", Scope.PRIVATE),
        ("/ip6/fd00::1/tcp/1", Scope.PRIVATE),
        ("/ip4/8.8.8.8/tcp/1", Scope.PUBLIC),
        (f"/dns4/a.org/tcp/1/p2p/{ID}", Scope.PUBLIC),
        (f"/ip4/8.8.8.8/tcp/1/p2p/{ID}/p2p-circuit", Scope.PUBLIC),
    ],
)
def test_scope_is_how_far_an_address_reaches(text: str, expected: Scope) -> None:
    assert scope(text) is expected
    assert reachable_from_outside(text) is (expected is Scope.PUBLIC)


def test_the_address_that_reaches_farthest_is_ranked_first() -> None:
    loopback, lan, public = "/ip4/127.0.0.1/tcp/1", "/ip4/10.0.0.1/tcp/1", "/ip4/8.8.8.8/tcp/1"
    assert ranked([loopback, lan, public]) == (public, lan, loopback)


@given(st.text(alphabet=st.sampled_from("/ip46dnstcu2p.0123:abzKQ- é\n"), max_size=80))
def test_no_text_raises_anything_but_an_address_error(text: str) -> None:
    for parse in (parse_peer, parse_listen, parse_announce, scope):
        try:
            parse(text)  # type: ignore[operator]
        except AddressError as error:
            assert "\n" not in str(error)
