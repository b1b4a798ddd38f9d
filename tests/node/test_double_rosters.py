"""A proof of two rosters as a file: read back, proven from it alone, and refused in every broken form."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from signed_twice import CRYPTO, IDENTITY, RUN, check_that_every_broken_text_is_refused, prove_it

from tapestry.node.disk.accusations import FalseAccusation, keep, kept, signed_twice, unpack
from tapestry.node.disk.double_rosters import DoubleRoster
from tapestry.node.protocol.messages import Roster
from tapestry.node.protocol.receipts import TwoRosters, receipt_of, signed
from tapestry.node.protocol.record import Member

ME = IDENTITY.peer_id
ROSTER = Roster(6, "cd" * 32, 3, False, "ee" * 32, (Member(ME, 1, "aa" * 32, "11" * 16, 1),), (0, 0))


def double_roster(second: Roster) -> DoubleRoster:
    told = [signed(roster, RUN, ME, CRYPTO) for roster in (ROSTER, second)]
    one = signed_twice(TwoRosters(*[receipt_of(ME, roster, CRYPTO) for roster in told]))
    assert isinstance(one, DoubleRoster)
    return one


PROVEN = double_roster(replace(ROSTER, state_digest="ef" * 32))


def test_it_is_kept_once_whichever_was_told_first_and_proven_from_the_file(tmp_path: Path) -> None:
    turned = DoubleRoster.of(TwoRosters(PROVEN.proof.second, PROVEN.proof.first))
    assert turned == PROVEN
    assert (keep(tmp_path, PROVEN), keep(tmp_path, turned)) == ("new", "known")
    (path,) = kept(tmp_path)
    again = unpack(path.read_bytes())
    assert again == PROVEN and isinstance(again, DoubleRoster)
    prove_it(again)
    assert again.accused == ME and again.what == "signed two rosters: round 7, ballot 3"


@pytest.mark.parametrize(
    ("one", "run_id"),
    [(PROVEN, "ac" * 32), (double_roster(ROSTER), RUN), (double_roster(replace(ROSTER, ballot=4)), RUN)],
)
def test_of_another_run_or_ballot_or_the_same_roster_it_proves_nothing(
    one: DoubleRoster, run_id: str
) -> None:
    with pytest.raises(FalseAccusation):
        prove_it(one, run_id)


def test_every_broken_text_is_refused() -> None:
    check_that_every_broken_text_is_refused(PROVEN)
