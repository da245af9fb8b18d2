"""The one typed schema: every flag, its default, its help text with units, and its checks.

The command line (`cli.py`), the YAML file behind `--config`, `run.yaml`, and the README's flag table are
all derived from these classes; nothing else states a default. Imports neither torch nor ray, so that
`--help` answers at once.
"""

from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

LOGGER_NAMES = ("tensorboard", "wandb", "trackio")


class Settings(BaseModel):
    """What every verb's settings share: frozen, and no unknown key is accepted."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class ModelSettings(Settings):
    """Shape of the draft; everything else of its shape is inherited from the verifier."""

    num_layers: int = Field(1, ge=1, description="Decoder layers of the draft.")
    norm_before_residual: bool = Field(
        True, description="Residual stream of the first layer starts at the normed hidden state (SGLang needs False)."
    )
    norm_before_fc: bool = Field(False, description="One RMSNorm over all auxiliary states before fc (EAGLE-3.1).")
    fc_norm: bool = Field(False, description="One RMSNorm per auxiliary state before fc; excludes --norm-before-fc.")
    norm_output: bool = Field(False, description="Hand the normed hidden state to the next TTT step (EAGLE-3.1).")
    ttt_steps: int = Field(3, ge=1, description="Training-time-test steps P: tokens drafted in a row while training.")
    ttt_step_loss_decay: float = Field(1.0, gt=0, le=1, description="Step k's loss is weighted by this to the power k.")


class TrainSettings(ModelSettings):
    """Train an EAGLE-3 draft on a Ray cluster from a verifier's hidden states on disk."""

    verifier_name_or_path: str = Field(description="Verifier: a transformers folder or a hub id.")
    data_path: Path = Field(Path("./data"), description="Folder of .pt samples, searched at any depth.")
    save_path: Path = Field(Path("./checkpoints"), description="Run folder: one sub-folder a checkpoint.")
    log_dir: Path = Field(Path("./logs"), description="Where the loggers write.")
    config: Path | None = Field(None, description="YAML file with these settings by the same names; flags win.")

    epochs: int = Field(20, ge=1, description="Passes over the training samples.")
    max_steps: int | None = Field(None, ge=1, description="Stop after this many optimizer steps, all epochs counted.")
    lr: float = Field(1e-4, gt=0, description="Peak learning rate of AdamW.")
    weight_decay: float = Field(0.0, ge=0, description="AdamW's decoupled weight decay.")
    warmup_frac: float = Field(0.01, ge=0, lt=1, description="Share of all steps over which the rate rises; 0 is allowed.")
    max_grad_norm: float = Field(1.0, gt=0, description="Gradients are clipped to this global norm.")
    noise_std: float = Field(0.05, ge=0, description="Half-width of the uniform noise on auxiliary states, training only.")
    seed: int = Field(0, ge=0, description="Seed of the split, the packing, the noise and the initial weights.")
    precision: Literal["auto", "fp32", "bf16"] = Field(
        "auto", description="Compute dtype; masters stay fp32. auto: bf16 on GPUs, fp32 on CPUs."
    )

    total_seq_len: int = Field(8192, ge=2, description="Tokens in a packed bin.")
    data_format_version: Literal[0, 1] = Field(
        1, description="1: last hidden state before the verifier's final norm; 0: after it."
    )
    aux_layer_ids: tuple[int, ...] | None = Field(
        None,
        description="Auxiliary layers in serving numbering (id k enters layer k). "
        "Default: data_config.json beside the shards, else 2, n//2, n-3.",
    )
    train_frac: float = Field(0.9, gt=0, le=1, description="Share of the files trained on; the rest validates.")
    pack_in: Literal["worker", "task"] = Field(
        "worker", description="Where samples become bins: the rank's own thread, or Ray tasks ahead of it."
    )
    bins_per_step: int | None = Field(
        None, ge=1, description="Bins in one optimizer step over all workers. Default: the number of workers."
    )

    d2t_path: Path = Field(Path("d2t.npy"), description="Offsets draft id -> verifier id, int64 [draft vocabulary].")
    t2d_path: Path = Field(Path("t2d.npy"), description="Mask of verifier ids the draft keeps, bool [verifier vocabulary].")
    draft_vocab_size: int | None = Field(
        None, ge=1, description="Tokens the draft can say. Default: 32000, or the verifier's vocabulary if smaller."
    )
    token_freq_path: Path | None = Field(
        None, description="Token counts to choose the draft vocabulary by. Default: counted from the samples."
    )

    num_workers: int | None = Field(None, ge=1, description="Ranks. Default: every GPU of the cluster, or 1 on CPUs.")
    use_gpu: bool | None = Field(None, description="Train on GPUs. Default: if the cluster has any.")
    resume_from_checkpoint: bool = Field(
        True, description="Go on from the newest whole checkpoint; --no-... starts over and removes this run's own files."
    )
    checkpoint_every_steps: int | None = Field(
        None, ge=1, description="Also store a checkpoint every so many steps, beside the one of each epoch."
    )
    max_failures: int = Field(0, ge=-1, description="Restarts from the last checkpoint after a lost worker; -1: no limit.")

    logger: str = Field("", description="Comma-separated: tensorboard, wandb, trackio. Empty: none.")
    run_name: str | None = Field(None, description="Name of the run in the loggers. Default: the run folder's name.")
    log_every_steps: int = Field(10, ge=1, description="Steps between two logged points.")

    @model_validator(mode="after")
    def _check(self) -> "TrainSettings":
        problems = []
        if self.norm_before_fc and self.fc_norm:
            problems.append("norm_before_fc and fc_norm exclude each other: choose one")
        unknown = [name for name in self.logger_names if name not in LOGGER_NAMES]
        if unknown:
            problems.append(f"logger: unknown {', '.join(unknown)}; choose from {', '.join(LOGGER_NAMES)}")
        if problems:
            raise ValueError("; ".join(problems))
        return self

    @property
    def logger_names(self) -> tuple[str, ...]:
        """The loggers asked for, in order, without blanks."""
        return tuple(name.strip() for name in self.logger.split(",") if name.strip())


