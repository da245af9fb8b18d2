"""The one typed schema: every flag of `train`, its default, its meaning with units, and its checks.

The command line (`cli.py`), the file behind `--config` and `run.yaml` (`settings_file.py`), and the README's
tables (`flags.py`) are all derived from these classes; nothing else states a default. A class that a verb's
settings inherit from is a section: its fields stand together in `--help`, and code that needs only those fields
asks for that class.

A `StoragePath` may be a folder or a file of this machine, of a mount, or on an object store (`s3://`, `gs://`).

A field's description is its help text. What follows "Default:" in it says what a default of None stands for.
Imports neither torch nor ray, so that `--help` answers at once.
"""

import json
import re
import sys
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from eagle3_ray.schema import Settings
from eagle3_ray.storage import ObjectPath, StoragePath

LOSS_NAMES = ("kl", "reverse_kl", "jsd", "ce", "tv", "nla", "lk")
LOGGER_NAMES = ("tensorboard", "wandb", "trackio")

# Shapes of a draft under one name; a flag of one of these settings wins over it.
PRESETS: dict[str, dict[str, bool]] = {
    "eagle3": {"norm_before_fc": False, "fc_norm": False, "norm_output": False},
    "eagle3.1": {"norm_before_fc": True, "fc_norm": False, "norm_output": True},
}

LayerIds = tuple[Annotated[int, Field(ge=0)], ...]


def check_layer_ids(ids: LayerIds | None) -> LayerIds | None:
    """Return layer ids that rise, or none.

    Raises:
        ValueError: They do not.
    """
    # Servers collect layers in rising order and a repeated one once, whatever order config.json lists them in.
    if ids is not None and (not ids or list(ids) != sorted(set(ids))):
        raise ValueError("must rise from one layer to the next, none twice")
    return ids


class ModelSettings(Settings):
    """Shape of the draft; sizes, heads and RoPE come from the verifier."""

    num_layers: int = Field(1, ge=1, description="Decoder layers of the draft.")
    layer_type: Literal["llama", "qwen3"] = Field(
        "llama",
        description="What its layers are. qwen3: queries and keys have norms of their own; for vLLM since June 2026.",
    )
    sliding_window: int | None = Field(
        None,
        ge=1,
        description="Positions that the draft's attention sees, in training and in serving, --ttt-steps at least. vLLM "
        "reads it, of qwen3 layers since July 2026; SGLang does not. Default: all.",
    )
    preset: Literal["eagle3", "eagle3.1"] | None = Field(
        None,
        description="Names a shape; single flags win. eagle3: no norms before fc; eagle3.1: --norm-before-fc, or "
        "--fc-norm if that is given, with --norm-output. Default: eagle3.",
    )
    from_pretrained: str | None = Field(
        None,
        min_length=1,
        description="Draft whose weights a new run begins with, of the same shape: a folder in the Speculators, "
        "EAGLE-3 or SGLang format, local or a URL, or a hub id. Default: weights from --seed.",
    )
    norm_before_residual: bool = Field(
        True,
        description="The first layer's residual is the normed hidden state; SGLang needs --no-norm-before-residual.",
    )
    norm_before_fc: bool = Field(False, description="One RMSNorm over all auxiliary states before fc (EAGLE-3.1).")
    fc_norm: bool = Field(False, description="One RMSNorm per auxiliary state before fc; excludes --norm-before-fc.")
    norm_output: bool = Field(False, description="Hand the normed hidden state to the next TTT step (EAGLE-3.1).")
    train_embedding: bool = Field(
        False, description="Train the embedding too; else it stays the verifier's. SGLang serves no such draft."
    )
    freeze_lm_head: bool = Field(False, description="Keep the head as the verifier's rows, untrained.")
    ttt_steps: int = Field(3, ge=1, description="Training-time-test steps: tokens drafted in a row while training.")
    ttt_step_loss_decay: float = Field(1.0, gt=0, le=1, description="Step k's loss is weighted by this to the power k.")

    @model_validator(mode="before")
    @classmethod
    def _fill_in_preset(cls, values: Any) -> Any:
        """Give those of a preset's settings that were left out; run.yaml holds what came of it."""
        preset = values.get("preset") if isinstance(values, dict) else None
        if not isinstance(preset, str) or preset not in PRESETS:
            return values
        shape = dict(PRESETS[preset])
        if values.get("fc_norm") is True:
            shape["norm_before_fc"] = False  # the two exclude each other
        return {**shape, **values}


