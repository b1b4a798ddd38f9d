"""The page without a browser: its files, its policy, its stream. test_browser.py looks at it."""

from __future__ import annotations

import asyncio
import configparser
import contextlib
import fnmatch
import importlib.util
import json
import re
import shutil
import subprocess
from collections.abc import AsyncIterator
from pathlib import Path
from types import ModuleType
from typing import Any

import aiohttp
import pytest

from tapestry.node.surface import sse
from tapestry.node.surface.assets import assets
from tapestry.node.surface.door import DoorLimits
from tapestry.node.surface.history import History
from tapestry.node.surface.http import HttpServer, start_http
from tapestry.node.surface.metrics import Metrics

ROOT = Path(__file__).resolve().parent.parent.parent
PAGE = ROOT / "node" / "surface" / "page"


class FakeView:
    def __init__(self) -> None:
        self.epoch = 3

    def status(self) -> dict[str, Any]:
        return {"epoch": self.epoch, "loss": float("nan")}

    def peers(self) -> list[dict[str, Any]]:
        return [{"peer_id": "a"}]

    def ready(self) -> tuple[bool, str]:
        return True, ""


# ---- its files -----------------------------------------------------------------------------------------


def _own() -> dict[str, str]:
    """The texts of our own files, without those of others."""
    return {name: body.decode() for name, (_, body) in assets().items() if not name.startswith("vendor/")}


def test_every_file_that_the_page_names_is_there_and_every_file_is_named() -> None:
    named = {"index.html"}
    for text in _own().values():
        named |= set(re.findall(r'"/page/([^"]+)"', text))
        named |= set(re.findall(r'from "\./([^"]+)"', text))
    assert named == set(assets())


def test_the_page_needs_nothing_from_elsewhere() -> None:
    for name, text in _own().items():
        for address in re.findall(
            r"""(?:https?:)?//[a-z0-9][^\s"'<>]*""", re.sub(r"(?m)^\s*//.*$", "", text)
        ):
            assert address == "http://www.w3.org/2000/svg", f"{name}: {address}"  # a name, not an address


