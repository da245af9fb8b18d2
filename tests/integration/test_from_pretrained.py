"""`train --from-pretrained`: a run that begins with a trained draft is, before its first step, that draft."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from eagle3_ray.config import DoctorSettings, TrainSettings
from eagle3_ray.data.vocab import read_mapping
from eagle3_ray.errors import PretrainedDraftError
from eagle3_ray.export import export_checkpoint
from eagle3_ray.jobs import doctor
from eagle3_ray.jobs.train import run
from eagle3_ray.settings_file import read_run_yaml
from tests.makers import write_samples
from tests.runs import LENGTHS, PARITY, SHAPE, make_settings, read_metrics

pytestmark = pytest.mark.usefixtures("ray_cluster")
# Compute in bf16, and what is validated while training is what a served draft, which is stored in bf16, computes.
CHANGES: dict[str, Any] = {"norm_before_residual": False, "precision": "bf16", "epochs": 1}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with samples and a run of one epoch."""
    folder = tmp_path_factory.mktemp("trained")
    write_samples(folder / "data", LENGTHS, **SHAPE)
    run(make_settings(folder, **CHANGES))
    return folder


def begin_with(draft: Path, trained: Path, folder: Path, **changes: Any) -> TrainSettings:
    """A run on the same samples, which has no vocabulary of its own."""
    fields = {"from_pretrained": str(draft), "d2t_path": folder / "d2t.npy", "t2d_path": folder / "t2d.npy"}
    return make_settings(folder, **{**CHANGES, "data_path": trained / "data", **fields, **changes})


def as_published(trained: Path, folder: Path, kind: str) -> Path:
    if kind == "checkpoint":
        return trained / "run" / "best"
    export_checkpoint(trained / "run" / "0", folder / "draft", "sglang" if kind == "sglang" else "speculators")
    return folder / "draft"


@pytest.mark.parametrize(("kind", "num_workers"), [("checkpoint", 2), ("export", 1), ("sglang", 1)])
def test_a_run_begins_as_the_draft_was_when_it_was_validated(
    kind: str, num_workers: int, trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    draft = as_published(trained, tmp_path, kind)
    run(begin_with(draft, trained, tmp_path, num_workers=num_workers, dry_run=True))
    resolved = draft.resolve()
    assert f"begins with {resolved}: 96 of the 96 rows of its head are taken over\n" in capsys.readouterr().out
    own, found = (
        json.loads((folder / "initial_metrics.json").read_text()) for folder in (trained / "run", tmp_path / "run")
    )
    validated = {name: value for name, value in read_metrics(trained / "run" / "0").items() if name.startswith("val/")}
    assert found == (validated if num_workers == 1 else pytest.approx(validated, rel=1e-6)) and found != own
    tensors, original = (
        load_file(folder / "model.safetensors") for folder in (tmp_path / "run" / "step-000000", trained / "run" / "0")
    )
    assert tensors.keys() == original.keys()
    assert [name for name in original if not torch.equal(tensors[name], original[name])] == []
    assert read_run_yaml(tmp_path / "run" / "run.yaml")["from_pretrained"] == str(resolved)


def test_a_run_goes_on_from_its_own_checkpoint_though_the_draft_it_began_with_is_gone(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    draft = as_published(trained, tmp_path, "export")
    settings = begin_with(draft, trained, tmp_path)
    run(settings.model_copy(update={"max_steps": 1}))
    mapping = read_mapping(str(PARITY / "d2t.npy"), str(PARITY / "t2d.npy"), 320, None)
    written = read_mapping(str(tmp_path / "d2t.npy"), str(tmp_path / "t2d.npy"), 320, None)
    assert written.digest() == mapping.digest()
    shutil.rmtree(draft)
    capsys.readouterr()
    run(settings)
    told = capsys.readouterr().out
    assert "going on from" in told and "begins with" not in told
    assert (tmp_path / "run" / "0" / "COMMITTED").is_file()


def test_of_another_vocabulary_the_run_tells_how_many_rows_are_taken_over(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(begin_with(trained / "run" / "0", trained, tmp_path, draft_vocab_size=50, dry_run=True))
    tensors, original = (
        load_file(folder / "model.safetensors") for folder in (tmp_path / "run" / "step-000000", trained / "run" / "0")
    )
    kept, before = ((t["d2t"] + torch.arange(len(t["d2t"]))).numpy() for t in (tensors, original))
    num_own = len(np.intersect1d(kept, before))
    assert 0 < num_own < 50
    text = f"{num_own} of the 50 rows of its head are taken over, {50 - num_own} are the verifier's"
    assert text in capsys.readouterr().out
    head = load_file(PARITY / "verifier" / "model.safetensors")["lm_head.weight"]
    for row, verifier_id in enumerate(kept):
        (place,) = np.nonzero(before == verifier_id)
        expected = original["lm_head.weight"][place[0]] if len(place) else head[verifier_id]
        assert torch.equal(tensors["lm_head.weight"][row], expected.bfloat16())


def test_a_draft_that_does_not_fit_is_refused_before_anything_is_written(trained: Path, tmp_path: Path) -> None:
    settings = begin_with(trained / "run" / "0", trained, tmp_path)
    with pytest.raises(PretrainedDraftError, match="pass --no-norm-before-residual") as caught:
        run(settings.model_copy(update={"norm_before_residual": True}))
    assert caught.value.exit_code == 3
    with pytest.raises(PretrainedDraftError, match=r"no config\.json"):
        run(settings.model_copy(update={"from_pretrained": str(trained)}))
    broken = tmp_path / "broken"
    shutil.copytree(trained / "run" / "0", broken)
    tensors = load_file(broken / "model.safetensors")
    tensors["fc.weight"][3, 5] = torch.nan
    save_file(tensors, broken / "model.safetensors")
    with pytest.raises(PretrainedDraftError, match=r"fc\.weight has NaN or Inf"):
        run(settings.model_copy(update={"from_pretrained": str(broken)}))
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["run.lock"]
    assert not (tmp_path / "d2t.npy").exists()


def test_doctor_looks_at_the_draft_and_its_vocabulary(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = begin_with(trained / "run" / "0", trained, tmp_path)
    doctor.run(DoctorSettings.model_validate(settings.model_dump()))
    told = capsys.readouterr().out
    assert "pretrained" in told and "of the run's shape, says 96 ids" in told
    assert f"96 of 320 ids, by {trained / 'run' / '0'}" in told
    fields = {**settings.model_dump(), "num_layers": 2}
    with pytest.raises(PretrainedDraftError):
        doctor.run(DoctorSettings.model_validate(fields))
    told = capsys.readouterr().out
    assert "decoder layers: 1 of the draft, 2 of the run: pass --num-layers 1" in told
    assert "needs pretrained, see above" in told
