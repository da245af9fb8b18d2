"""`train --dry-run`: a servable draft of no step, and a run afterwards that is none the wiser."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from eagle3_ray.errors import DataError, SampleFormatError
from eagle3_ray.jobs.checks import see_run_folder
from eagle3_ray.jobs.train import run
from eagle3_ray.settings_file import read_run_yaml
from eagle3_ray.speculators_format import check_speculators_folder
from eagle3_ray.training.run_folder import LOCK
from tests.makers import write_samples
from tests.runs import LENGTHS, SHAPE, assert_same_run, load_state, make_settings

pytestmark = pytest.mark.usefixtures("ray_cluster")
CHANGES = {"epochs": 1, "num_workers": 2, "max_steps": 2}


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two steps on two workers, with a vocabulary that it chose and wrote."""
    folder = tmp_path_factory.mktemp("straight")
    write_samples(folder / "data", LENGTHS, **SHAPE)
    run(make_settings(folder, **CHANGES, draft_vocab_size=50, **mapping_paths(folder)))
    return folder


def mapping_paths(folder: Path) -> dict[str, Path]:
    return {"d2t_path": folder / "d2t.npy", "t2d_path": folder / "t2d.npy"}


def test_a_run_after_dry_ones_is_that_without_them(
    straight: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(straight / "data", tmp_path / "data")
    save_dir, dry_dir = tmp_path / "run", tmp_path / "run" / "step-000000"
    run(make_settings(tmp_path, seed=5, draft_vocab_size=40, dry_run=True, **mapping_paths(tmp_path)))
    first = load_file(dry_dir / "model.safetensors")
    settings = make_settings(tmp_path, **CHANGES, draft_vocab_size=50, **mapping_paths(tmp_path))
    run(settings.model_copy(update={"dry_run": True}))
    assert f"a draft to try in a server is {dry_dir}; the same command without --dry-run" in capsys.readouterr().out
    assert check_speculators_folder(dry_dir).draft_vocab_size == 50
    draft = load_file(dry_dir / "model.safetensors")
    assert first["lm_head.weight"].shape == (40, 64) and not torch.equal(first["fc.weight"], draft["fc.weight"])
    assert torch.all(draft["norm.weight"] == 1)  # no step has moved it
    assert (save_dir / "best").readlink() == Path("step-000000") and not (tmp_path / "d2t.npy").exists()
    assert read_run_yaml(save_dir / "run.yaml")["dry_run"] is False
    assert see_run_folder(settings).found == "what a dry run left, which train would remove: train would begin anew"
    initial = json.loads((straight / "run" / "initial_metrics.json").read_text())
    assert json.loads((save_dir / "initial_metrics.json").read_text()) == initial and len(initial) > 5

    run(settings)
    assert "going on from" not in capsys.readouterr().out
    assert_same_run(tmp_path, straight, tmp_path, name="step-000002")
    names = {path.name for path in (straight / "run").iterdir()}
    assert {path.name for path in save_dir.iterdir()} == names and not dry_dir.exists()
    assert (save_dir / "best").readlink() == Path("step-000002")
    state = load_state(save_dir / "step-000002", tmp_path)
    assert not torch.all(state["/model/norm.weight"] == 1)


def test_a_run_under_way_is_left_alone(straight: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def times() -> dict[Path, int]:
        files = [path for path in (straight / "run").rglob("*") if path.is_file() and path.name != LOCK]
        return {path: path.stat().st_mtime_ns for path in files}

    before = times()
    settings = make_settings(straight, epochs=1, num_workers=2, draft_vocab_size=50, **mapping_paths(straight))
    run(settings.model_copy(update={"dry_run": True}))
    assert times() == before
    assert f"nothing tried, as {straight / 'run' / 'step-000002'} (step 2) is what" in capsys.readouterr().out


def test_what_a_run_refuses_a_dry_one_refuses_in_the_same_words(tmp_path: Path) -> None:
    write_samples(tmp_path / "data", LENGTHS, data_format_version=0, **SHAPE)
    texts = []
    for dry_run in (False, True):
        with pytest.raises(DataError) as caught:
            run(make_settings(tmp_path, dry_run=dry_run))
        texts.append(str(caught.value))
    assert texts[0] == texts[1] and "not usable v1 samples" in texts[0]


def test_a_file_that_only_a_worker_reads_to_its_end_is_found(straight: Path, tmp_path: Path) -> None:
    shutil.copytree(straight / "data", tmp_path / "data")
    for path in sorted((tmp_path / "data").glob("*.pt")):
        content = torch.load(path, weights_only=True)
        content["hidden_states"][1][17, 3] = torch.nan  # between the positions that the index looks at
        torch.save(content, path)
    with pytest.raises(SampleFormatError, match="auxiliary state 1 has NaN or Inf"):
        run(make_settings(tmp_path, dry_run=True, train_frac=1))
    assert not (tmp_path / "run" / "step-000000").exists()
