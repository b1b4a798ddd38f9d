"""What happened, in sentences."""

from __future__ import annotations

from tapestry.node.protocol.members import Change
from tapestry.node.protocol.record import Body, Member, Record
from tapestry.node.protocol.snapshot import PeerSnapshot, Snapshot
from tapestry.node.surface.history import MEMBERS_SHOWN_MAX, History
from tapestry.node.surface.story import Story


class Bench:
    def __init__(self) -> None:
        self.history = History()
        self.story = Story(self.history, str.title, lambda peer: peer != "an invitation")
        self.now = 0.0

    def peers(self, **phases: str) -> None:
        self.story.peers(_snapshot(phases))

    def round(
        self, epoch: int, outcome: str = "committed", seconds: float | None = 0.42, **weights: int
    ) -> None:
        """The round that made `epoch`, from record to end."""
        members = tuple(
            Member(peer, weight, "c" if weight else "") for peer, weight in sorted(weights.items())
        )
        body = Body("ab" * 32, epoch, "cd" * 32, "ef" * 32, members, "01" * 32)
        self.story.committed(Record(body, f"{epoch:064x}", 0, ()), 1.0)
        self.story.round_ended(epoch - 1, outcome, seconds, self.now)
        self.now += 10

    def change(self, kind: str, peer: str, value: str, *signers: str) -> str:
        """What is said of a change that record 42 carries."""
        change = Change(kind, peer, value, 99, "0" * 32, tuple((one, "ab") for one in signers))
        body = Body(
            "ab" * 32, 42, "cd" * 32, "ef" * 32, (Member("oslo", 1, "c"),), "01" * 32, changes=(change,)
        )
        before = len(self.said)
        self.story.changed(body)
        return "".join(self.said[before:])

    @property
    def said(self) -> list[str]:
        return [event["text"] for event in self.history.everything()["events"]]


def _snapshot(phases: dict[str, str]) -> Snapshot:
    peers = tuple(PeerSnapshot(peer, phase, 1, "", True, True, 0.1) for peer, phase in phases.items())
    return Snapshot("me", "", "training", None, True, 1, "", 1, "", "", 1, None, peers)


def test_who_comes_who_leaves_and_who_is_lost() -> None:
    bench = Bench()
    bench.peers(hanoi="training", lima="training")
    bench.peers(hanoi="training", lima="stopping")
    bench.peers(hanoi="training")
    bench.peers()
    assert bench.said == ["Hanoi and Lima are here", "Lima left in good order", "Hanoi is not heard any more"]


def test_a_peer_that_has_not_said_anything_yet_is_not_here() -> None:
    bench = Bench()
    bench.peers(hanoi="")
    assert bench.said == []


def test_of_many_that_come_at_once_a_few_are_named() -> None:
    bench = Bench()
    bench.peers(**dict.fromkeys("abcdef", "training"))
    assert bench.said == ["A, B, C and 3 more are here"]


def test_a_round_that_goes_on_without_somebody_says_so_once_and_says_who_is_back() -> None:
    bench = Bench()
    bench.round(40, me=5, hanoi=5, lima=5, oslo=5)
    bench.round(41, me=5, lima=5, oslo=5)
    bench.round(42, me=5, lima=5, oslo=5)
    bench.round(43, me=5, lima=5, oslo=5, hanoi=5, seconds=1.0)
    assert bench.said == [
        "round 41 went on without Hanoi: 3 of 4 contributed, 0.4 s",
        "Hanoi contributed to round 43: 4 of 4, 1.0 s",
    ]


def test_who_votes_only_is_not_missed() -> None:
    bench = Bench()
    bench.round(1, me=5, hanoi=0)
    bench.round(2, me=5, hanoi=0)
    assert bench.said == []


def test_nothing_is_said_of_who_was_there_after_a_gap_in_the_records() -> None:
    bench = Bench()
    bench.round(1, me=5, hanoi=5)
    bench.round(9, me=5)
    assert bench.said == []


