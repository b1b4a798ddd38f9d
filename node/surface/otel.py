"""The node's metrics to an OpenTelemetry collector, where one is named: the extra `otel`.

On where node.toml has `otlp_endpoint`, or the environment has OTEL_EXPORTER_OTLP_ENDPOINT or
OTEL_EXPORTER_OTLP_METRICS_ENDPOINT; the SDK's exporter reads the rest of its variables by itself (headers,
certificates, time). Sent over HTTP, each OTEL_METRIC_EXPORT_INTERVAL milliseconds, is what /metrics shows:
the same series under the same names, cumulative, counters without `_total`, which a Prometheus behind the
collector adds again. What is not known yet (NaN) is left out.

One thread collects and sends, and nothing depends on it: a collector that does not answer is told of once.
OpenTelemetry is imported where it is used, and not with this module.

OpenTelemetry Protocol Exporter; Prometheus and OpenMetrics Compatibility (opentelemetry.io/docs/specs/otel).
"""

from __future__ import annotations

import itertools
import logging
import math
import threading
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from tapestry.node.errors import UserError
from tapestry.node.surface.metrics import Metrics

ENDPOINTS = ("OTEL_EXPORTER_OTLP_METRICS_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")
PROTOCOLS = ("OTEL_EXPORTER_OTLP_METRICS_PROTOCOL", "OTEL_EXPORTER_OTLP_PROTOCOL")
PROTOCOL = "http/protobuf"
EXPORTER = "opentelemetry.exporter.otlp.proto.http.metric_exporter"  # its module, and its logger's name
INTERVAL = "OTEL_METRIC_EXPORT_INTERVAL"
INTERVAL_MS = 60_000  # OpenTelemetry's default
INTERVAL_MS_MIN = 1_000  # /metrics changes no faster
CLOSE_S = 1.0  # for the last figures when the node ends
INSTALL = "pip install 'tapestry-node[otel]'"

_log = logging.getLogger("tapestry.otel")


@dataclass(frozen=True, slots=True)
class About:
    """Whose figures they are: the resource's attributes."""

    version: str
    peer_id: str


def open_otel(metrics: Metrics, endpoint: str, env: Mapping[str, str], about: About) -> Otel | None:
    """Begin to send; None where nobody asked for it. `endpoint` is node.toml's, a base URL, or "".

    What the environment asks for may be meant for other programs: what cannot be had of it is a warning.
    Raises UserError for node.toml's.
    """
    if not endpoint and not _is_wanted(env):
        return None
    try:
        from opentelemetry.exporter.otlp.proto.http.metric_exporter import OTLPMetricExporter

        exporter = OTLPMetricExporter(endpoint=f"{endpoint.rstrip('/')}/v1/metrics" if endpoint else None)
    except (ImportError, ValueError, OSError) as error:
        cure = INSTALL if isinstance(error, ImportError) else "put the OTEL_EXPORTER_OTLP_ variables right"
        if endpoint:
            raise UserError(f"otlp_endpoint cannot be served: {error}", hint=cure) from error
        _log.warning("otel=off reason=%r; %s, or unset %s", str(error), cure, ENDPOINTS[1])
        return None
    return Otel(metrics, exporter, about, _interval_s(env))


def _is_wanted(env: Mapping[str, str]) -> bool:
    if not any(env.get(name) for name in ENDPOINTS):
        return False
    if env.get("OTEL_SDK_DISABLED", "").lower() == "true" or env.get("OTEL_METRICS_EXPORTER") == "none":
        return False
    protocol = next(filter(None, map(env.get, PROTOCOLS)), PROTOCOL)
    if protocol != PROTOCOL:
        _log.warning("otel=off protocol=%r; this node speaks %s: set %s", protocol, PROTOCOL, PROTOCOLS[0])
    return protocol == PROTOCOL


def _interval_s(env: Mapping[str, str]) -> float:
    text = env.get(INTERVAL) or str(INTERVAL_MS)
    if not (text.isascii() and text.isdecimal() and len(text) < 12):
        _log.warning("otel=each_%d_ms %s=%r; make it a number of milliseconds", INTERVAL_MS, INTERVAL, text)
        text = str(INTERVAL_MS)
    return max(INTERVAL_MS_MIN, int(text)) / 1000


