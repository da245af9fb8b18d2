"""Run folders as `train` leaves them, without the training."""

import json
from pathlib import Path

from eagle3_ray.training.metrics_file import to_record
from eagle3_ray.training.plan_file import MachineNumbers, PlanRecord, SplitNumbers, StepNumbers, write_plan
from eagle3_ray.training.run_folder import COMMITTED, METRICS, PARTS, PLAN, RECORD, RUN_YAML, STATE

PLAN_RECORD = PlanRecord(
    training=SplitNumbers(samples=90, tokens=9000, bins=20, fill_frac=0.875, dropped=3, cut=2),
    validation=SplitNumbers(samples=10, tokens=1000, bins=3, fill_frac=0.5, dropped=1, cut=4),
    steps=StepNumbers(bins_per_step=5, steps_per_epoch=4, total_steps=8, stop_step=8),
    machine=MachineNumbers(2, 3, True, 1, 2, ("H100",), 16, "A Processor", 64 * 2**30, "Linux 6.1"),
    versions={"python": "3.11.7", "torch": "2.13.0"},
)
SETTINGS = {"lr": 0.001, "epochs": 2, "save_path": "/a/run", "data_path": "/a/data", "loss": "kl", "logger": ""}


def make_run(folder: Path, scale: float = 1.0, num_ttt_steps: int = 2, **settings: object) -> Path:
    """Eight steps in two epochs, with a checkpoint and a validation after each; the first checkpoint is the best."""
    folder.mkdir(parents=True)
    lines = [to_record(validation(scale * 1.0, num_ttt_steps), 0, 1.7e9)]
    for step in range(1, 9):
        lines.append(to_record(training(step, scale, num_ttt_steps), step, 1.7e9 + step))
        if step % 4 == 0:
            lines.append(to_record(validation(scale * (2.0 - step / 100), num_ttt_steps), step, 1.7e9 + step))
            write_checkpoint(folder / str(step // 4 - 1), step, validation(scale * (2.0 - step / 100), num_ttt_steps))
    (folder / METRICS).write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / RUN_YAML).write_text(json.dumps({**SETTINGS, "save_path": str(folder), **settings}))
    write_plan(folder / PLAN, PLAN_RECORD)
    return folder


def training(step: int, scale: float, num_ttt_steps: int) -> dict[str, float]:
    return {
        "train/loss": scale * 4.0 / step,
        **{f"train/loss_{k}": scale * 2.0 / step for k in range(num_ttt_steps)},
        **{f"train/accuracy_{k}": 0.3 for k in range(num_ttt_steps)},
        **{f"train/cond_acc_{k}": 0.4 for k in range(num_ttt_steps)},
        "train/expected_tokens": 1.0 + step / 10,
        "train/lr": 0.001 / step,
        "train/grad_norm": float("inf") if step == 3 else 1.0 + step,
        "train/tokens_per_s": 100.0 * step,
        "train/data_wait_frac": 0.25,
        "train/peak_memory_bytes": 2.0**30 * step,
        "train/left_out_steps": 1.0 if step >= 3 else 0.0,
    }


def validation(tokens: float, num_ttt_steps: int) -> dict[str, float]:
    accepted = {f"val/cond_acc_{k}": 0.5 - k / 10 for k in range(num_ttt_steps)}
    accurate = {f"val/accuracy_{k}": 0.45 - k / 10 for k in range(num_ttt_steps)}
    return {"val/loss": 3.0 / tokens, "val/loss_0": 1.5, **accepted, **accurate, "val/expected_tokens": tokens}


def write_checkpoint(path: Path, step: int, metrics: dict[str, float]) -> None:
    (path / STATE).mkdir(parents=True)
    for part in PARTS - {STATE}:
        (path / part).write_text("{}")
    (path / RECORD).write_text(json.dumps({"metrics": metrics, "identity": {}}))
    (path / COMMITTED).write_text(json.dumps({"step": step}))
