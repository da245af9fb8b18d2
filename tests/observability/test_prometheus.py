"""A run submitted to a Ray head and watched by Prometheus: what is seen from outside is what happened.

Prometheus is Debian's (`apt-get install prometheus`) with the project's own scrape config; the run is submitted and
described as README.md in k8s/observability says.
"""

import json
import re
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import pytest

from eagle3_ray.training.metrics_file import read_points
from eagle3_ray.training.run_folder import METRICS
from tests.makers import write_samples
from tests.observability.dashboard import LOGGED_AS, QUERIES, VARIABLES, fill_in, gauges_of
from tests.observability.servers import ROOT, SCRAPE_EVERY_S, Head, Prometheus, prometheus, ray_head, wait_for
from tests.runs import LENGTHS, SHAPE, make_settings

METADATA = {"run": "seen-from-outside", "verifier": "small"}
OURS = '{__name__=~"ray_eagle3_.+"}'

pytestmark = pytest.mark.slow


@dataclass(frozen=True)
class Seen:
    """A run of two workers that is over, and those who saw it.

    Attributes:
        submission_id: Of the job that it was.
        start_s: When it was submitted.
        server: None where there is no Prometheus.
    """

    head: Head
    folder: Path
    submission_id: str
    start_s: float
    server: Prometheus | None

    @property
    def save_path(self) -> Path:
        return self.folder / "run"

    @property
    def metrics(self) -> dict[str, float]:
        """The last of each number that the run measured, in training and in validation; a gauge keeps it."""
        points, _ = read_points(self.save_path / METRICS)
        return {name: value for point in points for name, value in point.metrics.items()}


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Seen]:
    folder = tmp_path_factory.mktemp("seen")
    write_samples(folder / "data", 2 * LENGTHS, **SHAPE)  # several bins to validate with have an interval
    settings = make_settings(folder, num_workers=2, run_name="seen-from-outside")
    (folder / "train.yaml").write_text(json.dumps(settings.model_dump(mode="json", exclude={"config"})))
    with ExitStack() as stack:
        head = stack.enter_context(ray_head(folder))
        server = stack.enter_context(prometheus(folder, head)) if shutil.which("prometheus") else None
        start_s = time.time()
        said = head.do(
            [
                *(sys.executable, "-m", "ray.scripts.scripts", "job", "submit", "--address", head.dashboard),
                *("--metadata-json", json.dumps(METADATA), "--"),
                *(sys.executable, "-m", "eagle3_ray", "train", "--config", str(folder / "train.yaml")),
            ]
        )
        submission_id = re.search(r"'(raysubmit_\w+)' succeeded", said)
        assert submission_id, said
        yield Seen(head, folder, submission_id[1], start_s, server)


@dataclass(frozen=True)
class History:
    """What Prometheus remembers of the run, whose gauges are gone by now.

    Attributes:
        time_s: A scrape before the last one that found them.
    """

    server: Prometheus
    time_s: float


@pytest.fixture(scope="module")
def history(seen: Seen) -> History:
    server = seen.server
    if server is None:
        pytest.skip("needs prometheus (apt-get install prometheus)")
    wait_for(lambda: not server.ask(OURS), "the gauges of a run that is over to vanish")
    times = server.follow("count(ray_eagle3_train_step)", seen.start_s, time.time())
    return History(server, times[-1][0] - SCRAPE_EVERY_S)


def chosen_by_variable(history: History, name: str, values: dict[str, str]) -> list[str]:
    """What Grafana offers for a variable: `label_values(series, label)` asked of Prometheus."""
    query = re.fullmatch(r"label_values\((.+), (\w+)\)", VARIABLES[name]["query"]["query"])
    assert query
    series: dict[str, str | float] = {"match[]": fill_in(query[1], values)}
    found: list[str] = history.server.get(
        f"label/{query[2]}/values", **series, start=history.time_s - 3600, end=history.time_s
    )
    return found


