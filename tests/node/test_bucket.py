"""The caps' arithmetic, with a clock of our own: never more than the rate allows, and all that it allows."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tapestry.node.net.bucket import BURST_S, DEBT_S, PIECE_BYTES_MAX, PIECE_BYTES_MIN, Bucket

MBIT = 1e6 / 8
RATES = st.sampled_from([1 * MBIT, 3.3 * MBIT, 20 * MBIT, 50 * MBIT, 1e3 * MBIT])


class Line:
    """What passed and when, with writers that always have more. Wakes late, as a loop does."""

    def __init__(self, rate: float, late_s: float, seed: int) -> None:
        self.rate, self.late_s = rate, late_s
        self.rng = random.Random(seed)
        self.now = 1000.0
        self.bucket = Bucket(rate, self.now)
        self.passed: list[tuple[float, int, bool]] = []  # when, bytes, whether it had asked

    def bulk(self) -> None:
        """A piece, full or not, as soon as it may pass and the loop gets to it."""
        piece = self.bucket.piece_bytes
        count = piece if self.rng.random() < 0.8 else self.rng.randint(1, piece)
        while wait_s := self.bucket.wait_s(count, self.now):
            self.now += wait_s + self.rng.uniform(0, self.late_s)
        self._pass(count, True)

    def control(self, share: float) -> None:
        """Messages that never wait, on average this share of the rate."""
        if self.rng.random() < share:
            self._pass(self.bucket.piece_bytes, False)

    def _pass(self, count: int, asked: bool) -> None:
        self.bucket.spend(count, self.now)
        self.passed.append((self.now, count, asked))


def _most_above_the_rate(line: Line) -> float:
    """The largest of (bytes in a window - rate * its length), over all windows that end with a bulk piece."""
    most, running, before = 0.0, 0.0, line.passed[0][0]
    for at, count, asked in line.passed:  # Kadane's scan, with the rate paid off between two passages
        running = max(0.0, running - line.rate * (at - before)) + count
        before = at
        if asked:
            most = max(most, running)
    return most


@given(RATES, st.floats(0, 0.3), st.sampled_from([0.0, 0.1, 0.4]), st.integers(0, 2**32))
def test_in_no_window_passes_more_than_burst_and_rate(rate, late_s, control, seed):
    line = Line(rate, late_s, seed)
    for _ in range(300):
        line.control(control)
        line.bulk()
    assert _most_above_the_rate(line) <= line.bucket.burst_bytes + 2


@given(RATES, st.floats(0, BURST_S / 2), st.sampled_from([0.0, 0.1, 0.4]), st.integers(0, 2**32))
def test_who_always_has_more_gets_95_percent_of_the_rate_also_from_a_busy_loop(rate, late_s, control, seed):
    line = Line(rate, late_s, seed)
    began_at = line.now
    while len(line.passed) < 600:
        line.control(control)
        line.bulk()
    passed = sum(count for _, count, _ in line.passed)
    assert passed >= 0.95 * rate * (line.now - began_at)


@given(RATES, st.integers(0, 2**32))
def test_over_two_seconds_the_cap_holds_within_5_percent(rate, seed):
    line = Line(rate, 0.0, seed)
    while line.now < 1002.0:
        line.bulk()
    passed = sum(count for at, count, _ in line.passed if at < 1002.0)
    assert 0.95 * rate * 2.0 <= passed <= 1.05 * rate * 2.0


def test_the_check_of_windows_finds_an_overshoot():
    line = Line(20 * MBIT, 0.0, 0)
    for _ in range(10):
        line.bulk()
        line._pass(line.bucket.piece_bytes, True)  # did not ask
    assert _most_above_the_rate(line) > line.bucket.burst_bytes


def test_an_idle_hour_saves_nothing_up():
    bucket = Bucket(20 * MBIT, 0.0)
    passed = 0
    while bucket.wait_s(bucket.piece_bytes, 3600.0) == 0:
        bucket.spend(bucket.piece_bytes, 3600.0)
        passed += bucket.piece_bytes
    assert passed <= bucket.burst_bytes == BURST_S * 20 * MBIT


def test_bulk_waits_for_what_control_spent():
    bucket = Bucket(1000.0, 0.0)
    bucket.spend(int(bucket.burst_bytes) + 1500, 0.0)
    assert bucket.wait_s(1, 0.0) == pytest.approx(1.501)
    assert bucket.wait_s(1, 1.502) == 0


def test_a_flood_delays_bulk_by_seconds_however_large_it_is():
    bucket = Bucket(20 * MBIT, 0.0)
    for _ in range(371):
        bucket.spend(10**6, 1.0)
    assert bucket.wait_s(1, 1.0) == pytest.approx(DEBT_S, abs=0.01)


def test_a_rate_that_changes_leaves_what_is_owed():
    bucket = Bucket(1000.0, 0.0, debt_s=60.0)
    bucket.spend(int(bucket.burst_bytes) + 1500, 0.0)
    bucket.set_rate(100.0, 1.0)
    assert bucket.is_owed(1.0) and bucket.wait_s(0, 1.0) == pytest.approx(5.0)
    assert not bucket.is_owed(1.0 + (bucket.burst_bytes + 500) / 100.0)


def test_a_debt_is_paid_off_in_its_time_also_at_a_rate_that_fell():
    """A link that owed a minute was not read for an hour once 63 others sent as well."""
    bucket = Bucket(64_000.0, 0.0, debt_s=60.0)
    bucket.spend(10**9, 0.0)
    assert bucket.wait_s(0, 0.0) == pytest.approx(60.0)
    bucket.set_rate(1000.0, 0.0)
    assert bucket.wait_s(0, 0.0) == pytest.approx(60.0)
    bucket.spend(10**9, 30.0)
    assert bucket.wait_s(0, 30.0) == pytest.approx(60.0)


def test_one_message_is_owed_in_full_also_at_a_rate_that_fell():
    bucket = Bucket(64_000.0, 0.0, debt_s=60.0, message_bytes_max=2**20)
    bucket.spend(2**20, 0.0)
    bucket.set_rate(256.0, 0.0)
    assert bucket.wait_s(0, 0.0) == pytest.approx((2**20 - bucket.burst_bytes) / 256.0)
    bucket.spend(10**9, 0.0)
    assert bucket.wait_s(0, 0.0) == pytest.approx(2**20 / 256.0), "and no more than one"


def test_a_clock_that_goes_back_gives_nothing_away():
    bucket = Bucket(1000.0, 10.0)
    bucket.spend(int(bucket.burst_bytes), 10.0)
    assert bucket.wait_s(100, 5.0) == bucket.wait_s(100, 10.0) == pytest.approx(0.1)


@pytest.mark.parametrize("rate", [MBIT, 20 * MBIT, 1e6 * MBIT])
def test_a_piece_is_worth_a_write_and_short_on_the_line(rate):
    bucket = Bucket(rate, 0.0)
    assert PIECE_BYTES_MIN <= bucket.piece_bytes <= PIECE_BYTES_MAX
    assert bucket.piece_bytes / rate <= 0.04 and 2 * bucket.piece_bytes <= bucket.burst_bytes
