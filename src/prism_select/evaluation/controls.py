"""Controls: what must hold if the scores of a run mean what they say. Each can fail, and then says
so.

    scored again        the same pairs: the scores of the run                                 ρ ≥ 0.9
    swapped pairs       chosen and rejected exchanged: the ranking turns, most weighted alike ρ ≤ 0, −0.5 alike
    shuffled pairs      exchanged in a random half of them, weighted alike: chance            |mean ρ| ≤ 0.4
    random direction    as long as that of the pairs: chance                                  |mean ρ| ≤ 0.4
    length              supervised tokens: the score is more than a count of them             |ρ| ≤ 0.7
    resampled pairs     drawn with replacement: the best rows stay the best             overlap ≥ (1 + 2 share) / 3

    ρ: rank correlation with the scores of the run, over a random sample of its rows

Choices made here: overlap is asked to be a third of the way from chance to the whole, since rows of
nearly equal scores change places at no cost. Swapped pairs weigh otherwise than the pairs as they
are (π becomes 1 − π), so chance is asked for where pairs weigh alike. Chance is a mean of `DRAWS`
draws, since one alone spread by 0.35 on the demo's rows, whose gradients share a large part. The
bounds of chance and of overlap were set after a look at the demo's runs. A direction is never cut
to a rank here, and of several targets the mean counts."""

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any, TypeAlias

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray

from prism_select.core.engines import ENGINES
from prism_select.core.layers import Direction, Parameters
from prism_select.core.statistics import overlap_of_best, rank_correlation
from prism_select.core.target_gradient import norm, target_gradient
from prism_select.data.encoding import Encoded, Encoder
from prism_select.data.records import Pair
from prism_select.data.targets import most_alike
from prism_select.directions.common_part import without_common
from prism_select.directions.from_pairs import Coded, DirectionSet, as_side, encode_sides, mean_of
from prism_select.directions.layout import DirectionLayout
from prism_select.directions.preconditioning import preconditioned
from prism_select.models.causal_lm import CausalLM
from prism_select.models.layer_selection import select_parameters
from prism_select.run.config import ScoreConfig
from prism_select.run.progress import Progress
from prism_select.scoring.batched_engine import BatchedEngine, of_rows, plainly

__all__ = ["Control", "Sample", "run_controls"]

DRAWS, CHANCE = 8, 0.4


TOGETHER = 2**28  # numbers of directions held at a time


Floats: TypeAlias = NDArray[np.float64]


Pairs: TypeAlias = Mapping[str, Coded]


@dataclass(frozen=True)
class Control:
    name: str
    measured: str
    value: float
    at_least: float = -np.inf
    at_most: float = np.inf

    @property
    def holds(self) -> bool:
        return self.at_least <= self.value <= self.at_most

    def told(self) -> dict[str, Any]:
        return {**vars(self), "holds": self.holds, "words": self.in_words()}

    def in_words(self) -> str:
        low, high = (f"{bound:.2f}" for bound in (self.at_least, self.at_most))
        wanted = f"{low} or more" if self.at_most == np.inf else f"{high} or less"
        wanted = wanted if np.inf in (-self.at_least, self.at_most) else f"{low} to {high}"
        return f"{self.name}: {'holds' if self.holds else 'FAILED'}, {self.measured} {self.value:.2f}, wanted {wanted}"


@dataclass(frozen=True)
class Sample:
    """Rows of the run with the scores that it gave them, and the share of its rows that it
    chose."""

    rows: Sequence[Encoded]
    scores: Float[np.ndarray, " rows"]
    share: float


