"""`train` through Ray: what a run leaves on disk, and that stopping, killing or resizing it leaves no seam."""

import json
import os
import shutil
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from eagle3_ray.data.vocab import read_mapping
from eagle3_ray.errors import CheckpointError, ClusterError, SampleFormatError
from eagle3_ray.jobs.train import run
from eagle3_ray.training.run_folder import LOCK, find_committed
from tests.makers import write_samples
from tests.runs import (
    LENGTHS,
    PARITY,
    SHAPE,
    Command,
    ThreadedRun,
    assert_same_run,
    load_state,
    make_settings,
    read_metrics,
    wait_for_train_workers,
    wait_until,
)

pytestmark = pytest.mark.usefixtures("ray_cluster")


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with samples and an uninterrupted run of two epochs."""
    folder = tmp_path_factory.mktemp("straight")
    write_samples(folder / "data", LENGTHS, **SHAPE)
    run(make_settings(folder, logger="tensorboard"))
    return folder


@pytest.fixture(scope="module")
def paused(straight: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same run, paused in the middle of its second epoch."""
    folder = tmp_path_factory.mktemp("paused")
    shutil.copytree(straight / "data", folder / "data")
    run(make_settings(folder, max_steps=4))
    return folder


@pytest.fixture
def folder(straight: Path, tmp_path: Path) -> Path:
    """A fresh folder with the same samples."""
    shutil.copytree(straight / "data", tmp_path / "data")
    return tmp_path


def test_a_run_leaves_a_committed_checkpoint_an_epoch_and_best(straight: Path) -> None:
    names = {path.name for path in (straight / "run").iterdir()}
    assert {"0", "1", "best", "run.yaml", "initial_metrics.json"} <= names
    for epoch in ("0", "1"):
        parts = {path.name for path in (straight / "run" / epoch).iterdir()}
        assert parts == {"config.json", "model.safetensors", "state", "run.json", "COMMITTED"}
    assert json.loads((straight / "run" / "1" / "COMMITTED").read_text()) == {"step": 6}
    untrained = json.loads((straight / "run" / "initial_metrics.json").read_text())
    assert read_metrics(straight / "run" / "1")["val/loss"] < untrained["val/loss"]


def test_the_servable_draft_has_exactly_the_tensors_a_server_expects(straight: Path) -> None:
    tensors = load_file(straight / "run" / "1" / "model.safetensors")
    recorded = load_file(PARITY / "drafts" / "one_layer" / "model.safetensors")
    assert {name: tensor.shape for name, tensor in tensors.items()} == {n: t.shape for n, t in recorded.items()}
    whole = {"d2t": torch.int64, "t2d": torch.bool}
    assert {name: t.dtype for name, t in tensors.items()} == {
        name: whole.get(name, torch.bfloat16) for name in recorded
    }
    verifier = load_file(PARITY / "verifier" / "model.safetensors")
    assert torch.equal(tensors["embed_tokens.weight"], verifier["model.embed_tokens.weight"])
    assert torch.equal(tensors["t2d"], load_file(PARITY / "drafts" / "one_layer" / "model.safetensors")["t2d"])


def test_the_config_equals_the_recorded_one_but_for_names_and_dtype(straight: Path) -> None:
    config = json.loads((straight / "run" / "1" / "config.json").read_text())
    recorded = json.loads((PARITY / "drafts" / "one_layer" / "config.json").read_text())
    for key in ("auto_map", "transformers_version"):
        del recorded[key]  # about the code that wrote it
    recorded["dtype"] = "bfloat16"
    recorded["speculators_config"]["verifier"]["name_or_path"] = str(PARITY / "verifier")
    assert config == recorded


def test_norms_and_projections_have_moved_from_where_they_began(straight: Path, tmp_path: Path) -> None:
    state = load_state(straight / "run" / "1", tmp_path)
    norms = [tensor for name, tensor in state.items() if name.startswith("/model/") and "norm" in name]
    assert len(norms) == 4
    for norm in norms:
        assert norm.dtype == torch.float32 and not torch.all(norm == 1) and (norm - 1).abs().max() < 0.1


def test_a_paused_run_goes_on_in_mid_epoch_bit_for_bit(
    straight: Path, paused: Path, folder: Path, tmp_path: Path
) -> None:
    shutil.copytree(paused / "run", folder / "run", symlinks=True)
    assert not (folder / "run" / "1").exists() and (folder / "run" / "step-000004" / "COMMITTED").exists()
    # What a crash in a later save leaves: a higher number, parts missing.
    (folder / "run" / "7").mkdir()
    (folder / "run" / "7" / "config.json").write_text("{")
    run(make_settings(folder))
    assert_same_run(folder, straight, tmp_path)
    assert (folder / "run" / "7").exists()


