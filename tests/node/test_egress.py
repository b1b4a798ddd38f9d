"""The ledger of what leaves: its lines, its bounds, a full disk, a killed node, what it is checked for."""

from __future__ import annotations

import asyncio
import errno
import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from tapestry.node.cli.main import cli
from tapestry.node.daemon import egress as egress_module
from tapestry.node.daemon.egress import EgressLedger
from tapestry.node.disk.linked import BrokenLink, LinkedFile, read_linked
from tapestry.node.errors import UserError
from tapestry.node.home import Home
from tapestry.node.lineage.egress import (
    PARTS_MAX,
    RECEIVERS_MAX,
    Left,
    Started,
    Totals,
    counted,
    lines,
    read_egress,
)

RUN = "ab" * 32
A, B = "12D3KooWa", "12D3KooWb"


@pytest.fixture
def home(tmp_path: Path) -> Home:
    return Home(tmp_path)


def ledger(home: Home) -> EgressLedger:
    made = EgressLedger(home, lambda: "2026-11-29T10:00:00Z")
    made.begin(RUN)
    return made


def left(home: Home) -> list[Left]:
    return [one for one in read_egress(home) if isinstance(one, Left)]


def test_a_line_a_kind_names_bytes_receivers_parts_and_rule(home: Home) -> None:
    book = ledger(home)
    for peer, count in ((A, 100), (B, 50), (A, 10)):
        book.part("contribution", 7, "cd" * 32)
        book.sent("contribution", peer, count)
    book.sent("control", B, 5)
    asyncio.run(book.close())
    contribution, control = left(home)
    assert (contribution.kind, contribution.bytes, contribution.rule) == ("contribution", 160, "roster")
    assert contribution.receivers == {A: 110, B: 50} and contribution.parts == ((7, "cd" * 32),)
    assert (control.bytes, control.receivers, control.parts) == (5, {B: 5}, ())
    assert next(read_egress(home)) == Started("2026-11-29T10:00:00Z", RUN, 0)


def test_parts_have_a_bound_and_what_did_not_leave_yet_waits(home: Home) -> None:
    async def main() -> None:
        book = ledger(home)
        for epoch in range(PARTS_MAX + 9):
            book.part("result", epoch, "x")
        await book.flush()
        book.sent("result", A, 1)
        await book.close()

    asyncio.run(main())
    (result,) = left(home)
    assert len(result.parts) == PARTS_MAX and result.more_parts == 9


