"""Token ids -> the verifier's states, in padded batches, the same as if each sample were computed alone.

What is kept of one forward pass of a verifier with n layers, for auxiliary ids k1, k2, ...:

    embed -> [layer 0] -> ... -> [layer k1] -> ... -> [layer n-1] -> [final norm] -> lm_head (not run)
                                ^ state k1                          ^ last state
                                = outputs.hidden_states[k1]         (outputs.hidden_states[n] is normed: of no use)

Both are taken by hooks on what *enters* a module. Where the hooks belong is found by the modules' names and then
proved on a few tokens, since a wrong place would train without any visible error.

Shapes: B samples a batch, L tokens of the longest, S tokens of one sample, H hidden size.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

from eagle3_ray.errors import ClusterError, VerifierError
from eagle3_ray.generation.verifier_copy import local_verifier
from eagle3_ray.model.verifier import VerifierInfo, read_shard_index

STORED_DTYPE = torch.bfloat16
LAYER_LIST_NAMES = ("layers", "h")
FINAL_NORM_NAMES = ("norm", "final_layernorm", "ln_f")
NUM_PROBE_TOKENS = 4
LOAD_ERRORS = (OSError, ValueError, RuntimeError, ImportError, SafetensorError)


def plan_batches(num_tokens: NDArray[np.int64], batch_tokens: int) -> list[NDArray[np.int64]]:
    """Group samples of similar length, so that little of a padded batch is padding.

    Args:
        num_tokens: [n] tokens of each sample, at least 1.
        batch_tokens: most tokens of a batch, padding included; a longer sample is a batch of its own.

    Returns:
        Sample numbers of each batch, longest first: a batch that is too big for the device fails at once.
    """
    order = np.argsort(-num_tokens, kind="stable")
    batches, first = [], 0
    while first < len(order):
        num_samples = max(batch_tokens // int(num_tokens[order[first]]), 1)
        batches.append(order[first : first + num_samples])
        first += num_samples
    return batches


class CapturingVerifier:
    """A verifier's decoder without its head, with hooks that keep the states asked for.

    Attributes:
        captured: of the last pass: id -> [B, L, H] what entered that layer; by the number of layers, the last state.
        final_norm: the decoder's.
    """

    def __init__(self, name: str, decoder: nn.Module, aux_layer_ids: Sequence[int], num_layers: int) -> None:
        """Hook the decoder and prove on a few tokens that the hooks sit where they should.

        Args:
            name: the verifier, for errors.
            decoder: transformers' base model, in eval mode.
            aux_layer_ids: distinct ids in 0..num_layers, in the order in which states are stored.
            num_layers: decoder layers, n.

        Raises:
            VerifierError: Layers or final norm are not found, or the proof fails.
        """
        self._name = name
        self._decoder = decoder
        self._aux_layer_ids = tuple(aux_layer_ids)
        self._num_layers = num_layers
        self.captured: dict[int, Tensor] = {}
        layers = _find_child(name, decoder, LAYER_LIST_NAMES, "list of decoder layers")
        if not isinstance(layers, nn.ModuleList) or len(layers) != num_layers:
            raise VerifierError(
                f"{name}: its config says {num_layers} layers; {type(decoder).__name__} has another list of them."
            )
        norm = _find_child(name, decoder, FINAL_NORM_NAMES, "final norm")
        self.final_norm = norm
        entered = {layer_id: layers[layer_id] for layer_id in self._aux_layer_ids if layer_id < num_layers}
        for layer_id, module in {**entered, num_layers: norm}.items():  # what enters "layer n" is the last state
            module.register_forward_pre_hook(self._make_hook(layer_id), with_kwargs=True)
        self._check_hooks(norm)

    @property
    def device(self) -> torch.device:
        """Where the decoder is."""
        return next(self._decoder.parameters()).device

    def compute_states(self, names: Sequence[str], samples: Sequence[Tensor]) -> list[list[Tensor]]:
        """Run one padded batch.

        Padding is on the right, masked, and positions count from 0 in every sample: a causal model then computes
        for a sample what it would compute alone, up to the rounding of its dtype.

        Args:
            names: what an error calls each sample.
            samples: B tensors [S] int64 on the CPU, S >= 1.

        Returns:
            For each sample A+1 tensors [S, H] bfloat16 on the CPU, each with storage of its own: the auxiliary states
            in the order of `aux_layer_ids`, then the state before the final norm.

        Raises:
            VerifierError: A state is NaN or infinite.
            ClusterError: The batch does not fit into the device's memory.
        """
        num_tokens = torch.tensor([len(sample) for sample in samples])
        input_ids = nn.utils.rnn.pad_sequence(list(samples), batch_first=True, padding_value=0)
        is_token = torch.arange(input_ids.shape[1]) < num_tokens[:, None]
        try:
            self._forward(input_ids, is_token)
            states = [self.captured[i].to(STORED_DTYPE) for i in (*self._aux_layer_ids, self._num_layers)]
            bad = torch.stack([~state.isfinite().all(dim=-1) for state in states]).cpu() & is_token  # sync: [A+1, B, L]
        except torch.OutOfMemoryError as error:
            raise ClusterError(
                f"{self._name}: a padded batch of {len(samples)} x {input_ids.shape[1]} tokens does not fit into "
                f"the memory of {self.device}. Lower --batch-tokens, and --max-seq-len if the batch is a single sample."
            ) from error
        finally:
            self.captured.clear()
        if bool(bad.any()):
            number, sample, token = (int(i) for i in bad.nonzero()[0])
            state_name = (
                "the last state" if number == len(self._aux_layer_ids) else f"state {self._aux_layer_ids[number]}"
            )
            raise VerifierError(
                f"{names[sample]}: {self._name} computes NaN or Inf in {state_name} at token {token}. Try "
                "--precision fp32; if that does not help, the verifier's weights are damaged."
            )
        states = [state.cpu() for state in states]
        # clone: a slice would drag the storage of the whole batch into its file
        return [[state[row, :length].clone() for state in states] for row, length in enumerate(num_tokens.tolist())]

    def _make_hook(self, layer_id: int) -> Callable[..., None]:
        def keep_input(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            self.captured[layer_id] = args[0] if args else kwargs["hidden_states"]

        return keep_input

    @torch.inference_mode()
    def _forward(self, input_ids: Tensor, is_token: Tensor, output_hidden_states: bool = False) -> Any:
        """Run the decoder on [B, L] ids; the hooks keep what was asked for."""
        self.captured.clear()
        positions = torch.arange(input_ids.shape[1], device=self.device).expand(input_ids.shape)
        return self._decoder(
            input_ids=input_ids.to(self.device),
            attention_mask=is_token.to(self.device, torch.int64),
            position_ids=positions,
            use_cache=False,
            output_hidden_states=output_hidden_states,
        )

    def _check_hooks(self, norm: nn.Module) -> None:
        """Compare what the hooks keep with transformers' own account of the same pass."""
        input_ids = torch.arange(NUM_PROBE_TOKENS)[None]
        outputs = self._forward(input_ids, torch.ones_like(input_ids, dtype=torch.bool), output_hidden_states=True)
        expected, captured = outputs.hidden_states, dict(self.captured)
        with torch.inference_mode():
            normed = norm(captured[self._num_layers])
        self.captured.clear()
        wrong = [i for i in self._aux_layer_ids if i < self._num_layers and not _same(captured[i], expected[i])]
        if wrong or len(expected) != self._num_layers + 1:
            raise VerifierError(
                f"{self._name}: the states entering layers {wrong or 'of its decoder'} are not transformers' "
                f"hidden_states of the same numbers; {type(self._decoder).__name__} is not supported."
            )
        if not _same(normed, outputs.last_hidden_state):
            raise VerifierError(
                f"{self._name}: its final norm does not give last_hidden_state, so the state before the norm is not "
                f"known; {type(self._decoder).__name__} is not supported."
            )


