"""`metrics.jsonl`: what is logged is read back; a run that goes on cuts what it makes again."""

import json
import math
from pathlib import Path

import pytest

from eagle3_ray.errors import CheckpointError, DataError
from eagle3_ray.training.metrics_file import MetricsFile, lines_until, read_points


def log_steps(path: Path, steps: range, base: float, resume_step: int) -> None:
    file = MetricsFile(path, resume_step)
    for step in steps:
        file.log({"train/loss": base + step}, step)
    file.close()


def losses(path: Path) -> list[tuple[int, float]]:
    points, is_cut = read_points(path)
    assert not is_cut
    return [(point.step, point.metrics["train/loss"]) for point in points]


def test_points_are_read_back_with_their_time_and_what_is_no_number_is_null(tmp_path: Path) -> None:
    file = MetricsFile(tmp_path / "metrics.jsonl", 0)
    file.log({"train/loss": 0.1, "train/grad_norm": math.inf}, 3)
    file.log({"val/loss": 1e-30}, 3)
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()  # before it is closed: a kill loses nothing
    file.close()
    assert json.loads(lines[0])["metrics"] == {"train/loss": 0.1, "train/grad_norm": None}
    points, is_cut = read_points(tmp_path / "metrics.jsonl")
    assert [point.step for point in points] == [3, 3] and not is_cut
    assert points[0].metrics["train/loss"] == 0.1 and math.isnan(points[0].metrics["train/grad_norm"])
    assert points[1].metrics == {"val/loss": 1e-30}
    assert 1.7e9 < points[0].time_s <= points[1].time_s


def test_a_resumed_run_cuts_the_lines_after_its_checkpoint_and_makes_them_again(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    log_steps(path, range(0, 8), base=0.0, resume_step=0)
    log_steps(path, range(5, 7), base=100.0, resume_step=4)
    assert losses(path) == [(0, 0), (1, 1), (2, 2), (3, 3), (4, 4), (5, 105), (6, 106)]


def test_a_run_that_starts_over_keeps_no_line(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    log_steps(path, range(0, 8), base=0.0, resume_step=0)
    log_steps(path, range(0, 2), base=100.0, resume_step=0)
    assert losses(path) == [(0, 100), (1, 101)]


def test_a_line_that_a_kill_cut_short_is_left_out_and_told_and_the_next_part_begins_a_new_line(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    log_steps(path, range(1, 4), base=0.0, resume_step=0)
    path.write_bytes(path.read_bytes()[:-5])
    points, is_cut = read_points(path)
    assert [point.step for point in points] == [1, 2] and is_cut
    log_steps(path, range(4, 5), base=0.0, resume_step=3)
    assert losses(path) == [(1, 1), (2, 2), (4, 4)]


@pytest.mark.parametrize(
    "line",
    [
        "{",
        "[]",
        "3",
        '{"step": 1}',
        '{"step": "1", "time_s": 1, "metrics": {}}',
        '{"step": -1, "time_s": 1, "metrics": {}}',
        '{"step": 1, "time_s": 1, "metrics": {"a": []}}',
        '{"step": 1, "time_s": 1, "metrics": 2}',
        "\udcff",
    ],
)
def test_a_damaged_line_is_named_with_its_number(tmp_path: Path, line: str) -> None:
    path = tmp_path / "metrics.jsonl"
    log_steps(path, range(1, 3), base=0.0, resume_step=0)
    with path.open("ab") as file:
        file.write(line.encode(errors="surrogateescape") + b"\n")
    with pytest.raises(DataError, match=r"metrics\.jsonl: line 3 cannot be read \(.*\), expected .*Take the line out"):
        read_points(path)
    # No run ends for it.
    assert lines_until(path.read_bytes(), 1) == path.read_bytes().splitlines(keepends=True)[0]
    assert lines_until(path.read_bytes(), 5) == path.read_bytes()


def test_a_file_that_cannot_be_written_is_told(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"absent/metrics\.jsonl: cannot be written \(No such file"):
        MetricsFile(tmp_path / "absent" / "metrics.jsonl", 0)


def test_a_disk_that_fills_up_is_told(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").symlink_to("/dev/full")
    file = MetricsFile(tmp_path / "metrics.jsonl", 0)
    with pytest.raises(CheckpointError, match=r"metrics\.jsonl: cannot be written \(No space left on device\)"):
        file.log({"train/loss": 1.0}, 1)
