"""Direction set: all directions of a run, and what the pairs behind them say.

    directions    in the order of DirectionLayout: targets, chosen halves, further dampings
    direction     what a score lies along: the mean of the targets' own

Choices made here: a direction that was read from a file comes without its pairs.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from prism_select.core.gradients import dot, norm
from prism_select.core.layers import Direction, Factored, Factors, Parameters
from prism_select.core.target_gradient import Target
from prism_select.data.encoding import Encoded
from prism_select.data.records import Pair
from prism_select.directions.cross_validation import CrossValidation
from prism_select.directions.layout import DirectionLayout
from prism_select.directions.pair_clusters import PairClusters
from prism_select.directions.pair_diagnostics import Diagnosis
from prism_select.directions.tuning import Tuning

__all__ = [
    "DirectionSet",
    "FullDirection",
    "GroupDirections",
    "PairDiagnosis",
    "mean_direction",
    "mean_factored",
]


@dataclass(frozen=True)
class PairDiagnosis:
    """Some pairs, their log-likelihoods (a `target` without its gradient), how far they agree on
    the direction, and how it ranks those of them that are held out.
    `truncated_chosen` and `truncated_rejected` say which answers lost their end to --max-length."""

    pairs: Sequence[Pair]
    target: Target
    diagnosis: Diagnosis
    truncated_chosen: Sequence[bool]
    truncated_rejected: Sequence[bool]
    cross_validation: CrossValidation | None = None


@dataclass(frozen=True)
class GroupDirections:
    """Groups of a target's pairs, and a direction for each."""

    clusters: PairClusters
    directions: Sequence[Factored]

    @property
    def names(self) -> list[str]:
        return [str(number + 1) for number in range(len(self.directions))]


@dataclass(frozen=True)
class FullDirection:
    """What is known of the first direction where the set has it at a low `rank` alone: its length,
    and the scores of some rows along it; NaN and none where products are not exact."""

    rank: int
    length: float
    rows: Sequence[Encoded]
    scores: NDArray[np.float64]


@dataclass(frozen=True)
class DirectionSet:
    """`weights` are the selected parameters. `diagnoses` are by target, `overall` is of the pairs
    of all targets together; `warnings` are about what encoding does to them."""

    weights: Parameters
    directions: Sequence[Factored]
    layout: DirectionLayout
    diagnoses: Mapping[str, PairDiagnosis]
    overall: PairDiagnosis | None = None
    warnings: Sequence[str] = ()
    pair_cosines: Mapping[str, float] | None = None  # of --curvature pairs: before and after
    tuning: Tuning | None = None
    groups: GroupDirections | None = None  # of --groups, where there are several
    full: FullDirection | None = None  # of low rank from the start

    @property
    def of_targets(self) -> Sequence[Factored]:
        """One direction for each target."""
        return self.directions[: len(self.layout.targets)]

    @property
    def direction(self) -> Factored:
        """The mean of the targets' own; with `best`, the first target's."""
        directions = self.of_targets[:1] if self.layout.best else self.of_targets
        return directions[0] if len(directions) == 1 else mean_factored(directions)

    @cached_property
    def length(self) -> float:
        return norm(self.direction)

    @cached_property
    def without_gradient(self) -> list[str]:
        """Selected parameters that no pair has reached: they are zero in every target."""
        parts = {name: [{name: d[name]} for d in self.of_targets] for name in self.weights}
        return [name for name, own in parts.items() if not any(map(norm, own))]

    @cached_property
    def cosines(self) -> list[list[float]]:
        """Between the directions of the targets."""
        lengths = [norm(direction) or math.nan for direction in self.of_targets]
        return [
            [dot(a, b) / (m * n) for b, n in zip(self.of_targets, lengths, strict=True)]
            for a, m in zip(self.of_targets, lengths, strict=True)
        ]


def mean_direction(directions: Sequence[Direction]) -> Direction:
    return {
        name: sum((d[name] for d in directions), torch.zeros(())) / len(directions)
        for name in directions[0]
    }


def mean_factored(directions: Sequence[Factored]) -> Factored:
    """Factors stand side by side, so its rank is the sum of theirs."""
    return {name: _mean([d[name] for d in directions]) for name in directions[0]}


def _mean(values: Sequence[Tensor | Factors]) -> Tensor | Factors:
    factors = [value for value in values if isinstance(value, Factors)]
    if len(factors) == len(values):
        left = torch.cat([value.left for value in factors], dim=1) / len(values)
        return Factors(left, torch.cat([value.right for value in factors]))
    whole = [v.left @ v.right if isinstance(v, Factors) else v for v in values]
    return torch.stack(whole).mean(0)
