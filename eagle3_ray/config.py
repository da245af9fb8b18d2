"""The one typed schema: every flag, its default, its meaning with units, and its checks.

The command line (`cli.py`), the file behind `--config` and `run.yaml` (`settings_file.py`), and the README's
tables (`flags.py`) are all derived from these classes; nothing else states a default. A class that a verb's
settings inherit from is a section: its fields stand together in `--help`, and code that needs only those fields
asks for that class.

A `StoragePath` may be a folder or a file of this machine, of a mount, or on an object store (`s3://`, `gs://`).

A field's description is its help text. What follows "Default:" in it says what a default of None stands for.
Imports neither torch nor ray, so that `--help` answers at once.
"""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from eagle3_ray.schema import Settings
from eagle3_ray.storage import ObjectPath, StoragePath

LOGGER_NAMES = ("tensorboard", "wandb", "trackio")

LayerIds = tuple[Annotated[int, Field(ge=0)], ...]


def _check_layer_ids(ids: LayerIds | None) -> LayerIds | None:
    # Servers collect layers in rising order and a repeated one once, whatever order config.json lists them in.
    if ids is not None and (not ids or list(ids) != sorted(set(ids))):
        raise ValueError("must rise from one layer to the next, none twice")
    return ids


class ModelSettings(Settings):
    """Shape of the draft; sizes, heads and RoPE come from the verifier."""

    num_layers: int = Field(1, ge=1, description="Decoder layers of the draft.")
    norm_before_residual: bool = Field(
        True,
        description="The first layer's residual is the normed hidden state; SGLang needs --no-norm-before-residual.",
    )
    norm_before_fc: bool = Field(False, description="One RMSNorm over all auxiliary states before fc (EAGLE-3.1).")
    fc_norm: bool = Field(False, description="One RMSNorm per auxiliary state before fc; excludes --norm-before-fc.")
    norm_output: bool = Field(False, description="Hand the normed hidden state to the next TTT step (EAGLE-3.1).")
    ttt_steps: int = Field(3, ge=1, description="Training-time-test steps: tokens drafted in a row while training.")
    ttt_step_loss_decay: float = Field(1.0, gt=0, le=1, description="Step k's loss is weighted by this to the power k.")


class OptimizerSettings(Settings):
    """How the draft learns; one step is one update of the weights."""

    epochs: int = Field(20, ge=1, description="Passes over the training samples.")
    max_steps: int | None = Field(
        None,
        ge=1,
        description="Steps to pause after; the schedule stays that of all epochs. Default: all steps of all epochs.",
    )
    lr: float = Field(1e-4, gt=0, description="Peak learning rate of AdamW.")
    weight_decay: float = Field(0.0, ge=0, description="AdamW's decoupled weight decay.")
    warmup_frac: float = Field(0.01, ge=0, lt=1, description="Share (0..1) of all steps over which the rate rises.")
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

    _rising = field_validator("aux_layer_ids")(_check_layer_ids)


class VocabularySettings(Settings):
    """Which tokens the draft can say: from these files, or chosen before training when neither is there."""

    d2t_path: StoragePath = Field(
        Path("d2t.npy"), description="Offsets from draft id to verifier id, int64 [draft vocabulary]."
    )
    t2d_path: StoragePath = Field(
        Path("t2d.npy"), description="Mask of the verifier ids kept, bool [verifier vocabulary]."
    )
    draft_vocab_size: int | None = Field(
        None, ge=1, description="Tokens the draft can say. Default: 32000, or the verifier's vocabulary if smaller."
    )
    token_freq_path: StoragePath | None = Field(
        None, description="Token counts to choose the vocabulary by. Default: counted from the samples."
    )


class ClusterSettings(Settings):
    """What the run takes of the Ray cluster: RAY_ADDRESS if set, else a Ray of its own on this machine."""

    num_workers: int | None = Field(None, ge=1, description="Ranks. Default: every GPU of the cluster, or 1 on CPUs.")
    use_gpu: bool | None = Field(None, description="Train on GPUs. Default: if the cluster has any.")
    max_failures: int = Field(
        0, ge=-1, description="Restarts from the last checkpoint after a lost or hung worker; -1: without limit."
    )
    hang_timeout_s: float = Field(
        900.0, gt=0, description="Seconds without progress, within a step, after which a worker counts as hung."
    )


