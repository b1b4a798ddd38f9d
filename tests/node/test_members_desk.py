"""What the operator's commands are told that would do harm, or nothing."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from tapestry.dht.identity import Identity
from tapestry.node.daemon.members_desk import LAST_AUTHORITY, MembersDesk
from tapestry.node.lineage.crypto import NodeCrypto
from tapestry.node.protocol.members import Charter, first_roll
from tapestry.node.protocol.strict import Malformed

RUN = "ab" * 32
FOUNDER, OTHER, THIRD = (
    Identity(Ed25519PrivateKey.from_private_bytes(bytes([number]) * 32)) for number in (1, 2, 3)
)


class FakeLoop:
    def __init__(self, charter: Charter) -> None:
        self.fed: list[Any] = []
        peers = [FOUNDER.peer_id, OTHER.peer_id]
        self._roll = replace(first_roll(RUN, charter, peers), council=(FOUNDER.peer_id,))

    def snapshot(self) -> Any:
        return SimpleNamespace(roll=self._roll, chain_epoch=5, pending=(), run_id=RUN)

    def feed(self, event: Any) -> None:
        self.fed.append(event)


def asked(
    kind: str, peer: str, value: str = "", charter: Charter | None = None, no_effect: str = ""
) -> tuple[dict[str, Any], int]:
    """The answer, and how many changes the node then asks for."""
    loop = FakeLoop(charter or Charter())
    desk = MembersDesk(loop, FOUNDER.peer_id, NodeCrypto(FOUNDER), (), lambda key: no_effect)  # type: ignore[arg-type]
    return desk.do({"do": "ask", "kind": kind, "peer": peer, "value": value}), len(loop.fed)


def test_the_last_who_decides_does_not_leave_the_others_without_anybody_who_does() -> None:
    assert asked("remove", FOUNDER.peer_id) == ({"fault": LAST_AUTHORITY}, 0)
    assert asked("remove", OTHER.peer_id)[1] == 1
    assert asked("remove", FOUNDER.peer_id, charter=Charter(admit_by="majority"))[1] == 1


@pytest.mark.parametrize(
    ("kind", "peer", "value"),
    [
        ("admit", THIRD.peer_id[:-1], ""),
        ("admit", "hanoi", ""),
        ("rekey", OTHER.peer_id, THIRD.peer_id[:-2]),
        ("rekey", OTHER.peer_id, ""),
    ],
)
def test_a_mistyped_id_gets_no_seat(kind: str, peer: str, value: str) -> None:
    with pytest.raises(Malformed, match="is no peer id"):
        asked(kind, peer, value)
    assert asked(kind, THIRD.peer_id if kind == "admit" else OTHER.peer_id, THIRD.peer_id)[1] == 1


def test_a_setting_that_would_change_nothing_in_this_run_is_not_asked_for() -> None:
    change = ("set", "", "train.accumulation 4")
    assert asked(*change)[1] == 1
    assert asked(*change, no_effect="this run takes inner steps") == (
        {"fault": "this run takes inner steps"},
        0,
    )
