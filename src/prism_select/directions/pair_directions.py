"""Pair directions: from weighed pairs to directions, of low rank from the start or in full.

    D = Σ_a v_a ∇mean_loglik(a)      v: what each answer counts (weighed_pairs.py)
    C: the same over chosen answers, along which score_chosen is taken

    in full            C and R are summed up in float32 or better, and D takes the memory of R
    above `IN_FULL`    of low rank (range_finder.py); with --rank full one sum, in bfloat16 where
                       the model is, and no C unless the options ask for it: beside the model there
                       may be room for one direction
    of a group         of low rank in any case

Choices made here:
- a curvature of the pool divides directions in float32, so it has them in full whatever their size.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from prism_select.core.gradients import norm, zero_sum
from prism_select.core.layers import Direction, Factored, Parameters, is_large
from prism_select.core.target_gradient import Side, Target, add_answers, weighted_gradient
from prism_select.directions.common_part import without_common
from prism_select.directions.direction_set import mean_direction
from prism_select.directions.pair_clusters import PairClusters, cluster_coefficients
from prism_select.directions.pair_encoding import EncodedPairs, as_side
from prism_select.directions.range_finder import low_rank_directions
from prism_select.directions.way import way_of
from prism_select.directions.weighed_pairs import WeighedPairs
from prism_select.models.causal_lm import CausalLM
from prism_select.run.config import BESIDE_PAIRS, DirectionOptions, ScoreConfig
from prism_select.run.config_pairs import PairsConfig
from prism_select.run.errors import NotFinite
from prism_select.run.thresholds import UNCOVERED

__all__ = ["RANK", "PairDirections", "direction_by_products"]

RANK = 64
GROUP_RANK = 16  # of the direction of some pairs alone

NO_HALVES = (
    "score_chosen and score_rejected are empty: beside a direction of all numbers there may be no "
    "room for its chosen half; --halves takes it, in as much memory again"
)


class Found(NamedTuple):
    """Directions that rows are scored along, their chosen halves, and those of groups."""

    scores: Sequence[Factored]
    halves: Sequence[Factored]
    groups: Sequence[Factored]
    notes: Sequence[str] = ()


@dataclass(frozen=True)
class PairDirections:
    """From weighed pairs to directions, in full or of low rank from the start."""

    config: ScoreConfig | PairsConfig
    model: CausalLM
    weights: Parameters
    parts: Mapping[str, WeighedPairs]
    clusters: PairClusters | None

    @property
    def best(self) -> bool:
        """Whether the highest score of several targets counts."""
        is_max = isinstance(self.config, ScoreConfig) and self.config.combine == "max"
        return is_max and len(self.parts) > 1

    def in_full(self) -> Found:
        curved = isinstance(self.config, ScoreConfig) and self.config.curvature in BESIDE_PAIRS
        if is_large(self.weights) and not curved:
            return self.one_at_a_time()
        scores, halves, notes = list[Direction](), list[Direction](), list[str]()
        for part in self.parts.values():
            target = self.gradient_of(part)
            halves.append(target.chosen)
            length, direction = consumed(self.config, target)
            refuse_lost(length)
            scores.append(direction)
            notes += uncovered(part, length)
        return Found(scores, self.joined(halves), self.of_groups(), notes)

    def one_at_a_time(self) -> Found:
        """Directions that are large beside the model."""
        parts, without_common = self.parts.values(), self.config.common == "remove"
        scores = [self.of_all_numbers(part, part.coefficients(without_common)) for part in parts]
        for direction in scores:
            refuse_lost(norm(direction))
        if isinstance(self.config, ScoreConfig) and self.config.needs_halves:
            halves = [self.of_all_numbers(part, part.half) for part in parts]
            return Found(scores, self.joined(halves), self.of_groups())
        return Found(scores, [], self.of_groups(), [NO_HALVES])

    def joined(self, halves: Sequence[Direction]) -> Sequence[Direction]:
        """Those that rows are scored along: of each target where the best one counts, otherwise
        their mean."""
        return halves if self.best or len(halves) == 1 else [mean_direction(halves)]

    def gradient_of(self, part: WeighedPairs) -> Target:
        """C and R of all pairs."""
        sides = sides_of(self.config, self.model, part.encoded)
        return weighted_gradient(self.model, self.weights, sides, part.logliks, part.slopes)

    def of_all_numbers(
        self, part: WeighedPairs, coefficients: Float[Tensor, " answers"]
    ) -> Direction:
        given = (self.config, self.model, self.weights, part.encoded, coefficients)
        return direction_by_products(*given, bfloat16=True)

    def of_low_rank(self, rank: int) -> Found:
        parts, without_common = [*self.parts.values()], self.config.common == "remove"
        scores = [self.spread(part, part.coefficients(without_common)) for part in parts]
        halves = [self.spread(part, part.half) for part in parts]
        halves = halves if self.best else [torch.stack(halves).mean(0)]
        low = self.along(torch.stack([*scores, *halves]), rank)
        for direction in low[: len(parts)]:
            refuse_lost(norm(direction))
        return Found(low[: len(parts)], low[len(parts) :], self.of_groups())

    def along(
        self, coefficients: Float[Tensor, "directions answers"], rank: int
    ) -> Sequence[Factored]:
        """Σ_a coefficient_a ∇mean_loglik(a) of low rank, for each row."""
        model, parts = self.model, self.parts.values()
        rows = [row for part in parts for row in part.encoded.chosen]
        rows += [row for part in parts for row in part.encoded.rejected]
        batch_tokens = self.config.tokens_on(model.device.type, model.size)
        side = as_side(rows, batch_tokens, model.device)
        return low_rank_directions(model, self.weights, side, coefficients, rank)

    def of_groups(self) -> Sequence[Factored]:
        """The direction of each group of pairs, of low rank in any case."""
        if self.clusters is None or self.clusters.count < 2:
            return []
        (part,) = self.parts.values()
        found, count = list[Tensor](), len(part.pairs)
        for group in range(self.clusters.count):
            pairs = self.clusters.members(group)
            every = torch.zeros(2 * count, dtype=torch.float64)
            own = cluster_coefficients(part.products, way_of(self.config), pairs)
            every[[*pairs, *(count + pair for pair in pairs)]] = own
            found.append(every)
        return self.along(torch.stack(found), GROUP_RANK)

    def spread(self, part: WeighedPairs, own: Float[Tensor, " some"]) -> Float[Tensor, " answers"]:
        """Numbers of a target's answers among those of all: the chosen ones come first."""
        sides = [
            torch.cat(
                [
                    half if other is part else torch.zeros(len(other.pairs)).double()
                    for other in self.parts.values()
                ]
            )
            for half in own.split(len(part.pairs))
        ]
        return torch.cat(sides)


