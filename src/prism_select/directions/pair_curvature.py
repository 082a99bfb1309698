"""Pairs' curvature: the gradient divided by the second moment of the pairs' own gradients.

    D_q = ∇mean_loglik(chosen) − r_q ∇mean_loglik(rejected)     π_q = s⁺_q, r_q = s⁻_q / s⁺_q:
                                                                slopes of the gain (core/gains.py)
    d = (μI + mean π D Dᵀ)⁻¹ mean π D = Σ_q α_q D_q             μ = λ m / n, m = mean π ‖D‖²
    α = √Π (√Π K √Π + λ m I)⁻¹ √Π 1                             K_qr = D_q · D_r, Π = diag(π)

Both lines of d are one by Woodbury's identity: n × n numbers are solved, and not n copies of the
parameters. Directions that many pairs share by accident (format, length, fluency) dominate a sum of
gradients; here they count once. It is the method's (H + λI)⁻¹ g with H the Gauss-Newton matrix of
the target. λ → ∞ gives the sum of gradients again, divided by μ.

Choices made here:
- with the likelihood of whole answers, loglik takes the place of mean_loglik above;
- K comes from the products of answers (answer_products.py), which are exact;
- the halves are Σ α ∇mean_loglik(chosen) and Σ α r ∇mean_loglik(rejected): their difference is d;
- damping λ is relative to m / n, the mean of the n eigenvalues that are not zero.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from prism_select.core.gains import Slopes, slopes
from prism_select.directions.answer_products import AnswerProducts
from prism_select.directions.way import Way

__all__ = ["difference_products", "pair_coefficients", "pair_slopes"]


def pair_slopes(way: Way, answers: AnswerProducts) -> Slopes:
    """What each answer counts in the direction, which is the mean over pairs of
    slope⁺ ∇mean_loglik(chosen) − slope⁻ ∇mean_loglik(rejected). The chosen answers of all pairs
    come first, then the rejected ones. Without the pairs' curvature it is the slope of the gain."""
    count, lengths = len(answers.tokens) // 2, answers.lengths(way.likelihood)
    loglik = lengths * answers.mean_loglik
    slope = slopes(way.weighting, loglik[:count], loglik[count:], way.anchor)
    if way.curvature == "pairs":
        ratio = torch.where(slope.chosen > 0, slope.rejected / slope.chosen, 0)
        differences = difference_products(lengths[:, None] * answers.total * lengths, ratio)
        alpha = pair_coefficients(differences, slope.chosen, way.damping)
        slope = Slopes(count * alpha, count * alpha * ratio)
    return Slopes(slope.chosen * lengths[:count], slope.rejected * lengths[count:])


def difference_products(
    products: Float[Tensor, "answers answers"], ratio: Float[Tensor, " pairs"]
) -> Float[Tensor, "pairs pairs"]:
    """K, where `ratio` is r of each pair."""
    count = len(ratio)
    chosen = products[:count] - ratio[:, None] * products[count:]
    return chosen[:, :count] - ratio * chosen[:, count:]


def pair_coefficients(
    products: Float[Tensor, "pairs pairs"], weight: Float[Tensor, " pairs"], damping: float
) -> Float[Tensor, " pairs"]:
    """α from K and π. A pair without weight has none."""
    root = weight.sqrt()
    scaled = root[:, None] * products * root
    mean = scaled.diagonal().mean()
    identity = torch.eye(len(root), dtype=root.dtype)
    solved: Tensor = torch.linalg.solve(scaled + damping * mean * identity, root)
    return root * solved
