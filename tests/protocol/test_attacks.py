"""One malicious peer: whatever it says, the core neither raises nor stops, and its tables stay small."""

import random
from dataclasses import replace

import pytest
from simulation.lies import STRANGER, draw_lie
from simulation.shell import Disk, Mean, Node
from simulation.world import Faults, SimCrypto, World, digest

from tapestry.node.protocol import events as ev
from tapestry.node.protocol.agreement import ALIKE, PPM, SUM_MAX, ShardSums
from tapestry.node.protocol.canon import EPOCH_MAX, WEIGHT_MAX
from tapestry.node.protocol.core import Core
from tapestry.node.protocol.messages import (
    Accept,
    Call,
    Commit,
    GetRecords,
    Need,
    Propose,
    Ready,
    Records,
    Roster,
    Shard,
    Stage,
    Status,
)
from tapestry.node.protocol.record import (
    BALLOT_MAX,
    Body,
    Member,
    Record,
    accept_message,
    draw_message,
    head_of,
    seat_message,
)
from tapestry.node.protocol.rules import Rules
from tapestry.node.protocol.sync import Branch

HEX = "ab" * 32


def swarm(peers: int = 4, **rules) -> World:
    """A healthy swarm in the middle of its fourth round or later, all of them electors."""
    world = World(7, peers=peers, faults=Faults(), rules=quick(**rules)).start_all()
    world.until(lambda: all(n.core.round and len(n.core.round.electorate) == peers for n in nodes(world)), 30)
    return world


def quick(**rules) -> Rules:
    run_id = World(7, peers=1, faults=Faults()).genesis.run_id
    waits = {"straggler_wait_s": 1.0, "closing_grace_s": 0.5, "stall_s": 3.0, "quorum_loss_s": 8.0}
    return Rules(run_id=run_id, shard_count=3, **{**waits, "exchange_max_s": 12.0, **rules})


def nodes(world: World):
    return list(world.nodes.values())


def says(world: World, liar: str, message) -> None:
    for node in nodes(world):
        if node.name != liar and node.core is not None:
            if liar not in node.core.ctx.peers:
                node.feed(ev.PeerUp(liar))
            node.feed(ev.Received(liar, message))


def goes_on(world: World, epochs: int = 3, limit_s: float = 60.0) -> float:
    goal = world.epoch() + epochs
    return world.until(
        lambda: all(n.core is None or n.core.chain.epoch >= goal for n in nodes(world)), limit_s
    )


def forced_record(core: Core, signer: str, weight: int = WEIGHT_MAX) -> Record:
    crypto = SimCrypto(signer)
    body = Body(
        core.chain.genesis.run_id,
        core.chain.epoch + 1,
        core.chain.head,
        core.sync.state_digest,
        (Member(signer, weight, "cd" * 16, "", weight),),
        HEX,
        True,
    )
    head = head_of(body, crypto)
    vote, draw = crypto.sign(accept_message(head, 1)), crypto.sign(draw_message(head))
    return Record(body, head, 1, ((signer, vote),), None, ((signer, draw),))


# --- records ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("carrier", ["commit", "records"])
def test_a_stranger_cannot_force_a_record(carrier):
    world = swarm()
    core = nodes(world)[0].core
    record = forced_record(core, STRANGER)
    says(world, STRANGER, Commit(record) if carrier == "commit" else Records(core.chain.epoch, (record,)))
    assert all(n.core.chain.head != record.head for n in nodes(world))
    assert world.refused["not_member"] == len(nodes(world))
    goes_on(world)


def test_a_run_that_waits_refuses_forced_records_even_by_an_elector():
    world = swarm(on_quorum_loss="wait")
    record = forced_record(nodes(world)[0].core, "p3")
    says(world, "p3", Commit(record))
    assert all(n.core.chain.head != record.head for n in nodes(world))
    assert world.refused["forced"] == 3


def test_a_leader_that_lifts_the_cap_is_not_followed():
    world = swarm(max_influence=0.5)
    world.until(lambda: all(n.core.round and n.core.round.stage == Stage.READY for n in nodes(world)), 60)
    round_ = nodes(world)[0].core.round
    members = tuple(
        Member(n.name, 1, n.core.round.exchange.mine.contribution, n.disk.life, 1) for n in nodes(world)
    )
    members = (replace(members[0], weight=100), *members[1:])
    lie = Roster(
        round_.epoch, round_.head, round_.state.ballot, False, round_.state.state_digest, members, (0, 1, 2)
    )
    says(world, round_.state.leader, lie)
    assert world.refused["weights"] == 3
    goes_on(world)


