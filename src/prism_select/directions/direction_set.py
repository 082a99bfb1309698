"""Direction set: all directions of a run, and what the pairs behind them say.

    directions    in the order of DirectionLayout: targets, chosen halves, further dampings
    direction     what a score lies along: the mean of the targets' own

Choices made here: a direction that was read from a file comes without its pairs.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch

from prism_select.core.gradients import dot, norm
from prism_select.core.layers import Direction, Parameters
from prism_select.core.target_gradient import Target
from prism_select.data.records import Pair
from prism_select.directions.cross_validation import CrossValidation
from prism_select.directions.layout import DirectionLayout
from prism_select.directions.pair_clusters import PairClusters
from prism_select.directions.pair_diagnostics import Diagnosis
from prism_select.directions.tuning import Tuning

__all__ = ["DirectionSet", "GroupDirections", "PairDiagnosis", "mean_direction"]


@dataclass(frozen=True)
class PairDiagnosis:
    """Some pairs, their gradient, how far they agree on it, and how it ranks those of them that are
    held out. `truncated_chosen` and `truncated_rejected` say which answers lost their end to
    --max-length."""

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
    directions: Sequence[Direction]

    @property
    def names(self) -> list[str]:
        return [str(number + 1) for number in range(len(self.directions))]


@dataclass(frozen=True)
class DirectionSet:
    """`weights` are the selected parameters. `diagnoses` are by target, `overall` is of the pairs
    of all targets together; `warnings` are about what encoding does to them."""

    weights: Parameters
    directions: Sequence[Direction]
    layout: DirectionLayout
    diagnoses: Mapping[str, PairDiagnosis]
    overall: PairDiagnosis | None = None
    warnings: Sequence[str] = ()
    pair_cosines: Mapping[str, float] | None = None  # of --curvature pairs: before and after
    tuning: Tuning | None = None
    groups: GroupDirections | None = None  # of --groups, where there are several

    @property
    def of_targets(self) -> Sequence[Direction]:
        """One direction for each target."""
        return self.directions[: len(self.layout.targets)]

    @property
    def direction(self) -> Direction:
        """The mean of the targets' own; with `best`, the first target's."""
        directions = self.of_targets[:1] if self.layout.best else self.of_targets
        if len(directions) == 1:
            return directions[0]
        names = directions[0].keys()
        return {name: torch.stack([d[name] for d in directions]).mean(0) for name in names}

    @cached_property
    def length(self) -> float:
        return norm(self.direction)

    @cached_property
    def without_gradient(self) -> list[str]:
        """Selected parameters that no pair has reached: they are zero in every target."""
        return [name for name in self.weights if not any(d[name].any() for d in self.of_targets)]

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
