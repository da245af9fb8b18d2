"""Small sample files for tests: good ones in both formats, and one bad file of every kind."""

import io
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from eagle3_ray.data.samples import SampleSpec

HIDDEN_SIZE = 16
NUM_AUX_LAYERS = 3
VOCAB_SIZE = 50


def make_spec(data_format_version: int = 1, **changes: Any) -> SampleSpec:
    """The spec that `make_content` fulfils."""
    fields: dict[str, Any] = {
        "data_format_version": data_format_version,
        "hidden_size": HIDDEN_SIZE,
        "num_aux_layers": NUM_AUX_LAYERS,
        "vocab_size": VOCAB_SIZE,
        "final_norm_weight": make_norm_weight(),
        "rms_norm_eps": 1e-5,
    }
    return SampleSpec(**(fields | changes))


def make_norm_weight(hidden_size: int = HIDDEN_SIZE) -> Tensor:
    """A final norm's factor [H] float32, in 0.5..1.5, exact in bfloat16."""
    return torch.linspace(0.5, 1.5, hidden_size).bfloat16().float()


def normed(last_state: Tensor, weight: Tensor) -> Tensor:
    """RMSNorm as verifiers compute it, in the state's dtype."""
    x = last_state.float()
    x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-5)
    return x.to(last_state.dtype) * weight.to(last_state.dtype)


def make_content(
    num_tokens: int = 20,
    data_format_version: int = 1,
    seed: int = 0,
    hidden_size: int = HIDDEN_SIZE,
    num_aux_layers: int = NUM_AUX_LAYERS,
    vocab_size: int = VOCAB_SIZE,
    num_prompt_tokens: int = 4,
    dtype: torch.dtype = torch.bfloat16,
) -> dict[str, Any]:
    """The dict of a sample file; both formats of one seed hold the same conversation."""
    generator = torch.Generator().manual_seed(seed)
    input_ids = torch.randint(vocab_size, (num_tokens,), generator=generator)
    loss_mask = (torch.arange(num_tokens) >= num_prompt_tokens).to(torch.int64)
    states = [
        3 * torch.randn(num_tokens, hidden_size, generator=generator).to(dtype) for _ in range(num_aux_layers + 1)
    ]
    if data_format_version == 1:
        return {"input_ids": input_ids, "loss_mask": loss_mask, "hidden_states": states}
    return {
        "input_ids": input_ids,
        "loss_mask": loss_mask,
        "hidden_state": torch.cat(states[:-1], dim=1),
        "target": normed(states[-1], make_norm_weight(hidden_size)),
    }


def write_sample(path: Path, num_tokens: int = 20, data_format_version: int = 1, seed: int = 0, **changes: Any) -> Path:
    """Write a good sample; `changes` go to `make_content`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(make_content(num_tokens, data_format_version, seed, **changes), path)
    return path


def write_samples(folder: Path, lengths: list[int], data_format_version: int = 1, **changes: Any) -> Path:
    """Write one sample of each length as `data_<number>.pt`, with the number as its seed."""
    for number, num_tokens in enumerate(lengths):
        write_sample(folder / f"data_{number}.pt", num_tokens, data_format_version, seed=number, **changes)
    return folder


def _v1_bytes(**changes: Any) -> bytes:
    return saved_bytes(make_content() | changes)


def saved_bytes(content: object, zipped: bool = True) -> bytes:
    """What torch.save writes."""
    buffer = io.BytesIO()
    torch.save(content, buffer, _use_new_zipfile_serialization=zipped)
    return buffer.getvalue()


def _states(**changes: Tensor) -> list[Tensor]:
    """Hidden states of `make_content()` with some replaced, by names `s0`, `s1`, ..."""
    states: list[Tensor] = make_content()["hidden_states"]
    return [changes.get(f"s{number}", state) for number, state in enumerate(states)]


def _with_nan() -> Tensor:
    state = make_content()["hidden_states"][-1].clone()
    state[0, 3] = float("nan")
    return state


class _Unloadable:
    """A Python object, which weights_only loading refuses."""


# Each writes one bad file, given that v1 samples as `make_spec()` says were asked for.
BAD_FILES: dict[str, Callable[[], bytes]] = {
    "empty": lambda: b"",
    "cut_short": lambda: _v1_bytes()[: len(_v1_bytes()) // 2],
    "text": lambda: b"{'input_ids': [1, 2, 3]}\n" * 20,
    "legacy_torch": lambda: saved_bytes(make_content(), zipped=False),
    "pickle": lambda: pickle.dumps({"input_ids": [1, 2, 3]}),
    "python_objects": lambda: saved_bytes({"input_ids": _Unloadable()}),
    "list": lambda: saved_bytes([torch.ones(3)]),
    "other_keys": lambda: saved_bytes({"input_ids": torch.ones(3, dtype=torch.int64)}),
    "v0_sample": lambda: saved_bytes(make_content(data_format_version=0)),
    "specforge": lambda: saved_bytes(
        {
            "input_ids": make_content()["input_ids"],
            "loss_mask": make_content()["loss_mask"],
            "hidden_state": torch.ones(1, 20, HIDDEN_SIZE),
            "aux_hidden_state": torch.ones(1, 20, 3 * HIDDEN_SIZE),
        }
    ),
    "stacked_states": lambda: _v1_bytes(hidden_states=torch.stack(_states())),
    "too_few_layers": lambda: _v1_bytes(hidden_states=_states()[1:]),
    "other_hidden_size": lambda: saved_bytes(make_content(hidden_size=24)),
    "shorter_mask": lambda: _v1_bytes(loss_mask=torch.ones(19, dtype=torch.int64)),
    "shorter_state": lambda: _v1_bytes(hidden_states=_states(s2=torch.ones(19, HIDDEN_SIZE))),
    "batched_ids": lambda: _v1_bytes(input_ids=torch.zeros(1, 20, dtype=torch.int64)),
    "float_ids": lambda: _v1_bytes(input_ids=torch.zeros(20)),
    "no_token": lambda: saved_bytes(make_content(num_tokens=0)),
    "id_too_large": lambda: _v1_bytes(input_ids=torch.full((20,), VOCAB_SIZE)),
    "negative_id": lambda: _v1_bytes(input_ids=torch.full((20,), -1)),
    "mask_of_twos": lambda: _v1_bytes(loss_mask=torch.full((20,), 2)),
    "nan": lambda: _v1_bytes(hidden_states=_states(s3=_with_nan())),
    "normed": lambda: _v1_bytes(hidden_states=_states(s3=normed(_states()[3], make_norm_weight()))),
    "token_freq": lambda: saved_bytes({3: 10, 7: 1}),
}


def write_bad_file(path: Path, kind: str) -> Path:
    """Write the bad file of a kind of `BAD_FILES`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(BAD_FILES[kind]())
    return path
