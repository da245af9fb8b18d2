"""What is measured, in which unit, and the one place where sums become means.

Ranks add up sums and counts (`TttSums`), never means; `summarize` divides once, just before logging. The
loggers and the README's table both read `METRICS`, so a number cannot be logged without a meaning.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass, fields

import numpy as np
import numpy.typing as npt

from eagle3_ray.intervals import chain_half_widths

TRAIN, VAL = "train", "val"
LEFT_OUT_STEPS = f"{TRAIN}/left_out_steps"


@dataclass(frozen=True)
class Metric:
    """One line of the table.

    Attributes:
        pattern: Name after the prefix; `{k}` stands for a TTT step, 0 <= k < P.
        unit: Unit, or `share` for a number in 0..1.
        meaning: One sentence.
        prefixes: The parts of a run it is measured in.
    """

    pattern: str
    unit: str
    meaning: str
    prefixes: tuple[str, ...]


METRICS = (
    Metric("loss", "nats", "Sum over TTT steps of decay^k * loss_{k}: what training minimises.", (TRAIN, VAL)),
    Metric("loss_{k}", "nats", "Mean over the supervised positions of TTT step k, decay not included.", (TRAIN, VAL)),
    Metric(
        "accuracy_{k}",
        "share",
        "Positions of TTT step k whose drafted token is the one the target distribution ranks first.",
        (TRAIN, VAL),
    ),
    Metric(
        "cond_acc_{k}", "share", "Positions right at TTT step k among those right at every earlier step.", (TRAIN, VAL)
    ),
    Metric("acceptance_{k}", "share", "Positions whose first k+1 drafted tokens are all right.", (VAL,)),
    Metric(
        "acceptance_ci_{k}",
        "share",
        "Half the width of its 95 % interval, by how much it varies from bin to bin.",
        (VAL,),
    ),
    Metric(
        "expected_tokens",
        "tokens",
        "Tokens a greedy chain of P gives per verification: 1 (the verifier's own token) plus, for each j in 1..P, "
        "the share of positions whose first j drafted tokens are all right.",
        (TRAIN, VAL),
    ),
    Metric("expected_tokens_ci", "tokens", "Half the width of its 95 % interval, as above.", (VAL,)),
    Metric("lr", "1", "Learning rate of the step.", (TRAIN,)),
    Metric("grad_norm", "1", "Global gradient norm before clipping.", (TRAIN,)),
    Metric("tokens_per_s", "tokens/s", "Positions trained a second over all workers, padding not counted.", (TRAIN,)),
    Metric("data_wait_frac", "share", "Share of the time that the workers waited for data.", (TRAIN,)),
    Metric("peak_memory_bytes", "bytes", "Most memory one worker's device held (on CPUs: its resident set).", (TRAIN,)),
    Metric("step", "steps", "Optimizer steps so far.", (TRAIN,)),
    Metric(
        "left_out_steps",
        "steps",
        "Those of them left out, as a gradient was NaN or Inf: --on-nonfinite skip.",
        (TRAIN,),
    ),
    Metric("epoch", "epochs", "Passes over the training samples so far.", (TRAIN,)),
    Metric("progress_frac", "share", "Steps done of those after which the run stops.", (TRAIN,)),
)
_NAME_PATTERN = re.compile(
    "|".join(
        f"(?:{'|'.join(metric.prefixes)})/{re.escape(metric.pattern).replace(re.escape('{k}'), '[0-9]+')}"
        for metric in METRICS
    )
)


@dataclass(frozen=True)
class TttSums:
    """Sums over positions, one entry a TTT step; added up over bins, ranks and steps.

    A position is an index of step 0 with its chain of P drafted tokens; a target counts if it is supervised
    and lies in the index's document.

    Attributes:
        loss_sum: [P] float64, loss over the positions whose target k counts, decay not included.
        count: [P] float64, those positions.
        correct: [P] float64, those of them whose drafted token is right.
        prefix_right: [P] float64, positions whose targets 0..k all count and are all right.
        prefix_count: [P] float64, positions whose targets 0..k all count.
        cond_count: [P] float64, positions whose targets 0..k all count and are right in steps 0..k-1.
    """

    loss_sum: npt.NDArray[np.float64]
    count: npt.NDArray[np.float64]
    correct: npt.NDArray[np.float64]
    prefix_right: npt.NDArray[np.float64]
    prefix_count: npt.NDArray[np.float64]
    cond_count: npt.NDArray[np.float64]

    def __add__(self, other: "TttSums") -> "TttSums":
        return TttSums.from_array(self.to_array() + other.to_array())

    def to_array(self) -> npt.NDArray[np.float64]:
        """Return the six sums as one [6, P] float64 array, which one all-reduce can carry."""
        return np.stack(
            [self.loss_sum, self.count, self.correct, self.prefix_right, self.prefix_count, self.cond_count]
        )

    @staticmethod
    def from_array(array: npt.NDArray[np.float64]) -> "TttSums":
        """Read back what `to_array` returned: [6, P] float64."""
        assert array.ndim == 2 and array.shape[0] == len(fields(TttSums)), array.shape
        return TttSums(*array.astype(np.float64))

    @staticmethod
    def zeros(num_ttt_steps: int) -> "TttSums":
        """Return empty sums for P = num_ttt_steps."""
        return TttSums.from_array(np.zeros((len(fields(TttSums)), num_ttt_steps)))


def summarize(sums: TttSums, decay: float, prefix: str) -> dict[str, float]:
    """Turn sums into the means that are logged.

    A mean over no position is left out of the result, and so is `expected_tokens` when one of its terms has
    no position. `loss` takes a step without positions as 0, as training does, and is left out only when no
    step has any.

    Args:
        sums: Over all ranks.
        decay: Step k's loss is weighted by decay**k in `loss`.
        prefix: TRAIN or VAL.

    Returns:
        {"<prefix>/<name>": value} with the names of METRICS.
    """
    assert prefix in (TRAIN, VAL), prefix
    loss_P = _divide(sums.loss_sum, sums.count)
    weight_P = decay ** np.arange(len(loss_P))
    per_step = {
        "loss": loss_P,
        "accuracy": _divide(sums.correct, sums.count),
        "cond_acc": _divide(sums.prefix_right, sums.cond_count),
    }
    values = {f"{prefix}/{name}_{k}": mean for name, means in per_step.items() for k, mean in enumerate(means)}
    values[f"{prefix}/loss"] = np.nansum(weight_P * loss_P) if sums.count.any() else np.nan
    values[f"{prefix}/expected_tokens"] = 1.0 + _divide(sums.prefix_right, sums.prefix_count).sum()
    return {name: float(value) for name, value in values.items() if not np.isnan(value)}


def summarize_spread(moments: npt.NDArray[np.float64]) -> dict[str, float]:
    """Return validation's acceptance [P] and half the widths of its intervals; what has none is left out.

    Args:
        moments: [2P+1, 2P+1] `intervals.cross_moments` of (prefix_right, prefix_count) of all bins.
    """
    right, reached = np.split(moments[-1, :-1], 2)
    half_widths, of_sum = chain_half_widths(moments)
    per_step = {"acceptance": _divide(right, reached), "acceptance_ci": half_widths}
    values = {f"{VAL}/{name}_{k}": float(value) for name, found in per_step.items() for k, value in enumerate(found)}
    values[f"{VAL}/expected_tokens_ci"] = of_sum
    return {name: value for name, value in values.items() if not np.isnan(value)}


def _divide(numerator: npt.NDArray[np.float64], count: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Return numerator / count, NaN where the count is 0."""
    return np.divide(numerator, count, out=np.full(count.shape, np.nan), where=count > 0)


def unknown_names(names: Iterable[str]) -> list[str]:
    """Return the names that are not in METRICS, prefix included."""
    return [name for name in names if not _NAME_PATTERN.fullmatch(name)]


def metrics_table() -> str:
    """Return METRICS as a Markdown table."""
    lines = ["| metric | unit | meaning |", "|---|---|---|"]
    for metric in METRICS:
        names = ", ".join(f"`{prefix}/{metric.pattern}`" for prefix in metric.prefixes)
        lines.append(f"| {names} | {metric.unit} | {metric.meaning} |")
    return "\n".join(lines) + "\n"
