"""Each logger read back through its library's own format; a resumed run repeats no point and loses none."""

import json
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from eagle3_ray.errors import UsageError
from eagle3_ray.loggers import RUN_ID_FILE, open_loggers

SETTINGS = {"lr": 1e-4, "token_freq_path": "counts.pt", "api_key": "hush-hush", "nested": {"hf_token": "hush-hush"}}


@pytest.fixture(scope="module")
def log_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One folder for the module: Trackio cannot change its own within a process."""
    return tmp_path_factory.mktemp("logs")


@pytest.fixture(autouse=True)
def isolated(tmp_path: Path, log_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No network, nothing written to the home folder, and no key of the machine's user."""
    for name in ("WANDB_API_KEY", "WANDB_DIR", "HF_TOKEN", "TRACKIO_SPACE_ID", "TRACKIO_SERVER_URL"):
        monkeypatch.delenv(name, raising=False)
    for name in ("HOME", "WANDB_CONFIG_DIR", "WANDB_CACHE_DIR", "WANDB_DATA_DIR", "HF_HOME"):
        monkeypatch.setenv(name, str(tmp_path / name.lower()))
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("TRACKIO_DIR", str(log_dir / "trackio"))
    monkeypatch.setenv("TRACKIO_STORAGE_MODE", "sqlite")


def _log_steps(
    names: tuple[str, ...], log_dir: Path, run_dir: Path, steps: range, base: float, resume_step: int
) -> None:
    """Log loss = base + step after each step, and a validation loss at the last one."""
    loggers = open_loggers(names, log_dir, "checkpoints", "eagle3", SETTINGS, resume_step, run_dir)
    for step in steps:
        loggers.log({"train/loss": base + step, "train/lr": 1e-4}, step)
    loggers.log({"val/loss_0": base}, steps[-1])
    loggers.close()


def _read_id(run_dir: Path) -> str:
    return (run_dir / RUN_ID_FILE).read_text().strip()


