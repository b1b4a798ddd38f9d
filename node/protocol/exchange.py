"""Scatter, reduce, gather: one member's side of the butterfly (G2).

Inputs are kept for the whole round, results for as long as the roster's members stand. So when a reducer is
lost, the next roster moves its shards to others and nothing that lies at a live reducer is sent again.
Results that were all there and led to no decision are made anew: one of them may be of a roster that was told
to its reducer alone, or be its reducer's lie.

The mean of a shard is a function of the members (their order, weights and contributions) and of the encoded
inputs alone: whichever reducer computes it gets the same bits.

A shard that does not come is asked for (`pull`); whoever keeps us waiting is named (`waiting_on`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import chain

from tapestry.node.protocol.agreement import Agreement, ShardSums, agreement
from tapestry.node.protocol.audit import SignedMean, inputs_digest, mean_message, result_digest
from tapestry.node.protocol.context import Context
from tapestry.node.protocol.events import Contributed, KeepResult, Reduce, Reduced, SendResult, SendShard
from tapestry.node.protocol.handover import seats_needed
from tapestry.node.protocol.messages import WAITING_MAX, Blob, Need, Result, Roster, Shard
from tapestry.node.protocol.record import Member


@dataclass(slots=True)
class Input:
    """What has come of one peer's contribution."""

    contribution: str
    blobs: dict[int, Blob]  # shard -> blob
    paths: dict[int, tuple[str, ...]] = field(default_factory=dict)  # shard -> what proves it, of others'

    def of(self, shard: int) -> tuple[tuple[str, ...], Blob]:
        """Path and blob."""
        return self.paths.get(shard, ()), self.blobs[shard]


@dataclass(frozen=True, slots=True)
class Mean:
    """A reduced shard, and its sums."""

    digest: str
    blob: Blob
    sums: ShardSums
    signature: str  # of its reducer: audit.mean_message


