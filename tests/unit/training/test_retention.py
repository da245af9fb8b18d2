"""Which checkpoints stay, and that the others go in an order that no crash turns into a loss."""

import itertools
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from eagle3_ray.storage import ObjectPath, StoragePath, list_objects
from eagle3_ray.training.retention import choose_kept, keep_newest
from eagle3_ray.training.run_folder import (
    BEST,
    BEST_METRIC,
    COMMITTED,
    CommittedCheckpoint,
    find_committed,
    find_uncommitted,
    latest_committed,
)
from tests.unit.training.test_run_folder import point, write_checkpoint, write_parts


def names(save_dir: StoragePath) -> list[str]:
    return [checkpoint.path.name for checkpoint in find_committed(save_dir)]


def brute_force(scores: tuple[float | None, ...], num_kept: int, keeps_best: bool) -> set[int]:
    """Numbers of those that stay, said in another way: one stays if too few are newer, or if none beats it."""
    kept = set()
    for number, score in enumerate(scores):
        if len(scores) - 1 - number < num_kept:
            kept.add(number)
        others = [(other, its) for other, its in enumerate(scores) if other != number and its is not None]
        is_best = score is not None and all(its < score or (its == score and other > number) for other, its in others)
        if keeps_best and is_best:
            kept.add(number)
    return kept


@pytest.mark.parametrize("keeps_best", [True, False])
@pytest.mark.parametrize("num_kept", [1, 2, 3, 6])
def test_what_stays_is_what_a_brute_force_says(num_kept: int, keeps_best: bool) -> None:
    """Without any that was validated, the newest is best, and stays anyway."""
    for length in range(6):
        for scores in itertools.product([None, 1.0, 2.0], repeat=length):
            checkpoints = [
                CommittedCheckpoint(Path(str(i)), i, {} if score is None else {BEST_METRIC: score}, {})
                for i, score in enumerate(scores)
            ]
            kept = choose_kept(checkpoints, num_kept, keeps_best)
            assert [c.step for c in kept] == sorted(brute_force(scores, num_kept, keeps_best)), scores


def write_run(save_dir: Path) -> None:
    """Four epochs, of which the first is best, with checkpoints between them."""
    for step, (name, score) in enumerate(
        [("0", 2.0), ("step-000002", None), ("1", 1.5), ("2", 1.1), ("step-000005", None), ("3", 1.2)], start=1
    ):
        write_checkpoint(save_dir, name, step, score)
    point(save_dir)


@pytest.mark.parametrize(
    ("num_kept", "keeps_best", "kept", "best"),
    [
        (1, True, ["0", "3"], "0"),
        (3, True, ["0", "2", "step-000005", "3"], "0"),
        (1, False, ["3"], "3"),
        (4, False, ["1", "2", "step-000005", "3"], "1"),
        (6, False, ["0", "step-000002", "1", "2", "step-000005", "3"], "0"),
    ],
)
def test_the_newest_and_the_best_stay_and_best_names_one_of_them(
    num_kept: int, keeps_best: bool, kept: list[str], best: str, tmp_path: Path
) -> None:
    write_run(tmp_path)
    for _ in range(2):  # there is nothing left to do the second time
        assert keep_newest(tmp_path, num_kept, keeps_best) == []
        assert names(tmp_path) == kept and os.readlink(tmp_path / BEST) == best
        assert sorted(path.name for path in tmp_path.iterdir()) == sorted([*kept, BEST])


def test_what_was_interrupted_goes_and_what_is_somebody_elses_stays(tmp_path: Path) -> None:
    write_run(tmp_path)
    write_parts(tmp_path / "step-000009")
    (tmp_path / "0" / COMMITTED).unlink()  # a removal that was killed
    (tmp_path / "1" / "notes.txt").write_text("mine")
    elsewhere = write_checkpoint(tmp_path / "other", "7", 4)
    (tmp_path / "7").symlink_to(elsewhere)
    (tmp_path / "thesis.tex").write_text("mine")
    assert keep_newest(tmp_path, 1, keeps_best=False) == []
    left = ["1", "3", "7", BEST, "other", "thesis.tex"]
    assert sorted(path.name for path in tmp_path.iterdir()) == left
    assert (elsewhere / COMMITTED).exists() and (tmp_path / "1" / COMMITTED).exists()


