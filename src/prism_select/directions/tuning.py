"""Tuning: what the user has not set of a way is chosen by cross-validation on the pairs.

    ways, simplest first → scores of held-out answers along each → AUROC A_k of each
    error of A_k − A_l    √Σ_g (ψ_gk − ψ_gl)² over groups g of pairs (DeLong 1988; of groups:
                          Obuchowski 1997)
    ψ_gk                  1/n Σ (V⁺ + V⁻ − 2 A_k) over the pairs of g; V⁺: share of the rejected
                          answers below the chosen one, V⁻: of the chosen ones above the rejected
    1. the simplest way stays, unless the largest (A_k − A_0) / error is larger than in 95% of draws
       in which no way is better (a reality check: White 2000)
    2. else it is the simplest way whose AUROC is within one error of the best one

Choices made here:
- a way is simpler the fewer options differ from where tuning starts; among as many, normalisation
  changes before the common part, curvature, weighting and layers, and weak curvature before strong;
- the error is that of a difference: all ways rank the same answers, so a difference is surer than
  an AUROC. Of many ways that are equal, the best is more than one error ahead of most; so the
  first step, which counts how many are tried and how alike they are;
- 95%, since folds share pairs and errors are too small (Bengio and Grandvalet 2004): on noise one
  run in ten leaves the simplest way, and at 84%, one standard error, one in three would;
- the common part is projected out of first-order directions alone;
- folds nest: a fold's answers are scored in the way that the other folds choose. A direction
  without two folds serves both of them.
"""

import itertools
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from functools import reduce
from operator import or_
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from scipy.stats import rankdata

from prism_select.directions.answer_products import AnswerProducts
from prism_select.directions.cross_validation import (
    CrossValidation,
    along_others,
    blocks_in,
    in_layers,
    row_scale,
    validation_of,
)
from prism_select.directions.pair_folds import PairGroups, folds_of
from prism_select.directions.way import Way
from prism_select.run.config import TUNABLE

__all__ = ["Trial", "Tuning", "tune", "ways_to_try"]

WEIGHTINGS = ("prism", "uniform", "hard")
DAMPINGS = (1.0, 0.3, 0.1)
COMMON = ("keep", "remove")
NORMALIZATIONS = ("none", "tokens", "norm")

DRAWS = 1000
BY_CHANCE = 0.95  # of the draws without a better way stay below what counts as better

Floats = NDArray[np.float64]
Folds = Sequence[NDArray[np.int64]]


class Trial(NamedTuple):
    """A way, its AUROC in cross-validation, and the standard error of the difference to that of the
    best way."""

    way: Way
    auroc: float
    standard_error: float


@dataclass(frozen=True)
class Tuning:
    """`options` are the names of what was tuned; `tried` has the simplest way first. The AUROC of
    the chosen way is too good, since it was chosen by it; `nested` is not, and has its scores in
    the chosen way's unit."""

    options: tuple[str, ...]
    chosen: Trial
    best: Trial
    tried: tuple[Trial, ...]
    nested: CrossValidation


def tune(
    products: AnswerProducts,
    start: Way,
    fixed: Collection[str],
    groups: PairGroups,
    seed: int,
    targets: Sequence[int] | None = None,
) -> Tuning | None:
    """`fixed` names what the user has set of `start`. None where there are too few groups of pairs;
    products and `targets` as in `cross_validate`."""
    folds = folds_of(groups, seed)
    if not folds:
        return None
    ways = ways_to_try(products, start, fixed)
    scores = scores_without(products, ways, folds, targets)
    plain = np.empty_like(scores[:, 0])
    for number, fold in enumerate(folds):
        own = answers_of(fold, plain)
        plain[:, own] = scores[:, number, own]
    aurocs, parts = auroc_parts(plain, groups.of_pairs)
    chosen, best = choice(aurocs, parts, seed), int(aurocs.argmax())
    errors = np.linalg.norm(parts - parts[best], axis=1)
    trials = [*map(Trial, ways, aurocs.tolist(), errors.tolist())]
    nested = nested_scores(scores, folds, groups.of_pairs, chosen, seed)
    validation = validation_of(torch.from_numpy(nested), groups, len(folds), seed)
    options = tuple(name for name in TUNABLE if name not in fixed)
    return Tuning(options, trials[chosen], trials[best], tuple(trials), validation)


def ways_to_try(products: AnswerProducts, start: Way, fixed: Collection[str]) -> list[Way]:
    """Simplest first."""

    def values(name: str, others: Sequence[str]) -> list[dict[str, Any]]:
        first = getattr(start, name)
        free = [value for value in others if value != first and name not in fixed]
        return [{name: value} for value in [first, *free]]

    options = [
        values("layers", upper_layers(products, start.layers)),
        values("weighting", WEIGHTINGS),
        curvatures(start, fixed),
        values("common", COMMON),
        values("normalize", NORMALIZATIONS),
    ]
    places = itertools.product(*(range(len(option)) for option in options))
    simplest_first = sorted(places, key=lambda place: (len(place) - place.count(0), place))
    ways = (
        replace(start, **reduce(or_, (o[at] for o, at in zip(options, place, strict=True))))
        for place in simplest_first
    )
    return [way for way in ways if way.common == start.common or can_lack_common(way)]


