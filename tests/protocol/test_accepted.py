"""A value that a member says it had accepted counts only with the signatures of those who made it."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

from simulation.shell import SimCrypto
from simulation.world import World

from tapestry.node.protocol.acceptor import Acceptor
from tapestry.node.protocol.audit import SignedMean, inputs_digest, mean_message, means_fault, result_digest
from tapestry.node.protocol.events import FetchUpdate, PersistVote, Vote
from tapestry.node.protocol.messages import Accept, Propose
from tapestry.node.protocol.record import Body, Member, head_of

RUN, HEAD = "aa" * 32, "bb" * 32
CRYPTO = SimCrypto("p0")
DIGESTS = ("c1" * 32, "c2" * 32)
MEMBERS = (Member("p0", 8, "d0" * 32, "", 8), Member("p1", 8, "d1" * 32, "", 8))
BODY = Body(RUN, 4, HEAD, "ee" * 32, MEMBERS, result_digest(DIGESTS, CRYPTO))


def made(
    *reducers: str,
    members: tuple[Member, ...] = MEMBERS,
    head: str = HEAD,
    digests: tuple[str, ...] = DIGESTS,
) -> list[SignedMean]:
    inputs = inputs_digest(members, CRYPTO)
    rows = enumerate(zip(reducers, digests, strict=False))
    return [
        SignedMean(p, digest, SimCrypto(p).sign(mean_message(head, shard, digest, inputs)))
        for shard, (p, digest) in rows
    ]


def fault(means: list[SignedMean]) -> str:
    return means_fault(BODY, means, 2, CRYPTO) or ""


def test_who_made_a_value_has_signed_each_shard_of_it_for_this_round_and_these_inputs() -> None:
    assert not fault(made("p0", "p1")) and not fault(made("p1", "p1"))
    assert "1 means" in fault(made("p0"))
    assert "another result" in fault(made("p0", "p1", digests=("c1" * 32, "c3" * 32)))
    assert "shard 1 is signed by p2, who is not in the round" in fault(made("p0", "p2"))
    assert "the signature of shard 0 is not that of p0" in fault(made("p0", "p1", head="b1" * 32))
    assert "the signature of shard 0" in fault(made("p0", "p1", members=MEMBERS[:1]))
    forged = made("p0", "p0")
    assert "the signature of shard 1 is not that of p1" in fault(
        [forged[0], forged[1]._replace(reducer="p1")]
    )


def test_in_the_simulator_no_record_comes_of_numbers_that_nobody_made_and_rounds_go_on() -> None:
    def lies(world: World) -> bool:
        return bool(world.inventors.name) and not world.inventors.signs

    worlds = [world for world in map(World, range(60)) if lies(world)][:4]
    assert sum(world.run().inventors.said for world in worlds) > 0


def test_values_that_are_proposed_in_turn_while_they_are_fetched_do_not_displace_each_other() -> None:
    """`fetched` keeps one value, for the audit alone: a vote goes by what is proposed when a value comes."""
    other = replace(BODY, result="f0" * 32)
    heads = head_of(BODY, CRYPTO), head_of(other, CRYPTO)
    means, out = tuple(made("p0", "p1")), list[object]()
    ctx: Any = SimpleNamespace(
        me="p0",
        peers={"p1": None},
        crypto=CRYPTO,
        emit=out.append,
        send=lambda peer, message: out.append(message),
        pace=SimpleNamespace(exchange_began=lambda epoch, now: None),
    )
    state: Any = SimpleNamespace(ctx=ctx, epoch=3, head=HEAD, leading=False, leader="p1", refused="")
    state.vote = Vote(3, HEAD, 0, -1, None, "")
    state.exchange = SimpleNamespace(progress=0)
    acceptor = Acceptor(state)
    for ballot, body in ((1, BODY), (2, other), (3, BODY)):
        state.ballot, state.accepted_body = ballot, None
        assert acceptor.follow_proposal(Propose(3, HEAD, ballot, body, ("p1",)), 0.0) is None
    asked = [one.head for one in out if isinstance(one, FetchUpdate)]
    assert asked == [heads[0], heads[1], heads[0]]
    acceptor.on_update_fetched(heads[1], means)  # late, of the ballot before
    assert state.accepted_body is None and list(acceptor.fetched) == [heads[1]]
    acceptor.on_update_fetched(heads[0], means)
    assert state.accepted_body == BODY and [type(one) for one in out[-2:]] == [PersistVote, Accept]
