"""The gauges, read where Prometheus reads them: at the port on which the node's Ray agent serves its metrics."""

import json
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest
import ray
from prometheus_client.parser import text_string_to_metric_families

from eagle3_ray.metrics import METRICS, VAL
from eagle3_ray.training.job import TrainJob
from eagle3_ray.training.metrics_file import MetricsFile
from eagle3_ray.training.rank import open_rank_loggers
from eagle3_ray.training.run_folder import COMMITTED, PARTS, RECORD
from eagle3_ray.training.telemetry import RayGauges, gauge_labels, gauge_name, last_validation
from tests.runs import make_settings


def test_a_gauge_is_named_by_part_meaning_and_unit() -> None:
    names = {(m.pattern, prefix): gauge_name(m, prefix) for m in METRICS for prefix in m.prefixes}
    assert names["tokens_per_s", "train"] == "eagle3_train_tokens_per_s"
    assert names["loss", "val"] == "eagle3_val_loss_nats"
    assert names["loss_{k}", "val"] == "eagle3_val_ttt_loss_nats"
    assert names["cond_acc_{k}", "train"] == "eagle3_train_ttt_cond_acc_frac"
    assert names["data_wait_frac", "train"] == "eagle3_train_data_wait_frac"
    assert names["peak_memory_bytes", "train"] == "eagle3_train_peak_memory_bytes"
    assert len(set(names.values())) == len(names)


def test_only_numbers_of_single_ttt_steps_carry_the_step_as_a_label() -> None:
    numbered = {metric.pattern for metric in METRICS if "ttt_step" in gauge_labels(metric)}
    assert numbered == {"loss_{k}", "accuracy_{k}", "cond_acc_{k}", "acceptance_{k}", "acceptance_ci_{k}"}


def read_gauges(run: str) -> dict[str, dict[tuple[str, str], float]]:
    """{gauge: {(save_path, ttt_step): value}} of all gauges of ours that this node serves of runs of this name."""
    (node,) = [node for node in ray.nodes() if node["Alive"]]
    url = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
    with urllib.request.urlopen(url, timeout=30) as answer:
        text = answer.read().decode()
    gauges: dict[str, dict[tuple[str, str], float]] = {}
    for family in text_string_to_metric_families(text):
        if family.name.startswith("ray_eagle3_"):
            assert family.type == "gauge"
            for sample in family.samples:
                if sample.labels["run"] == run:
                    labels = (sample.labels["save_path"], sample.labels.get("ttt_step", ""))
                    gauges.setdefault(family.name, {})[labels] = sample.value
    return gauges


def wait_until(condition: Callable[[], bool], what: str, timeout_s: float = 120.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"timed out waiting for {what}"
        time.sleep(0.2)


@pytest.mark.slow
def test_a_node_serves_the_last_values_of_each_run_under_its_own_labels(ray_cluster: None) -> None:
    """Two runs of one name are told apart by where they save. Ray exports every ten seconds."""
    for number, save_path in ((1.0, "/a/run"), (2.0, "/b/run")):
        gauges = RayGauges("run", save_path)
        gauges.log({"train/loss": 99.0, "train/cond_acc_0": 0.99}, 1)
        gauges.log({"train/loss": number, "train/cond_acc_0": number / 4, "train/cond_acc_10": number / 8}, 2)
        gauges.log({"val/expected_tokens": number}, 2)
        gauges.close()
    expected = {
        "ray_eagle3_train_loss_nats": {("/a/run", ""): 1.0, ("/b/run", ""): 2.0},
        "ray_eagle3_train_ttt_cond_acc_frac": {
            ("/a/run", "0"): 0.25,
            ("/a/run", "10"): 0.125,
            ("/b/run", "0"): 0.5,
            ("/b/run", "10"): 0.25,
        },
        "ray_eagle3_val_expected_tokens": {("/a/run", ""): 1.0, ("/b/run", ""): 2.0},
    }
    wait_until(lambda: read_gauges("run") == expected, f"{expected}, found {read_gauges('run')}")


def make_checkpoint(path: Path, step: int, metrics: dict[str, float]) -> None:
    path.mkdir(parents=True)
    for part in PARTS:
        (path / part).write_text("")
    (path / COMMITTED).write_text(json.dumps({"step": step}))
    (path / RECORD).write_text(json.dumps({"metrics": metrics, "identity": {}}))


def test_a_restarted_run_shows_its_last_validation_though_a_newer_checkpoint_has_none(tmp_path: Path) -> None:
    assert last_validation(tmp_path / "run") == {}
    make_checkpoint(tmp_path / "0", 3, {"train/loss": 3.0, "val/loss": 3.5, "val/loss_0": 1.0})
    make_checkpoint(tmp_path / "1", 6, {"train/loss": 2.0, "val/loss": 2.5, "val/loss_0": 0.5})
    make_checkpoint(tmp_path / "step-000008", 8, {"train/loss": 1.0})
    assert last_validation(tmp_path) == {f"{VAL}/loss": 2.5, f"{VAL}/loss_0": 0.5}


@pytest.mark.slow
def test_the_first_rank_of_a_restarted_run_exports_that_validation_at_once_and_the_second_nothing(
    ray_cluster: None, tmp_path: Path
) -> None:
    make_checkpoint(tmp_path / "run" / "0", 3, {"train/loss": 3.0, "val/loss": 3.5, "val/loss_0": 1.0})
    for number, name in ((0, "first"), (1, "second")):
        job = cast(TrainJob, SimpleNamespace(settings=make_settings(tmp_path, run_name=name)))  # the part that is read
        metrics_file = MetricsFile(tmp_path / "run" / "metrics.jsonl", 3) if number == 0 else None
        open_rank_loggers(job, metrics_file, 3).log({"train/loss": 2.0}, 4)
    save_path = str(tmp_path / "run")
    expected = {
        "ray_eagle3_val_loss_nats": {(save_path, ""): 3.5},
        "ray_eagle3_val_ttt_loss_nats": {(save_path, "0"): 1.0},
        "ray_eagle3_train_loss_nats": {(save_path, ""): 2.0},
    }
    wait_until(lambda: read_gauges("first") == expected, f"{expected}, found {read_gauges('first')}")
    assert read_gauges("second") == {}