class CheckpointSettings(Settings):
    """When state is stored, and what a second run in the same folder does."""

    resume_from_checkpoint: bool = Field(
        True,
        description="Go on from the newest whole checkpoint; with --no-... remove this run's own files and start over.",
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
        if self.norm_before_fc and self.fc_norm:
            problems.append("--norm-before-fc and --fc-norm exclude each other: choose one")
        if isinstance(self.save_path, ObjectPath) and "/" not in self.save_path.key:
            problems.append(
                f"--save-path {self.save_path}: expected a folder in the bucket, such as {self.save_path}/run"
            )
        if self.d2t_path == self.t2d_path:
            problems.append(f"--d2t-path and --t2d-path are both {self.d2t_path}: they are two files")
        _refuse(problems)
        return self


class DoctorSettings(TrainSettings):
    """Check all that train needs, without training, and tell what it would do."""

    time_steps: int = Field(0, ge=0, description="Steps to time on this machine, with one bin of the plan; 0: none.")


class VocabMappingSettings(OutputSettings):
    """Choose the draft's vocabulary from token counts and write d2t.npy and t2d.npy."""

    token_freq_path: StoragePath = Field(
        Path("./token_freq.pt"), description="Counts: a dict {token id: times it is supervised}."
    )
    data_path: StoragePath | None = Field(
        None, description="Folder of .pt samples to count from when there is no frequency file. Default: none."
    )
    data_format_version: Literal[0, 1] = Field(1, description="Format of the samples under --data-path.")
    draft_vocab_size: int | None = Field(
        None, ge=1, description="Tokens the draft can say. Default: 32000, or the verifier's vocabulary if smaller."
    )
    target_vocab_size: int | None = Field(
        None, ge=1, description="Tokens in the verifier's vocabulary. Default: read from --target-model-path."
    )
    target_model_path: str | None = Field(
        None,
        min_length=1,
        description="Verifier whose config tells the vocabulary size. Default: --target-vocab-size tells it.",
    )
    output_path: StoragePath = Field(Path("."), description="Folder for d2t.npy and t2d.npy.")

    @model_validator(mode="after")
    def _check(self) -> "VocabMappingSettings":
        problems = []
        if (self.target_vocab_size is None) == (self.target_model_path is None):
            found = "neither" if self.target_vocab_size is None else "both"
            problems.append(f"give one of --target-vocab-size and --target-model-path; found {found}")
        if self.target_vocab_size is not None and (self.draft_vocab_size or 0) > self.target_vocab_size:
            problems.append(
                f"--draft-vocab-size {self.draft_vocab_size} is more than --target-vocab-size {self.target_vocab_size}"
            )
        _refuse(problems)
        return self


class GenerateSettings(OutputSettings):
    """Run a verifier over conversations and store its hidden states as v1 samples."""

    verifier_name_or_path: str = Field(
        min_length=1, description="Verifier with a tokenizer: a transformers folder, local or a URL, or a hub id."
    )
    conversations_path: StoragePath = Field(
        description='JSONL, a sample a line: {"conversations": [...]}, {"messages": [...]} or {"text": ...}.'
    )
    output_path: StoragePath = Field(
        Path("./data"), description="Folder for the samples, token_freq.pt and data_config.json."
    )
    aux_layer_ids: LayerIds | None = Field(
        None,
        description="Auxiliary layers in serving numbering (id k is the state that enters layer k), rising. "
        "Default: 2, n//2, n-3 of n layers.",
    )
    max_seq_len: int = Field(8192, ge=2, description="Tokens a sample is cut at.")
    skip_first_tokens: int = Field(1, ge=0, description="Plain text: leading tokens that are not supervised.")
    batch_tokens: int = Field(16384, ge=1, description="Tokens, padding counted, of a batch through the verifier.")
    num_workers: int | None = Field(None, ge=1, description="Copies of the verifier. Default: one a GPU, or 1 on CPUs.")
    use_gpu: bool | None = Field(None, description="Run the verifier on GPUs. Default: if the cluster has any.")
    precision: Literal["auto", "fp32", "bf16"] = Field(
        "auto", description="Verifier's dtype; states are stored in bf16. auto: bf16 on GPUs, fp32 on CPUs."
    )
    trust_remote_code: bool = Field(False, description="Run Python code that comes with the verifier.")

    _rising = field_validator("aux_layer_ids")(_check_layer_ids)

    @model_validator(mode="after")
    def _check(self) -> "GenerateSettings":
        if self.skip_first_tokens >= self.max_seq_len:
            raise ValueError(
                f"--skip-first-tokens {self.skip_first_tokens} leaves nothing of --max-seq-len {self.max_seq_len}"
            )
        return self


class ExportSettings(OutputSettings):
    """Turn a checkpoint into the folder a server loads, reopen it and compare every tensor."""

    checkpoint_path: StoragePath = Field(
        description="A checkpoint folder, such as ./checkpoints/3 or ./checkpoints/best."
    )
    output_path: Path = Field(description="Folder to write; must be absent or empty.")
    format: Literal["speculators", "sglang"] = Field(
        "speculators", description="Names and config to write. speculators: what vLLM loads; sglang: what SGLang loads."
    )


class DemoSettings(Settings):
    """Make a small verifier from text on this machine, then generate, map, train, and show the gain."""

    output_path: Path = Field(Path("./demo"), description="Folder of the demo's verifier, samples and run.")
    short: bool = Field(False, description="A smaller verifier and fewer steps: shows that all parts work together.")
    num_workers: int = Field(2, ge=1, description="Ranks that train the draft.")
    seed: int = Field(0, ge=0, lt=2**32, description="Seed of the text's order, the weights and the split.")


VERBS: dict[str, type[Settings]] = {
    "generate": GenerateSettings,
    "vocab-mapping": VocabMappingSettings,
    "train": TrainSettings,
    "doctor": DoctorSettings,
    "export": ExportSettings,
    "demo": DemoSettings,
}


def _refuse(problems: list[str]) -> None:
    if problems:
        raise ValueError("\n".join(problems))
