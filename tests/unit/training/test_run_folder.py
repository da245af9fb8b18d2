"""A run on disk: what counts as a checkpoint, which is newest and best, what is removed and what is left alone."""

import json
import os
import re
from pathlib import Path
from typing import Any

import pytest

from eagle3_ray import storage
from eagle3_ray.errors import CheckpointError
from eagle3_ray.storage import StoragePath, write_atomically
from eagle3_ray.training.ray_snapshot import mend_snapshot
from eagle3_ray.training.run_folder import (
    BEST,
    COMMITTED,
    INITIAL_METRICS,
    LOCK,
    LOGGER_RUN_ID,
    METRICS,
    PARTS,
    PLAN,
    RAY_SNAPSHOT,
    RUN_YAML,
    CommittedCheckpoint,
    check_same_run,
    commit,
    epoch_folder,
    find_committed,
    find_uncommitted,
    holds_dry_run,
    latest_committed,
    point_best,
    remove_run,
    remove_unfinished,
    step_folder,
)

UNFINISHED = (".COMMITTED.0a1b2c3d.tmp", ".run.json.0a1b2c3d.tmp", ".tmpa4Kr9x")
IDENTITY = {"seed": 0, "plan": "abc", "draft": {"norm_output": False, "layer": {"hidden_size": 64}}}


def write_parts(folder: Path, expected_tokens: float | None = None) -> Path:
    """Everything of a checkpoint but its commit marker."""
    (folder / "state").mkdir(parents=True)
    (folder / "state" / "__0_0.distcp").write_text("state")
    for name in ("config.json", "model.safetensors"):
        (folder / name).write_text("{}")
    metrics = {} if expected_tokens is None else {"val/expected_tokens": expected_tokens}
    (folder / "run.json").write_text(json.dumps({"metrics": metrics, "identity": IDENTITY}))
    return folder


def write_checkpoint(save_dir: Path, name: str, step: int, expected_tokens: float | None = None) -> Path:
    folder = write_parts(save_dir / name, expected_tokens)
    commit(folder, step)
    return folder


def point(save_dir: Path) -> StoragePath | None:
    """Let `best` name the best of all."""
    return point_best(save_dir, find_committed(save_dir))


def snapshot(*names: str) -> str:
    """Ray's list of checkpoints, as far as it matters here; checkpoint n has index 10 n."""
    results = [{"checkpoint_dir_name": name, "metrics": {}} for name in names]
    indices = [10 * int(name) for name in names]
    return json.dumps({"checkpoint_results": results, "checkpoint_report_indices": indices, "version": 7})


# ------------------------------------------------------------------------------ what is a checkpoint


def test_folders_are_named_by_epoch_and_by_step() -> None:
    assert epoch_folder(0) == "0" and step_folder(500) == "step-000500" and step_folder(1234567) == "step-1234567"


def test_checkpoints_are_found_oldest_first_whatever_their_names(tmp_path: Path) -> None:
    for name, step in (("10", 110), ("step-000095", 95), ("9", 100), ("step-1234567", 1234567)):
        write_checkpoint(tmp_path, name, step)
    found = find_committed(tmp_path)
    assert [(c.path, c.step) for c in found] == [
        (tmp_path / name, step)
        for name, step in (("step-000095", 95), ("9", 100), ("10", 110), ("step-1234567", 1234567))
    ]
    assert latest_committed(tmp_path) == found[-1]


def test_of_a_dry_run_nothing_is_gone_on_from(tmp_path: Path) -> None:
    assert not holds_dry_run(tmp_path)
    write_checkpoint(tmp_path, "step-000000", 0)
    assert latest_committed(tmp_path) is None and holds_dry_run(tmp_path)
    write_checkpoint(tmp_path, "0", 3)
    newest = latest_committed(tmp_path)
    assert newest is not None and newest.step == 3 and not holds_dry_run(tmp_path)


