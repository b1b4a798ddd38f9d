"""POST /admit, over a real socket: nobody is let in without the home's token."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from tapestry.node.protocol.strict import Malformed
from tapestry.node.surface.admit import Admit
from tapestry.node.surface.http import start_http
from tapestry.node.surface.metrics import Metrics
from tapestry.node.surface.status import NodeView
from tapestry.node.surface.token import Token

PEER = "12D3KooWFAQWzWY2n8KUGGaXykyzafrNgSCsfTmabDmNUZkDoTn5"
RIGHT = {"Authorization": "Bearer the token"}


def asked(body: Any, headers: dict[str, str], fault: str = "") -> tuple[int, str, list[tuple[str, str]]]:
    """The answer's status and text, and who was asked for."""
    admitted: list[tuple[str, str]] = []

    def admit(peer: str, name: str) -> str:
        if not peer.startswith("12D3"):
            raise Malformed(f"{peer} is no peer id")
        admitted.append((peer, name))
        return fault

    async def main() -> tuple[int, str]:
        door = Admit(Token("the token", Path("http.token")), admit)
        server = await start_http(NodeView("0"), Metrics("0"), "127.0.0.1", 0, admit=door)
        try:
            data = body if isinstance(body, str) else json.dumps(body)
            async with (
                aiohttp.ClientSession() as session,
                session.post(server.url + "/admit", data=data, headers=headers) as answer,
            ):
                return answer.status, await answer.text()
        finally:
            await server.close()

    return *asyncio.run(main()), admitted


def test_the_token_admits() -> None:
    assert asked({"peer": PEER, "name": "Bea"}, RIGHT) == (200, "asked for\n", [(PEER, "Bea")])


@pytest.mark.parametrize("headers", [{}, {"Authorization": "Bearer another"}, {"Cookie": "the token"}])
def test_without_it_nobody_is_admitted(headers: dict[str, str]) -> None:
    status, text, admitted = asked({"peer": PEER, "name": ""}, headers)
    assert (status, admitted) == (403, []) and "http.token" in text


@pytest.mark.parametrize(
    "body",
    [
        "{",
        [],
        {"peer": PEER},
        {"peer": "", "name": 1},
        "[" * 900,
        {"peer": "x" * 300, "name": ""},
        {"peer": "hanoi", "name": ""},
    ],
)
def test_what_is_no_admission_is_refused(body: Any) -> None:
    status, _, admitted = asked(body, RIGHT)
    assert (status, admitted) == (400, [])


def test_more_than_a_kilobyte_is_not_read() -> None:
    assert asked({"peer": PEER, "name": "n" * 2000}, RIGHT)[0] == 413


def test_what_the_node_finds_wrong_is_said() -> None:
    assert asked({"peer": PEER, "name": ""}, RIGHT, "it is a member already")[:2] == (
        409,
        "it is a member already\n",
    )
    assert asked({"peer": PEER, "name": ""}, RIGHT, "as \x1b[2J\nBea")[1] == "as ?[2J Bea\n"
