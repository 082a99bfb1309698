"""Weighed pairs: some pairs, the inner products of their answers' gradients, and what each counts.

    direction = Σ_a v_a ∇mean_loglik(a)      v: slope⁺ / n of chosen answers, −slope⁻ / n of
                                             rejected ones; --common remove takes from both

Choices made here: everything is a sum over answers, so no gradient of full size is needed.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeAlias

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from prism_select.core.gains import Slopes
from prism_select.core.target_gradient import Target
from prism_select.data.records import Pair
from prism_select.directions.answer_products import AnswerProducts
from prism_select.directions.cross_validation import answer_coefficients
from prism_select.directions.pair_curvature import pair_slopes
from prism_select.directions.pair_encoding import EncodedPairs
from prism_select.directions.way import way_of
from prism_select.run.config import ScoreConfig
from prism_select.run.config_pairs import PairsConfig

__all__ = ["Targets", "WeighedPairs", "joined", "weighed"]

Targets: TypeAlias = Mapping[str, Sequence[Pair]]


@dataclass(frozen=True)
class WeighedPairs:
    """Some pairs, the products of their answers, and what each pair counts: `first_order` are the
    slopes of the gain, `slopes` those after the pairs' curvature."""

    pairs: Sequence[Pair]
    encoded: EncodedPairs
    products: AnswerProducts
    first_order: Slopes
    slopes: Slopes
    likelihood: str

    @property
    def lengths(self) -> Float[Tensor, " answers"]:
        """What turns the mean log-likelihood of a token into the likelihood of the options."""
        return self.products.lengths(self.likelihood)

    @property
    def logliks(self) -> tuple[Tensor, Tensor]:
        """Of the chosen and of the rejected answers, by the likelihood of the options; NaN where
        there is none."""
        chosen, rejected = (self.lengths * self.products.mean_loglik).split(len(self.pairs))
        return (
            chosen.where(~self.is_alone("rejected"), math.nan),
            rejected.where(~self.is_alone("chosen"), math.nan),
        )

    @property
    def weight(self) -> Float[Tensor, " pairs"]:
        """Slope of the gain, by the log-likelihood of the chosen answer, or of the only one."""
        chosen, rejected = self.first_order
        slope = torch.where(self.is_alone("rejected"), rejected, chosen)
        return slope / self.lengths[: len(self.pairs)]

    def is_alone(self, side: str) -> Bool[Tensor, " pairs"]:
        """Whether a pair has no answer but that of this side."""
        return torch.tensor([pair.alone == side for pair in self.pairs])

    def coefficients(self, without_common: bool) -> Float[Tensor, " answers"]:
        """What each answer counts in the direction."""
        return answer_coefficients(self.slopes, self.products, without_common)

    @property
    def half(self) -> Float[Tensor, " answers"]:
        """What each answer counts in the half C."""
        chosen = self.slopes.chosen / len(self.pairs)
        return torch.cat([chosen, torch.zeros_like(chosen)])

    @property
    def length(self) -> float:
        """Of the direction with its common part, by the products."""
        direction = self.coefficients(without_common=False)
        return float((direction @ self.products.total @ direction).sqrt())

    @property
    def without_gradient(self) -> Target:
        return Target({}, {}, *self.logliks, self.weight)

    @property
    def cosine(self) -> float:
        """Between the direction before the pairs' curvature and after it."""
        total = self.products.total
        a, b = (torch.cat([s.chosen, -s.rejected]) for s in (self.first_order, self.slopes))
        return float(a @ total @ b / ((a @ total @ a) * (b @ total @ b)).sqrt())


def weighed(
    config: ScoreConfig | PairsConfig,
    targets: Targets,
    encoded: Mapping[str, EncodedPairs],
    products: AnswerProducts,
) -> dict[str, WeighedPairs]:
    """Each target's pairs with their own curvature."""
    parts, start, count = dict[str, WeighedPairs](), 0, sum(map(len, targets.values()))
    for name, pairs in targets.items():
        chosen = range(start, start := start + len(pairs))
        own = products.of([*chosen, *(count + pair for pair in chosen)])
        way = replace(way_of(config), curvature="flat")
        first_order, slopes = pair_slopes(way, own), pair_slopes(way_of(config), own)
        if pairs[0].alone == "rejected":  # away from the only answer; both sides are the same
            first_order, slopes = Slopes(*reversed(first_order)), Slopes(*reversed(slopes))
        own_pairs = (pairs, encoded[name], own)
        parts[name] = WeighedPairs(*own_pairs, first_order, slopes, config.likelihood)
    return parts


def joined(parts: Sequence[WeighedPairs], products: AnswerProducts) -> WeighedPairs:
    """The pairs of all targets. Slopes are scaled, so that the mean over all pairs is that over
    targets."""
    pairs = [pair for part in parts for pair in part.pairs]
    encoded = EncodedPairs(
        [row for part in parts for row in part.encoded.chosen],
        [row for part in parts for row in part.encoded.rejected],
    )
    scales = [len(pairs) / len(part.pairs) / len(parts) for part in parts]

    def together(slopes: Sequence[Slopes]) -> Slopes:
        scaled = [(c * by, r * by) for (c, r), by in zip(slopes, scales, strict=True)]
        return Slopes(*map(torch.cat, zip(*scaled, strict=True)))

    first_order, slopes = (
        together([p.first_order for p in parts]),
        together([p.slopes for p in parts]),
    )
    return WeighedPairs(pairs, encoded, products, first_order, slopes, parts[0].likelihood)
