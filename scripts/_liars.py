"""One member of several lies: real daemons, a quiet time, a time of lies, and what came of it.

For scripts/attack.py. All members are honest in the quiet time; then the last one begins to lie (or a thief
begins, who has its key), and goes on to the end. Beside it a run of the honest ones alone, as far as the run
with the liar came. No round of either is made by fewer than the honest ones (`min_members`): what one or two
make before the others are there is longer, and no measure.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import re
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from _members import (
    Digests,
    Node,
    ended_or_broken,
    founder_in,
    in_words,
    member_in,
    refusals,
    rounds_s,
    slower,
    tapestry,
)
from liars.registry import load
from liars.seen import Seen

WAIT_S = 240.0  # for what must come, on a machine that others use
PROOF_S = 90.0  # Guess: longest wait for what an attack promises
ALONE_S = 120.0  # of the run without the liar, at most
LOOK_S = 0.5
PARTS = 8  # of the text, one for each member: the same ones with the liar and without
ROUNDS_MIN = 3  # that are measured, of either kind
NO_NUMBER = ("share", "voice", "max_influence")  # change nothing where all are honest and train alike
LOSSES = 3  # the last ones that are compared
SETTINGS = {"shard_elements": "4096"}  # some shards for everybody: `nano` is one by default
_VALIDATED = re.compile(r" validated epoch=(\d+) validation_loss=([\d.]+)")

Losses = dict[int, float]  # epoch -> validation loss of the founder


def attacked_by_member(name: str, options: argparse.Namespace, place: Path, alone: dict[str, Losses]) -> Seen:
    """`alone`: the runs without a liar that were made before, by what they changed in run.toml.

    Two digests of an epoch, and what never comes, are faults.
    """
    seen = Seen(name, "")
    try:
        _attack(seen, options, place, alone)
    except AssertionError as error:
        seen.faults.append(str(error).splitlines()[0])
    return seen


def _attack(seen: Seen, options: argparse.Namespace, place: Path, alone: dict[str, Losses]) -> None:
    name = seen.name
    module, count = load(name), options.members or 4
    changes = SETTINGS | {"min_members": str(count - 1)} | getattr(module, "RUN", {})
    folder = place / name
    folder.mkdir()
    with contextlib.ExitStack() as stack:
        nodes = _founded(stack, folder, count, changes, None if hasattr(module, "strike") else name)
        honest, last = nodes[:-1], nodes[-1]
        seen.liar, seen.honest = last.json()["peer_id"], len(honest)
        digests = Digests(*honest)
        quiet = _watch(digests, options.seconds, lambda since: len(rounds_s(honest[0], since)) >= ROUNDS_MIN)
        before = refusals(honest)
        began_epoch = honest[0].status()["epoch"]
        if hasattr(module, "strike"):
            stack.enter_context(module.strike(folder, last, honest[0].address))
        else:
            (folder / "lie").touch()

        def look(since: float = 0.0) -> bool:
            _look(seen, honest, began_epoch)
            seen.told_of_twin = "key=twice" in last.log.read_text(errors="replace")
            seen.refused = _more(refusals(honest), before)
            return not module.broken(seen) and len(rounds_s(honest[0], since)) >= ROUNDS_MIN

        lied = _watch(digests, options.seconds, look)
        seen.faults += _goes_on(digests)
        lied = lied[0], time.time()
        seen.one_head = not seen.faults
        look()
        seen.faults += ended_or_broken(honest) + _wrongly_blamed(seen)
        if not seen.removed and last.process is not None and last.process.poll() is not None:
            seen.faults.append("the liar ended: nothing is shown")
        seen.gated = sum(f"furthest={seen.liar}" in node.log.read_text() for node in honest)
        _time(seen, honest[0], quiet, lied)
        losses = _losses(honest[0])
    if not options.no_alone:
        _compare(seen, losses, _alone(place, count - 1, changes, max(losses, default=0), alone))
    seen.faults += module.broken(seen)


def say(seen: Seen) -> None:
    blamed = [f"{peer[-6:]}: {what}" for peer, what in seen.accused.items()]
    worse = "not measured" if math.isnan(seen.worse) else f"{seen.worse:+.1%}"
    lines = [
        f"honest members at one head and digest: {'yes' if seen.one_head else 'no'}; "
        f"the liar {seen.liar[-6:]} is counted in {seen.contributed} of {seen.records} records",
        f"a round {seen.quiet_round_s:.2f} -> {seen.lied_round_s:.2f} s ({seen.slower:+.0%}; medians of "
        f"{seen.quiet_rounds} and {seen.lied_rounds}), the longest {seen.longest_s:.1f} s",
        f"loss {seen.loss:.3f}, without it {seen.loss_without:.3f} at epoch {seen.epoch} ({worse})",
        f"refused: {in_words(seen.refused)}; withheld from audits {seen.withheld}; gate named it in "
        f"{seen.gated} logs",
        f"proven: {'; '.join(blamed) or 'nothing'} (shown by {seen.accusers} of {seen.honest}); "
        f"removed: {', '.join(f'{p[-6:]} {why}' for p, why in seen.removed.items()) or 'nobody'}",
    ]
    print(seen.name, *lines, sep="\n    ", flush=True)
    for fault in seen.faults:
        print(f"  FAULT: {fault}", flush=True)


# --- the run ----------------------------------------------------------------------------------------


def _founded(
    stack: contextlib.ExitStack, folder: Path, count: int, changes: dict[str, str], lies: str | None
) -> list[Node]:
    """So many members, all in the electorate; the last is the liar `lies`, where there is one."""
    founder = founder_in(folder, PARTS, **changes)
    nodes = [stack.enter_context(founder).wait_ready(WAIT_S)]
    for index in range(1, count):
        node = member_in(folder, index, PARTS, founder.invitation())
        if lies is not None and index == count - 1:
            node.lie(lies, folder / "lie")
        nodes.append(stack.enter_context(node))
    for node in nodes:
        node.wait_ready(WAIT_S)
    founder.wait(f"an electorate of {count}", lambda: founder.electorate() == count, WAIT_S)
    return nodes


def _watch(digests: Digests, seconds: float, enough: Callable[[float], bool]) -> tuple[float, float]:
    """So long, and up to PROOF_S longer until it is enough; all the time no epoch may have two digests."""
    began = time.time()
    while time.time() < began + seconds:
        digests.poll()
        time.sleep(LOOK_S)
    while not enough(began) and time.time() < began + seconds + PROOF_S:
        digests.poll()
        time.sleep(LOOK_S)
    return began, time.time()


def _goes_on(digests: Digests) -> list[str]:
    """Whether all honest members come to one epoch after this moment, with one digest."""
    epoch = max(node.status()["epoch"] for node in digests.nodes)
    try:
        digests.wait(
            "the same bits at all honest members",
            lambda: any(e > epoch and len(s) == len(digests.nodes) for e, s in digests.shared.items()),
            WAIT_S,
        )
    except AssertionError as error:
        return [str(error).splitlines()[0]]
    return []


def _alone(place: Path, count: int, changes: dict[str, str], epoch: int, known: dict[str, Losses]) -> Losses:
    """The losses of a run without the liar: a known one, else one up to `epoch`, or as long as ALONE_S."""
    changes = {key: value for key, value in changes.items() if key not in NO_NUMBER}
    key = json.dumps(changes, sort_keys=True)
    if key not in known:
        folder = place / f"alone-{len(list(place.iterdir()))}"
        folder.mkdir()
        with contextlib.ExitStack() as stack:
            founder = _founded(stack, folder, count, changes, None)[0]
            until = time.time() + ALONE_S
            while max(_losses(founder), default=0) < epoch and time.time() < until:
                time.sleep(LOOK_S)
            known[key] = _losses(founder)
    return known[key]


# --- what is seen -----------------------------------------------------------------------------------


def _look(seen: Seen, honest: Sequence[Node], began_epoch: int) -> None:
    shown = [node.status() for node in honest]
    accused = [one for status in shown for one in status["accused"]]
    seen.accused = {one["peer"]: str(one["what"]) for one in accused}
    seen.accusers = sum(any(one["peer"] == seen.liar for one in status["accused"]) for status in shown)
    seen.withheld = sum(o["count"] for status in shown for o in status["withheld"] if o["peer"] == seen.liar)
    if accused:  # nobody is removed for anything else
        seen.removed = json.loads(tapestry("members", "--home", honest[0].home, "--json").stdout)["removed"]
    bodies = [body for body in _bodies(honest[0]) if body["epoch"] > began_epoch]
    shares = [_share(body, seen.liar) for body in bodies]
    seen.contributed, seen.share_max = sum(share > 0 for share in shares), max(shares, default=0.0)
    seen.records = len(bodies)


def _bodies(node: Node) -> list[dict[str, Any]]:
    """Of the records in its home."""
    lines = (node.home / "chain.jsonl").read_text().splitlines()
    values = [json.loads(line)["value"] for line in lines if line.endswith("}")]
    return [value["body"] for value in values if "body" in value]


def _share(body: dict[str, Any], peer: str) -> float:
    """Its part of the weight."""
    weights = {member[0]: member[1] for member in body["members"]}
    return float(weights.get(peer, 0) / max(1, sum(weights.values())))


def _wrongly_blamed(seen: Seen) -> list[str]:
    blamed = (seen.accused.keys() | seen.removed.keys()) - {seen.liar}
    return [f"{peer[-6:]} was accused or removed, and is honest" for peer in sorted(blamed)]


def _more(now: dict[str, int], before: dict[str, int]) -> dict[str, int]:
    return {
        reason: count - before.get(reason, 0)
        for reason, count in now.items()
        if count > before.get(reason, 0)
    }


def _time(seen: Seen, node: Node, quiet: tuple[float, float], lied: tuple[float, float]) -> None:
    calm, under = rounds_s(node, *quiet), rounds_s(node, *lied)
    seen.quiet_rounds, seen.lied_rounds = len(calm), len(under)
    seen.quiet_round_s, seen.lied_round_s = (statistics.median(s) if s else math.nan for s in (calm, under))
    seen.slower, seen.longest_s = slower(calm, under), max(under, default=math.nan)


def _losses(node: Node) -> Losses:
    found = _VALIDATED.findall(node.log.read_text(errors="replace"))
    return {int(epoch): float(loss) for epoch, loss in found}


def _compare(seen: Seen, losses: Losses, without: Losses) -> None:
    """The last losses, with those at the same epochs without the liar, between two that were measured."""
    epochs = [e for e in sorted(losses) if without and min(without) <= e <= max(without)][-LOSSES:]
    if not epochs:
        return
    seen.epoch = epochs[-1]
    seen.loss = statistics.mean(losses[e] for e in epochs)
    seen.loss_without = statistics.mean(_at(without, e) for e in epochs)


def _at(losses: Losses, epoch: int) -> float:
    below, above = (max(e for e in losses if e <= epoch), min(e for e in losses if e >= epoch))
    part = (epoch - below) / (above - below) if above > below else 0.0
    return losses[below] + part * (losses[above] - losses[below])


def read_alone(file: Path | None) -> dict[str, Losses]:
    """What `write_alone` wrote; nothing where there is no file."""
    if file is None or not file.exists():
        return {}
    table = json.loads(file.read_text())
    return {key: {int(epoch): loss for epoch, loss in losses.items()} for key, losses in table.items()}


def write_alone(file: Path | None, alone: dict[str, Losses]) -> None:
    if file is not None:
        file.write_text(json.dumps(alone, indent=1) + "\n")
