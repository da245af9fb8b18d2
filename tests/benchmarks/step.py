"""Tokens a second and peak memory of the training step on this machine, as a share of its matrix-multiply rate.

    python -m tests.benchmarks.step [--hidden 1024 --steps 3 --dtype fp32 ...] [--peer peer/bin/python]

The operations counted are those the computation needs (FACTS of EAGLE-3: step-0 keys and values of every token, all
else of supervised rows alone), so a share of 1 would be perfect. With `--peer`, speculators then makes the same step
from the same weights and bin (see `peer_step.py`), and the first loss and gradient norm of both must agree. Without a
peer it needs torch and numpy alone, so that it runs on any borrowed GPU. Prints one JSON object.
"""

import argparse
import datetime
import json
import os
import resource
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from eagle3_ray.data.batch import PackedBin
from eagle3_ray.model.config import DraftConfig, LayerConfig
from eagle3_ray.model.draft import Eagle3Draft
from eagle3_ray.model.loss import TargetHead
from eagle3_ray.training.meter import peak_memory_bytes
from eagle3_ray.training.optim import build_optimizer, set_learning_rate
from eagle3_ray.training.ready import make_ready
from eagle3_ray.training.sharding import build_sharded_draft
from eagle3_ray.training.step import StepSettings, train_step

LEARNING_RATE = 1e-4
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def read_arguments() -> argparse.Namespace:
    """The shape to time; the defaults fit a 2-core CPU."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in {
        "hidden": 1024, "intermediate": 2816, "heads": 16, "kv-heads": 4, "vocab": 16000, "draft-vocab": 8000,
        "tokens": 2048, "documents": 4, "steps": 3, "repeats": 3,
    }.items():  # fmt: skip
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--supervised", type=float, default=0.5, help="share of each document's tail, 0..1")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=list(DTYPES), default="fp32")
    parser.add_argument("--peer", help="Python of a virtual environment with speculators")
    return parser.parse_args()


def make_config(arguments: argparse.Namespace) -> DraftConfig:
    """A one-layer draft of the shape asked for."""
    head_dim, rope_theta = arguments.hidden // arguments.heads, 5e5
    sizes = {
        "vocab_size": arguments.vocab,
        "hidden_size": arguments.hidden,
        "intermediate_size": arguments.intermediate,
        "num_hidden_layers": 1,
        "num_attention_heads": arguments.heads,
        "num_key_value_heads": arguments.kv_heads,
        "head_dim": head_dim,
        "rms_norm_eps": 1e-6,
    }
    layer = LayerConfig(
        **sizes,
        initializer_range=0.02,
        rope_frequencies=tuple(rope_theta ** (-i / head_dim) for i in range(0, head_dim, 2)),
        rope_scale=1.0,
        has_qk_norms=False,
        sliding_window=None,
        written={
            "model_type": "llama",
            "hidden_act": "silu",
            "max_position_embeddings": arguments.tokens,
            "rope_parameters": {"rope_type": "default", "rope_theta": rope_theta},
            **sizes,
        },
    )
    return DraftConfig(layer, arguments.draft_vocab, (2, 4, 5), arguments.steps, True, False, False, False, "", ())


def make_bin(arguments: argparse.Namespace) -> PackedBin:
    """Documents of equal length, supervised at their ends."""
    num_tokens, length = arguments.tokens, arguments.tokens // arguments.documents
    index = torch.arange(num_tokens)
    states = torch.randn(num_tokens, 4 * arguments.hidden, generator=torch.Generator().manual_seed(0)).bfloat16()
    return PackedBin(
        number=0,
        row=0,
        num_tokens=num_tokens,
        input_ids=torch.randint(arguments.vocab, (num_tokens,), generator=torch.Generator().manual_seed(1)),
        aux_states=states[:, arguments.hidden :].contiguous(),
        last_state=states[:, : arguments.hidden].contiguous(),
        loss_mask=index % length >= length * (1 - arguments.supervised),
        document_ids=index // length,
        position_ids=index % length + 1,
    )


def needed_flop(arguments: argparse.Namespace) -> float:
    """Floating-point operations of one step's matrix products, forward and backward, that cannot be left out."""
    a, head_dim = arguments, arguments.hidden // arguments.heads
    rows = int(a.tokens * a.supervised)
    keys = 2 * a.kv_heads * head_dim
    # fc, and step-0 keys and values; a row's share of its token in the queries, once for all steps.
    shared = a.tokens * (3 * a.hidden * a.hidden + 2 * a.hidden * keys) + rows * a.hidden * a.hidden
    # The hidden state's share of the queries, output projection, MLP, head; later keys and values.
    of_row = 2 * a.hidden * a.hidden + 3 * a.hidden * a.intermediate + a.hidden * a.draft_vocab
    attention = 2 * a.hidden * (a.tokens / a.documents) / 2
    forward = 2 * (shared + rows * a.steps * (of_row + attention) + rows * (a.steps - 1) * a.hidden * keys)
    return 3 * forward + 2 * rows * a.hidden * a.draft_vocab  # the target's logits are never differentiated


def matmul_flop_per_s(dtype: torch.dtype, device: torch.device, size: int = 2048) -> float:
    """The machine's own rate for a product of two squares, best of five."""
    x = torch.randn(size, size, dtype=dtype, device=device)
    best = float("inf")
    for _ in range(5):
        start = time.perf_counter()
        _ = (x @ x).sum().item()
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best