def run_controls(
    config: ScoreConfig,
    loaded: tuple[CausalLM, Encoder],
    targets: Mapping[str, Sequence[Pair]],
    sample: Sample,
    progress: Progress,
) -> list[Control]:
    """`targets` are the pairs as the run had them, in repair exchanged already; without any, only
    length is told."""
    tokens = np.array([row.targets for row in sample.rows], dtype=np.float64)
    unit = tokens if config.ranking == "score_per_token" else np.ones(len(tokens))
    known = sample.scores / unit
    by_length = rank_correlation(known, tokens) if np.ptp(tokens) else 0.0
    controls = [Control("length", "rank correlation with tokens", by_length, -0.7, 0.7)]
    if not targets:
        return controls
    kept = {name: most_alike(each, config.nearest_share) for name, each in targets.items()}
    pairs = {name: encode_sides(each, loaded[1]) for name, each in kept.items()}
    found: dict[str, list[Floats]] = {}
    with progress.task("controls", None):
        for name, scores in scores_of(config, loaded[0], pairs, sample.rows, progress):
            found.setdefault(name, []).append(scores / unit)

    def rho(name: str) -> float:
        return float(np.mean([rank_correlation(known, scores) for scores in found[name]]))

    overlap = float(
        np.mean([overlap_of_best(known, scores, sample.share) for scores in found["resampled"]])
    )
    what, mean = (
        "rank correlation with the run",
        f"mean rank correlation with the run over {DRAWS} draws",
    )
    return [
        Control("scored again", what, rho("again"), at_least=0.9),
        Control("swapped pairs, weighted alike", what, rho("swapped alike"), at_most=-0.5),
        Control(
            f"swapped pairs, weighted by {config.weighting}", what, rho("swapped"), at_most=0.0
        ),
        Control("shuffled pairs", mean, rho("shuffled"), -CHANCE, CHANCE),
        Control("random direction", mean, rho("random"), -CHANCE, CHANCE),
        *controls,
        Control(
            "resampled pairs",
            "overlap of the best rows",
            overlap,
            at_least=(1 + 2 * sample.share) / 3,
        ),
    ]


def scores_of(
    config: ScoreConfig, model: CausalLM, pairs: Pairs, rows: Sequence[Encoded], progress: Progress
) -> Iterator[tuple[str, Floats]]:
    """Scores of the rows along each direction, so many at a time as memory takes."""
    weights = select_parameters(model.network, config.layers)
    size = max(1, TOGETHER // sum(weight.numel() for weight in weights.values()))
    every, blocks = directions_of(config, model, weights, pairs), None
    while few := list(islice(every, size)):
        names, directions = [name for name, _ in few], [direction for _, direction in few]
        if config.curvature != "flat":
            drawn = random.Random(config.seed).sample(rows, min(len(rows), config.curvature_rows))
            plain = DirectionSet(weights, directions, DirectionLayout(targets=names), {})
            single = replace(config, damping=f"{config.dampings[0]:g}")
            done = preconditioned(single, model, plain, drawn, progress, blocks)
            directions, blocks = list(done.aim.directions), done.blocks
        engine = ENGINES[config.first_engine](model, weights, directions)
        scores, _ = of_rows(
            BatchedEngine(plainly(engine), config.tokens_on(model.device.type)), rows, model.device
        )
        yield from zip(names, scores.T, strict=True)


def directions_of(
    config: ScoreConfig, model: CausalLM, weights: Parameters, pairs: Pairs
) -> Iterator[tuple[str, Direction]]:
    draw = random.Random(config.seed)

    def along(change: Callable[[Coded], Coded], weighting: str = config.weighting) -> Direction:
        return direction_of(
            config, model, weights, [change(each) for each in pairs.values()], weighting
        )

    again = along(lambda each: each)
    yield "again", again
    yield "swapped", along(lambda each: (each[1], each[0]))
    yield "swapped alike", along(lambda each: (each[1], each[0]), "uniform")
    length = norm(again)
    for seed in range(DRAWS):
        yield "shuffled", along(lambda each: half_swapped(each, draw), "uniform")
        yield "resampled", along(lambda each: resampled(each, draw))
        noise = torch.Generator().manual_seed(config.seed + seed)
        other = {
            name: torch.randn(value.shape, generator=noise).to(value)
            for name, value in again.items()
        }
        scale = length / norm(other)
        yield "random", {name: value * scale for name, value in other.items()}


def direction_of(
    config: ScoreConfig,
    model: CausalLM,
    weights: Parameters,
    pairs: Sequence[Coded],
    weighting: str,
) -> Direction:
    """The mean over targets, with the remedies of the run."""
    found = []
    for chosen, rejected in pairs:
        sides = [
            as_side(rows, config.tokens_on(model.device.type), model.device)
            for rows in (chosen, rejected)
        ]
        target = target_gradient(model, weights, (sides[0], sides[1]), weighting, config.anchor)
        found.append((without_common(target) if config.common == "remove" else target).direction)
    return found[0] if len(found) == 1 else mean_of(found, [1] * len(found))


def half_swapped(pairs: Coded, draw: random.Random) -> Coded:
    chosen, rejected = map(list, pairs)
    for i in draw.sample(range(len(chosen)), len(chosen) // 2):
        chosen[i], rejected[i] = rejected[i], chosen[i]
    return chosen, rejected


def resampled(pairs: Coded, draw: random.Random) -> Coded:
    places = draw.choices(range(len(pairs[0])), k=len(pairs[0]))
    return [pairs[0][i] for i in places], [pairs[1][i] for i in places]