def curvatures(start: Way, fixed: Collection[str]) -> list[dict[str, Any]]:
    """From weak to strong, after that of `start`."""
    dampings = (start.damping,) if "damping" in fixed else DAMPINGS
    first = {"curvature": start.curvature, "damping": start.damping}
    others = [{"curvature": "flat", "damping": start.damping}]
    others += [{"curvature": "pairs", "damping": damping} for damping in dampings]
    if "curvature" in fixed:
        others = [other for other in others if other["curvature"] == start.curvature]
    return [first, *(other for other in others if other != first)]


def can_lack_common(way: Way) -> bool:
    """The pairs' curvature damps what all pairs share, and unpaired answers share nothing."""
    return way.curvature != "pairs" and way.weighting != "unpaired"


def upper_layers(products: AnswerProducts, first: str) -> list[str]:
    """The upper two thirds, half and third of the blocks, where each holds fewer blocks than the
    one before, and than `first`."""
    count = 1 + max((int(name) for name in products.blocks if name), default=-1)
    tried = [first]
    for layers in (f"last:{round(2 * count / 3)}", "late", f"last:{round(count / 3)}"):
        if 0 < len(blocks_in(products, layers)) < len(blocks_in(products, tried[-1])):
            tried.append(layers)
    return tried[1:]


def scores_without(
    products: AnswerProducts,
    ways: Sequence[Way],
    folds: Folds,
    targets: Sequence[int] | None = None,
) -> Float[np.ndarray, "ways folds answers"]:
    """Of each answer, along the direction of the pairs outside of its own fold and of this one."""
    scores = np.empty((len(ways), len(folds), len(products.tokens)))
    own = {layers: in_layers(products, layers) for layers in {way.layers for way in ways}}
    along = dict[Way, Float[np.ndarray, "folds answers"]]()
    for number, way in enumerate(ways):
        unscaled = replace(way, normalize="tokens")
        if unscaled not in along:
            along[unscaled] = along_without(own[way.layers], unscaled, folds, targets)
        scores[number] = along[unscaled] * row_scale(way, own[way.layers]).numpy()
    return np.nan_to_num(scores)  # no direction, no rank


def along_without(
    products: AnswerProducts, way: Way, folds: Folds, targets: Sequence[int] | None
) -> Float[np.ndarray, "folds answers"]:
    along = np.empty((len(folds), len(products.tokens)))
    for i, j in itertools.combinations_with_replacement(range(len(folds)), 2):
        held_out = np.union1d(folds[i], folds[j])
        found = along_others(products, way, held_out, targets).numpy()
        for outer, inner in ((i, j), (j, i)):
            answers = answers_of(folds[inner], along)
            along[outer, answers] = found[answers]
    return along


def answers_of(pairs: NDArray[np.int64], scores: Floats) -> NDArray[np.int64]:
    """The chosen answers of some pairs, and then the rejected ones."""
    return np.concatenate([pairs, scores.shape[-1] // 2 + pairs])


def auroc_parts(
    scores: Float[np.ndarray, "ways answers"], groups: NDArray[np.int64]
) -> tuple[Float[np.ndarray, " ways"], Float[np.ndarray, "ways groups"]]:
    """A and ψ of each way. Ranks give V (Sun and Xu 2014)."""
    count = scores.shape[1] // 2
    ranks = rankdata(scores, axis=1)
    below = (ranks[:, :count] - rankdata(scores[:, :count], axis=1)) / count
    above = 1 - (ranks[:, count:] - rankdata(scores[:, count:], axis=1)) / count
    aurocs = below.mean(1)
    is_in = np.unique(groups)[:, None] == groups
    return aurocs, (below + above - 2 * aurocs[:, None]) @ is_in.T / count


def choice(
    aurocs: Float[np.ndarray, " ways"], parts: Float[np.ndarray, "ways groups"], seed: int
) -> int:
    if not is_beaten(aurocs, parts, seed):
        return 0
    best = aurocs.argmax()
    errors = np.linalg.norm(parts - parts[best], axis=1)
    return int(np.argmax(aurocs >= aurocs[best] - errors))


def is_beaten(
    aurocs: Float[np.ndarray, " ways"], parts: Float[np.ndarray, "ways groups"], seed: int
) -> bool:
    """Whether a way is better than the simplest, beyond what choosing the best of as many ways
    gives by chance."""
    draw, groups = np.random.default_rng(seed), parts.shape[1]
    differences = parts - parts[0]
    errors = np.linalg.norm(differences, axis=1) + np.finfo(float).eps
    drawn = draw.standard_normal((DRAWS, groups)) @ (differences / errors[:, None]).T
    spread = np.sqrt(draw.chisquare(groups - 1, DRAWS) / (groups - 1))
    by_chance = np.quantile(drawn.max(1) / spread, BY_CHANCE)
    return bool(((aurocs - aurocs[0]) / errors).max() > by_chance)


def nested_scores(
    scores: Float[np.ndarray, "ways folds answers"],
    folds: Folds,
    groups: NDArray[np.int64],
    chosen: int,
    seed: int,
) -> Float[np.ndarray, " answers"]:
    """Of each fold's answers, in the way that the other folds choose and in the unit of the chosen
    one: scaled by the ratio of both ways' sizes on the other folds."""
    nested = np.empty(scores.shape[2])
    for number, fold in enumerate(folds):
        pairs = np.setdiff1d(np.arange(len(groups)), fold)
        others = scores[:, number, answers_of(pairs, nested)]
        way = choice(*auroc_parts(others, groups[pairs]), seed)
        sizes = np.linalg.norm(others[[chosen, way]], axis=1)
        own = answers_of(fold, nested)
        nested[own] = scores[way, number, own] * (sizes[0] / sizes[1] if sizes[1] else 1.0)
    return nested
