"""The command line: verbs, flags over file over defaults, one message for all mistakes, exit codes."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType

import pytest
from pydantic import ValidationError

from eagle3_ray import __version__
from eagle3_ray.cli import PROBLEMS, main, read_flags, read_settings
from eagle3_ray.config import TrainSettings
from eagle3_ray.errors import (
    CheckpointError,
    ClusterError,
    DataError,
    Eagle3RayError,
    ExportError,
    SampleFormatError,
    UsageError,
)
from eagle3_ray.flags import flags_of
from eagle3_ray.schema import Settings
from eagle3_ray.settings_file import write_run_yaml
from eagle3_ray.verbs import VERBS, ExportSettings, VocabMappingSettings

ROOT = Path(__file__).parents[2]
VERIFIER = ["--verifier-name-or-path", "verifier"]


def read_train(*arguments: str) -> TrainSettings:
    settings = read_settings("train", arguments)
    assert isinstance(settings, TrainSettings)
    return settings


def mistakes_in(verb: str, *arguments: str) -> list[str]:
    """The lines of the message about wrong settings, without its frame."""
    with pytest.raises(UsageError) as caught:
        read_settings(verb, arguments)
    *lines, last = str(caught.value).split("\n")
    assert last == f"See eagle3-ray {verb} --help."
    if len(lines) > 1:
        assert lines.pop(0) == f"{len(lines)} settings cannot be used:"
    return [line.strip() for line in lines]


@pytest.fixture
def settings_of_the_job(monkeypatch: pytest.MonkeyPatch) -> list[Settings]:
    """Stands in for the job of `export`; holds the settings it was run with."""
    seen: list[Settings] = []
    job = ModuleType("eagle3_ray.jobs.export")
    job.run = seen.append  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "eagle3_ray.jobs.export", job)
    return seen


def job_that_raises(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    def run(settings: Settings) -> None:
        raise error

    job = ModuleType("eagle3_ray.jobs.demo")
    job.run = run  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "eagle3_ray.jobs.demo", job)


# Verbs


def test_help_lists_each_verb_with_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    lines = capsys.readouterr().out.split("\n")
    for verb, settings_class in VERBS.items():
        assert [line.split(maxsplit=1)[1] for line in lines if line.startswith(f"  {verb} ")] == [
            settings_class.__doc__
        ]


def test_no_verb_lists_the_verbs_and_is_a_mistake(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    out, err = capsys.readouterr()
    assert out == "" and all(f"  {verb} " in err for verb in VERBS)


def test_version_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"eagle3-ray {__version__}\n"


def test_a_misspelt_verb_is_corrected(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["trian", "--epochs", "3"]) == 2
    assert capsys.readouterr().err.startswith("error: trian: no such verb; did you mean train? There are generate, ")


def test_a_word_like_no_verb_gets_the_list(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["zzz"]) == 2
    assert capsys.readouterr().err == f"error: zzz: no such verb. There are {', '.join(VERBS)}.\n"


def test_a_flag_before_the_verb_is_a_mistake(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--epochs", "3", "train"]) == 2
    assert capsys.readouterr().err == f"error: --epochs: a verb comes first, one of {', '.join(VERBS)}.\n"


def test_the_verbs_job_is_run_with_its_settings(settings_of_the_job: list[Settings]) -> None:
    assert main(["export", "--checkpoint-path", "checkpoints/0", "--output-path", "served"]) == 0
    assert settings_of_the_job == [ExportSettings(checkpoint_path=Path("checkpoints/0"), output_path=Path("served"))]


# Flags


def test_every_kind_of_flag_is_read() -> None:
    settings = read_train(
        *VERIFIER,
        *["--epochs", "3", "--lr", "1e-5", "--max-failures", "-1", "--logger", "", "--save_path=./run"],
        *["--data-format-version", "0", "--pack-in", "task", "--aux-layer-ids", "2", "4", "5"],
        *["--no-norm-before-residual", "--fc-norm", "--no-resume-from-checkpoint", "--max-steps", "7"],
    )
    assert settings == TrainSettings(
        verifier_name_or_path="verifier",
        epochs=3,
        lr=1e-5,
        max_failures=-1,
        save_path=Path("run"),
        data_format_version=0,
        pack_in="task",
        aux_layer_ids=(2, 4, 5),
        norm_before_residual=False,
        fc_norm=True,
        resume_from_checkpoint=False,
        max_steps=7,
    )


@pytest.mark.parametrize(
    ("flags", "before_fc", "fc_norm", "output"),
    [
        ([], False, False, False),
        (["--preset", "none"], False, False, False),
        (["--preset", "eagle3"], False, False, False),
        (["--preset", "eagle3", "--norm-output"], False, False, True),
        (["--preset", "eagle3.1"], True, False, True),
        (["--preset", "eagle3.1", "--fc-norm"], False, True, True),
        (["--preset", "eagle3.1", "--no-fc-norm", "--no-norm-output"], True, False, False),
        (["--preset", "eagle3.1", "--no-norm-before-fc"], False, False, True),
    ],
)
def test_a_preset_names_a_shape_and_single_flags_win(
    flags: list[str], before_fc: bool, fc_norm: bool, output: bool, tmp_path: Path
) -> None:
    settings = read_train(*VERIFIER, *flags)
    assert (settings.norm_before_fc, settings.fc_norm, settings.norm_output) == (before_fc, fc_norm, output)
    write_run_yaml(settings, tmp_path / "run.yaml")
    assert read_train("--config", str(tmp_path / "run.yaml")) == settings


def test_a_preset_as_a_flag_wins_over_the_shape_of_a_file(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text("norm_before_fc: false\nfc_norm: false\nnorm_output: false\nepochs: 3\n")
    settings = read_train(*VERIFIER, "--config", str(tmp_path / "run.yaml"), "--preset", "eagle3.1")
    assert (settings.norm_before_fc, settings.fc_norm, settings.norm_output) == (True, False, True)
    assert settings.epochs == 3


@pytest.mark.parametrize(("flags", "expected"), [([], None), (["--use-gpu"], True), (["--no-use-gpu"], False)])
def test_a_switch_may_be_left_to_the_cluster(flags: list[str], expected: bool | None) -> None:
    assert read_train(*VERIFIER, *flags).use_gpu is expected


@pytest.mark.parametrize("verb", VERBS)
def test_every_switch_of_the_schema_has_both_forms(verb: str) -> None:
    for flag in flags_of(VERBS[verb]).values():
        if flag.is_switch:
            for form, value in ((flag.name, True), (flag.negation, False)):
                assert read_flags(verb, [form]) == {flag.field: value}


def test_an_unknown_flag_is_corrected(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["train", *VERIFIER, "--epoch", "3"])
    assert caught.value.code == 2
    err = capsys.readouterr().err
    assert "--epoch" in err and "Perhaps you meant" in err and "--epochs INT" in err


def test_a_flag_without_its_value_is_a_mistake(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["train", *VERIFIER, "--lr"])
    assert caught.value.code == 2
    assert "Missing value for argument '--lr'" in capsys.readouterr().err


# Mistakes in values


def test_all_mistakes_are_told_at_once_in_the_order_of_help() -> None:
    arguments = ["--pack-in", "rank", "--epochs", "0", "--lr", "fast", "--aux-layer-ids", "2", "x", "--save-path", ""]
    assert mistakes_in("train", *arguments) == [
        "--verifier-name-or-path: is required, as a flag or in the file of --config",
        "--save-path '': must not be empty",
        "--epochs 0: must be at least 1",
        "--lr fast: must be a number",
        "--aux-layer-ids 2 x: must be a whole number, found 'x'",
        "--pack-in rank: must be 'worker' or 'task'",
    ]


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--epochs", "1.5"], "--epochs 1.5: must be a whole number"),
        (["--lr", "0"], "--lr 0: must be more than 0.0"),
        (["--lr", "inf"], "--lr inf: must be a finite number"),
        (["--train-frac", "2"], "--train-frac 2: must be at most 1.0"),
        (["--warmup-frac", "1"], "--warmup-frac 1: must be less than 1.0"),
        (["--data-format-version", "3"], "--data-format-version 3: must be 0 or 1"),
        (["--aux-layer-ids", "5", "2"], "--aux-layer-ids 5 2: must rise from one layer to the next, none twice"),
        (
            ["--logger", "mlflow"],
            "--logger mlflow: no logger is called mlflow; choose from tensorboard, wandb, trackio",
        ),
        (["--run-name", ""], "--run-name '': must not be empty"),
        (["--preset", "eagle4"], "--preset eagle4: must be 'eagle3' or 'eagle3.1'"),
        (
            ["--preset", "eagle3.1", "--norm-before-fc", "--fc-norm"],
            "--norm-before-fc and --fc-norm exclude each other: choose one",
        ),
        (["--norm-before-fc", "--fc-norm"], "--norm-before-fc and --fc-norm exclude each other: choose one"),
    ],
)
def test_a_mistake_names_flag_value_and_rule(arguments: list[str], told: str) -> None:
    assert mistakes_in("train", *VERIFIER, *arguments) == [told]


def test_mistakes_come_with_exit_code_2_and_without_pydantic(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--epochs", "0"]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("error: 2 settings cannot be used:\n  --verifier-name-or-path: is required")
    assert "pydantic" not in err and "http" not in err and "Traceback" not in err


def test_every_problem_that_the_schema_can_report_has_words_of_ours() -> None:
    """Feed every field values of every shape; none may fall back to pydantic's own wording."""
    handled = {*PROBLEMS, "missing", "extra_forbidden"}
    for settings_class in VERBS.values():
        for value in (None, "", "text", "\0", True, -1, 10**30, 0.5, float("nan"), [], ["x"], [-1], [None], {"a": 1}):
            with pytest.raises(ValidationError) as caught:
                settings_class.model_validate(dict.fromkeys([*settings_class.model_fields, "no_field"], value))
            assert {detail["type"] for detail in caught.value.errors()} <= handled


