"""Statistics: how well a ranking finds what it should. Scores first, labels second; ties share their rank."""

import numpy as np
from numpy.typing import NDArray
from scipy.stats import spearmanr
from sklearn.metrics import average_precision_score, roc_auc_score

__all__ = ["auroc", "average_precision", "precision_at", "rank_correlation"]

Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]


def auroc(scores: Floats, labels: Bools) -> float:
    """Chance that a labelled row scores above an unlabelled one; NaN when either kind is missing."""
    return float(roc_auc_score(labels, scores)) if labels.any() and not labels.all() else float("nan")


def average_precision(scores: Floats, labels: Bools) -> float:
    """Mean precision at each labelled row, best score first; NaN when no row is labelled."""
    return float(average_precision_score(labels, scores)) if labels.any() else float("nan")


def precision_at(chosen: Bools, labels: Bools) -> float:
    """Share of labelled rows among the chosen; NaN when nothing was chosen."""
    return float(labels[chosen].mean()) if chosen.any() else float("nan")


def rank_correlation(a: Floats, b: Floats) -> float:
    """Spearman's ρ; NaN when either is constant."""
    return float(spearmanr(a, b).statistic) if len(a) > 1 and np.ptp(a) > 0 and np.ptp(b) > 0 else float("nan")
