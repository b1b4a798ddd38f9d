"""The page in a real Chromium: renders, follows a swarm, shows who is gone, and keeps what it showed.

    scripts/test -m browser

Needs a Chromium and the extra `dev`; without them it fails, and says what to install. Screenshots at
three widths are in the folder that pytest's --basetemp names.
"""

from __future__ import annotations

import asyncio
import math
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest
from e2e.harness import Node, init

from tapestry.node.surface import sse
from tapestry.node.surface.admit import Admit
from tapestry.node.surface.history import History, RecordSeen
from tapestry.node.surface.http import HttpServer, start_http
from tapestry.node.surface.metrics import Metrics
from tapestry.node.surface.token import Token

pytestmark = pytest.mark.browser

CHROMIUMS = ("chromium", "chromium-browser", "google-chrome")
WIDTHS = {"phone": (390, 844), "laptop": (1100, 900), "wide": (1800, 1100)}
INSTALL = "apt install chromium (or playwright install chromium); pip install 'tapestry-node[dev]'"
PEERS = [f"12D3KooW{letter * 44}" for letter in "ABCDE"]  # the fifth was in no record of late
NAMES = ["", "lab-hanoi", "", "lab-lima", "<b>lab-oslo</b>"]
INKED = """(chart) => {
  const canvas = document.querySelector(chart);
  const { data } = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height);
  return data.filter((value, i) => i % 4 === 3 && value > 0).length;
}"""
MARKUP = "<img src=x onerror=alert(1)>"


class Pages:
    """Opens pages, and keeps what their consoles and networks complain about."""

    def __init__(self, browser: Any) -> None:
        self._browser = browser
        self.complaints: list[str] = []

    def open(self, url: str, width: str = "laptop", scheme: str = "light") -> Any:
        size = {"width": WIDTHS[width][0], "height": WIDTHS[width][1]}
        page = self._browser.new_context(viewport=size, color_scheme=scheme).new_page()
        page.on("console", lambda message: self.complaints.append(f"{message.type}: {message.text}"))
        page.on("pageerror", lambda error: self.complaints.append(str(error)))
        page.on("requestfailed", lambda request: self._failed(request))
        page.goto(url, wait_until="commit")
        page.wait_for_selector("#stream.live", state="attached")
        page.wait_for_selector("#tile-epoch")
        return page

    def _failed(self, request: Any) -> None:
        if not request.url.endswith("/events"):  # a stream has no end but this
            self.complaints.append(f"{request.url}: {request.failure}")


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    try:
        from playwright.sync_api import Error, sync_playwright
    except ImportError:
        pytest.fail(f"playwright is not installed: {INSTALL}")
    path = next(filter(None, map(shutil.which, CHROMIUMS)), None)
    flags = ["--no-sandbox"] if os.geteuid() == 0 else []
    with sync_playwright() as playwright:
        try:
            browser = playwright.chromium.launch(executable_path=path, args=flags)
        except Error as error:
            pytest.fail(f"no Chromium: {INSTALL}\n{error}")
        yield browser
        browser.close()


@pytest.fixture
def pages(chromium: Any) -> Iterator[Pages]:
    opened = Pages(chromium)
    yield opened
    for context in chromium.contexts:
        context.close()


# ---- a page of a node that is given --------------------------------------------------------------------


class GivenView:
    """The fourth and the fifth member are gone."""

    def __init__(self) -> None:
        self.phase, self.reason = "training", ""
        self.run_name = "commons"
        self.loss_trouble = ""
        self.applicants: list[dict[str, Any]] = []

    def status(self) -> dict[str, Any]:
        return {
            "peer_id": PEERS[0],
            "run_id": "ab" * 32,
            "run_name": self.run_name,
            "version": "0.1.0",
            "phase": self.phase,
            "reason": self.reason,
            "epoch": 60,
            "head": "cd" * 32,
            "state_digest": "ef" * 32,
            "params": 9_900_000,
            "loss": 2.3,
            "loss_trouble": self.loss_trouble,
            "val_loss": 2.5,
            "val_losses": {"fr": 2.4, "ar": math.nan},
            "data_passes": 1.4,
            "tokens_total": 1,
            "tokens_per_second": 4312.3,
            "peers": 2,
            "round": None,
            "dropped_records": 0,
            "dropped_weight": 0,
            "members": len(PEERS),
            "roll": [
                {"peer_id": peer, "name": name, "since": 0, "phase": "", "last_epoch": epoch}
                for peer, name, epoch in zip(PEERS, NAMES, (60, 60, 60, 59, 12), strict=True)
            ],
            "branches": [],
            "applicants": self.applicants,
            "caps": {},
            "bytes": {
                "sent": 120_000_000,
                "received": 118_000_000,
                "sent_float32": 472_000_000,
                "received_float32": 465_000_000,
            },
            "addresses": [f"/ip4/10.0.0.7/tcp/4001/p2p/{PEERS[0]}"],
            "uptime_s": 8000.0,
        }

    def peers(self) -> list[dict[str, Any]]:
        via = "/ip4/10.0.0.9/tcp/1/p2p/x/p2p-circuit"
        return [
            {
                "peer_id": peer,
                "name": NAMES[PEERS.index(peer)],
                "phase": phase,
                "epoch": epoch,
                "head": "",
                "same_head": True,
                "heard_s": 0.4,
                "version": "0.2.0",
                "same_version": peer != PEERS[1],
                "addresses": [address],
            }
            for peer, phase, epoch, address in (
                (PEERS[1], "training", 60, "/ip4/10.0.0.8/tcp/4001"),
                (PEERS[2], MARKUP, 58, via),
            )
        ]

    def ready(self) -> tuple[bool, str]:
        return self.phase == "training", self.reason


