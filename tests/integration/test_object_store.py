"""Every path of every verb on a real S3 server, and training on a Google emulator: the results are those of a disk."""

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from eagle3_ray.config import TrainSettings
from eagle3_ray.data.index_cache import CACHE_DIR
from eagle3_ray.errors import CheckpointError, StorageError
from eagle3_ray.jobs import export, report, train, vocab_mapping
from eagle3_ray.storage import ObjectPath, list_objects
from eagle3_ray.training.metrics_file import read_points
from eagle3_ray.training.run_folder import METRICS
from eagle3_ray.verbs import ExportSettings, ReportSettings, VocabMappingSettings
from tests.makers import write_samples
from tests.runs import LENGTHS, PARITY, SHAPE, make_settings, read_metrics
from tests.unit.generation.world import World, trainable

pytestmark = [pytest.mark.usefixtures("s3_bucket", "gs_bucket", "ray_cluster"), pytest.mark.slow]


def upload_tree(folder: Path, remote: ObjectPath) -> None:
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            (remote / str(path.relative_to(folder))).write_bytes(path.read_bytes())


def download_tree(remote: ObjectPath, folder: Path) -> None:
    for stored in list_objects(remote):
        place = folder / stored.name
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_bytes((remote / stored.name).read_bytes())


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two epochs on this machine's disk: the oracle."""
    folder = tmp_path_factory.mktemp("local")
    write_samples(folder / "data", LENGTHS, **SHAPE)
    train.run(make_settings(folder))
    return folder


@pytest.fixture(scope="module")
def store(local: Path, s3_bucket: ObjectPath) -> ObjectPath:
    """The same samples, mapping and verifier on the object store."""
    upload_all(local, s3_bucket)
    return s3_bucket


def upload_all(local: Path, bucket: ObjectPath) -> None:
    upload_tree(local / "data", bucket / "data")
    upload_tree(PARITY / "verifier", bucket / "verifier")
    for name in ("d2t.npy", "t2d.npy"):
        (bucket / name).write_bytes((PARITY / name).read_bytes())


def assert_same_draft(folder: Path, expected_folder: Path) -> None:
    found, expected = (load_file(path / "model.safetensors") for path in (folder, expected_folder))
    assert found.keys() == expected.keys() and len(expected) > 10
    assert [name for name in expected if not torch.equal(found[name], expected[name])] == []


def store_settings(store: ObjectPath, tmp_path: Path, run: str, **changes: object) -> TrainSettings:
    fields = {
        "verifier_name_or_path": f"{store}/verifier",
        "data_path": f"{store}/data",
        "save_path": f"{store}/{run}",
        "d2t_path": f"{store}/d2t.npy",
        "t2d_path": f"{store}/t2d.npy",
    }
    return make_settings(tmp_path, **(fields | changes))


def logged_steps(run: ObjectPath) -> list[int]:
    points, is_cut = read_points(run / METRICS)
    assert not is_cut
    return [point.step for point in points]


