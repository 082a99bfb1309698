"""Direction: the gradient of the mean gain, kept in halves.

    g = ∇J = C − R      C = mean_q slope⁺_q ∇mean_loglik(chosen_q)      R = mean_q slope⁻_q ∇mean_loglik(rejected_q)

    score = ∇loglik(z) · g      score_chosen = ∇loglik(z) · C      score_rejected = ∇loglik(z) · R

Choices made here: log-likelihoods come first, without a graph; the gain's slopes weight the pairs;
then each side goes backward on its own, so swapping the sides of every pair under `uniform` negates
the direction to the last bit. Gradients add up in float32 or better whatever the model's dtype."""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from typing import TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor

from prism_select.core.gains import slopes
from prism_select.core.layers import Direction, Parameters
from prism_select.core.likelihood import Batch, LanguageModel, backward, mean_logliks

__all__ = [
    "Observe",
    "Side",
    "Target",
    "differentiable",
    "dot",
    "minus",
    "norm",
    "pair_logliks",
    "target_gradient",
]

Observe: TypeAlias = Callable[[str, Sequence[int]], Callable[[Tensor], None]]


@dataclass(frozen=True, slots=True)
class Side:
    """One side of every pair as batches; `order[i]` is the pair that row i of the batches, in
    sequence, belongs to."""

    batches: Sequence[Batch]
    order: Sequence[int]

    def __iter__(self) -> Iterator[tuple[Batch, list[int]]]:
        """Each batch with the pairs of its rows."""
        pairs = iter(self.order)
        return ((batch, list(islice(pairs, len(batch)))) for batch in self.batches)


@dataclass(frozen=True, slots=True)
class Target:
    """What the pairs say. Mean log-likelihoods are in nats per token, one per pair, in the order of
    the pairs."""

    chosen: Direction
    rejected: Direction
    mean_loglik_chosen: Float[Tensor, " pairs"]
    mean_loglik_rejected: Float[Tensor, " pairs"]
    weight: Float[Tensor, " pairs"]

    @property
    def gap(self) -> Float[Tensor, " pairs"]:
        return self.mean_loglik_chosen - self.mean_loglik_rejected

    @property
    def direction(self) -> Direction:
        return minus(self.chosen, self.rejected)


def dot(a: Direction, b: Direction) -> float:
    return sum(float((a[name].double() * b[name].double()).sum()) for name in a)


def norm(a: Direction) -> float:
    return math.sqrt(dot(a, a))


def minus(a: Direction, b: Direction, times: float = 1.0) -> Direction:
    return {name: a[name] - times * b[name] for name in a}


@contextmanager
def differentiable(weights: Parameters) -> Iterator[None]:
    """The weights, and nothing else of the network, ask for gradients; on leaving they are as
    frozen as before."""
    try:
        for weight in weights.values():
            weight.requires_grad_(True)
        yield
    finally:
        for weight in weights.values():
            weight.requires_grad_(False).grad = None


def pair_logliks(model: LanguageModel, side: Side) -> Float[Tensor, " pairs"]:
    means = torch.cat([mean_logliks(model, batch) for batch in side.batches])
    return torch.empty_like(means).index_copy_(0, torch.tensor(side.order), means)


def target_gradient(
    model: LanguageModel,
    weights: Parameters,
    sides: tuple[Side, Side],
    weighting: str,
    anchor: float = 0.0,
    observe: Observe = lambda side, pairs: lambda rows: None,
) -> Target:
    """The gradient of the mean gain over all pairs; `sides` are their chosen and their rejected
    answers.

    `observe(side, pairs)` is told, before each backward pass, which pairs its rows are; what it
    returns is told which row each gradient belongs to. Memory: two copies of the weights in
    float32."""
    means = [pair_logliks(model, side) for side in sides]
    slope = slopes(weighting, means[0], means[1], anchor)
    wide = {
        name: torch.promote_types(weight.dtype, torch.float32) for name, weight in weights.items()
    }
    up, down = ({n: torch.zeros_like(w, dtype=wide[n]) for n, w in weights.items()} for _ in sides)
    with differentiable(weights):
        for side, each, total, name in zip(
            sides, slope, (up, down), ("chosen", "rejected"), strict=True
        ):
            for batch, pairs in side if each.any() else ():
                scale = (each / len(each))[pairs].to(batch.tokens.device) / batch.counts
                backward(model, batch, scale, observe(name, pairs))
                for key, weight in weights.items():
                    if weight.grad is not None:
                        total[key] += weight.grad.to(total[key].dtype)
                        weight.grad = None
    return Target(up, down, means[0], means[1], slope.chosen)
