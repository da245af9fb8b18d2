"""The Grafana dashboard as the tests read it: its queries, and what a gauge's name stands for."""

import json
import re
from pathlib import Path
from typing import Any

from eagle3_ray.metrics import METRICS
from eagle3_ray.training.telemetry import gauge_name

FOLDER = Path(__file__).parents[2] / "k8s" / "observability"
DASHBOARD: dict[str, Any] = json.loads((FOLDER / "grafana-dashboard.json").read_text(encoding="utf-8"))
ROWS = [panel for panel in DASHBOARD["panels"] if panel["type"] == "row"]
PANELS = [panel for panel in DASHBOARD["panels"] if panel["type"] != "row"]
QUERIES = [target["expr"] for panel in PANELS for target in panel["targets"]]
VARIABLES = {variable["name"]: variable for variable in DASHBOARD["templating"]["list"]}

# What Prometheus calls a gauge -> what it is logged as, such as `val/cond_acc_{k}`.
LOGGED_AS = {
    f"ray_{gauge_name(metric, prefix)}": f"{prefix}/{metric.pattern}"
    for metric in METRICS
    for prefix in metric.prefixes
}


def gauges_of(expression: str) -> list[str]:
    """The gauges that a query names."""
    return re.findall(r"\bray_\w+", expression)


def fill_in(expression: str, values: dict[str, str]) -> str:
    """Put values in the place of variables, as Grafana does."""
    return re.sub(r"\$\{?(\w+)\}?", lambda match: values[match[1]], expression)