def refuse_lost(length: float) -> None:
    if not math.isfinite(length) or length == 0:
        raise NotFinite(
            f"the direction of the pairs has length {length}; try --dtype float32, other pairs or "
            "other --layers"
        )


def uncovered(part: WeighedPairs, length: float) -> list[str]:
    """A warning where the direction's `length` is not what the products say."""
    share = 1 - part.length / length if part.products.exact else 0.0
    if abs(share) < UNCOVERED:
        return []
    return [
        f"cross-validation and shares miss {abs(share):.0%} of the direction's length: some "
        "selected parameters are used in a way that they do not follow"
    ]


def consumed(config: DirectionOptions, target: Target) -> tuple[float, Direction]:
    """The length of C − R, and that direction, with the common part projected out where `config`
    says so. It takes the memory of R."""
    if config.common == "remove":
        length, target = norm(target.direction), without_common(target)
    direction = {
        name: torch.sub(target.chosen[name], half, out=half)
        for name, half in target.rejected.items()
    }
    return (length if config.common == "remove" else norm(direction)), direction


def direction_by_products(
    config: ScoreConfig | PairsConfig,
    model: CausalLM,
    weights: Parameters,
    encoded: EncodedPairs,
    coefficients: Float[Tensor, " answers"],
    bfloat16: bool = False,
) -> Direction:
    """Σ_a coefficient_a ∇mean_loglik(a); the chosen answers come first. With `bfloat16` it is
    summed up in that dtype where the parameter is."""
    total = zero_sum(weights, bfloat16)
    halves = coefficients.split(len(encoded.chosen))
    for side, half in zip(sides_of(config, model, encoded), halves, strict=True):
        add_answers(total, model, weights, side, half)
    return total


def sides_of(
    config: ScoreConfig | PairsConfig, model: CausalLM, encoded: EncodedPairs
) -> tuple[Side, Side]:
    batch_tokens = config.tokens_on(model.device.type, model.size)
    chosen, rejected = (as_side(rows, batch_tokens, model.device) for rows in encoded)
    return chosen, rejected
