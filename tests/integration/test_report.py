"""`report` of real runs: what they log, that going on leaves no seam in it, and the page as a browser shows it."""

import json
import math
import re
import shutil
import subprocess
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest

from eagle3_ray.cli import main
from eagle3_ray.jobs.train import run
from eagle3_ray.training.metrics_file import Point, read_points
from tests.makers import write_samples
from tests.runs import LENGTHS, SHAPE, make_settings, read_metrics

pytestmark = pytest.mark.usefixtures("ray_cluster")

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
BROWSERS_OWN = ("google.com", "googleapis.com", "gvt1.com")  # what it asks whatever it shows
# What is measured of the machine, not of the training.
OF_THE_MACHINE = {"train/tokens_per_s", "train/data_wait_frac", "train/peak_memory_bytes", "train/progress_frac"}


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An uninterrupted run of two epochs, without any --logger."""
    folder = tmp_path_factory.mktemp("straight")
    write_samples(folder / "data", LENGTHS, **SHAPE)
    run(make_settings(folder))
    return folder


@pytest.fixture(scope="module")
def paused(straight: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Another run on the same samples, paused in its second epoch."""
    folder = tmp_path_factory.mktemp("paused")
    shutil.copytree(straight / "data", folder / "data")
    run(make_settings(folder, max_steps=4))
    return folder


