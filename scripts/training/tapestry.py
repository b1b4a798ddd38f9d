"""A run of real daemons, started as an operator starts them."""

from __future__ import annotations

import dataclasses
import json
import statistics
import subprocess
import sys
import time
from datetime import datetime
from itertools import pairwise
from pathlib import Path
from typing import Any

from _bench import environment

from tapestry.node.spec.run import RunSpec
from tapestry.node.trainer.models.llama import initial_state
from training.curve import Curve, Keep
from training.plan import Plan
from training.processes import ended, sample_bytes, wait


def run_tapestry(system: str, plan: Plan, net: Any) -> Curve:
    """Real daemons, as an operator starts them. The curve comes from the founder's update log."""
    from tapestry.dht.identity import Identity

    spec = plan.spec(plan.inner_steps if system == "tapestry-diloco" else 0)
    folder = Path(plan.folder) / system
    homes = [folder / f"n{i}" for i in range(plan.nodes)]
    for home in homes:
        home.mkdir(parents=True)
        (home / "node.toml").write_text("threads = 1\n")
    others = tuple(Identity.load_or_create(home / "identity.key").peer_id for home in homes[1:])
    spec = dataclasses.replace(spec, members=dataclasses.replace(spec.members, founders=others))
    (homes[0] / "run.toml").write_text(spec.to_toml())
    nodes: list[subprocess.Popen[bytes]] = []
    with ended(nodes):
        for i, home in enumerate(homes):
            peer = ("--peer", node_json(homes[0])["addresses"][0]) if i else ()
            nodes.append(start_node(i, home, plan, net, *peer))
            if not i:
                wait("the founder", lambda: node_json(homes[0]), nodes, folder)
        wait("the first epoch", lambda: len(commits(homes[0])) > 0, nodes, folder)
        before = averaging_times(homes[0], net)
        samples = sample_bytes(nodes, time.time() + 60 * plan.minutes)
        after = averaging_times(homes[0], net)
    curve = tapestry_curve(system, plan, spec, homes[0])
    origin = curve.notes.pop("origin")
    told = [at for at in curve.notes.pop("commits") if at <= after["clock"]]
    per_epoch = statistics.median(b - a for a, b in pairwise(told))
    begin, end = samples[0], samples[-1]
    rate = (end[1] - begin[1]) / (end[0] - begin[0])
    missed = rate * (begin[0] - origin)  # what was sent for the first epoch, before the counting began
    curve.sent = [(0.0, 0.0), *((at - origin, sent - begin[1] + missed) for at, sent in samples)]
    curve.notes["averaging"] = averaging_share(before, after, told[-1] - told[0]) | {
        "epoch_s": round(per_epoch, 3)
    }
    return curve


def start_node(i: int, home: Path, plan: Plan, net: Any, *more: str) -> subprocess.Popen[bytes]:
    command = [*net.prefix(i), sys.executable, "-P", "-m", "tapestry.node.cli", "start", "--home", str(home)]
    command += ["--data", f"stdlib:{i + 1}/{plan.nodes}", "--listen", f"/ip4/{plan.addresses[i]}/tcp/0"]
    command += ["--http", "127.0.0.1:0", "--log-format", "json", *more]
    with (home.parent / f"n{i}.log").open("wb") as log:
        return subprocess.Popen(command, stdout=log, stderr=log, stdin=subprocess.DEVNULL, env=environment())


def node_json(home: Path) -> Any:
    try:
        return json.loads((home / "node.json").read_text())
    except (OSError, ValueError):
        return None


def commits(home: Path) -> list[tuple[float, int]]:
    """(when, tokens of that epoch) of every commit, from the node's log."""
    found = []
    for line in (home.parent / f"{home.name}.log").read_text(errors="replace").splitlines():
        if '"committed epoch=' in line:
            entry = json.loads(line)
            assert entry["epoch"] == len(found) + 1, "the log leaves out an epoch"
            found.append((datetime.fromisoformat(entry["time"]).timestamp(), entry["tokens"]))
    return found


def tapestry_curve(system: str, plan: Plan, spec: RunSpec, home: Path) -> Curve:
    """Replay the update log from the initial parameters: the state of every epoch, to the bit."""
    from tapestry.dht.identity import Identity
    from tapestry.node.disk.held import open_run
    from tapestry.node.home import Home
    from tapestry.node.lineage.crypto import NodeCrypto

    run = open_run(Home(home), NodeCrypto(Identity.load(Home(home).identity_key)))
    assert run is not None
    params = initial_state(dataclasses.replace(spec.model, seed=plan.seed), spec.data.sequence_length)
    state = run.state(params)
    assert state.digest() == run.chain.genesis.state_digest, (
        "the run did not begin with the common parameters"
    )
    told = commits(home)
    per_epoch = statistics.median(b[0] - a[0] for a, b in pairwise(told))
    curve = Curve(system, notes={"origin": told[0][0] - per_epoch, "commits": [at for at, _ in told]})
    keep = Keep(curve, plan)
    keep(0.0, 0, 0, params)
    tokens = 0
    for (at, weight), epoch in zip(told, run.replay(state), strict=False):
        tokens += weight
        keep(at - curve.notes["origin"], tokens, epoch, params)
    return curve


def averaging_times(home: Path, net: Any) -> dict[str, float]:
    """Seconds of every phase so far, and the clock, of the founder."""
    code = "import sys, urllib.request as u; print(u.urlopen(sys.argv[1]).read().decode())"
    url = node_json(home)["http"].rstrip("/") + "/metrics"
    command = [*net.prefix(0), sys.executable, "-P", "-c", code, url]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    times = {"clock": time.time()}
    for line in text.splitlines():
        if line.startswith("tapestry_round_phase_seconds_sum"):
            times[line.split('"')[1]] = float(line.split()[-1])
    return times


def averaging_share(before: dict[str, float], after: dict[str, float], wall_s: float) -> dict[str, float]:
    """Shares of the founder's time from its first commit to its last: a phase is told when it ends.

    `ready` is for a good part waiting for slower members to finish their inner steps.
    """
    shares = {name: round((after[name] - before[name]) / wall_s, 4) for name in after if name != "clock"}
    shares["between_rounds"] = round(1 - sum(shares.values()), 4)
    return shares