def load_verifier(
    info: VerifierInfo, aux_layer_ids: Sequence[int], device: str, dtype: torch.dtype, trust_remote_code: bool
) -> CapturingVerifier:
    """Load a verifier onto one device; its head is dropped.

    Arguments as in `load_model` and `CapturingVerifier`.

    Raises:
        VerifierError: It cannot be loaded, weights are missing, or its states cannot be taken.
        ClusterError: It does not fit into the device's memory.
        StorageError: It lies on an object store that cannot be read.
    """
    _, decoder = load_model(info, device, dtype, trust_remote_code, with_head=False)
    return CapturingVerifier(info.name_or_path, decoder, aux_layer_ids, info.num_layers)


def load_model(
    info: VerifierInfo, device: str, dtype: torch.dtype, trust_remote_code: bool, *, with_head: bool
) -> tuple[Any, nn.Module]:
    """Load a verifier onto one device.

    Args:
        info: which one.
        device: "cpu" or "cuda".
        dtype: of weights and computation.
        trust_remote_code: run Python code that comes with it.
        with_head: all of it is needed; else its decoder alone is moved to the device.

    Returns:
        transformers' model, and in it the decoder: layers and final norm, without a head.

    Raises:
        VerifierError: It cannot be loaded, or weights are missing.
        ClusterError: It does not fit into the device's memory.
        StorageError: It lies on an object store that cannot be read.
    """
    read_shard_index(info.name_or_path)  # refuses files outside the folder, which transformers would read
    try:
        path = local_verifier(info.name_or_path, with_weights=True)
        config = AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code)
        # A multimodal class is not listed among those of plain text, though it computes text as well.
        is_plain = type(config) in AutoModelForCausalLM._model_mapping or hasattr(config, "auto_map")
        auto_class: Any = AutoModelForCausalLM if is_plain else AutoModelForImageTextToText
        model, report = auto_class.from_pretrained(
            path, dtype=dtype, trust_remote_code=trust_remote_code, output_loading_info=True
        )
        decoder = _decoder_of(model)
        (model if with_head else decoder).eval().to(device)
    except torch.OutOfMemoryError as error:
        raise ClusterError(
            f"{info.name_or_path}: the verifier in {dtype} does not fit into the memory of one {device} device. "
            "Use bigger GPUs; a verifier spread over several is not supported."
        ) from error
    except LOAD_ERRORS as error:
        raise VerifierError(f"{info.name_or_path}: transformers cannot load the verifier: {error}") from error
    missing = sorted(name for name in report["missing_keys"] if with_head or not name.startswith("lm_head."))
    if missing:
        raise VerifierError(
            f"{info.name_or_path}: {len(missing)} tensors of the verifier are not in its files: "
            f"{', '.join(missing[:5])}{', ...' if len(missing) > 5 else ''}. "
            "The folder must hold the verifier's full weights."
        )
    return model, decoder


def _decoder_of(model: Any) -> nn.Module:
    """Return the base model of the language part: layers and final norm, without a head."""
    decoder: nn.Module = model.get_decoder()
    # Llama 4 gives its language model with the head on.
    children = dict(decoder.named_children())
    return children["model"] if "lm_head" in children and "model" in children else decoder


def _find_child(name: str, decoder: nn.Module, child_names: Sequence[str], what: str) -> nn.Module:
    children = dict(decoder.named_children())
    for child_name in child_names:
        if child_name in children:
            return children[child_name]
    raise VerifierError(
        f"{name}: no {what} in {type(decoder).__name__} (looked for {', '.join(child_names)}; it has "
        f"{', '.join(children)}). This architecture is not supported."
    )


def _same(a: Tensor, b: Tensor) -> bool:
    """Compare exactly; NaN equals NaN, as damaged weights are found, and named, in the samples."""
    return a.shape == b.shape and torch.allclose(a, b, rtol=0, atol=0, equal_nan=True)