def test_records_that_extend_nothing_we_have_are_ignored():
    world = swarm()
    record = nodes(world)[0].core.chain.records[-1]
    for epoch in (-1, -(10**9), EPOCH_MAX):
        says(world, STRANGER, Records(epoch, (record,)))
        says(world, STRANGER, Status(epoch, HEX, epoch, "x", Stage.READY, 0, 0, ()))
        says(world, STRANGER, GetRecords(((epoch, HEX),)))
    goes_on(world)


def test_one_peers_records_do_not_drop_anothers_branch():
    world = swarm()
    sync = nodes(world)[0].core.sync
    branch = sync.branches["p1"] = Branch(0, list(sync.chain.records[:1]), sync.chain.place_at(1), world.now)
    says(world, STRANGER, Records(0, (sync.chain.records[0],)))
    assert sync.branches == {"p1": branch}


def test_our_own_records_sent_to_us_from_the_first_on_are_not_kept():
    """By one that says that it is far ahead: each page could be the beginning of a fork."""
    world = swarm()
    world.until(lambda: world.epoch() >= 10, 60)
    node = nodes(world)[0]
    sync = node.core.sync
    records = list(sync.chain.records)
    says(world, "p1", Status(10**6, HEX, 10**6, "x", Stage.TRAINING, 0, 0, ()))
    for at in range(0, 9, 3):
        node.feed(ev.Received("p1", Records(at, tuple(records[at : at + 3]))))
        assert sync.branches["p1"].records == [] and sync.branches["p1"].common == at + 3
        assert sync._locator("p1")[0] == (at + 3, records[at + 2].head)  # it is asked for what follows
    node.feed(ev.Received("p1", Records(3, tuple(records[3:6]))))  # sent twice
    assert sync.branches["p1"].common == 9


def test_a_liar_about_its_epoch_keeps_no_joiner_from_a_state():
    world = World(7, peers=4, faults=Faults(), rules=quick(), updates_kept=2)
    late = world.nodes["p3"]
    for node in nodes(world)[:3]:
        node.start()
    world.until(lambda: world.epoch() >= 12, 60)
    late.start()
    late.feed(ev.PeerUp(STRANGER))

    def lie() -> None:
        late.feed(ev.Received(STRANGER, Status(EPOCH_MAX, HEX, EPOCH_MAX, "x", Stage.READY, 0, 0, ())))
        world.later(0.5, late, lie)

    lie()
    assert world.until(lambda: late.core.sync.at_head, 30) < world.rules.stall_s + 6.0


# --- ballots ----------------------------------------------------------------------------------------


def test_a_strangers_ballot_is_nobodys():
    world = swarm()
    core = nodes(world)[0].core
    before = [n.core.round.ballot for n in nodes(world)]
    epoch, head, state = core.chain.epoch, core.chain.head, core.sync.state_digest
    says(world, STRANGER, Status(epoch, head, epoch, "x", Stage.READY, BALLOT_MAX, 0, ()))
    for ballot in range(BALLOT_MAX - 8, BALLOT_MAX):
        says(world, STRANGER, Call(epoch, head, ballot, False))
        says(world, STRANGER, Ready(epoch, head, ballot, False, state, "", 0, 0.0, -1, None))
    assert [n.core.round.ballot for n in nodes(world)] == before


def test_an_elector_cannot_use_up_the_ballots_of_a_round():
    world = swarm()
    core = nodes(world)[0].core
    epoch, head = core.chain.epoch, core.chain.head
    for _ in range(50):
        says(world, "p3", Status(epoch, head, epoch, "x", Stage.READY, BALLOT_MAX, 0, ()))
        for ballot in range(BALLOT_MAX - 4, BALLOT_MAX + 1):
            says(world, "p3", Call(epoch, head, ballot, False))
    assert max(n.core.round.ballot for n in nodes(world)) < 2**17
    goes_on(world, limit_s=20)


def test_ballots_far_apart_meet_step_by_step():
    world = swarm()
    for node in nodes(world)[:3]:
        node.core.round.acceptor.enter(10 * 2**16, world.now)
    goes_on(world, epochs=1, limit_s=30)


