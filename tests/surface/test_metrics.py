"""The metrics: names, labels and start values against the contract, which docs/watching.md shows."""

from __future__ import annotations

import math
import re
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from tapestry.dht import presence
from tapestry.node.protocol.agreement import Agreement
from tapestry.node.surface.metrics import Metrics

# name -> type, labels without `le`. The last four are ours, beyond the contract.
CONTRACT = {
    "tapestry_info": ("gauge", {"version", "run_id", "run_name"}),
    "tapestry_epoch": ("gauge", set()),
    "tapestry_rounds": ("counter", {"outcome"}),
    "tapestry_round_seconds": ("histogram", set()),
    "tapestry_round_phase_seconds": ("histogram", {"phase"}),
    "tapestry_network_bytes": ("counter", {"direction", "kind"}),
    "tapestry_train_loss": ("gauge", set()),
    "tapestry_validation_loss": ("gauge", {"set"}),
    "tapestry_train_data_passes": ("gauge", set()),
    "tapestry_train_tokens": ("counter", set()),
    "tapestry_train_waiting_seconds": ("counter", set()),
    "tapestry_train_steps": ("counter", set()),
    "tapestry_agreement": ("gauge", {"figure"}),
    "tapestry_peers": ("gauge", {"phase"}),
    "tapestry_members": ("gauge", set()),
    "tapestry_applicants": ("gauge", set()),
    "tapestry_links": ("gauge", {"route"}),
    "tapestry_contribution_weight": ("gauge", set()),
    "tapestry_gate": ("counter", {"outcome"}),
    "tapestry_audits": ("counter", {"outcome"}),
    "tapestry_accusations": ("counter", set()),
    "tapestry_rollbacks": ("counter", set()),
    "tapestry_dropped_records": ("counter", set()),
    "tapestry_dropped_weight": ("counter", set()),
    "tapestry_refused": ("counter", {"reason"}),
    "tapestry_trainer_up": ("gauge", set()),
    "tapestry_trainer_restarts": ("counter", set()),
    "tapestry_waiting_seconds": ("gauge", {"kind"}),
    "tapestry_loop_lag_seconds": ("histogram", set()),
    "tapestry_disk_bytes": ("gauge", {"kind"}),
    "tapestry_disk_free_bytes": ("gauge", set()),
}


def _samples(metrics: Metrics) -> dict[str, float]:
    """'name{label="value",...}' -> value."""
    return {
        line.rpartition(" ")[0]: float(line.rpartition(" ")[2])
        for line in metrics.render().decode().splitlines()
        if not line.startswith("#")
    }


def _with_sets() -> Metrics:
    """As soon as the trainer has said which sets this member has."""
    metrics = Metrics("0.1.0")
    metrics.set_validation_losses({"fr": math.nan, "de": math.nan})
    return metrics


def test_names_types_and_labels_are_those_of_the_contract() -> None:
    found = {
        family.name: (family.type, {key for sample in family.samples for key in sample.labels} - {"le"})
        for family in text_string_to_metric_families(_with_sets().render().decode())
        if family.name.startswith("tapestry_")
    }
    assert found == CONTRACT


def test_counters_end_in_total_on_the_wire_and_have_no_created_twins() -> None:
    text = Metrics("0.1.0").render().decode()
    assert "tapestry_train_tokens_total 0.0" in text
    assert "_created" not in text


def test_agreement_is_unknown_before_the_first_round_and_then_that_of_the_latest() -> None:
    metrics = Metrics("0.1.0")
    figures = Agreement(-250_000, 700_000, 500_000).shares()
    names = {figure: f'tapestry_agreement{{figure="{figure}"}}' for figure in figures}
    assert all(math.isnan(_samples(metrics)[name]) for name in names.values())
    metrics.set_agreement(figures)
    found = _samples(metrics)
    assert {figure: found[name] for figure, name in names.items()} == figures
    assert figures == {"cosine": -0.25, "sign": 0.7, "norm_kept": 0.5}


def test_process_metrics_are_there() -> None:
    assert _samples(Metrics("0.1.0"))["process_resident_memory_bytes"] > 0


def test_every_series_exists_from_the_start_and_no_event_makes_a_new_one() -> None:
    metrics = _with_sets()
    before = _samples(metrics)
    for outcome in ("committed", "aborted", "missed", "forced"):
        metrics.round_ended(outcome, 1.0)
    for phase in ("training", "ready", "exchanging", "accepted"):
        metrics.round_phase_ended(phase, 1.0)
    for direction in ("sent", "received"):
        for kind in ("control", "contribution", "result", "state"):
            metrics.network_bytes(direction, kind, 1)
    metrics.set_peers({"training": 2, "joining": 1})
    metrics.trained(1, 2, 3.0)
    metrics.refused("not_finite")
    metrics.set_validation_losses({"fr": 1.0, "de": 2.0})
    metrics.set_data_passes(0.5)
    metrics.loop_lag(0.1)
    assert list(_samples(metrics)) == list(before)