class OptimizerSettings(Settings):
    """How the draft learns; one step is one update of the weights."""

    epochs: int = Field(20, ge=1, description="Passes over the training samples.")
    max_steps: int | None = Field(
        None,
        ge=1,
        description="Steps to pause after; the schedule stays that of all epochs. Default: all steps of all epochs.",
    )
    early_stop_epochs: int | None = Field(
        None,
        ge=1,
        description="Epochs in a row without more val/expected_tokens than any before them, after which the run ends. "
        "Default: all epochs are run.",
    )
    optimizer: Literal["adamw", "muon"] = Field(
        "adamw",
        description="What updates the weights. adamw: all of them; muon: the matrices of the decoder layers and fc, "
        "and AdamW the norms and the head.",
    )
    lr: float = Field(1e-4, gt=0, description="Peak learning rate; Muon's updates are scaled to AdamW's size.")
    lr_schedule: Literal["linear", "cosine", "none", "constant-then-decay"] = Field(
        "linear",
        description="The rate after the warm-up. linear, cosine: falls until the last step; none: stays at its peak; "
        "constant-then-decay: stays there until --decay-frac of all steps are left, then falls linearly.",
    )
    decay_frac: float = Field(
        0.2, gt=0, le=1, description="Share (0..1) of all steps over which constant-then-decay falls."
    )
    warmup_frac: float = Field(0.01, ge=0, lt=1, description="Share (0..1) of all steps over which the rate rises.")
    warmup_steps: int | None = Field(
        None, ge=0, description="Steps over which the rate rises, whatever --warmup-frac. Default: by --warmup-frac."
    )
    weight_decay: float = Field(0.0, ge=0, description="Decoupled weight decay.")
    adam_beta1: float = Field(0.9, ge=0, lt=1, description="How much of AdamW's mean of gradients a step keeps.")
    adam_beta2: float = Field(0.999, ge=0, lt=1, description="The same of its mean of their squares.")
    ema_decay: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="Share (0..1) that an update keeps of a moving average of the weights, which then is what is "
        "validated and served; 0: no average.",
    )
    loss: str = Field(
        "kl",
        description="What training minimises: kl, reverse_kl, jsd, ce, tv, nla or lk, or weights of several as JSON, "
        """such as '{"ce": 0.1, "tv": 0.9}'.""",
    )
    mask_out_of_vocab_targets: bool = Field(
        False,
        description="Train on no position where the verifier's first choice of all its tokens is one that the draft "
        "cannot say; validation counts them all.",
    )
    max_grad_norm: float = Field(1.0, gt=0, description="Global norm that gradients are clipped to.")
    noise_std: float = Field(
        0.05, ge=0, description="Half-width of the uniform noise on auxiliary states; in training only."
    )
    on_nonfinite: Literal["stop", "skip"] = Field(
        "stop",
        description="A gradient that is NaN or Inf. stop: end the run, bins named; skip: leave that update "
        "out, on all ranks alike, and count it.",
    )
    seed: int = Field(
        0, ge=0, lt=2**32, description="Seed of the split, the packing, the noise and the initial weights."
    )
    precision: Literal["auto", "fp32", "bf16"] = Field(
        "auto", description="Compute dtype; master weights stay fp32. auto: bf16 on GPUs, fp32 on CPUs."
    )
    gradient_checkpointing: bool = Field(
        False,
        description="Compute the decoder layers of each TTT step again in the backward pass: less memory, more time.",
    )

    @field_validator("loss", mode="before")
    @classmethod
    def _read_loss(cls, loss: object) -> object:
        return json.dumps(loss, default=str) if isinstance(loss, dict) else loss

    @field_validator("loss")
    @classmethod
    def _check_loss(cls, loss: str) -> str:
        _read_losses(loss)
        return loss

    @property
    def losses(self) -> tuple[tuple[str, float], ...]:
        """What is added up to the loss: names and their weights."""
        return _read_losses(self.loss)


