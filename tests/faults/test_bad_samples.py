"""Bad samples in a real run: left out, listed, counted, and a run that goes on plans as if they were good."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from eagle3_ray.config import TrainSettings
from eagle3_ray.data.batch import pack_samples
from eagle3_ray.data.index import build_index, split_index, survey_folder
from eagle3_ray.data.index_cache import CACHE_DIR
from eagle3_ray.data.packing import BinSchedule, plan_bins
from eagle3_ray.data.samples import SampleSpec
from eagle3_ray.data.source import BinOrder, BinSource, read_samples
from eagle3_ray.errors import DataError, SampleFormatError
from eagle3_ray.jobs import train as train_job
from eagle3_ray.jobs.train import run
from eagle3_ray.metrics import TRAIN, TttSums, summarize
from eagle3_ray.model.config import build_draft_config
from eagle3_ray.model.initial import initial_weights
from eagle3_ray.model.loss import TargetHead
from eagle3_ray.model.verifier import load_final_norm, load_verifier_tensors, read_verifier_config
from eagle3_ray.training.optim import build_optimizer, learning_rate, set_learning_rate, warmup_steps
from eagle3_ray.training.ready import make_ready
from eagle3_ray.training.run_folder import find_committed
from eagle3_ray.training.sharding import build_sharded_draft
from eagle3_ray.training.step import StepSettings, train_step
from tests.makers import BAD_FILES, make_spec, write_bad_file, write_sample, write_samples
from tests.runs import LENGTHS, SHAPE, Command, make_settings, wait_until
from tests.unit.training.ranks import run_on_ranks
from tests.unit.training.world import load_mapping

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")

pytestmark = pytest.mark.usefixtures("ray_cluster")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A fresh folder with good samples; in `whole`, copies that nobody spoils."""
    write_samples(tmp_path / "data", LENGTHS, **SHAPE)
    shutil.copytree(tmp_path / "data", tmp_path / "whole")
    return tmp_path


def settings_for(folder: Path, **changes: Any) -> TrainSettings:
    """Two ranks, without noise, which is drawn by position; one bad file of twelve is allowed."""
    defaults = {"num_workers": 2, "noise_std": 0.0, "on_bad_sample": "quarantine", "max_bad_frac": 0.1}
    return make_settings(folder, **(defaults | {"logger": "tensorboard"} | changes))


