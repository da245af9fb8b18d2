"""The dashboard is one Grafana imports, and shows every number that is exported and none that is not."""

import shutil
import subprocess
from itertools import combinations
from typing import Any

import pytest
import yaml

from eagle3_ray.training.telemetry import gauges_table
from tests.observability.dashboard import DASHBOARD, FOLDER, LOGGED_AS, PANELS, QUERIES, ROWS, VARIABLES, gauges_of

README = (FOLDER / "README.md").read_text(encoding="utf-8")


def titled(panel: dict[str, Any]) -> str:
    return f"{panel['id']} {panel['title']}"


def test_panels_have_numbers_of_their_own_and_do_not_overlap() -> None:
    ids = [panel["id"] for panel in DASHBOARD["panels"]]
    assert len(set(ids)) == len(ids) and len(PANELS) >= 12 and len(ROWS) >= 3

    def overlap(a: dict[str, int], b: dict[str, int]) -> bool:
        return (
            a["x"] < b["x"] + b["w"]
            and b["x"] < a["x"] + a["w"]
            and a["y"] < b["y"] + b["h"]
            and b["y"] < a["y"] + a["h"]
        )

    assert all(panel["gridPos"]["x"] + panel["gridPos"]["w"] <= 24 for panel in DASHBOARD["panels"])
    pairs = combinations(DASHBOARD["panels"], 2)
    assert [(titled(a), titled(b)) for a, b in pairs if overlap(a["gridPos"], b["gridPos"])] == []


@pytest.mark.parametrize("panel", PANELS, ids=titled)
def test_a_panel_asks_the_chosen_source_and_says_what_it_shows(panel: dict[str, Any]) -> None:
    chosen = {"type": "prometheus", "uid": "${datasource}"}
    assert panel["datasource"] == chosen
    assert [target["datasource"] for target in panel["targets"]] == [chosen] * len(panel["targets"])
    refs = [target["refId"] for target in panel["targets"]]
    assert refs and len(set(refs)) == len(refs)
    assert panel["title"] and panel["description"]
    assert panel["fieldConfig"]["defaults"]["unit"]
    assert all(target["legendFormat"] for target in panel["targets"])


def test_the_variables_choose_source_session_and_run() -> None:
    assert VARIABLES["datasource"]["type"] == "datasource" and VARIABLES["datasource"]["query"] == "prometheus"
    for name in ("session", "run"):
        assert VARIABLES[name]["datasource"]["uid"] == "${datasource}"
        assert VARIABLES[name]["includeAll"] and VARIABLES[name]["allValue"] == ".*"
    for query in QUERIES:
        assert 'SessionName=~"$session"' in query and 'run=~"$run"' in query


def test_every_query_names_gauges_that_are_exported_and_every_one_of_them_is_shown() -> None:
    queries = [*QUERIES, *(VARIABLES[name]["query"]["query"] for name in ("session", "run"))]
    named = [gauges_of(query) for query in queries]
    assert all(named)
    assert {gauge for gauges in named[: len(QUERIES)] for gauge in gauges} == set(LOGGED_AS)
    assert {gauge for gauges in named for gauge in gauges} == set(LOGGED_AS)


def test_numbers_of_single_ttt_steps_are_drawn_one_line_a_step() -> None:
    for panel in PANELS:
        for target in panel["targets"]:
            (is_numbered,) = {"{k}" in LOGGED_AS[gauge] for gauge in gauges_of(target["expr"])}
            assert ("ttt_step" in target["expr"].split("(")[1]) == is_numbered
            assert ("{{ttt_step}}" in target["legendFormat"]) == is_numbered


def test_a_share_is_shown_in_per_cent_and_bytes_as_bytes() -> None:
    for panel in PANELS:
        for gauge in (gauge for target in panel["targets"] for gauge in gauges_of(target["expr"])):
            unit = panel["fieldConfig"]["defaults"]["unit"]
            assert (unit == "percentunit") == gauge.endswith("_frac"), titled(panel)
            assert (unit == "bytes") == gauge.endswith("_bytes"), titled(panel)
            assert ("nats" in unit) == gauge.endswith("_nats"), titled(panel)


def test_the_readme_lists_the_gauges() -> None:
    assert README.split("<!-- gauges -->\n", 1)[1].split("<!-- /gauges -->", 1)[0] == gauges_table()


def test_the_pod_monitor_finds_the_port_and_label_that_kuberay_gives() -> None:
    monitor = yaml.safe_load((FOLDER / "pod-monitor.yaml").read_text(encoding="utf-8"))
    assert (monitor["apiVersion"], monitor["kind"]) == ("monitoring.coreos.com/v1", "PodMonitor")
    # KubeRay's RayNodeLabelKey, and the name of the port 8080 that it adds to head and workers.
    assert monitor["spec"]["selector"] == {"matchLabels": {"ray.io/is-ray-node": "yes"}}
    assert [endpoint["port"] for endpoint in monitor["spec"]["podMetricsEndpoints"]] == ["metrics"]


@pytest.mark.skipif(shutil.which("kubectl") is None, reason="needs kubectl, which renders without a cluster")
def test_the_folder_renders_with_the_dashboard_where_grafana_looks_for_it() -> None:
    done = subprocess.run(["kubectl", "kustomize", str(FOLDER)], capture_output=True, text=True, check=True)
    objects = {item["kind"]: item for item in yaml.safe_load_all(done.stdout)}
    assert set(objects) == {"ConfigMap", "PodMonitor"}
    config_map = objects["ConfigMap"]
    assert config_map["metadata"]["labels"] == {"grafana_dashboard": "1"}
    text = (FOLDER / "grafana-dashboard.json").read_text(encoding="utf-8")
    assert config_map["data"] == {"grafana-dashboard.json": text}


@pytest.mark.skipif(shutil.which("promtool") is None, reason="needs promtool (Debian: apt-get install prometheus)")
def test_prometheus_understands_the_scrape_config() -> None:
    command = ["promtool", "check", "config", str(FOLDER / "prometheus.yml")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
