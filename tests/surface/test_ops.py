"""docs/ops against the metrics that a node has; scripts/check_ops.py does so with a real Prometheus."""

from __future__ import annotations

import json
import math
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from unittest.mock import MagicMock

import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

from tapestry.node.surface.metrics import Metrics

ROOT = Path(__file__).resolve().parent.parent.parent
OPS = ROOT / "docs" / "ops"
MADE_BY_PROMETHEUS = {"up"}
OF_A_SCRAPE = {"job", "instance"}  # labels that Prometheus adds


def _series() -> dict[str, dict[str, set[str]]]:
    """Name on the wire -> label -> values, of a node that has a validation set."""
    metrics = Metrics("0.1.0")
    metrics.set_validation_losses({"fr": math.nan})
    found: dict[str, dict[str, set[str]]] = {}
    for family in text_string_to_metric_families(metrics.render().decode()):
        for sample in family.samples:
            labels = found.setdefault(sample.name, {})
            for label, value in sample.labels.items():
                labels.setdefault(label, set()).add(value)
    return found


def _panels() -> list[tuple[str, str]]:
    panels = json.loads((OPS / "grafana.json").read_text())["panels"]
    return [(panel["title"], target["expr"]) for panel in panels for target in panel.get("targets", ())]


def _alerts() -> list[dict]:
    (group,) = yaml.safe_load((OPS / "alerts.yml").read_text())["groups"]
    return list(group["rules"])


def _queries() -> list[tuple[str, str]]:
    return [*_panels(), *((rule["alert"], rule["expr"]) for rule in _alerts())]


def faults_of(query: str, series: dict[str, dict[str, set[str]]]) -> Iterator[str]:
    """What a query names that no node has."""
    for name in re.findall(
        r"\b(?:tapestry|process)_[a-z_]+\b", re.sub(r"\b(?:by|on)\s*\([^)]*\)", "", query)
    ):
        if name not in series:
            yield f"no metric {name}"
    for name, selector in re.findall(r"\b([a-z_]+)\{([^}]*)\}", query):
        labels = series.get(name, {})
        for label, sign, value in re.findall(r'(\w+)(=~|!~|!=|=)"([^"]*)"', selector):
            if label not in labels and label not in OF_A_SCRAPE:
                yield f"{name} has no label {label}"
            elif sign == "=" and label in labels and value not in labels[label]:
                yield f'{name} has no {label}="{value}"'


@pytest.mark.parametrize(("title", "query"), _queries(), ids=lambda value: value if " " in value else None)
def test_what_a_panel_or_an_alert_names_exists(title: str, query: str) -> None:
    assert list(faults_of(query, _series() | {name: {} for name in MADE_BY_PROMETHEUS})) == [], title


@pytest.mark.parametrize(
    ("query", "fault"),
    [
        ("rate(tapestry_tokens_total[5m])", "no metric tapestry_tokens_total"),
        ('tapestry_peers{stage="training"}', "tapestry_peers has no label stage"),
        ('tapestry_peers{phase="sleeping"}', 'tapestry_peers has no phase="sleeping"'),
    ],
)
def test_a_query_of_what_does_not_exist_is_found(query: str, fault: str) -> None:
    assert list(faults_of(query, _series())) == [fault]


def test_every_metric_is_in_a_panel_but_those_that_say_nothing_alone() -> None:
    named = set(re.findall(r"\btapestry_[a-z_]+\b", " ".join(query for _, query in _panels())))
    metrics = {
        re.sub(r"_(bucket|sum|count)$", "", name) for name in _series() if name.startswith("tapestry_")
    }
    assert metrics - {re.sub(r"_(bucket|sum|count)$", "", name) for name in named} == set()


def test_every_alert_says_what_is_wrong_and_what_to_do_and_is_tested() -> None:
    tested = (OPS / "alerts.test.yml").read_text()
    for rule in _alerts():
        assert rule["labels"]["severity"] in ("warning", "critical")
        assert "instance" in rule["annotations"]["summary"]
        assert len(rule["annotations"]["description"]) > 60
        assert f'alertname="{rule["alert"]}"' in tested


def test_ids_and_places_of_the_panels_are_their_own() -> None:
    panels = json.loads((OPS / "grafana.json").read_text())["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    taken: set[tuple[int, int]] = set()
    for panel in panels:
        place = panel["gridPos"]
        cells = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert not cells & taken and place["x"] + place["w"] <= 24, panel["title"]
        taken |= cells


@pytest.mark.ops
def test_prometheus_accepts_the_rules_and_every_panel_shows_two_real_nodes() -> None:
    for tool in ("prometheus", "promtool"):
        if shutil.which(tool) is None:
            pytest.fail(f"{tool} is not installed: apt install prometheus")
    command = [sys.executable, "-P", str(ROOT / "scripts" / "check_ops.py")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=400, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_second_node_of_the_check_comes_by_an_invitation(monkeypatch: pytest.MonkeyPatch) -> None:
    """A run has members only, unless it says otherwise: by a bare address it would wait for good."""
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    import check_ops

    first, second = (MagicMock(name=name, ready=True, records=lambda: []) for name in ("first", "second"))
    first.ended.return_value = second.ended.return_value = None
    first.invitation.return_value = "LINE"
    monkeypatch.setattr(check_ops, "replace_key", lambda *_: None)
    monkeypatch.setattr(check_ops, "wait", lambda *_: None)
    check_ops.begin([first, second])
    first.invitation.assert_called_once_with(uses=1)
    second.start.assert_called_once_with(["LINE"])
