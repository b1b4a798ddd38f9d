"""What a message of a round cannot honestly say, given what the round starts from. Pure.

Each function returns why a message is refused, in a word that counters use; None if it may be heard.
"""

from __future__ import annotations

from tapestry.node.protocol.acceptor import body_of
from tapestry.node.protocol.agreement import ALIKE
from tapestry.node.protocol.canon import InvalidRecord, quorum
from tapestry.node.protocol.exchange import check_roster
from tapestry.node.protocol.messages import Ready, Receipt, Roster
from tapestry.node.protocol.place import body_fault, waits
from tapestry.node.protocol.receipts import is_signed
from tapestry.node.protocol.record import Body, member_from
from tapestry.node.protocol.round_state import RoundState

NO_RESULT = "0" * 64  # of a roster: its mean is not known yet


def ready_fault(state: RoundState, peer: str, ready: Ready) -> str | None:
    """Why a record could not be made of this READY."""
    if ready.state_digest != state.state_digest:
        return "state_digest"
    if (ready.accepted is None) != (ready.accepted_ballot < 0) or ready.accepted_ballot > ready.ballot:
        return "malformed"
    try:
        member_from((peer, ready.weight, ready.contribution, ready.life, ready.weight, ready.seat))
    except InvalidRecord as e:
        return e.reason
    return value_fault(state, ready.accepted) if ready.accepted is not None else None


def value_fault(state: RoundState, body: Body) -> str | None:
    """Why `body` cannot have been accepted in this round."""
    if body.forced:
        return "forced"
    if body.state_digest != state.state_digest:
        return "state_digest"
    return _body_fault(state, body)


def _body_fault(state: RoundState, body: Body) -> str | None:
    """As every record is judged, and by what we know of who has left."""
    fault = body_fault(body, state.at, state.ctx.rules.max_influence, state.ctx.crypto)
    return fault or _unheard_leave(state, body)


def _unheard_leave(state: RoundState, body: Body) -> str | None:
    """Of two electors a body may name one alone only if the other has left (handover.py). An elector knows
    whether it did, or has heard it; what it accepted once it may accept again."""
    electorate, known = state.electorate, state.vote.left or state.handover is not None
    if known or body.forced or state.ctx.me not in electorate or body == state.vote.accepted:
        return None
    named = sum(m.peer in electorate for m in body.members)
    return None if named >= quorum(len(electorate)) else "electorate"


def roster_fault(state: RoundState, roster: Roster) -> str | None:
    """Why no record could be made of this roster."""
    if check_roster(roster, state.electorate, state.ctx.rules.shard_count) is not None:
        return "roster"
    fewest = 1 if roster.changes else state.ctx.contributors_min()
    if sum(m.weight > 0 for m in roster.members) < fewest:
        return "roster"
    if roster.state_digest != state.state_digest:
        return "state_digest"
    if roster.forced and waits(state.at, state.ctx.rules.on_quorum_loss):
        return "forced"
    return _body_fault(state, body_of(state, roster, NO_RESULT, ALIKE))


def signed_fault(state: RoundState, receipt: Receipt) -> str | None:
    """Why a leader does not stand by the roster of which this is the receipt: receipts.py."""
    ctx, seats = state.ctx, state.at.seats
    if not is_signed(receipt, ctx.rules.run_id, ctx.crypto):
        return "roster_signature"
    known = any(peer == receipt.leader for peer, _ in seats)
    return "seat" if known and (receipt.leader, receipt.life) not in seats else None
