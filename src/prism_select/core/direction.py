"""Direction: the gradient of the mean gain, kept in halves.

    g = ∇J = C − R      C = mean_q slope⁺_q ∇mean_loglik(chosen_q)      R = mean_q slope⁻_q ∇mean_loglik(rejected_q)

    score = ∇loglik(z) · g      score_chosen = ∇loglik(z) · C      score_rejected = ∇loglik(z) · R

Choices made here: log-likelihoods come first, without a graph; the gain's slopes weight the pairs; then each side goes
backward on its own, so swapping the sides of every pair under `uniform` negates the direction to the last bit.
Gradients add up in float32 or better whatever the model's dtype. The pairs come in two random halves, and the
cosine between the halves' directions (`agreement`) says how much of the direction is signal.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from prism_select.core.gains import slopes
from prism_select.core.layers import Direction, Weights
from prism_select.core.likelihood import Batch, LanguageModel, backward, token_logliks

__all__ = ["Side", "Target", "differentiable", "dot", "minus", "norm", "target_gradient"]


@dataclass(frozen=True, slots=True)
class Side:
    """One side of every pair as batches; `order[i]` is the pair that row i of the batches, in sequence, belongs to."""

    batches: Sequence[Batch]
    order: Sequence[int]


@dataclass(frozen=True, slots=True)
class Target:
    """What the pairs say. Mean log-likelihoods are in nats per token, one per pair, in the order of the pairs."""

    chosen: Direction
    rejected: Direction
    mean_loglik_chosen: Float[Tensor, " pairs"]
    mean_loglik_rejected: Float[Tensor, " pairs"]
    weight: Float[Tensor, " pairs"]
    agreement: float

    @property
    def gap(self) -> Float[Tensor, " pairs"]:
        return self.mean_loglik_chosen - self.mean_loglik_rejected

    @property
    def direction(self) -> Direction:
        return minus(self.chosen, self.rejected)

    @property
    def mean_preference(self) -> float:
        return float(torch.sigmoid(self.gap).mean())

    @property
    def effective_pairs(self) -> float:
        """(Σ weight)² / Σ weight²: how many equally weighted pairs would spread the weight as much (Kish)."""
        return float(self.weight.sum() ** 2 / self.weight.square().sum().clamp(min=1e-300))

    @property
    def common_part(self) -> float:
        """‖½(C + R)‖ / ‖C − R‖: what both answers of a pair share, against what tells them apart."""
        common = {name: (value + self.rejected[name]) / 2 for name, value in self.chosen.items()}
        return norm(common) / (norm(self.direction) or math.nan)


def dot(a: Direction, b: Direction) -> float:
    return sum(float((a[name].double() * b[name].double()).sum()) for name in a)


def norm(a: Direction) -> float:
    return math.sqrt(dot(a, a))


def minus(a: Direction, b: Direction) -> Direction:
    return {name: a[name] - b[name] for name in a}


@contextmanager
def differentiable(weights: Weights) -> Iterator[None]:
    """The weights, and nothing else of the network, ask for gradients; on leaving they are as frozen as before."""
    try:
        for weight in weights.values():
            weight.requires_grad_(True)
        yield
    finally:
        for weight in weights.values():
            weight.requires_grad_(False)
            weight.grad = None


def _mean_logliks(model: LanguageModel, sides: Sequence[Side]) -> Float[Tensor, " pairs"]:
    with torch.no_grad():
        rows = [token_logliks(model, b).double().sum(1) / b.counts for side in sides for b in side.batches]
    means = torch.empty(sum(len(side.order) for side in sides), dtype=torch.float64)
    means[[pair for side in sides for pair in side.order]] = torch.cat(rows).cpu()
    return means


def _add_gradient(
    model: LanguageModel, weights: Weights, side: Side, slope: Float[Tensor, " pairs"], total: dict[str, Tensor]
) -> None:
    """total += Σ_q slope_q ∇mean_loglik_q over the pairs of this side."""
    start = 0
    for batch in side.batches:
        pairs = list(side.order[start : start + len(batch)])
        start += len(batch)
        backward(model, batch, slope[pairs].to(batch.tokens.device) / batch.counts)
        for name, weight in weights.items():
            if weight.grad is not None:
                total[name] += weight.grad.to(total[name].dtype)
                weight.grad = None


def target_gradient(
    model: LanguageModel, weights: Weights, halves: Sequence[tuple[Side, Side]], weighting: str
) -> Target:
    """The gradient of the mean gain over all pairs; `halves` hold each pair once, as (chosen sides, rejected sides).

    Memory: three copies of the weights in float32. With fewer than two halves `agreement` is NaN.
    """
    chosen = _mean_logliks(model, [side for side, _ in halves])
    rejected = _mean_logliks(model, [side for _, side in halves])
    slope = slopes(weighting, chosen, rejected)
    up, down = (
        {n: torch.zeros_like(w, dtype=torch.promote_types(w.dtype, torch.float32)) for n, w in weights.items()}
        for _ in slope
    )
    first: Direction = {}
    with differentiable(weights):
        for liked, disliked in halves:
            _add_gradient(model, weights, liked, slope.chosen / len(chosen), up)
            if slope.rejected.any():
                _add_gradient(model, weights, disliked, slope.rejected / len(chosen), down)
            first = first or minus(up, down)
    second = minus(minus(up, down), first)  # zero when there is one half
    agreement = dot(first, second) / (norm(first) * norm(second) or math.nan)
    return Target(up, down, chosen, rejected, slope.chosen, agreement)