def _read_losses(text: str) -> tuple[tuple[str, float], ...]:
    """Return the names and weights that a text stands for.

    Raises:
        ValueError: It stands for none.
    """
    if not text.lstrip().startswith("{"):
        weights: dict[str, object] = {text.strip(): 1.0}
    else:
        try:
            weights = dict(pairs := json.loads(text, object_pairs_hook=list))
        except ValueError as error:
            raise ValueError(f"is no JSON ({error})") from error
        if len(weights) < len(pairs):
            raise ValueError("names a loss twice")
    unknown = [name for name in weights if name not in LOSS_NAMES]
    if unknown or not weights:
        known = f"choose from {', '.join(LOSS_NAMES)}"
        raise ValueError(f"no loss is called {', '.join(map(repr, unknown))}; {known}" if unknown else known)
    read = []
    for name, weight in weights.items():
        is_number = isinstance(weight, int | float) and not isinstance(weight, bool)
        if not (is_number and 0 < weight <= sys.float_info.max):  # type: ignore[operator]
            raise ValueError(f"the weight of {name} is {json.dumps(weight)}, expected a number above 0")
        read.append((name, float(weight)))  # type: ignore[arg-type]
    return tuple(read)


class DataSettings(Settings):
    """How samples become the packed bins of a step."""

    total_seq_len: int = Field(8192, ge=2, description="Tokens in a packed bin.")
    data_format_version: Literal[0, 1] = Field(
        1, description="What the samples' last hidden state is. 1: before the verifier's final norm; 0: after it."
    )
    aux_layer_ids: LayerIds | None = Field(
        None,
        description="Auxiliary layers in serving numbering (id k is the state that enters layer k), rising. "
        "Default: data_config.json beside the samples, else 2, n//2, n-3 of n layers.",
    )
    train_frac: float = Field(0.9, gt=0, le=1, description="Share (0..1) of the files trained on; the rest validates.")
    pack_in: Literal["worker", "task"] = Field(
        "worker",
        description="Where samples are read and checked: in the rank's own thread, or in Ray tasks ahead of it.",
    )
    bins_per_step: int | None = Field(
        None, ge=1, description="Bins in one step over all workers. Default: the number of workers."
    )
    on_bad_sample: Literal["fail", "quarantine"] = Field(
        "fail",
        description="A file that is no usable sample. fail: ends the run; quarantine: is left out and listed in "
        "quarantine.jsonl of the run folder.",
    )
    max_bad_frac: float = Field(
        0.01, ge=0, le=1, description="Share (0..1) of the files that may be left out before the run ends."
    )
    scan: bool = Field(
        False, description="Read and check all states of all samples before training; an unchanged file once."
    )

    _rising = field_validator("aux_layer_ids")(check_layer_ids)


