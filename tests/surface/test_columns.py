"""What `status`, `peers`, `members` and `log` print for people fits a terminal of 80 columns."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from typing import Any

import pytest
from click.testing import CliRunner
from rich.cells import cell_len

from tapestry.node.cli import look, members
from tapestry.node.errors import UserError
from tapestry.node.lineage import egress, log
from tapestry.node.lineage.branches import Branch
from tapestry.node.lineage.branches import lines as branch_lines
from tapestry.node.lineage.columns import column, cut, ids_cut, who, wrapped
from tapestry.node.protocol.members import Change

PEERS = ["12D3KooW" + letter * 38 + f"Abcde{letter}" for letter in "123456789"]
DIGEST = "d" * 64
ADDRESS = f"/ip4/203.0.113.7/tcp/4001/p2p/{PEERS[0]}"
RELAYED = f"/dns4/relay.example.org/udp/4001/quic-v1/p2p/{PEERS[1]}/p2p-circuit/p2p/{PEERS[0]}"
NAMES = ["lab-hanoi", "ヘルシンキ大学の言語技術研究室", "x" * 64, ""]


def fits(lines: list[str]) -> str:
    """The text; fails where a line is wider than a terminal."""
    assert [line for line in lines if cell_len(line) > 80 or line != line.rstrip()] == []
    return "\n".join(lines)


def test_a_name_stands_before_its_shortened_id_and_no_peer_writes_on_the_terminal() -> None:
    assert (
        who(PEERS[0], "lab-hanoi") == f"lab-hanoi …{PEERS[0][-6:]}" and who(PEERS[0]) == f"…{PEERS[0][-6:]}"
    )
    assert who("12D3KooWabcdef", "a\x1b[31m") == "a?[31m …abcdef"
    assert ids_cut(f"{PEERS[0]} lied, {DIGEST}") == f"…{PEERS[0][-6:]} lied, {DIGEST}"


def test_columns_are_counted_as_a_terminal_counts_them() -> None:
    assert cut("abcdef", 6) == "abcdef" and cut("abcdefg", 6) == "abcde…"
    assert [cell_len(column(name, 20)) for name in NAMES] == [20] * 4
    told = list(wrapped(" ".join(["word"] * 40 + ["y" * 200]), "first ", "    "))
    assert "yyy" in fits(told) and told[0].startswith("first word ") and told[1].startswith("    word")
    assert "".join("".join(told).split()).count("y") == 200
    assert list(wrapped("", "first")) == ["first"]


def test_status_is_two_columns_with_digests_whole_ids_short_and_times_in_words() -> None:
    answer: dict[str, Any] = {
        "peer_id": PEERS[0],
        "run_id": DIGEST,
        "state_digest": DIGEST,
        "trainer_trouble": "the trainer ended, 3 times in a row: " + "out of memory; " * 8,
        "tokens_per_second": 123456.7,
        "addresses": [ADDRESS, RELAYED],
        "accused": [{"peer": PEERS[1], "epoch": 3, "shard": 1, "what": "signed a wrong mean"}],
        "round": {"stage": "ready", "waiting_on": PEERS},
        "relays": [PEERS[2]],
        "bytes": {"sent": 12_345_678, "received": 0},
        "uptime_s": 7384.2,
        "waiting": {"kind": "members", "for_s": 61.5},
    }
    told = list(look._for_people(answer))
    text = fits(told)
    assert {line[12:14] for line in told} == {"  "}, "a value stands elsewhere than below the others"
    for words in (
        f"peer_id       {PEERS[0]}",
        f"run_id        {DIGEST}",
        f"state_digest  {DIGEST}",
        f"…{PEERS[8][-6:]}",
        "what=signed",
        "addresses     /ip4/203.0.113.7/tcp/4001\n",
        f"/p2p/…{PEERS[1][-6:]}/p2p-circuit\n",
        f"relays        …{PEERS[2][-6:]}\n",
        "sent=12.3 MB",
        "uptime        2.1 h\n",
        "for=1.0 min",
    ):
        assert words in f"{text}\n", words


def test_status_says_since_when_it_waits_by_the_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    waiting = {"kind": "members", "what": "1 of 2 " * 20, "since": 1_764_500_000, "for_s": 61.5, "ends": "x"}
    monkeypatch.setattr(look, "stopped", lambda *_: None)
    monkeypatch.setattr(look, "ask_node", lambda *_: {"phase": "averaging", "waiting": dict(waiting)})
    said = CliRunner().invoke(look.status).stdout
    assert re.search(r"since=2025-\d\d-\d\d \d\d:\d\d:\d\d", fits(said.splitlines())), said
    assert json.loads(CliRunner().invoke(look.status, ["--json"]).stdout)["waiting"] == waiting


@pytest.mark.parametrize("name", NAMES)
def test_peers_with_names_and_long_addresses(name: str) -> None:
    peer = {
        "peer_id": PEERS[0],
        "name": name,
        "phase": "averaging",
        "epoch": 123_456,
        "same_head": True,
        "heard_s": 123.4,
        "relayed": True,
        "version": "0.2.0rc1",
        "addresses": ["/ip6/2001:db8:85a3:8d3:1319:8a2e:370:7348/udp/4001/quic-v1", ADDRESS],
    }
    banned = {"peer_id": PEERS[1], "phase": "banned", "why": "sent what nobody asked for, again and again"}
    for versions in (False, True):
        text = fits(look._table([look._in_short(one, versions) for one in (peer, banned)]))
        assert f"…{PEERS[0][-6:]}" in text and name[:5] in text
        assert ("0.2.0rc1" in text) is versions


def test_members_applicants_and_all_that_waits() -> None:
    seats = [
        {"peer": peer, "name": name, "since": 10**6 * i, "voice": 1, "founder": i == 0, "phase": "training"}
        for i, (peer, name) in enumerate(zip(PEERS, NAMES, strict=False))
    ]
    pending = [
        ("rekey", PEERS[5], PEERS[6]),
        ("charter", "", "admit_by majority"),
        ("remove", PEERS[1], "w" * 99),
        ("invite", PEERS[4], "20 1796672873 lab-lima"),
        ("invite", PEERS[4], "1 0 "),
    ]
    table = {
        "epoch": 10**6,
        "me": PEERS[0],
        "members": seats,
        "applicants": [{"peer": PEERS[7], "name": "f" * 64, "since": 0.0}],
        "invites": [
            {"key": "ab" * 32, "name": "guest", "uses": 1000, "expires_at": 0},
            {"key": "cd" * 32, "name": "late", "uses": 1, "expires_at": 1},
        ],
        "pending": [
            {
                "id": "c" * 32,
                "kind": kind,
                "peer": peer,
                "value": value,
                "signed": 1,
                "needs": 2,
                "enough": kind == "remove",
            }
            for kind, peer, value in pending
        ],
        "settings": {"round.max_influence": 0.5},
        "removed": {PEERS[8]: f"{PEERS[8]} lied in epoch 4, " + "and again " * 20},
    }
    told = members._lines(table)
    text = fits(told)
    own = f"member     lab-hanoi             …{PEERS[0][-6:]}   this node, training, founder"
    assert told[1] == own
    assert "x" * 64 in text and "f" * 64 in text, "a name is broken, not cut"
    assert "w" * 81 not in text and text.count("w") >= 99, "it is told whole"
    for words in (
        f"rekey …{PEERS[5][-6:]}",
        f"invite …{PEERS[4][-6:]} for lab-lima, 20 uses, until 2026-12-07 19:47 UTC",
        f"invite …{PEERS[4][-6:]} 1 use ",
        "cccccccc",
        "1 of 2 signed",
        "for the next record",
        "round.max_influence",
        "1000 left",
        "expired",
    ):
        assert words in text, words


@pytest.mark.parametrize("given", ["…{}", "{}"])
def test_an_id_is_taken_as_members_shows_it(given: str) -> None:
    assert members._whole(given.format(PEERS[3][-6:]), PEERS) == PEERS[3]
    with pytest.raises(UserError, match="nobody is called"):
        members._whole("…nobody", PEERS)


@pytest.mark.parametrize("given", ["", "…", PEERS[3][-3:]])
def test_an_empty_id_is_not_the_only_one_there_is(given: str) -> None:
    for at_begin in (False, True):
        with pytest.raises(UserError, match="may be anybody's"):
            members._whole(given, [PEERS[3]], at_begin)


def test_the_branches_of_a_home() -> None:
    head = "ab" * 32
    run = Branch("run", "island", 0, 10**6, head, False)
    left = Branch("island", "islands/01000009-abababababababab", 10**6, 10**6 + 9, head, False)
    lost = replace(left, kind="lost", folder="branches/01000009-abababababababab", why="w " * 60)
    lost = replace(lost, members=tuple(PEERS), left_at="2026-11-30T19:00:00Z")
    text = fits(list(branch_lines([run, left, replace(left, folder=".", goes_on=True), lost])))
    assert "waits: rejoin" in text and "goes on" in text and "left 2026-11-30" in text
    assert text.count("in islands/01000009-abababababababab") == 1
    assert "export --branch 01000009-abababababababab" in text


def test_the_log_names_who_contributed_and_who_asked_for_a_change() -> None:
    asked = tuple((peer, "ab") for peer in PEERS[:2])
    changes = (
        Change("admit", PEERS[2], "Bea", 9, "0" * 32, asked),
        Change("remove", PEERS[3], f"{PEERS[3]} sent noise", 9, "1" * 32, asked),
        Change("set", "", "train.lr 0.0001", 9, "2" * 32, asked),
    )
    members_ = tuple((peer, 1 / 9) for peer in PEERS)
    names = dict(zip(PEERS, [*NAMES, "Carl"], strict=False))
    line = log.Line(
        1_234_567,
        "2026-11-29T10:00:00Z",
        members_,
        1024,
        1024,
        True,
        10**12,
        DIGEST,
        "r",
        0.123,
        12.3456,
        changes,
        names,
    )
    lines = [line, log.Line(1, "", members_[:1], 1, 1, False, 0, DIGEST, "r", None)]
    text = fits(list(log.lines(iter(lines))))
    words = " ".join(text.split())
    for told in (
        f"lab-hanoi …{PEERS[0][-6:]} 11 %",
        f"admit Bea …{PEERS[2][-6:]}, asked for by lab-hanoi …{PEERS[0][-6:]},",
        f"remove …{PEERS[3][-6:]} …{PEERS[3][-6:]} sent noise",
        "set train.lr 0.0001, asked for by",
        "1024/1024",
        f"forced: lab-hanoi …{PEERS[0][-6:]}",
    ):
        assert told in words, told


def test_what_left_the_node_names_its_receivers_below() -> None:
    left = egress.Left(
        "2026-11-29T10:00:00Z",
        "contribution",
        10**12,
        dict.fromkeys(PEERS, 10**9),
        "roster",
        ((1, "x"), (10**6, "x")),
        0,
    )
    text = fits(list(egress.lines(iter([egress.Started("2026-11-29T10:00:00Z", DIGEST, 7), left]))))
    assert f"…{PEERS[0][-6:]} 1000000000," in text and "1-1000000" in text
    assert json.dumps(left.value())