def test_everything_starts_at_zero_but_losses_and_agreement_which_are_not_known_yet() -> None:
    samples = _samples(_with_sets())
    losses = {"tapestry_train_loss", *(f'tapestry_validation_loss{{set="{name}"}}' for name in ("fr", "de"))}
    for name, value in samples.items():
        if name in losses or name.startswith("tapestry_agreement"):
            assert math.isnan(value)
        elif name.startswith("tapestry_") and not name.startswith("tapestry_info"):
            assert value == 0.0, name


def test_each_call_moves_its_series() -> None:
    metrics = Metrics("0.1.0")
    metrics.set_run("ab" * 32, "demo")
    metrics.set_epoch(7)
    metrics.round_ended("committed", 2.0)
    metrics.round_ended("missed", None)
    metrics.network_bytes("sent", "result", 100)
    metrics.trained(steps=10, tokens=5120, loss=2.5)
    metrics.trained(steps=10, tokens=5120, loss=2.25)
    metrics.set_validation_losses({"fr": 2.0, "de": 3.0})
    metrics.set_data_passes(1.5)
    metrics.set_contribution_weight(10240)
    metrics.dropped(2, 20480)
    metrics.set_trainer_up(True)
    metrics.trainer_restarted()
    metrics.set_peers({"training": 2, "averaging": 1})
    metrics.set_peers({"training": 3})
    samples = _samples(metrics)
    assert samples[f'tapestry_info{{run_id="{"ab" * 32}",run_name="demo",version="0.1.0"}}'] == 1
    assert samples["tapestry_epoch"] == 7
    assert samples['tapestry_rounds_total{outcome="committed"}'] == 1
    assert samples['tapestry_rounds_total{outcome="missed"}'] == 1
    assert samples["tapestry_round_seconds_count"] == 1
    assert samples['tapestry_network_bytes_total{direction="sent",kind="result"}'] == 100
    assert samples["tapestry_train_steps_total"] == 20
    assert samples["tapestry_train_tokens_total"] == 10240
    assert samples["tapestry_train_loss"] == 2.25
    assert samples['tapestry_validation_loss{set="fr"}'] == 2.0
    assert samples['tapestry_validation_loss{set="de"}'] == 3.0
    assert samples["tapestry_train_data_passes"] == 1.5
    assert samples["tapestry_contribution_weight"] == 10240
    assert samples["tapestry_dropped_records_total"] == 2
    assert samples["tapestry_dropped_weight_total"] == 20480
    assert samples["tapestry_trainer_up"] == 1
    assert samples["tapestry_trainer_restarts_total"] == 1
    assert samples['tapestry_peers{phase="training"}'] == 3
    assert samples['tapestry_peers{phase="averaging"}'] == 0


def test_a_reason_that_nobody_declared_counts_as_other() -> None:
    metrics = Metrics("0.1.0")
    metrics.refused('x"} 1\nevil{peer="12D3KooW')
    assert _samples(metrics)['tapestry_refused_total{reason="other"}'] == 1


def test_every_reason_of_the_presence_validator_has_its_own_series() -> None:
    metrics = Metrics("0.1.0")
    for reason in presence.REASONS:
        metrics.refused(reason)
    assert _samples(metrics)['tapestry_refused_total{reason="other"}'] == 0


def test_a_label_outside_the_contract_is_our_bug() -> None:
    metrics = Metrics("0.1.0")
    with pytest.raises(ValueError, match="'lost' is not one of committed, aborted, missed, forced"):
        metrics.round_ended("lost", 1.0)
    with pytest.raises(ValueError):
        metrics.network_bytes("out", "control", 1)


def test_two_nodes_in_one_process_do_not_share_metrics() -> None:
    one, other = Metrics("0.1.0"), Metrics("0.1.0")
    one.set_epoch(3)
    assert _samples(other)["tapestry_epoch"] == 0


def test_the_table_of_metrics_in_the_documents_has_every_metric_with_its_labels() -> None:
    page = (Path(__file__).resolve().parents[2] / "docs" / "watching.md").read_text()
    told: dict[str, tuple[str, set[str]]] = {}
    for names, kind in re.findall(r"^\| (`tapestry_.*?) \| (gauge|counter|histogram) \|", page, re.MULTILINE):
        for name, labels in re.findall(r"`(tapestry_\w+)(?:\{(.*?)\})?`", names):
            keys = {label.partition("=")[0] for label in labels.split(",") if label}
            told[name.removesuffix("_total") if kind == "counter" else name] = (kind, keys)
    assert told == CONTRACT
