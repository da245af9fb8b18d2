"""What a run plans with and leaves out, when it begins and when it goes on; whole runs are in tests/faults."""

from pathlib import Path
from typing import Any

import pytest

from eagle3_ray.config import TrainSettings
from eagle3_ray.data.index import SampleIndex, build_index
from eagle3_ray.data.planned import write_planned
from eagle3_ray.data.quarantine import Quarantine
from eagle3_ray.errors import DataError
from eagle3_ray.jobs.samples import choose_samples
from eagle3_ray.training.run_folder import CommittedCheckpoint
from tests.makers import make_spec, write_bad_file, write_sample, write_samples

LENGTHS = [40, 50, 60, 30, 20, 25]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Six samples."""
    write_samples(tmp_path / "data", LENGTHS)
    (tmp_path / "run").mkdir()
    return tmp_path


def choose(folder: Path, goes_on: bool, **changes: Any) -> tuple[SampleIndex, Quarantine]:
    """What `train` would do."""
    fields: dict[str, Any] = {"on_bad_sample": "quarantine", "max_bad_frac": 0.5} | changes
    paths = {"data_path": folder / "data", "save_path": folder / "run"}
    settings = TrainSettings(verifier_name_or_path="verifier", **paths, **fields)
    quarantine = Quarantine(folder / "run" / "quarantine.jsonl", str(folder / "data"), 1, settings.max_bad_frac)
    checkpoint = CommittedCheckpoint(folder / "run" / "0", 1, {}, {}) if goes_on else None
    return choose_samples(settings, make_spec(), checkpoint, quarantine), quarantine


def test_a_run_that_goes_on_plans_with_what_it_began_with_whatever_became_of_the_files(folder: Path) -> None:
    data = folder / "data"
    write_bad_file(data / "data_0.pt", "empty")
    index, quarantine = choose(folder, goes_on=False)
    assert quarantine.paths == {"data_0.pt"} and quarantine.left_out_of_bins == frozenset()
    write_planned(folder / "run" / "samples.parquet", [index])
    quarantine.store()
    write_sample(data / "data_0.pt", 40)  # mended, but in no plan
    write_sample(data / "new.pt", 40)
    write_bad_file(data / "new_and_bad.pt", "empty")
    write_bad_file(data / "data_1.pt", "cut_short")
    (data / "data_2.pt").unlink()
    write_sample(data / "data_3.pt", 31)
    again, quarantine = choose(folder, goes_on=True, max_bad_frac=0.7)
    assert again.digest() == index.digest()
    assert quarantine.left_out_of_bins == {"data_1.pt", "data_2.pt", "data_3.pt"}
    assert quarantine.paths == {"data_0.pt", *quarantine.left_out_of_bins} and quarantine.num_files == 6
    with pytest.raises(DataError, match=r"4 of 6 \.pt files") as caught:
        choose(folder, goes_on=True)
    assert "  data_2.pt: is gone, was there when the run began." in str(caught.value)
    assert "  data_3.pt: has 31 tokens, had 30 when the run began." in str(caught.value)


def test_a_run_that_knew_no_quarantine_goes_on_with_one(folder: Path) -> None:
    index, quarantine = choose(folder, goes_on=False, on_bad_sample="fail")
    write_planned(folder / "run" / "samples.parquet", [index])
    write_bad_file(folder / "data" / "data_1.pt", "nan")
    with pytest.raises(DataError, match=r"1 of 6 \.pt files"):
        choose(folder, goes_on=True, on_bad_sample="fail")
    again, quarantine = choose(folder, goes_on=True)
    assert again.digest() == index.digest() and quarantine.left_out_of_bins == {"data_1.pt"}


def test_a_run_without_a_record_of_its_samples_plans_anew(folder: Path) -> None:
    write_bad_file(folder / "data" / "data_1.pt", "nan")
    index, _ = choose(folder, goes_on=True)
    (folder / "data" / "data_1.pt").unlink()
    assert index.digest() == build_index(str(folder / "data"), make_spec()).digest()