@pytest.fixture(scope="module")
def other(straight: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with other settings, and epochs of other length."""
    folder = tmp_path_factory.mktemp("other")
    shutil.copytree(straight / "data", folder / "data")
    run(make_settings(folder, save_path=folder / "faster", lr=5e-3, bins_per_step=3, ttt_steps=2))
    return folder / "faster"


def points_of(save_dir: Path) -> list[Point]:
    points, is_cut = read_points(save_dir / "metrics.jsonl")
    assert not is_cut
    return points


def trajectory(save_dir: Path) -> list[tuple[int, dict[str, float]]]:
    """The points, without what is of the machine."""
    return [
        (point.step, {name: value for name, value in point.metrics.items() if name not in OF_THE_MACHINE})
        for point in points_of(save_dir)
    ]


def test_every_logged_point_is_in_the_run_folder_whatever_the_loggers(straight: Path) -> None:
    points = points_of(straight / "run")
    kinds = [(point.step, {name.partition("/")[0] for name in point.metrics}) for point in points]
    assert [step for step, part in kinds if part == {"train"}] == [1, 2, 3, 4, 5, 6]
    assert [step for step, part in kinds if part == {"val"}] == [0, 3, 6]
    assert [step for step, _ in kinds] == [0, 1, 2, 3, 3, 4, 5, 6, 6]
    assert not (straight / "logs").exists()
    recorded = read_metrics(straight / "run" / "1")
    assert {**points[-2].metrics, **points[-1].metrics} == recorded
    untrained = json.loads((straight / "run" / "initial_metrics.json").read_text())
    assert points[0].metrics == untrained
    assert all(math.isfinite(value) for point in points for value in point.metrics.values())


def test_a_run_that_goes_on_leaves_no_seam_in_what_is_logged(straight: Path, paused: Path, tmp_path: Path) -> None:
    shutil.copytree(paused, tmp_path / "copy", symlinks=True)
    metrics = tmp_path / "copy" / "run" / "metrics.jsonl"
    assert [point.step for point in points_of(metrics.parent)] == [0, 1, 2, 3, 3, 4, 4]
    with metrics.open("a") as file:  # as a run leaves it that was killed after its last checkpoint
        file.write('{"step": 5, "time_s": 1.0, "metrics": {"train/loss": 99.0}}\n{"step": 6, "time_s": 1.0, "me')
    run(make_settings(tmp_path / "copy"))
    resumed = [point for point in trajectory(tmp_path / "copy" / "run")]
    pause = resumed.pop(6)  # a run that pauses validates there
    assert pause[0] == 4 and set(pause[1]) == {n for n in read_metrics(paused / "run" / "step-000004") if "val/" in n}
    assert resumed == trajectory(straight / "run")


def test_a_run_that_starts_over_begins_a_new_file(paused: Path, tmp_path: Path) -> None:
    shutil.copytree(paused, tmp_path / "copy", symlinks=True)
    run(make_settings(tmp_path / "copy", resume_from_checkpoint=False, max_steps=1))
    assert [point.step for point in points_of(tmp_path / "copy" / "run")] == [0, 1, 1]


def test_the_plan_and_the_machine_are_recorded(straight: Path) -> None:
    record = json.loads((straight / "run" / "plan.json").read_text())
    assert record["training"]["samples"] + record["validation"]["samples"] == len(LENGTHS)
    assert record["training"]["tokens"] + record["validation"]["tokens"] == sum(LENGTHS)
    assert record["training"]["bins"] == 5 and 0.5 < record["training"]["fill_frac"] <= 1
    assert record["steps"] == {"bins_per_step": 2, "steps_per_epoch": 3, "total_steps": 6, "stop_step": 6}
    assert record["machine"]["workers"] == 1 and record["machine"]["driver_cpus"] >= 1
    assert {"python", "torch", "ray", "eagle3_ray"} <= set(record["versions"])


def write_page(page: Path, *runs: Path) -> str:
    assert main(["report", *map(str, runs), "--output-path", str(page)]) == 0
    return page.read_text()


def test_the_page_of_one_run_says_what_its_checkpoint_says(straight: Path, tmp_path: Path) -> None:
    text = write_page(tmp_path / "page.html", straight / "run")
    best = read_metrics(straight / "run" / "best")
    assert f'<div class="number">{best["val/expected_tokens"]:.2f}</div>' in text
    assert "The verifier&#x27;s own token is counted" in text
    assert f"<td>{best['val/loss']:.4f}</td>" in text
    assert "Settings in which the runs differ" not in text and "<th>total_seq_len</th><td>112</td>" in text
    assert text.count("<svg ") == 6 == len(list((tmp_path / "page-plots").glob("*.png")))


def test_runs_side_by_side_are_told_apart(straight: Path, other: Path, tmp_path: Path) -> None:
    text = write_page(tmp_path / "page.html", straight / "run", other)
    differing = text.split("Settings in which the runs differ", 1)[1].split("</table>", 1)[0]
    rows = dict(re.findall(r"<tr><th>(\w+)</th>(.*?)</tr>", differing))
    assert set(rows) == {"lr", "bins_per_step", "ttt_steps", "data_path"}
    assert rows["lr"] == "<td>0.001</td><td>0.005</td>" and rows["bins_per_step"] == "<td>2</td><td>3</td>"
    assert "<h2>Over epochs</h2>" in text and text.count("<svg ") == 7  # their epochs differ in length
    legend = text.split("<h2>Loss</h2>", 1)[1].split("</svg>", 1)[0]
    assert ">run</text>" in legend and ">faster</text>" in legend


def show(page: Path, picture: Path, *flags: str) -> tuple[str, set[str]]:
    """Have a browser without network show a page; return what it says of it, and the hosts that the page asks."""
    assert CHROMIUM is not None
    log = picture.with_suffix(".json")
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--enable-logging=stderr"]
    command += ["--host-resolver-rules=MAP * ~NOTFOUND", "--virtual-time-budget=2000", "--window-size=1060,3000"]
    command += [f"--user-data-dir={picture.with_suffix('.profile')}", f"--log-net-log={log}", f"--screenshot={picture}"]
    done = subprocess.run([*command, *flags, page.as_uri()], capture_output=True, text=True, timeout=120, check=True)
    asked = set(re.findall(r'"url":"\w+://([^/"]+)', log.read_text()))
    return done.stderr, {host for host in asked if not host.endswith(BROWSERS_OWN)}


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium here (apt-get install chromium)")
@pytest.mark.parametrize("number", [1, 2])
def test_a_browser_shows_the_page_without_a_word_and_asks_for_nothing_else(
    straight: Path, other: Path, tmp_path: Path, number: int
) -> None:
    text = write_page(tmp_path / "page.html", *[straight / "run", other][:number])
    pixels = []
    for theme, flag in (("light", "1"), ("dark", "0")):
        theme_flag = f"--blink-settings=preferredColorScheme={flag}"
        said, asked = show(tmp_path / "page.html", tmp_path / f"{theme}.png", theme_flag)
        assert "CONSOLE" not in said and asked == set()
        pixels.append(matplotlib.image.imread(tmp_path / f"{theme}.png"))
    light, dark = pixels
    assert light.shape == dark.shape == (3000, 1060, light.shape[2])
    assert light[:, :, :3].mean() > 0.9 and dark[:, :, :3].mean() < 0.2
    for shown in pixels:  # the runs' colours are there, all the way down
        assert all(np.ptp(part[:, :, :3], axis=2).max() > 0.5 for part in np.array_split(shown, 3))
    # It is not the policy that keeps the page from asking.
    (tmp_path / "free.html").write_text(re.sub(r"<meta http-equiv[^>]*>", "", text))
    assert show(tmp_path / "free.html", tmp_path / "free.png")[1] == set()


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium here (apt-get install chromium)")
def test_a_page_that_asks_for_more_would_be_noticed(straight: Path, tmp_path: Path) -> None:
    text = write_page(tmp_path / "page.html", straight / "run")
    stranger = text.replace("</h1>", '</h1><img src="http://stranger.invalid/a.png"><script>1</script>')
    (tmp_path / "page.html").write_text(stranger)
    said, asked = show(tmp_path / "page.html", tmp_path / "page.png")
    assert said.count("CONSOLE") == 2 and asked == set()  # refused, by the page's own policy
    (tmp_path / "page.html").write_text(re.sub(r"<meta http-equiv[^>]*>", "", stranger))
    assert show(tmp_path / "page.html", tmp_path / "page.png")[1] == {"stranger.invalid"}