def test_nothing_in_the_page_is_inline_nor_made_of_markup() -> None:
    """The policy would refuse it; and what a peer says must never become markup."""
    html = _own()["index.html"]
    assert not re.search(r"<style|\sstyle=|\son[a-z]+=|<script(?![^>]*\ssrc=)|javascript:", html)
    for name, text in _own().items():
        assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(", text), name


@pytest.mark.skipif(shutil.which("node") is None, reason="no node runs the page's code without a browser")
def test_times_are_as_people_say_them() -> None:
    """A part that is rounded up is carried over: no minute has 60 seconds."""
    told = {0.42: "0.42 s", 59.4: "59 s", 59.6: "1 min 0 s", 119.7: "2 min 0 s", 3599.7: "1 h 0 min"}
    told |= {
        185: "3 min 5 s",
        7199: "2 h 0 min",
        86399: "1 day 0 h",
        172700: "2 days 0 h",
        90000: "1 day 1 h",
    }
    code = (
        f'import {{ seconds }} from "{(PAGE / "format.js").as_uri()}";'
        f"console.log(JSON.stringify({list(told)}.map(seconds)));"
    )
    command = ["node", "--input-type=module", "--eval", code]
    said = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    assert json.loads(said.stdout) == list(told.values())


def test_the_files_are_package_data() -> None:
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    globs = [glob.strip() for glob in config["options.package_data"]["tapestry.node.surface"].split(",")]
    for path in PAGE.rglob("*"):
        if path.is_file():
            name = str(path.relative_to(PAGE.parent))
            depth = name.count("/")
            assert any(fnmatch.fnmatch(name, g) and g.count("/") == depth for g in globs), name


@pytest.fixture(scope="module")
def vendor() -> ModuleType:
    spec = importlib.util.spec_from_file_location("vendor_page", ROOT / "scripts" / "vendor_page.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_what_is_vendored_is_what_was_fetched_with_its_licence(vendor: ModuleType) -> None:
    assert vendor.faults_of(PAGE / "vendor") == []
    assert "MIT" in (PAGE / "vendor" / "uplot.LICENSE").read_text()


def test_a_vendored_file_that_was_changed_is_found(vendor: ModuleType, tmp_path: Path) -> None:
    folder = tmp_path / "vendor"
    shutil.copytree(PAGE / "vendor", folder)
    (folder / "uplot.js").write_text("changed")
    (folder / "uplot.css").unlink()
    (folder / "more.js").touch()
    assert vendor.faults_of(folder) == [
        "uplot.css is missing",
        "more.js is not in vendor.json",
        "uplot.js is not the file that was fetched",
    ]


# ---- over the wire -------------------------------------------------------------------------------------


@contextlib.asynccontextmanager
async def _served(
    history: History, view: FakeView | None = None
) -> AsyncIterator[tuple[HttpServer, aiohttp.ClientSession]]:
    server = await start_http(view or FakeView(), Metrics("0.1.0"), "127.0.0.1", 0, history=history)
    async with aiohttp.ClientSession(server.url) as session:
        try:
            yield server, session
        finally:
            await server.close()


async def _events(response: aiohttp.ClientResponse) -> AsyncIterator[tuple[str, Any]]:
    """Kind and data of each event."""
    while chunk := await asyncio.wait_for(response.content.readuntil(b"\n\n"), 5):
        if chunk.startswith(b"event: "):
            head, _, data = chunk.decode().partition("\ndata: ")
            yield head.removeprefix("event: "), json.loads(data)


async def _kinds(response: aiohttp.ClientResponse, until: str) -> list[tuple[str, Any]]:
    """The events up to the first of kind `until`, but for `now`s before it."""
    found = []
    async for kind, data in _events(response):
        if kind == until:
            return [*found, (kind, data)]
        if kind != "now":
            found.append((kind, data))
    raise AssertionError(f"the stream ended without {until}")


def test_the_page_and_its_files_are_served_with_their_types_and_a_strict_policy() -> None:
    async def run() -> None:
        async with _served(History()) as (_, session):
            for path, kind in (
                ("/", "text/html"),
                ("/page/app.js", "text/javascript"),
                ("/page/page.css", "text/css"),
                ("/page/icon.svg", "image/svg+xml"),
                ("/page/vendor/uplot.js", "text/javascript"),
            ):
                async with session.get(path) as answer:
                    assert answer.status == 200 and answer.content_type == kind
                    policy = answer.headers["Content-Security-Policy"]
                    assert "default-src 'none'" in policy and "frame-ancestors 'none'" in policy
                    assert "unsafe" not in policy and "*" not in policy

    asyncio.run(run())


@pytest.mark.parametrize(
    "path",
    ["/page/none.js", "/page/../http.py", "/page/%2e%2e/http.py", "/page/vendor/vendor.json", "/page/"],
)
def test_other_files_are_not_served(path: str) -> None:
    async def run() -> None:
        async with _served(History()) as (server, session):
            url = aiohttp.client.URL(server.url + path, encoded=True)
            assert (await session.get(url)).status == 404

    asyncio.run(run())


def test_a_stream_begins_with_everything_and_goes_on_with_what_is_new(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(sse, "TICK_S", 0.1)

    async def run() -> None:
        history, view = History(), FakeView()
        history.point(1, contributions=2)
        async with _served(history, view) as (_, session):
            async with session.get("/history") as answer:
                everything = await answer.json()
            async with session.get("/events") as response:
                assert response.content_type == "text/event-stream"
                assert response.headers["Cache-Control"] == "no-store"
                first, now = await _kinds(response, "now")
                assert first == ("history", everything) and len(everything["points"]) == 1
                assert now[1]["status"] == {"epoch": 3, "loss": None}
                assert now[1]["peers"] == [{"peer_id": "a"}] and now[1]["ready"] is True
                history.point(2, contributions=3)
                history.tell("something")
                news = await _kinds(response, "event")
                assert [kind for kind, _ in news] == ["point", "event"]
                assert news[0][1]["epoch"] == 2 and news[1][1]["text"] == "something"
                await _kinds(response, "now")  # of the same moment
                view.epoch = 4
                assert (await _kinds(response, "now"))[-1][1]["status"]["epoch"] == 4

    asyncio.run(run())


def test_a_stream_outlives_the_time_of_an_answer_and_ends_with_its_reader(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(sse, "TICK_S", 0.05)

    async def run() -> None:
        server = await start_http(
            FakeView(), Metrics("0.1.0"), "127.0.0.1", 0, limits=DoorLimits(answer_s=0.2, idle_s=0.2)
        )
        async with aiohttp.ClientSession(server.url) as session, session.get("/events") as response:
            for _ in range(10):
                await _kinds(response, "now")
        await server.close()

    asyncio.run(run())


def test_a_stream_that_missed_something_gets_everything_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sse, "TICK_S", 0.05)

    async def run() -> None:
        history = History()
        async with _served(history) as (_, session), session.get("/events") as response:
            await _kinds(response, "now")
            for number in range(1000):
                history.tell(f"event {number}")
            news = await _kinds(response, "history")
            assert len(news) == 1 and news[0][1]["events"][-1]["text"] == "event 999"

    asyncio.run(run())


def test_streams_are_bounded_and_one_that_ends_makes_room(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sse, "STREAMS_MAX", 2)
    monkeypatch.setattr(sse, "TICK_S", 0.05)

    async def run() -> None:
        async with _served(History()) as (_, session):
            one, two = await session.get("/events"), await session.get("/events")
            async with session.get("/events") as third:
                assert third.status == 503
                assert await third.text() == "2 pages are open already: close one, or read /status\n"
            one.close()
            for _ in range(100):
                async with session.get("/events") as again:
                    if again.status == 200:
                        break
                await asyncio.sleep(0.02)
            else:
                raise AssertionError("a stream that was closed still counts")
            two.close()

    asyncio.run(run())


def test_a_node_that_stops_ends_its_streams_at_once() -> None:
    async def run() -> None:
        async with _served(History()) as (server, session), session.get("/events") as response:
            await _kinds(response, "now")
            began = asyncio.get_running_loop().time()
            await server.close()
            assert asyncio.get_running_loop().time() - began < 0.5
            with contextlib.suppress(asyncio.IncompleteReadError, aiohttp.ClientError):
                while await response.content.read(65536):
                    pass
            assert response.content.at_eof()

    asyncio.run(run())
