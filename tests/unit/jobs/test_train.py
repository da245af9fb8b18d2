"""What `train` says of a stop: where its user goes on."""

import json
import signal
from pathlib import Path

import pytest

from eagle3_ray.config import TrainSettings
from eagle3_ray.jobs.train import told_where_to_go_on
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