def _given_history(epochs: int = 60) -> History:
    history = History()
    history.point(0, validation={"fr": 5.5, "ar": 5.6})
    for epoch in range(1, epochs + 1):
        loss = 2 + 3.4 * math.exp(-epoch / 20)
        history.point(
            epoch, contributions=4, tokens=40_000 * epoch, loss=loss, tokens_per_second=4300, passes=0.1
        )
        history.point(epoch, sent=2_000_000, received=2_100_000, sent_float32=7_900_000)
        history.point(
            epoch,
            round_s=0.4,
            phases={"training": 9, "ready": 0.2, "exchanging": 0.3, "gate": 0.4, "accepted": 0.1},
        )
        history.point(epoch, validation={"fr": loss + 0.1, "ar": loss + 0.2})
        members = tuple((peer, 10_000) for peer in (PEERS[:4] if epoch < epochs else PEERS[:3]))
        history.record(RecordSeen(epoch, f"{epoch:064x}", time.time(), 0, False, len(members), members))
    history.tell(f"something of {MARKUP} was refused", "warning")
    return history


class Served:
    """An endpoint in a thread of its own, and the history behind it."""

    def __init__(self, view: GivenView, history: History) -> None:
        self.history, self.view = history, view
        self.admitted: list[tuple[str, str]] = []
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever)
        self._thread.start()
        server: Future[HttpServer] = asyncio.run_coroutine_threadsafe(
            start_http(view, Metrics("0.1.0"), "127.0.0.1", 0, history=history, admit=self._door()),
            self._loop,
        )
        self.server = server.result(10)

    def _door(self) -> Admit:
        def admit(peer: str, name: str) -> str:
            self.admitted.append((peer, name))
            return ""

        return Admit(Token("the token", Path("http.token")), admit)

    def call(self, function: Callable[..., Any], *args: Any, **known: Any) -> None:
        """On the endpoint's loop."""
        self._loop.call_soon_threadsafe(lambda: function(*args, **known))

    def close(self) -> None:
        asyncio.run_coroutine_threadsafe(self.server.close(), self._loop).result(10)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)
        self._loop.close()


@pytest.fixture
def served() -> Iterator[Served]:
    made = Served(GivenView(), _given_history())
    yield made
    made.close()


def _wait(what: str, condition: Callable[[], object], deadline_s: float = 60.0) -> None:
    """Not by a script in the page: its policy refuses what is made of strings."""
    end = time.monotonic() + deadline_s
    while not condition():
        assert time.monotonic() < end, f"no {what} within {deadline_s:g} s"
        time.sleep(0.1)


def _text(page: Any, selector: str) -> str:
    text: str = page.inner_text(selector)
    return text


@pytest.mark.parametrize("width", WIDTHS)
def test_it_fits_every_width_and_draws_its_curves(
    pages: Pages, served: Served, width: str, tmp_path: Path
) -> None:
    page = pages.open(served.server.url, width, scheme="dark" if width == "laptop" else "light")
    for chart in ("loss", "speed", "phases", "bytes"):
        page.wait_for_selector(f"#chart-{chart} canvas")
        assert page.evaluate(INKED, f"#chart-{chart} canvas") > 500, f"{chart} is empty"
    page.screenshot(path=str(tmp_path / f"{width}.png"), full_page=True)
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth"), "it can be moved sideways"
    assert pages.complaints == []


