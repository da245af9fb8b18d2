"""One `.pt` file -> `Sample`: whatever the format, the same fields, every tensor checked.

The formats differ in names and in the last hidden state: v1 holds it before the verifier's final norm, v0 after
it. Training on one as if it were the other shows no error, but `is_normed` can tell them apart exactly.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NoReturn

import torch
from torch import Tensor

from eagle3_ray.data.bad_files import BadFile
from eagle3_ray.data.sample_file import TOKEN_FREQUENCIES, Problem, read_sample_file
from eagle3_ray.errors import SampleFormatError

WHOLE_NUMBERS = frozenset({torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64})
FLOATS = frozenset({torch.bfloat16, torch.float16, torch.float32, torch.float64})
MAX_PROBES = 16
MIN_PROBES_TO_CALL_NORMED = 4  # one or two positions of an un-normed state can have rms(y / w) near 1 by chance
NORMED_TOLERANCE = 0.02  # bf16 rounds x / rms(x) and its product with w (0.4 % together); the rest is for the epsilon


@dataclass(frozen=True)
class SampleSpec:
    """What the samples of a run must look like.

    Attributes:
        data_format_version: 0 or 1, see `sample_file`.
        hidden_size: H, width of the verifier's hidden state.
        num_aux_layers: A, auxiliary layers stored beside the last hidden state.
        vocab_size: W; every id lies in [0, W).
        final_norm_weight: [H] float32, the factor of the verifier's final norm; None leaves out the check whether
            last states are normed.
        rms_norm_eps: the final norm's epsilon.
    """

    data_format_version: int
    hidden_size: int
    num_aux_layers: int
    vocab_size: int
    final_norm_weight: Tensor | None
    rms_norm_eps: float


@dataclass(frozen=True)
class Sample:
    """One conversation of S tokens. The states are views on the memory-mapped file, not copies.

    Attributes:
        path: the file.
        input_ids: [S] int64, in [0, W).
        loss_mask: [S] bool, True where the token is supervised.
        aux_states: A tensors [S, H] (v1) or one [S, A*H] (v0), in layer order.
        last_state: [S, H], before (v1) or after (v0) the verifier's final norm.
    """

    path: str
    input_ids: Tensor
    loss_mask: Tensor
    aux_states: tuple[Tensor, ...]
    last_state: Tensor


class NotASample(SampleFormatError):
    """A `.pt` file with token frequencies, which often lies beside the samples."""


def read_sample(path: str, spec: SampleSpec) -> Sample:
    """Read one sample; check keys, shapes, dtypes, ids, and whether the last state is normed as its format says.

    Args:
        path: a `.pt` file, local or on an object store.
        spec: what it must look like.

    Returns:
        The sample; a local file's states stay on disk until they are used.

    Raises:
        StorageError: The object store cannot be read.
        NotASample: The file holds token frequencies.
        SampleFormatError: The file is not a sample of the format asked for; the message lists every problem.
    """
    sample = _inspect(path, spec, None)
    return sample if isinstance(sample, Sample) else raise_bad_file(to_bad_file(path, sample))


def scan_sample(path: str, spec: SampleSpec) -> Sample | list[Problem]:
    """Return the sample, or all that is wrong with it, in whichever state it is. Reads all of it.

    Arguments as in `read_sample`.
    """
    sample = _inspect(path, spec, None)
    return (_problems_of_all_values(sample) or sample) if isinstance(sample, Sample) else sample


def inspect_sample(path: str, spec: SampleSpec) -> Sample | list[Problem]:
    """Return the sample, or all that is wrong with it. Arguments as in `read_sample`.

    From an object store only what is looked at here is fetched; the states of the sample are not to be used.
    """
    return _inspect(path, spec, _probed_rows)


def _inspect(path: str, spec: SampleSpec, rows_of: Callable[[int], Sequence[int]] | None) -> Sample | list[Problem]:
    content = read_sample_file(path, spec.data_format_version, rows_of)
    if isinstance(content, Problem):
        return [content]
    problems = _problems_of_tokens(content, spec.vocab_size)
    if spec.data_format_version == 1:
        states, widths, state_problems = _states_of_v1(content, spec)
    else:
        states = {"hidden_state": content["hidden_state"], "target": content["target"]}
        widths, state_problems = [spec.num_aux_layers * spec.hidden_size, spec.hidden_size], []
    problems += state_problems or _problems_of_states(states, widths, content["input_ids"], spec.hidden_size)
    if problems:
        return problems
    *aux_states, last_state = (state for state in states.values() if isinstance(state, Tensor))
    problems = _problems_of_values(states, last_state, spec)
    if problems:
        return problems
    input_ids, loss_mask = _tokens(content)
    return Sample(path, input_ids, loss_mask, tuple(aux_states), last_state)


def inspect_tokens(path: str, data_format_version: int, vocab_size: int) -> tuple[Tensor, Tensor] | list[Problem]:
    """Read ids and mask only, for counting: needs no hidden size and touches no state.

    Args:
        path: a `.pt` file, local or on an object store.
        data_format_version: 0 or 1.
        vocab_size: W.

    Returns:
        (input_ids [S] int64, loss_mask [S] bool), or all that is wrong with them.
    """
    content = read_sample_file(path, data_format_version, lambda _: ())
    if isinstance(content, Problem):
        return [content]
    return _problems_of_tokens(content, vocab_size) or _tokens(content)


def describe_problems(problems: list[Problem]) -> str:
    """Return one text for all problems of a file: what was found, what was expected, what to do."""
    advice = " ".join(dict.fromkeys(problem.advice for problem in problems))
    if len(problems) == 1:
        return f"{problems[0].detail} {advice}"
    return "\n  ".join([f"{len(problems)} problems:", *(f"- {problem.detail}" for problem in problems), advice])


def check_finite(sample: Sample) -> None:
    """Refuse a sample with NaN or Inf in any state. Reads all of it.

    Raises:
        SampleFormatError: Names the tensor and the first bad token.
    """
    problems = _problems_of_all_values(sample)
    if problems:
        raise_bad_file(to_bad_file(sample.path, problems))


def to_bad_file(path: str, problems: list[Problem]) -> BadFile:
    """Return a file's problems in words."""
    return BadFile(path, tuple(sorted({problem.kind for problem in problems})), describe_problems(problems))


