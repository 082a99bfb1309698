"""Pair help: what the chosen rows together do for each pair.

    G = mean of ∇loglik over chosen rows
    help of pair q = (∇mean_loglik(chosen) − ∇mean_loglik(rejected)) · G     first-order change of
                                                                             its gap by a step on G

A pair with hardly any help asks for what is not in the choice, or not in the pool.

Choices made here:
- it is exact, in two short passes: back over the chosen rows for G, and along G over the pairs;
- of more than `ROWS` chosen rows, so many are drawn.
"""

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from prism_select.core.gradients import adding_gradients, zero_sum
from prism_select.core.layers import Factored, Parameters
from prism_select.core.likelihood import backward
from prism_select.data.encoding import Encoded
from prism_select.data.pool import Pool
from prism_select.data.records import Example, Pair
from prism_select.directions.pair_encoding import as_side, encode_sides
from prism_select.directions.range_finder import low_rank_directions
from prism_select.models.loading import LoadedModel
from prism_select.run.config import ScoreConfig
from prism_select.scoring.batched_engine import BatchedEngine, score_rows

__all__ = ["drawn_rows", "mean_gradient", "pair_help"]

ROWS = 256

Floats = NDArray[np.float64]


def pair_help(loaded: LoadedModel, engine: BatchedEngine, pairs: Sequence[Pair]) -> Floats:
    """[pair, choice]; `engine` scores along the G of each choice."""
    up, down = (
        score_rows(engine, side, loaded.model.device)[0] / [[row.targets] for row in side]
        for side in encode_sides(pairs, loaded.encoder)
    )
    return np.asarray(up - down)


def mean_gradient(
    config: ScoreConfig,
    loaded: LoadedModel,
    weights: Parameters,
    rows: Sequence[Encoded],
    rank: int | None,
) -> Factored:
    """Of low rank where the run's directions are."""
    model = loaded.model
    side = as_side(rows, config.tokens_on(model.device.type, model.size), model.device)
    if rank:
        tokens = torch.tensor([[row.targets / len(rows) for row in rows]])
        (low,) = low_rank_directions(model, weights, side, tokens, rank)
        return low
    total = zero_sum(weights)
    with adding_gradients(total, weights):
        for batch in side.batches:
            backward(model, batch, torch.ones(len(batch), device=model.device))
    return {name: value / len(rows) for name, value in total.items()}


def drawn_rows(
    pool: Pool, chosen: NDArray[np.bool_], loaded: LoadedModel, seed: int
) -> list[Encoded]:
    """The chosen rows in tokens, or `ROWS` drawn from them."""
    rows = np.flatnonzero(chosen)
    if len(rows) > ROWS:
        rows = np.random.default_rng(seed).choice(rows, ROWS, replace=False)
    mask = np.zeros(len(chosen), dtype=bool)
    mask[rows] = True
    examples = (example for _, example in pool.rows(mask))
    return [loaded.encoder.encode(example) for example in examples if isinstance(example, Example)]