def test_a_run_resumed_on_two_workers_keeps_its_trajectory(
    straight: Path, paused: Path, folder: Path, tmp_path: Path
) -> None:
    shutil.copytree(paused / "run", folder / "run", symlinks=True)
    # Two workers and the bins per step it began with; a validation bin fewer than workers.
    run(make_settings(folder, num_workers=2, bins_per_step=None))
    state, wanted = load_state(folder / "run" / "1", tmp_path), load_state(straight / "run" / "1", tmp_path)
    for name in (n for n in wanted if n.startswith("/model/")):
        # float32 sums in another order; Adam turns the rounding of near-zero gradients into up to lr a step.
        torch.testing.assert_close(state[name], wanted[name], rtol=1e-3, atol=1e-4, msg=name)
    found, expected = read_metrics(folder / "run" / "1"), read_metrics(straight / "run" / "1")
    for name in ("val/loss", "val/accuracy_0", "val/loss_2"):
        assert found[name] == pytest.approx(expected[name], rel=1e-3), name


def test_the_loss_asked_for_is_the_one_trained_on_and_goes_on_after_a_pause(
    straight: Path, folder: Path, tmp_path: Path
) -> None:
    whole = tmp_path / "whole"
    shutil.copytree(folder, whole)
    asked = {"loss": '{"ce": 0.5, "nla": 0.5}', "epochs": 1}
    run(make_settings(folder, **asked, max_steps=1))
    run(make_settings(folder, **asked))
    run(make_settings(whole, **asked))
    assert_same_run(folder, whole, tmp_path, name="0")
    # Cross-entropy of a draft that knows nothing is log V; its divergence from a flat verifier is far less.
    assert read_metrics(folder / "run" / "0")["val/loss_0"] > 2 * read_metrics(straight / "run" / "0")["val/loss_0"]


def test_a_killed_worker_is_restarted_from_the_last_checkpoint(straight: Path, folder: Path, tmp_path: Path) -> None:
    """Here bins are packed in tasks, in the uninterrupted run by the worker: that must make no difference either."""
    training = ThreadedRun(make_settings(folder, max_failures=1, checkpoint_every_steps=1, pack_in="task"))
    training.wait_for((folder / "run" / "step-000001" / "COMMITTED").exists, "a checkpoint")
    for pid in wait_for_train_workers():
        os.kill(pid, signal.SIGKILL)
    assert training.join() == []
    assert_same_run(folder, straight, tmp_path)
    names = ["step-000001", "step-000002", "0", "step-000004", "step-000005", "1"]
    assert [checkpoint.path.name for checkpoint in find_committed(folder / "run")] == names