class Exchange:
    """The data half of a round at one node. `Round` decides; this moves."""

    def __init__(self, ctx: Context, epoch: int, head: str, electors: int = 1) -> None:
        self.ctx = ctx
        self.electors = electors  # how many there are: mostly they are who averages
        self.epoch = epoch
        self.head = head
        self.mine: Contributed | None = None
        self.roster: Roster | None = None
        self.members_ballot = -1  # the ballot that last changed the members: names a set of results
        self.averaged = ""  # names what is averaged: audit.inputs_digest of the roster
        self.inputs: dict[str, Input] = {}
        self.ahead: dict[tuple[str, int], None] = {}  # of these, shards that no roster has made ours yet
        self.results: dict[int, Mean] = {}  # by shard
        self.reducing: set[int] = set()  # asked of the shell; membership tests only
        self.sent: set[tuple[str, int]] = set()  # (reducer, shard); membership tests only
        self.unusable: dict[str, str] = {}  # contributor -> why its contribution cannot be used
        self.early_ballot = -1  # the highest ballot of which a result came before the roster
        self.early: dict[int, None] = {}  # shards of it
        self.refused: dict[str, None] = {}  # whose results do not fit this ballot's roster
        self.progress = 0
        self.lacking: dict[str, int] = {}  # peer -> shard of it that was missing when we looked last

    # --- what the round tells us ---------------------------------------------------------------

    def contribute(self, contributed: Contributed) -> None:
        self.mine = contributed
        self.sent.clear()
        self.inputs[self.ctx.me] = Input(contributed.contribution, dict(enumerate(contributed.blobs)))

    def start(self, roster: Roster) -> None:
        """A new ballot's roster. Results survive if the same is averaged by the same, and some were missing:
        a mean is signed by who made it, and counts as nobody else's."""
        before = self.roster
        if before is None or before.members != roster.members or self.complete:
            self.results.clear()
            self.reducing.clear()
            self.members_ballot = roster.ballot
        else:
            for shard, (old, new) in enumerate(zip(before.reducers, roster.reducers, strict=True)):
                if old != new:
                    self.results.pop(shard, None)
                    self.reducing.discard(shard)
        self.roster, self.averaged = roster, inputs_digest(roster.members, self.ctx.crypto)
        self.refused.clear()
        self._settle_ahead()
        self._scatter()
        for shard in range(len(roster.reducers)):
            if self._reducer(shard) == self.ctx.me:
                if shard in self.results:
                    self._share(shard)
                else:
                    self._reduce_if_complete(shard)
        if self.early_ballot == roster.ballot:
            self._pull_results([s for s in self.early if s not in self.results])

    def forget_peer(self, peer: str) -> None:
        """The streams to `peer` broke: what was on its way may not have come."""
        self.sent -= {pair for pair in self.sent if pair[0] == peer}

    def forget_stranger(self, peer: str) -> None:
        """`peer` has left the table of peers: keep of it only what the roster names."""
        self.forget_peer(peer)
        if not self._wanted(peer):
            self._forget_inputs(peer)
            self.unusable.pop(peer, None)

    # --- what comes in -------------------------------------------------------------------------

    def on_shard(self, peer: str, shard: Shard) -> str | None:
        """An input for us to reduce. Returns why it was refused, if it was."""
        if not 0 <= shard.shard < self.ctx.rules.shard_count:
            return "shard"
        wanted, entry = self._wanted(peer), self.inputs.get(peer)
        if entry is not None and wanted == entry.contribution != shard.contribution:
            return "stale"  # an older contribution, late
        if entry is not None and entry.contribution == shard.contribution and shard.shard in entry.blobs:
            return None  # doubled on the way
        ours = wanted == shard.contribution and self.averages(shard.shard)
        if not ours and not self._has_room(peer):
            return None  # if a roster makes it ours, it is asked for again
        if entry is None or entry.contribution != shard.contribution:
            self._forget_inputs(peer)
            entry = self.inputs[peer] = Input(shard.contribution, {})
        entry.blobs[shard.shard], entry.paths[shard.shard] = shard.blob, shard.path
        if not ours:
            self.ahead[peer, shard.shard] = None
            return None
        self.progress += 1
        self._reduce_if_complete(shard.shard)
        return None

    def _has_room(self, peer: str) -> bool:
        """Shards overtake their roster. Of those as many are kept as one contribution has, or as all electors
        send a reducer where they average; of one peer twice its part of that."""
        count = self.ctx.rules.shard_count
        part = -(-count // max(1, min(count, self.electors)))
        return (
            len(self.ahead) < max(count, part * self.electors)
            and sum(p == peer for p, _ in self.ahead) < 2 * part
        )

    def _settle_ahead(self) -> None:
        """The roster says which are ours; the others are not kept."""
        for peer, shard in self.ahead:
            entry = self.inputs[peer]
            if self._wanted(peer) != entry.contribution or not self.averages(shard):
                del entry.blobs[shard], entry.paths[shard]
                if not entry.blobs:
                    del self.inputs[peer]
        self.ahead.clear()

    def _forget_inputs(self, peer: str) -> None:
        self.inputs.pop(peer, None)
        for key in [k for k in self.ahead if k[0] == peer]:
            del self.ahead[key]

    def on_result(self, peer: str, result: Result) -> str | None:
        """A reduced shard, from the reducer that the roster names."""
        roster = self.roster
        if roster is None or result.ballot > roster.ballot:
            self._note_early(result)
            return None
        if result.ballot < roster.ballot:
            return None
        fault = self._result_fault(peer, result, roster)
        if fault is not None:
            self.refused[peer] = None
        elif result.shard not in self.results:
            self._keep(result.shard, Mean(result.digest, result.blob, result.sums, result.signature))
        return fault

    def _result_fault(self, peer: str, result: Result, roster: Roster) -> str | None:
        if not 0 <= result.shard < len(roster.reducers):
            return "shard"
        if peer != self._reducer(result.shard):
            return "not_reducer"
        if not result.sums.of_so_many(len(self._weights())):
            return "agreement"
        signed = self._says(result.shard, result.digest)
        if result.shard not in self.results and not self.ctx.crypto.verify(peer, result.signature, signed):
            return "mean_signature"
        return None

    def _says(self, shard: int, digest: str) -> bytes:
        """What the reducer of a shard signs."""
        return mean_message(self.head, shard, digest, self.averaged)

    def _keep(self, shard: int, mean: Mean) -> None:
        self.results[shard] = mean
        self.progress += 1
        self.ctx.emit(KeepResult(shard, mean.digest, mean.blob))

    def _note_early(self, result: Result) -> None:
        """It overtook its roster, as happens when the reducers have all inputs since an earlier ballot. It is
        asked for again once we know whose it must be."""
        if result.ballot > self.early_ballot:
            self.early_ballot, self.early = result.ballot, {}
        if result.ballot == self.early_ballot and 0 <= result.shard < self.ctx.rules.shard_count:
            self.early[result.shard] = None

    def on_reduced(self, reduced: Reduced) -> None:
        roster = self.roster
        if roster is None or reduced.shard not in self.reducing or reduced.shard in self.results:
            return
        if reduced.ballot != self.members_ballot or not self.averages(reduced.shard):
            return  # the mean of other members, or now another's to make
        signature = self.ctx.crypto.sign(self._says(reduced.shard, reduced.digest))
        self._keep(reduced.shard, Mean(reduced.digest, reduced.blob, reduced.sums, signature))
        self._share(reduced.shard)

    def on_need(self, peer: str, need: Need) -> None:
        """Send again what `peer` lacks, if it is ours to give and the roster makes it the peer's to have."""
        roster, mine = self.roster, self.mine
        if roster is None or all(m.peer != peer for m in roster.members):
            return
        for shard in sorted(set(need.shards)):
            if not 0 <= shard < len(roster.reducers):
                continue
            if need.contribution:
                ours = mine is not None and mine.contribution == need.contribution
                if mine is not None and ours and self._reducer(shard) == peer:
                    self.ctx.emit(SendShard(peer, self.epoch, mine.contribution, shard, mine.blobs[shard]))
            elif need.ballot == roster.ballot and shard in self.results:
                self._send_result(peer, need.ballot, shard)

    # --- how far we are ------------------------------------------------------------------------

    @property
    def complete(self) -> bool:
        return self.roster is not None and len(self.results) == len(self.roster.reducers)

    def result_digest(self) -> str:
        """Digest of the whole encoded mean: of its shards' digests in order."""
        return result_digest((self.results[s].digest for s in range(len(self.results))), self.ctx.crypto)

    def result_blobs(self) -> tuple[Blob, ...]:
        return tuple(self.results[s].blob for s in range(len(self.results)))

    def agreement(self) -> Agreement:
        """What the sums of all shards come to."""
        return agreement([self.results[s].sums for s in range(len(self.results))], self._weights())

    def sums_by_reducer(self) -> dict[str, list[ShardSums]]:
        """Of a whole result: what each reducer says of the shards that it averaged."""
        found: dict[str, list[ShardSums]] = {}
        for shard in range(len(self.results)):
            found.setdefault(self._reducer(shard), []).append(self.results[shard].sums)
        return found

    def contributors(self) -> list[Member]:
        """The roster's, in its order."""
        members = self.roster.members if self.roster is not None else ()
        return [m for m in members if m.weight]

    def averages(self, shard: int) -> bool:
        """Whether the newest roster makes us its reducer."""
        return self.roster is not None and self._reducer(shard) == self.ctx.me

    def has(self, member: Member, shard: int) -> bool:
        """Whether its contribution's shard is here."""
        entry = self.inputs.get(member.peer)
        return entry is not None and entry.contribution == member.contribution and shard in entry.blobs

    def means(self) -> tuple[SignedMean, ...]:
        """Of every shard of the result, in order."""
        means = [self.results[shard] for shard in range(len(self.results))]
        return tuple([SignedMean(self._reducer(i), m.digest, m.signature) for i, m in enumerate(means)])

    def pull(self) -> None:
        """Ask for what did not come."""
        for peer, (contribution, shards) in self._missing().items():
            assert self.roster is not None
            self.ctx.send(peer, Need(self.epoch, self.head, self.roster.ballot, contribution, tuple(shards)))

    def _pull_results(self, shards: Sequence[int]) -> None:
        assert self.roster is not None
        of: dict[str, list[int]] = {}
        for shard in shards:
            of.setdefault(self._reducer(shard), []).append(shard)
        of.pop(self.ctx.me, None)
        for peer, owed in of.items():
            self.ctx.send(peer, Need(self.epoch, self.head, self.roster.ballot, "", tuple(owed)))

    def waiting_on(self) -> tuple[str, ...]:
        """Who holds us up: those whose contribution is unusable; else those who owe us theirs, since of our
        reducers some may wait for the same; else the reducers that owe us a result."""
        if self.roster is None:
            return ()
        missing = self._missing()
        names = self.spoilt() or [p for p, (owed, _) in missing.items() if owed] or list(missing)
        return tuple(names[:WAITING_MAX])

    def lacks_of(self, peer: str) -> bool:
        """Whether it has something that we need to get on. Not if its results are of another roster, which a
        leader may have told it: it sends them as often as we ask.

        Asked for every piece of bulk that comes, so the search goes on where it ended: most often the shard
        found there is still on its way.
        """
        roster = self.roster
        member = next((m for m in roster.members if m.peer == peer), None) if roster is not None else None
        if roster is None or member is None or peer in self.refused:
            return False
        at, count = self.lacking.get(peer, 0), len(roster.reducers)
        for shard in chain(range(at, count), range(at)):
            if self._lacks(member, shard):
                self.lacking[peer] = shard
                return True
        return False

    def _lacks(self, member: Member, shard: int) -> bool:
        """Whether we need the mean of a shard of it, or what it contributes to one of ours."""
        if shard in self.results:
            return False
        if not self.averages(shard):
            return self._reducer(shard) == member.peer
        return member.weight > 0 and not self.has(member, shard)

    def owing(self) -> list[str]:
        """Who owes us shards of its contribution, of which we are to make the mean."""
        return [p for p, (owed, _) in self._missing().items() if owed]

    def reducers(self) -> list[str]:
        """Of the roster, sorted."""
        roster = self.roster
        return (
            [] if roster is None else [roster.members[index].peer for index in sorted(set(roster.reducers))]
        )

    def reduces(self, peer: str) -> bool:
        """Whether the roster makes it the reducer of a shard."""
        return self.roster is not None and any(
            self.roster.members[index].peer == peer for index in self.roster.reducers
        )

    def spoilt(self) -> list[str]:
        """Contributors of this roster whose contribution cannot be used."""
        members = self.roster.members if self.roster is not None else ()
        return [m.peer for m in members if m.weight and m.peer in self.unusable]

    # --- inside ----------------------------------------------------------------------------------

    def _reducer(self, shard: int) -> str:
        assert self.roster is not None
        return self.roster.members[self.roster.reducers[shard]].peer

    def _weights(self) -> list[int]:
        return [m.weight for m in self.contributors()]

    def _wanted(self, peer: str) -> str | None:
        """The contribution of `peer` that the roster names."""
        if self.roster is not None:
            for member in self.roster.members:
                if member.peer == peer:
                    return member.contribution
        return None

    def _scatter(self) -> None:
        roster, mine = self.roster, self.mine
        if roster is None or mine is None or self._wanted(self.ctx.me) != mine.contribution:
            return
        for shard in range(len(roster.reducers)):
            reducer = self._reducer(shard)
            if reducer != self.ctx.me and (reducer, shard) not in self.sent:
                self.sent.add((reducer, shard))
                self.ctx.emit(SendShard(reducer, self.epoch, mine.contribution, shard, mine.blobs[shard]))

    def _reduce_if_complete(self, shard: int) -> None:
        roster = self.roster
        if roster is None or shard in self.reducing or shard in self.results:
            return
        if self._reducer(shard) != self.ctx.me:
            return
        members = [m for m in roster.members if m.weight]
        blobs = []
        for member in members:
            entry = self.inputs.get(member.peer)
            if entry is None or entry.contribution != member.contribution or shard not in entry.blobs:
                return
            blobs.append(entry.blobs[shard])
        self.reducing.add(shard)
        weights = tuple(m.weight for m in members)
        peers = tuple(m.peer for m in members)
        self.ctx.emit(Reduce(self.epoch, self.head, self.members_ballot, shard, tuple(blobs), weights, peers))

    def _share(self, shard: int) -> None:
        assert self.roster is not None
        for member in self.roster.members:
            if member.peer != self.ctx.me:
                self._send_result(member.peer, self.roster.ballot, shard)

    def _send_result(self, peer: str, ballot: int, shard: int) -> None:
        mean = self.results[shard]
        result = SendResult(peer, self.epoch, self.head, ballot, shard, mean.blob, mean.sums, mean.signature)
        self.ctx.emit(result)

    def _missing(self) -> dict[str, tuple[str, list[int]]]:
        """Peer -> (contribution or "" for results, shards) that we lack."""
        missing: dict[str, tuple[str, list[int]]] = {}
        roster = self.roster
        if roster is None:
            return missing
        for shard in range(len(roster.reducers)):
            if shard in self.results:
                continue
            reducer = self._reducer(shard)
            if reducer != self.ctx.me:
                contribution, shards = missing.setdefault(reducer, ("", []))
                if not contribution:
                    shards.append(shard)
                continue
            for member in roster.members:
                if member.weight and not self.has(member, shard):
                    # what it owes us as a contributor comes before what it owes us as a reducer
                    asked = missing.get(member.peer)
                    if asked is None or not asked[0]:
                        asked = missing[member.peer] = (member.contribution, [])
                    asked[1].append(shard)
        return missing


def assign_reducers(
    members: Sequence[Member], shard_count: int, before: Roster | None, alive: Sequence[str]
) -> tuple[int, ...]:
    """Shard -> index of its reducer: shares as even as can be, and only the lost reducers' shards move.

    `before` is the roster of the ballot that failed, `alive` those of `members` that may reduce, in the order
    in which shards go to them.
    """
    index = {m.peer: i for i, m in enumerate(members)}
    able = [p for p in alive if p in index] or list(index)
    load = dict.fromkeys(able, 0)
    reducers: list[str | None] = [None] * shard_count
    if before is not None and len(before.reducers) == shard_count:
        for shard, position in enumerate(before.reducers):
            peer = before.members[position].peer
            if peer in load:
                reducers[shard] = peer
                load[peer] += 1
    order = {peer: i for i, peer in enumerate(able)}
    for shard in range(shard_count):
        if reducers[shard] is None:
            peer = min(able, key=lambda p: (load[p], order[p]))
            reducers[shard] = peer
            load[peer] += 1
    return tuple(index[peer] for peer in reducers if peer is not None)


def check_roster(roster: Roster, electorate: Sequence[str], shard_count: int) -> str | None:
    """Why a roster cannot be followed, or None. What its wire form guarantees is not checked again."""
    peers = [m.peer for m in roster.members]
    if peers != sorted(set(peers)):
        return "members are not sorted, or named twice"
    if not any(m.weight for m in roster.members):
        return "nobody contributes"
    if len(roster.reducers) != shard_count:
        return f"{len(roster.reducers)} shards, the run has {shard_count}"
    if not all(0 <= r < len(peers) for r in roster.reducers):
        return "a reducer that is no member"
    electors = sum(p in peers for p in electorate)
    if electors < (1 if roster.forced else seats_needed(len(electorate))):
        return f"it names {electors} of the electorate's {len(electorate)}"
    return None
