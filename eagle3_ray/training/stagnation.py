"""For how many epochs validation has not improved. Each checkpoint holds the count, for a run to go on with."""

from collections.abc import Mapping
from typing import NamedTuple

BEST_METRIC = "val/expected_tokens"


class Stagnation(NamedTuple):
    """How validation has gone so far.

    Attributes:
        best_expected_tokens: The most of any epoch; None before the first.
        num_epochs: Validated since then.
    """

    best_expected_tokens: float | None = None
    num_epochs: int = 0

    def after(self, validation: Mapping[str, float]) -> "Stagnation":
        """Return what it is after another epoch; the same if that was not validated."""
        found = validation.get(BEST_METRIC)
        if found is None:
            return self
        if self.best_expected_tokens is None or found > self.best_expected_tokens:
            return Stagnation(found)
        return self._replace(num_epochs=self.num_epochs + 1)

    def is_over(self, most_epochs: int | None) -> bool:
        """Tell whether it has lasted for so many epochs; never for None."""
        return most_epochs is not None and self.num_epochs >= most_epochs


NOT_VALIDATED = Stagnation()
