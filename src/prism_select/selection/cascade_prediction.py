"""Prediction: a cheap predicted score of every row, and how many of the best rows are still missed
when only some are scored exactly.

    features    states before and after the first blocks, averaged over the supervised tokens,
                through a random projection; numbers of tokens
    predicted   kernel ridge regression on them, learned from the rows that are scored exactly, with
                some of these rows as centres
    missed(τ) = unscored rows · share that reaches τ among the rows of a random sample that the
                prediction would have left unscored
    recall    = exact scores ≥ τ / m      τ: the highest with that number + missed(τ) ≥ m, where m
                rows are searched for

Choices made here:
- a row of the sample is predicted as if it had not been scored (its residual over one minus its
  leverage), so that it stands for the rows that nobody scored;
- rows with an exact score are counted, not estimated: the interval (Clopper and Pearson 1934) is
  that of the missed rows alone.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from scipy.linalg import cho_factor, cho_solve, cholesky, solve_triangular
from scipy.stats import beta
from torch import Tensor, nn

from prism_select.core.blocks import stack_of
from prism_select.core.likelihood import Batch, LanguageModel
from prism_select.run.errors import BadModel

__all__ = [
    "FEATURES",
    "Prediction",
    "Recall",
    "cutoff_for",
    "feature_extractor",
    "predict_scores",
    "recall_of",
]

Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]

DEPTH = 1 / 6  # of the blocks
WIDTH = 128  # numbers of each averaged state, after the projection
FEATURES = 2 * WIDTH + 2
GAMMA = 0.5  # of the kernel, over the number of features
RIDGE = 0.1  # the penalty
CENTRES = 1024  # rows that the kernel is made of
JITTER, TINY = 1e-6, 1e-12
MANY = 1 << 12  # rows learned from or predicted at a time


class _Enough(Exception):
    """The pass has reached the last block that is needed."""


def feature_extractor(
    model: LanguageModel, seed: int
) -> Callable[[Batch], Float[Tensor, "batch features"]]:
    """Features of a batch: a pass through the first `DEPTH` of the blocks, and no head.

    Raises BadModel where the network is no stack of blocks.
    """
    _, blocks = stack_of(model.network)
    depth = max(1, round(DEPTH * len(blocks)))
    if depth >= len(blocks):
        raise BadModel(
            "--cascade: the model has no stack of blocks whose lower part could be read; leave it "
            "out"
        )
    projections: dict[int, Tensor] = {}

    def features(batch: Batch) -> Float[Tensor, "batch features"]:
        target = torch.nn.functional.pad(batch.predicted, (1, 0))[:, :, None]
        averages = list[Tensor]()
        for state in _block_inputs(model, batch, (blocks[0], blocks[depth])):
            state = state.to(target.device)
            width = state.shape[-1]
            if width not in projections:
                draw = torch.Generator().manual_seed(seed)
                projections[width] = (
                    torch.randn(width, WIDTH, generator=draw).to(state.device) / width**0.5
                )
            averages.append((state.float() * target).sum(1) / target.sum(1) @ projections[width])
        sizes = torch.stack([batch.counts, batch.real.sum(1)], 1).to(averages[0]).log1p()
        return torch.cat([*averages, sizes], 1)

    return features


def _block_inputs(model: LanguageModel, batch: Batch, blocks: Sequence[nn.Module]) -> list[Tensor]:
    """The input of each of these blocks; nothing above the last one runs."""
    inputs: list[Tensor] = []

    def store(module: nn.Module, args: tuple[Tensor, ...], named: dict[str, Tensor]) -> None:
        inputs.append(args[0] if args else named["hidden_states"])
        if module is blocks[-1]:
            raise _Enough

    hooks = [block.register_forward_pre_hook(store, with_kwargs=True) for block in blocks]
    try:
        with torch.no_grad():
            model.hidden(batch)
    except _Enough:
        pass
    finally:
        for hook in hooks:
            hook.remove()
    return inputs


@dataclass(frozen=True)
class Prediction:
    """Predicted scores: of all rows, and of each row of the sample as if it had not been scored."""

    rows: Floats
    sample: Floats


@dataclass(frozen=True)
class Recall:
    """Share of the best rows that have an exact score, with its 95% interval."""

    estimate: float
    low: float
    high: float
    threshold: float  # the estimated score of the last of the best rows


def predict_scores(
    features: Float[np.ndarray, "rows features"],
    exact: Floats,
    sample: NDArray[np.int64],
    seed: int,
) -> Prediction:
    """Learned from the rows whose `exact` score is not NaN; `sample` are rows drawn at random.

    Learned are scores clipped at their 0.5% and 99.5% quantiles: a few huge scores would otherwise
    be all that is learned. A row of the sample without an exact score is predicted as −∞.
    """
    scored = np.flatnonzero(np.isfinite(exact))
    rows = features[scored]
    middle, spread = rows.mean(0, dtype=np.float64), rows.std(0, dtype=np.float64) + TINY
    clipped = exact[scored].clip(*np.quantile(exact[scored], [0.005, 0.995]))
    offset, unit = clipped.mean(), clipped.std() + TINY
    centres = (rows[np.random.default_rng(seed).permutation(len(rows))[:CENTRES]] - middle) / spread
    root = cholesky(_kernel(centres, centres) + JITTER * np.eye(len(centres)), lower=True)

    def kernel(values: NDArray[Any]) -> Floats:
        return _kernel(centres, (values.astype(np.float64) - middle) / spread)

    def batches() -> Iterator[tuple[Floats, Floats]]:
        for indices in np.array_split(np.arange(len(rows)), len(rows) // MANY + 1):
            inputs = solve_triangular(root, kernel(rows[indices]), lower=True)
            yield inputs, (clipped[indices] - offset) / unit

    gram, moment = RIDGE * np.eye(len(centres)), np.zeros(len(centres))
    for inputs, scores in batches():
        gram, moment = gram + inputs @ inputs.T, moment + inputs @ scores
    factor = cho_factor(gram, lower=True)
    slopes, held_out = cho_solve(factor, moment), list[Floats]()
    for inputs, scores in batches():
        leverage = np.square(solve_triangular(factor[0], inputs, lower=True)).sum(0)
        held_out.append(scores - (scores - slopes @ inputs) / (1 - leverage))
    residuals = np.concatenate(held_out)
    by_centre = solve_triangular(root.T, slopes)
    pieces = np.array_split(features, len(features) // MANY + 1)
    predicted = np.concatenate([by_centre @ kernel(piece) for piece in pieces])
    index, has_score = np.searchsorted(scored, sample), np.isin(sample, scored)
    of_sample = residuals[index * has_score] * unit + offset
    return Prediction(predicted * unit + offset, np.where(has_score, of_sample, -np.inf))


def _kernel(a: Floats, b: Floats) -> Floats:
    squares = np.square(a).sum(1)[:, None] + np.square(b).sum(1) - 2 * a @ b.T
    return np.asarray(np.exp(-GAMMA / a.shape[1] * squares))


def recall_of(exact: Floats, unpredicted: Bools, unscored: int, best: int) -> Recall:
    """The recall of the `best` rows, when `unscored` rows have no exact score.

    `exact` are the scores of the other rows; `unpredicted` marks those of the sample that the
    prediction would have left unscored.
    """
    order = np.argsort(-exact, kind="stable")
    reach, count = unpredicted[order].cumsum(), max(1, int(unpredicted.sum()))
    shares = (
        reach / count,
        beta.ppf(0.975, reach + 1, count - reach),
        beta.ppf(0.025, reach, count - reach + 1),
    )
    ends = list[int]()
    for share in shares:
        total = np.arange(1, len(order) + 1) + unscored * np.nan_to_num(share, nan=0.0)
        enough = total >= best
        ends.append(int(enough.argmax()) if enough.any() else len(order) - 1)
    estimate, low, high = (min(1.0, (end + 1) / best) for end in ends)
    return Recall(estimate, low, high, float(exact[order[ends[0]]]))


def cutoff_for(predicted: Floats, reaches: Bools, missable: int) -> float:
    """The predicted score down to which rows must still be scored.

    `predicted` are those of the sample, `reaches` marks its rows that reach the threshold and would
    be missed; at most `missable` of them stay below the result. Infinite where that holds already.
    """
    scores = np.sort(predicted[reaches])
    return float(scores[missable]) if len(scores) > missable else float("inf")