def test_a_checkpoint_carries_the_metrics_and_identity_of_its_record(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, "0", 6, expected_tokens=1.5)
    (found,) = find_committed(tmp_path)
    assert found.metrics == {"val/expected_tokens": 1.5} and found.identity == IDENTITY


def test_a_half_written_folder_is_ignored_though_its_number_is_the_highest(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, "0", 6)
    write_parts(tmp_path / "7")
    (tmp_path / "8").mkdir()
    (tmp_path / "step-000099").mkdir()
    for name in UNFINISHED:
        (tmp_path / "step-000099" / name).write_text("{")
    latest = latest_committed(tmp_path)
    assert latest is not None and latest.path == tmp_path / "0"
    assert find_uncommitted(tmp_path) == [tmp_path / name for name in ("7", "8", "step-000099")]
    remove_unfinished(tmp_path / "step-000099")
    assert list((tmp_path / "step-000099").iterdir()) == []


def test_folders_of_others_are_neither_checkpoints_nor_half_written_ones(tmp_path: Path) -> None:
    for name in ("backup", "0-old", "step-x", "v1"):
        write_checkpoint(tmp_path, name, 5)
    (tmp_path / "2024").mkdir()
    (tmp_path / "2024" / "notes.txt").write_text("mine")
    (tmp_path / "3").write_text("a file")
    assert find_committed(tmp_path) == [] and find_uncommitted(tmp_path) == []


def test_a_run_that_has_not_begun_has_no_checkpoints(tmp_path: Path) -> None:
    for save_dir in (tmp_path, tmp_path / "absent"):
        assert find_committed(save_dir) == [] and latest_committed(save_dir) is None
        assert find_uncommitted(save_dir) == [] and point(save_dir) is None and remove_run(save_dir) == []
        assert mend_snapshot(save_dir) is None


@pytest.mark.parametrize("part", sorted(PARTS - {COMMITTED}))
def test_a_committed_checkpoint_that_lost_a_part_is_an_error(part: str, tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path, "0", 6)
    os.rename(path / part, tmp_path / "elsewhere")
    with pytest.raises(CheckpointError) as caught:
        find_committed(tmp_path)
    assert str(caught.value) == f"{path}: committed, but {part} is gone. Restore it or move the folder away."
    assert caught.value.exit_code == 4


@pytest.mark.parametrize("part", [COMMITTED, "run.json"])
@pytest.mark.parametrize("content", ["", "{", "[]", "null", "{}", '{"step": "six", "metrics": {}}', "\udcff"])
def test_a_committed_checkpoint_with_an_unreadable_record_is_an_error(part: str, content: str, tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path, "0", 6)
    (path / part).write_bytes(content.encode("utf-8", "surrogateescape"))
    with pytest.raises(CheckpointError, match=r"0: COMMITTED or run.json cannot be read .* Move the folder away"):
        latest_committed(tmp_path)


@pytest.mark.parametrize("part", sorted(PARTS - {COMMITTED}))
def test_a_folder_without_a_part_cannot_be_committed(part: str, tmp_path: Path) -> None:
    folder = write_parts(tmp_path / "0")
    os.rename(folder / part, tmp_path / "elsewhere")
    with pytest.raises(CheckpointError, match=f"cannot be committed without {re.escape(part)}"):
        commit(folder, 6)
    assert not (folder / COMMITTED).exists()


def test_all_that_the_marker_vouches_for_is_on_disk_before_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, synced, fsync = write_parts(tmp_path / "0"), [], os.fsync

    def record(descriptor: int) -> None:
        synced.append((Path(os.readlink(f"/proc/self/fd/{descriptor}")), (folder / COMMITTED).exists()))
        fsync(descriptor)

    monkeypatch.setattr("os.fsync", record)
    expected = {tmp_path, folder, *folder.rglob("*")}
    commit(folder, 6)
    before_the_marker = [path for path, is_marked in synced if not path.name.startswith(f".{COMMITTED}.")]
    assert set(before_the_marker) == expected and not any(is_marked for _, is_marked in synced)


