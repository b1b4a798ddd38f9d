"""What the daemon's views tell the history: one point for each epoch, of what core, trainer and disk say."""

from __future__ import annotations

import logging
from dataclasses import replace

import pytest

from tapestry.node.daemon.coming import PROGRESS_LOG_S, Coming
from tapestry.node.daemon.likeness_watch import LASTING
from tapestry.node.daemon.views import Reporter
from tapestry.node.net.network import Where
from tapestry.node.protocol import events as ev
from tapestry.node.protocol.agreement import Agreement
from tapestry.node.protocol.members import Charter, Seat, first_roll
from tapestry.node.protocol.messages import Stage
from tapestry.node.protocol.record import Body, Member, Record
from tapestry.node.protocol.snapshot import PeerSnapshot, Snapshot
from tapestry.node.protocol.waits import Wait
from tapestry.node.surface.history import History
from tapestry.node.surface.logs import LiveLine
from tapestry.node.surface.metrics import Metrics
from tapestry.node.trainer import messages as tm

CORE = Snapshot("me", "ab" * 32, "training", None, True, 1, "cd" * 32, 1, "cd" * 32, "ef" * 32, 100, None, ())


class Bench:
    def __init__(self) -> None:
        self.history = History()
        self.metrics = Metrics("0.1.0")
        self.reporter = Reporter(self.metrics, LiveLine(None, enabled=False), None, self.history)  # type: ignore[arg-type]
        self.reporter.float32_ratio = 4.0

    def round(self, epoch: int, other: int = 0) -> None:
        """The round that makes `epoch`, from this node's contribution to its end, of 3 s."""
        report = self.reporter
        report.on_event(tm.Contribution(epoch - 1, 1, 64, 1.0, 2.0 + epoch, 64, 10, 0.0, 0.5 * epoch), 1.0)
        for now, stage in (
            (0.0, Stage.TRAINING),
            (10.0, Stage.READY),
            (11.0, Stage.EXCHANGING),
            (13.0, Stage.AWAY),
        ):
            report.moved(ev.Moved(epoch - 1, "training", stage), now, lambda: CORE)
        members = (Member("a", 64, "01" * 32), Member("b", other, "45" * 32 if other else ""))
        agreement = Agreement(750_000, 500_000, 250_000)
        body = Body("ab" * 32, epoch, "cd" * 32, "ef" * 32, members, "23" * 32, False, agreement)
        report.committed(Record(body, f"{epoch:064x}", 0, ()), tokens=1000 * epoch)
        report.round_ended(ev.EndRound(epoch - 1, "committed", ""), 13.0)

    @property
    def points(self) -> list[dict]:
        return list(self.history.everything()["points"])

    @property
    def said(self) -> list[str]:
        return [event["text"] for event in self.history.everything()["events"]]


def test_a_round_becomes_a_point_with_loss_times_and_bytes_beside_float32() -> None:
    bench = Bench()
    bench.metrics.network_bytes("sent", "state", 1000)
    bench.round(1)
    bench.metrics.network_bytes("sent", "control", 10)
    bench.metrics.network_bytes("sent", "contribution", 100)
    bench.metrics.network_bytes("received", "result", 50)
    bench.round(2)
    point = bench.points[1]
    assert point["epoch"] == 2 and point["loss"] == 4.0 and point["passes"] == 1.0
    assert point["tokens"] == 2000 and point["contributions"] == 1
    assert (point["sent"], point["sent_float32"]) == (110, 410)
    assert (point["received"], point["received_float32"]) == (50, 200)
    assert point["round_s"] == pytest.approx(3.0)
    assert point["phases"] == pytest.approx({"training": 10.0, "ready": 1.0, "exchanging": 2.0})
    assert [record["epoch"] for record in bench.history.everything()["records"]] == [1, 2]
    assert bench.reporter.show(CORE, Where(())).traffic.sent == 1110


def test_contributions_agree_or_not_where_there_are_two() -> None:
    bench = Bench()
    bench.round(1)
    bench.round(2, other=64)
    agreement = {"cosine": 0.75, "sign": 0.5, "norm_kept": 0.25}
    assert [point.get("agreement") for point in bench.points] == [None, agreement]


def test_a_loss_of_the_base_goes_to_the_epoch_that_it_is_of() -> None:
    bench = Bench()
    bench.reporter.on_event(tm.Validation(0, 5.0, ("fr",), (5.0,)), 0.0)
    bench.round(1)
    bench.round(2)
    bench.reporter.on_event(tm.Validation(1, 4.0, ("fr",), (4.0,)), 0.0)
    assert [point.get("validation") for point in bench.points] == [{"fr": 5.0}, {"fr": 4.0}, None]


def test_a_loss_of_another_epoch_than_the_records_is_not_taken_for_its_own() -> None:
    bench = Bench()
    bench.reporter.on_event(tm.Contribution(7, 1, 64, 1.0, 2.5, 64, 10, 0.0, 0.5), 1.0)
    body = Body("ab" * 32, 3, "cd" * 32, "ef" * 32, (Member("b", 64, "01" * 32),), "23" * 32)
    bench.reporter.committed(Record(body, "3" * 64, 0, ()), tokens=3)
    assert "loss" not in bench.points[0]


def test_a_trainer_that_dies_and_works_again_is_told_and_the_first_start_is_no_news() -> None:
    bench = Bench()
    bench.reporter.trainer_up()
    bench.reporter.trainer_down("trainer died, exit -9", "exit -9", told=True)
    bench.reporter.trainer_up()
    assert bench.said == ["trainer died, exit -9", "the trainer works again"]