class VocabularySettings(Settings):
    """Which tokens the draft can say: from these files, or chosen before training when neither is there; or all."""

    d2t_path: StoragePath = Field(
        Path("d2t.npy"), description="Offsets from draft id to verifier id, int64 [draft vocabulary]."
    )
    t2d_path: StoragePath = Field(
        Path("t2d.npy"), description="Mask of the verifier ids kept, bool [verifier vocabulary]."
    )
    draft_vocab_size: int | Literal["full"] | None = Field(
        None,
        description="Tokens the draft can say. full: all of the verifier's, without mapping files; files that lie at "
        "--d2t-path and --t2d-path and keep fewer are refused. "
        "Default: 32000, or the verifier's vocabulary if smaller.",
    )
    token_freq_path: StoragePath | None = Field(
        None, description="Token counts to choose the vocabulary by. Default: counted from the samples."
    )

    @field_validator("draft_vocab_size", mode="before")
    @classmethod
    def _check_draft_vocab_size(cls, given: object) -> object:
        # One message for both kinds; the schema would give one for each.
        if given is None or given == "full":
            return given
        if re.fullmatch(r"0*[1-9]\d*", str(given), re.ASCII) is None:
            raise ValueError("must be full, or a whole number of at least 1")
        return int(str(given))


class ClusterSettings(Settings):
    """What the run takes of the Ray cluster: RAY_ADDRESS if set, else a Ray of its own on this machine."""

    num_workers: int | str | None = Field(
        None,
        description="Ranks. MIN:MAX: as many as there is room for, looked for anew each minute and after a loss. "
        "Default: every GPU of the cluster, or 1 on CPUs.",
    )
    use_gpu: bool | None = Field(None, description="Train on GPUs. Default: if the cluster has any.")
    max_failures: int = Field(
        0, ge=-1, description="Restarts from the last checkpoint after a lost or hung worker; -1: without limit."
    )
    hang_timeout_s: float = Field(
        900.0, gt=0, description="Seconds without progress, within a step, after which a worker counts as hung."
    )

    @field_validator("num_workers")
    @classmethod
    def _check_num_workers(cls, given: int | str | None) -> int | str | None:
        if given is None:
            return None
        written = re.fullmatch(r"(\d+)(?::(\d+))?", str(given), re.ASCII)
        if written is None:
            raise ValueError("expected a whole number, or two of them as in 2:8")
        fewest, most = int(written[1]), int(written[2] or written[1])
        if not 1 <= fewest <= most:
            raise ValueError("must be at least 1" if fewest < 1 else f"{most} is less than {fewest}")
        return fewest if fewest == most else given

    @property
    def is_elastic(self) -> bool:
        """Whether the number of ranks may change while the run is on."""
        return isinstance(self.num_workers, str)

    @property
    def min_workers(self) -> int | None:
        """The fewest ranks asked for; None to go by the cluster."""
        return None if self.num_workers is None else int(str(self.num_workers).partition(":")[0])

    @property
    def max_workers(self) -> int | None:
        """The most ranks of an elastic run; None of any other."""
        return int(str(self.num_workers).partition(":")[2]) if self.is_elastic else None


class CheckpointSettings(Settings):
    """When state is stored, and what a second run in the same folder does."""

    resume_from_checkpoint: bool = Field(
        True,
        description="Go on from the newest whole checkpoint; with --no-... remove this run's own files and start over.",
    )
    dry_run: bool = Field(
        False,
        description="Do all that comes before the first step, store the draft as it begins, servable, and end; the "
        "same command without it trains from the beginning.",
    )
    checkpoint_every_steps: int | None = Field(
        None, ge=1, description="Steps between checkpoints within an epoch. Default: only at the end of each epoch."
    )
    checkpoint_every_minutes: float | None = Field(
        None,
        gt=0,
        description="Minutes after a checkpoint for the next one within an epoch, by rank 0's clock. "
        "Default: only at the end of each epoch.",
    )
    keep_last: int | None = Field(
        None,
        ge=1,
        description="Newest checkpoints to keep; older ones are removed once a newer one is committed. Default: all.",
    )
    keep_best: bool = Field(True, description="With --keep-last, keep the best checkpoint too, however old it is.")


class OutputSettings(Settings):
    """How the command tells what it does."""

    log_format: Literal["text", "json"] = Field(
        "text", description="Lines on stdout. text: for people; json: one JSON object a line, errors too."
    )


