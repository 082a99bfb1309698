"""Surrogate: a cheap guess of every score, and how many of the best rows are still missed when some
are scored exactly.

    features    states before and after the first blocks, averaged over the supervised tokens, through a random
                projection; tokens and length
    guess       kernel ridge regression on them, from the rows that are scored exactly, with some of them as centres
    missed(τ) = unscored rows · share that reaches τ among rows of a random sample that the guess
    would have left out
    recall    = exact scores ≥ τ / m      τ: the highest with that number + missed(τ) ≥ m, the rows looked for

Choices made here: a row of the sample is guessed as if it had not been scored (its residual over
one minus its leverage), so that it stands for the rows that nobody scored; what was found is known
and not estimated, so the interval (Clopper and Pearson 1934) is that of what was missed alone."""

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

__all__ = ["FEATURES", "Guess", "Recall", "cut_for", "guessed", "looking", "recall_of"]

Floats = NDArray[np.float64]


Bools = NDArray[np.bool_]


DEPTH = 1 / 6  # of the blocks


WIDTH = 128  # numbers that are kept of each average


FEATURES = 2 * WIDTH + 2


GAMMA, RIDGE, CENTRES = (
    0.5,
    0.1,
    1024,
)  # of the kernel, over the number of features; its penalty; rows it is made of


JITTER, TINY = 1e-6, 1e-12


MANY = 1 << 12  # rows learned from or guessed at a time


class _Enough(Exception):
    """What is wanted of a pass is there."""


def looking(model: LanguageModel, seed: int) -> Callable[[Batch], Float[Tensor, "batch features"]]:
    """Features of a batch: a pass through the first `DEPTH` of the blocks, and no head. Raises
    BadModel where the network is no stack of blocks."""
    _, blocks = stack_of(model.network)
    deep = max(1, round(DEPTH * len(blocks)))
    if deep >= len(blocks):
        raise BadModel(
            "--cascade: the model has no stack of blocks to look at the lower part of; leave it out"
        )
    projections: dict[int, Tensor] = {}

    def features(batch: Batch) -> Float[Tensor, "batch features"]:
        target, kept = torch.nn.functional.pad(batch.predicted, (1, 0))[:, :, None], []
        for state in _lower(model, batch, (blocks[0], blocks[deep])):
            width = state.shape[-1]
            if width not in projections:
                draw = torch.Generator().manual_seed(seed)
                projections[width] = (
                    torch.randn(width, WIDTH, generator=draw).to(state.device) / width**0.5
                )
            kept.append((state.float() * target).sum(1) / target.sum(1) @ projections[width])
        sizes = torch.stack([batch.counts, batch.real.sum(1)], 1).to(kept[0]).log1p()
        return torch.cat([*kept, sizes], 1)

    return features


def _lower(model: LanguageModel, batch: Batch, blocks: Sequence[nn.Module]) -> list[Tensor]:
    """What goes into each of these blocks; nothing above the last one runs."""
    found: list[Tensor] = []

    def take(module: nn.Module, args: tuple[Tensor, ...], named: dict[str, Tensor]) -> None:
        found.append(args[0] if args else named["hidden_states"])
        if module is blocks[-1]:
            raise _Enough

    hooks = [block.register_forward_pre_hook(take, with_kwargs=True) for block in blocks]
    try:
        with torch.no_grad():
            model.hidden(batch)
    except _Enough:
        pass
    finally:
        for hook in hooks:
            hook.remove()
    return found


@dataclass(frozen=True)
class Guess:
    """Of every row, and of each row of the sample as if it had not been scored."""

    every: Floats
    sample: Floats


@dataclass(frozen=True)
class Recall:
    """Share of the best rows that have an exact score; the interval at 95%."""

    estimate: float
    low: float
    high: float
    threshold: float  # the score that the last of the best rows has, by the estimate


def guessed(
    features: Float[np.ndarray, "rows features"],
    exact: Floats,
    sample: NDArray[np.int64],
    seed: int,
) -> Guess:
    """From the rows whose `exact` score is not NaN; `sample` are the places of those drawn at
    random."""
    known = np.flatnonzero(np.isfinite(exact))
    rows = features[known]
    middle, spread = rows.mean(0, dtype=np.float64), rows.std(0, dtype=np.float64) + TINY
    low, high = np.quantile(
        exact[known], [0.005, 0.995]
    )  # a few rows of huge scores would be all that it learns
    clipped = exact[known].clip(low, high)
    offset, unit = clipped.mean(), clipped.std() + TINY
    centres = (rows[np.random.default_rng(seed).permutation(len(rows))[:CENTRES]] - middle) / spread
    root = cholesky(_kernel(centres, centres) + JITTER * np.eye(len(centres)), lower=True)

    def kernel(part: NDArray[Any]) -> Floats:
        return _kernel(centres, (part.astype(np.float64) - middle) / spread)

    def blocks() -> Iterator[tuple[Floats, Floats]]:  # of so many rows that they take little memory
        for few in np.array_split(np.arange(len(rows)), len(rows) // MANY + 1):
            yield (
                solve_triangular(root, kernel(rows[few]), lower=True),
                (clipped[few] - offset) / unit,
            )

    gram, moment = RIDGE * np.eye(len(centres)), np.zeros(len(centres))
    for inputs, wanted in blocks():
        gram, moment = gram + inputs @ inputs.T, moment + inputs @ wanted
    factor = cho_factor(gram, lower=True)
    slopes, left_out = cho_solve(factor, moment), list[Floats]()
    for inputs, wanted in blocks():
        leverage = np.square(solve_triangular(factor[0], inputs, lower=True)).sum(0)
        left_out.append(wanted - (wanted - slopes @ inputs) / (1 - leverage))
    apart = np.concatenate(left_out)
    parts, by_centre = (
        np.array_split(features, len(features) // MANY + 1),
        solve_triangular(root.T, slopes),
    )
    every = np.concatenate([by_centre @ kernel(part) for part in parts])
    places = np.searchsorted(known, sample)
    told = np.isin(sample, known)  # a row without a finite score is found by nobody
    return Guess(
        every * unit + offset, np.where(told, apart[places * told] * unit + offset, -np.inf)
    )


def _kernel(a: Floats, b: Floats) -> Floats:
    squares = np.square(a).sum(1)[:, None] + np.square(b).sum(1) - 2 * a @ b.T
    return np.asarray(np.exp(-GAMMA / a.shape[1] * squares))


def recall_of(exact: Floats, alike: Bools, unscored: int, best: int) -> Recall:
    """`alike`: of the rows with an `exact` score, those of the sample that the guess would have
    left out."""
    order = np.argsort(-exact, kind="stable")
    reach, among = alike[order].cumsum(), max(1, int(alike.sum()))
    shares = (
        reach / among,
        beta.ppf(0.975, reach + 1, among - reach),
        beta.ppf(0.025, reach, among - reach + 1),
    )
    ends = list[int]()
    for share in shares:
        enough = np.arange(1, len(order) + 1) + unscored * np.nan_to_num(share, nan=0.0) >= best
        ends.append(int(enough.argmax()) if enough.any() else len(order) - 1)
    estimate, low, high = (min(1.0, (end + 1) / best) for end in ends)
    return Recall(estimate, low, high, float(exact[order[ends[0]]]))


def cut_for(guess: Floats, reaches: Bools, missable: int) -> float:
    """The guess down to which rows must still be scored, so that of the sample's rows that reach
    the threshold and are not yet found no more than `missable` stay out; infinite where that is so
    already."""
    wanted = np.sort(guess[reaches])
    return float(wanted[missable]) if len(wanted) > missable else float("inf")
