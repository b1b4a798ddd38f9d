"""What a node makes of a peer of another version: it shows it, and warns once of what does not work."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable

import pytest
from state.kit import Stream, stream_pair

from tapestry.dht.p2pd import SwarmError
from tapestry.node.daemon.versions_desk import AGAIN_S, ASKED_AT_ONCE, SURE_S, Answered, VersionsDesk
from tapestry.node.net.checkup import Checkup

RUN, OTHER_RUN = "ab" * 32, "cd" * 32
PEER = "12D3KooWFirst"
AUDIT = f"/tapestry/{RUN}/audit/2"


def desk() -> VersionsDesk:
    return VersionsDesk("0.1.0", RUN)


def asked(one: VersionsDesk, version: str, run_id: str = RUN) -> None:
    """By the check-up, as a node of that version serves it."""

    async def main() -> None:
        async def hosts_of(peer: str) -> tuple[str, ...]:
            return ()

        async with stream_pair() as (mine, theirs):

            async def opened() -> Stream:
                return mine

            serving = asyncio.create_task(Checkup(run_id, version, hosts_of).serve("us", *theirs))
            assert one.due([PEER], 0.0) == [PEER]
            await one.ask(PEER, opened, lambda: 0.0)
            await serving

    asyncio.run(main())


def test_a_linked_peers_version_is_known_until_its_link_ends(caplog: pytest.LogCaptureFixture) -> None:
    one = desk()
    with caplog.at_level(logging.INFO, "tapestry.node"):
        asked(one, "0.2.0")
        assert one.known == {PEER: "0.2.0"} and one.due([PEER], 1e9) == []
        assert one.beside(PEER) == " (it runs version 0.2.0, this node 0.1.0)"
        one.forget(PEER)
        assert one.known == {} and one.beside(PEER) == ""
        asked(one, "0.2.0")
        one.forget(PEER)
        asked(one, "0.1.0")
    assert one.known == {PEER: "0.1.0"} and one.beside(PEER) == ""
    (line,) = caplog.messages
    assert line.startswith(f"version=other peer={PEER[-6:]} theirs=0.2.0 ours=0.1.0; ")
    assert one.due(["another"], 1.0) == ["another"] and one.known == {}


def test_a_peer_that_gives_no_answer_is_asked_again_later() -> None:
    one = desk()

    async def refused() -> Stream:
        raise SwarmError("it does not serve this protocol")

    assert one.due([PEER], 5.0) == [PEER]
    asyncio.run(one.ask(PEER, refused, lambda: 5.0))
    assert one.known == {} and one.due([PEER], 5.0 + AGAIN_S - 1) == []
    assert one.due([PEER], 5.0 + AGAIN_S) == [PEER]


def test_silent_peers_keep_no_other_from_being_asked() -> None:
    """In an open run the version of the one that answers was known after all that are silent."""

    async def main() -> list[str]:
        reached: list[str] = []
        was_asked = asyncio.Event()

        def opener(peer: str, protocol: str) -> Callable[[], Awaitable[Stream]]:
            async def opened() -> Stream:
                reached.append(peer)
                if peer == PEER:
                    was_asked.set()
                await asyncio.Event().wait()
                raise AssertionError

            return opened

        silent = [f"silent {number}" for number in range(2 * ASKED_AT_ONCE)]
        linked = [*silent[: ASKED_AT_ONCE - 1], PEER, *silent[ASKED_AT_ONCE - 1 :]]
        asking = asyncio.create_task(desk().run(lambda: linked, dict, lambda peer: True, opener))
        await asyncio.wait_for(was_asked.wait(), 5)
        await asyncio.sleep(0)
        asking.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await asking
        return reached

    assert len(asyncio.run(main())) == ASKED_AT_ONCE


def test_what_a_peer_calls_its_version_breaks_no_line_of_the_log() -> None:
    one = desk()
    asked(one, "1.0\nversion=lacks " + "x" * 200)
    assert one.known == {PEER: "1.0?version?lacks?" + "x" * 14}


def test_a_protocol_that_a_peer_lacks_is_warned_of_once_with_the_cure(
    caplog: pytest.LogCaptureFixture,
) -> None:
    one = desk()
    one.answered(PEER, Answered(0.0, "0.0.9", RUN))
    for _ in range(3):
        one.tell({(PEER, AUDIT): SURE_S}, SURE_S)
    (line,) = caplog.messages
    assert line.startswith(f"version=lacks peer={PEER[-6:]} theirs=0.0.9 ours=0.1.0 protocol=audit/2 means=")
    assert "; run one version on all members: docs/operating.md" in line
    one.answered(PEER, Answered(100.0, "0.0.8", RUN))
    one.tell({(PEER, AUDIT): 200.0}, 200.0)
    assert "theirs=0.0.8" in caplog.messages[-1], "another version is news"


def test_who_is_starting_or_said_nothing_or_lacks_what_is_not_needed_is_not_warned_of(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Its links came before its streams: each restart of a member would have been such a warning."""
    one = desk()
    one.tell({(PEER, AUDIT): 50.0}, 50.0)
    one.answered(PEER, Answered(60.0, "0.2.0", RUN))
    one.tell({(PEER, AUDIT): 50.0}, 100.0)
    one.tell({(PEER, AUDIT): 60.0 + SURE_S - 1}, 100.0)
    one.tell({(PEER, f"/tapestry/{RUN}/bulk2/1"): 100.0, (PEER, "/tapestry/checkup/1"): 100.0}, 100.0)
    assert caplog.messages == []


def test_a_member_that_is_in_another_run_is_named(caplog: pytest.LogCaptureFixture) -> None:
    one = desk()
    one.answered(PEER, Answered(0.0, "0.2.0", OTHER_RUN))
    for _ in range(2):
        one.tell({(PEER, f"/tapestry/{RUN}/control/1"): SURE_S}, SURE_S)
    (line,) = caplog.messages
    runs = f"theirs={OTHER_RUN[:12]} ours={RUN[:12]}"
    assert line.startswith(f"run=other peer={PEER[-6:]} {runs} version=0.2.0; ")


def test_the_desk_asks_who_is_linked_and_who_lacks_something_and_matters() -> None:
    one = desk()
    opened: list[tuple[str, str]] = []

    def opener(peer: str, protocol: str):  # type: ignore[no-untyped-def]
        async def open_stream() -> Stream:
            opened.append((peer, protocol))
            raise SwarmError("gone")

        return open_stream

    async def main() -> None:
        lacks = {("given", AUDIT): 0.0, ("stranger", AUDIT): 0.0}
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(0.2):
                await one.run(lambda: ["linked"], lambda: lacks, lambda peer: peer == "given", opener)

    asyncio.run(main())
    assert opened == [("linked", "/tapestry/checkup/1"), ("given", "/tapestry/checkup/1")]