# The file


def test_flags_win_over_the_file_and_the_file_over_defaults(tmp_path: Path) -> None:
    path = tmp_path / "my.yaml"
    path.write_text("verifier_name_or_path: from-file\nepochs: 3\nlr: 1e-5\nuse-gpu: false\naux_layer_ids: [1, 2, 3]\n")
    settings = read_train("--config", str(path), "--epochs", "4", "--use-gpu")
    assert settings == TrainSettings(
        verifier_name_or_path="from-file", epochs=4, lr=1e-5, use_gpu=True, aux_layer_ids=(1, 2, 3)
    )


def test_a_flag_can_unset_what_the_file_sets(tmp_path: Path) -> None:
    path = tmp_path / "my.yaml"
    path.write_text("max_steps: 3\naux_layer_ids: [1, 2, 3]\nrun_name: first\n")
    flags = ["--max-steps", "none", "--aux-layer-ids", "none", "--run-name", "none"]
    assert read_train("--config", str(path), *VERIFIER, *flags) == TrainSettings(verifier_name_or_path="verifier")


def test_none_is_a_name_like_any_other_where_a_value_is_needed() -> None:
    assert read_train("--verifier-name-or-path", "none", "--save-path", "none") == TrainSettings(
        verifier_name_or_path="none", save_path=Path("none")
    )


