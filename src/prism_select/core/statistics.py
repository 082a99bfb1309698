"""Statistics: how well a ranking finds what it should, and how sure that is.

Functions take scores first, labels second. Rows with equal scores share their rank.

Choices made here:
- scikit-learn is imported where it is needed, since it takes as long to load as a choice among half
  a million rows.
"""

import numpy as np
from jaxtyping import Float
from numpy.typing import NDArray
from scipy.stats import spearmanr

__all__ = [
    "auroc",
    "average_precision",
    "overlap_of_best",
    "paired_interval",
    "precision_at",
    "rank_correlation",
]

Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]


def auroc(scores: Floats, labels: Bools) -> float:
    """Chance that a labelled row scores above an unlabelled one; NaN when either kind is
    missing."""
    from sklearn.metrics import roc_auc_score

    if not labels.any() or labels.all():
        return float("nan")
    return float(roc_auc_score(labels, scores))


def average_precision(scores: Floats, labels: Bools) -> float:
    """Mean precision at each labelled row, best score first; NaN when no row is labelled."""
    from sklearn.metrics import average_precision_score

    return float(average_precision_score(labels, scores)) if labels.any() else float("nan")


def precision_at(chosen: Bools, labels: Bools) -> float:
    """Share of labelled rows among the chosen; NaN when nothing was chosen."""
    return float(labels[chosen].mean()) if chosen.any() else float("nan")


def rank_correlation(a: Floats, b: Floats) -> float:
    """Spearman's ρ; NaN when either is constant."""
    varies = len(a) > 1 and np.ptp(a) > 0 and np.ptp(b) > 0  # false with NaN
    return float(spearmanr(a, b).statistic) if varies else float("nan")


def overlap_of_best(a: Floats, b: Floats, share: float) -> float:
    """Share of the best rows by `a` that are among as many best by `b`."""
    count = max(1, round(share * len(a)))
    best = [set(np.argsort(-values, kind="stable")[:count].tolist()) for values in (a, b)]
    return len(best[0] & best[1]) / count


def paired_interval(
    differences: Float[np.ndarray, "seeds pairs"], seed: int, draws: int = 1000
) -> tuple[float, float]:
    """95% percentile interval of the mean, by a bootstrap over seeds and over pairs, each drawn
    with replacement (Owen 2007, the pigeonhole bootstrap).

    With few seeds it is too narrow: by √((S − 1) / S) in the part of S seeds, so one seed adds
    nothing."""
    draw, (seeds, pairs) = np.random.default_rng(seed), differences.shape
    by_seed = draw.multinomial(seeds, [1 / seeds] * seeds, draws) @ differences / seeds
    means = (by_seed * draw.multinomial(pairs, [1 / pairs] * pairs, draws)).sum(1) / pairs
    low, high = np.percentile(means, [2.5, 97.5])
    return float(low), float(high)