def test_the_dashboard_offers_the_one_session_and_run_there_was(history: History) -> None:
    (session,) = chosen_by_variable(history, "session", {})
    assert session.startswith("session_")
    assert chosen_by_variable(history, "run", {"session": session}) == ["seen-from-outside"]
    assert chosen_by_variable(history, "run", {"session": "session_of_another_cluster"}) == []


def stored(gauge: str, metrics: dict[str, float]) -> dict[str, float]:
    """What a run measured and exports as a gauge, by TTT step if it has one of each."""
    logged_as = re.escape(LOGGED_AS[gauge]).replace(re.escape("{k}"), "([0-9]+)")
    matches = {name: re.fullmatch(logged_as, name) for name in metrics}
    found = {(m[1] if m.groups() else ""): metrics[name] for name, m in matches.items() if m}
    assert found, f"{LOGGED_AS[gauge]} was not measured"
    return found


def worth(query: str, metrics: dict[str, float]) -> dict[str, float]:
    """What a query is to return: a gauge, or one less or more another, such as half the width of its interval."""
    gauge, *others = gauges_of(query)
    values = stored(gauge, metrics)
    for other in others:
        (sign,) = re.findall(rf"}} ([-+]) {other}\{{", query)
        change = stored(other, metrics)
        values = {step: value - change[step] if sign == "-" else value + change[step] for step, value in values.items()}
    return values


@pytest.mark.parametrize("query", QUERIES, ids=lambda query: gauges_of(query)[0])
def test_a_query_of_the_dashboard_returns_what_the_run_measured_last(seen: Seen, history: History, query: str) -> None:
    expected = worth(query, seen.metrics)
    (session,) = chosen_by_variable(history, "session", {})
    for values in ({"session": ".*", "run": ".*"}, {"session": session, "run": "seen-from-outside"}):
        series = history.server.ask(fill_in(query, values), history.time_s)
        found = {item["metric"].get("ttt_step", ""): float(item["value"][1]) for item in series}
        assert found == expected
        assert {item["metric"]["run"] for item in series} == {"seen-from-outside"}
        assert {item["metric"]["save_path"] for item in series} == {str(seen.save_path)}
        assert len(series) == len(expected)
    assert history.server.ask(fill_in(query, {"session": ".*", "run": "another"}), history.time_s) == []


def test_one_of_the_two_workers_exports_and_nothing_else_does(history: History) -> None:
    series = history.server.ask(OURS, history.time_s)
    assert len({item["metric"]["WorkerId"] for item in series}) == 1
    assert {item["metric"]["__name__"] for item in series} == set(LOGGED_AS)


def test_the_job_page_says_what_was_given_with_the_job(seen: Seen) -> None:
    jobs = {job["submission_id"]: job for job in seen.head.get("/api/jobs/")}
    assert jobs[seen.submission_id]["metadata"] == METADATA
    assert jobs[seen.submission_id]["status"] == "SUCCEEDED"


def test_a_driver_that_joins_by_itself_says_its_run_on_the_job_page(seen: Seen) -> None:
    """The run is complete, so that nothing is trained."""
    command = [sys.executable, "-m", "eagle3_ray", "train", "--config", str(seen.folder / "train.yaml")]
    assert "done: 10 steps" in seen.head.do(command, RAY_ADDRESS=seen.head.gcs_address)
    (job,) = [job for job in seen.head.get("/api/jobs/") if job["type"] == "DRIVER"]
    assert job["metadata"] == {
        "run": "seen-from-outside",
        "verifier": str(ROOT / "tests" / "parity" / "small" / "verifier"),
        "data_path": str(seen.folder / "data"),
        "save_path": str(seen.save_path),
    }


def test_the_train_page_shows_the_run_and_its_workers(seen: Seen) -> None:
    (run,) = seen.head.get("/api/train/v2/runs/v1")["train_runs"]
    assert (run["name"], run["status"]) == ("run", "FINISHED")
    assert run["job_details"]["metadata"] == METADATA
    (attempt,) = run["attempts"]
    assert [worker["world_rank"] for worker in attempt["workers"]] == [0, 1]