def test_mistakes_in_a_file_name_the_file(tmp_path: Path) -> None:
    path = tmp_path / "my.yaml"
    path.write_text("epohcs: 3\nlr: 0\nzzz: 1\nuse_gpu: perhaps\nrun_name: 2024\nseed: yes\n")
    assert mistakes_in("train", "--config", str(path), *VERIFIER) == [
        f"--lr 0 (in {path}): must be more than 0.0",
        f"--seed True (in {path}): must be a number",
        f"--use-gpu 'perhaps' (in {path}): must be true or false",
        f"--run-name 2024 (in {path}): must be text; quote it in the file",
        f"epohcs (in {path}): no such setting; did you mean epochs?",
        f"zzz (in {path}): no such setting.",
    ]


def test_a_file_that_is_not_there_ends_with_exit_code_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--config", "/nowhere/my.yaml"]) == 2
    assert capsys.readouterr().err == "error: --config /nowhere/my.yaml: cannot be read (No such file or directory).\n"


def test_a_contradiction_across_flag_and_file_is_seen(tmp_path: Path) -> None:
    path = tmp_path / "my.yaml"
    path.write_text("target_vocab_size: 64000\n")
    assert mistakes_in("vocab-mapping", "--config", str(path), "--target-model-path", "verifier") == [
        "give one of --target-vocab-size and --target-model-path; found both"
    ]


