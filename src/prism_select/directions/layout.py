"""Layout: which direction is which, and the columns of scores.parquet that their scores make.

    directions    target 1 … target n │ chosen half (or with `best` one for each target) │ dampings

    score           mean over the targets, or with `best` the highest of them
    score_chosen    along the chosen half, or with `best` that of the highest target
    score_rejected  score_chosen − score
    score_cosine    score / (‖∇loglik of the row‖ · ‖direction‖), joined over targets likewise

Choices made here:
- the order of the directions stands in this file alone; engines know numbers, not names;
- the rejected half is a difference, so the halves add up to the score to the last bit.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

__all__ = ["DirectionLayout", "Floats"]

Floats: TypeAlias = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class DirectionLayout:
    """`targets` are names, "" for the only one. `lengths` are the norms of their directions.
    Without `halves` no score of the chosen half is taken. `dampings` are those that are compared
    with the first."""

    targets: Sequence[str] = ("",)
    lengths: Sequence[float] = (1.0,)
    best: bool = False
    halves: bool = True
    dampings: Sequence[float] = ()

    def columns(self, values: Floats, norms: Floats | None) -> dict[str, Any]:
        """Columns of `scores.parquet`. `values[row, direction]` are scores along every direction,
        `norms[row]` the norms of the rows' own gradients."""
        targets, halves, dampings = self._split(values)
        highest = targets.argmax(1)[:, None]
        columns: dict[str, Any] = {"score": self._joined(targets, highest)}
        if self.halves:
            chosen = np.take_along_axis(halves, highest, 1)[:, 0] if self.best else halves[:, 0]
            columns["score_chosen"] = chosen
            columns["score_rejected"] = chosen - columns["score"]
        columns |= {f"score:{name}": targets[:, k] for k, name in enumerate(self.targets) if name}
        columns |= {f"score_damping_{v:g}": dampings[:, k] for k, v in enumerate(self.dampings)}
        if norms is not None:
            cosines = targets / np.array(self.lengths) / np.where(norms > 0, norms, 1)[:, None]
            columns["gradient_norm"] = norms
            columns["score_cosine"] = self._joined(cosines, cosines.argmax(1)[:, None])
        return columns

    def _split(self, values: Floats) -> Sequence[Floats]:
        """Scores along the targets, along the chosen halves, and with the other dampings."""
        count = len(self.targets)
        halves = self.halves * (count if self.best else 1)
        return np.split(values, [count, count + halves], axis=1)

    def _joined(self, values: Floats, highest: NDArray[np.int64]) -> Floats:
        """[row, target] → [row]"""
        return np.take_along_axis(values, highest, 1)[:, 0] if self.best else values.mean(1)
