"""Directions and scores of a model and of tensors that are already in memory.

    d = target_direction(network, chosen, rejected)      row i of both batches is pair i
    s = score_tensors(network, batch, d)                 positive: training on it raises the gain

    a batch    {"input_ids": …, "attention_mask": …, "labels": … (-100 where not supervised)}
               as a data collator makes it, or a Batch

Choices made here:
- the network is any Hugging Face causal language model, and is given back in the mode it came in;
- gradients of adapters are taken with layers="adapter".
"""

from collections.abc import Mapping
from typing import Any, TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor

from prism_select.core.engines import ENGINES
from prism_select.core.layers import Direction
from prism_select.core.likelihood import Batch
from prism_select.core.target_gradient import Side, target_gradient
from prism_select.models.causal_lm import unchanged
from prism_select.models.layer_selection import select_parameters
from prism_select.models.loading import adopt
from prism_select.run.objects import ModelObject

__all__ = ["as_batch", "score_tensors", "target_direction"]

Tensors: TypeAlias = Batch | Mapping[str, Tensor]


def as_batch(tensors: Tensors) -> Batch:
    """Raises ValueError for a label that is neither its token nor -100: none is shifted here."""
    if isinstance(tensors, Batch):
        return tensors
    tokens, labels = tensors["input_ids"], tensors["labels"]
    supervised = labels != -100
    if not torch.equal(tokens[supervised], labels[supervised]):
        raise ValueError("labels: a label that is neither -100 nor its own token of input_ids")
    mask = tensors.get("attention_mask")
    real = torch.ones_like(supervised) if mask is None else mask.bool()
    return Batch(tokens, real, supervised)


def target_direction(
    network: Any, chosen: Tensors, rejected: Tensors, layers: str = "all", weighting: str = "prism"
) -> Direction:
    """Gradient of the mean gain over the pairs: {parameter name: tensor of the parameter's shape,
    float32 or better}. Raises ValueError for labels that are not tokens."""
    sides = [as_batch(tensors) for tensors in (chosen, rejected)]
    order = list(range(len(sides[0])))
    with unchanged(network):
        model, _ = adopt(ModelObject(network, None))
        parameters = select_parameters(model.network, layers)
        pairs = Side([sides[0]], order), Side([sides[1]], order)
        return target_gradient(model, parameters, pairs, weighting).direction


def score_tensors(
    network: Any, batch: Tensors, direction: Direction, engine: str = "reverse"
) -> Float[Tensor, " batch"]:
    """Score of each row: change of the gain, in nats per token, per unit of learning rate in one
    SGD step on the row."""
    rows = as_batch(batch)
    with unchanged(network):
        model, _ = adopt(ModelObject(network, None))
        named = dict(model.network.named_parameters())
        score = ENGINES[engine](model, {name: named[name] for name in direction}, [direction])
        return score(rows).values[:, 0].detach()
