"""What `train` says of a stop: where its user goes on."""

import json
import signal
from pathlib import Path

import pytest

from eagle3_ray.config import TrainSettings
from eagle3_ray.console import use_log_format
from eagle3_ray.jobs.train import tell_end, told_where_to_go_on
from eagle3_ray.stopping import Stopped


@pytest.mark.parametrize(
    ("resumes", "advice"),
    [
        (True, "the same command goes on from there"),
        (False, "without --no-resume-from-checkpoint it goes on from there"),
    ],
)
def test_a_stop_that_saved_nothing_names_the_last_checkpoint(resumes: bool, advice: str, tmp_path: Path) -> None:
    settings = TrainSettings(verifier_name_or_path="v", save_path=tmp_path, resume_from_checkpoint=resumes)
    with pytest.raises(Stopped) as caught, told_where_to_go_on(settings):
        raise Stopped(signal.SIGTERM)
    assert str(caught.value) == "stopped by SIGTERM; nothing was saved; the same command starts again"

    (tmp_path / "0" / "state").mkdir(parents=True)
    for name in ("config.json", "model.safetensors"):
        (tmp_path / "0" / name).write_text("")
    (tmp_path / "0" / "run.json").write_text(json.dumps({"metrics": {}, "identity": {}}))
    (tmp_path / "0" / "COMMITTED").write_text(json.dumps({"step": 7}))
    with pytest.raises(Stopped) as caught, told_where_to_go_on(settings):
        raise KeyboardInterrupt  # as Ray's waits tell of a signal
    assert str(caught.value) == f"stopped by SIGINT; nothing was saved since {tmp_path}/0 (step 7); {advice}"


def write_checkpoint(folder: Path, step: int, num_epochs: int) -> None:
    (folder / "state").mkdir(parents=True)
    for name in ("config.json", "model.safetensors"):
        (folder / name).write_text("")
    stagnation = {"best_expected_tokens": 1.6789, "num_epochs": num_epochs}
    (folder / "run.json").write_text(json.dumps({"metrics": {}, "identity": {}, "stagnation": stagnation}))
    (folder / "COMMITTED").write_text(json.dumps({"step": step}))


@pytest.mark.parametrize(("step", "num_epochs", "is_early"), [(7, 2, True), (20, 2, False), (20, 1, False)])
def test_an_early_end_is_told_to_machines_with_its_numbers(
    step: int, num_epochs: int, is_early: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_checkpoint(tmp_path / "0", step, num_epochs)
    (tmp_path / "best").symlink_to("0")
    use_log_format("json")
    try:
        tell_end(TrainSettings(verifier_name_or_path="v", save_path=tmp_path, early_stop_epochs=2), 20)
    finally:
        use_log_format("text")
    *early, done = map(json.loads, capsys.readouterr().out.splitlines())
    assert (done["event"], done["step"], done["best"]) == ("done", step, str(tmp_path / "0"))
    assert len(early) == is_early
    for event in early:
        assert (event["event"], event["step"], event["best_expected_tokens"], event["epochs"]) == (
            "early_stop",
            step,
            1.6789,
            2,
        )
        assert event["message"].startswith("stopped early: val/expected_tokens has not risen above 1.68 for 2 epochs;")