# --------------------------------------------------------------------------------------------- best


def test_best_has_the_most_expected_tokens(tmp_path: Path) -> None:
    for epoch, expected in enumerate((1.2, 1.9, 1.4)):
        write_checkpoint(tmp_path, str(epoch), epoch + 1, expected)
    assert point(tmp_path) == tmp_path / "1"
    assert os.readlink(tmp_path / BEST) == "1"  # relative: the run folder can be moved


def test_of_equally_good_checkpoints_the_older_is_best(tmp_path: Path) -> None:
    for name, step in (("step-000001", 10), ("0", 20), ("5", 5)):
        write_checkpoint(tmp_path, name, step, 1.5)
    assert point(tmp_path) == tmp_path / "5"


def test_without_validation_the_newest_is_best(tmp_path: Path) -> None:
    for epoch in range(3):
        write_checkpoint(tmp_path, str(epoch), epoch + 1)
    assert point(tmp_path) == tmp_path / "2"


def test_a_checkpoint_without_validation_is_not_best_if_another_has_one(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, "0", 1, 1.1)
    write_checkpoint(tmp_path, "step-000002", 2)
    assert point(tmp_path) == tmp_path / "0"


def test_a_half_written_folder_is_never_best(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, "0", 1, 1.1)
    write_parts(tmp_path / "1", 3.0)
    assert point(tmp_path) == tmp_path / "0"


