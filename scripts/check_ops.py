#!/usr/bin/env python3
"""Checks docs/ops with Prometheus's own tools, and its dashboard against real nodes.

    scripts/check_ops.py            rules, their tests and the configuration; then two nodes, a Prometheus
                                    that scrapes them, and every query of every panel: all return numbers
    scripts/check_ops.py --rules    without the nodes

Needs prometheus and promtool (apt install prometheus). Takes two or three minutes, and leaves nothing behind.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.parse
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))
from _nodes import INSTALLED, Failed, Node, fetched, replace_key
from _processes import end_with_parent

OPS = Path(__file__).resolve().parent.parent / "docs" / "ops"
DASHBOARD = OPS / "grafana.json"
SCRAPE_S = 1
SCRAPED_S = 25.0  # before the panels are asked: some rates want a range of several scrapes
RANGE = "20s"  # what Grafana's $__rate_interval becomes
READY_S = 240.0  # on a busy machine
STOP_S = 12.0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--rules", action="store_true", help="check files only, without nodes")
    only_rules = parser.parse_args().rules
    for tool in ("prometheus", "promtool"):
        if shutil.which(tool) is None:
            print(f"error: {tool} is not installed\nhint: apt install prometheus", file=sys.stderr)
            return 1
    try:
        check_files()
        if not only_rules:
            with tempfile.TemporaryDirectory(prefix="tapestry-ops-") as folder:
                check_panels(Path(folder))
    except Failed as failure:
        print("\n".join([f"FAILED: {failure}", *(f"  {line}" for line in failure.details)]))
        return 1
    return 0


# ---- the files -------------------------------------------------------------------------------------------


def check_files() -> None:
    """Raises Failed with what promtool says."""
    for words in (
        ("check", "rules", "alerts.yml"),
        ("test", "rules", "alerts.test.yml"),
        ("check", "config", "prometheus.yml"),
    ):
        done = subprocess.run(["promtool", *words], cwd=OPS, capture_output=True, text=True, check=False)
        if done.returncode:
            said = (done.stdout + done.stderr).splitlines()
            raise Failed(f"promtool {' '.join(words)} ended with exit code {done.returncode}", said)
        print(f"promtool {' '.join(words)}: passed")


def queries(dashboard: Path) -> Iterator[tuple[str, str]]:
    """Title of the panel and query, with Grafana's variables replaced."""
    values = {"$__rate_interval": RANGE, "$instance": ".*", "$run": ".*"}
    for panel in json.loads(dashboard.read_text())["panels"]:
        for target in panel.get("targets", ()):
            expression = target["expr"]
            for name, value in values.items():
                expression = expression.replace(name, value)
            yield panel["title"], expression


# ---- the panels ------------------------------------------------------------------------------------------


def check_panels(folder: Path) -> None:
    """Two nodes, a Prometheus, and what each panel gets of it. Raises Failed."""
    nodes = [Node(f"node {number}", folder, INSTALLED, ("--data", f"stdlib:{number}/2")) for number in (1, 2)]
    prometheus: subprocess.Popen[bytes] | None = None
    try:
        begin(nodes)
        prometheus, url = scraping(folder, [node.info["http"] for node in nodes])
        wait("both nodes scraped", lambda: len(asked(url, 'up{job="tapestry"} == 1')) == 2, READY_S)
        time.sleep(SCRAPED_S)
        empty = [f"{title}: {query}" for title, query in queries(DASHBOARD) if not numbers(asked(url, query))]
        if empty:
            raise Failed("these panels would be empty", empty)
        alerts = [result["metric"]["alertname"] for result in asked(url, 'ALERTS{alertstate="firing"}')]
        if alerts:
            raise Failed("two nodes that are well raise alerts", alerts)
        print(f"{len([*queries(DASHBOARD)])} queries of the dashboard return numbers; no alert fires")
    finally:
        end([*(node.process for node in nodes), prometheus])


def begin(nodes: Sequence[Node]) -> None:
    """One run of all: until each has contributed with the others."""
    first, *others = nodes
    first.make_home("--preset", "nano")
    replace_key(first.home / "run.toml", "inner_steps", 30)
    first.start([])
    wait_ready(first)
    line = first.invitation(uses=len(others))
    for node in others:
        node.make_home_of_joiner()
        node.start([line])
    for node in others:
        wait_ready(node)

    def together() -> bool:
        return bool(records := first.records()) and len(records[-1].contributors) == len(nodes)

    wait("an epoch of all members", together, READY_S)
    print(f"{len(nodes)} nodes train together")


def wait_ready(node: Node) -> None:
    def ready() -> bool:
        node.look()
        if node.ended() is not None:
            raise Failed(f"{node.label} ended", node.log_tail())
        return node.ready

    wait(f"{node.label} to be ready", ready, READY_S)


def scraping(folder: Path, nodes: Sequence[str]) -> tuple[subprocess.Popen[bytes], str]:
    """A Prometheus with our rules that scrapes the nodes, and its address."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    targets = json.dumps([urllib.parse.urlsplit(node).netloc for node in nodes])
    config = (OPS / "prometheus.yml").read_text()
    config = re.sub(r"targets: .*", f"targets: {targets}", config)
    config = re.sub(r"scrape_interval: .*", f"scrape_interval: {SCRAPE_S}s", config)
    config = config.replace("- alerts.yml", f"- {OPS / 'alerts.yml'}")
    (folder / "prometheus.yml").write_text(config)
    with (folder / "prometheus.log").open("wb") as log:
        process = subprocess.Popen(
            [
                "prometheus",
                f"--config.file={folder / 'prometheus.yml'}",
                f"--storage.tsdb.path={folder / 'tsdb'}",
                f"--web.listen-address=127.0.0.1:{port}",
            ],
            stdout=log,
            stderr=log,
            preexec_fn=end_with_parent,
        )
    return process, f"http://127.0.0.1:{port}"


def asked(url: str, query: str) -> list[dict[str, Any]]:
    """The result of an instant query; nothing while there is no answer."""
    try:
        answer = json.loads(fetched(f"{url}/api/v1/query?{urllib.parse.urlencode({'query': query})}"))
    except OSError:
        return []
    return list(answer["data"]["result"])


def numbers(results: Sequence[dict[str, Any]]) -> list[float]:
    """Those of the results that a panel can draw."""
    values = [float(result["value"][1]) for result in results]
    return [value for value in values if math.isfinite(value)]


def wait(what: str, condition: Callable[[], bool], limit_s: float) -> None:
    end_s = time.monotonic() + limit_s
    while not condition():
        if time.monotonic() > end_s:
            raise Failed(f"waited {limit_s:.0f} s in vain for {what}")
        time.sleep(0.3)


def end(processes: Sequence[subprocess.Popen[bytes] | None]) -> None:
    """In good order, all at the same time."""
    running = [process for process in processes if process is not None and process.poll() is None]
    for process in running:
        process.terminate()
    for process in running:
        try:
            process.wait(STOP_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


if __name__ == "__main__":
    sys.exit(main())
