"""Optimizer, average, recomputed layers and an early end through Ray: a pause leaves no seam."""

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from eagle3_ray.errors import CheckpointError, DataError
from eagle3_ray.jobs.train import run
from tests.makers import write_samples
from tests.runs import LENGTHS, SHAPE, assert_same_run, load_state, make_settings

pytestmark = pytest.mark.usefixtures("ray_cluster")

ALL = {"optimizer": "muon", "ema_decay": 0.9, "gradient_checkpointing": True, "weight_decay": 0.01}
# At this rate no weight moves, and no epoch is better than the first.
STILL = {"epochs": 6, "lr": 1e-20, "early_stop_epochs": 2}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    write_samples(folder / "data", LENGTHS, **SHAPE)
    return folder / "data"


def new_folder(data: Path, path: Path) -> Path:
    shutil.copytree(data, path / "data")
    return path


def names_of(folder: Path) -> set[str]:
    return {path.parent.name for path in (folder / "run").glob("*/COMMITTED") if not path.parent.is_symlink()}


def test_a_paused_run_with_all_of_it_goes_on_bit_for_bit_and_serves_the_average(data: Path, tmp_path: Path) -> None:
    straight, paused = new_folder(data, tmp_path / "straight"), new_folder(data, tmp_path / "paused")
    run(make_settings(straight, **ALL))
    run(make_settings(paused, **ALL, max_steps=4))
    with pytest.raises(CheckpointError, match=r"ema_decay was 0\.9, is None\n  optimizer was 'muon', is None"):
        run(make_settings(paused))
    run(make_settings(paused, **ALL))
    assert_same_run(paused, straight, tmp_path)
    state, served = (
        load_state(straight / "run" / "1", tmp_path),
        load_file(straight / "run" / "1" / "model.safetensors"),
    )
    assert any(name.endswith("momentum_buffer") for name in state)
    averaged = [name.removeprefix("/ema/") for name in state if name.startswith("/ema/")]
    assert len(averaged) > 10
    for name in averaged:
        assert torch.equal(served[name], state[f"/ema/{name}"].bfloat16()), name
    assert not torch.equal(state["/ema/fc.weight"], state["/model/fc.weight"])


def test_a_run_that_gets_no_better_ends_early_and_its_command_does_not_go_on(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = new_folder(data, tmp_path / "early")
    run(make_settings(folder, **STILL))
    out = capsys.readouterr().out
    assert "stopped early: val/expected_tokens has not risen above " in out
    assert " for 2 epochs; to go on, raise --early-stop-epochs or leave it out\n" in out and "done: 9 steps;" in out
    assert names_of(folder) == {"0", "1", "2"}
    written = [path.stat().st_mtime_ns for path in sorted((folder / "run").glob("*/COMMITTED"))]

    run(make_settings(folder, **STILL))
    assert "done: 9 steps;" in capsys.readouterr().out
    assert written == [path.stat().st_mtime_ns for path in sorted((folder / "run").glob("*/COMMITTED"))]

    # Paused within an epoch, and between two.
    for max_steps in (4, 6):
        paused = new_folder(data, tmp_path / f"paused-{max_steps}")
        run(make_settings(paused, **STILL, max_steps=max_steps))
        run(make_settings(paused, **STILL))
        assert names_of(paused) - {"step-000004"} == {"0", "1", "2"}
        assert_same_run(paused, folder, tmp_path, "2")

    run(make_settings(folder, **STILL | {"early_stop_epochs": 3}))
    assert names_of(folder) == {"0", "1", "2", "3"}


def test_a_run_that_may_end_early_is_refused_without_a_sample_to_validate_on(tmp_path: Path) -> None:
    write_samples(tmp_path / "data", LENGTHS[:1], **SHAPE)
    with pytest.raises(DataError, match="no sample is left to validate on, by which --early-stop-epochs goes"):
        run(make_settings(tmp_path, early_stop_epochs=1))