def test_a_stranger_that_is_asked_by_nobody_leads_no_forced_ballot():
    world = swarm()
    for name in ("p1", "p2", "p3"):
        world.nodes[name].crash()
    lone = world.nodes["p0"]
    world.until(lambda: lone.core.round.quorum_lost_at is not None, 8)
    world.until(lambda: world.now - lone.core.round.quorum_lost_at > 5.0, 10)
    core = lone.core
    says(world, STRANGER, Call(core.chain.epoch, core.chain.head, core.round.ballot + 1, True))
    assert world.refused["not_member"] == 1


# --- a round ----------------------------------------------------------------------------------------


def test_a_ready_that_would_poison_the_record_is_refused():
    world = swarm()
    core = nodes(world)[0].core
    epoch, head, state = core.chain.epoch, core.chain.head, core.sync.state_digest
    for weight, contribution in (
        (5, ""),
        (0, "cd" * 16),
        (-5, "cd" * 16),
        (2 * WEIGHT_MAX, "cd" * 16),
        (5, "zz"),
    ):
        for ballot in range(core.round.ballot, core.round.ballot + 4):
            says(world, "p3", Ready(epoch, head, ballot, False, state, contribution, weight, 0.0, -1, None))
    assert world.refused["malformed"] >= 3
    assert all(r.weight >= 0 for n in nodes(world) for r in n.core.round.state.ready.values())
    goes_on(world)


def test_a_ready_is_of_one_mind_about_what_it_accepted():
    """Else a huge accepted_ballot without a value hides the value that a quorum may have chosen."""
    world = swarm()
    core = nodes(world)[0].core
    epoch, head, state = core.chain.epoch, core.chain.head, core.sync.state_digest
    leader = world.nodes[core.round.state.leader_of(core.round.ballot)]
    for liar in (n.name for n in nodes(world) if n is not leader):
        ready = Ready(epoch, head, leader.core.round.ballot, False, state, "", 0, 0.0, 99, None)
        leader.feed(ev.Received(liar, ready))
    assert world.refused["malformed"] == 3


def test_an_accepted_value_that_nobody_serves_costs_a_ballot_not_the_round():
    world = swarm()
    liar = "p3"
    world.nodes[liar].crash()
    core = nodes(world)[0].core
    peers = ("p0", "p1", "p2", "p3")

    def seated(head: str) -> tuple[Member, ...]:
        seats = {p: SimCrypto(p).sign(seat_message(head, "")) for p in peers}
        return tuple(Member(p, 1, "cd" * 32, "", 1, seats[p]) for p in peers)

    def lie() -> None:
        for node in nodes(world):
            if node.core is None or node.core.round is None:
                continue
            if liar not in node.core.ctx.peers or not node.core.ctx.peers[liar].up:
                node.feed(ev.PeerUp(liar))
            round_ = node.core.round
            if round_ is not None and round_.state.leading:
                body = Body(
                    world.genesis.run_id,
                    round_.epoch + 1,
                    round_.head,
                    round_.state.state_digest,
                    seated(round_.head),
                    HEX,
                )
                life = world.nodes[liar].disk.life
                seat = SimCrypto(liar).sign(seat_message(round_.head, life))
                ready = Ready(
                    round_.epoch,
                    round_.head,
                    round_.ballot,
                    False,
                    round_.state.state_digest,
                    "",
                    0,
                    0.0,
                    0,
                    body,
                    life,
                    seat=seat,
                )
                if round_.ballot > 0:
                    node.feed(ev.Received(liar, ready))
        world.later(0.2, None, lie)

    for node in nodes(world)[:3]:
        node.core.round._next_ballot(world.now, "test")
    goal = core.chain.epoch + 1
    lie()
    world.until(lambda: all(n.core is None or n.core.chain.epoch >= goal for n in nodes(world)), 30)