def test_what_it_says_is_what_is(pages: Pages, served: Served) -> None:
    page = pages.open(served.server.url)
    assert _text(page, "#phase") == "training" and _text(page, "#run") == "commons"
    assert _text(page, "#tile-epoch .value") == "60"
    assert _text(page, "#tile-sent .more") == "352 MB less than float32"
    assert "validation fr" in _text(page, "#chart-loss") and "float32" in _text(page, "#chart-bytes")
    assert page.is_hidden("#chart-agreement")
    rows = {
        row.get_attribute("data-peer"): row.inner_text() for row in page.query_selector_all("#members tr")
    }
    assert list(rows) == PEERS
    assert "this node" in rows[PEERS[0]] and "33 %" in rows[PEERS[0]]
    assert (
        "10.0.0.8:4001" in rows[PEERS[1]] and "direct" in rows[PEERS[1]] and "at the head" in rows[PEERS[1]]
    )
    assert "relayed" in rows[PEERS[2]] and "2 epochs" in rows[PEERS[2]]
    assert ["version 0.2.0" in rows[peer] for peer in PEERS[:3]] == [False, True, False]
    assert all(word in rows[PEERS[3]] for word in ("not heard", "epoch 59", "lab-lima"))
    assert all(word in rows[PEERS[4]] for word in ("not heard", "epoch 12", NAMES[4]))
    assert _text(page, "#members-note") == "3 of 5 are here" and _text(page, "#tile-members .value") == "5"
    assert "lab-lima" in _text(page, "#records") and "measuring the result" in _text(page, "#chart-phases")
    assert pages.complaints == []


def test_a_trouble_of_a_node_that_trains_is_told(pages: Pages, served: Served) -> None:
    page = pages.open(served.server.url)
    assert page.is_hidden("#reason")
    served.view.loss_trouble = f"its validation loss rises: {MARKUP}"
    page.wait_for_selector("#reason:has-text('validation loss rises')", timeout=5000)
    assert MARKUP in _text(page, "#reason") and pages.complaints == []


def test_what_a_node_that_does_its_part_has_waited_for_too_long_is_told(pages: Pages, served: Served) -> None:
    page = pages.open(served.server.url)
    assert page.is_hidden("#reason")
    served.view.reason = f"1 contributions, the run asks for 2, for 5.0 min; invite one {MARKUP}"
    page.wait_for_selector("#reason:has-text('the run asks for 2')", timeout=5000)
    assert MARKUP in _text(page, "#reason") and _text(page, "#phase") == "training"
    assert pages.complaints == []


def test_an_applicant_is_shown_and_the_token_lets_it_in(pages: Pages, served: Served) -> None:
    page = pages.open(served.server.url)
    assert page.is_hidden("#applicants-section")
    served.view.applicants = [{"peer": PEERS[3], "name": MARKUP, "since": time.time()}]
    page.wait_for_selector("#applicants button", timeout=5000)
    page.click("#applicants button")
    assert "type the token first" in _text(page, "#applicants") and served.admitted == []
    page.fill("#admit-token", "the token")
    page.click("#applicants button")
    page.wait_for_selector("#applicants .said:has-text('next record')", timeout=5000)
    assert served.admitted == [(PEERS[3], MARKUP)]
    assert pages.complaints == []


def test_a_stranger_that_is_turned_away_is_no_member_and_stops_nothing(pages: Pages, served: Served) -> None:
    """Its row has no addresses: members and records stood still meanwhile, under a header that said live."""
    banned = {"peer_id": "12D3KooW" + "Z" * 44, "phase": "banned", "why": "torn frames", "left_s": 9.5}
    peers = served.view.peers()
    page = pages.open(served.server.url)
    served.view.peers = lambda: [peers[0], banned]  # type: ignore[method-assign]
    page.wait_for_selector(f"#members tr.gone[data-peer='{PEERS[2]}']", timeout=5000)
    assert page.query_selector(f"#members tr[data-peer='{banned['peer_id']}']") is None
    assert pages.complaints == []


def test_what_comes_is_shown_at_once_and_agreement_when_there_is_some(pages: Pages, served: Served) -> None:
    page = pages.open(served.server.url)
    served.call(served.history.tell, "lab-hanoi is not heard any more", "warning")
    served.call(served.history.point, 61, contributions=3, loss=1.5, agreement={"cosine": 0.7})
    page.wait_for_selector("#events li.warning:has-text('lab-hanoi')", timeout=5000)
    page.wait_for_selector("#chart-agreement canvas", timeout=5000)
    assert "1.500" in _text(page, "#chart-loss .legend") and "0.700" in _text(
        page, "#chart-agreement .legend"
    )
    page.click("[data-axis=tokens]")
    page.wait_for_selector("#chart-loss .plot[aria-label*='over tokens']", timeout=5000)
    assert pages.complaints == []


