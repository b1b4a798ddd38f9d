"""What a message of a round cannot honestly say, given what the round starts from. Pure.

Each function returns why a message is refused, in a word that counters use; None if it may be heard.
"""

from __future__ import annotations

from tapestry.node.protocol.chain import Body, InvalidRecord, exceeds_influence, member_from, quorum
from tapestry.node.protocol.exchange import check_roster
from tapestry.node.protocol.messages import Ready, Roster
from tapestry.node.protocol.round_state import RoundState


def ready_fault(state: RoundState, peer: str, ready: Ready) -> str | None:
    """Why a record could not be made of this READY."""
    if ready.state_digest != state.state_digest:
        return "state_digest"
    if (ready.accepted is None) != (ready.accepted_ballot < 0) or ready.accepted_ballot > ready.ballot:
        return "malformed"
    try:
        member_from((peer, ready.weight, ready.contribution, ready.life))
    except InvalidRecord as e:
        return e.reason
    return value_fault(state, ready.accepted) if ready.accepted is not None else None


def value_fault(state: RoundState, body: Body) -> str | None:
    """Why `body` cannot have been accepted in this round."""
    if body.run_id != state.ctx.rules.run_id or body.epoch != state.epoch + 1 or body.prev != state.head:
        return "unlinked"
    if body.forced:
        return "forced"
    if body.state_digest != state.state_digest:
        return "state_digest"
    peers = {m.peer for m in body.members}
    if sum(p in peers for p in state.electorate) < quorum(len(state.electorate)):
        return "electorate"
    if exceeds_influence([m.weight for m in body.members], state.ctx.rules.max_influence):
        return "influence"
    return None


def roster_fault(state: RoundState, roster: Roster) -> str | None:
    if check_roster(roster, state.electorate, state.ctx.rules.shard_count) is not None:
        return "roster"
    if exceeds_influence([m.weight for m in roster.members], state.ctx.rules.max_influence):
        return "influence"
    return "state_digest" if roster.state_digest != state.state_digest else None