def raise_bad_file(file: BadFile) -> NoReturn:
    """Raise the error of a file.

    Raises:
        NotASample: The file holds token frequencies.
        SampleFormatError: It is no sample for another reason.
    """
    kind = NotASample if file.kinds == (TOKEN_FREQUENCIES,) else SampleFormatError
    raise kind(f"{file.path}: {file.text}")


def is_normed(last_state: Tensor, weight: Tensor) -> bool:
    """Tell whether a last hidden state has already been through the verifier's final RMSNorm.

    A normed state is y = w * x / rms(x), so rms(y / w) is 1 at every position; for an un-normed one it is not.

    Args:
        last_state: [S, H], any float dtype, S >= 1; at most 16 evenly spaced positions are read.
        weight: [H] float32 without zeros, the final norm's factor.
    """
    ratio = (last_state[_probed_rows(len(last_state))].float() / weight).square().mean(dim=1).sqrt()
    return bool(((ratio - 1).abs() <= NORMED_TOLERANCE).all())


def _probed_rows(num_tokens: int) -> list[int]:
    """Return at most 16 evenly spaced positions, the first and the last among them."""
    num_probes = min(num_tokens, MAX_PROBES)
    return [round(i * (num_tokens - 1) / max(num_probes - 1, 1)) for i in range(num_probes)]


def _tokens(content: dict[str, object]) -> tuple[Tensor, Tensor]:
    input_ids, loss_mask = content["input_ids"], content["loss_mask"]
    assert isinstance(input_ids, Tensor) and isinstance(loss_mask, Tensor)
    return input_ids.to(torch.int64), loss_mask.to(torch.bool)


def _shape(value: object) -> str:
    return f"{value.dtype} {list(value.shape)}" if isinstance(value, Tensor) else f"a {type(value).__name__}"


def _problems_of_tokens(content: dict[str, object], vocab_size: int) -> list[Problem]:
    input_ids, loss_mask = content["input_ids"], content["loss_mask"]
    problems = []
    for name, value in (("input_ids", input_ids), ("loss_mask", loss_mask)):
        if not (isinstance(value, Tensor) and value.dtype in WHOLE_NUMBERS and value.dim() == 1 and len(value) > 0):
            detail = f"{name} is {_shape(value)}, expected whole numbers [S] with S >= 1."
            problems.append(Problem("another shape or dtype", detail))
    if problems:
        return problems
    assert isinstance(input_ids, Tensor) and isinstance(loss_mask, Tensor)
    if len(loss_mask) != len(input_ids):
        problems.append(_problem_of_length("loss_mask", len(loss_mask), len(input_ids)))
    low, high = int(input_ids.min()), int(input_ids.max())
    if low < 0 or high >= vocab_size:
        detail = f"input_ids go from {low} to {high}, the verifier's vocabulary is 0..{vocab_size - 1}."
        advice = "Use the verifier the file was made with, or regenerate it."
        problems.append(Problem("ids outside the vocabulary", detail, advice))
    if loss_mask.dtype != torch.bool and (int(loss_mask.min()) < 0 or int(loss_mask.max()) > 1):
        found = f"loss_mask goes from {int(loss_mask.min())} to {int(loss_mask.max())}"
        problems.append(Problem("a loss mask that is not 0 or 1", f"{found}, expected 0 and 1."))
    return problems