class LoggingSettings(Settings):
    """Where metrics go."""

    logger: str = Field("", description="Any of tensorboard, wandb, trackio, comma-separated.")
    log_dir: Path = Field(Path("./logs"), description="Folder of this machine the loggers write to.")
    run_name: str | None = Field(
        None, min_length=1, description="The run's name there. Default: the run folder's name."
    )
    log_every_steps: int = Field(10, ge=1, description="Steps between two logged points.")

    @field_validator("logger")
    @classmethod
    def _check_loggers(cls, logger: str) -> str:
        names = _split_names(logger)
        unknown = [name for name in names if name not in LOGGER_NAMES]
        if unknown:
            raise ValueError(f"no logger is called {', '.join(unknown)}; choose from {', '.join(LOGGER_NAMES)}")
        if len(set(names)) < len(names):
            raise ValueError("names a logger twice")
        return logger

    @property
    def logger_names(self) -> tuple[str, ...]:
        """The loggers asked for, in order, without blanks."""
        return _split_names(self.logger)


def _split_names(text: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in text.split(",") if name.strip())


class TrainSettings(
    OptimizerSettings,
    DataSettings,
    VocabularySettings,
    ModelSettings,
    ClusterSettings,
    CheckpointSettings,
    LoggingSettings,
    OutputSettings,
):
    """Train an EAGLE-3 draft on a Ray cluster from a verifier's hidden states on disk."""

    verifier_name_or_path: str = Field(
        min_length=1, description="Verifier: a transformers folder, local or a URL, or a hub id."
    )
    data_path: StoragePath = Field(Path("./data"), description="Folder of .pt samples, searched at any depth.")
    save_path: StoragePath = Field(Path("./checkpoints"), description="Run folder: a sub-folder for each checkpoint.")

    @model_validator(mode="after")
    def _check(self) -> "TrainSettings":
        problems = []
        if self.sliding_window is not None and self.sliding_window < self.ttt_steps:
            problems.append(
                f"--sliding-window {self.sliding_window} is shorter than a chain of --ttt-steps {self.ttt_steps}"
            )
        if self.norm_before_fc and self.fc_norm:
            problems.append("--norm-before-fc and --fc-norm exclude each other: choose one")
        if self.dry_run and not self.resume_from_checkpoint:
            problems.append(
                "--dry-run and --no-resume-from-checkpoint exclude each other: a dry run removes no training"
            )
        if self.early_stop_epochs is not None and self.train_frac == 1:
            problems.append(
                f"--early-stop-epochs {self.early_stop_epochs} goes by validation, of which --train-frac 1 leaves none"
            )
        if self.is_elastic and self.pack_in == "task":
            problems.append(
                f"--num-workers {self.num_workers} and --pack-in task exclude each other: workers that grow in number "
                "may take the CPUs that the tasks need"
            )
        if isinstance(self.save_path, ObjectPath) and "/" not in self.save_path.key:
            problems.append(
                f"--save-path {self.save_path}: expected a folder in the bucket, such as {self.save_path}/run"
            )
        if self.draft_vocab_size == "full" and self.token_freq_path is not None:
            problems.append(
                "--draft-vocab-size full and --token-freq-path exclude each other: nothing is chosen by counts"
            )
        if self.d2t_path == self.t2d_path:
            problems.append(f"--d2t-path and --t2d-path are both {self.d2t_path}: they are two files")
        refuse(problems)
        return self


class DoctorSettings(TrainSettings):
    """Check all that train needs, without training, and tell what it would do."""

    time_steps: int = Field(0, ge=0, description="Steps to time on this machine, with one bin of the plan; 0: none.")


def refuse(problems: list[str]) -> None:
    """Have the schema refuse the settings with all of these problems, if there are any."""
    if problems:
        raise ValueError("\n".join(problems))
