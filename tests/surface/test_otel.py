"""What a collector gets is what /metrics shows; a collector on loopback, in a thread."""

from __future__ import annotations

import logging
import re
import sys
import time
from collections.abc import Iterator, Mapping
from typing import Any

import pytest
from collector import Collector

from tapestry.node.errors import UserError
from tapestry.node.surface.metrics import Metrics
from tapestry.node.surface.otel import ENDPOINTS, EXPORTER, INTERVAL, About, _interval_s, open_otel

ABOUT = About("0.1.0", "12D3KooWhanoi1")
SAMPLE = re.compile(r"^([a-z_]+)(?:\{(.*)\})? (\S+)$")


@pytest.fixture
def collector() -> Iterator[Collector]:
    pytest.importorskip("opentelemetry.sdk", reason="the extra otel is not installed")
    made = Collector()
    yield made
    made.close()


@pytest.fixture(autouse=True)
def plain_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (*ENDPOINTS, "HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)


def _used() -> Metrics:
    metrics = Metrics("0.1.0")
    metrics.set_run("ab" * 32, "commons")
    metrics.set_epoch(7)
    metrics.round_ended("committed", 0.3)
    metrics.round_ended("committed", 700.0)
    metrics.network_bytes("sent", "contribution", 1000)
    metrics.set_validation_losses({"fr": 2.5})
    return metrics


def _sent(request: Any) -> dict[tuple[str, Mapping[str, str]], float]:
    """Name and labels -> value; of a histogram its buckets, count and sum, as Prometheus writes them."""
    found = {}
    ((scope,),) = [resource.scope_metrics for resource in request.resource_metrics]
    for metric in scope.metrics:
        kind = metric.WhichOneof("data")
        data = getattr(metric, kind)
        for point in data.data_points:
            labels = {a.key: a.value.string_value for a in point.attributes}
            if kind != "histogram":
                name = metric.name + ("_total" if kind == "sum" else "")
                found[name, tuple(sorted(labels.items()))] = point.as_double
                continue
            below = 0
            for bound, count in zip([*point.explicit_bounds, float("inf")], point.bucket_counts, strict=True):
                below += count
                at = {**labels, "le": "+Inf" if bound == float("inf") else repr(bound)}
                found[f"{metric.name}_bucket", tuple(sorted(at.items()))] = below
            found[f"{metric.name}_count", tuple(sorted(labels.items()))] = point.count
            found[f"{metric.name}_sum", tuple(sorted(labels.items()))] = point.sum
    return found


def _shown(metrics: Metrics) -> dict[tuple[str, Mapping[str, str]], float]:
    """What /metrics shows, and is known."""
    found = {}
    for line in metrics.render().decode().splitlines():
        match = SAMPLE.match(line)
        if match is not None and match[3] != "NaN":
            labels = dict(re.findall(r'([a-z_]+)="([^"]*)"', match[2] or ""))
            found[match[1], tuple(sorted(labels.items()))] = float(match[3])
    return found


def test_a_collector_gets_what_metrics_shows(collector: Collector) -> None:
    metrics = _used()
    otel = open_otel(metrics, collector.url, {}, ABOUT)
    assert otel is not None
    otel.close()  # sends the last figures
    path, request = collector.requests.get(timeout=10)
    sent, shown = _sent(request), _shown(metrics)
    assert path == "/v1/metrics" and sent.keys() == shown.keys()
    assert {k: v for k, v in sent.items() if not k[0].startswith("process_")} == {
        k: v for k, v in shown.items() if not k[0].startswith("process_")
    }
    resource = {a.key: a.value.string_value for a in request.resource_metrics[0].resource.attributes}
    assert (resource["service.name"], resource["service.instance.id"]) == ("tapestry-node", ABOUT.peer_id)


def test_the_environment_turns_it_on_and_names_the_service(
    collector: Collector, monkeypatch: pytest.MonkeyPatch
) -> None:
    env = {ENDPOINTS[1]: collector.url, "OTEL_SERVICE_NAME": "lab-hanoi", "OTEL_METRIC_EXPORT_INTERVAL": "1"}
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    otel = open_otel(_used(), "", env, ABOUT)
    assert otel is not None
    path, request = collector.requests.get(timeout=10)  # after the shortest interval, a second
    otel.close()
    resource = {a.key: a.value.string_value for a in request.resource_metrics[0].resource.attributes}
    assert path == "/v1/metrics" and resource["service.name"] == "lab-hanoi"


def test_a_collector_that_is_gone_is_told_once_with_the_cure(
    collector: Collector, caplog: pytest.LogCaptureFixture
) -> None:
    collector.close()
    with caplog.at_level(logging.INFO):
        otel = open_otel(_used(), collector.url, {"OTEL_METRIC_EXPORT_INTERVAL": "1"}, ABOUT)
        assert otel is not None
        end = time.monotonic() + 30
        while not caplog.records and time.monotonic() < end:
            time.sleep(0.05)
        otel.close()
        otel._thread.join(10)
    (record,) = caplog.records
    assert all(word in record.getMessage() for word in ("otel=failed", "refused", ENDPOINTS[1]))
    assert not otel._thread.is_alive() and logging.getLogger(EXPORTER).propagate


def test_an_interval_that_is_none_is_told_and_the_usual_one_taken(caplog: pytest.LogCaptureFixture) -> None:
    assert _interval_s({INTERVAL: "1s"}) == 60.0 and "milliseconds" in caplog.messages[0]
    assert (_interval_s({}), _interval_s({INTERVAL: "5000"}), _interval_s({INTERVAL: "5"})) == (
        60.0,
        5.0,
        1.0,
    )


@pytest.mark.parametrize(
    "env",
    [
        {},
        {"OTEL_SDK_DISABLED": "true", ENDPOINTS[1]: "http://127.0.0.1:9"},
        {"OTEL_METRICS_EXPORTER": "none", ENDPOINTS[1]: "http://127.0.0.1:9"},
    ],
)
def test_without_being_asked_nothing_is_sent_and_nothing_imported(
    env: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, EXPORTER, None)
    assert open_otel(Metrics("0"), "", env, ABOUT) is None


def test_what_cannot_be_had_is_a_warning_for_the_environment_and_an_error_for_the_home(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, EXPORTER, None)  # as if it were not installed
    assert open_otel(Metrics("0"), "", {ENDPOINTS[1]: "http://127.0.0.1:9"}, ABOUT) is None
    grpc = {ENDPOINTS[1]: "http://127.0.0.1:9", "OTEL_EXPORTER_OTLP_PROTOCOL": "grpc"}
    assert open_otel(Metrics("0"), "", grpc, ABOUT) is None
    assert ["pip install" in caplog.messages[0], "http/protobuf" in caplog.messages[1]] == [True, True]
    with pytest.raises(UserError, match="otlp_endpoint") as caught:
        open_otel(Metrics("0"), "http://127.0.0.1:9", {}, ABOUT)
    assert caught.value.hint is not None and "tapestry-node[otel]" in caught.value.hint