def test_the_same_is_not_said_round_after_round() -> None:
    bench = Bench()
    for epoch in range(1, 13):
        bench.round(epoch, "missed", None, hanoi=5)
    assert bench.said == [
        "round 1 was decided without a contribution of this node",
        "round 7 was decided without a contribution of this node",
    ]


def test_other_ends_of_a_round_have_their_sentences() -> None:
    bench = Bench()
    bench.round(4, "forced", None, me=5)
    bench.story.round_ended(4, "aborted", None, 0.0)
    bench.story.dropped(2, 20480, "00000003-ab", hollow=False)
    bench.story.dropped(1, 9, "", hollow=True)
    assert bench.said == [
        "round 4 was decided without a majority, as the run's rules allow",
        "round 5 was given up: this node moves to another chain",
        "this node left its chain for one with more work: 2 epochs, 20,480 tokens given up, "
        "kept as the branch 00000003-ab",
        "this node went back to the record before an island's, whose updates nobody gave: "
        "1 epoch, 9 tokens given up, and not kept: the limits leave no room",
    ]


def test_what_this_node_is_doing() -> None:
    bench = Bench()
    bench.story.health("joining", "fetching the state")
    bench.story.health("working", "at the head")
    bench.story.health("degraded", "1 of 3 members are here, 2 are needed")
    bench.story.health("stopping", "")
    levels = [event["level"] for event in bench.history.everything()["events"]]
    assert bench.said == [
        "this node is joining: fetching the state",
        "this node is at the head of the run and trains",
        "this node is degraded: 1 of 3 members are here, 2 are needed",
    ]
    assert levels == ["info", "good", "warning"]


def test_a_peer_cannot_write_a_line_of_its_own() -> None:
    bench = Bench()
    bench.story.refused("hanoi", "weight", "weight 9\nthis node is well\x1b[0m")
    assert bench.said == ["something of Hanoi was refused (weight): weight 9 this node is well?[0m"]


def test_of_a_large_record_the_members_shown_are_bounded() -> None:
    bench = Bench()
    bench.round(1, **{f"p{i}": 1 for i in range(2 * MEMBERS_SHOWN_MAX)})
    (record,) = bench.history.everything()["records"]
    assert len(record["members"]) == MEMBERS_SHOWN_MAX and record["count"] == 2 * MEMBERS_SHOWN_MAX


def test_changes_of_members_rules_and_settings_are_told_in_words() -> None:
    bench = Bench()
    assert bench.change("admit", "hanoi", "lab-hanoi", "oslo", "lima") == (
        "Hanoi is a member, from epoch 42 on, asked for by Oslo and Lima"
    )
    assert bench.change("admit", "hanoi", "x", "an invitation") == "Hanoi is a member, from epoch 42 on"
    assert bench.change("remove", "hanoi", "it\nlied", "oslo") == (
        "Hanoi is no member any more, because it lied, from epoch 42 on, asked for by Oslo"
    )
    assert bench.change("remove", "hanoi", "", "hanoi") == (
        "Hanoi is no member any more, from epoch 42 on, as it asked for itself"
    )
    assert bench.change("rekey", "hanoi", "hanoi2", "oslo") == (
        "Hanoi2 has another key: …hanoi2 in place of …hanoi, from epoch 42 on, asked for by Oslo"
    )
    assert bench.change("voice", "hanoi", "3") == "the voice of Hanoi is 3, from epoch 42 on"
    assert bench.change("set", "", "train.lr 0.0001") == ("the setting train.lr is 0.0001, from epoch 42 on")
    assert bench.change("charter", "", "admit_by council 2/3", "oslo") == (
        "the rule admit_by is council 2/3, from epoch 42 on, asked for by Oslo"
    )


def test_invitations_and_those_that_are_taken_back_are_no_news() -> None:
    bench = Bench()
    assert bench.change("invite", "an invitation", "1 0 lab", "oslo") == ""
    assert bench.change("remove", "an invitation", "", "oslo") == ""
