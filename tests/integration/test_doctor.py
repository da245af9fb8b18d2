"""`doctor` typed as a command: what is well, what is not, and that nothing is written but the samples' index cache."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

from eagle3_ray.cli import main
from tests.makers import write_samples

PARITY = Path(__file__).parents[1] / "parity" / "small"
LENGTHS = [33] * 9  # 32 positions each: two fill a bin of 64
CHECKS = [
    "Ray", "workers", "verifier", "layers", "object store", "run folder", "data", "vocabulary", "draft", "save path",
    "nodes", "versions", "places", "steps", "disk", "memory",
]  # fmt: skip

pytestmark = pytest.mark.usefixtures("ray_cluster")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A verifier, a mapping and nine good samples: eight to train on, one to validate."""
    shutil.copytree(PARITY / "verifier", tmp_path / "verifier")
    for name in ("d2t.npy", "t2d.npy"):
        shutil.copy(PARITY / name, tmp_path / name)
    write_samples(tmp_path / "data", LENGTHS, hidden_size=64, vocab_size=320)
    return tmp_path


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run folder of two epochs of training on such samples."""
    folder = tmp_path_factory.mktemp("trained")
    write_samples(folder / "data", LENGTHS, hidden_size=64, vocab_size=320)
    shutil.copytree(PARITY / "verifier", folder / "verifier")
    for name in ("d2t.npy", "t2d.npy"):
        shutil.copy(PARITY / name, folder / name)
    assert run_verb("train", folder, "--epochs", "2") == 0
    return folder / "run"


def run_verb(verb: str, folder: Path, *more: str) -> int:
    paths = {
        "--verifier-name-or-path": "verifier",
        "--data-path": "data",
        "--save-path": "run",
        "--log-dir": "logs",
        "--d2t-path": "d2t.npy",
        "--t2d-path": "t2d.npy",
    }
    flags = [word for flag, name in paths.items() for word in (flag, str(folder / name))]
    return main([verb, *flags, "--no-use-gpu", "--total-seq-len", "64", *more])


def examine(folder: Path, capsys: pytest.CaptureFixture[str], *more: str) -> tuple[int, dict[str, dict[str, Any]]]:
    """The exit code, and what is told of each check; every line must be a JSON object, and the last one the end."""
    capsys.readouterr()
    exit_code = run_verb("doctor", folder, "--log-format", "json", *more)
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert {line["event"] for line in lines[:-1]} == {"check"}
    assert lines[-1]["event"] == ("error" if exit_code else "done")
    return exit_code, {line["check"]: line for line in lines[:-1]}


def everything_in(folder: Path) -> dict[str, bytes | None]:
    """Names and contents of all below a folder, but for the index cache."""
    paths = [path for path in folder.rglob("*") if ".eagle3_ray" not in path.parts]
    return {str(path): path.read_bytes() if path.is_file() else None for path in paths}


def test_where_all_is_well_every_line_says_so_and_nothing_is_written(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = everything_in(folder)
    assert run_verb("doctor", folder, "--logger", "tensorboard", "--time-steps", "1") == 0
    told = capsys.readouterr()
    lines = [line for line in told.out.splitlines() if not line.startswith(" ")]
    assert [line[9:21].strip() for line in lines[:-1]] == [*CHECKS, "time"]
    assert [line for line in lines[:-1] if not line.startswith("ok       ")] == []
    assert lines[-1] == "17 checks: 17 ok" and told.err == "" and "\033" not in told.out
    assert f"\n{' ' * 23}32 .. 63  {'#' * 40}  9 (100.0%)\n" in told.out
    assert everything_in(folder) == before


def test_in_json_the_numbers_of_the_run_are_told(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    exit_code, checks = examine(folder, capsys, "--epochs", "3", "--num-workers", "2", "--time-steps", "2")
    assert exit_code == 0 and list(checks) == [*CHECKS, "time"]
    data = checks["data"]
    assert (data["samples"], data["tokens"], data["bins"], data["validation_bins"]) == (9, 9 * 33, 4, 1)
    assert data["lengths"] == {"32": 9} and data["fill_frac"] == 1.0 and (data["dropped"], data["cut"]) == (0, 0)
    assert data["supervised_frac"] == pytest.approx(29 / 33)
    steps = checks["steps"]
    assert (steps["steps_per_epoch"], steps["total_steps"], steps["bins_per_step"]) == (2, 6, 2)
    assert checks["disk"]["checkpoints"] == 3
    # Two workers: four bins of 64 tokens, two at a time.
    assert checks["time"]["epoch_s"] == pytest.approx(2 * checks["time"]["step_s"])


def tensor_bytes(value: Any) -> int:
    """Of all tensors in nested dicts, but for single numbers such as Adam's step."""
    if isinstance(value, dict):
        return sum(map(tensor_bytes, value.values()))
    return value.nbytes if isinstance(value, torch.Tensor) and value.dim() > 0 else 0


