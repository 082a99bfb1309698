"""Gradients of made answers with their products, and a direction of them by its definition."""

import torch
from torch import Tensor

from prism_select.core.gains import slopes
from prism_select.directions.answer_products import AnswerProducts
from prism_select.directions.way import Way


def made_pairs(
    seed: int, signal: float, pairs: int = 40, size: int = 60
) -> tuple[Tensor, AnswerProducts]:
    """Gradients of answers, chosen first, that differ in one direction by `signal` times the
    length of the rest; both answers of a pair share a part."""
    draw = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=draw, dtype=torch.float64)

    gradients = normal(2 * pairs, size) + normal(pairs, size).repeat(2, 1)
    gradients[:pairs, 0] += signal
    gradients[pairs:, 0] -= signal
    blocks = {"0": gradients[:, : size // 2], "": gradients[:, size // 2 :]}
    tokens = torch.randint(3, 9, (2 * pairs,), generator=draw)
    products = {name: own @ own.T for name, own in blocks.items()}
    return gradients, AnswerProducts(products, 0.3 * normal(2 * pairs) - 2, tokens)


def slow_direction(way: Way, gradients: Tensor, mean_loglik: Tensor) -> Tensor:
    """By a dense solve in the space of the gradients."""
    count = len(gradients) // 2
    slope = slopes(way.weighting, mean_loglik[:count], mean_loglik[count:], way.anchor)
    ratio = slope.rejected / slope.chosen
    differences = gradients[:count] - ratio[:, None] * gradients[count:]
    common = gradients[:count] + ratio[:, None] * gradients[count:]
    direction = slope.chosen @ differences / count
    shared = slope.chosen @ common / count
    if way.curvature == "pairs":
        moment = (differences.T * slope.chosen) @ differences / count
        mu = way.damping * (slope.chosen * differences.square().sum(1)).mean() / count
        inverse = torch.linalg.inv(moment + mu * torch.eye(len(moment), dtype=moment.dtype))
        direction = inverse @ direction
        # the halves carry the same coefficients α as the direction
        alpha = torch.linalg.lstsq(differences.T, direction[:, None]).solution[:, 0]
        shared = alpha @ common
    if way.common == "remove":
        direction = direction - direction @ shared / (shared @ shared) * shared
    return direction
