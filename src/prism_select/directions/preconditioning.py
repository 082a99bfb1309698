"""Preconditioning: the directions of a run, each divided once by the curvature at the model.

    d ← (H + λ)⁻¹ d      H: fitted to `CURVATURE_ROWS` random rows of the pool, or Adam's moments

Choices made here:
- the chosen half is divided as the direction is, so the halves still add up to the score;
- further dampings apply to the mean of the targets alone.
"""

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from prism_select.core.gradients import dot, norm
from prism_select.core.layers import Parameters, dense
from prism_select.data.batches import collate
from prism_select.data.encoding import Encoded
from prism_select.directions.adam_moments import adam_curvature
from prism_select.directions.curvature import CURVATURES, Curvature, Flat
from prism_select.directions.direction_set import DirectionSet, mean_factored
from prism_select.models.causal_lm import CausalLM
from prism_select.run.config import CurvatureOptions, ScoreConfig
from prism_select.run.errors import NotFinite
from prism_select.run.progress import Progress

__all__ = [
    "CURVATURE_ROWS",
    "CurvatureFacts",
    "Preconditioned",
    "fit_curvature",
    "pair_curvature_facts",
    "preconditioned",
]

CURVATURE_ROWS = 256


@dataclass(frozen=True, kw_only=True)
class CurvatureFacts:
    """What the manifest says of the curvature."""

    name: str
    damping: float
    rows: int
    cosine: Mapping[str, float]  # of each target's direction before and after
    by_number: Sequence[str]  # matrices of which the diagonal alone is known


def pair_curvature_facts(config: CurvatureOptions, direction_set: DirectionSet) -> CurvatureFacts:
    """Of --curvature pairs, which divides where the pairs are read (pair_curvature.py)."""
    assert direction_set.pair_cosines is not None
    rows = sum(len(diagnosis.pairs) for diagnosis in direction_set.diagnoses.values())
    return CurvatureFacts(
        name=config.curvature,
        damping=config.dampings[0],
        rows=rows,
        cosine=direction_set.pair_cosines,
        by_number=(),
    )


@dataclass(frozen=True)
class Preconditioned:
    direction_set: DirectionSet
    facts: CurvatureFacts


def fit_curvature(
    config: ScoreConfig,
    model: CausalLM,
    weights: Parameters,
    sample: Sequence[Encoded],
    seed: int,
    progress: Progress,
) -> Curvature:
    """The curvature that `config` names, on rows drawn from the sample; flat and adam read none."""
    if config.curvature in ("flat", "pairs"):
        return Flat()
    if config.curvature == "adam":
        return adam_curvature(config, model.network, weights)
    rows = random.Random(seed).sample(sample, min(len(sample), CURVATURE_ROWS))
    with progress.task(f"curvature of {len(rows)} rows", None):
        batches = [collate([row], model.device) for row in rows]
        return CURVATURES[config.curvature](model, weights, batches, seed)


def preconditioned(
    config: CurvatureOptions, direction_set: DirectionSet, curvature: Curvature, progress: Progress
) -> Preconditioned:
    """Raises NotFinite when a direction is lost in the division."""
    damping, *dampings = config.dampings
    targets = direction_set.of_targets
    count = len(direction_set.directions) + len(dampings)
    with progress.task(f"dividing {count} directions by the curvature", None):
        divided = [curvature.solve(dense(d), damping) for d in direction_set.directions]
        if dampings:
            mean = dense(mean_factored(targets))
            divided += [curvature.solve(mean, damping) for damping in dampings]
    lengths = [norm(direction) for direction in divided[: len(targets)]]
    if not all(0 < length < float("inf") for length in lengths):
        raise NotFinite(
            f"the direction after --curvature {config.curvature} has length {lengths[0]}; raise "
            "--damping"
        )
    cosines = [
        dot(before, after) / (norm(before) * length)
        for before, after, length in zip(targets, divided, lengths, strict=False)
    ]
    facts = CurvatureFacts(
        name=config.curvature,
        damping=damping,
        rows=curvature.rows,
        cosine=dict(zip(direction_set.layout.targets, cosines, strict=True)),
        by_number=curvature.diagonal_matrices,
    )
    layout = replace(direction_set.layout, lengths=lengths, dampings=dampings)
    return Preconditioned(replace(direction_set, directions=divided, layout=layout), facts)
