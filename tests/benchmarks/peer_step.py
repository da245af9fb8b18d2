"""The same training step by speculators 0.9.0, for `tests.benchmarks.step --peer`, in a virtual environment of its own.

    python -m venv peer
    peer/bin/pip install torch==2.13.0 transformers==5.19.0 safetensors pydantic openai loguru datasets psutil
    peer/bin/pip install --no-deps speculators==0.9.0 hs-connectors

    TORCHDYNAMO_DISABLE=1 peer/bin/python peer_step.py FOLDER

FOLDER holds what `tests.benchmarks.step` wrote: `bin.safetensors`, `draft.safetensors` and `step.json`. Attention is
sdpa and the loss eager, its faster settings on CPUs. Prints one JSON object.
"""

import json
import resource
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil
import torch
from safetensors.torch import load_file
from speculators.config import SpeculatorsConfig, VerifierConfig
from speculators.losses import resolve_loss_config
from speculators.models.eagle3 import Eagle3DraftModel, Eagle3SpeculatorConfig
from speculators.proposals.greedy import GreedyTokenProposalConfig
from transformers import LlamaConfig


def build(folder: Path, plan: dict[str, Any]) -> Any:
    """The peer's model with our weights."""
    layer = LlamaConfig(**plan["layer"])
    layer._attn_implementation = "sdpa"
    proposal = GreedyTokenProposalConfig(speculative_tokens=plan["steps"])
    verifier = VerifierConfig(name_or_path=None, architectures=[])
    model = Eagle3DraftModel(
        Eagle3SpeculatorConfig(
            transformer_layer_config=layer,
            draft_vocab_size=plan["draft_vocab"],
            norm_before_residual=True,
            eagle_aux_hidden_state_layer_ids=[2, 4, 5],
            speculators_config=SpeculatorsConfig(
                algorithm="eagle3", proposal_methods=[proposal], default_proposal_method="greedy", verifier=verifier
            ),
        )
    )
    weights = load_file(folder / "draft.safetensors")
    missing = model.load_state_dict(weights, strict=False)
    assert not missing.unexpected_keys and set(missing.missing_keys) == {"t2d", "d2t"}, missing
    model.lm_head.weight.requires_grad_(True)
    return model


def main() -> None:
    """Time the fastest of some steps, after one that is not counted."""
    folder = Path(sys.argv[1])
    plan = json.loads((folder / "step.json").read_text())
    torch.set_num_threads(plan["threads"])
    model = build(folder, plan)
    packed = {name: tensor.unsqueeze(0) for name, tensor in load_file(folder / "bin.safetensors").items()}
    states = {name: packed.pop(name).float() for name in ("aux_states", "last_state")}
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=plan["lr"], weight_decay=0.0)
    resident_bytes = psutil.Process().memory_info().rss + 8 * sum(p.numel() for p in trained)
    loss_config = resolve_loss_config("kl_div", "eager")
    seconds, losses = [], []
    for _ in range(plan["repeats"] + 1):
        start = time.perf_counter()
        with torch.autocast("cpu", torch.bfloat16, enabled=plan["dtype"] == "bf16"):
            _, loss, _ = model(
                hidden_states=states["aux_states"],
                verifier_last_hidden_states=states["last_state"],
                ttt_steps=plan["steps"],
                loss_config=loss_config,
                **packed,
            )
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append((float(loss.detach()), float(norm)))
        seconds.append(time.perf_counter() - start)
    peak_bytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(
        json.dumps(
            {
                "tokens_per_s": plan["tokens"] / min(seconds[1:]),
                "memory_above_weights_bytes": peak_bytes - resident_bytes,
                "version": version("speculators"),
                "first_loss": losses[0][0],
                "first_grad_norm": losses[0][1],
            }
        )
    )


if __name__ == "__main__":
    main()
