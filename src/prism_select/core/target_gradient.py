"""Target gradient: the gradient of the mean gain over all pairs, kept in two halves.

    g = ∇J = C − R      C = mean over pairs q of slope⁺_q ∇mean_loglik(chosen_q)
                        R = mean over pairs q of slope⁻_q ∇mean_loglik(rejected_q)

    score = ∇loglik(z) · g      score_chosen = ∇loglik(z) · C      score_rejected = ∇loglik(z) · R

Choices made here:
- log-likelihoods come first, without a graph; the slopes of the gain there weight the pairs;
- each side goes backward by itself, so exchanging the sides of every pair under `uniform` negates
  the direction to the last bit.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice

import torch
from jaxtyping import Float
from torch import Tensor

from prism_select.core.gains import Slopes, slopes
from prism_select.core.gradients import adding_gradients, minus, zero_sum
from prism_select.core.layers import Direction, Parameters
from prism_select.core.likelihood import Batch, LanguageModel, backward, mean_logliks

__all__ = [
    "Side",
    "Target",
    "add_answers",
    "pair_logliks",
    "target_gradient",
    "weighted_gradient",
]


@dataclass(frozen=True, slots=True)
class Side:
    """One side of every pair, in batches. `order[i]` is the pair of row i, counted through the
    batches."""

    batches: Sequence[Batch]
    order: Sequence[int]

    def __iter__(self) -> Iterator[tuple[Batch, list[int]]]:
        """Batches with the pairs of their rows."""
        pairs = iter(self.order)
        return ((batch, list(islice(pairs, len(batch)))) for batch in self.batches)


@dataclass(frozen=True, slots=True)
class Target:
    """The halves C and R. Log-likelihoods are in nats per token, or of the whole sequence, in the
    order of the pairs; `weight` is the slope of each pair's chosen answer, by that likelihood."""

    chosen: Direction
    rejected: Direction
    loglik_chosen: Float[Tensor, " pairs"]
    loglik_rejected: Float[Tensor, " pairs"]
    weight: Float[Tensor, " pairs"]

    @property
    def gap(self) -> Float[Tensor, " pairs"]:
        return self.loglik_chosen - self.loglik_rejected

    @property
    def direction(self) -> Direction:
        return minus(self.chosen, self.rejected)


def pair_logliks(model: LanguageModel, side: Side) -> Float[Tensor, " pairs"]:
    """Mean log-likelihood of one side of each pair, in the order of the pairs, without a graph."""
    means = torch.cat([mean_logliks(model, batch) for batch in side.batches])
    return torch.empty_like(means).index_copy_(0, torch.tensor(side.order), means)


def target_gradient(
    model: LanguageModel,
    weights: Parameters,
    sides: tuple[Side, Side],
    weighting: str,
    anchor: float = 0.0,
    likelihood: str = "token",
) -> Target:
    """`sides` are the chosen and the rejected answers of the pairs; `likelihood` is the mean over
    the tokens of an answer, or that of the whole sequence. Memory: two copies of the selected
    parameters in float32."""
    long, short = (_lengths(side, likelihood) for side in sides)
    logliks = long * pair_logliks(model, sides[0]), short * pair_logliks(model, sides[1])
    up, down = slopes(weighting, *logliks, anchor)
    target = weighted_gradient(model, weights, sides, logliks, Slopes(long * up, short * down))
    return replace(target, weight=up)


def _lengths(side: Side, likelihood: str) -> Float[Tensor, " pairs"]:
    """What turns the mean log-likelihood of a token into `likelihood`."""
    counts = torch.cat([batch.counts.double().cpu() for batch in side.batches])
    if likelihood == "token":
        counts = torch.ones_like(counts)
    return torch.empty_like(counts).index_copy_(0, torch.tensor(side.order), counts)


def weighted_gradient(
    model: LanguageModel,
    weights: Parameters,
    sides: tuple[Side, Side],
    logliks: tuple[Float[Tensor, " pairs"], Float[Tensor, " pairs"]],
    slope: Slopes,
) -> Target:
    """The halves for any weights of the two answers, which are slopes by the mean log-likelihood of
    a token."""
    halves = zero_sum(weights), zero_sum(weights)
    for side, weight, total in zip(sides, slope, halves, strict=True):
        add_answers(total, model, weights, side, weight / len(weight))
    return Target(halves[0], halves[1], *logliks, slope.chosen)


def add_answers(
    total: Direction,
    model: LanguageModel,
    weights: Parameters,
    side: Side,
    coefficients: Float[Tensor, " pairs"],
) -> None:
    """Adds Σ_q coefficient_q ∇mean_loglik(answer of q) to a sum that started as `zero_sum`."""
    with adding_gradients(total, weights):
        for batch, pairs in side:
            scales = coefficients[pairs].to(batch.tokens.device)
            if scales.any():
                backward(model, batch, scales / batch.counts)
