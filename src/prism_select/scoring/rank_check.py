"""TODO."""

from collections.abc import Sequence
from typing import Any

from prism_select.core.engines import ENGINES
from prism_select.core.layers import Factored
from prism_select.core.statistics import rank_correlation
from prism_select.data.encoding import Encoded
from prism_select.directions.from_pairs import DirectionSet
from prism_select.directions.low_rank import factor
from prism_select.models.causal_lm import CausalLM
from prism_select.run.config import ScoreConfig
from prism_select.scoring.batched_engine import BatchedEngine, of_rows, plainly

__all__ = ["reduced"]

COMPARED = 64  # rows


def reduced(
    config: ScoreConfig, model: CausalLM, aim: DirectionSet, sample: Sequence[Encoded]
) -> tuple[Sequence[Factored], dict[str, Any]]:
    """The directions cut to `--rank`, and what that costs: the share of the first one's energy that
    is kept, and the rank correlation of its scores before and after on up to `COMPARED` rows of the
    sample."""
    low = [factor(model.network, direction, config.rank) for direction in aim.directions]
    rows = sample[:COMPARED]
    make = ENGINES[config.first_engine]
    engine = make(model, aim.weights, [aim.directions[0], low[0].direction])
    pairs, _ = of_rows(
        BatchedEngine(plainly(engine), config.tokens_on(model.device.type)), rows, model.device
    )
    told = {"rank": config.rank, "energy_kept": low[0].share, "rows": len(rows)}
    told["rank_correlation"] = rank_correlation(pairs[:, 0], pairs[:, 1])
    return [each.direction for each in low], told
