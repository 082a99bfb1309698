"""Controls: what must hold if the scores of a run mean what they say.

    scored again        the same pairs give the scores of the run                 ρ ≥ 0.9
    swapped pairs       chosen and rejected exchanged: the ranking is reversed    ρ ≤ 0; weighted
                                                                                  alike ρ ≤ −0.5
    shuffled pairs      exchanged in a random half of them, weighted alike        |mean ρ| ≤ 0.4
    random direction    as long as the direction of the pairs                     |mean ρ| ≤ 0.4
    length              the score is more than a count of supervised tokens       |ρ| ≤ 0.7
    resampled pairs     drawn with replacement: the best rows stay the best       overlap ≥
                                                                                  (1 + 2 share) / 3

    ρ: rank correlation with the scores of the run, over a random sample of its rows

Choices made here:
- overlap must be a third of the way from chance to 1, because rows of nearly equal scores trade
  ranks at no cost;
- swapped pairs have other weights than the pairs (π becomes 1 − π), so the strict bound is for
  pairs that are weighted alike;
- chance is a mean of `DRAWS` draws: on the demo's rows, whose gradients share a large part, single
  draws spread by 0.35;
- the bounds of chance and of overlap were set after a look at the demo's runs;
- directions have full rank here, and of several targets the mean counts.
"""

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from typing import Any, TypeAlias

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor

from prism_select.core.engines import ENGINES
from prism_select.core.gradients import norm
from prism_select.core.layers import Direction, Parameters
from prism_select.core.statistics import overlap_of_best, rank_correlation
from prism_select.data.encoding import Encoded
from prism_select.data.records import Pair
from prism_select.directions.answer_products import AnswerProducts
from prism_select.directions.cross_validation import direction_coefficients
from prism_select.directions.direction_set import mean_direction
from prism_select.directions.from_pairs import products_of
from prism_select.directions.pair_directions import direction_by_products
from prism_select.directions.pair_encoding import EncodedPairs, encode_sides
from prism_select.directions.preconditioning import fit_curvature
from prism_select.directions.way import Way, way_of
from prism_select.models.causal_lm import CausalLM
from prism_select.models.layer_selection import select_parameters
from prism_select.models.loading import LoadedModel
from prism_select.run.config import ScoreConfig
from prism_select.run.progress import Progress
from prism_select.run.thresholds import (
    CHANCE_CORRELATION,
    CONTROL_SHARE_OF_OVERLAP,
    LENGTH_CORRELATION,
    REPEATED_CORRELATION,
    SWAPPED_CORRELATION,
)
from prism_select.scoring.batched_engine import BatchedEngine, score_rows, without_norms

__all__ = ["Control", "Sample", "run_controls"]

DRAWS = 8
TOGETHER = 2**28  # numbers of directions in memory at a time

Floats: TypeAlias = NDArray[np.float64]
Pairs: TypeAlias = Mapping[str, EncodedPairs]


@dataclass(frozen=True)
class Control:
    """What was measured, and the bounds that it must keep."""

    name: str
    measured: str
    value: float
    at_least: float = -np.inf
    at_most: float = np.inf

    @property
    def holds(self) -> bool:
        return self.at_least <= self.value <= self.at_most

    def as_json(self) -> dict[str, Any]:
        return {**vars(self), "holds": self.holds, "words": self.in_words()}

    def in_words(self) -> str:
        low, high = (f"{bound:.2f}" for bound in (self.at_least, self.at_most))
        if self.at_most == np.inf:
            bounds = f"{low} or more"
        elif self.at_least == -np.inf:
            bounds = f"{high} or less"
        else:
            bounds = f"{low} to {high}"
        verdict = "holds" if self.holds else "FAILED"
        return f"{self.name}: {verdict}, {self.measured} {self.value:.2f}, wanted {bounds}"


@dataclass(frozen=True)
class Sample:
    """Rows of the run with their scores there, and the share of its rows that the run chose."""

    rows: Sequence[Encoded]
    scores: Float[np.ndarray, " rows"]
    share: float


