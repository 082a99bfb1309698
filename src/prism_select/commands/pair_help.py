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
from dataclasses import replace

import numpy as np
import pyarrow.compute as pc
import torch
from numpy.typing import NDArray

from prism_select.commands.steps import Checkpoint, RunDirections
from prism_select.core.gradients import adding_gradients, zero_sum
from prism_select.core.layers import Factored, Parameters, is_large
from prism_select.core.likelihood import backward
from prism_select.data.encoding import Encoded
from prism_select.data.pool import Pool
from prism_select.data.records import Example, Pair
from prism_select.directions.pair_directions import RANK
from prism_select.directions.pair_encoding import as_side, encode_sides
from prism_select.directions.range_finder import low_rank_directions
from prism_select.models.loading import LoadedModel
from prism_select.run.config import ScoreConfig
from prism_select.run.folder import Store
from prism_select.run.thresholds import HARDLY_HELPED
from prism_select.scoring.batched_engine import BatchedEngine, score_rows
from prism_select.scoring.engine_choice import make_engine
from prism_select.scoring.shards import ScoringJob
from prism_select.selection.choice import Chosen
from prism_select.selection.scores_file import scores_tables

__all__ = ["drawn_rows", "mean_gradient", "pair_help", "with_pair_help"]

ROWS = 256

Floats = NDArray[np.float64]


def with_pair_help(
    config: ScoreConfig,
    store: Store,
    job: ScoringJob,
    checkpoint: Checkpoint,
    directions: RunDirections,
    chosen: Chosen,
) -> Chosen:
    """With how many pairs the chosen rows hardly help, where the choice serves groups."""
    inputs, loaded = job.inputs, checkpoint.loaded
    if "coverage" not in chosen.figures or not inputs.targets or not chosen.counts.get("selected"):
        return chosen
    verdicts = (table["verdict"] for table in scores_tables(store.path, ["verdict"]))
    taken = np.concatenate([pc.equal(texts, "selected").to_numpy() for texts in verdicts])
    weights, plain = directions.direction_set.weights, replace(config, normalize="none")
    full = directions.direction_set.full
    pairs = [pair for pairs in inputs.targets.values() for pair in pairs]

    choices = {"hardly_helped": taken}
    if chosen.larger is not None:
        choices["hardly_helped_by_twice"] = chosen.larger
    rows = [drawn_rows(inputs.pool, each, loaded, config.seed) for each in choices.values()]
    rank = full.rank if full else RANK if is_large(weights) else None
    along = [mean_gradient(config, loaded, weights, some, rank) for some in rows]
    engine = make_engine(plain, job.engine, loaded.model, weights, along)
    help_of = pair_help(loaded, engine, pairs)
    few = (help_of < HARDLY_HELPED * help_of.mean(0)).sum(0).tolist()
    coverage = {
        **chosen.figures["coverage"],
        "pairs": len(pairs),
        **dict(zip(choices, few, strict=True)),
    }
    return replace(chosen, figures={**chosen.figures, "coverage": coverage})


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