@pytest.mark.parametrize("shards", [(-1,), (-(10**9),), (10**9,), (0, 0, 0, 0)])
def test_need_gives_only_what_is_there_and_only_to_whom_it_is_due(shards):
    world = swarm()
    for node in nodes(world):
        world.until(lambda node=node: node.core.round and node.core.round.exchange.mine, 20)
        core = node.core
        mine = core.round.exchange.mine.contribution
        core.handle(ev.PeerUp(STRANGER), world.now)
        for peer in (STRANGER, *(n.name for n in nodes(world) if n is not node)):
            for contribution in (mine, ""):
                need = Need(core.chain.epoch, core.chain.head, core.round.ballot, contribution, shards)
                out = core.handle(ev.Received(peer, need), world.now)
                sent = [o for o in out if isinstance(o, (ev.SendShard, ev.SendResult))]
                assert len(sent) <= 1 and all(o.shard == 0 for o in sent)
                assert not (sent and peer == STRANGER)


def test_rosters_with_odd_reducers_are_refused():
    world = swarm()
    core = nodes(world)[0].core
    epoch, head, state = core.chain.epoch, core.chain.head, core.sync.state_digest
    members = tuple(Member(f"p{i}", 1, "cd" * 16) for i in range(4))
    for ballot in range(core.round.ballot + 1, core.round.ballot + 5):
        for reducers in ((-1, 0, 0), (4, 0, 0), (0,), (0,) * 1000):
            leader = core.round.state.leader_of(ballot)
            says(world, leader, Roster(epoch, head, ballot, False, state, members, reducers))
    assert world.refused["roster"] >= 4
    goes_on(world)


def test_holders_that_nobody_knows_are_asked_for_nothing():
    world = swarm()
    core = nodes(world)[0].core
    ballot = next(b for b in range(core.round.ballot + 1, 99) if core.round.state.leader_of(b) == "p3")
    members = tuple(Member(f"p{i}", 1, "cd" * 16) for i in range(4))
    epoch, head, state = core.chain.epoch, core.chain.head, core.sync.state_digest
    body = Body(world.genesis.run_id, epoch + 1, head, state, members, HEX)
    out = core.handle(ev.Received("p3", Propose(epoch, head, ballot, body, ("nobody", "p0"))), world.now)
    assert not [o for o in out if isinstance(o, ev.FetchUpdate)]


def test_a_body_of_another_run_is_never_accepted():
    world = swarm()
    core = nodes(world)[0].core
    ballot = next(b for b in range(core.round.ballot + 1, 99) if core.round.state.leader_of(b) == "p3")
    members = tuple(Member(f"p{i}", 1, "cd" * 16) for i in range(4))
    epoch, head, state = core.chain.epoch, core.chain.head, core.sync.state_digest
    body = Body(HEX, epoch + 1, head, state, members, HEX)
    out = core.handle(ev.Received("p3", Propose(epoch, head, ballot, body, ("p3",))), world.now)
    assert [o.reason for o in out if isinstance(o, ev.Verdict)] == ["foreign"]


def test_a_member_that_changes_its_contribution_again_and_again_is_left_out():
    world = swarm()
    rng = random.Random(0)

    def flap() -> None:
        for node in nodes(world):
            round_ = node.core.round
            if round_ is not None and round_.state.leading and node.name != "p3":
                token = f"{rng.getrandbits(256):064x}"
                args = (round_.epoch, round_.head, round_.ballot, False, round_.state.state_digest, token, 5)
                life = world.nodes["p3"].disk.life
                seat = SimCrypto("p3").sign(seat_message(round_.head, life))
                node.feed(ev.Received("p3", Ready(*args, 0.0, -1, None, life, seat=seat)))
        world.later(0.02, None, flap)

    flap()
    goes_on(world, epochs=3, limit_s=60)
    assert not world.refused.get("malformed") and not world.refused.get("seat"), "it is heard"


def test_one_unusable_contribution_blames_nobody_else():
    world = swarm()
    world.until(lambda: any(n.core.round and n.core.round.state.leading for n in nodes(world)), 10)
    leader = next(n for n in nodes(world) if n.core.round and n.core.round.state.leading)
    bad = next(n.name for n in nodes(world) if n is not leader)
    round_ = leader.core.round
    leader.feed(ev.PeerRefused(bad, "not_finite"))
    world.until(lambda: leader.core.round is not round_, 20)
    assert list(round_.lead.excluded) == [bad]