def logged_steps(folder: Path) -> list[int]:
    """The steps whose loss is in the run's only file of TensorBoard events so far."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = list((folder / "logs").rglob("events.out.tfevents.*"))
    if not found:
        return []
    accumulator = EventAccumulator(str(found[0].parent))
    accumulator.Reload()
    if "train/loss" not in accumulator.Tags()["scalars"]:
        return []
    return [event.step for event in accumulator.Scalars("train/loss")]


def test_a_step_does_not_wait_for_a_checkpoint_the_next_save_does_and_its_disk_error_ends_the_run(
    straight: Path, folder: Path, tmp_path: Path
) -> None:
    settings = make_settings(folder, checkpoint_every_steps=1, logger="tensorboard")
    pipe = folder / "run" / "step-000001" / "state" / "__0_0.distcp"
    pipe.parent.mkdir(parents=True)
    os.mkfifo(pipe)  # whoever opens it to write waits for a reader
    training = ThreadedRun(settings)
    training.wait_for(lambda: logged_steps(folder) == [1, 2], "the second step")
    assert not training.is_over()
    assert {path.name for path in (folder / "run").iterdir() if path.is_dir()} == {"step-000001"}
    os.close(os.open(pipe, os.O_RDONLY))  # and a pipe is no file
    (error,) = training.join()
    assert isinstance(error, CheckpointError) and error.exit_code == 4
    assert str(error).startswith(f"{folder / 'run' / 'step-000001'}: cannot be saved ([Errno 29] Illegal seek)")
    assert logged_steps(folder) == [1, 2] and find_committed(folder / "run") == []
    pipe.unlink()
    run(settings)
    assert_same_run(folder, straight, tmp_path)


def test_a_killed_command_goes_on_when_it_is_typed_again(straight: Path, folder: Path, tmp_path: Path) -> None:
    settings = make_settings(folder, checkpoint_every_steps=1)
    command = Command("train", settings, folder)
    wait_until(lambda: (folder / "run" / "step-000002" / "COMMITTED").exists(), "a checkpoint")
    os.killpg(command.process.pid, signal.SIGKILL)  # the driver, its Ray, and every worker
    command.process.wait()
    assert not (folder / "run" / "1").exists()
    run(settings)
    assert_same_run(folder, straight, tmp_path)


def test_a_finished_run_that_is_started_again_changes_nothing(straight: Path) -> None:
    def times() -> dict[Path, int]:
        files = [path for path in (straight / "run").rglob("*") if path.is_file() and path.name != LOCK]
        return {path: path.stat().st_mtime_ns for path in files}

    before = times()
    run(make_settings(straight))
    assert times() == before


def test_starting_over_removes_only_what_the_program_wrote_and_computes_an_absent_mapping(folder: Path) -> None:
    save_dir = folder / "run"
    (save_dir / "3").mkdir(parents=True)
    (save_dir / "3" / "notes.txt").write_text("mine")
    (save_dir / "0").mkdir()
    (save_dir / "0" / "model.safetensors").write_text("ours, half-written")
    (save_dir / "thesis.tex").write_text("mine")
    paths = {"d2t_path": folder / "d2t.npy", "t2d_path": folder / "t2d.npy"}
    run(make_settings(folder, resume_from_checkpoint=False, max_steps=1, draft_vocab_size=50, **paths))
    assert (save_dir / "3" / "notes.txt").read_text() == "mine" and (save_dir / "thesis.tex").read_text() == "mine"
    assert not (save_dir / "0").exists() and (save_dir / "step-000001" / "COMMITTED").exists()
    mapping = read_mapping(str(paths["d2t_path"]), str(paths["t2d_path"]), 320, 50)
    tensors = load_file(save_dir / "step-000001" / "model.safetensors")
    assert torch.equal(tensors["d2t"], mapping.draft_to_verifier_offset)
    assert torch.equal(tensors["t2d"], mapping.in_draft_vocab)
    assert tensors["lm_head.weight"].shape == (50, 64)


def test_a_sample_with_nan_ends_the_run_by_name(folder: Path) -> None:
    for path in sorted((folder / "data").glob("*.pt")):
        content = torch.load(path, weights_only=True)
        content["hidden_states"][1][17, 3] = torch.nan  # between the positions that the index looks at
        torch.save(content, path)
    with pytest.raises(SampleFormatError, match=r"data_\d+\.pt: auxiliary state 1 has NaN or Inf.*token 17") as caught:
        run(make_settings(folder))
    assert caught.value.exit_code == 3


def test_more_workers_than_the_cluster_holds_is_refused_at_once(folder: Path) -> None:
    with pytest.raises(ClusterError, match=r"9 workers would take .* the cluster has 4 CPUs") as caught:
        run(make_settings(folder, num_workers=9))
    assert caught.value.exit_code == 5
    with pytest.raises(ClusterError, match="0 GPUs"):
        run(make_settings(folder, use_gpu=True))


def test_a_checkpoint_of_another_run_is_refused_and_kept(straight: Path) -> None:
    before = (straight / "run" / "1" / "COMMITTED").stat().st_mtime_ns
    with pytest.raises(CheckpointError, match="seed was 0, is 5") as caught:
        run(make_settings(straight, seed=5))
    assert caught.value.exit_code == 4
    assert (straight / "run" / "1" / "COMMITTED").stat().st_mtime_ns == before


def test_metrics_of_every_step_are_logged_once_and_in_order(straight: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    (events,) = (straight / "logs").rglob("events.out.tfevents.*")
    accumulator = EventAccumulator(str(events.parent))
    accumulator.Reload()
    tags = set(accumulator.Tags()["scalars"])
    assert {"train/loss", "train/lr", "train/grad_norm", "train/tokens_per_s", "val/loss_0", "val/accuracy_2"} <= tags
    assert [event.step for event in accumulator.Scalars("train/loss")] == [1, 2, 3, 4, 5, 6]
    assert [event.step for event in accumulator.Scalars("val/loss")] == [0, 3, 6]
    rates = [event.value for event in accumulator.Scalars("train/lr")]
    assert rates == pytest.approx([1e-3 * share for share in (1, 5 / 5, 4 / 5, 3 / 5, 2 / 5, 1 / 5)], rel=1e-6)
