"""Dials on the word of others: bounded per target and in all, and honest targets are reached."""

from __future__ import annotations

from collections import Counter

from tapestry.node.net.dials import ALL_BURST, ALL_PER_S, ENDPOINT_BURST, ENDPOINT_PER_S, HOST_BURST, Dials


def test_records_that_name_a_third_party_open_few_connections_to_it():
    """300 of them, looked at every 5 s for 600 s, opened 161 connections a second."""
    dials, opened = Dials(), 0
    for look in range(120):
        for liar in range(300):
            if dials.may_try(f"liar{liar}", 5.0 * look):
                opened += len(dials.take([f"/ip4/192.0.2.7/tcp/443/p2p/liar{liar}"], 5.0 * look))
                dials.failed(f"liar{liar}", 5.0 * look)
    assert opened <= ENDPOINT_BURST + 600 * ENDPOINT_PER_S


def test_one_host_on_many_ports_and_many_hosts_are_bounded_too():
    dials = Dials()
    hosts = Counter(
        address.split("/")[2]
        for port in range(5000)
        for address in dials.take(
            [f"/ip4/192.0.2.7/tcp/{port}/p2p/x", f"/ip4/10.0.{port % 250}.1/tcp/1/p2p/x"], 0.0
        )
    )
    assert hosts["192.0.2.7"] <= 64 and hosts.total() <= ALL_BURST
    later = sum(len(dials.take([f"/ip4/10.1.{i % 250}.{i // 250}/tcp/1/p2p/x"], 10.0)) for i in range(2000))
    assert later <= 10 * ALL_PER_S


def test_a_swarm_of_64_that_starts_at_once_is_dialled_whole():
    dials = Dials()
    for member in range(64):
        told = [f"/ip4/10.0.0.{member}/tcp/4001/p2p/m", f"/ip4/192.168.0.{member}/tcp/4001/p2p/m"]
        assert dials.take(told, 0.0) == tuple(told)


def test_a_guest_of_a_linked_relay_counts_as_itself_and_any_other_relay_is_one_target():
    dials = Dials()
    guests = [f"/ip4/5.6.7.8/tcp/4001/p2p/relay/p2p-circuit/p2p/guest{i}" for i in range(40)]
    assert dials.take(guests, 0.0, ["relay"]) == tuple(guests)
    assert len(dials.take(guests[:1] * 9, 0.0, ["relay"])) == ENDPOINT_BURST - 1
    assert len(Dials().take(guests, 0.0, ["another"])) == ENDPOINT_BURST
    assert len(Dials().take(guests * 9, 0.0, ["relay"])) <= HOST_BURST


def test_a_hint_that_failed_waits_longer_each_time_and_a_link_forgives():
    dials = Dials()
    dials.failed("m", 0.0)
    assert not dials.may_try("m", 4.9) and dials.may_try("m", 5.0)
    dials.failed("m", 5.0)
    assert not dials.may_try("m", 14.9) and dials.may_try("m", 15.0)
    dials.failed("m", 15.0)
    dials.reached("m")
    dials.failed("m", 20.0)
    assert dials.may_try("m", 25.0)
