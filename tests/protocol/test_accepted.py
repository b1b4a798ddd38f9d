"""A value that a member says it had accepted counts only with the signatures of those who made it."""

from __future__ import annotations

from simulation.shell import SimCrypto
from simulation.world import World

from tapestry.node.protocol.audit import SignedMean, inputs_digest, mean_message, means_fault, result_digest
from tapestry.node.protocol.chain import Body, Member

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
