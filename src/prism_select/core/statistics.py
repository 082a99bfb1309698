"""Statistics: how well a ranking finds what it should. Scores first, labels second; ties share
their rank.

Choices made here: scikit-learn, which takes as long to load as a choice among half a million rows,
waits until it is needed."""

import numpy as np
from jaxtyping import Bool, Float
from numpy.typing import NDArray
from scipy.stats import spearmanr

__all__ = [
    "auroc",
    "average_precision",
    "halves",
    "lds",
    "overlap_of_best",
    "paired_interval",
    "precision_at",
    "rank_correlation",
    "stable_share",
    "standard_error",
]

Floats = NDArray[np.float64]


Bools = NDArray[np.bool_]


def auroc(scores: Floats, labels: Bools) -> float:
    """Chance that a labelled row scores above an unlabelled one; NaN when either kind is
    missing."""
    from sklearn.metrics import roc_auc_score

    return (
        float(roc_auc_score(labels, scores)) if labels.any() and not labels.all() else float("nan")
    )


def average_precision(scores: Floats, labels: Bools) -> float:
    """Mean precision at each labelled row, best score first; NaN when no row is labelled."""
    from sklearn.metrics import average_precision_score

    return float(average_precision_score(labels, scores)) if labels.any() else float("nan")


def precision_at(chosen: Bools, labels: Bools) -> float:
    """Share of labelled rows among the chosen; NaN when nothing was chosen."""
    return float(labels[chosen].mean()) if chosen.any() else float("nan")


def rank_correlation(a: Floats, b: Floats) -> float:
    """Spearman's ρ; NaN when either is constant."""
    return (
        float(spearmanr(a, b).statistic)
        if len(a) > 1 and np.ptp(a) > 0 and np.ptp(b) > 0
        else float("nan")
    )


def standard_error(groups: Floats, sizes: Floats) -> Floats:
    """Of the mean over all pairs, row by row, from its means over groups of them (columns), each of
    `sizes` pairs: √(Σ_g w_g (s_g − s)² / (G − 1)), w_g the group's share of the pairs. Source: the
    random-groups estimator (Wolter 2007, chapter 2)."""
    share = sizes / sizes.sum()
    mean = (groups * share).sum(1, keepdims=True)
    return np.asarray(np.sqrt((share * np.square(groups - mean)).sum(1) / (len(sizes) - 1)))


def overlap_of_best(a: Floats, b: Floats, share: float) -> float:
    """Share of the best rows by `a` that are among as many best by `b`."""
    count = max(1, round(share * len(a)))
    best = [set(np.argsort(-values, kind="stable")[:count].tolist()) for values in (a, b)]
    return len(best[0] & best[1]) / count


def stable_share(groups: Floats, chosen: Bools, seed: int) -> float:
    """Share of the chosen rows that are among as many best in 90% or more of 200 resamples of the
    groups (columns) that scores are means of."""
    draw, count = np.random.default_rng(seed), int(chosen.sum())
    often = np.zeros(len(groups))
    for weights in draw.multinomial(groups.shape[1], [1 / groups.shape[1]] * groups.shape[1], 200):
        often[np.argpartition(-(groups @ weights), count - 1)[:count]] += 1
    return float((often[chosen] >= 180).mean())


def paired_interval(
    differences: Float[np.ndarray, "seeds pairs"], seed: int, draws: int = 1000
) -> tuple[float, float]:
    """95% percentile interval of the mean, by a bootstrap over seeds and pairs at once: both are
    drawn with replacement, apart from each other (Owen 2007, the pigeonhole bootstrap). With few
    seeds it is too narrow: by √((S − 1) / S) in what seeds add, and nothing of it with one."""
    draw, (seeds, pairs) = np.random.default_rng(seed), differences.shape
    by_seed = draw.multinomial(seeds, [1 / seeds] * seeds, draws) @ differences / seeds
    means = (by_seed * draw.multinomial(pairs, [1 / pairs] * pairs, draws)).sum(1) / pairs
    low, high = np.percentile(means, [2.5, 97.5])
    return float(low), float(high)


def halves(rows: int, count: int, seed: int) -> Bool[np.ndarray, "count rows"]:
    """Random sets of half the rows each, rounded down; every row is in about half of the sets."""
    draw = np.random.default_rng(seed)
    members = np.zeros((count, rows), dtype=bool)
    for half in members:
        half[draw.choice(rows, rows // 2, replace=False)] = True
    return members


def lds(
    scores: Float[np.ndarray, " rows"],
    members: Bool[np.ndarray, "halves rows"],
    gains: Float[np.ndarray, " halves"],
    seed: int,
    draws: int = 1000,
) -> dict[str, float]:
    """The linear datamodeling score: Spearman's ρ, over halves, of the sum of a half's scores with
    the gain J after training on it; `low` to `high` is its 95% percentile interval, by a bootstrap
    over halves. The interval knows the noise of few halves, not that of the order in which they
    train, which lowers ρ itself. NaN when either side is constant, as with one half, or a score is
    NaN; resamples in which ρ is NaN are left out. Source: arXiv 2303.14186, section 2."""
    foretold, draw, count = members @ scores, np.random.default_rng(seed), len(gains)
    drawn = [
        rank_correlation(foretold[pick], gains[pick])
        for pick in draw.integers(count, size=(draws, count))
    ]
    told = [value for value in drawn if value == value]
    low, high = np.percentile(told, [2.5, 97.5]) if told else (float("nan"), float("nan"))
    found = {"lds": rank_correlation(foretold, gains), "low": float(low), "high": float(high)}
    return found | {"halves": count}
