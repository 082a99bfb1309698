"""Pair clusters: groups of pairs whose gradients point alike, and a direction for each group.

    K_qr = D_q · D_r      →  cosines U          (exact: answer_products.py)
    U = V Λ Vᵀ            →  a point V √Λ for each pair, on the unit sphere
    k-means of the points →  groups             k: the best silhouette of 2 to `MOST`; where none
                                                is clear, `MOST`; two pairs or more a group on
                                                average; 1 where most pairs point closer along all
                                                other pairs than along the others of their group
    pairs of a group      →  its direction, with the pairs' own curvature within the group

One direction is the mean of what all pairs ask for, and rows of the kind that is asked for most
come first along it. A choice that serves each group in turn (selection/coverage.py) serves all.

Choices made here:
- points are the pairs' differences D by the slopes of the gain, of length one, so a group of large
  gradients counts as any other;
- a silhouette is clear from `SILHOUETTE` (run/thresholds.py); gradients of many numbers are nearly
  at right angles and seldom reach it, and a choice that serves groups by chance still serves more
  pairs than one direction does;
- pairs of one kind, whose groups are arbitrary, are one group: a direction of a few of them holds
  more noise and nothing that the others lack. Groups are found with the pair that is compared,
  which speaks for them, so where most pairs still point closer along all, there are none;
- pairs of equal gradient are one point and count once in their group: a pair that is given twice
  changes nothing;
- groups are numbered by the first of their pairs.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor

from prism_select.directions.answer_products import AnswerProducts
from prism_select.directions.cross_validation import direction_coefficients
from prism_select.directions.pair_curvature import difference_products, pair_slopes
from prism_select.directions.way import Way
from prism_select.run.errors import BadOption
from prism_select.run.thresholds import SILHOUETTE

__all__ = ["PairClusters", "cluster_coefficients", "clusters_of"]

MOST = 8  # groups that are looked for: each takes the memory of one more direction
STARTS = 10  # of k-means, from random points
EQUAL = 1e-6  # 1 − cosine: pairs of equal gradient

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class PairClusters:
    """`of_pairs` is the group of each pair, from 0; `kept` are the pairs that count, one of each
    gradient; `silhouette` is that of the split, NaN without one."""

    of_pairs: NDArray[np.int64]
    kept: NDArray[np.bool_]
    silhouette: float

    @property
    def count(self) -> int:
        return int(self.of_pairs.max(initial=-1)) + 1

    def members(self, group: int) -> list[int]:
        """The pairs that make the direction of a group."""
        return np.flatnonzero((self.of_pairs == group) & self.kept).tolist()


def clusters_of(products: AnswerProducts, way: Way, count: int | None, seed: int) -> PairClusters:
    """In `count` groups, or as many as the silhouette says; of pairs with equal gradients there may
    be fewer. Raises BadOption for more groups than pairs. `products` are of the chosen answers of
    all pairs, then of the rejected ones."""
    cosines = pair_cosines(products, way)
    if count is not None and count > len(cosines):
        raise BadOption(f"--groups {count}: there are {len(cosines)} pairs; ask for fewer, or auto")
    first = (cosines >= 1 - EQUAL).argmax(1)  # the first pair of the same gradient
    kept = first == np.arange(len(first))
    cosines = cosines[kept][:, kept]
    labels, silhouette = _split(_points(cosines), count, seed)
    if count is None and not _serve_their_pairs(cosines, labels):
        labels, silhouette = np.zeros_like(labels), math.nan
    of_pairs = labels[np.searchsorted(np.flatnonzero(kept), first)]
    _, firsts, numbers = np.unique(of_pairs, return_index=True, return_inverse=True)
    return PairClusters(firsts.argsort().argsort()[numbers], kept, silhouette)


def pair_cosines(products: AnswerProducts, way: Way) -> Floats:
    """Of the pairs' differences."""
    slope = pair_slopes(replace(way, curvature="flat"), products)
    ratio = torch.where(slope.chosen > 0, slope.rejected / slope.chosen, 0)
    gram = difference_products(products.total, ratio).numpy()
    size = np.sqrt(gram.diagonal())
    cosines = gram / np.where(size > 0, size, 1) / np.where(size > 0, size, 1)[:, None]
    np.fill_diagonal(cosines, 1)
    return np.asarray(cosines)


def _points(cosines: Floats) -> Floats:
    values, vectors = np.linalg.eigh(cosines)
    return np.asarray(vectors * np.sqrt(values.clip(0)))


def _split(points: Floats, count: int | None, seed: int) -> tuple[NDArray[np.int64], float]:
    from sklearn.cluster import KMeans
    from sklearn.metrics import silhouette_score

    if count is not None and count >= len(points):
        return np.arange(len(points)), math.nan
    best, clear = (np.zeros(len(points), dtype=np.int64), math.nan), SILHOUETTE
    for number in range(2, min(MOST, len(points) // 2) + 1) if count is None else [count]:
        labels = KMeans(number, n_init=STARTS, random_state=seed).fit_predict(points)
        silhouette = float(silhouette_score(points, labels))
        if max(silhouette, SILHOUETTE) >= clear:  # while none is clear, the most groups
            best, clear = (labels.astype(np.int64), silhouette), max(silhouette, clear)
    return best


def _serve_their_pairs(cosines: Floats, labels: NDArray[np.int64]) -> bool:
    """Whether at least half of the pairs point closer along the others of their group than along
    all others. A pair that is alone in its group has no say."""
    own, every = along_others(cosines, labels), along_others(cosines, np.zeros_like(labels))
    compared = np.isfinite(own)
    return bool((own > every)[compared].mean() >= 0.5) if compared.any() else True


def along_others(cosines: Floats, labels: NDArray[np.int64]) -> Floats:
    """The cosine of each pair with the sum of the others of its group, from those of all pairs; NaN
    for a pair that is alone."""
    others = (labels[:, None] == labels) & ~np.eye(len(labels), dtype=bool)
    along = (cosines * others).sum(1)
    length = np.sqrt(((others @ cosines) * others).sum(1).clip(0))
    return np.asarray(np.divide(along, length, out=np.full(len(labels), np.nan), where=length > 0))


def cluster_coefficients(
    products: AnswerProducts, way: Way, pairs: Sequence[int]
) -> Float[Tensor, " answers"]:
    """What each answer of some pairs, all chosen ones first, counts in their own direction: it is
    Σ_a v_a ∇mean_loglik(a)."""
    count = len(products.tokens) // 2
    return direction_coefficients(way, products.of([*pairs, *(count + pair for pair in pairs)]))
