"""The run's numbers as gauges of Ray's metrics, which every node of a cluster serves to Prometheus.

One gauge a line of `metrics.METRICS`, so that none is exported without a meaning; Ray puts `ray_` before its name.

    train/tokens_per_s    eagle3_train_tokens_per_s {run, save_path}
    val/cond_acc_2        eagle3_val_ttt_cond_acc_frac {run, save_path, ttt_step="2"}

Rank 0 alone exports. Its node's agent takes the values over every ten seconds and once more when the process ends,
and forgets them twenty seconds after that: what Prometheus shows is alive.
"""

import re
from collections.abc import Mapping

from ray.util.metrics import Gauge

from eagle3_ray.metrics import METRICS, VAL, Metric
from eagle3_ray.storage import StoragePath
from eagle3_ray.training.run_folder import find_committed

TTT_STEP = "{k}"
# Units that a metric's own name does not always tell.
UNIT_SUFFIXES = {"nats": "_nats", "share": "_frac"}
_NUMBER = re.compile(r"_([0-9]+)$")


class RayGauges:
    """A `MetricLogger` that is always open: a logged point costs a tenth of a millisecond."""

    def __init__(self, run: str, save_path: str) -> None:
        self._labels = {"run": run, "save_path": save_path}
        self._gauges = {
            f"{prefix}/{metric.pattern}": Gauge(gauge_name(metric, prefix), metric.meaning, gauge_labels(metric))
            for metric in METRICS
            for prefix in metric.prefixes
        }

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Set the gauges; they keep their values until they are set again."""
        for name, value in metrics.items():
            number = _NUMBER.search(name)
            labels = self._labels if number is None else {**self._labels, "ttt_step": number[1]}
            self._gauges[_NUMBER.sub(f"_{TTT_STEP}", name)].set(value, labels)

    def close(self) -> None:
        """Leave the last values to Ray, which exports them when the process ends."""


def gauge_name(metric: Metric, prefix: str) -> str:
    """Return the gauge's name, unit included; numbers of single TTT steps are told from their sum by `ttt_`."""
    stem = metric.pattern.removesuffix(f"_{TTT_STEP}")
    if stem != metric.pattern:
        stem = f"ttt_{stem}"
    suffix = UNIT_SUFFIXES.get(metric.unit, "")
    return f"eagle3_{prefix}_{stem.removesuffix(suffix)}{suffix}"


def gauge_labels(metric: Metric) -> tuple[str, ...]:
    """Return the labels a gauge has beside those that Ray adds."""
    return ("run", "save_path", "ttt_step") if TTT_STEP in metric.pattern else ("run", "save_path")


def gauges_table() -> str:
    """Return the gauges as a Markdown table, by the names that Prometheus sees."""
    lines = ["| Prometheus | logged as | unit | labels |", "|---|---|---|---|"]
    for metric in METRICS:
        labels = ", ".join(f"`{label}`" for label in gauge_labels(metric))
        for prefix in metric.prefixes:
            name = f"ray_{gauge_name(metric, prefix)}"
            lines.append(f"| `{name}` | `{prefix}/{metric.pattern}` | {metric.unit} | {labels} |")
    return "\n".join(lines) + "\n"


def last_validation(save_dir: StoragePath) -> dict[str, float]:
    """Return what the run last validated, from its checkpoints: a restarted worker shows it until the next time."""
    newest: dict[str, float] = {}
    for checkpoint in find_committed(save_dir):
        newest |= {name: value for name, value in checkpoint.metrics.items() if name.startswith(f"{VAL}/")}
    return newest