def test_heartbeats_have_few_lines_and_the_same_sum(home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    """They leave each second, for months, also where nothing else happens."""
    monkeypatch.setattr(egress_module, "FLUSH_S", 0.001)
    monkeypatch.setattr(egress_module, "CONTROL_S", 0.1)

    async def main() -> None:
        book = ledger(home)
        writing = asyncio.create_task(book.run())
        for _ in range(50):
            book.sent("control", A, 1)
            book.sent("result", A, 1)
            await asyncio.sleep(0.005)
        writing.cancel()
        await book.close()

    asyncio.run(main())
    lines = {kind: [one for one in left(home) if one.kind == kind] for kind in ("control", "result")}
    assert {kind: sum(one.bytes for one in of) for kind, of in lines.items()} == {"control": 50, "result": 50}
    assert len(lines["result"]) > 3 * len(lines["control"]) > 0


def test_control_to_very_many_does_not_wait(home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    """In an open run anybody may ask, under one name after the other, and a line holds so many receivers."""
    monkeypatch.setattr(egress_module, "FLUSH_S", 0.001)

    async def main() -> None:
        book = ledger(home)
        writing = asyncio.create_task(book.run())
        for index in range(3 * egress_module.RECEIVERS_FULL):
            book.sent("control", f"{index:052}", 1)
            if index % 100 == 0:
                await asyncio.sleep(0.005)
        writing.cancel()
        await book.close()

    asyncio.run(main())
    of = [one for one in left(home) if one.kind == "control"]
    assert len(of) >= 2 and sum(one.bytes for one in of) == 3 * egress_module.RECEIVERS_FULL


def test_what_left_to_more_than_a_line_holds_has_several_lines_that_are_read(home: Home) -> None:
    """A disk that took nothing for long: every reader refused the line, or it was too long to be written."""
    count = 2 * RECEIVERS_MAX + 9
    book = ledger(home)
    for index in range(count):
        book.sent("control", f"12D3KooW{index:044}", 2)
    for epoch in range(PARTS_MAX + 1):
        book.part("control", epoch, "x")
    asyncio.run(book.close())
    of = left(home)
    assert sum(one.bytes for one in of) == 2 * count
    assert len({peer for one in of for peer in one.receivers}) == count
    assert max(len(one.receivers) for one in of) == egress_module.RECEIVERS_FULL
    assert [len(one.parts) for one in of] == [PARTS_MAX] + [0] * (len(of) - 1)
    assert sum(one.more_parts for one in of) == 1


def test_while_the_disk_takes_nothing_no_more_than_so_many_receivers_are_held(
    home: Home, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(egress_module, "RECEIVERS_HELD", 3)
    book = ledger(home)
    for index in range(9):
        book.sent("state", f"peer{index % 6}", 1)
    asyncio.run(book.close())
    (state,) = left(home)
    assert state.receivers == {"peer0": 2, "peer1": 2, "peer2": 2, "": 3} and state.bytes == 9


def test_a_line_that_cannot_be_written_keeps_no_other_kind_back(home: Home) -> None:
    book = ledger(home)
    append = book._append

    def failing(lines: list[dict[str, object]], sync: bool) -> None:
        if lines[0]["kind"] == "control":
            raise OSError(errno.EFBIG, "too long")
        append(lines, sync)

    book._append = failing  # type: ignore[method-assign]
    book.sent("control", A, 1)
    book.sent("result", A, 2)
    asyncio.run(book.flush())
    assert [one.kind for one in left(home)] == ["result"]


def test_control_that_names_many_records_does_not_wait(home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(egress_module, "FLUSH_S", 0.001)

    async def main() -> None:
        book = ledger(home)
        writing = asyncio.create_task(book.run())
        book.sent("control", A, 1)
        for epoch in range(PARTS_MAX - 1):
            book.part("control", epoch, "x")
        await asyncio.sleep(0.05)
        assert left(home) == []
        book.part("control", PARTS_MAX, "x")
        for _ in range(500):
            if left(home):
                break
            await asyncio.sleep(0.01)
        assert len(left(home)) == 1, "before the end"
        writing.cancel()
        await book.close()

    asyncio.run(main())
    (control,) = left(home)
    assert len(control.parts) == PARTS_MAX and control.more_parts == 0


def test_a_full_disk_loses_nothing(home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    append = LinkedFile.append
    full = True

    def failing(self: LinkedFile, values: list[object], *, sync: bool = False) -> None:
        if full and values:
            raise OSError(28, "No space left on device")
        append(self, values, sync=sync)

    async def main() -> None:
        nonlocal full
        book = ledger(home)
        monkeypatch.setattr(LinkedFile, "append", failing)
        for count in (1, 2):
            book.sent("state", A, count)
            book.part("state", count, "d")
            await book.flush()
        full = False
        await book.close()

    asyncio.run(main())
    (state,) = left(home)
    assert (state.bytes, [epoch for epoch, _ in state.parts]) == (3, [1, 2])


def test_parts_that_come_while_a_line_fails_are_counted(home: Home) -> None:
    async def main() -> None:
        book = ledger(home)
        append = book._append

        def failing(lines: list[dict[str, object]], sync: bool) -> None:
            for epoch in range(PARTS_MAX + 9):
                book.part("state", epoch, "d")
            raise OSError(errno.ENOSPC, "No space left on device")

        book._append = failing  # type: ignore[method-assign]
        book.sent("state", A, 1)
        await book.flush()
        book._append = append  # type: ignore[method-assign]
        await book.close()

    asyncio.run(main())
    (state,) = left(home)
    assert len(state.parts) == PARTS_MAX and state.more_parts == 9


def test_what_a_killed_node_left_torn_is_cut_and_said(home: Home) -> None:
    asyncio.run(ledger(home).close())
    with home.egress.open("ab") as file:
        file.write(b'{"digest":')
    assert len(list(read_egress(home))) == 1
    asyncio.run(ledger(home).close())
    starts = list(read_egress(home))
    assert isinstance(starts[-1], Started) and starts[-1].cut_bytes == 10
    assert "10 bytes of an unfinished line cut off" in " ".join(" ".join(lines(read_egress(home))).split())


def test_a_ledger_that_was_changed_is_found_and_hinders_no_start(
    home: Home, caplog: pytest.LogCaptureFixture
) -> None:
    asyncio.run(ledger(home).close())
    home.egress.write_bytes(home.egress.read_bytes().replace(b"10:00", b"11:00"))
    with pytest.raises(UserError, match=r"egress\.jsonl, line 1: not in the form"):
        list(read_egress(home))
    asyncio.run(ledger(home).close())
    assert home.egress.with_name("egress.jsonl.corrupt").exists() and len(list(read_egress(home))) == 1
    assert "what left before is in it" in caplog.text and "others are asked" not in caplog.text


@pytest.mark.parametrize(
    "change",
    [{"bytes": 5}, {"rule": "state"}, {"kind": "data"}, {"receivers": [A]}, {"parts": [[1]]}, {"x": 1}],
)
def test_a_line_that_does_not_add_up_is_refused_though_its_links_hold(
    home: Home, change: dict[str, object]
) -> None:
    value = Left("now", "result", 4, {A: 4}, "mean", ((1, "x"),), 0).value()
    file = LinkedFile(home.egress)
    file.append([value, value | change])
    file.close()
    assert len(list(read_linked(home.egress))) == 2
    totals = Totals()
    with pytest.raises(BrokenLink, match="line 2"):
        list(counted(home, totals))
    assert totals.bytes == 4


def test_log_egress_shows_it_with_its_total(home: Home) -> None:
    book = ledger(home)
    book.sent("contribution", A, 12)
    book.sent("state", "", 3)
    asyncio.run(book.close())
    shown = CliRunner().invoke(cli, ["log", "--egress", "--home", str(home.path)])
    assert shown.exit_code == 0
    assert "15 bytes left in 1 starts: contribution 12, " in shown.stdout
    (last,) = (
        CliRunner()
        .invoke(cli, ["log", "--egress", "--json", "-n", "1", "--home", str(home.path)])
        .stdout.splitlines()
    )
    assert json.loads(last)["receivers"] == {"": 3}
