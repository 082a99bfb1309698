"""Rank check: what scores lose when the direction is cut to a low rank.

    energy kept        ‖low‖² / ‖d‖²
    rank correlation   of scores along d and along low, on rows of a sample

Choices made here: the first direction is checked, on `COMPARED` rows at most.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from prism_select.core.engines import ENGINES
from prism_select.core.gradients import norm
from prism_select.core.layers import Factored
from prism_select.core.statistics import rank_correlation
from prism_select.data.encoding import Encoded
from prism_select.directions.direction_set import DirectionSet, FullDirection
from prism_select.directions.low_rank import factor
from prism_select.models.causal_lm import CausalLM
from prism_select.run.config import ScoreConfig
from prism_select.scoring.batched_engine import BatchedEngine, score_rows, without_norms

__all__ = ["RankCheck", "compare_ranks", "cut_to_rank"]

COMPARED = 64  # rows


@dataclass(frozen=True)
class RankCheck:
    """What a cut of the first direction to `rank` keeps: a share of its squared length, and the
    order of `rows` rows; NaN where that is not known."""

    rank: int
    energy_kept: float
    rows: int
    rank_correlation: float


def compare_ranks(
    config: ScoreConfig, model: CausalLM, direction_set: DirectionSet, full: FullDirection
) -> RankCheck:
    """Of a direction that is of low rank from the start."""
    low = direction_set.directions[0]
    engine = ENGINES[config.first_engine](model, direction_set.weights, [low])
    batched = BatchedEngine(without_norms(engine), config.tokens_on(model.device.type, model.size))
    correlation = math.nan
    if full.rows:
        scores, _ = score_rows(batched, full.rows, model.device)
        correlation = rank_correlation(scores[:, 0], full.scores)
    energy = (norm(low) / full.length) ** 2
    return RankCheck(full.rank, energy, len(full.rows), correlation)


def cut_to_rank(
    config: ScoreConfig,
    rank: int,
    model: CausalLM,
    direction_set: DirectionSet,
    sample: Sequence[Encoded],
) -> tuple[Sequence[Factored], RankCheck]:
    """All directions cut to `rank`, and the check on rows of the sample."""
    low = [factor(model.network, direction, rank) for direction in direction_set.directions]
    rows = sample[:COMPARED]
    engine = ENGINES[config.first_engine](
        model, direction_set.weights, [direction_set.directions[0], low[0].direction]
    )
    batched = BatchedEngine(without_norms(engine), config.tokens_on(model.device.type, model.size))
    scores, _ = score_rows(batched, rows, model.device)
    correlation = rank_correlation(scores[:, 0], scores[:, 1])
    check = RankCheck(rank, low[0].energy_kept, len(rows), correlation)
    return [cut.direction for cut in low], check
