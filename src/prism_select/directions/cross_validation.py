"""Cross-validation: how well the direction of some pairs ranks the answers of others.

    fold of pairs held out → direction of the other pairs, of length one → scores of the fold's
    answers, chosen and rejected → AUROC over the answers of all folds

No label of a pool takes part: the pairs themselves say what ranking to expect.

Choices made here:
- everything follows from the products of answers, so it costs no pass of the model;
- weights, curvature and common part are those of the pairs that are not held out;
- a held-out answer is scored as a row is: over its supervised tokens, per token, or by the cosine;
- folds pool, since each one's direction has length one;
- the interval resamples groups of pairs, and takes the directions as they are.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor

from prism_select.core.gains import Slopes
from prism_select.directions.answer_products import AnswerProducts
from prism_select.directions.pair_curvature import pair_slopes
from prism_select.directions.pair_folds import PairGroups, folds_of
from prism_select.directions.way import Way
from prism_select.models.layer_selection import upper_blocks

__all__ = [
    "CrossValidation",
    "answer_coefficients",
    "auroc_interval",
    "cross_validate",
    "held_out_scores",
]

DRAWS = 1000

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class CrossValidation:
    """AUROC of held-out chosen against rejected answers, with its 95% interval; the share of pairs
    whose chosen answer ranks first; and the scores of held-out answers, by pair, along directions
    of length one. `by_answers`: no answer is held out and known at once."""

    auroc: float
    interval: tuple[float, float]
    paired: float
    folds: int
    by_answers: bool
    chosen: tuple[float, ...]
    rejected: tuple[float, ...]


def cross_validate(
    products: AnswerProducts,
    way: Way,
    groups: PairGroups,
    seed: int,
    targets: Sequence[int] | None = None,
) -> CrossValidation | None:
    """None where there are too few groups of pairs. `products` are of the chosen answers of all
    pairs, then of the rejected ones. With `targets`, the target of each pair, the direction is the
    mean of those of the targets."""
    folds = folds_of(groups, seed)
    if not folds:
        return None
    scores = held_out_scores(products, way, folds, targets)
    return validation_of(scores, groups, len(folds), seed)


def validation_of(
    scores: Float[Tensor, " answers"], groups: PairGroups, folds: int, seed: int
) -> CrossValidation:
    """From the scores of held-out answers."""
    chosen, rejected = scores.numpy().reshape(2, -1)
    above = (chosen[:, None] > rejected) + (chosen[:, None] == rejected) / 2
    return CrossValidation(
        float(above.mean()),
        auroc_interval(above, groups, seed),
        float(above.diagonal().mean()),
        folds,
        groups.by_answers,
        tuple(map(float, chosen)),
        tuple(map(float, rejected)),
    )


def auroc_interval(above: Floats, groups: PairGroups, seed: int) -> tuple[float, float]:
    """95% percentile interval, over groups drawn with replacement. `above` says of each chosen
    answer whether it scores above each rejected one."""
    low, high = np.quantile(resampled_aurocs(above, groups, seed), [0.025, 0.975])
    return float(low), float(high)


def resampled_aurocs(above: Floats, groups: PairGroups, seed: int) -> Floats:
    drawn = np.random.default_rng(seed).multinomial(
        groups.count, [1 / groups.count] * groups.count, DRAWS
    )
    times = drawn[:, groups.of_pairs].astype(np.float64)
    return np.asarray(((times @ above) * times).sum(1) / times.sum(1) ** 2)


def held_out_scores(
    products: AnswerProducts,
    way: Way,
    folds: Sequence[NDArray[np.int64]],
    targets: Sequence[int] | None = None,
) -> Float[Tensor, " answers"]:
    """Of each answer, along the direction of the pairs outside of its fold. NaN for pairs in no
    fold."""
    own, count = in_layers(products, way.layers), len(products.tokens) // 2
    scores = torch.full((2 * count,), torch.nan, dtype=torch.float64)
    for fold in folds:
        held = [*fold, *(count + fold)]
        scores[held] = along_others(own, way, fold, targets)[held]
    return scores * row_scale(way, own)


def in_layers(products: AnswerProducts, layers: str) -> AnswerProducts:
    """Those in the blocks that `layers` means, as one block."""
    kept = [products.blocks[name] for name in blocks_in(products, layers)]
    return replace(products, blocks={"": torch.stack(kept).sum(0)})


def blocks_in(products: AnswerProducts, layers: str) -> list[str]:
    """The upper blocks that `layers`, late or last:N, means; any other text means all that there
    is."""
    count = 1 + max((int(name) for name in products.blocks if name), default=-1)
    upper = upper_blocks(layers, count)
    if upper is None:
        return [*products.blocks]
    return [name for name in products.blocks if name and int(name) >= count - upper]


def along_others(
    products: AnswerProducts,
    way: Way,
    held_out: NDArray[np.int64],
    targets: Sequence[int] | None = None,
) -> Float[Tensor, " answers"]:
    """∇mean_loglik(a) · d of each answer, where d, of length one, is the direction of the pairs
    that are not held out, in all blocks of `products`."""
    total, count = products.total, len(products.tokens) // 2
    of_targets = torch.zeros(count, dtype=torch.long) if targets is None else torch.tensor(targets)
    is_kept = torch.ones(count, dtype=torch.bool)
    is_kept[held_out] = False
    coefficients = torch.zeros(2 * count, dtype=torch.float64)
    for target in of_targets.unique():
        (kept,) = torch.nonzero(is_kept & (of_targets == target), as_tuple=True)
        answers = torch.cat([kept, count + kept])
        if len(kept):
            coefficients[answers] += direction_coefficients(way, products.of(answers.tolist()))
    along = total @ coefficients
    square = coefficients @ along
    return along / square.sqrt() if square > 0 else torch.zeros_like(along)


def row_scale(way: Way, products: AnswerProducts) -> Float[Tensor, " answers"]:
    """What makes a score of ∇mean_loglik · d."""
    if way.normalize == "norm":
        norms = products.total.diagonal().sqrt()
        return torch.where(norms > 0, 1 / norms, 0)
    tokens = products.tokens.double()
    return torch.ones_like(tokens) if way.normalize == "tokens" else tokens


def direction_coefficients(way: Way, products: AnswerProducts) -> Float[Tensor, " answers"]:
    """v, where the direction is Σ_a v_a ∇mean_loglik(a)."""
    return answer_coefficients(pair_slopes(way, products), products, way.common == "remove")


def answer_coefficients(
    slope: Slopes, products: AnswerProducts, without_common: bool
) -> Float[Tensor, " answers"]:
    """v, from what each answer counts in the mean over pairs."""
    direction = torch.cat([slope.chosen, -slope.rejected]) / len(slope.chosen)
    if without_common:
        common, total = torch.cat([slope.chosen, slope.rejected]), products.total
        square = common @ total @ common
        if square > 0:
            direction = direction - (direction @ total @ common) / square * common
    return direction