class Killed(BaseException):
    """Stands for a death between two system calls."""


def test_wherever_a_removal_breaks_off_each_folder_is_whole_or_counts_as_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_run(tmp_path / "whole")
    unlink, rmdir, left = os.unlink, os.rmdir, [0]

    def dying(call: Any) -> Any:
        def called(*arguments: Any, **options: Any) -> None:
            if left[0] == 0:
                raise Killed
            left[0] -= 1
            call(*arguments, **options)

        return called

    for num_calls in itertools.count():
        save_dir = tmp_path / str(num_calls)
        shutil.copytree(tmp_path / "whole", save_dir, symlinks=True)
        left[0] = num_calls
        with monkeypatch.context() as patched:
            patched.setattr("os.unlink", dying(unlink))
            patched.setattr("os.rmdir", dying(rmdir))
            try:
                keep_newest(save_dir, 1, keeps_best=False)
                break
            except Killed:
                pass
        latest = latest_committed(save_dir)  # raises if a committed one lacks a part
        assert latest is not None and latest.path.name == "3"
        assert len(names(save_dir)) + len(find_uncommitted(save_dir)) == len(list(save_dir.glob("[0-9s]*")))
        assert (save_dir / BEST / COMMITTED).exists()
        keep_newest(save_dir, 1, keeps_best=False)
        assert sorted(path.name for path in save_dir.iterdir()) == ["3", BEST]
    assert num_calls > 30


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting needs root")
def test_a_folder_that_cannot_be_removed_is_told_and_no_checkpoint_any_more(tmp_path: Path) -> None:
    write_run(tmp_path)
    busy = tmp_path / "1" / "state"
    mounted = subprocess.run(["mount", "-t", "tmpfs", "tmpfs", str(busy)], capture_output=True, text=True)
    if mounted.returncode:
        pytest.skip(f"mounting is not permitted: {mounted.stderr.strip()}")
    try:
        (problem,) = keep_newest(tmp_path, 1, keeps_best=True)
    finally:
        subprocess.run(["umount", str(busy)], check=True)
    assert problem.startswith(f"{tmp_path / '1'}: cannot be removed for --keep-last 1 (") and "busy" in problem
    assert names(tmp_path) == ["0", "3"]
    assert keep_newest(tmp_path, 1, keeps_best=True) == [] and not (tmp_path / "1").exists()


@pytest.mark.parametrize("scheme", ["s3", "gs"])
def test_on_an_object_store_the_same_stay(
    scheme: str, s3_bucket: ObjectPath, gs_bucket: ObjectPath, tmp_path: Path
) -> None:
    save_dir = {"s3": s3_bucket, "gs": gs_bucket}[scheme] / "run"
    write_run(tmp_path)
    write_parts(tmp_path / "7")
    (tmp_path / "2" / "notes.txt").write_text("mine")
    for path in tmp_path.rglob("*"):
        if path.is_file() and BEST not in path.parts:
            (save_dir / str(path.relative_to(tmp_path))).write_bytes(path.read_bytes())
    cases = [(1, True, ["0", "2", "3"], "0"), (2, False, ["2", "3"], "3")]
    for num_kept, keeps_best, kept, best in cases:
        assert keep_newest(save_dir, num_kept, keeps_best) == []
        assert names(save_dir) == kept and (save_dir / BEST).read_text(encoding="utf-8") == best
        assert {stored.name.partition("/")[0] for stored in list_objects(save_dir)} == {*kept, BEST}