def listed(folder: Path) -> list[dict[str, Any]]:
    """The records of quarantine.jsonl."""
    lines = (folder / "run" / "quarantine.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def cut_short(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:3000])


def put_nan(path: Path) -> None:
    """Between the positions that the index looks at, keeping size and time."""
    status, content = path.stat(), torch.load(path, weights_only=True)
    content["hidden_states"][1][17, 3] = torch.nan
    torch.save(content, path)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


def spoil_when_planned(monkeypatch: pytest.MonkeyPatch, spoil: Callable[[Path], None], paths: list[Path]) -> None:
    """Have files spoilt once the run is decided, before a worker starts."""
    write = train_job.write_run_yaml

    def write_and_spoil(settings: Any, path: Any) -> None:
        write(settings, path)
        for path in paths:
            spoil(path)

    monkeypatch.setattr(train_job, "write_run_yaml", write_and_spoil)


def logged_losses(folder: Path) -> dict[int, float]:
    """The loss of each step, from all of the run's TensorBoard files."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    (log_dir,) = {path.parent for path in (folder / "logs").rglob("events.out.tfevents.*")}
    accumulator = EventAccumulator(str(log_dir))
    accumulator.Reload()
    return {event.step: event.value for event in accumulator.Scalars("train/loss")}


# ------------------------------------------------------------------------------------- the reference


def make_source(settings: TrainSettings, data_path: Path) -> BinSource:
    """The training samples of whole files, planned as a run plans them."""
    verifier = read_verifier_config(settings.verifier_name_or_path)
    norm = load_final_norm(verifier).float()
    spec = SampleSpec(1, verifier.hidden_size, 3, verifier.vocab_size, norm, verifier.rms_norm_eps)
    index, _ = split_index(build_index(str(data_path), spec), settings.train_frac, settings.seed)
    plan = plan_bins(index.num_tokens, index.num_supervised, settings.total_seq_len, settings.seed)
    return BinSource(spec, index, plan, settings.seed)


def train_without(settings: TrainSettings, source: BinSource, left_out: list[str]) -> dict[int, float]:
    """The loss of each step on one rank, from bins packed of all samples but these."""
    verifier = read_verifier_config(settings.verifier_name_or_path)
    mapping, tensors = load_mapping(), load_verifier_tensors(verifier)
    config = build_draft_config(verifier, settings, len(mapping.kept_ids), verifier.default_aux_layer_ids())
    weights = initial_weights(config, tensors, mapping.kept_ids, settings.seed)
    draft = build_sharded_draft(config, weights, CPU, torch.float32)
    optimizer = build_optimizer(draft.parameters(), settings.weight_decay)
    head = TargetHead(tensors.lm_head[mapping.kept_ids].float(), tensors.final_norm.float(), verifier.rms_norm_eps)
    step_settings = StepSettings(
        settings.ttt_steps, 1.0, 0.0, settings.seed, settings.max_grad_norm, CPU, torch.float32
    )
    schedule = BinSchedule(len(source.plan.bins), 2, 1, settings.epochs)
    order, losses = BinOrder(source, schedule), {}
    num_warmup = warmup_steps(schedule.total_steps, settings.warmup_frac)
    for step in range(schedule.total_steps):
        set_learning_rate(optimizer, learning_rate(step, schedule.total_steps, num_warmup, settings.lr))
        bins = []
        for micro_step in range(schedule.micro_steps):
            number = order.number(schedule.row(step, 0, micro_step))
            files = [file for file in source.files_of_bin(number) if Path(file.path).name not in left_out]
            packed = pack_samples(read_samples(files, source.spec), settings.total_seq_len, source.spec, number)
            bins.append(make_ready(packed, settings.ttt_steps, len(draft.layers), CPU))
        epoch = step // schedule.steps_per_epoch
        sums = train_step(draft, optimizer, head, bins, epoch, step_settings).sums
        losses[step + 1] = summarize(TttSums.from_array(sums.numpy()), 1.0, TRAIN)["train/loss"]
    return losses


def files_by_bin(source: BinSource) -> list[list[str]]:
    """The names of each bin's files."""
    return [source.paths_of_bin(number) for number in range(len(source.plan.bins))]


# ------------------------------------------------------------------------------------- bad when the run begins


def test_files_that_are_bad_when_the_run_begins_are_listed_and_in_no_plan(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cut_short(folder / "data" / "data_4.pt")
    write_bad_file(folder / "data" / "more" / "empty.pt", "empty")
    run(settings_for(folder, num_workers=1, max_bad_frac=0.2, max_steps=1))
    assert [(record["path"], record["kinds"], record["is_planned"]) for record in listed(folder)] == [
        ("data_4.pt", ["cut short or damaged"], False),
        ("more/empty.pt", ["empty"], False),
    ]
    assert listed(folder)[1]["text"] == "is empty (0 bytes), expected a sample. Regenerate the file or move it away."
    said = capsys.readouterr().out
    assert f"2 of 13 .pt files are no usable samples and left out; {folder}/run/quarantine.jsonl lists them\n" in said
    assert "11 samples, " in said


def test_more_bad_files_than_allowed_are_refused_before_any_worker_starts(folder: Path) -> None:
    for number in (4, 7):
        cut_short(folder / "data" / f"data_{number}.pt")
    with pytest.raises(DataError) as caught:
        run(settings_for(folder))
    lines = str(caught.value).splitlines()
    assert lines[0] == f"{folder}/data: 2 of 12 .pt files are not usable v1 samples."
    assert lines[1] == "        2  cut short or damaged" and lines[2].startswith("  data_4.pt: is cut short or damaged")
    assert lines[-1] == (
        "  That is more than the 1 that --max-bad-frac 0.1 allows: mend or remove the files, or allow more."
    )
    assert caught.value.exit_code == 3 and not (folder / "run" / "samples.parquet").exists()


def test_a_mapping_is_counted_without_the_files_left_out(folder: Path) -> None:
    cut_short(folder / "data" / "data_4.pt")
    paths = {"d2t_path": folder / "d2t.npy", "t2d_path": folder / "t2d.npy", "draft_vocab_size": 50}
    run(settings_for(folder, num_workers=1, max_steps=1, **paths))
    (folder / "whole" / "data_4.pt").unlink()
    counts = np.zeros(SHAPE["vocab_size"], dtype=np.int64)
    for path in (folder / "whole").glob("*.pt"):
        content = torch.load(path, weights_only=True)
        counts += np.bincount(content["input_ids"][content["loss_mask"].bool()], minlength=len(counts))
    kept = np.sort(np.argsort(-counts, kind="stable")[:50])
    assert np.array_equal(np.load(folder / "d2t.npy") + np.arange(50), kept)


def test_a_folder_of_bad_files_alone_is_told_as_such_whatever_is_allowed(tmp_path: Path) -> None:
    write_bad_file(tmp_path / "a.pt", "empty")
    write_bad_file(tmp_path / "token_freq.pt", "token_freq")
    with pytest.raises(DataError, match=r"1 of 2 \.pt files are not usable v1 samples\.\n +1  empty"):
        survey_folder(str(tmp_path), make_spec()).to_index()


# ------------------------------------------------------------------------------------- scanning


def test_a_scan_finds_what_a_rank_would_find_and_an_unchanged_file_is_scanned_once(tmp_path: Path) -> None:
    data = tmp_path / "data"
    write_samples(data, [40, 50, 60])
    put_nan(data / "data_1.pt")
    spec = make_spec()
    assert len(build_index(str(data), spec).paths) == 3  # an index looks elsewhere
    with pytest.raises(DataError, match=r"data_1\.pt: auxiliary state 1 has NaN or Inf at 1 of 50 tokens, .* 17;"):
        build_index(str(data), spec, scan=True)
    write_sample(data / "data_1.pt", 50)
    build_index(str(data), spec, scan=True)
    for number in range(3):
        put_nan(data / f"data_{number}.pt")
    assert build_index(str(data), spec, scan=True).num_tokens.tolist() == [40, 50, 60]
    assert build_index(str(data), spec).num_tokens.tolist() == [40, 50, 60]
    os.utime(data / "data_2.pt", ns=(0, 0))
    with pytest.raises(DataError, match=r"1 of 3 \.pt files .*\n +1  NaN or Inf\n  data_2\.pt"):
        build_index(str(data), spec, scan=True)
    assert len(list((data / CACHE_DIR).iterdir())) == 1


def test_a_scan_knows_every_kind_of_bad_file(tmp_path: Path) -> None:
    for kind in sorted(set(BAD_FILES) - {"token_freq"}):
        write_bad_file(tmp_path / f"{kind}.pt", kind)
    texts = []
    for scan in (False, True):
        with pytest.raises(DataError) as caught:
            build_index(str(tmp_path), make_spec(), scan)
        texts.append(str(caught.value).splitlines()[0])
    assert texts[0] == texts[1]


# ------------------------------------------------------------------------------------- gone bad since


@pytest.mark.parametrize("pack_in", ["worker", "task"])
def test_a_file_cut_short_after_indexing_is_left_out_and_the_losses_are_those_without_it(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], pack_in: str
) -> None:
    settings = settings_for(folder, pack_in=pack_in)
    source = make_source(settings, folder / "whole")
    bad = next(names for names in files_by_bin(source) if len(names) > 1)[0]
    spoil_when_planned(monkeypatch, cut_short, [folder / "data" / bad])
    run(settings)
    (record,) = listed(folder)
    assert record["path"] == bad and record["kinds"] == ["cut short or damaged"] and record["is_planned"]
    said = capsys.readouterr().out
    assert said.count(f"left out: {bad} is cut short or damaged (3,000 bytes") == 1
    expected = run_on_ranks(1, train_without, tmp_path, settings, source, [bad])
    whole = run_on_ranks(1, train_without, tmp_path, settings, source, [])
    found = logged_losses(folder)
    assert found.keys() == expected.keys() == set(range(1, 7))
    for step, loss in expected.items():  # float32 sums in another order
        assert found[step] == pytest.approx(loss, rel=1e-4), step
    assert any(abs(found[step] - loss) > 5e-3 * loss for step, loss in whole.items())


def test_a_bin_all_of_whose_samples_are_bad_is_a_filler(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = settings_for(folder, max_bad_frac=0.5)
    source = make_source(settings, folder / "whole")
    bad = min(files_by_bin(source), key=len)
    spoil_when_planned(monkeypatch, put_nan, [folder / "data" / name for name in bad])
    run(settings)
    assert {record["path"] for record in listed(folder)} == set(bad) and len(listed(folder)) == len(bad)
    assert {record["text"].split(" has ")[1][:10] for record in listed(folder)} == {"NaN or Inf"}
    expected = run_on_ranks(1, train_without, tmp_path, settings, source, bad)
    assert logged_losses(folder) == pytest.approx(expected, rel=1e-4)


def test_too_many_files_gone_bad_end_the_run_with_its_state_saved_and_more_may_be_allowed(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = settings_for(folder, epochs=200)
    bad = [name for names in files_by_bin(make_source(settings, folder / "whole")) for name in names][:3]
    with monkeypatch.context() as patched:
        spoil_when_planned(patched, cut_short, [folder / "data" / name for name in bad])
        with pytest.raises(DataError, match=r"3 of 12 \.pt files .*\n +3  cut short") as caught:
            run(settings)
    assert "more than the 1 that --max-bad-frac 0.1 allows" in str(caught.value)
    saved = sorted(int(path.name.split("-")[-1]) for path in (folder / "run").glob("step-*"))
    assert saved and saved[-1] < 600
    with pytest.raises(DataError, match=r"3 of 12 \.pt files"):  # typed again, it is refused at once
        run(settings)
    run(settings.model_copy(update={"max_bad_frac": 0.25, "max_steps": saved[-1] + 2}))
    assert sorted(record["path"] for record in listed(folder)) == sorted(bad)


def test_a_run_that_a_bad_file_ended_goes_on_without_it(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = settings_for(folder, num_workers=1, on_bad_sample="fail")
    run(settings.model_copy(update={"max_steps": 3}))
    bad = files_by_bin(make_source(settings, folder / "whole"))[0][0]
    with monkeypatch.context() as patched:
        spoil_when_planned(patched, cut_short, [folder / "data" / bad])
        with pytest.raises(SampleFormatError, match=rf"{bad}: is cut short or damaged"):
            run(settings)
    with pytest.raises(DataError, match=r"1 of 12 \.pt files"):  # today's refusal
        run(settings)
    run(settings.model_copy(update={"on_bad_sample": "quarantine"}))
    assert [(record["path"], record["is_planned"]) for record in listed(folder)] == [(bad, True)]
    assert (folder / "run" / "1" / "COMMITTED").exists()


def test_a_killed_run_goes_on_as_planned_whatever_became_of_the_files(folder: Path, tmp_path: Path) -> None:
    """Of the files of the plan one is cut short, one gone; a new one and a mended one change nothing."""
    cut_short(folder / "data" / "data_3.pt")  # in no plan
    settings = settings_for(folder, max_bad_frac=0.3, checkpoint_every_steps=1, epochs=500)
    process = Command("train", settings, folder).process
    try:
        wait_until(lambda: (folder / "run" / "step-000001" / "COMMITTED").exists(), "a checkpoint")
    finally:
        os.killpg(process.pid, 9)
        process.wait()
    (folder / "whole" / "data_3.pt").unlink()
    names = sorted(name for names in files_by_bin(make_source(settings, folder / "whole")) for name in names)
    cut_short(folder / "data" / names[0])
    (folder / "data" / names[1]).unlink()
    write_sample(folder / "data" / "new.pt", 40, **SHAPE)
    write_sample(folder / "data" / "data_3.pt", 52, seed=3, **SHAPE)
    step = find_committed(folder / "run")[-1].step
    run(settings.model_copy(update={"max_steps": step + 4}))
    assert find_committed(folder / "run")[-1].step == step + 4
    records = {record["path"]: (record["kinds"], record["is_planned"]) for record in listed(folder)}
    assert records == {
        "data_3.pt": (["cut short or damaged"], False),
        names[0]: (["cut short or damaged"], True),
        names[1]: (["gone"], True),
    }
