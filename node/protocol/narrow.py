"""Whether a roster is one leader's choice where others have a say: who it leaves out that a follower hears.

A quorum's worth of names is all that consensus asks of a roster. Two things follow from it that no single
leader may decide. Of few contributions the mean is what they are, whatever its rule: a leader that could name
itself alone would set the state to what it likes. And who is named decides the next round: a leader that
could name a bare quorum each time would shrink the electorate to itself and one other in a few records, and
then hold all others up for good, or worse.

So a follower does not follow the first such roster of a round. It goes on to the next ballot, whose leader
sees for itself who is there; and once more leaders do the same than may lie, it is how things are: perhaps
only few have something to give, or all but we have lost the same line. That costs a ballot where a pair does
not hear each other, and no more. The same holds for a leader that makes another value where one was accepted.

An opinion of this node, by which nothing is decided but what it votes for. Pure.
"""

from __future__ import annotations

from tapestry.node.protocol.audit import names_few
from tapestry.node.protocol.messages import Roster, Stage
from tapestry.node.protocol.round_state import RoundState

LEADERS_MIN = 2  # that have to agree, however few electors there are
LATELY = 16  # rounds for which it is remembered whom a leader left out. Guess


def is_followed(state: RoundState, leader: str, roster: Roster, now: float) -> bool:
    """Whether this follower goes by the roster: nothing in it is narrow; or enough leaders of this round had
    to do the same, or to do without the same electors of late; we among them, when it was on us.

    Where we hear no quorum of the electors, as at the rim of a star, nobody but this leader could lead.
    """
    ctx = state.ctx
    if roster.forced or ctx.me not in state.electorate:
        return True
    if sum(ctx.heard(p, now) for p in state.voters) < state.need:
        return True
    need = leaders_needed(len(state.electorate))
    agreed = True
    if missing := left_out(state, roster, now):
        state.shut_out.update(dict.fromkeys(missing))
        state.leave_out[leader] = None
        without = [len(_leaders_without(state, peer, leader)) for peer in missing]
        agreed = len(state.leave_out) >= need or min(without) >= need
    if _counts_few(state, roster):
        state.narrowed[leader] = None
        agreed = agreed and len(state.narrowed) >= need
    return agreed


def leaves_accepted(state: RoundState, leader: str, roster: Roster, now: float) -> bool:
    """Whether this leader makes another value of a round in which we accepted one, has not tried that one
    long enough to find that nobody gives it, and no other leader does the same.

    Whom a roster names has told it so in READY. Another value has another head, and so other draws: a
    leader could lie, see who would look at it, and begin anew. With a gate it may have to (leader.py).
    """
    if state.vote.accepted is None or roster.forced or state.ctx.rules.gate_margin is not None:
        return False
    if state.ctx.me not in state.voters:
        return False
    if now - state.proposed.get(leader, now) >= state.ctx.rules.stall_s / 2:
        return False
    state.unheeding[leader] = None
    return len(state.unheeding) < 2


def note_own(state: RoundState, roster: Roster) -> None:
    """What this leader had to do itself."""
    named = {m.peer for m in roster.members}
    for peer in state.electorate:
        if peer not in named:
            state.leave_out[state.ctx.me] = None
            _leaders_without(state, peer, state.ctx.me)
    if names_few(roster.members):
        state.narrowed[state.ctx.me] = None


def _leaders_without(state: RoundState, peer: str, leader: str) -> list[str]:
    """Who did without `peer` lately, `leader` among them from now on."""
    known = state.ctx.without.setdefault(peer, {})
    known[leader] = state.epoch
    return [p for p, epoch in known.items() if epoch + LATELY > state.epoch]


def leaders_needed(electors: int) -> int:
    """So many leaders are not all liars, if fewer than a third of the electors are."""
    return max(LEADERS_MIN, (electors - 1) // 3 + 1)


def _counts_few(state: RoundState, roster: Roster) -> bool:
    """Few contributions, without some that counted in the record before."""
    named = {m.peer for m in roster.members if m.weight}
    return names_few(roster.members) and not named.issuperset(state.before.intersection(state.electorate))


def left_out(state: RoundState, roster: Roster, now: float) -> list[str]:
    """Electors that an honest leader would have named, as far as we hear: every elector that is ready is
    named, if only as a voter, and who is not ready yet is waited for. Not one that says it is there and was
    in no record for many rounds, or that led a ballot of this round and only pretended to: so whoever only
    says something costs the others less and less."""
    named = {m.peer for m in roster.members}
    missing = [p for p in state.electorate if p not in named and p not in state.pretenders]
    return [p for p in missing if state.ctx.deserves(p) and _is_there(state, p, roster.ballot, now)]


def _is_there(state: RoundState, peer: str, ballot: int, now: float) -> bool:
    ctx = state.ctx
    if not ctx.heard(peer, now) or not ctx.is_within(peer, state.epoch, state.head, ballot):
        return False
    if ctx.stage_at(peer, state.epoch, state.head) >= Stage.READY:
        return True
    since = state.quorum_ready_at
    patient = since is not None and now - since >= ctx.pace.straggler_wait_s() / 2  # its clock began before
    return not patient
