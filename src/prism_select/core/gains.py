"""Gains: what training should raise, and the sign convention of the whole library.

    gap         Δ = mean_loglik(chosen) − mean_loglik(rejected)     nats per token
    preference  π = σ(Δ)                                            what the model prefers now
    gain        J = mean over pairs of gain(Δ)

    prism     softplus(Δ)             slope π: the preference weighting (arXiv 2605.21422)
    uniform   Δ                       slope 1
    hard      log σ(Δ)                slope 1 − π: pairs that are not learned yet weigh most, as in
                                      DPO (arXiv 2305.18290)
    unpaired  mean_loglik(chosen)     no negative

    an anchor β adds β · mean_loglik(chosen), so a gap cannot grow by making both answers unlikely

Sign: a direction points uphill in the gain, so **a positive score means that training on the row
raises the gain**. An influence function is the change of a loss, −J, when a row gains weight in
training: −∇J · H⁻¹ ∇loglik(row), with H the Hessian of the training loss. A score is minus that,
with H in an approximation (directions/curvature.py), flat by default.

Choices made here:
- gains alone are written; their slopes, which weight the pairs, come from autograd.
"""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

__all__ = ["GAINS", "Slopes", "slopes"]

Gain = Callable[[Float[Tensor, " pairs"], Float[Tensor, " pairs"]], Float[Tensor, " pairs"]]


GAINS: Mapping[str, Gain] = {
    "prism": lambda chosen, rejected: functional.softplus(chosen - rejected),
    "uniform": lambda chosen, rejected: chosen - rejected,
    "hard": lambda chosen, rejected: functional.logsigmoid(chosen - rejected),
    "unpaired": lambda chosen, rejected: chosen + 0 * rejected,
}


class Slopes(NamedTuple):
    """The weight of each pair: ∂gain/∂mean_loglik of its chosen answer, and minus that of its
    rejected one."""

    chosen: Float[Tensor, " pairs"]
    rejected: Float[Tensor, " pairs"]


def slopes(
    weighting: str,
    chosen: Float[Tensor, " pairs"],
    rejected: Float[Tensor, " pairs"],
    anchor: float = 0.0,
) -> Slopes:
    """Slopes of each pair's own gain, from its mean log-likelihoods. Divided by the number of pairs
    they are those of J."""
    with torch.enable_grad():
        ends = chosen.detach().requires_grad_(), rejected.detach().requires_grad_()
        gain = GAINS[weighting](*ends) + anchor * ends[0]
        up, down = torch.autograd.grad(gain.sum(), ends)
    return Slopes(up, -down)
