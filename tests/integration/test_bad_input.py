"""What a user gets wrong, typed as a command: the message, the exit code, and that nothing on disk is lost."""

import json
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from eagle3_ray.cli import main
from tests.makers import normed, write_sample, write_samples

PARITY = Path(__file__).parents[1] / "parity" / "small"
SHAPE = {"hidden_size": 64, "vocab_size": 320}

pytestmark = pytest.mark.usefixtures("ray_cluster")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A verifier, a mapping and four good samples."""
    shutil.copytree(PARITY / "verifier", tmp_path / "verifier")
    for name in ("d2t.npy", "t2d.npy"):
        shutil.copy(PARITY / name, tmp_path / name)
    write_samples(tmp_path / "data", [30, 40, 25, 33], **SHAPE)
    return tmp_path


def train(folder: Path, *more: str) -> int:
    paths = {
        "--verifier-name-or-path": "verifier",
        "--data-path": "data",
        "--save-path": "run",
        "--d2t-path": "d2t.npy",
        "--t2d-path": "t2d.npy",
    }
    flags = [word for flag, name in paths.items() for word in (flag, str(folder / name))]
    return main(["train", *flags, "--no-use-gpu", "--total-seq-len", "64", *more])


def change_sample(folder: Path, change: Callable[[dict[str, object]], object]) -> None:
    path = folder / "data" / "data_1.pt"
    content = torch.load(path, weights_only=True)
    change(content)
    torch.save(content, path)


def cut_short(folder: Path) -> None:
    path = folder / "data" / "data_1.pt"
    path.write_bytes(path.read_bytes()[:2000])


def norm_last_state(content: dict[str, object]) -> None:
    states = content["hidden_states"]
    assert isinstance(states, list)
    weight = load_file(PARITY / "verifier" / "model.safetensors")["model.norm.weight"]
    states[-1] = normed(states[-1], weight.float())


def put_nan(content: dict[str, object]) -> None:
    states = content["hidden_states"]
    assert isinstance(states, list)
    states[-1][0, 3] = torch.nan


def drop_tensor(folder: Path, name: str) -> None:
    path = folder / "verifier" / "model.safetensors"
    tensors = load_file(path)
    del tensors[name]
    save_file(tensors, path)


def remove_samples(folder: Path) -> None:
    for path in (folder / "data").iterdir():
        path.unlink()


def write_half_checkpoint_and_mark_it(folder: Path) -> None:
    (folder / "run" / "4").mkdir(parents=True)
    (folder / "run" / "4" / "COMMITTED").write_text(json.dumps({"step": 10}))


BAD: dict[str, tuple[Callable[[Path], object], int, tuple[str, ...]]] = {
    "no samples": (remove_samples, 3, ("no .pt files", "eagle3-ray generate")),
    "empty": (lambda f: (f / "data/data_1.pt").write_bytes(b""), 3, ("1 of 4 .pt files", "data_1.pt", "0 bytes")),
    "cut short": (cut_short, 3, ("data_1.pt", "cut short")),
    "not a sample": (
        lambda f: torch.save({"a": torch.ones(2)}, f / "data/data_1.pt"),
        3,
        ("data_1.pt", "has the keys {a}"),
    ),
    "other format": (
        lambda f: write_sample(f / "data/data_1.pt", data_format_version=0, **SHAPE),
        3,
        ("data_1.pt", "v0", "--data-format-version"),
    ),
    "other hidden size": (
        lambda f: write_sample(f / "data/data_1.pt", hidden_size=32, vocab_size=320),
        3,
        ("data_1.pt", "32", "64"),
    ),
    "nan": (lambda f: change_sample(f, put_nan), 3, ("data_1.pt", "NaN or Inf at token 0")),
    "ids outside the vocabulary": (
        lambda f: change_sample(f, lambda c: c.update(input_ids=torch.full((40,), 320))),
        3,
        ("data_1.pt", "320"),
    ),
    "lengths that differ": (
        lambda f: change_sample(f, lambda c: c.update(loss_mask=torch.ones(39, dtype=torch.int64))),
        3,
        ("data_1.pt", "39", "40"),
    ),
    "normed state under v1": (
        lambda f: change_sample(f, norm_last_state),
        3,
        ("data_1.pt", "has already been through the verifier's final norm"),
    ),
    "one mapping file": (lambda f: (f / "t2d.npy").unlink(), 3, ("t2d.npy",)),
    "mapping of another verifier": (
        lambda f: np.save(f / "t2d.npy", np.ones(400, dtype=np.bool_)),
        3,
        ("t2d.npy", "400", "320"),
    ),
    "mapping files that do not fit": (
        lambda f: np.save(f / "d2t.npy", np.zeros(96, dtype=np.int64)),
        3,
        ("d2t.npy", "t2d.npy"),
    ),
    "verifier without head": (lambda f: drop_tensor(f, "lm_head.weight"), 3, ("no lm_head.weight",)),
    "verifier without norm": (lambda f: drop_tensor(f, "model.norm.weight"), 3, ("no final norm",)),
    "no verifier": (lambda f: shutil.rmtree(f / "verifier"), 3, ("verifier",)),
    "damaged checkpoint": (write_half_checkpoint_and_mark_it, 4, ("run/4: committed, but", "is gone")),
    "best is no link": (lambda f: (f / "run" / "best").mkdir(parents=True), 4, ("run/best: expected the link",)),
    "run folder under a file": (
        lambda f: (f / "run").write_text("a file"),
        4,
        ("run: cannot be written to (File exists)",),
    ),
}


@pytest.mark.parametrize("kind", BAD)
def test_bad_input_is_refused_with_a_message_and_loses_nothing(
    kind: str, folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    spoil, exit_code, texts = BAD[kind]
    spoil(folder)
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    assert train(folder) == exit_code
    message = capsys.readouterr().err
    assert message.startswith("error: ") and "Traceback" not in message
    assert [text for text in texts if text not in message] == [], message
    assert {path: path.read_bytes() for path in before} == before


def test_starting_over_removes_nothing_before_all_is_checked(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    checkpoint = folder / "run" / "0"
    (checkpoint / "state").mkdir(parents=True)
    for name in ("config.json", "model.safetensors", "run.json", "COMMITTED"):
        (checkpoint / name).write_text("{}")
    remove_samples(folder)
    assert train(folder, "--no-resume-from-checkpoint") == 3
    assert "no .pt files" in capsys.readouterr().err
    expected = {"state", "config.json", "model.safetensors", "run.json", "COMMITTED"}
    assert {path.name for path in checkpoint.iterdir()} == expected


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting needs root")
@pytest.mark.parametrize("more", [[], ["--no-resume-from-checkpoint"]])
def test_a_run_folder_on_a_read_only_mount_is_refused(
    more: list[str], folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    claim = folder / "run"
    claim.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "ro", "tmpfs", str(claim)], check=True)
    try:
        assert train(folder, *more) == 4
    finally:
        subprocess.run(["umount", str(claim)], check=True)
    assert f"{claim}: cannot be written to (Read-only file system)" in capsys.readouterr().err


def test_a_state_that_is_not_normed_is_refused_under_v0(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    remove_samples(folder)
    content = torch.load(write_sample(folder / "v0.pt", data_format_version=0, **SHAPE), weights_only=True)
    content["target"] = content["target"] * 3
    torch.save(content, folder / "data" / "data_0.pt")
    assert train(folder, "--data-format-version", "0") == 3
    assert "has not been through this verifier's final norm" in capsys.readouterr().err


def test_more_workers_than_cpus_are_refused_at_once(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert train(folder, "--num-workers", "4") == 5
    assert "the cluster has 4 CPUs and 0 GPUs" in capsys.readouterr().err


def test_a_layer_id_that_contradicts_the_samples_is_refused(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recorded = {"aux_layer_ids": [2, 4, 5], "aux_layer_numbering": "serving"}
    (folder / "data" / "data_config.json").write_text(json.dumps(recorded))
    assert train(folder, "--aux-layer-ids", "3", "5", "6") == 3
    assert "the samples hold layers [2, 4, 5], --aux-layer-ids says [3, 5, 6]" in capsys.readouterr().err


def test_a_missing_flag_and_a_wrong_one_are_usage_errors(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train"]) == 2
    assert "--verifier-name-or-path" in capsys.readouterr().err
    with pytest.raises(SystemExit) as caught:
        main(["train", "--verifier-name-or-path", "x", "--epoch", "3"])
    assert caught.value.code == 2
    assert "--epochs" in capsys.readouterr().err