def run_controls(
    config: ScoreConfig,
    loaded: LoadedModel,
    targets: Mapping[str, Sequence[Pair]],
    sample: Sample,
    progress: Progress,
) -> list[Control]:
    """`targets` are the pairs as the run had them, in repair exchanged; without any, only length is
    controlled."""
    tokens = np.array([row.targets for row in sample.rows], dtype=np.float64)
    unit = tokens if config.ranking == "score_per_token" else np.ones(len(tokens))
    ours = sample.scores / unit
    by_length = rank_correlation(ours, tokens) if np.ptp(tokens) else 0.0
    length = Control(
        "length",
        "rank correlation with tokens",
        by_length,
        -LENGTH_CORRELATION,
        LENGTH_CORRELATION,
    )
    if not targets:
        return [length]
    pairs = {name: encode_sides(of_target, loaded.encoder) for name, of_target in targets.items()}
    scores: dict[str, list[Floats]] = {}
    with progress.task("controls", None):
        for name, values in scores_of(config, loaded.model, pairs, sample.rows, progress):
            scores.setdefault(name, []).append(values / unit)

    def rho(name: str) -> float:
        return float(np.mean([rank_correlation(ours, values) for values in scores[name]]))

    share, resampled = sample.share, scores["resampled"]
    overlap = float(np.mean([overlap_of_best(ours, values, share) for values in resampled]))
    once = "rank correlation with the run"
    mean = f"mean rank correlation with the run over {DRAWS} draws"
    chance = (-CHANCE_CORRELATION, CHANCE_CORRELATION)
    lowest_overlap = share + CONTROL_SHARE_OF_OVERLAP * (1 - share)
    swapped = f"swapped pairs, weighted by {config.weighting}"
    return [
        Control("scored again", once, rho("again"), at_least=REPEATED_CORRELATION),
        Control(
            "swapped pairs, weighted alike",
            once,
            rho("swapped alike"),
            at_most=SWAPPED_CORRELATION,
        ),
        Control(swapped, once, rho("swapped"), at_most=0.0),
        Control("shuffled pairs", mean, rho("shuffled"), *chance),
        Control("random direction", mean, rho("random"), *chance),
        length,
        Control("resampled pairs", "overlap of the best rows", overlap, at_least=lowest_overlap),
    ]


def scores_of(
    config: ScoreConfig, model: CausalLM, pairs: Pairs, rows: Sequence[Encoded], progress: Progress
) -> Iterator[tuple[str, Floats]]:
    """Scores of the rows along each direction, as many directions at a time as memory takes."""
    weights = select_parameters(model.network, config.layers)
    together = max(1, TOGETHER // sum(weight.numel() for weight in weights.values()))
    curvature = fit_curvature(config, model, weights, rows, config.seed, progress)
    named_directions = directions_of(config, model, weights, pairs)
    while batch := list(islice(named_directions, together)):
        names = [name for name, _ in batch]
        directions = [curvature.solve(direction, config.dampings[0]) for _, direction in batch]
        measure = without_norms(ENGINES[config.first_engine](model, weights, directions))
        engine = BatchedEngine(measure, config.tokens_on(model.device.type, model.size))
        scores, _ = score_rows(engine, rows, model.device)
        yield from zip(names, scores.T, strict=True)


def directions_of(
    config: ScoreConfig, model: CausalLM, weights: Parameters, pairs: Pairs
) -> Iterator[tuple[str, Direction]]:
    """Each direction with the name of its control; drawn ones come `DRAWS` times."""
    draw = random.Random(config.seed)
    targets = [
        (encoded, products_of(config, model, weights, [encoded])) for encoded in pairs.values()
    ]

    def along(
        change: Callable[[NDArray[np.int64]], NDArray[np.int64]], weighting: str = config.weighting
    ) -> Direction:
        way = replace(way_of(config), weighting=weighting)
        return mean_direction(
            [
                direction_by_products(
                    config, model, weights, encoded, changed(way, products, change)
                )
                for encoded, products in targets
            ]
        )

    again = along(lambda answers: answers)
    yield "again", again
    yield "swapped", along(swapped)
    yield "swapped alike", along(swapped, "uniform")
    length = norm(again)
    for seed in range(DRAWS):
        yield "shuffled", along(partial(half_swapped, draw), "uniform")
        yield "resampled", along(partial(resampled, draw))
        noise = torch.Generator().manual_seed(config.seed + seed)
        drawn = {
            name: torch.randn(value.shape, generator=noise).to(value)
            for name, value in again.items()
        }
        scale = length / norm(drawn)
        yield "random", {name: value * scale for name, value in drawn.items()}


def changed(
    way: Way,
    products: AnswerProducts,
    change: Callable[[NDArray[np.int64]], NDArray[np.int64]],
) -> Float[Tensor, " answers"]:
    """What each answer counts in the direction of changed pairs. A change maps the numbers of both
    answers of the pairs, (2, pairs), to those that take their places."""
    count = len(products.tokens)
    answers = torch.from_numpy(change(np.arange(count).reshape(2, -1)).ravel())
    own = products.of(answers.tolist())
    coefficients = direction_coefficients(way, own)
    return coefficients.new_zeros(count).index_add(0, answers, coefficients)


def swapped(answers: NDArray[np.int64]) -> NDArray[np.int64]:
    return answers[::-1]


def half_swapped(draw: random.Random, answers: NDArray[np.int64]) -> NDArray[np.int64]:
    """A random half of the pairs with their answers exchanged."""
    count = answers.shape[1]
    own, found = draw.sample(range(count), count // 2), answers.copy()
    found[:, own] = answers[::-1, own]
    return found


def resampled(draw: random.Random, answers: NDArray[np.int64]) -> NDArray[np.int64]:
    """As many pairs, drawn with replacement."""
    count = answers.shape[1]
    return answers[:, draw.choices(range(count), k=count)]