def test_best_exists_at_every_moment_of_its_replacement(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_checkpoint(tmp_path, "0", 1, 1.1)
    point(tmp_path)
    write_checkpoint(tmp_path, "1", 2, 1.2)
    (tmp_path / ".best.tmp").symlink_to("left by a crash")
    seen = []

    def replace(source: Path, target: Path) -> None:
        seen.append((os.readlink(source), os.readlink(target)))
        raise InterruptedError

    with monkeypatch.context() as patched:
        patched.setattr(storage.os, "replace", replace)
        with pytest.raises(InterruptedError):
            point(tmp_path)
    assert seen == [("1", "0")] and os.readlink(tmp_path / BEST) == "0"
    assert point(tmp_path) == tmp_path / "1" and (tmp_path / BEST).resolve() == tmp_path / "1"
    assert not (tmp_path / ".best.tmp").is_symlink()


# ------------------------------------------------------------------------------ going on, starting over


def test_a_checkpoint_of_the_same_run_is_accepted(tmp_path: Path) -> None:
    check_same_run(CommittedCheckpoint(tmp_path, 1, {}, json.loads(json.dumps(IDENTITY))), IDENTITY)


def test_everything_that_differs_is_named_with_both_values(tmp_path: Path) -> None:
    checkpoint = CommittedCheckpoint(tmp_path / "3", 1, {}, IDENTITY | {"old": 1})
    draft: dict[str, Any] = {"norm_output": True, "layer": {"hidden_size": 64}}
    with pytest.raises(CheckpointError) as caught:
        check_same_run(checkpoint, IDENTITY | {"seed": 5, "draft": draft, "new": None})
    assert str(caught.value) == (
        f"{tmp_path / '3'}: saved by a run with other settings or data:\n"
        "  draft.norm_output was False, is True\n"
        "  old was 1, is None\n"
        "  seed was 0, is 5\n"
        "  Give the same ones, another --save-path, or --no-resume-from-checkpoint to start over."
    )
    assert caught.value.exit_code == 4


def test_starting_over_removes_what_a_run_wrote_and_leaves_the_rest(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, "0", 1, 1.1)
    write_checkpoint(tmp_path, "step-000002", 2)
    point(tmp_path)
    (write_parts(tmp_path / "7") / "model.safetensors").unlink()
    (tmp_path / "8").mkdir()
    (tmp_path / f"{RAY_SNAPSHOT}.broken").write_text("{")
    for name in (RUN_YAML, INITIAL_METRICS, METRICS, PLAN, LOGGER_RUN_ID, RAY_SNAPSHOT, ".validate_storage_marker"):
        (tmp_path / name).write_text("ours")
    # With one file of somebody else a folder is somebody else's.
    (write_checkpoint(tmp_path, "5", 5) / "notes.txt").write_text("mine")
    (tmp_path / "thesis.tex").write_text("mine")
    write_parts(tmp_path / "backup")
    elsewhere = write_checkpoint(tmp_path / "other", "9", 9)
    (tmp_path / "9").symlink_to(elsewhere)
    (tmp_path / LOCK).write_text("held by who removes")
    left = [tmp_path / name for name in ("5", "9", "backup", "other", "thesis.tex")]
    assert remove_run(tmp_path) == left
    assert sorted(tmp_path.iterdir()) == sorted([*left, tmp_path / LOCK])
    assert {path.name for path in (tmp_path / "5").iterdir()} >= PARTS and (elsewhere / COMMITTED).exists()


def test_a_folder_called_best_is_not_removed(tmp_path: Path) -> None:
    (tmp_path / BEST).mkdir()
    (tmp_path / BEST / "copy.txt").write_text("mine")
    assert remove_run(tmp_path) == [tmp_path / BEST]


# ------------------------------------------------------------------------------------ Ray's own list


def test_a_healthy_snapshot_is_left_alone(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, "0", 1)
    for text in (snapshot("0"), snapshot()):
        (tmp_path / RAY_SNAPSHOT).write_text(text)
        assert mend_snapshot(tmp_path) is None
        assert (tmp_path / RAY_SNAPSHOT).read_text() == text


@pytest.mark.parametrize(
    "text",
    [
        snapshot("0")[:-5],
        "",
        snapshot("0", "1"),  # the newest is gone
        snapshot("1"),
        "[]",
        '{"checkpoint_results": null}',
        '{"checkpoint_results": [{}], "checkpoint_report_indices": [0]}',
        '{"checkpoint_results": []}',
    ],
)
def test_a_broken_snapshot_is_moved_and_no_checkpoint_is_touched(text: str, tmp_path: Path) -> None:
    write_checkpoint(tmp_path, "0", 1)
    (tmp_path / f"{RAY_SNAPSHOT}.broken").write_text("of an earlier time")
    (tmp_path / RAY_SNAPSHOT).write_text(text)
    moved = mend_snapshot(tmp_path)
    assert moved == tmp_path / f"{RAY_SNAPSHOT}.broken" and moved.read_text() == text
    assert not (tmp_path / RAY_SNAPSHOT).exists() and latest_committed(tmp_path) is not None
    assert mend_snapshot(tmp_path) is None


def test_folders_that_are_gone_are_taken_off_the_list_where_the_newest_is_there(tmp_path: Path) -> None:
    for name in ("1", "3", "4"):
        write_checkpoint(tmp_path, name, int(name))
    (tmp_path / RAY_SNAPSHOT).write_text(snapshot("0", "1", "2", "3", "4"))
    assert mend_snapshot(tmp_path) is None
    assert (tmp_path / RAY_SNAPSHOT).read_text() == snapshot("1", "3", "4")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["1", "3", "4", RAY_SNAPSHOT]


def test_a_file_is_old_or_whole_when_writing_breaks_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "run.json"
    write_atomically(path, "old")

    def interrupt(*_: object) -> None:
        raise InterruptedError

    with monkeypatch.context() as patched:
        patched.setattr(storage.os, "fsync", interrupt)
        with pytest.raises(InterruptedError):
            write_atomically(path, "new")
    assert path.read_text() == "old"
    write_atomically(path, "new")
    assert path.read_text() == "new" and [p.name for p in tmp_path.iterdir()] == ["run.json"]
