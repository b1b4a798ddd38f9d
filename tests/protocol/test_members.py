"""Who belongs to a run decides what its rounds wait for; in worlds without faults."""

from simulation.world import Faults, World

from tapestry.node.protocol import events as ev
from tapestry.node.protocol.members import Change
from tapestry.node.protocol.rules import Rules


def test_a_run_that_waits_for_a_second_member_takes_it_in_and_then_goes_on_with_both():
    world = World(1, peers=2, faults=Faults(), late=["p1"])
    world.rules = Rules(run_id=world.genesis.run_id, shard_count=2, min_members=2)
    world.start_all()
    founder = world.nodes["p0"]
    for _ in range(2000):
        world.step()
    assert world.epoch() == 0, "it was to start with two"
    founder.feed(ev.ChangeAsked(Change("admit", "p1", "", 1000, "0" * 32)))
    world.until(lambda: world.epoch() >= 4, 60)
    records = founder.core.chain.records
    assert [len(record.body.members) for record in records[:4]] == [1, 2, 2, 2]
    assert [change.kind for change in records[0].body.changes] == ["admit"]