class Otel:
    """Sends from a thread of its own until it is closed."""

    def __init__(self, metrics: Metrics, exporter: Any, about: About, interval_s: float) -> None:
        self._metrics = metrics
        self._exporter = exporter
        self._about = about
        self._interval_s = interval_s
        self._began_ns = time.time_ns()
        self._works = True  # until it is known that it does not
        self._said = _FirstWord()
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._send_all, name="otel", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Send the last figures, for a bounded time."""
        self._stopped.set()
        self._thread.join(CLOSE_S)
        if self._thread.is_alive():
            self._exporter.shutdown()  # it tries no more

    def _send_all(self) -> None:
        logger = logging.getLogger(EXPORTER)
        logger.addHandler(self._said)
        logger.propagate = False  # it would tell the same, at each try
        try:
            while not self._stopped.wait(self._interval_s):
                self._send()
            self._send()
        except Exception as error:  # whatever a library raises: it must not end the run
            _log.warning("otel=left reason=%r; mend it and start the node again to have it back", repr(error))
        finally:
            self._exporter.shutdown()
            logger.removeHandler(self._said)
            logger.propagate = True

    def _send(self) -> None:
        from opentelemetry.sdk.metrics.export import MetricExportResult

        data = metrics_data(self._metrics.collect(), self._about, self._began_ns, time.time_ns())
        self._said.text = ""
        works = self._exporter.export(data) is MetricExportResult.SUCCESS
        if works and not self._works:
            _log.info("otel=works")
        elif self._works and not works:
            _log.warning(
                "otel=failed reason=%r; tried again each %g s. See that the collector runs, and that %s or "
                "node.toml's otlp_endpoint is right",
                *(self._said.text, self._interval_s, ENDPOINTS[1]),
            )
        self._works = works


class _FirstWord(logging.Handler):
    """What the exporter said first of a try, which is the cause: it returns no reason."""

    def __init__(self) -> None:
        super().__init__()
        self.text = ""

    def emit(self, record: logging.LogRecord) -> None:
        """As logging.Handler."""
        self.text = self.text or record.getMessage()[:300]


# --- from Prometheus' data model to OpenTelemetry's ---------------------------------------------------


def metrics_data(families: Iterable[Any], about: About, began_ns: int, now_ns: int) -> Any:
    """MetricsData of prometheus_client's families."""
    from opentelemetry.sdk.metrics import export as sdk
    from opentelemetry.sdk.resources import OTELResourceDetector, Resource
    from opentelemetry.sdk.util.instrumentation import InstrumentationScope

    own = {
        "service.name": "tapestry-node",
        "service.version": about.version,
        "service.instance.id": about.peer_id,
    }
    resource = Resource(own).merge(OTELResourceDetector().detect())  # the environment's go before ours
    times = _Times(began_ns, now_ns)
    found = [metric for family in families for metric in _metrics_of(family, times)]
    scope = sdk.ScopeMetrics(InstrumentationScope("tapestry", about.version), found, "")
    return sdk.MetricsData([sdk.ResourceMetrics(resource, [scope], "")])


@dataclass(frozen=True, slots=True)
class _Times:
    began_ns: int
    now_ns: int


def _metrics_of(family: Any, times: _Times) -> list[Any]:
    """Those of one family that have a point."""
    from opentelemetry.sdk.metrics import export as sdk

    whole = sdk.AggregationTemporality.CUMULATIVE
    if family.type == "histogram":
        found = {family.name: sdk.Histogram(_histograms(family.samples, times), whole)}
    elif family.type == "counter":
        points = _numbers([s for s in family.samples if s.name.endswith("_total")], times)
        found = {family.name: sdk.Sum(points, whole, is_monotonic=True)}
    else:  # an info's sample has another name than its family
        names = dict.fromkeys(sample.name for sample in family.samples)
        found = {
            name: sdk.Gauge(_numbers([s for s in family.samples if s.name == name], times)) for name in names
        }
    return [
        sdk.Metric(name, family.documentation, "", data) for name, data in found.items() if data.data_points
    ]


def _numbers(samples: Iterable[Any], times: _Times) -> list[Any]:
    from opentelemetry.sdk.metrics.export import NumberDataPoint

    return [
        NumberDataPoint(dict(sample.labels), times.began_ns, times.now_ns, float(sample.value))
        for sample in samples
        if math.isfinite(sample.value)
    ]


def _histograms(samples: Iterable[Any], times: _Times) -> list[Any]:
    """One for each set of labels; Prometheus counts in a bucket what is in those below it, too."""
    from opentelemetry.sdk.metrics.export import HistogramDataPoint

    found: dict[tuple[tuple[str, str], ...], dict[str, Any]] = {}
    for sample in samples:
        labels = {key: value for key, value in sample.labels.items() if key != "le"}
        entry = found.setdefault(tuple(labels.items()), {"bounds": [], "counts": [], "sum": 0.0})
        if sample.name.endswith("_bucket"):
            entry["bounds"].append(float(sample.labels["le"]))
            entry["counts"].append(int(sample.value))
        elif sample.name.endswith("_sum"):
            entry["sum"] = float(sample.value)
    return [
        HistogramDataPoint(
            attributes=dict(labels),
            start_time_unix_nano=times.began_ns,
            time_unix_nano=times.now_ns,
            count=entry["counts"][-1],
            sum=entry["sum"],
            bucket_counts=[high - low for low, high in itertools.pairwise([0, *entry["counts"]])],
            explicit_bounds=entry["bounds"][:-1],  # the last is infinite
            min=None,  # Prometheus keeps none
            max=None,
        )
        for labels, entry in found.items()
    ]
