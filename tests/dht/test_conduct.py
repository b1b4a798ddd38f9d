"""Points, bans, and an end to both."""

from __future__ import annotations

from tapestry.dht.conduct import BAN_S_MAX, BAN_S_MIN, FORGIVEN_S, PEERS_MAX, Conduct


def test_a_fault_now_and_then_bans_nobody():
    conduct = Conduct()
    assert not any(conduct.fault("a", "malformed", 20.0 * i) for i in range(1000))


def test_a_flood_is_banned_shown_with_its_reason_and_let_in_again():
    conduct = Conduct()
    bans = [conduct.fault("a", "streams", 1.0) for _ in range(51)]
    assert bans == [0.0] * 50 + [BAN_S_MIN]
    assert (
        conduct.is_banned("a", 10.9) and not conduct.is_banned("a", 11.0) and not conduct.is_banned("b", 1.0)
    )
    [ban] = conduct.bans(2.0)
    assert (ban.peer, ban.reason, ban.left_s) == ("a", "streams", 9.0)
    assert conduct.bans(12.0) == ()


def test_who_goes_on_is_banned_for_longer_up_to_a_bound_and_forgiven_after_long_peace():
    conduct, now, lengths = Conduct(), 0.0, []
    for _ in range(9):
        while not (ban_s := conduct.fault("a", "oversized", now)):
            pass
        lengths.append(ban_s)
        now += ban_s
    assert lengths == [10, 20, 40, 80, 160, 320, 600, 600, 600] and max(lengths) == BAN_S_MAX
    now += FORGIVEN_S
    while not (ban_s := conduct.fault("a", "oversized", now)):
        pass
    assert ban_s == BAN_S_MIN


def test_identities_without_number_take_no_memory_and_set_nobody_free():
    conduct = Conduct()
    while not conduct.fault("hostile", "malformed", 0.0):
        pass
    for i in range(2 * PEERS_MAX):
        conduct.fault(f"sybil{i}", "malformed", 1.0)
    assert len(conduct._accounts) == PEERS_MAX and conduct.is_banned("hostile", 2.0)
