"""Whether a roster is one leader's choice where others have a say: who it leaves out that a follower hears.

A quorum's worth of names is all that consensus asks of a roster. Two things follow from it that no single
leader may decide. Of few contributions the mean is what they are, whatever its rule: a leader that could name
itself alone would set the state to what it likes. And who is named decides the next round: a leader that
could name a bare quorum each time would shrink the electorate to itself and one other in a few records, and
then hold all others up for good, or worse.

So a follower does not follow the first such roster of a round. It goes on to the next ballot, whose leader
sees for itself who is there; and if that one does the same, it is how things are: perhaps only few have
something to give, or others have lost a line that we have. That costs a ballot where a pair does
not hear each other, and no more. The same holds for a leader that makes another value where one was accepted.

An opinion of this node, by which nothing is decided but what it votes for. Pure.
"""

from __future__ import annotations

from tapestry.node.protocol.audit import names_few
from tapestry.node.protocol.messages import Roster, Stage
from tapestry.node.protocol.round_state import RoundState

LEADERS = 2  # that have to find the same
LATELY = 16  # rounds for which it is remembered whom a leader left out. Guess


def is_followed(state: RoundState, leader: str, roster: Roster, now: float) -> bool:
    """Whether this follower goes by the roster: nothing in it is narrow; or another leader of this round
    named few as well, or did without the same electors of late; or we did, when it was on us.

    Where we hear no quorum of the electors, as at the rim of a star, nobody but this leader could lead.
    """
    ctx = state.ctx
    if roster.forced or ctx.me not in state.electorate:
        return True
    if sum(ctx.heard(p, now) for p in state.voters) < state.need:
        return True
    agreed = True
    if missing := left_out(state, roster, now):
        state.shut_out.update(dict.fromkeys(missing))
        state.leave_out[leader] = None
        without = [len(_leaders_without(state, peer, leader)) for peer in missing]
        agreed = len(state.leave_out) >= LEADERS or min(without) >= LEADERS
    if _counts_few(state, roster):
        state.narrowed[leader] = None
        agreed = agreed and len(state.narrowed) >= LEADERS
    return agreed


def leaves_accepted(state: RoundState, leader: str, roster: Roster, now: float) -> bool:
    """Whether this leader makes another value of a round in which we accepted one, and no other leader does
    the same. One that has tried that value for a while may have found that nobody gives it: that is believed
    some times, as movers.py counts them.

    Whom a roster names has told it so in READY. Another value has another head, and so other draws: a
    leader could lie, see who would look at it, and begin anew. With a gate it may have to (leader.py).
    """
    if state.vote.accepted is None or roster.forced or state.ctx.rules.gate_margin is not None:
        return False
    if state.ctx.me not in state.voters:
        return False
    has_tried = now - state.proposed.get(leader, now) >= state.ctx.rules.stall_s / 2
    if has_tried and state.ctx.movers.is_excused(leader):
        return False
    state.unheeding[leader] = None
    return len(state.unheeding) < LEADERS


def note_own(state: RoundState, roster: Roster, now: float) -> None:
    """What this leader had to do itself: it named all that were ready."""
    named = {m.peer for m in roster.members}
    for peer in state.electorate:
        if peer not in named and state.ctx.heard(peer, now):
            state.leave_out[state.ctx.me] = None
            _leaders_without(state, peer, state.ctx.me)
    if names_few(roster.members):
        state.narrowed[state.ctx.me] = None


def _leaders_without(state: RoundState, peer: str, leader: str) -> list[str]:
    """Who did without `peer` lately, `leader` among them from now on."""
    known = state.ctx.without.setdefault(peer, {})
    known[leader] = state.epoch
    for other in [p for p, epoch in known.items() if not state.epoch - LATELY < epoch <= state.epoch]:
        del known[other]
    return list(known)


def _counts_few(state: RoundState, roster: Roster) -> bool:
    """Few contributions, without some that counted in the record before."""
    named = {m.peer for m in roster.members if m.weight}
    return names_few(roster.members) and not named.issuperset(state.before.intersection(state.electorate))


def left_out(state: RoundState, roster: Roster, now: float) -> list[str]:
    """Electors that we hear are ready: an honest leader names them, if only as voters. Not one that says it
    is ready and was in no record for many rounds, or that led a ballot of this round and only pretended to:
    so whoever only says something costs the others less and less."""
    ctx, named = state.ctx, {m.peer for m in roster.members}
    return [
        p
        for p in state.electorate
        if p not in named
        and p not in state.pretenders
        and ctx.deserves(p)
        and ctx.heard(p, now)
        and ctx.is_within(p, state.epoch, state.head, roster.ballot)
        and ctx.stage_at(p, state.epoch, state.head) >= Stage.READY
    ]