def _read_tensorboard(log_dir: Path, run_dir: Path) -> dict[str, list[tuple[int, float]]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(log_dir / "tensorboard" / f"checkpoints-{_read_id(run_dir)}"))
    events.Reload()
    return {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def _read_trackio(run_dir: Path) -> dict[str, list[tuple[int, float]]]:
    from trackio.sqlite_storage import SQLiteStorage

    points: dict[str, list[tuple[int, float]]] = {}
    for row in SQLiteStorage.get_logs("eagle3", f"checkpoints-{_read_id(run_dir)}"):
        for name in row.keys() - {"step", "timestamp"}:
            points.setdefault(name, []).append((row["step"], row[name]))
    return points


def _read_wandb(log_dir: Path, run_dir: Path) -> list[Any]:
    """All protobuf records of the run's offline files, oldest file first.

    The files are LevelDB logs: after 7 bytes, blocks of 32 KiB hold chunks of (crc, length, type, data); type
    1 is a whole record, 2, 3 and 4 are the first, a middle and the last part of one.
    """
    from wandb.proto.wandb_internal_pb2 import Record  # type: ignore[attr-defined]  # made at import

    records = []
    for path in sorted(
        log_dir.glob(f"wandb/offline-run-*{_read_id(run_dir)}*/*.wandb"), key=lambda p: p.stat().st_mtime_ns
    ):
        content, position, parts = path.read_bytes(), 7, b""
        while position + 7 <= len(content):
            if 32768 - position % 32768 < 7:
                position += 32768 - position % 32768
                continue
            _, length, kind = struct.unpack_from("<IHB", content, position)
            parts += content[position + 7 : position + 7 + length]
            position += 7 + length
            if kind in (1, 4):
                record = Record()
                record.ParseFromString(parts)
                records.append(record)
                parts = b""
    return records


def _wandb_points(records: list[Any], name: str) -> list[tuple[int, float]]:
    points = []
    for record in records:
        if record.HasField("history"):
            row = {item.key or item.nested_key[0]: json.loads(item.value_json) for item in record.history.item}
            if name in row:
                points.append((row["step"], row[name]))
    return points


def test_several_loggers_at_once_hold_the_same_points(log_dir: Path, tmp_path: Path) -> None:
    _log_steps(("tensorboard", "wandb", "trackio"), log_dir, tmp_path, range(1, 4), base=0.0, resume_step=0)
    expected = [(1, 1.0), (2, 2.0), (3, 3.0)]
    tensorboard, trackio = _read_tensorboard(log_dir, tmp_path), _read_trackio(tmp_path)
    assert tensorboard["train/loss"] == expected and tensorboard["val/loss_0"] == [(3, 0.0)]
    assert trackio["train/loss"] == expected and trackio["val/loss_0"] == [(3, 0.0)]
    records = _read_wandb(log_dir, tmp_path)
    assert _wandb_points(records, "train/loss") == expected and _wandb_points(records, "val/loss_0") == [(3, 0.0)]


def test_a_resumed_tensorboard_run_hides_the_points_that_are_repeated(log_dir: Path, tmp_path: Path) -> None:
    _log_steps(("tensorboard",), log_dir, tmp_path, range(1, 5), base=0.0, resume_step=0)
    _log_steps(("tensorboard",), log_dir, tmp_path, range(3, 6), base=100.0, resume_step=2)
    points = _read_tensorboard(log_dir, tmp_path)
    assert points["train/loss"] == [(1, 1.0), (2, 2.0), (3, 103.0), (4, 104.0), (5, 105.0)]
    assert points["val/loss_0"] == [(5, 100.0)]


def test_a_resumed_trackio_run_drops_the_points_that_are_repeated(log_dir: Path, tmp_path: Path) -> None:
    import trackio

    _log_steps(("trackio",), log_dir, tmp_path, range(1, 5), base=0.0, resume_step=0)
    num_runs = len(trackio.Api().runs("eagle3"))
    _log_steps(("trackio",), log_dir, tmp_path, range(3, 6), base=100.0, resume_step=2)
    points = _read_trackio(tmp_path)
    assert points["train/loss"] == [(1, 1.0), (2, 2.0), (3, 103.0), (4, 104.0), (5, 105.0)]
    assert points["val/loss_0"] == [(5, 100.0)]
    assert len(trackio.Api().runs("eagle3")) == num_runs


def test_a_resumed_wandb_run_keeps_its_id_and_loses_no_point(log_dir: Path, tmp_path: Path) -> None:
    _log_steps(("wandb",), log_dir, tmp_path, range(1, 5), base=0.0, resume_step=0)
    _log_steps(("wandb",), log_dir, tmp_path, range(3, 6), base=100.0, resume_step=2)
    records = _read_wandb(log_dir, tmp_path)
    runs = [record.run for record in records if record.HasField("run")]
    assert {run.run_id for run in runs} == {_read_id(tmp_path)} and {run.display_name for run in runs} == {
        "checkpoints"
    }
    repeated = [(3, 103.0), (4, 104.0), (5, 105.0)]
    assert _wandb_points(records, "train/loss") == [(1, 1.0), (2, 2.0), (3, 3.0), (4, 4.0), *repeated]
    axes = {record.metric.glob_name: record.metric.step_metric for record in records if record.HasField("metric")}
    assert axes["*"] == "step"


def test_a_run_that_failed_before_its_first_checkpoint_leaves_no_points(log_dir: Path, tmp_path: Path) -> None:
    for base in (0.0, 100.0):
        _log_steps(("tensorboard", "trackio"), log_dir, tmp_path, range(0, 2), base, resume_step=0)
    assert _read_tensorboard(log_dir, tmp_path)["train/loss"] == [(0, 100.0), (1, 101.0)]
    assert _read_trackio(tmp_path)["train/loss"] == [(0, 100.0), (1, 101.0)]


def test_two_runs_of_one_name_do_not_mix(log_dir: Path, tmp_path: Path) -> None:
    for run_dir, base in ((tmp_path / "a", 0.0), (tmp_path / "b", 10.0)):
        _log_steps(("tensorboard", "trackio"), log_dir, run_dir, range(1, 2), base, resume_step=0)
    for run_dir, value in ((tmp_path / "a", 1.0), (tmp_path / "b", 11.0)):
        assert _read_tensorboard(log_dir, run_dir)["train/loss"] == [(1, value)]
        assert _read_trackio(run_dir)["train/loss"] == [(1, value)]


def test_settings_are_stored_and_secrets_are_not(log_dir: Path, tmp_path: Path) -> None:
    import trackio

    _log_steps(("tensorboard", "wandb", "trackio"), log_dir, tmp_path, range(1, 2), base=0.0, resume_step=0)
    runs = {run.name: run for run in trackio.Api().runs("eagle3")}
    stored = runs[f"checkpoints-{_read_id(tmp_path)}"].config
    assert stored is not None and stored["lr"] == 1e-4 and stored["token_freq_path"] == "counts.pt"
    configs = [r.run.config for r in _read_wandb(log_dir, tmp_path) if r.HasField("run")]
    assert any(item.key == "lr" and float(item.value_json) == 1e-4 for item in configs[0].update)
    files = [path for path in log_dir.rglob("*") if path.is_file()]
    assert len(files) >= 3 and not [path for path in files if b"hush-hush" in path.read_bytes()]


def test_no_logger_writes_nothing(tmp_path: Path) -> None:
    loggers = open_loggers((), tmp_path / "logs", "run", "eagle3", SETTINGS, 0, tmp_path / "run")
    loggers.log({"train/loss": 1.0}, 1)
    loggers.close()
    assert not (tmp_path / "logs").exists() and not (tmp_path / "run").exists()


def test_a_metric_that_is_not_in_the_table_is_a_bug(tmp_path: Path) -> None:
    loggers = open_loggers((), tmp_path, "run", "eagle3", {}, 0, tmp_path)
    with pytest.raises(AssertionError, match="train/lss"):
        loggers.log({"train/lss": 1.0}, 1)


@pytest.mark.parametrize(
    ("name", "module"), [("tensorboard", "torch.utils.tensorboard"), ("wandb", "wandb"), ("trackio", "trackio")]
)
def test_a_missing_library_is_a_usage_error(
    name: str, module: str, log_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, module, None)  # what importlib takes as "not there"
    with pytest.raises(UsageError, match=f"--logger {name}: its library cannot be imported .*pip install {name}"):
        open_loggers((name,), log_dir, "run", "eagle3", {}, 0, tmp_path)


def test_wandb_without_a_key_is_a_usage_error_and_asks_nothing(
    log_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_MODE", "online")
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    with pytest.raises(UsageError, match=r"--logger wandb: cannot open run .* Set WANDB_API_KEY .*WANDB_MODE=offline"):
        open_loggers(("tensorboard", "wandb"), log_dir, "run", "eagle3", {}, 0, tmp_path)


def test_trackio_refuses_another_folder_in_the_same_process(log_dir: Path, tmp_path: Path) -> None:
    open_loggers(("trackio",), log_dir, "run", "eagle3", {}, 0, tmp_path).close()
    with pytest.raises(UsageError, match=r"already writes to .*Start another process"):
        open_loggers(("trackio",), tmp_path / "other", "run", "eagle3", {}, 0, tmp_path)


def test_trackio_refuses_a_project_name_it_reserves(log_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"--logger trackio: cannot open run .*registry-"):
        open_loggers(("trackio",), log_dir, "run", "registry-x", {}, 0, tmp_path)


def test_a_log_folder_that_cannot_be_made_is_a_usage_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="--logger tensorboard: cannot write under"):
        open_loggers(("tensorboard",), tmp_path / "file" / "logs", "run", "eagle3", {}, 0, tmp_path)


def test_libraries_that_are_not_chosen_are_not_imported() -> None:
    code = (
        "import sys, eagle3_ray.loggers; print(sorted({'wandb', 'trackio', 'tensorboard', 'torch'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
