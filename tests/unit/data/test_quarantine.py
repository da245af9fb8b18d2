"""The list of files left out, and bins without them; runs that leave files out are in tests/faults."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from eagle3_ray.data.bad_files import BadFile
from eagle3_ray.data.batch import PackedBin, pack_samples
from eagle3_ray.data.index import SampleIndex
from eagle3_ray.data.packing import FILLER, BinSchedule, plan_bins
from eagle3_ray.data.pipeline import TENSORS, iter_step_bins
from eagle3_ray.data.planned import read_planned, write_planned
from eagle3_ray.data.quarantine import Quarantine
from eagle3_ray.data.samples import read_sample
from eagle3_ray.data.source import BinSource
from eagle3_ray.errors import DataError, SampleFormatError
from eagle3_ray.storage import ObjectPath
from tests.makers import make_spec, write_bad_file, write_samples

LIST = "quarantine.jsonl"
LENGTHS = [40, 50, 30, 20, 45]
ODD_NAME = "\udcff/é.pt"  # a name that is no UTF-8


def make_quarantine(path: Path, max_bad_frac: float = 0.5) -> Quarantine:
    return Quarantine(path / LIST, "/data", 1, max_bad_frac)


def bad_file(path: str) -> BadFile:
    return BadFile(path, ("empty",), "is empty.")


# ------------------------------------------------------------------------------------- the list


def test_a_list_is_read_as_it_was_written_and_each_file_is_in_it_once(tmp_path: Path) -> None:
    quarantine = make_quarantine(tmp_path)
    quarantine.begin(10, [bad_file("a.pt")])
    quarantine.store()
    for told in ("/data/b.pt", f"/data/{ODD_NAME}", "/data/b.pt", "b.pt", "a.pt"):
        file = quarantine.leave_out(bad_file(told))
        if file is not None:
            quarantine.append(file)
    records = [json.loads(line) for line in (tmp_path / LIST).read_text().splitlines()]
    assert records == [
        {"path": path, "kinds": ["empty"], "text": "is empty.", "is_planned": is_planned}
        for path, is_planned in (("a.pt", False), ("b.pt", True), (ODD_NAME, True))
    ]
    again = make_quarantine(tmp_path)
    again.read(num_planned=9)
    assert again.paths == {"a.pt", "b.pt", ODD_NAME} and again.left_out_of_bins == {"b.pt", ODD_NAME}
    again.store()
    assert [json.loads(line) for line in (tmp_path / LIST).read_text().splitlines()] == records


def test_a_line_that_was_being_written_is_not_read_and_does_not_spoil_the_next(tmp_path: Path) -> None:
    quarantine = make_quarantine(tmp_path)
    quarantine.begin(10, [bad_file("a.pt"), bad_file("b.pt")])
    quarantine.store()
    (tmp_path / LIST).write_bytes((tmp_path / LIST).read_bytes()[:-5])
    again = make_quarantine(tmp_path)
    again.read(num_planned=8)
    assert again.paths == {"a.pt"}
    again.store()
    again.append(bad_file("c.pt"))
    assert [json.loads(line)["path"] for line in (tmp_path / LIST).read_text().splitlines()] == ["a.pt", "c.pt"]


def test_a_damaged_list_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / LIST).write_text('{"path": "a.pt"}\n')
    with pytest.raises(DataError, match=r"quarantine\.jsonl: cannot be read \(KeyError\('kinds'\)\)"):
        make_quarantine(tmp_path).read(1)


def test_a_list_of_another_run_is_removed_when_there_is_nothing_to_list(tmp_path: Path) -> None:
    (tmp_path / LIST).write_text("of another run\n")
    quarantine = make_quarantine(tmp_path)
    quarantine.begin(10, [])
    quarantine.store()
    assert list(tmp_path.iterdir()) == []
    make_quarantine(tmp_path).read(10)


@pytest.mark.parametrize(("max_bad_frac", "num_allowed"), [(0.0, 0), (0.1, 1), (0.29, 2), (1.0, 10)])
def test_the_run_ends_with_the_first_file_too_many(tmp_path: Path, max_bad_frac: float, num_allowed: int) -> None:
    quarantine = make_quarantine(tmp_path, max_bad_frac)
    quarantine.begin(10, [])
    for number in range(10):
        assert quarantine.must_end_run == (number > num_allowed)
        if number <= num_allowed:
            quarantine.check()
        else:
            with pytest.raises(DataError) as caught:
                quarantine.check()
            lines = str(caught.value).splitlines()
            assert lines[0] == f"/data: {number} of 10 .pt files are not usable v1 samples."
            assert lines[-1].startswith(f"  That is more than the {num_allowed} that --max-bad-frac {max_bad_frac:g} ")
            assert lines[-1].endswith(f"take their lines out of {quarantine.path}.")
        quarantine.leave_out(bad_file(f"{number}.pt"))


def test_a_file_that_cannot_be_written_down_ends_the_run(tmp_path: Path) -> None:
    quarantine = make_quarantine(tmp_path / "gone", 1.0)
    quarantine.begin(10, [])
    file = quarantine.leave_out(bad_file("a.pt"))
    assert file is not None
    quarantine.check()
    quarantine.append(file)
    with pytest.raises(DataError, match=r"quarantine\.jsonl: cannot be written \(.*No such file or directory"):
        quarantine.check()


def test_an_object_store_holds_the_same(s3_bucket: ObjectPath) -> None:
    place = s3_bucket / "run" / LIST
    quarantine = Quarantine(place, "/data", 1, 0.5)
    quarantine.read(10)
    for told in ("/data/a.pt", "/data/b.pt"):
        file = quarantine.leave_out(bad_file(told))
        assert file is not None
        quarantine.append(file)
    again = Quarantine(place, "/data", 1, 0.5)
    again.read(10)
    assert again.left_out_of_bins == {"a.pt", "b.pt"}
    again.begin(10, [])
    again.store()
    assert not place.exists()


# ------------------------------------------------------------------------------------- the plan


def test_a_run_plans_again_with_what_it_began_with(tmp_path: Path) -> None:
    def index_of(*numbers: int) -> SampleIndex:
        paths = [("a.pt", "b/c.pt", "d.pt", ODD_NAME)[number] for number in numbers]
        return SampleIndex("/data", paths, np.array(numbers) + 10, np.array(numbers), 0)

    write_planned(tmp_path / "samples.parquet", [index_of(0, 2), index_of(1, 3)])
    again = read_planned(tmp_path / "samples.parquet", "/moved")
    assert again is not None and again.root == "/moved" and again.digest() == index_of(0, 1, 2, 3).digest()
    assert read_planned(tmp_path / "none.parquet", "/data") is None
    (tmp_path / "samples.parquet").write_bytes(b"PAR1")
    with pytest.raises(DataError, match=r"samples\.parquet: cannot be read"):
        read_planned(tmp_path / "samples.parquet", "/data")


# ------------------------------------------------------------------------------------- the bins


@pytest.fixture
def source(tmp_path: Path) -> BinSource:
    """Five samples in bins of two, two and one."""
    write_samples(tmp_path, LENGTHS)
    lengths = np.array(LENGTHS)
    index = SampleIndex(str(tmp_path), [f"data_{number}.pt" for number in range(5)], lengths, lengths - 4, 0)
    source = BinSource(make_spec(), index, plan_bins(lengths, lengths - 4, 69, seed=0), seed=0)
    assert sorted(len(members) for members in source.plan.bins) == [1, 2, 2]
    return source


def read_epoch(source: BinSource, told: list[BadFile]) -> dict[int, PackedBin]:
    """The bins of a pass, by row."""
    schedule = BinSchedule(len(source.plan.bins), 1, 1, 1)
    items = iter_step_bins(
        None, source, schedule, 0, range(3), "worker", lambda packed: packed, num_prefetch=3, leave_out=told.append
    )
    return {packed.row: packed for item in items for packed in item.bins}


@pytest.mark.parametrize("is_known", [True, False])
def test_a_bin_is_packed_without_its_bad_file_and_without_any_it_is_a_filler(source: BinSource, is_known: bool) -> None:
    by_size = sorted(range(3), key=lambda number: len(source.plan.bins[number]))
    alone, (bad, kept) = source.paths_of_bin(by_size[0])[0], source.paths_of_bin(by_size[1])
    for name in (alone, bad):
        write_bad_file(Path(source.index.root) / name, "cut_short")
    if is_known:
        source = BinSource(source.spec, source.index, source.plan, source.seed, frozenset((alone, bad)))
    told: list[BadFile] = []
    bins = read_epoch(source, told)
    names = [] if is_known else sorted(f"{source.index.root}/{name}" for name in (alone, bad))
    assert sorted(file.path for file in told) == names
    assert all(file.kinds == ("cut short or damaged",) for file in told)
    order = source.plan.epoch_order(0, source.seed).tolist()
    samples = {by_size[0]: [], by_size[1]: [kept], by_size[2]: source.paths_of_bin(by_size[2])}
    for row, number in enumerate(order):
        read = [read_sample(f"{source.index.root}/{name}", source.spec) for name in samples[number]]
        expected = pack_samples(read, 69, source.spec)
        assert bins[row].number == (number if samples[number] else FILLER)
        for name in TENSORS:
            assert torch.equal(bins[row].__dict__[name], expected.__dict__[name]), name
    assert not bins[order.index(by_size[0])].loss_mask.any()


def test_a_file_that_has_another_length_is_bad_and_unless_it_may_be_left_out_the_stream_ends(source: BinSource) -> None:
    write_samples(Path(source.index.root), [40, 50, 31])
    told: list[BadFile] = []
    read_epoch(source, told)
    assert [file.kinds for file in told] == [("another length than in the plan",)]
    schedule = BinSchedule(len(source.plan.bins), 1, 1, 1)
    with pytest.raises(SampleFormatError, match=r"data_2\.pt: has 31 tokens, had 30 when it was indexed"):
        list(iter_step_bins(None, source, schedule, 0, range(3), "worker", lambda packed: packed))