def _states_of_v1(content: dict[str, object], spec: SampleSpec) -> tuple[dict[str, object], list[int], list[Problem]]:
    """Return named states, their expected widths, and what is wrong with the list itself."""
    states, num_expected = content["hidden_states"], spec.num_aux_layers + 1
    widths = [spec.hidden_size] * num_expected
    if not isinstance(states, list | tuple):
        detail = (
            f"hidden_states is {_shape(states)}, expected a list of {num_expected} tensors [S, {spec.hidden_size}]."
        )
        return {}, widths, [Problem("another shape or dtype", detail)]
    if len(states) != num_expected:
        detail = (
            f"hidden_states holds {len(states)} tensors, expected {num_expected}: "
            f"{spec.num_aux_layers} auxiliary layers and the last hidden state."
        )
        advice = "Give --aux-layer-ids as the file was made, or regenerate it."
        return {}, widths, [Problem("another number of layers", detail, advice)]
    return {f"hidden_states[{number}]": state for number, state in enumerate(states)}, widths, []


def _problem_of_length(name: str, num_tokens: int, num_ids: int) -> Problem:
    detail = f"{name} has {num_tokens} tokens, input_ids has {num_ids}; all tensors of a sample must have one length."
    return Problem("lengths that differ", detail)


def _problems_of_states(
    states: dict[str, object], widths: list[int], input_ids: object, hidden_size: int
) -> list[Problem]:
    """Check dtype and shape of each state against its expected width and the number of ids."""
    problems = []
    wrong_widths: dict[tuple[int, int], list[str]] = {}
    for (name, state), width in zip(states.items(), widths, strict=True):
        if not (isinstance(state, Tensor) and state.dtype in FLOATS and state.dim() == 2):
            detail = f"{name} is {_shape(state)}, expected floats [S, {width}]."
            problems.append(Problem("another shape or dtype", detail))
            continue
        if isinstance(input_ids, Tensor) and input_ids.dim() == 1 and len(state) != len(input_ids):
            problems.append(_problem_of_length(name, len(state), len(input_ids)))
        if state.shape[1] != width:
            wrong_widths.setdefault((state.shape[1], width), []).append(name)
    if wrong_widths:
        found = [f"{', '.join(names)}: width {got}, expected {want}" for (got, want), names in wrong_widths.items()]
        detail = f"{'; '.join(found)} (the verifier's hidden size is {hidden_size})."
        advice = "Use the verifier the file was made with, or regenerate it."
        problems.append(Problem("another hidden size", detail, advice))
    return problems


def _problems_of_values(states: dict[str, object], last_state: Tensor, spec: SampleSpec) -> list[Problem]:
    """Look at a few rows of the last state: are they finite, and normed if and only if the format says so?"""
    name = list(states)[-1]
    rows = _probed_rows(len(last_state))
    finite = torch.isfinite(last_state[rows]).all(dim=1).tolist()
    if not all(finite):
        token = rows[finite.index(False)]
        return [Problem("NaN or Inf", f"{name} has NaN or Inf at token {token}; all states must be finite.")]
    weight = spec.final_norm_weight
    if weight is None or bool((weight == 0).any()):  # a channel times 0 is lost: rms(y / w) is unknown
        return []
    normed = is_normed(last_state, weight)
    if spec.data_format_version == 1 and normed and len(rows) >= MIN_PROBES_TO_CALL_NORMED:
        detail = (
            f"{name} has already been through the verifier's final norm (rms(state / norm weight) is 1 at all "
            f"{len(rows)} tokens looked at); a v1 sample holds it before that norm."
        )
        advice = "Regenerate the file with the last layer's own output as its last state."
        return [Problem("a last state that is normed", detail, advice)]
    if spec.data_format_version == 0 and not normed:
        detail = (
            f"{name} has not been through this verifier's final norm (rms(state / norm weight) is not 1 at all "
            f"{len(rows)} tokens looked at); a v0 sample holds it after that norm."
        )
        advice = "Use the verifier the file was made with, or regenerate it as v1."
        return [Problem("a last state that is not normed", detail, advice)]
    return []


def _problems_of_all_values(sample: Sample) -> list[Problem]:
    states = (*sample.aux_states, sample.last_state)
    for number, state in enumerate(states):
        # Smallest and largest value carry every NaN and Inf; isfinite on all of it would take fifty times as long.
        if bool(torch.isfinite(torch.stack(state.aminmax())).all()):
            continue
        bad = ~torch.isfinite(state).all(dim=1)
        name = "the last hidden state" if number == len(states) - 1 else f"auxiliary state {number}"
        where = f"at {int(bad.sum())} of {len(bad)} tokens, first at token {int(bad.int().argmax())}"
        return [Problem("NaN or Inf", f"{name} has NaN or Inf {where}; all states must be finite.")]
    return []
