"""Two sides of a fork have rounds of the same epoch and ballot: nothing of one is heard in the other (G2)."""

from dataclasses import replace

from simulation.shell import SimCrypto, sums_of
from simulation.world import Faults, World

from tapestry.node.protocol import events as ev
from tapestry.node.protocol.audit import mean_message
from tapestry.node.protocol.exchange import Mean
from tapestry.node.protocol.messages import Need, Result, Stage

OTHER = "ab" * 32  # the head of the other side
SUMS = sums_of(OTHER, contributors=4)


def in_exchange():
    """A node that waits for a shard that another reduces."""
    world = World(5, peers=4, faults=Faults()).start_all()

    def found():
        for node in world.nodes.values():
            round_ = node.core.round
            if round_ and round_.stage == Stage.EXCHANGING and len(round_.electorate) == 4:
                owed = round_.exchange._missing()
                for peer, (contribution, shards) in owed.items():
                    if not contribution:
                        return node, round_, peer, shards[0]
        return None

    world.until(lambda: found() is not None, 60)
    return world, *found()


def test_a_result_of_the_other_side_is_not_mixed_in():
    _, node, round_, reducer, shard = in_exchange()
    ballot = round_.exchange.roster.ballot
    late = Result(round_.epoch, OTHER, ballot, shard, OTHER, "the mean of other members", SUMS, "")
    node.feed(ev.Received(reducer, late))
    assert shard not in round_.exchange.results
    exchange = round_.exchange
    said = mean_message(round_.head, shard, OTHER, exchange.averaged)
    for signer, kept in ((node.name, False), (reducer, True)):
        signature = SimCrypto(signer).sign(said)
        ours = Result(round_.epoch, round_.head, ballot, shard, OTHER, "ours", SUMS, signature)
        node.feed(ev.Received(reducer, ours))
        assert (shard in exchange.results) == kept, "only its reducer can sign a mean"


def test_a_mean_that_was_ordered_on_the_other_side_is_dropped():
    _, node, round_, _, _ = in_exchange()
    exchange = round_.exchange
    exchange.reducing.add(0)
    exchange.results.pop(0, None)
    node.feed(ev.Reduced(round_.epoch, OTHER, exchange.members_ballot, 0, OTHER, "theirs", SUMS))
    assert 0 not in exchange.results


def test_who_asks_from_the_other_side_gets_nothing_of_ours():
    world, node, round_, reducer, _ = in_exchange()
    round_.exchange.results[0] = Mean(OTHER, "blob", SUMS, "")
    ballot = round_.exchange.roster.ballot
    for head, count in ((OTHER, 0), (round_.head, 1)):
        need = Need(round_.epoch, head, ballot, "", (0,))
        out = node.core.handle(ev.Received(reducer, need), world.now)
        assert sum(isinstance(o, ev.SendResult) for o in out) == count


def test_a_result_that_overtook_its_roster_is_asked_for_with_the_roster():
    _, node, round_, reducer, shard = in_exchange()
    exchange, ctx = round_.exchange, node.core.ctx
    later = replace(exchange.roster, ballot=exchange.roster.ballot + len(round_.electorate))
    ctx.out = []
    exchange.on_result(
        reducer, Result(round_.epoch, round_.head, later.ballot, shard, OTHER, "early", SUMS, "")
    )
    assert shard not in exchange.results  # whose it must be is not known yet
    exchange.start(later)
    asked = [out for out in ctx.out if isinstance(out, ev.Send) and isinstance(out.message, Need)]
    assert [(out.peer, out.message.ballot, out.message.shards) for out in asked] == [
        (reducer, later.ballot, (shard,))
    ]