def test_the_bytes_of_a_checkpoint_are_those_of_the_tensors_in_one_and_a_little_around_them(
    folder: Path, trained: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _, checks = examine(folder, capsys)
    dcp_to_torch_save(trained / "1" / "state", folder / "state.pt")
    stored = torch.load(folder / "state.pt", weights_only=True) | load_file(trained / "1" / "model.safetensors")
    assert 0 <= checks["disk"]["checkpoint_bytes"] - tensor_bytes(stored) < 2 * 2**20


def remove_tensor(folder: Path) -> None:
    tensors = load_file(folder / "verifier" / "model.safetensors")
    del tensors["lm_head.weight"]
    save_file(tensors, folder / "verifier" / "model.safetensors")


def damage_checkpoint(folder: Path) -> None:
    (folder / "run" / "4").mkdir(parents=True)
    (folder / "run" / "4" / "COMMITTED").write_text(json.dumps({"step": 10}))


# What is spoilt: how, the check that finds it, its exit code, its words, and what is skipped for it.
OF_DATA = {"steps", "disk", "memory"}
FAULTS: dict[str, tuple[Callable[[Path], object], str, int, tuple[str, ...], set[str]]] = {
    "no samples": (
        lambda f: shutil.rmtree(f / "data"),
        "data",
        3,
        ("No such file or directory; expected a folder of .pt samples",),
        OF_DATA,
    ),
    "bad file": (
        lambda f: (f / "data/data_1.pt").write_bytes(b""),
        "data",
        3,
        ("1 of 9 .pt files", "data_1.pt: is empty (0 bytes)"),
        OF_DATA,
    ),
    "verifier without head": (
        remove_tensor,
        "verifier",
        3,
        ("no lm_head.weight",),
        {"layers", "object store", "data", "vocabulary", "draft", *OF_DATA},
    ),
    "samples of another verifier": (
        lambda f: write_samples(f / "data", LENGTHS, hidden_size=32, vocab_size=320),
        "data",
        3,
        ("9 of 9 .pt files", "32", "64"),
        OF_DATA,
    ),
    "run folder under a file": (
        lambda f: (f / "run").write_text("a file"),
        "save path",
        4,
        ("run: cannot be written to (File exists). Choose another --save-path",),
        {"disk"},
    ),
    "damaged checkpoint": (damage_checkpoint, "run folder", 4, ("run/4: committed, but", "is gone"), OF_DATA),
    "mapping of another verifier": (
        lambda f: np.save(f / "t2d.npy", np.ones(400, dtype=np.bool_)),
        "vocabulary",
        3,
        ("t2d.npy is for a verifier of 400 tokens, this one has 320",),
        {"draft", "disk", "memory"},
    ),
}


@pytest.mark.parametrize("kind", FAULTS)
def test_a_fault_is_one_problem_and_all_else_is_told(
    kind: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    spoil, name, wanted_code, texts, skipped = FAULTS[kind]
    spoil(folder)
    before = everything_in(folder)
    exit_code, checks = examine(folder, capsys)
    results = {check: line["result"] for check, line in checks.items()}
    expected = dict.fromkeys(CHECKS, "ok") | dict.fromkeys(skipped, "skipped") | {name: "problem"}
    assert (exit_code, checks[name]["exit_code"]) == (wanted_code, wanted_code)
    assert results == expected
    assert [text for text in texts if text not in checks[name]["message"]] == [], checks[name]["message"]
    assert everything_in(folder) == before


def test_the_first_of_two_problems_gives_the_exit_code(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "data" / "data_1.pt").write_bytes(b"")
    assert run_verb("doctor", folder, "--num-workers", "4") == 5
    told = capsys.readouterr()
    assert "\nproblem  workers       4 workers would take 5 CPUs" in told.out
    assert "\nproblem  data          " in told.out and "\nskipped  memory        needs data, workers, steps" in told.out
    assert told.err.startswith("error: 16 checks: ") and told.err.endswith("of: workers, data.\n")


def test_a_run_that_is_left_off_would_be_gone_on_with(
    folder: Path, trained: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(trained, folder / "run", symlinks=True)
    before = everything_in(folder)
    exit_code, checks = examine(folder, capsys, "--epochs", "3")
    assert exit_code == 0 and checks["run folder"]["found"] == f"train would go on from {folder}/run/1 (step 8)"
    assert checks["resume"]["result"] == "ok" and "4 steps are left" in checks["resume"]["found"]
    assert checks["disk"]["checkpoints"] == 1
    exit_code, checks = examine(folder, capsys, "--epochs", "2")
    assert exit_code == 0 and checks["resume"]["result"] == "warning"
    assert checks["resume"]["message"] == "all 8 steps are done. To train on, raise --epochs or --max-steps."
    exit_code, checks = examine(folder, capsys, "--no-resume-from-checkpoint")
    assert exit_code == 0 and checks["run folder"]["result"] == "warning" and "resume" not in checks
    assert everything_in(folder) == before


def test_a_checkpoint_of_another_run_is_a_problem(
    folder: Path, trained: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(trained, folder / "run", symlinks=True)
    exit_code, checks = examine(folder, capsys, "--epochs", "3", "--ttt-steps", "2")
    assert exit_code == 4 and checks["resume"]["result"] == "problem"
    assert "ttt_steps was 3, is 2" in checks["resume"]["message"] and checks["memory"]["result"] == "ok"


def test_a_file_of_the_plan_that_went_bad_does_not_make_it_another_run(
    folder: Path, trained: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(trained, folder / "run", symlinks=True)
    (folder / "data" / "data_3.pt").write_bytes(b"no sample")
    leave_out = ("--on-bad-sample", "quarantine", "--max-bad-frac", "0.2")
    before = everything_in(folder / "run")
    exit_code, checks = examine(folder, capsys, "--epochs", "3", *leave_out)
    assert exit_code == 0 and checks["resume"]["result"] == "ok"
    assert checks["data"]["result"] == "warning" and checks["data"]["left_out"] == 1
    assert everything_in(folder / "run") == before


def test_a_vocabulary_that_is_not_there_yet_is_not_made(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("d2t.npy", "t2d.npy"):
        (folder / name).unlink()
    before = everything_in(folder)
    exit_code, checks = examine(folder, capsys, "--draft-vocab-size", "100", "--time-steps", "1")
    assert exit_code == 0 and checks["vocabulary"]["result"] == "ok" and checks["time"]["result"] == "ok"
    assert checks["vocabulary"]["found"] == "100 of 320 ids, to be chosen by the samples when train starts"
    assert everything_in(folder) == before
    exit_code, checks = examine(folder, capsys, "--draft-vocab-size", "321")
    assert exit_code == 3 and "a draft vocabulary of 321 ids was asked for" in checks["vocabulary"]["message"]


def test_a_full_vocabulary_needs_no_files_and_bytes_for_none(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    of_part = examine(folder, capsys)[1]
    exit_code, checks = examine(folder, capsys, "--draft-vocab-size", "full")
    assert exit_code == 3 and "keep 96 of the verifier's 320 ids" in checks["vocabulary"]["message"]
    for name in ("d2t.npy", "t2d.npy"):
        (folder / name).unlink()
    before = everything_in(folder)
    exit_code, checks = examine(folder, capsys, "--draft-vocab-size", "full", "--time-steps", "1")
    assert exit_code == 0 and checks["vocabulary"]["found"] == "all 320 ids of the verifier, without mapping files"
    added_bytes = (12 + 2) * 64 * (320 - 96) - (8 * 96 + 320)  # rows of the head, in state and draft, and no mapping
    assert checks["disk"]["checkpoint_bytes"] - of_part["disk"]["checkpoint_bytes"] == added_bytes
    assert everything_in(folder) == before


def test_counts_beside_the_samples_tell_what_the_draft_can_say(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    kept = np.flatnonzero(np.load(folder / "t2d.npy")).tolist()
    other = next(token for token in range(320) if token not in kept)
    torch.save({kept[0]: 30, kept[1]: 10, other: 10}, folder / "data" / "token_freq.pt")
    exit_code, checks = examine(folder, capsys)
    assert exit_code == 0 and checks["vocabulary"]["coverage_frac"] == pytest.approx(0.8)
    assert checks["vocabulary"]["result"] == "warning" and "80.00% of the supervised tokens" in str(checks)


def test_a_cluster_that_is_not_there_leaves_what_needs_none(folder: Path) -> None:
    flags = ["--verifier-name-or-path", "verifier", "--data-path", "data", "--log-format", "json"]
    done = subprocess.run(
        [sys.executable, "-m", "eagle3_ray", "doctor", *flags],
        cwd=folder,
        env=os.environ | {"RAY_ADDRESS": "127.0.0.1:1"},
        capture_output=True,
        text=True,
    )
    checks = {line["check"]: line for line in map(json.loads, done.stdout.splitlines()[:-1])}
    assert done.returncode == 5 and "RAY_ADDRESS=127.0.0.1:1: no Ray cluster" in checks["Ray"]["message"]
    results = {check: line["result"] for check, line in checks.items()}
    fine = ("verifier", "layers", "save path", "run folder")
    assert results == dict.fromkeys(CHECKS, "skipped") | dict.fromkeys(fine, "ok") | {"Ray": "problem"}
