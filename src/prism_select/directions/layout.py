"""TODO."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from prism_select.core.statistics import standard_error

__all__ = ["DirectionLayout", "Floats"]

Floats: TypeAlias = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class DirectionLayout:
    """What the directions of an engine are, in this order: of the scores of each target, of the
    chosen halves (one, or one for each target where the best is taken), of groups of the pairs, and
    of other dampings."""

    targets: Sequence[str] = ("",)
    lengths: Sequence[float] = (1.0,)  # of each target's direction
    best: bool = False
    halves: bool = True  # without them there is no chosen half
    groups: Sequence[int] = ()  # pairs in each
    dampings: Sequence[float] = ()

    def columns(self, values: Floats, norms: Floats | None) -> dict[str, Any]:
        """Columns of `scores.parquet` from the scores of some rows along every direction."""
        count = len(self.targets)
        each, rest = values[:, :count], values[:, count:]
        chosen, rest = np.split(rest, [self.halves * (count if self.best else 1)], axis=1)
        groups, dampings = np.split(rest, [len(self.groups)], axis=1)
        place = each.argmax(1)[:, None]
        found: dict[str, Any] = {"score": self._joined(each, place)}
        if self.halves:
            found["score_chosen"] = (
                np.take_along_axis(chosen, place, 1)[:, 0] if self.best else chosen[:, 0]
            )
            found["score_rejected"] = found["score_chosen"] - found["score"]
        found |= {f"score:{name}": each[:, k] for k, name in enumerate(self.targets) if name}
        found |= {
            f"score_damping_{value:g}": dampings[:, k] for k, value in enumerate(self.dampings)
        }
        if norms is not None:
            cosines = each / np.array(self.lengths) / np.where(norms > 0, norms, 1)[:, None]
            found |= {
                "gradient_norm": norms,
                "score_cosine": self._joined(cosines, cosines.argmax(1)[:, None]),
            }
        if self.groups:
            found |= {
                "score_se": standard_error(groups, np.array(self.groups)),
                "score_groups": groups.tolist(),
            }
        return found

    def _joined(self, each: Floats, place: NDArray[np.int64]) -> Floats:
        return np.take_along_axis(each, place, 1)[:, 0] if self.best else each.mean(1)
