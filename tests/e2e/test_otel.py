"""A real node and an OpenTelemetry collector, which is in this process."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
from collector import Collector
from e2e.harness import DEADLINE_S, Node, init

pytestmark = pytest.mark.e2e


def test_a_node_sends_its_figures_to_the_collector_that_the_environment_names(tmp_path: Path) -> None:
    pytest.importorskip("opentelemetry.sdk", reason="the extra otel is not installed")
    collector = Collector()
    node = Node(init(tmp_path / "home", min_members="1"))
    node.environment = {
        "OTEL_EXPORTER_OTLP_ENDPOINT": collector.url,
        "OTEL_METRIC_EXPORT_INTERVAL": "1000",
        "NO_PROXY": "127.0.0.1",
    }
    try:
        with node.start().wait_ready():
            sent = _until(collector, "tapestry_epoch", 2.0)
            assert node.status()["epoch"] >= 2
            assert sent["service.name"] == "tapestry-node"
            assert sent["service.instance.id"] == node.status()["peer_id"]
            assert node.stop() == 0
        assert "otel=" not in node.log.read_text(), "nothing to warn of"
    finally:
        collector.close()


def _until(collector: Collector, name: str, at_least: float) -> dict[str, str]:
    """Until a metric has come so far; what the request says of who sent it."""
    end_s = time.monotonic() + DEADLINE_S
    while (left_s := end_s - time.monotonic()) > 0:
        _, request = collector.requests.get(timeout=left_s)
        (resource,) = request.resource_metrics
        if max(_values(resource, name), default=0.0) >= at_least:
            return {a.key: a.value.string_value for a in resource.resource.attributes}
    raise AssertionError(f"{name} did not come to {at_least}")


def _values(resource: Any, name: str) -> list[float]:
    metrics = [metric for scope in resource.scope_metrics for metric in scope.metrics if metric.name == name]
    return [point.as_double for metric in metrics for point in metric.gauge.data_points]