def test_a_reducer_that_withholds_results_is_left_out_within_two_stalls():
    """It reduces, answers heartbeats, and sends its results to nobody."""
    world = swarm()
    rogue = world.nodes["p0"]  # there are three shards, and p3 would average none
    rogue.do_send_result = lambda out: None
    rogue.execute = {**rogue.execute, ev.SendResult: lambda self, out: None}
    took = goes_on(world, epochs=1, limit_s=60)
    assert took < 2 * world.rules.stall_s + 8.0


def test_a_reducer_whose_sums_are_of_another_number_is_refused_and_left_out_within_two_stalls():
    world = swarm()
    rogue = world.nodes["p0"]

    def lie(self, out) -> None:
        self.do_send_result(replace(out, sums=replace(out.sums, squares=(1.0,))))

    rogue.execute = {**rogue.execute, ev.SendResult: lie}
    world.until(lambda: world.refused.get("agreement"), 60)
    assert goes_on(world, epochs=1, limit_s=60) < 2 * world.rules.stall_s + 8.0


def test_results_that_are_refused_are_no_progress_however_often_they_come():
    """Their bytes kept a ballot alive for exchange_max_s, a minute at least: so long each ballot of a leader
    took that told members different rosters."""
    world = swarm(exchange_max_s=60.0)
    rogue = world.nodes["p0"]

    def lie(self, out) -> None:
        world.nodes[out.peer].feed(ev.BulkProgress("p0"))
        self.do_send_result(replace(out, sums=replace(out.sums, squares=(1.0,))))

    rogue.execute = {**rogue.execute, ev.SendResult: lie}
    world.until(lambda: world.refused.get("agreement"), 60)
    assert goes_on(world, epochs=1, limit_s=80) < 2 * world.rules.stall_s + 8.0


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_a_reducers_wrong_sums_break_no_round_and_give_figures_within_their_range(sign):
    """It tells everybody the same, itself too: sums as large as may be, and of vectors of nothing."""
    world = swarm()
    rogue = world.nodes["p0"]

    def lie(self, out) -> None:
        count = len(out.blobs)
        most, none = (SUM_MAX,) * count, (0.0,) * count
        dots = (sign * SUM_MAX,) * count
        squares, mean_square = (none, SUM_MAX) if sign > 0 else (most, 0.0)
        false = ShardSums(squares, mean_square, (1e-300,) * count, dots, SUM_MAX, 0, 2**62)
        reduced = Mean(out.shard, out.blobs, out.weights)
        answer = ev.Reduced(out.epoch, out.head, out.ballot, out.shard, reduced.digest, reduced, false)
        self.world.later(0.01, self, answer)

    world.invariants.liar_leads = True  # what it says is not what its means come to
    rogue.execute = {**rogue.execute, ev.Reduce: lie}
    goes_on(world, epochs=2)
    body = nodes(world)[0].core.chain.records[-1].body
    assert body.agreement.cosine_ppm in (-PPM, PPM) and body.agreement.norm_kept_ppm in (0, PPM)


def test_a_reducer_that_tells_members_different_sums_forks_nobody_and_halts_nobody():
    """No two votes of its ballot are equal; the next leader proposes one of the values, lie and all."""
    world = swarm()
    rogue = world.nodes["p0"]

    def lie(self, out) -> None:
        self.do_send_result(replace(out, sums=replace(out.sums, same_sign=10**6 * int(out.peer[1:]))))

    world.invariants.liar_leads = True  # what it says is not what its means come to
    rogue.execute = {**rogue.execute, ev.SendResult: lie}
    goes_on(world)
    chains = [n.core.chain for n in nodes(world)]
    common = min(chain.epoch for chain in chains)
    assert len({chain.head_at(common) for chain in chains}) == 1
    assert world.outcomes.get("aborted", 0) == 0


def test_a_dripping_peer_holds_a_round_up_no_longer_than_exchange_max_s():
    world = swarm()
    rogue = world.nodes["p3"]
    rogue.execute = {
        **rogue.execute,
        ev.SendShard: lambda self, out: None,
        ev.SendResult: lambda s, o: None,
    }

    def drip() -> None:
        for node in nodes(world):
            node.feed(ev.BulkProgress("p3"))
        world.later(0.5, None, drip)

    drip()
    took = goes_on(world, epochs=1, limit_s=200)
    # Worst: a ballot that the dripping peer leads (two stalls more), then one of an honest leader.
    assert took < 2 * world.rules.exchange_max_s + 3 * world.rules.stall_s + 10.0


