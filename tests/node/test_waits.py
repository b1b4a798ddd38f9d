"""A wait is shown alike by status and /readyz, and told once in log, events and metrics when it lasts."""

from __future__ import annotations

import asyncio
import logging
import time
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import aiohttp
import pytest
from schemas import faults, load

from tapestry.node.daemon import waits
from tapestry.node.daemon.waits import AGAIN_S, LOOK_S, OVER_S, WaitTeller
from tapestry.node.protocol.waits import KINDS, Wait
from tapestry.node.surface import status
from tapestry.node.surface.history import History
from tapestry.node.surface.http import start_http
from tapestry.node.surface.metrics import Metrics
from tapestry.node.surface.status import NodeView

MEMBERS = Wait("members", "1 contributions, the run asks for 2", "ends when one more contributes", 61.0)


class Bench:
    """A teller, and what it told."""

    def __init__(self, caplog: pytest.LogCaptureFixture) -> None:
        caplog.set_level(logging.INFO, "tapestry.node")
        self.now, self.wait = 0.0, MEMBERS
        self.metrics, self.history, self.caplog = Metrics("0.1.0"), History(), caplog
        self.teller = WaitTeller(lambda: self.wait, self.metrics, self.history, lambda: self.now)

    def go_on(self, seconds: float, wait: Wait | None) -> None:
        until = self.now + seconds
        while self.now < until:
            self.wait = (
                wait if wait is None else replace(wait, for_s=wait.for_s + seconds - (until - self.now))
            )
            self.teller.look()
            self.now += LOOK_S

    @property
    def said(self) -> list[str]:
        return [line.getMessage() for line in self.caplog.records]

    def metric(self, kind: str) -> float:
        line = next(
            line
            for line in self.metrics.render().decode().splitlines()
            if line.startswith(f'tapestry_waiting_seconds{{kind="{kind}"}}')
        )
        return float(line.split()[-1])


def test_what_is_usual_is_told_nobody(caplog: pytest.LogCaptureFixture) -> None:
    bench = Bench(caplog)
    for wait in (None, replace(MEMBERS, for_s=0.0), replace(MEMBERS, for_s=500.0, usual_s=1e4)):
        bench.go_on(50.0, wait)
    assert bench.said == [] and bench.history.everything()["events"] == []
    assert {bench.metric(kind) for kind in KINDS} == {0.0}


def test_one_that_lasts_is_told_once_with_its_end_and_again_each_hour(
    caplog: pytest.LogCaptureFixture,
) -> None:
    bench = Bench(caplog)
    bench.go_on(AGAIN_S, MEMBERS)
    assert bench.said == [
        "waiting=members for_s=61 what='1 contributions, the run asks for 2'; ends when one more contributes"
    ]
    (event,) = bench.history.everything()["events"]
    assert event["text"] == f"waiting: {MEMBERS.text}" and event["level"] == "warning"
    assert bench.metric("members") > 3600 and bench.metric("quorum") == 0
    bench.go_on(AGAIN_S, replace(MEMBERS, for_s=61 + AGAIN_S))
    assert len(bench.said) == 2 and "for_s=3661" in bench.said[1]


def test_one_that_is_over_is_told_so_and_a_new_one_anew_after_an_hour(
    caplog: pytest.LogCaptureFixture,
) -> None:
    bench = Bench(caplog)
    bench.go_on(100.0, MEMBERS)
    bench.go_on(2 * OVER_S, None)
    assert bench.said[1:] == ["waited=members for_s=156 it is over"] and bench.metric("members") == 0
    assert bench.history.everything()["events"][-1]["text"] == "the wait is over, after 2.6 min"
    bench.go_on(AGAIN_S, None)
    bench.go_on(10.0, MEMBERS)
    assert len(bench.said) == 3 and bench.said[2].startswith("waiting=members for_s=61 ")


