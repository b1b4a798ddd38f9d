"""What happens to a node, told in sentences: for the page and whoever reads /history.

    lab-hanoi is not heard any more
    round 41 went on without lab-hanoi: 3 of 4 contributed, 0.4 s

It is told what the daemon's views see anyway, decides nothing, and writes into History. A peer is called what
`name_of` calls it (names.py): by its name, or by the end of its peer id where it has none. Peers are compared
once a second: a link that is back at once is no news. Round 41 is the one that makes epoch 41.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from tapestry.node.errors import printable
from tapestry.node.net.repeats import Repeats
from tapestry.node.protocol.members import Change
from tapestry.node.protocol.record import Body, Record
from tapestry.node.protocol.snapshot import Snapshot
from tapestry.node.surface.history import MEMBERS_SHOWN_MAX, History, Level, RecordSeen
from tapestry.node.surface.names import short

NAMES_MAX = 3  # in one sentence
CHANGE_LEVELS: dict[str, Level] = {"admit": "good", "remove": "warning"}  # of others: info
REPEAT_S = 60.0  # Guess: between two sentences of one kind about the same peers


class Story:
    """Of one node. `now` is of a monotonic clock, `at` is unix time."""

    def __init__(
        self,
        history: History,
        name_of: Callable[[str], str] = short,
        was_member: Callable[[str], bool] = lambda peer: True,  # or is one
    ) -> None:
        self._history = history
        self._name_of = name_of
        self._was_member = was_member
        self._up: dict[str, str] = {}  # linked peers, with the phase they said last
        self._before: Body | None = None  # the record before the newest
        self._last: Body | None = None
        self._repeats = Repeats(REPEAT_S)

    # --- this node -----------------------------------------------------------------------------

    def health(self, phase: str, reason: str) -> None:
        """It is another one than before: `phase` as in /status, or "working"."""
        if phase == "working":
            self._history.tell("this node is at the head of the run and trains", "good")
        elif phase != "stopping":
            self._history.tell(
                f"this node is {phase}: {reason}", "warning" if phase == "degraded" else "info"
            )

    def dropped(self, records: int, tokens: int, branch: str, hollow: bool) -> None:
        """A fork was left for a better chain, or because nobody gave its numbers."""
        kept = f"kept as the branch {branch}" if branch else "and not kept: the limits leave no room"
        epochs = "1 epoch" if records == 1 else f"{records} epochs"
        given_up = f"{epochs}, {tokens:,} tokens given up, {kept}"
        what = "this node left its chain for one with more work"
        if hollow:
            what = "this node went back to the record before an island's, whose updates nobody gave"
        self._history.tell(f"{what}: {given_up}", "warning")

    def unset(self, key: str, epoch: int) -> None:
        """The chain that this node has moved to does not have the change."""
        self._history.tell(f"the setting {key} is the run spec's again, at epoch {epoch}", "warning")

    def accused(self, peer: str, what: str) -> None:
        """A lie was proven."""
        self._history.tell(f"{self._name_of(peer)} is proven to have {what}", "warning")

    def rolled_back(self, epoch: int, to: int, why: str) -> None:
        """By the members' decision."""
        because = f", because {why}" if why else ""
        text = f"epoch {epoch}: the state is that of epoch {to} again{because}"
        self._history.tell(text, "warning")

    def withheld(self, peer: str, epoch: int, shard: int) -> None:
        """An audit is incomplete."""
        self._history.tell(
            f"{self._name_of(peer)} did not give this auditor its part of round {epoch}, shard {shard}: "
            "that proves nothing, for it may have restarted; if it goes on, ask its operator",
            "warning",
        )

    def unlike(self, peer: str, text: str) -> None:
        """Its contributions, for several rounds."""
        self._history.tell(f"{self._name_of(peer)}'s contributions are unlike all others: {text}", "warning")

    def gate(self, round_: int, outcome: str, worse: float, peer: str) -> None:
        """What came of measuring a result: protocol/events.py, Gated."""
        made, by = f"round {round_}", f"by {worse:.4f}"
        if outcome == "again":
            text = f"{made} is made again without {self._name_of(peer)}, whose contribution differed most"
            self._history.tell(f"{text}: the data of a majority spoke against the result", "warning")
        elif outcome == "refused":
            text = f"{made}: this node refused a result that makes its held-out loss worse {by}"
            self._history.tell(f"{text}; {self._name_of(peer)}'s contribution differed most", "warning")
        elif outcome == "went_on":
            text = f"{made}: a result that makes the held-out loss worse {by} was accepted all the same"
            self._history.tell(f"{text}: nothing more can be left out", "warning")

    def trainer(self, text: str, *, up: bool) -> None:
        self._history.tell(text, "good" if up else "warning")

    def losses(self, trouble: str) -> None:
        """They go apart; or, without trouble, no longer."""
        self._history.tell(
            trouble or "this node's validation loss no longer rises", "warning" if trouble else "good"
        )

    def refused(self, peer: str, reason: str, text: str) -> None:
        self._history.tell(f"something of {self._name_of(peer)} was refused ({reason}): {text}", "warning")

    # --- rounds --------------------------------------------------------------------------------

    def committed(self, record: Record, at: float) -> None:
        """A record that is on disk now."""
        body = record.body
        members = tuple((m.peer, m.weight) for m in body.members[:MEMBERS_SHOWN_MAX])
        count = len(body.members)
        self._history.record(
            RecordSeen(body.epoch, record.head, round(at, 2), record.ballot, body.forced, count, members)
        )
        self._history.contributed(body.epoch, [m.peer for m in body.members if m.weight])
        self._before, self._last = self._last, body

    def changed(self, body: Body) -> None:
        """What a record changes of who belongs to the run, of its rules and settings. Its roll is learnt.

        A rollback is told when the state has gone back.
        """
        for change in body.changes:
            text = self._change(change)
            if text:
                text = f"{text}, from epoch {body.epoch} on{self._asked(change)}"
                self._history.tell(text, CHANGE_LEVELS.get(change.kind, "info"))

    def _change(self, change: Change) -> str:
        """Nothing of invitations, and of those that are taken back: they are no news."""
        who, value = self._name_of(change.peer), printable(change.value)
        if change.kind == "admit":
            return f"{who} is a member"
        if change.kind == "remove" and self._was_member(change.peer):
            return f"{who} is no member any more" + (f", because {value}" if value else "")
        if change.kind == "rekey":
            return f"{self._name_of(value)} has another key: {short(value)} in place of {short(change.peer)}"
        if change.kind == "voice":
            return f"the voice of {who} is {value}"
        if change.kind == "set":
            return "the setting {} is {}".format(*value.split(" ", 1))
        if change.kind == "charter":
            return "the rule {} is {}".format(*value.split(" ", 1))
        return ""

    def _asked(self, change: Change) -> str:
        """Who signed for it, of the members: an invitation signs its guest's admission itself."""
        signers = [peer for peer, _ in change.signatures]
        if change.kind == "remove" and change.peer in signers:
            return ", as it asked for itself"
        by = [peer for peer in signers if self._was_member(peer)]
        return f", asked for by {self._names(by)}" if by else ""

    def round_ended(self, epoch: int, outcome: str, seconds: float | None, now: float) -> None:
        """The round from state `epoch`; its record, if it has one, was told before."""
        made = f"round {epoch + 1}"
        if outcome == "forced":
            self._history.tell(f"{made} was decided without a majority, as the run's rules allow", "warning")
        elif outcome == "missed":
            self._tell_at_times("missed", f"{made} was decided without a contribution of this node", now)
        elif outcome == "aborted":
            self._history.tell(f"{made} was given up: this node moves to another chain", "warning")
        elif self._last is not None and self._last.epoch == epoch + 1:
            self._tell_who(made, self._last, "" if seconds is None else f", {seconds:.1f} s", now)

    def _tell_who(self, made: str, body: Body, took: str, now: float) -> None:
        """Who is in the round's record, if it is not as it was."""
        if self._before is None or self._before.epoch != body.epoch - 1:
            return
        before = {m.peer: m.weight for m in self._before.members}
        there = [m.peer for m in body.members if m.weight]
        absent = [peer for peer, weight in before.items() if weight and peer not in there]
        new = [peer for peer in there if not before.get(peer)]
        all_of_it = len({*there, *(peer for peer, weight in before.items() if weight)})
        share = f"{len(there)} of {all_of_it}"
        if absent:
            text = f"{made} went on without {self._names(absent)}: {share} contributed{took}"
            self._tell_at_times(("absent", *absent), text, now)
        elif new:
            text = f"{self._names(new)} contributed to {made}: {share}{took}"
            self._tell_at_times(("new", *new), text, now)

    def _tell_at_times(self, key: object, text: str, now: float) -> None:
        """Where the same comes again round after round."""
        if self._repeats.may_tell(key, now):
            self._history.tell(text, "good" if isinstance(key, tuple) and key[0] == "new" else "warning")

    # --- peers ---------------------------------------------------------------------------------

    def peers(self, core: Snapshot) -> None:
        """Once a second: who has come, and who is gone."""
        up = {peer.peer_id: peer.phase for peer in core.peers if peer.phase}
        before, self._up = self._up, up
        came = [peer for peer in up if peer not in before]
        stopped = [peer for peer, phase in before.items() if peer not in up and phase == "stopping"]
        lost = [peer for peer, phase in before.items() if peer not in up and phase != "stopping"]
        if came:
            self._history.tell(f"{self._names(came)} {_are(came)} here", "good")
        if stopped:
            self._history.tell(f"{self._names(stopped)} left in good order")
        if lost:
            self._history.tell(f"{self._names(lost)} {_are(lost)} not heard any more", "warning")

    def _names(self, peers: Sequence[str]) -> str:
        names = [self._name_of(peer) for peer in peers[:NAMES_MAX]]
        if len(peers) > NAMES_MAX:
            names.append(f"{len(peers) - NAMES_MAX} more")
        return " and ".join([", ".join(names[:-1]), names[-1]]) if len(names) > 1 else names[0]


def _are(peers: Sequence[str]) -> str:
    return "is" if len(peers) == 1 else "are"