class VocabMappingSettings(Settings):
    """Choose the draft's vocabulary from token counts and write d2t.npy and t2d.npy."""

    token_freq_path: Path = Field(Path("./token_freq.pt"), description="dict {token id: count over supervised tokens}.")
    data_path: Path | None = Field(None, description="Count from these .pt samples when there is no frequency file.")
    data_format_version: Literal[0, 1] = Field(1, description="Format of the samples under --data-path.")
    draft_vocab_size: int = Field(32000, ge=1, description="Tokens the draft can say.")
    target_vocab_size: int | None = Field(None, ge=1, description="Verifier vocabulary; or give --target-model-path.")
    target_model_path: str | None = Field(None, description="Verifier whose config names the vocabulary size.")
    output_path: Path = Field(Path("."), description="Folder for d2t.npy and t2d.npy.")
    config: Path | None = Field(None, description="YAML file with these settings by the same names; flags win.")


class GenerateSettings(Settings):
    """Run a verifier over conversations and store its hidden states as v1 samples."""

    verifier_name_or_path: str = Field(description="Verifier: a transformers folder or a hub id, with a tokenizer.")
    conversations_path: Path = Field(description='JSONL, a line a sample: {"conversations"|"messages": [...]} or {"text": ...}.')
    output_path: Path = Field(Path("./data"), description="Folder for data_<n>.pt, token_freq.pt and data_config.json.")
    aux_layer_ids: tuple[int, ...] | None = Field(
        None, description="Auxiliary layers in serving numbering. Default: 2, n//2, n-3."
    )
    max_seq_len: int = Field(8192, ge=2, description="Tokens a sample is cut at.")
    skip_first_tokens: int = Field(1, ge=0, description="Plain text: leading tokens that are not supervised.")
    batch_tokens: int = Field(16384, ge=1, description="Tokens of a padded batch through the verifier.")
    num_workers: int | None = Field(None, ge=1, description="Verifier copies. Default: every GPU, or 1 on CPUs.")
    use_gpu: bool | None = Field(None, description="Run the verifier on GPUs. Default: if the cluster has any.")
    precision: Literal["auto", "fp32", "bf16"] = Field("auto", description="Verifier dtype; stored states are bf16.")
    trust_remote_code: bool = Field(False, description="Run Python code that comes with the verifier's folder.")
    config: Path | None = Field(None, description="YAML file with these settings by the same names; flags win.")


class ExportSettings(Settings):
    """Turn a checkpoint into the folder a server loads, reopen it and compare every tensor."""

    checkpoint_path: Path = Field(description="A checkpoint folder, such as ./checkpoints/3 or ./checkpoints/best.")
    output_path: Path = Field(description="Folder to write; must be absent or empty.")
    format: Literal["speculators", "sglang"] = Field("speculators", description="speculators: vLLM. sglang: SGLang's names.")
    config: Path | None = Field(None, description="YAML file with these settings by the same names; flags win.")


class DemoSettings(Settings):
    """Make a small verifier from text on this machine, then generate, map, train, and show the gain."""

    output_path: Path = Field(Path("./demo"), description="Folder of the demo's verifier, samples, and run.")
    short: bool = Field(False, description="A smaller verifier and fewer steps: shows that all parts work, in about 2 minutes.")
    num_workers: int = Field(2, ge=1, description="Ranks that train the draft.")
    seed: int = Field(0, ge=0, description="Seed of text order, weights and split.")
    config: Path | None = Field(None, description="YAML file with these settings by the same names; flags win.")


VERBS: dict[str, type[Settings]] = {
    "vocab-mapping": VocabMappingSettings,
    "train": TrainSettings,
    "generate": GenerateSettings,
    "export": ExportSettings,
    "demo": DemoSettings,
}