def time_steps(
    draft: Eagle3Draft, head: TargetHead, packed: PackedBin, settings: StepSettings, repeats: int
) -> dict[str, float]:
    """Speed of the fastest of some steps, after one that is not counted; loss and gradient norm of that one."""
    optimizer = build_optimizer(draft.parameters(), 0.0)
    set_learning_rate(optimizer, LEARNING_RATE)
    resident_bytes = held_bytes(settings.device) + 8 * sum(p.numel() for p in draft.parameters() if p.requires_grad)
    seconds, first = [], {}
    for repeat in range(repeats + 1):
        start = time.perf_counter()
        ready = make_ready(packed, settings.num_ttt_steps, len(draft.layers), settings.device)
        result = train_step(draft, optimizer, head, [ready], 0, settings)
        losses = (result.sums[0] / result.sums[1].clamp(min=1)).tolist()  # waits for the device
        seconds.append(time.perf_counter() - start)
        if repeat == 0:
            first = {"first_loss": sum(losses), "first_grad_norm": result.wait().grad_norm}
    return {
        "tokens_per_s": packed.num_tokens / min(seconds[1:]),
        "memory_above_weights_bytes": peak_memory_bytes(settings.device) - resident_bytes,
        **first,
    }


def held_bytes(device: torch.device) -> int:
    """What weights and inputs take before the first step; the optimizer's two moments come with it."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize()


def run_peer(arguments: argparse.Namespace) -> dict[str, Any]:
    """Return what `peer_step.py` prints of the same step, from weights and bin in files."""
    from safetensors.torch import save_file  # here: without a peer, torch is all that is needed

    packed = make_bin(arguments)
    weights, head_weight = make_weights(arguments)
    verifier = {"verifier_lm_head.weight": head_weight, "verifier_norm.weight": torch.ones(arguments.hidden)}
    names = ("input_ids", "aux_states", "last_state", "loss_mask", "document_ids", "position_ids")
    plan = {**vars(arguments), "layer": dict(make_config(arguments).layer.written), "lr": LEARNING_RATE}
    with tempfile.TemporaryDirectory() as folder:
        save_file({name: getattr(packed, name) for name in names}, f"{folder}/bin.safetensors")
        save_file(weights | verifier, f"{folder}/draft.safetensors")
        Path(folder, "step.json").write_text(json.dumps(plan | {"threads": torch.get_num_threads()}))
        done = subprocess.run(
            [arguments.peer, str(Path(__file__).with_name("peer_step.py")), folder],
            env=os.environ | {"TORCHDYNAMO_DISABLE": "1"},  # its faster setting on CPUs
            stdout=subprocess.PIPE,
            check=True,
        )
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def compare(own: dict[str, float], peer: dict[str, Any], dtype: torch.dtype) -> dict[str, object]:
    """Return ratios of speed and memory, once both are seen to have computed the same."""
    tolerance = 1e-4 if dtype == torch.float32 else 0.05
    for name in ("first_loss", "first_grad_norm"):
        assert abs(own[name] - peer[name]) <= tolerance * abs(peer[name]), (name, own[name], peer[name])
    return {
        "peer": f"speculators {peer['version']}",
        "peer_tokens_per_s": round(peer["tokens_per_s"], 1),
        "times_peer_tokens_per_s": round(own["tokens_per_s"] / peer["tokens_per_s"], 2),
        "peer_memory_above_weights_gib": round(peer["memory_above_weights_bytes"] / 2**30, 2),
        "times_peer_memory": round(own["memory_above_weights_bytes"] / peer["memory_above_weights_bytes"], 2),
    }


def make_weights(arguments: argparse.Namespace) -> tuple[dict[str, Tensor], Tensor]:
    """The draft's random fp32 weights, and those of the verifier's output head: [draft vocabulary, H]."""
    torch.manual_seed(0)
    weights = dict(Eagle3Draft(make_config(arguments)).state_dict())
    return weights, torch.randn(arguments.draft_vocab, arguments.hidden).mul_(0.02)


def run_own(arguments: argparse.Namespace) -> dict[str, float]:
    """Time our step of this shape, in a process group of this process alone; as `time_steps`."""
    device, dtype = torch.device(arguments.device), DTYPES[arguments.dtype]
    weights, head_weight = make_weights(arguments)
    with tempfile.TemporaryDirectory() as folder:
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo",
            init_method=f"file://{folder}/s",
            rank=0,
            world_size=1,
        )
        draft = build_sharded_draft(make_config(arguments), weights, device, dtype)
        head = TargetHead(head_weight.to(device, dtype), torch.ones(arguments.hidden, device=device, dtype=dtype), 1e-6)
        # Without noise, which the peer would draw otherwise.
        settings = StepSettings(arguments.steps, 1.0, 0.0, 0, 1.0, device, dtype)
        own = time_steps(draft, head, make_bin(arguments), settings, arguments.repeats)
        dist.destroy_process_group()
    return own


def device_name(device: torch.device) -> str:
    """The GPU's name, or how many threads the CPU works with."""
    return torch.cuda.get_device_name() if device.type == "cuda" else f"cpu x{torch.get_num_threads()}"


def main() -> None:
    """Time it and print what was seen."""
    arguments = read_arguments()
    device, dtype = torch.device(arguments.device), DTYPES[arguments.dtype]
    own = run_own(arguments)
    rate = matmul_flop_per_s(dtype, device)
    result = {
        "benchmark": "step",
        "date": datetime.date.today().isoformat(),
        "torch": torch.__version__,
        "device": device_name(device),
        **{name: value for name, value in vars(arguments).items() if name not in ("peer", "device")},
        "tokens_per_s": round(own["tokens_per_s"], 1),
        "share_of_matmul_rate": round(needed_flop(arguments) * own["tokens_per_s"] / arguments.tokens / rate, 3),
        "matmul_gflop_per_s": round(rate / 1e9, 1),
        "memory_above_weights_gib": round(own["memory_above_weights_bytes"] / 2**30, 2),
    }
    if arguments.peer:
        result |= compare(own, run_peer(arguments), dtype)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
