"""How long it takes to average vectors over real links: this node, hivemind and gloo, in one run, in turns.

    .venv/bin/python -P scripts/bench_averaging.py --compare hivemind,gloo
    .venv/bin/python -P scripts/bench_averaging.py --link 100mbit --compare hivemind,gloo
    .venv/bin/python -P scripts/bench_averaging.py --peers 2 --params 100000000 --link 1gbit
    .venv/bin/python -P scripts/bench_averaging.py --compare tapestry:0     what audits cost

Every peer is a process (with p2pd, where the system has one); with --link each has a network namespace of its
own and `tbf` limits what it sends; without, all share the loopback of one namespace, or the machine's own
where there is no root. All peers start a round at the same moment, with their vectors, N(0, 1), in memory as
float32. The round's time is that of the last peer.

What is timed, for each system from float32 in to float32 out:
  tapestry   the whole round of a node, with all that makes it safe: encode, READY and ROSTER, exchange,
             result and votes on disk (fsync), ACCEPT and COMMIT, record on disk, decode, outer step taken.
             Only the trainer is a stand-in. `mean_s`: when the last peer had the whole mean, encoded.
             tapestry:SHARE has that share of audits, and plain tapestry the run spec's default. What is
             audited after a round is not in its time: `sent_by_kind` and `run_cpu_s` are of all rounds and
             what lay between, of all peers together.
  hivemind   DecentralizedAverager with Uniform8BitQuantization (:float16, :float32 with those compressions),
             without its matchmaking: from `allow_allreduce` to the result.
  gloo       torch.distributed.all_reduce and the division, float32, not encrypted.

`limit_s` is what 2(n-1)/n encoded vectors take on the link, without any header; `of_limit` is limit_s over
the median. `link_utilisation` is all bytes that left a peer's interface, headers included, over what the link
could have carried in the median time. `error` is root mean square over that of the true mean.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))

from _netns import Net, missing, parse_link  # noqa: E402

START_IN_S = 0.1  # from the order to the start of a round
BITS = {"tapestry": 8 * 260 / 256, "8bit": 8.0, "float16": 16.0, "float32": 32.0}  # on the way, per parameter


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--peers", type=int, default=4)
    parser.add_argument("--params", type=int, default=10_000_000)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--link", help="100mbit, 1gbit: what each peer may send")
    parser.add_argument("--compare", default="", help="hivemind[:float16 | :float32], gloo, tapestry:SHARE")
    parser.add_argument("--shard-elements", type=int, default=0, help="the run spec's default unless given")
    parser.add_argument("--codec", default="int8-block")
    parser.add_argument("--without-tapestry", action="store_true")
    parser.add_argument(
        "--first", action="store_true", help="rounds go before what else runs here (real-time priority; root)"
    )
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    names = [] if arguments.without_tapestry else ["tapestry"]
    names += [name for name in arguments.compare.split(",") if name]
    with tempfile.TemporaryDirectory(prefix="tapestry-bench-") as folder:
        report = measure(arguments, names, Path(folder))
    print(json.dumps(report, indent=1))
    if arguments.json:
        arguments.json.write_text(json.dumps(report, indent=1) + "\n")


def measure(arguments: argparse.Namespace, names: list[str], folder: Path) -> dict[str, Any]:
    link_bps = parse_link(arguments.link) if arguments.link else None
    with contextlib.ExitStack() as stack:
        net = None
        if link_bps is not None or missing() is None:
            net = stack.enter_context(Net(arguments.peers if link_bps else 1, link_bps))
        systems = [stack.enter_context(System(name, arguments, folder, net)) for name in names]
        for system in systems:
            system.start()
        for round_ in range(arguments.rounds + 1):
            for system in systems:
                system.round(warm_up=round_ == 0)
        return {
            "peers": arguments.peers,
            "params": arguments.params,
            "rounds": arguments.rounds,
            "link_bps": link_bps,
            "systems": {system.name: system.report(link_bps) for system in systems},
        }


class System:
    """One system's peers."""

    def __init__(self, name: str, arguments: argparse.Namespace, folder: Path, net: Net | None) -> None:
        self.name = name
        self.kind, _, variant = name.partition(":")
        self.codec = {"tapestry": "tapestry", "hivemind": variant or "8bit", "gloo": "float32"}[self.kind]
        self.audit_share = float(variant) if self.kind == "tapestry" and variant else None
        self.arguments = arguments
        self.folder = folder / name
        self.net = net
        self.times: list[float] = []
        self.stages: list[dict[str, float]] = []
        self.sent: list[float] = []
        self.cpu: list[dict[str, float]] = []
        self.base: list[int] = []
        self.run_cpu_s = 0.0  # when the first round that counts began
        self.processes: list[subprocess.Popen[str]] = []

    def __enter__(self) -> System:
        return self

    def __exit__(self, *_: object) -> None:
        for process in self.processes:
            with contextlib.suppress(OSError):
                process.stdin.close()  # type: ignore[union-attr]
        for process in self.processes:
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()

    def start(self) -> None:
        self.folder.mkdir()
        for peer in range(self.arguments.peers):
            prefix, address, interface = [], "127.0.0.1", "lo"
            if self.net is not None:
                linked = self.net.link_bps is not None
                prefix = self.net.prefix(peer if linked else 0)
                if linked:
                    address, interface = self.net.address(peer), "eth0"
            options = {
                "kind": self.kind,
                "system": self.name,
                "codec": self.arguments.codec if self.kind == "tapestry" else self.codec,
                "peer": peer,
                "peers": self.arguments.peers,
                "params": self.arguments.params,
                "folder": str(self.folder),
                "address": address,
                "interface": interface,
                "shard_elements": self.arguments.shard_elements or default_shard(),
                "round": {},
                "audit": {} if self.audit_share is None else {"share": self.audit_share},
            }
            self.processes.append(
                subprocess.Popen(
                    [*prefix, sys.executable, "-P", str(HERE / "_bench_peers.py"), json.dumps(options)],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    env=os.environ | {"OMP_NUM_THREADS": "1"},
                    text=True,
                )
            )
        list(self.answers())

    def ask(self, **command: Any) -> list[dict[str, Any]]:
        for process in self.processes:
            assert process.stdin is not None
            process.stdin.write(json.dumps(command) + "\n")
            process.stdin.flush()
        return list(self.answers())

    def answers(self) -> Iterator[dict[str, Any]]:
        for process in self.processes:
            assert process.stdout is not None
            line = process.stdout.readline()
            if not line:
                raise SystemExit(f"a peer of {self.name} failed; what it said is above")
            yield json.loads(line)

    def round(self, warm_up: bool) -> None:
        ready = self.ask(do="ready")
        self.base = self.base or [answer["base_bytes"] for answer in ready]
        if warm_up or not self.run_cpu_s:
            self.run_cpu_s = sum(answer["run_cpu_s"] for answer in ready)
        sent = self.sent_bytes()
        with self.first():
            start_at = time.monotonic() + START_IN_S
            answers = self.ask(do="round", start_at=start_at)
        if warm_up:
            return
        self.times.append(max(answer["end_at"] for answer in answers) - start_at)
        parts = answers[0]["cpu_s"]
        self.cpu.append({part: sum(answer["cpu_s"][part] for answer in answers) for part in parts})
        if sent is not None:
            self.sent.append(((self.sent_bytes() or 0) - sent) / self.arguments.peers)
        names = [name for name in answers[0] if name.endswith("_at") and name != "end_at"]
        if names:
            last = {name[:-3] + "_s": max(answer[name] for answer in answers) - start_at for name in names}
            self.stages.append(last)

    @contextlib.contextmanager
    def first(self) -> Iterator[None]:
        """With --first: all threads of all peers before any other process, in turns among themselves."""
        if self.arguments.first:
            self.schedule(os.SCHED_RR, 1)
        yield
        if self.arguments.first:
            self.schedule(os.SCHED_OTHER, 0)

    def schedule(self, policy: int, priority: int) -> None:
        for process in self.processes:
            me = psutil.Process(process.pid)
            for each in (me, *me.children(recursive=True)):
                for thread in each.threads():
                    with contextlib.suppress(ProcessLookupError):
                        os.sched_setscheduler(thread.id, policy, os.sched_param(priority))

    def sent_bytes(self) -> int | None:
        """What has left all peers' interfaces so far."""
        if self.net is None:
            return None
        if self.net.link_bps is None:
            counter = "/sys/class/net/lo/statistics/tx_bytes"
            return int(subprocess.check_output([*self.net.prefix(0), "cat", counter]))
        return sum(self.net.sent_bytes(peer) for peer in range(self.arguments.peers))

    def report(self, link_bps: int | None) -> dict[str, Any]:
        last = self.ask(do="result")
        peers, params = self.arguments.peers, self.arguments.params
        median_s = statistics.median(self.times)
        bytes_per_peer = statistics.median(self.sent) if self.sent else None
        report: dict[str, Any] = {
            "median_s": median_s,
            "min_s": min(self.times),
            "max_s": max(self.times),
            "times_s": [round(t, 4) for t in self.times],
            "bytes_per_peer": bytes_per_peer,
            "error": max(answer["error"] for answer in last),
            "max_divergence": divergence([answer["path"] for answer in last]),
            "rss_peak_bytes": max(answer["rss"]["own"] for answer in last),
            "rss_peak_children_bytes": max(answer["rss"]["children"] for answer in last),
            "rss_growth_per_param": max(
                answer["rss"]["own"] - b for answer, b in zip(last, self.base, strict=True)
            )
            / params,
            "cpu_s": statistics.median(sum(used.values()) for used in self.cpu),
            "run_cpu_s": sum(answer["run_cpu_s"] for answer in last) - self.run_cpu_s,
            "cpu_parts_s": {p: statistics.mean(used[p] for used in self.cpu) for p in self.cpu[0]},
        }
        if link_bps:
            payload_bits = 2 * (peers - 1) / peers * params * BITS[self.codec]
            report["limit_s"] = payload_bits / link_bps
            report["of_limit"] = report["limit_s"] / median_s
            report["link_utilisation"] = (bytes_per_peer or 0) * 8 / link_bps / median_s
        for name in self.stages[0] if self.stages else ():
            report[name] = statistics.median(stage[name] for stage in self.stages)
        if "state_digest" in last[0]:
            report["states"] = len({answer["state_digest"] for answer in last})
            report["loop_lag"] = last[0]["loop_lag"]
            sent = [answer["sent_by_kind"] for answer in last]
            report["sent_by_kind"] = {kind: sum(each[kind] for each in sent) for kind in sent[0]}
        return report


def divergence(paths: list[str]) -> float:
    """The largest difference between two peers' results in one element."""
    results = [np.memmap(path, np.float32, "r") for path in paths]
    worst = 0.0
    for start in range(0, len(results[0]), 1 << 22):
        rows = np.stack([result[start : start + (1 << 22)] for result in results])
        worst = max(worst, float((rows.max(axis=0) - rows.min(axis=0)).max()))
    return worst


def default_shard() -> int:
    from tapestry.node.spec.run import CompressionSpec

    return CompressionSpec().shard_elements


if __name__ == "__main__":
    main()
