"""Hidden-state baselines: rows scored by what separates chosen from rejected answers in the hidden
states of one layer.

    probe                  w · h          w: logistic regression of chosen against rejected states
    vector filter          v · h          v: mean chosen − mean rejected state, of length one
    projection difference  v · (h − h')   h': the state of the model's own answer to the same prompt
    concept influence      ∇loglik · ∇ mean over chosen answers of v · h

h is the mean hidden state over an answer's supervised tokens. Arrays are [layers, answers, width].

Choices made here:
- layer and strength of the penalty are those that rank held-out pairs best, by AUROC; both answers
  of a pair are in one fold; ties go to the stronger penalty, then to the layer nearest the middle,
  which is also what too few pairs for folds get;
- the probe standardises its features by the answers that it learns from;
- it learns in the space that those answers span, which changes no score: the penalty draws every
  other part of w to zero;
- scikit-learn is imported where it is needed (core/statistics.py).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from prism_select.core.statistics import auroc

__all__ = [
    "STRENGTHS",
    "Linear",
    "Separator",
    "choose_probe",
    "choose_vector",
    "probe",
    "projection_difference",
    "vector_filter",
]

Floats = NDArray[np.float64]
Folds = Sequence[NDArray[np.int64]]  # of each fold the pairs that it holds out

STRENGTHS = tuple(10.0**power for power in range(-5, 1))  # scikit-learn's C: small is strong


class Linear(NamedTuple):
    """state → state · weight + bias."""

    weight: Floats
    bias: float = 0.0

    def __call__(self, states: NDArray[Any]) -> Floats:
        return np.asarray(states.astype(np.float64) @ self.weight + self.bias)


@dataclass(frozen=True)
class Separator:
    """What was learned, at which layer and strength, and its AUROC on held-out pairs: NaN without
    folds."""

    layer: int
    strength: float
    auroc: float
    linear: Linear


Fit = Callable[[Floats, Floats], list[Linear]]
"""Chosen and rejected states of one layer → a separator for each strength."""


def probe(chosen: NDArray[Any], rejected: NDArray[Any], rows: NDArray[Any], folds: Folds) -> Floats:
    """Log-odds of each row to be of the chosen kind, by logistic regression (Alain and Bengio 2016,
    arXiv 1610.01644)."""
    found = choose_probe(chosen, rejected, folds)
    return found.linear(rows[found.layer])


def vector_filter(
    chosen: NDArray[Any], rejected: NDArray[Any], rows: NDArray[Any], folds: Folds
) -> Floats:
    """Vector Filter (Kowal et al. 2026, arXiv 2602.14869): the projection on the concept vector."""
    found = choose_vector(chosen, rejected, folds)
    return found.linear(rows[found.layer])


def projection_difference(
    chosen: NDArray[Any],
    rejected: NDArray[Any],
    rows: NDArray[Any],
    own: NDArray[Any],
    folds: Folds,
) -> Floats:
    """Projection Difference (Chen et al. 2025, arXiv 2507.21509, of single samples). `own` are the
    states of the model's own answers to the prompts of the rows."""
    found = choose_vector(chosen, rejected, folds)
    return found.linear(rows[found.layer]) - found.linear(own[found.layer])


def choose_probe(chosen: NDArray[Any], rejected: NDArray[Any], folds: Folds) -> Separator:
    return _choose(_logistic, STRENGTHS, chosen, rejected, folds)


def choose_vector(
    chosen: NDArray[Any], rejected: NDArray[Any], folds: Folds, lowest: int = 0
) -> Separator:
    """The concept vector and its layer, from layer `lowest` on."""
    found = _choose(_mean_difference, [0.0], chosen[lowest:], rejected[lowest:], folds)
    return Separator(found.layer + lowest, found.strength, found.auroc, found.linear)


def _choose(
    fit: Fit,
    strengths: Sequence[float],
    chosen: NDArray[Any],
    rejected: NDArray[Any],
    folds: Folds,
) -> Separator:
    layers = [*zip(chosen.astype(np.float64), rejected.astype(np.float64), strict=True)]
    values = [
        _held_out(fit, len(strengths), *of_layer, folds) if folds else [np.nan] * len(strengths)
        for of_layer in layers
    ]
    middle = (len(layers) - 1) / 2

    def preference(option: tuple[int, int]) -> tuple[float, float, float]:
        layer, strength = option
        value = values[layer][strength]
        return (value if folds else 0.0), -strengths[strength], -abs(layer - middle)

    options = [(layer, k) for layer in range(len(layers)) for k in range(len(strengths))]
    layer, best = max(options, key=preference)
    return Separator(layer, strengths[best], values[layer][best], fit(*layers[layer])[best])


def _held_out(
    fit: Fit, strengths: int, chosen: Floats, rejected: Floats, folds: Folds
) -> list[float]:
    """AUROC of held-out chosen against held-out rejected answers, of each strength."""
    scores = np.empty((strengths, 2, len(chosen)))
    for fold in folds:
        rest = np.delete(np.arange(len(chosen)), fold)
        for k, linear in enumerate(fit(chosen[rest], rejected[rest])):
            scores[k, :, fold] = np.stack([linear(chosen[fold]), linear(rejected[fold])], 1)
    labels = np.arange(2 * len(chosen)) < len(chosen)
    return [auroc(of_strength.ravel(), labels) for of_strength in scores]


def _mean_difference(chosen: Floats, rejected: Floats) -> list[Linear]:
    difference = chosen.mean(0) - rejected.mean(0)
    return [Linear(difference / (np.linalg.norm(difference) or 1))]


def _logistic(chosen: Floats, rejected: Floats) -> list[Linear]:
    from sklearn.linear_model import LogisticRegression

    states = np.concatenate([chosen, rejected])
    labels = np.arange(len(states)) < len(chosen)
    mean, deviation = states.mean(0), states.std(0)
    deviation[deviation == 0] = 1
    scaled = (states - mean) / deviation
    axes = np.linalg.svd(scaled, full_matrices=False)[2]
    found = []
    for strength in STRENGTHS:
        model = LogisticRegression(C=strength, tol=1e-6, max_iter=10_000)
        model.fit(scaled @ axes.T, labels)
        weight = model.coef_[0] @ axes / deviation
        found.append(Linear(weight, float(model.intercept_[0] - mean @ weight)))
    return found
