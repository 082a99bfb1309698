"""A model and tensors that are already in memory: a direction in one call, scores in another.

    d = direction_of(network, chosen, rejected)      row i of each batch is pair i
    s = scores(network, batch, d)                    positive: training on the row raises the gain on the pairs

Choices made here: the network is any Hugging Face causal language model; it is left frozen and in
evaluation mode."""

from typing import Any

from jaxtyping import Float
from torch import Tensor

from prism_select.core.engines import ENGINES
from prism_select.core.layers import Direction
from prism_select.core.likelihood import Batch
from prism_select.core.target_gradient import Side, target_gradient
from prism_select.models.causal_lm import CausalLM
from prism_select.models.layer_selection import select_parameters

__all__ = ["direction_of", "scores"]


def direction_of(
    network: Any, chosen: Batch, rejected: Batch, layers: str = "all", weighting: str = "prism"
) -> Direction:
    """Gradient of the mean gain over the pairs: {weight name: tensor shaped like the weight,
    float32 or better}."""
    model = CausalLM(network)
    order = list(range(len(chosen)))
    sides = Side([chosen], order), Side([rejected], order)
    return target_gradient(
        model, select_parameters(model.network, layers), sides, weighting
    ).direction


def scores(
    network: Any, batch: Batch, direction: Direction, engine: str = "reverse"
) -> Float[Tensor, " batch"]:
    """Score of each row: the change of the gain per unit of learning rate in one SGD step on it, in
    nats per token."""
    model = CausalLM(network)
    known = dict(model.network.named_parameters())
    return ENGINES[engine](model, {name: known[name] for name in direction}, [direction])(
        batch
    ).values[:, 0]