def test_peers_that_come_and_go_are_told_until_this_node_leaves() -> None:
    bench = Bench()
    peer = PeerSnapshot("12D3KooWhanoi1", "training", 1, "", True, True, 0.1)
    bench.reporter.count_peers(replace(CORE, peers=(peer,)), {})
    bench.reporter.count_peers(CORE, {})
    bench.reporter.leaving = True
    bench.reporter.count_peers(replace(CORE, peers=(peer,)), {})
    assert bench.said == ["…hanoi1 is here", "…hanoi1 is not heard any more"]


def test_what_a_joiner_waits_for_is_in_its_reason_and_now_and_then_in_the_log(
    caplog: pytest.LogCaptureFixture,
) -> None:
    report, where = Bench().reporter, Where((), None, (), {})
    wait = Wait("state", "needs a state, chain at 40", "ends by itself", 70.0)
    waits = replace(CORE, phase="joining", wait=wait)
    report.coming.update("state of epoch 40 bytes", 0, 2_000_000)
    shown = report.show(waits, where).core.wait
    assert shown.what == "needs a state, chain at 40; state of epoch 40 0 %, 0.0 of 2.0 MB"
    assert not shown.lasting, "it says how far it is"
    report.coming.end()
    assert report.show(waits, where).core.wait == wait and wait.lasting
    now, told = [0.0], []
    coming = Coming(told.append, lambda: now[0])
    with caplog.at_level(logging.INFO, "tapestry.node"):
        for done in (0, 1, 2):
            coming.update("base x bytes", done, 4)
            now[0] += PROGRESS_LOG_S
    assert len(told) == 3 and [r.getMessage() for r in caplog.records] == told[1:]


def test_members_are_called_by_their_names_in_events_and_in_status() -> None:
    bench = Bench()
    peer = PeerSnapshot("12D3KooWhanoi1", "training", 1, "", True, True, 0.1)
    members = {peer.peer_id: Seat("lab-hanoi", 1, 0), "me": Seat("lab-oslo", 1, 0)}
    core = replace(CORE, roll=replace(first_roll("ab", Charter(), ()), members=members), peers=(peer,))
    bench.reporter.count_peers(core, {})
    bench.reporter.count_peers(replace(core, peers=()), {})
    assert bench.said == ["lab-hanoi is here", "lab-hanoi is not heard any more"]
    bench.reporter.accused(peer.peer_id, 3, 1, "signed a wrong mean")
    shown = bench.reporter.show(core, Where(()))
    assert shown.name_of("me") == "lab-oslo" and shown.accused[0]["name"] == "lab-hanoi"


def test_losses_that_go_apart_are_an_event_and_a_trouble_in_status() -> None:
    bench = Bench()
    for epoch in range(30):
        bench.reporter.on_event(tm.Contribution(epoch, 1, 64, 1.0, 3.0 - 0.01 * epoch, 64, 10, 0.0, 2.0), 1.0)
        bench.reporter.on_event(tm.Validation(epoch, 2.0 + 0.01 * epoch, ("fr",), (2.0,)), 1.0)
    (said,) = bench.said
    trouble = bench.reporter.show(CORE, Where(())).loss_trouble
    assert "training loss fell" in said and said.split(": ")[1] == trouble.split(": ")[1]


def test_settings_are_told_when_they_change_and_when_their_fork_is_left(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO, "tapestry")
    bench, roll = Bench(), first_roll("ab" * 32, Charter(), ["me"])
    core = replace(CORE, roll=replace(roll, settings={"train.lr": 0.0001}))
    bench.reporter.meet(core)
    waits = {"train.lr": 0.0001, "round.exchange_max_s": "auto"}
    bench.reporter.changed((), replace(core, roll=replace(roll, settings=waits)))
    bench.reporter.changed((), core)
    told = [line.getMessage() for line in caplog.records if "setting=" in line.getMessage()]
    assert told == [
        "setting=round.exchange_max_s value=auto epoch=1",
        "setting=round.exchange_max_s is the run spec's again epoch=1",
    ]
    assert bench.said == ["the setting round.exchange_max_s is the run spec's again, at epoch 1"]


def test_a_member_that_is_unlike_the_others_is_named_until_it_is_removed(caplog) -> None:
    bench, roll = Bench(), first_roll("ab" * 32, Charter(), ["a", "b", "c"])
    report = bench.reporter
    report.meet(replace(CORE, roll=roll))
    with caplog.at_level(logging.INFO, logger="tapestry.node"):
        for epoch in range(1, LASTING + 3):
            report.round_ended(
                ev.EndRound(epoch, "committed", "", (("a", 0.9), ("b", 0.9), ("c", 0.01))), 1.0
            )
        assert caplog.text.count("unlike=c epoch=6 cosine=0.010 others=0.900;") == 1
        assert sum("contributions are unlike all others" in text for text in bench.said) == 1
        (one,) = report.show(replace(CORE, roll=roll), Where(())).unlike
        assert (one["peer"], one["cosine"], one["others"]) == ("c", 0.01, 0.9)
        without = replace(
            CORE, roll=replace(roll, members={p: s for p, s in roll.members.items() if p != "c"})
        )
        report.meet(without)
        report.round_ended(ev.EndRound(9, "committed", "", (("a", 0.9), ("b", 0.9))), 1.0)
    assert report.show(without, Where(())).unlike == () and "alike=" not in caplog.text