def test_a_page_that_stays_open_asks_for_thinned_points(
    pages: Pages, served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sse, "TICK_S", 0.05)  # what has piled up more than 200 high is sent as a new history
    page = pages.open(served.server.url)
    streams: list[str] = []
    page.on("request", lambda request: streams.append(request.url))
    epoch = 60

    def has_begun_anew() -> list[str]:
        nonlocal epoch
        for _ in range(50):
            epoch += 1
            served.call(served.history.point, epoch, loss=2.0)
        page.wait_for_timeout(20)
        assert epoch < 4000
        return streams

    _wait("new stream", has_begun_anew)
    assert epoch > 2000 and streams == [f"{served.server.url}/events"]
    page.wait_for_selector("#stream.live", state="attached")
    assert pages.complaints == []


def test_what_a_peer_says_is_text_and_never_markup(pages: Pages, served: Served) -> None:
    page = pages.open(served.server.url)
    assert MARKUP in _text(page, "#members") and MARKUP in _text(page, "#events")
    assert page.query_selector("#members img, #members b, #records b, #events img") is None
    assert pages.complaints == []


def test_a_reload_shows_the_same_and_a_node_that_is_gone_is_told(pages: Pages, served: Served) -> None:
    page = pages.open(served.server.url)
    before = page.get_attribute("#chart-loss .plot", "aria-label")
    page.reload()
    page.wait_for_selector("#chart-loss canvas")
    assert page.get_attribute("#chart-loss .plot", "aria-label") == before and "60" in before
    assert pages.complaints == []
    asyncio.run_coroutine_threadsafe(served.server.close(), served._loop).result(10)
    page.wait_for_selector("#stream.lost", timeout=10_000)
    assert "does not answer since" in _text(page, "#stream")


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", ["phone", "laptop"])
def test_axe_finds_nothing(pages: Pages, served: Served, width: str, scheme: str) -> None:
    import axe_playwright_python

    axe = Path(axe_playwright_python.__file__).with_name("axe.min.js").read_text(encoding="utf-8")
    page = pages.open(served.server.url, width, scheme)
    page.wait_for_selector("#chart-loss canvas")
    page.evaluate(axe)
    found = page.evaluate("axe.run()")
    faults = [
        (violation["id"], [node["html"] for node in violation["nodes"]]) for violation in found["violations"]
    ]
    assert faults == [] and len(found["passes"]) > 30
    assert pages.complaints == []


def _epoch(page: Any) -> int:
    return int(_text(page, "#tile-epoch .value").replace(",", ""))


# ---- a page of a node that trains ----------------------------------------------------------------------


def test_it_follows_a_swarm_and_shows_within_10_s_that_a_node_was_killed(
    pages: Pages, tmp_path: Path
) -> None:
    sets = ("--validation", "code=stdlib:3/3")
    founder = Node(init(tmp_path / "a", inner_steps="30", shard_elements="4096"), *sets)
    with founder:
        founder.wait_ready()
        second = Node(tmp_path / "b", "--peer", founder.invitation(), data="stdlib:2/3")
        third = Node(tmp_path / "c", "--peer", founder.invitation(), data="stdlib:3/3")
        with second, third:
            second.wait_ready()
            third.wait_ready()
            page = pages.open(founder.json()["http"])
            voices = "#members tr:not(.gone) .meter"
            _wait("voice of all three", lambda: len(page.query_selector_all(voices)) == 3)
            epoch = _epoch(page)
            _wait("two more epochs", lambda: _epoch(page) > epoch + 1)
            page.wait_for_selector("#chart-loss .legend:has-text('validation code')", timeout=30_000)

            killed = third.json()["peer_id"]
            third.kill()
            began = time.monotonic()
            page.wait_for_selector(f"#members tr.gone[data-peer='{killed}']", timeout=10_000)
            name = third.home.name  # by which it was admitted
            page.wait_for_selector(f"#events li:has-text('{name} is not heard any more')", timeout=10_000)
            assert time.monotonic() - began < 10
            page.wait_for_selector(f"#events li:has-text('went on without {name}')", timeout=30_000)
            assert pages.complaints == []
            for name, (width, height) in WIDTHS.items():
                page.set_viewport_size({"width": width, "height": height})
                page.wait_for_timeout(300)
                page.screenshot(path=str(tmp_path / f"{name}.png"), full_page=True)

            last = founder.status()["epoch"]
            assert founder.stop() == 0
            founder.start().wait_ready()
            page = pages.open(founder.json()["http"])
            page.wait_for_selector("#chart-loss canvas")
            label = page.get_attribute("#chart-loss .plot", "aria-label")
            assert "over epochs 0 to" in label and int(label.rpartition(" ")[2]) >= last
            page.wait_for_selector("#events li:has-text('this node stops')")
            assert [second.stop(), founder.stop()] == [0, 0]
