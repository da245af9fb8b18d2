"""The recorded world of `tests/parity` as bins and sharded drafts, for tests of the training step."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

from eagle3_ray.data.batch import PackedBin, pack_samples
from eagle3_ray.data.samples import SampleSpec, read_sample
from eagle3_ray.data.vocab import VocabMapping
from eagle3_ray.model.config import DraftConfig, draft_config_from_speculators
from eagle3_ray.model.draft import Eagle3Draft
from eagle3_ray.model.loss import TargetHead
from eagle3_ray.model.verifier import load_verifier_tensors, read_verifier_config
from eagle3_ray.training.ready import ReadyBin, make_ready
from eagle3_ray.training.sharding import build_sharded_draft
from eagle3_ray.training.step import StepSettings

PARITY = Path(__file__).parents[2] / "parity" / "small"
CPU = torch.device("cpu")
SPEC = SampleSpec(1, 64, 3, 320, None, 1e-5)
SPEC_V0 = SampleSpec(0, 64, 3, 320, None, 1e-5)


def load_config(case: str = "one_layer") -> DraftConfig:
    return draft_config_from_speculators(json.loads((PARITY / "drafts" / case / "config.json").read_text()))


def load_weights(case: str = "one_layer") -> dict[str, Tensor]:
    weights = load_file(PARITY / "drafts" / case / "model.safetensors")
    return {name: tensor for name, tensor in weights.items() if name not in ("d2t", "t2d")}


def load_mapping() -> VocabMapping:
    return VocabMapping(torch.from_numpy(np.load(PARITY / "d2t.npy")), torch.from_numpy(np.load(PARITY / "t2d.npy")))


def load_bins(version: int = 1) -> list[PackedBin]:
    """Two bins of 192: samples 0 and 1, and sample 2 alone."""
    spec = SPEC if version == 1 else SPEC_V0
    samples = [read_sample(str(PARITY / f"v{version}" / f"data_{i}.pt"), spec) for i in range(3)]
    return [
        pack_samples(samples[:2], 192, spec, number=0, row=0),
        pack_samples(samples[2:], 192, spec, number=1, row=1),
    ]


def filler() -> ReadyBin:
    return ready(pack_samples([], 192, SPEC))


def load_ready_bins(version: int = 1) -> list[ReadyBin]:
    return [ready(packed) for packed in load_bins(version)]


def ready(packed: PackedBin, device: torch.device = CPU) -> ReadyBin:
    """A bin as any draft's step of three TTT steps takes it."""
    return make_ready(packed, 3, num_layers=2, device=device)


def load_target_head(is_normed: bool = False) -> TargetHead:
    info = read_verifier_config(str(PARITY / "verifier"))
    tensors = load_verifier_tensors(info)
    kept = torch.from_numpy(np.load(PARITY / "t2d.npy"))
    return TargetHead(
        tensors.lm_head.float()[kept], None if is_normed else tensors.final_norm.float(), info.rms_norm_eps
    )


def build_draft(case: str = "one_layer", dtype: torch.dtype = torch.float32, **parts: Any) -> Eagle3Draft:
    """The recorded initial draft, sharded over the ranks of the process group; filled from rank 0 alone.

    `parts` are fields of its config: what is trained of it.
    """
    weights = load_weights(case) if torch.distributed.get_rank() == 0 else None
    return build_sharded_draft(replace(load_config(case), **parts), weights, CPU, dtype)


def step_settings(noise_std: float = 0.0, num_ttt_steps: int = 3) -> StepSettings:
    return StepSettings(num_ttt_steps, 1.0, noise_std, 0, 1.0, CPU, torch.float32)