MINIMAL = {
    "generate": [*VERIFIER, "--conversations-path", "talk.jsonl", "--aux-layer-ids", "1", "2", "3", "--no-use-gpu"],
    "vocab-mapping": ["--target-vocab-size", "64000", "--data-path", "./data"],
    "train": [*VERIFIER, "--epochs", "3", "--lr", "3e-5", "--aux-layer-ids", "1", "2", "3", "--max-steps", "9"],
    "doctor": [*VERIFIER, "--time-steps", "3", "--num-workers", "2"],
    "evaluate": ["--draft-path", "checkpoints/best", "--data-path", "./data", "--num-prompts", "9", "--no-use-gpu"],
    "export": ["--checkpoint-path", "checkpoints/0", "--output-path", "/served", "--format", "sglang"],
    "report": ["checkpoints", "s3://bucket/run", "--output-path", "/shown/page.html"],
    "demo": ["--short", "--seed", "4"],
}


@pytest.mark.parametrize("verb", VERBS)
def test_the_written_settings_repeat_the_command(verb: str, tmp_path: Path) -> None:
    before = read_settings(verb, MINIMAL[verb])
    write_run_yaml(before, tmp_path / "run.yaml")
    assert read_settings(verb, ["--config", str(tmp_path / "run.yaml")]) == before


def test_vocab_mapping_reads_its_flags() -> None:
    settings = read_settings("vocab-mapping", ["--target-model-path", "verifier"])
    assert settings == VocabMappingSettings(target_model_path="verifier")


# Exit codes


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (UsageError("why"), 2),
        (DataError("why"), 3),
        (SampleFormatError("why"), 3),
        (CheckpointError("why"), 4),
        (ExportError("why"), 4),
        (ClusterError("why"), 5),
        (Eagle3RayError("why"), 1),
    ],
)
def test_an_error_of_ours_is_its_message_and_its_code(
    error: Eagle3RayError, code: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    job_that_raises(monkeypatch, error)
    assert main(["demo"]) == code
    assert capsys.readouterr() == ("", "error: why\n")


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_ends_a_command_with_its_code_and_a_line(
    number: signal.Signals, code: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    job = ModuleType("eagle3_ray.jobs.demo")
    job.run = lambda settings: os.kill(os.getpid(), number)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "eagle3_ray.jobs.demo", job)
    assert main(["demo"]) == code
    assert capsys.readouterr() == ("", f"stopped by {number.name}\n")


def test_a_bug_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    job_that_raises(monkeypatch, ZeroDivisionError("a bug"))
    with pytest.raises(ZeroDivisionError):
        main(["demo"])


# A process of its own


def run_python(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=60, check=False
    )


IMPORTED_AFTER = """
import json, sys
from eagle3_ray.cli import main
try:
    code = main(json.loads(sys.argv[1]))
except SystemExit as stop:
    code = stop.code
heavy = {"torch", "ray", "transformers", "numpy", "pandas", "pyarrow"} & set(sys.modules)
jobs = [name for name in sys.modules if name.startswith("eagle3_ray.jobs")]
print(json.dumps([code, sorted(heavy), jobs]))
"""


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["--help"], 0),
        *[([verb, "--help"], 0) for verb in VERBS],
        (["train", "--epochs", "0"], 2),
        (["train", "-x"], 2),
    ],
)
def test_help_and_mistakes_import_neither_torch_nor_ray_nor_a_job(arguments: list[str], code: int) -> None:
    process = run_python("-c", IMPORTED_AFTER, json.dumps(arguments))
    assert json.loads(process.stdout.splitlines()[-1]) == [code, [], []]


def test_help_answers_at_once() -> None:
    # Half a second is the promise; the bound leaves room for a busy machine, the best of three for a cold disk.
    times_s = []
    for _ in range(3):
        start = time.perf_counter()
        process = run_python("-m", "eagle3_ray", "train", "--help")
        times_s.append(time.perf_counter() - start)
        assert process.returncode == 0 and "--total-seq-len INT" in process.stdout
    assert min(times_s) < 2.0


def test_python_m_passes_the_exit_code_on() -> None:
    process = run_python("-m", "eagle3_ray", "train", "--epochs", "0", *VERIFIER)
    assert (process.returncode, process.stdout) == (2, "")
    assert process.stderr == "error: --epochs 0: must be at least 1\nSee eagle3-ray train --help.\n"