def test_a_paused_and_resumed_run_ends_as_one_on_disk(
    local: Path, store: ObjectPath, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train.run(store_settings(store, tmp_path, "run", max_steps=4, logger="tensorboard"))
    assert (store / "run" / "step-000004" / "COMMITTED").is_file()
    assert logged_steps(store / "run") == [0, 1, 2, 3, 3, 4, 4]
    train.run(store_settings(store, tmp_path, "run", logger="tensorboard"))
    output = capsys.readouterr().out
    assert f"going on from {store}/run/step-000004 (step 4 of 6)" in output
    download_tree(store / "run", tmp_path / "downloaded")
    for name in ("0", "1"):
        assert_same_draft(tmp_path / "downloaded" / name, local / "run" / name)
    best = (store / "run" / "best").read_text(encoding="utf-8")
    assert best == (local / "run" / "best").resolve().name
    assert f"best draft {store}/run/best -> {best}" in output
    assert logged_steps(store / "run") == [0, 1, 2, 3, 3, 4, 4, 5, 6, 6]
    report.run(ReportSettings(run_paths=(store / "run",), output_path=tmp_path / "report.html"))
    assert "<h1>Training of run</h1>" in (tmp_path / "report.html").read_text()
    logged = list((tmp_path / "logs" / "tensorboard").glob("run-*/events.*"))
    assert len({path.parent for path in logged}) == 1, "a resumed run keeps its id"


@pytest.mark.parametrize(("scheme", "pack_in"), [("s3", "task"), ("gs", "worker")])
def test_an_epoch_from_either_store_ends_as_one_from_disk(
    local: Path, store: ObjectPath, gs_bucket: ObjectPath, tmp_path: Path, scheme: str, pack_in: str
) -> None:
    bucket = {"s3": store, "gs": gs_bucket}[scheme]
    if scheme == "gs":
        upload_all(local, bucket)
    train.run(store_settings(bucket, tmp_path, "packed", pack_in=pack_in, max_steps=3))
    download_tree(bucket / "packed" / "0", tmp_path / "0")
    assert_same_draft(tmp_path / "0", local / "run" / "0")


def test_two_ranks_go_on_from_there(local: Path, store: ObjectPath, tmp_path: Path) -> None:
    upload_tree(local / "run" / "0", store / "two" / "0")
    train.run(store_settings(store, tmp_path, "two", num_workers=2, bins_per_step=None))
    download_tree(store / "two" / "1", tmp_path / "two")
    found, expected = read_metrics(tmp_path / "two"), read_metrics(local / "run" / "1")
    assert found["val/loss"] == pytest.approx(expected["val/loss"], rel=1e-3)  # float32 sums in another order


def test_the_index_is_kept_beside_the_samples(store: ObjectPath) -> None:
    names = [stored.name for stored in list_objects(store / "data" / CACHE_DIR)]
    assert len(names) == 1 and names[0].startswith("index-") and names[0].endswith(".parquet")


def test_starting_over_removes_the_run_and_nothing_else(local: Path, store: ObjectPath, tmp_path: Path) -> None:
    upload_tree(local / "run" / "1", store / "again" / "1")
    (store / "again" / "notes.txt").write_bytes(b"mine")
    train.run(store_settings(store, tmp_path, "again", max_steps=1, resume_from_checkpoint=False))
    names = {path.name for path in (store / "again").iterdir()}
    assert "step-000001" in names and "1" not in names and "notes.txt" in names


def test_a_half_written_checkpoint_is_ignored(
    store: ObjectPath, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (store / "run" / "step-000009" / "config.json").write_bytes(b"{}")
    train.run(store_settings(store, tmp_path, "run"))
    output = capsys.readouterr().out
    assert f"{store}/run/step-000009: half-written, ignored" in output and "(step 6 of 6)" in output


def test_a_checkpoint_of_another_run_is_refused(store: ObjectPath, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="saved by a run with other settings or data"):
        train.run(store_settings(store, tmp_path, "run", seed=1))


def test_vocab_mapping_counts_and_writes_there(local: Path, store: ObjectPath, tmp_path: Path) -> None:
    fields = {"target_vocab_size": SHAPE["vocab_size"], "draft_vocab_size": 64}
    for data, output in ((local / "data", tmp_path), (store / "data", store / "vocab")):
        vocab_mapping.run(
            VocabMappingSettings(data_path=data, output_path=output, token_freq_path=tmp_path / "none.pt", **fields)
        )
    for name in ("d2t.npy", "t2d.npy"):
        (tmp_path / "there").mkdir(exist_ok=True)
        (tmp_path / "there" / name).write_bytes((store / "vocab" / name).read_bytes())
        assert np.array_equal(np.load(tmp_path / "there" / name), np.load(tmp_path / name))


def test_best_is_exported_from_there(local: Path, store: ObjectPath, tmp_path: Path) -> None:
    upload_tree(local / "run" / "1", store / "served" / "1")
    (store / "served" / "best").write_bytes(b"1")
    export.run(ExportSettings(checkpoint_path=store / "served" / "best", output_path=tmp_path / "draft"))
    assert_same_draft(tmp_path / "draft", local / "run" / "1")


def test_generate_reads_and_writes_there(store: ObjectPath, tmp_path: Path) -> None:
    world = World(tmp_path)
    upload_tree(world.verifier_path, store / "tiny")
    (store / "c.jsonl").write_bytes(world.conversations_path.read_bytes())
    world.run()
    remote = {
        "verifier_name_or_path": f"{store}/tiny",
        "conversations_path": store / "c.jsonl",
        "output_path": store / "generated",
    }
    world.run(**remote)
    number = trainable()[0]
    (store / "generated" / f"data_{number}.pt").unlink()
    world.run(**remote)  # only what is missing
    download_tree(store / "generated", tmp_path / "there")
    assert {path.name for path in (tmp_path / "there").iterdir()} == set(world.files())
    for number in trainable():
        found, expected = (
            torch.load(f / f"data_{number}.pt", weights_only=True) for f in (tmp_path / "there", tmp_path / "data")
        )
        assert torch.equal(found["input_ids"], expected["input_ids"])
        for state, wanted in zip(found["hidden_states"], expected["hidden_states"], strict=True):
            assert torch.equal(state, wanted)


def test_a_bucket_that_is_not_there_stops_the_run_at_once(store: ObjectPath, tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="s3://nowhere/run"):
        train.run(store_settings(store, tmp_path, "run", save_path="s3://nowhere/run"))
