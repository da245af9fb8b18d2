"""The settings of the verbs beside `train` and `doctor`, and the table of all verbs; see `config.py`."""

from pathlib import Path
from typing import Literal

from pydantic import Field, field_validator, model_validator

from eagle3_ray.config import DoctorSettings, LayerIds, OutputSettings, TrainSettings, check_layer_ids, refuse
from eagle3_ray.schema import WORDS, Settings
from eagle3_ray.storage import StoragePath


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
        refuse(problems)
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

    _rising = field_validator("aux_layer_ids")(check_layer_ids)

    @model_validator(mode="after")
    def _check(self) -> "GenerateSettings":
        if self.skip_first_tokens >= self.max_seq_len:
            raise ValueError(
                f"--skip-first-tokens {self.skip_first_tokens} leaves nothing of --max-seq-len {self.max_seq_len}"
            )
        return self


class EvaluateSettings(OutputSettings):
    """Decode prompts with a verifier and its draft, and measure what the draft gains."""

    draft_path: StoragePath = Field(
        description="The draft: a checkpoint, such as ./checkpoints/best, or a folder that export wrote for vLLM."
    )
    verifier_name_or_path: str | None = Field(
        None, min_length=1, description="Verifier to decode with. Default: the one the draft was trained for."
    )
    prompts_path: StoragePath | None = Field(
        None,
        description='JSONL, a prompt a line: {"prompt": ...}, {"turns": [...]}, or a conversation as generate takes. '
        "Default: what stands before the first supervised token of the samples.",
    )
    data_path: StoragePath | None = Field(
        None,
        description="Folder of .pt samples; those the draft was not trained on give an estimate. Default: none.",
    )
    data_format_version: Literal[0, 1] = Field(1, description="Format of the samples under --data-path.")
    output_path: StoragePath | None = Field(
        None, description="JSON file to write. Default: evaluation.json in the draft's folder."
    )
    num_prompts: int = Field(80, ge=1, description="Prompts to decode, and samples to estimate on, at most.")
    num_speculative_tokens: int | None = Field(
        None, ge=1, description="Tokens drafted in a row. Default: as many as the draft was trained for."
    )
    max_new_tokens: int = Field(128, ge=2, description="Tokens an output is cut at.")
    num_workers: int | None = Field(
        None, ge=1, description="Copies of verifier and draft. Default: one a GPU, or 1 on CPUs."
    )
    use_gpu: bool | None = Field(None, description="Decode on GPUs. Default: if the cluster has any.")
    precision: Literal["auto", "fp32", "bf16"] = Field(
        "auto", description="Dtype of both models. auto: bf16 on GPUs, fp32 on CPUs."
    )
    trust_remote_code: bool = Field(False, description="Run Python code that comes with the verifier.")

    @model_validator(mode="after")
    def _check(self) -> "EvaluateSettings":
        if self.prompts_path is None and self.data_path is None:
            refuse(["give --prompts-path, --data-path, or both; found neither"])
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


class ReportSettings(OutputSettings):
    """Show what runs have logged, side by side: one HTML page, and its pictures in a folder beside it."""

    run_paths: tuple[StoragePath, ...] = Field(
        min_length=1, description="Run folders: what --save-path of train named.", json_schema_extra={WORDS: "RUN"}
    )
    output_path: Path = Field(
        Path("report.html"), description="Page to write; the pictures go to NAME-plots, as PNG files."
    )

    @model_validator(mode="after")
    def _check(self) -> "ReportSettings":
        places = [path.resolve() for path in self.run_paths]
        twice = dict.fromkeys(
            str(path) for path, place in zip(self.run_paths, places, strict=True) if places.count(place) > 1
        )
        refuse([f"{' and '.join(twice)}: one run, named more than once; name it once"] if twice else [])
        return self


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
    "evaluate": EvaluateSettings,
    "export": ExportSettings,
    "report": ReportSettings,
    "demo": DemoSettings,
}
