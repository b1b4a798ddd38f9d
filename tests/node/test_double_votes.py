"""A proof of two votes as a file: read back, proven from the file alone, and refused in every broken form."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from signed_twice import CRYPTO, IDENTITY, RUN, check_that_every_broken_text_is_refused, prove_it

from tapestry.node.disk.accusations import FalseAccusation, keep, kept, unpack
from tapestry.node.disk.double_votes import DoubleVote
from tapestry.node.protocol.equivocation import Equivocation
from tapestry.node.protocol.record import Body, Member, accept_message, head_of


def double_vote(second_ballot: int = 3) -> DoubleVote:
    member = Member(IDENTITY.peer_id, 1, "aa" * 32, "11" * 16, 1)
    first = Body(RUN, 7, "cd" * 32, "ee" * 32, (member,), "01" * 32)
    bodies = first, replace(first, result="02" * 32)
    signatures = [
        CRYPTO.sign(accept_message(head_of(body, CRYPTO), ballot))
        for body, ballot in zip(bodies, (3, second_ballot), strict=True)
    ]
    return DoubleVote.of(Equivocation(IDENTITY.peer_id, 3, bodies, (signatures[0], signatures[1])))


def test_it_is_kept_once_whichever_vote_came_first_and_proven_from_the_file(tmp_path: Path) -> None:
    one = double_vote()
    p = one.proof
    turned = DoubleVote.of(replace(p, bodies=p.bodies[::-1], signatures=p.signatures[::-1]))
    assert (keep(tmp_path, one), keep(tmp_path, turned)) == ("new", "known")
    (path,) = kept(tmp_path)
    again = unpack(path.read_bytes())
    assert again == one and isinstance(again, DoubleVote)
    prove_it(again)
    assert again.accused == IDENTITY.peer_id and again.what == "signed two values: round 7, ballot 3"


@pytest.mark.parametrize(("one", "run_id"), [(double_vote(second_ballot=4), RUN), (double_vote(), "ac" * 32)])
def test_votes_of_two_ballots_or_of_another_run_prove_nothing(one: DoubleVote, run_id: str) -> None:
    with pytest.raises(FalseAccusation):
        prove_it(one, run_id)


def test_every_broken_text_is_refused() -> None:
    check_that_every_broken_text_is_refused(double_vote())
