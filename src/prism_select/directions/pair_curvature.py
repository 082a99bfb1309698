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
- K is exact (pair_products.py): with sketched products scores would differ;
- the halves are Σ α ∇mean_loglik(chosen) and Σ α r ∇mean_loglik(rejected): their difference is d;
- damping λ is relative to m / n, the mean of the n eigenvalues that are not zero.
"""

from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from prism_select.core.gains import Slopes, slopes
from prism_select.core.layers import Parameters
from prism_select.core.likelihood import LanguageModel
from prism_select.core.target_gradient import Side, Target, weighted_gradient
from prism_select.directions.pair_products import pair_products
from prism_select.run.config import DirectionOptions

__all__ = ["DividedTarget", "divide_by_pairs", "pair_coefficients"]


@dataclass(frozen=True)
class DividedTarget:
    """`cosine` is that between the direction before and after."""

    target: Target
    cosine: float


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


def divide_by_pairs(
    config: DirectionOptions,
    model: LanguageModel,
    weights: Parameters,
    sides: tuple[Side, Side],
    target: Target,
    damping: float,
) -> DividedTarget:
    """`target` is the first-order one of the pairs in `sides`."""
    means = target.mean_loglik_chosen, target.mean_loglik_rejected
    slope = slopes(config.weighting, *means, config.anchor)
    weight = slope.chosen
    ratio = torch.where(weight > 0, slope.rejected / weight, 0)
    products = pair_products(model, weights, sides, ratio.tolist())
    alpha = pair_coefficients(products, weight, damping)
    scaled = alpha * len(alpha)  # the mean over pairs is taken there
    divided = weighted_gradient(model, weights, sides, means, Slopes(scaled, scaled * ratio))
    return DividedTarget(replace(divided, weight=weight), _cosine(products, weight, alpha))


def _cosine(products: Tensor, a: Tensor, b: Tensor) -> float:
    """Between Σ a D and Σ b D."""
    return float(a @ products @ b / ((a @ products @ a) * (b @ products @ b)).sqrt())