def test_a_quorum_on_the_edge_is_told_again_only_where_it_lasts_longer(
    caplog: pytest.LogCaptureFixture,
) -> None:
    bench, lost = Bench(caplog), Wait("quorum", "1 of 3 alive, need 2", "ends when 1 more are back", 60.0)
    for _ in range(12):  # three minutes without one, two with
        bench.go_on(120.0, lost)
        bench.go_on(120.0, None)
    assert [line.split()[0] for line in bench.said] == ["waiting=quorum", "waited=quorum"]
    assert len(bench.history.everything()["events"]) == 2
    assert bench.metric("quorum") == 0
    bench.go_on(120.0, lost)
    assert len(bench.said) == 2 and bench.metric("quorum") > 170, "the metric follows each of them"
    bench.go_on(20.0, replace(lost, for_s=180.0))
    assert len(bench.said) == 3 and bench.said[2].startswith("waiting=quorum for_s=180 ")
    bench.go_on(120.0, None)
    assert bench.said[3] == "waited=quorum for_s=195 it is over"


def test_a_look_that_fails_is_told_once_and_is_not_the_last(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    looks, fifth = [0], asyncio.Event()
    bench = Bench(caplog)

    def look() -> Wait:
        looks[0] += 1
        if looks[0] <= 3:
            raise KeyError("a bug of ours")
        if looks[0] == 5:
            fifth.set()
        return MEMBERS

    bench.teller._look = look
    monkeypatch.setattr(waits, "LOOK_S", 0.0)

    async def five_looks() -> None:
        running = asyncio.create_task(bench.teller.run())
        async with asyncio.timeout(5.0):
            await fifth.wait()
        running.cancel()

    asyncio.run(five_looks())
    assert [line.split(";")[0].split(" ")[0] for line in bench.said] == ["waits=not_told", "waiting=members"]
    assert "KeyError" in bench.caplog.text


def test_a_round_that_begins_again_and_again_is_told_once(caplog: pytest.LogCaptureFixture) -> None:
    bench, lasting = Bench(caplog), Wait("round", "waiting for a leader", "the next one leads", 700.0)
    for _ in range(50):
        bench.go_on(20.0, lasting)
        bench.go_on(20.0, replace(lasting, for_s=0.0))  # it exchanges, and fails
        bench.go_on(10.0, None)  # it trains
    assert len(bench.said) == 1


def test_words_of_others_make_no_line_and_no_field(caplog: pytest.LogCaptureFixture) -> None:
    bench = Bench(caplog)
    bench.go_on(5.0, replace(MEMBERS, what="by x\nwaiting=quorum"))
    (said,) = bench.said
    assert "\n" not in said and r"'by x\nwaiting=quorum'" in said
    assert "\n" not in bench.history.everything()["events"][0]["text"]


# ---- what a view says --------------------------------------------------------------------------------


def shows(view: NodeView, phase: str, wait: Wait | None) -> None:
    """Attach a core."""
    reason = phase if wait is None else wait.text
    core = SimpleNamespace(phase=phase, reason=reason, wait=wait)
    view._look = lambda: SimpleNamespace(core=core)  # type: ignore[assignment, return-value]


@pytest.mark.parametrize(
    ("phase", "wait", "ready", "says"),
    [
        ("training", None, True, ""),
        ("averaging", replace(MEMBERS, for_s=5.0), True, ""),
        ("averaging", MEMBERS, True, MEMBERS.text),
        ("degraded", Wait("quorum", "1 of 3", "2 more", 3.0), False, "degraded: 1 of 3, for 3 s; 2 more"),
        (
            "joining",
            Wait("state", "state 1 of 9", "by itself"),
            False,
            "joining: state 1 of 9, for 0 s; by itself",
        ),
    ],
)
def test_who_did_its_part_is_ready_and_says_what_it_waits_for_all_the_same(
    phase: str, wait: Wait | None, ready: bool, says: str
) -> None:
    view = NodeView("0.1.0")
    shows(view, phase, wait)
    assert view.ready() == (ready, says) and view.wait() == wait
    view.stopping = True
    assert view.ready() == (False, "stopping") and view.wait() is None


def texts(value: Any) -> list[str]:
    """All in it that is text."""
    if isinstance(value, dict):
        return [text for item in value.values() for text in texts(item)]
    if isinstance(value, list | tuple):
        return [text for item in value for text in texts(item)]
    return [value] if isinstance(value, str) else []


@pytest.mark.parametrize("runs", [False, True])
def test_since_when_does_not_move_where_somebody_sets_the_clock(
    runs: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    up, wall = [1000.0], [5000.0]
    monkeypatch.setattr(status, "_up_s", lambda: up[0])
    monkeypatch.setattr(time, "time", lambda: wall[0])
    view = NodeView("0.1.0")
    view.wait_for(Wait("quorum", "1 of 3", "ends when they are back"))

    def since(for_s: float) -> int:
        up[0], wall[0] = up[0] + 30.0, wall[0] + 30.0
        wait = Wait("quorum", "1 of 3", "ends when they are back", for_s)
        if runs:
            shows(view, "degraded", wait)
            assert view.wait() == wait  # as the daemon asks each few seconds
            return view._waiting(wait)["since"]  # type: ignore[index]
        return int(view.status()["waiting"]["since"])

    assert since(30.0) == since(60.0) == 5000
    wall[0] += 7200.0  # NTP
    assert since(90.0) == 5000
    if runs:
        assert since(30.0) == 12290, "another wait, which began after the step"


HOSTILE = "removed by x: \x1b[2J\nready\u202e"


def test_words_of_others_move_no_terminal_whatever_shows_them() -> None:
    view = NodeView("0.1.0")
    view.wait_for(Wait("admission", HOSTILE, HOSTILE))
    assert all(text.isprintable() for text in texts([view.status(), view.ready()]))
    for phase in ("training", "degraded"):
        shows(view, phase, Wait("admission", HOSTILE, HOSTILE, 99.0))
        assert "removed by x" in view.ready()[1] and view.ready()[1].isprintable()


def test_readyz_is_one_line() -> None:
    view = NodeView("0.1.0")
    view.wait_for(Wait("admission", HOSTILE, "ends when it lets us in"))

    async def main() -> tuple[int, str]:
        server = await start_http(view, Metrics("0.1.0"), "127.0.0.1", 0)
        try:
            async with aiohttp.ClientSession() as session, session.get(server.url + "/readyz") as answer:
                return answer.status, await answer.text()
        finally:
            await server.close()

    assert asyncio.run(main()) == (503, "removed by x: ?[2J ready?, for 0 s; ends when it lets us in\n")


def test_an_applicant_says_since_when_though_what_it_hears_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [1000.0]
    monkeypatch.setattr(status, "_up_s", lambda: clock[0])
    monkeypatch.setattr(time, "time", lambda: 5000.0 + clock[0])
    view = NodeView("0.1.0")
    said: list[dict[str, Any]] = []
    for by in ("lab-hanoi", "lab-oslo"):
        view.wait_for(Wait("admission", f"waiting to be admitted by {by}", "ends when it admits us"))
        clock[0] += 30.0
        said.append(view.status())
    assert [one["waiting"]["for_s"] for one in said] == [30.0, 60.0]
    assert {one["waiting"]["since"] for one in said} == {6000}
    assert said[1]["phase"] == "joining" and said[1]["waiting"]["lasting"]
    reason = "waiting to be admitted by lab-oslo, for 1.0 min; ends when it admits us"
    assert said[1]["reason"] == reason and view.ready() == (False, reason)
    assert faults(load("status"), said[1]) == []
    view.wait_for(Wait("trainer", "starting trainer", "ends by itself"))
    assert view.status()["phase"] == "starting" and view.status()["waiting"]["for_s"] == 0
    view.wait_for(None)
    assert view.status()["waiting"] is None and view.ready() == (False, "starting")