def test_a_leader_that_only_says_that_it_exchanges_is_given_up():
    world = swarm()
    rounds = {n.core.round.leader for n in nodes(world) if n.core.round}
    rogue = world.nodes[sorted(rounds)[0]]
    core = rogue.core
    epoch, head = core.chain.epoch, core.chain.head
    rogue.core = None  # silent but for its lie

    def lie() -> None:
        status = Status(epoch, head, epoch, "x", Stage.EXCHANGING, 0, world.count, ())
        for node in nodes(world):
            if node is not rogue:
                node.feed(ev.Received(rogue.name, status))
        world.later(0.5, None, lie)

    lie()
    took = world.until(lambda: world.epoch() > epoch, 120)
    assert took < 2 * world.rules.exchange_max_s + 10


# --- tables and exceptions --------------------------------------------------------------------------


def test_a_thousand_identities_leave_the_tables_bounded():
    world = swarm(peers_max=8)
    node = nodes(world)[0]
    core = node.core
    for i in range(1000):
        peer = f"sybil{i}"
        node.feed(ev.PeerUp(peer))
        node.feed(ev.Received(peer, Status(10**6, HEX, 10**6, "x", Stage.READY, 0, 0, ())))
        node.feed(ev.Received(peer, Shard(core.chain.epoch, "cd" * 16, 0, "blob")))
        round_ = core.round
        ready = Ready(
            round_.epoch, round_.head, round_.ballot, False, round_.state.state_digest, "", 0, 0.0, -1, None
        )
        node.feed(ev.Received(peer, ready))
        vote = Accept(round_.epoch, round_.head, round_.ballot, HEX, HEX, ALIKE, HEX, HEX)
        node.feed(ev.Received(peer, vote))
        if i % 2:
            node.feed(ev.PeerDown(peer))
    tables = (
        core.ctx.peers,
        core.sync.asked_at,
        core.sync.branches,
        core.round.exchange.inputs,
        core.round.state.ready,
        core.round.state.accepts,
    )
    assert max(len(t) for t in tables) <= 4 * 8


def test_an_applied_state_that_the_disk_lost_does_not_end_the_waiting_for_it():
    world = swarm()
    sync = nodes(world)[0].core.sync
    sync.job = "apply"
    sync.on_fetch_failed(ev.FetchFailed("", "", "disk"), world.now)
    assert sync.job == "" and sync.need_state


def test_who_lost_records_votes_in_no_round_of_before():
    """The newest ones were damaged on its disk: what it voted after those before is overwritten."""
    world = swarm()
    goes_on(world)
    node = nodes(world)[0]
    chain = node.core.chain
    node.disk.vote = ev.Vote(chain.epoch, chain.head, 3, -1, None, node.disk.life, chain.tip[:3])
    lost = node.disk.records.pop()
    common = node.disk.records[-1]
    node.disk.state_head = common.head
    node.crash()
    node.start()
    assert node.core.round is None and node.core.chain.head == common.head
    assert "lost records" in node.core.snapshot(world.now).reason
    world.until(lambda: node.core.round is not None and node.core.chain.epoch > lost.body.epoch, 30)


@pytest.mark.parametrize(("full", "votes"), [(-1, True), (1, False)])
def test_a_vote_on_another_chain_binds_only_where_that_chain_is_better(full, votes):
    """Of a longer fork that is lighter: left for good, however far it went."""
    world = swarm()
    goes_on(world)
    node = nodes(world)[0]
    chain = node.core.chain
    vote = ev.Vote(chain.epoch + 30, HEX, 3, -1, None, node.disk.life, (chain.tip.full + full, 0, 0))
    node.crash()
    node.disk.vote = vote
    node.start()
    world.until(lambda: node.core.sync.at_head, 10)
    assert (node.core.round is not None) == votes


