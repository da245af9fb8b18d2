"""A sample whose states are finite, but so large that what is computed of them is not."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from eagle3_ray.errors import NonFiniteError
from eagle3_ray.jobs.train import run
from eagle3_ray.training.outcome import MAX_LEFT_OUT_IN_A_ROW
from eagle3_ray.training.run_folder import find_committed
from tests.makers import write_samples
from tests.runs import LENGTHS, SHAPE, load_state, make_settings

BAD = "data_7.pt"

pytestmark = pytest.mark.usefixtures("ray_cluster")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Twelve samples, all to train on: six bins, three steps an epoch."""
    write_samples(tmp_path / "data", LENGTHS, **SHAPE)
    return tmp_path


def make_huge(path: Path) -> None:
    content = torch.load(path, weights_only=True)
    content["hidden_states"] = [torch.full_like(state, 3e38) for state in content["hidden_states"]]
    torch.save(content, path)


def train(folder: Path, save: str, **changes: Any) -> dict[str, float]:
    """Metrics of the last checkpoint."""
    changes = {"train_frac": 1.0, "num_workers": 2, "on_nonfinite": "skip"} | changes
    run(make_settings(folder, save_path=folder / save, **changes))
    return dict(find_committed(folder / save)[-1].metrics)


def test_it_ends_the_run_by_name_and_nothing_is_updated(folder: Path) -> None:
    make_huge(folder / "data" / BAD)
    text = rf"step \d: the gradient norm is (nan|inf)\. Nothing was updated; (.|\n)*{BAD}"
    with pytest.raises(NonFiniteError, match=text) as caught:
        train(folder, "run", num_workers=1, on_nonfinite="stop")
    assert caught.value.exit_code == 3 and "--on-nonfinite skip" in str(caught.value)


def test_its_update_is_left_out_on_all_ranks_counted_and_told(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_huge(folder / "data" / BAD)
    metrics = train(folder, "straight")
    assert metrics["train/left_out_steps"] == 2  # once an epoch
    assert all(math.isfinite(value) for value in metrics.values())
    told = [line for line in capsys.readouterr().out.splitlines() if "left out" in line]
    assert len(told) == 2 and all(BAD in line for line in told)
    assert "The update is left out (1 so far); its bins held" in told[0] and "(2 so far)" in told[1]
    state = load_state(folder / "straight" / "1", tmp_path)
    assert all(torch.isfinite(tensor).all() for tensor in state.values())
    # Adam has counted the others alone; a run that is interrupted counts on where it was, and ends the same.
    assert {int(tensor) for name, tensor in state.items() if name.endswith("/step")} == {4}
    train(folder, "interrupted", max_steps=4)
    assert train(folder, "interrupted")["train/left_out_steps"] == 2
    resumed = load_state(folder / "interrupted" / "1", tmp_path)
    assert [name for name in state if not torch.equal(state[name], resumed[name])] == []


def test_too_many_in_a_row_end_the_run_for_the_draft_is_why(folder: Path) -> None:
    for path in (folder / "data").glob("*.pt"):
        make_huge(path)
    with pytest.raises(NonFiniteError, match="the draft has diverged") as caught:
        train(folder, "run", num_workers=1, epochs=9, log_every_steps=1)
    assert f"in the {MAX_LEFT_OUT_IN_A_ROW} steps before" in str(caught.value)
    left_out = [
        json.loads((path.path / "run.json").read_text(encoding="utf-8"))["metrics"]
        for path in find_committed(folder / "run")
    ]
    assert [metrics["train/left_out_steps"] for metrics in left_out] == [3, 6, 9]  # three epochs were stored