def test_who_lost_its_disk_votes_in_no_round_of_before_whatever_older_ones_it_comes_through():
    """It comes back at the genesis, where it has no vote to cast, and from there to a head that names it."""
    world = swarm()
    goes_on(world)
    node, *others = reversed(nodes(world))
    named_at = node.core.chain.head
    genesis = world.genesis.run_id
    for one in nodes(world):
        one.crash()
    state = (0, world.invariants.state_of[genesis])
    node.disk = Disk(states={genesis: state}, state_head=genesis, life="ab" * 16)
    world.invariants.on_disk_lost(node)  # fails if it votes where it may have voted
    node.start()
    world.until(lambda: node.core.round is not None and node.core.round.exchange.mine is not None, 10)
    assert node.core.round.epoch == 0 and node.name not in node.core.round.electorate
    for one in others:
        one.start()
    world.until(lambda: node.core.chain.head == named_at and node.core.sync.at_head, 30)
    assert node.core.round is None and "disk was lost" in node.core.snapshot(world.now).reason
    goes_on(world)
    world.until(lambda: node.core.round is not None and node.name in node.core.round.electorate, 30)


def test_a_founder_that_lost_its_disk_does_not_begin_its_run_anew():
    """It has the first state from a peer, starts again, and that is no founding (seed 512670)."""
    world = swarm()
    founder, *others = nodes(world)
    genesis = world.genesis.run_id
    for node in nodes(world):
        node.crash()
    state = (0, world.invariants.state_of[genesis])
    founder.disk = Disk(states={genesis: state}, state_head=genesis, life="ab" * 16)
    world.invariants.on_disk_lost(founder)
    founder.start()
    world.later(30.0, None, lambda: [node.start() for node in others])
    world.until(lambda: world.now > 60, 60)  # fails if there are two decisions after the genesis
    goes_on(world)


def set_back(world: World, node: Node, records: int) -> None:
    """To a backup, by `restore`: without the vote, and so under another name."""
    del node.disk.records[records:]
    node.disk.vote, node.disk.life, node.disk.restored = None, "ab" * 16, True
    node.disk.state_head = node.head_at(records)
    world.backups.name = node.name
    world.invariants.on_disk_lost(node)  # fails if it votes where it may have voted, and is heard


def test_a_restored_home_that_stays_alone_goes_on_as_another_disk_and_stands_by_when_it_meets_the_others():
    world = swarm(on_quorum_loss="continue")
    goes_on(world)
    node, *others = reversed(nodes(world))
    before, epoch = node.disk.life, node.core.chain.epoch
    for one in nodes(world):
        one.crash()
    set_back(world, node, epoch - 1)
    node.start()
    world.until(lambda: node.core.chain.epoch > epoch, 60)
    assert {m.life for m in node.core.chain.records[-1].body.members if m.peer == node.name} == {"ab" * 16}
    for one in others:
        one.start()
    world.until(
        lambda: "disk was lost" in node.core.snapshot(world.now).reason, 30
    )  # theirs won: it names `before`
    assert before in {m.life for m in node.core.chain.records[-1].body.members}
    goes_on(world)
    world.until(lambda: node.core.round is not None and node.name in node.core.round.electorate, 30)


def test_a_restored_home_leaves_its_round_when_another_elector_is_there():
    """That one may have had its vote in it."""
    world = swarm(on_quorum_loss="wait")
    goes_on(world)
    node, other, *_ = reversed(nodes(world))
    epoch = node.core.chain.epoch
    for one in nodes(world):
        one.crash()
    set_back(world, node, epoch - 1)
    node.start()
    world.until(lambda: node.core.round is not None and node.core.round.exchange.mine is not None, 20)
    other.start()
    world.until(lambda: node.core.round is None, 1)
    assert "disk was lost" in node.core.snapshot(world.now).reason


def test_a_restored_lone_elector_goes_on_beside_newcomers():
    world = swarm(on_quorum_loss="wait")
    goes_on(world)
    for one in nodes(world):
        one.crash()
    node = next(n for n in nodes(world) if n.name in world.invariants.electorate([]))
    set_back(world, node, 0)
    world.invariants.next_of.clear()  # nobody is left who knows what was decided since
    node.start()
    world.until(lambda: node.core.chain.epoch > 1, 20)


def test_random_values_raise_nothing_and_stop_nobody():
    for seed in range(20):
        world = swarm()
        rng = random.Random(seed)
        for _ in range(300):
            for node in nodes(world):
                member = rng.random() < 0.5
                lie = draw_lie(rng, node.core, member)
                peer = "p3" if member and node.name != "p3" else STRANGER
                if peer not in node.core.ctx.peers:
                    node.feed(ev.PeerUp(peer))
                node.feed(ev.Received(peer, lie))
        goes_on(world, limit_s=60)
    assert digest(b"")  # the simulator's own
