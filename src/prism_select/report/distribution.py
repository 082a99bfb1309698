"""Spread: how the scores of a pool lie, in a few hundred numbers whatever the size of the pool.

    histogram   rows in each bin of the ranking, taken and not; the outer bins also hold what lies beyond
    by source   quantiles of the ranking (5, 25, 50, 75, 95%), rows and rows taken
    halves      rows in each cell of score_rejected × score_chosen
    budgets     bought(b) = Σ max(score, 0) of the first b of the ranking / Σ max(score, 0) of all

Choices made here: where a few rows lie far out, so that all reach 1.5 times as far as the 0.2% and
99.8% quantiles, bins reach to these quantiles alone; the `SOURCES` largest sources stand by
themselves and the others together."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from prism_select.report.scores_table import Columns

__all__ = ["Budget", "Cell", "Histogram", "Source", "Spread", "spread_of"]

BINS, CELLS, SOURCES, POINTS = 60, 40, 12, 160


SHARES = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5)


BEYOND, FAR = 0.002, 1.5


Floats: TypeAlias = NDArray[np.float64]


@dataclass(frozen=True)
class Histogram:
    """Bin i reaches from edges[i] to edges[i + 1]; `beyond` rows lie outside and are counted in the
    outer bins."""

    edges: tuple[float, ...]
    taken: tuple[int, ...]
    others: tuple[int, ...]
    beyond: int


@dataclass(frozen=True)
class Source:
    name: str
    rows: int
    taken: int
    quantiles: tuple[float, ...]


@dataclass(frozen=True)
class Cell:
    """Rows whose influence along either half lies in a cell: its edges, and how many there are."""

    rejected: tuple[float, float]
    chosen: tuple[float, float]
    rows: int


@dataclass(frozen=True)
class Budget:
    """The first `share` of the ranked rows have `bought` of all positive influence."""

    share: float
    rows: int
    bought: float


@dataclass(frozen=True)
class Spread:
    """`positive` is the share of scored rows whose score is above 0, `bought` what the rows taken
    have of all positive influence; NaN where nothing is positive."""

    histogram: Histogram
    sources: tuple[Source, ...]
    halves: tuple[Cell, ...]
    curve: tuple[Budget, ...]
    budgets: tuple[Budget, ...]
    positive: float
    bought: float


def spread_of(columns: Columns) -> Spread | None:
    """None where no row has a score."""
    if not len(columns.order):
        return None
    gains = np.clip(np.nan_to_num(columns.score), 0, None)
    total = float(gains.sum())
    count = len(columns.order)
    at = np.unique(
        np.round(np.linspace(0, 1, POINTS) ** 2 * count).astype(np.int64)
    )  # closer where the budgets are
    bought = np.concatenate([[0.0], np.cumsum(gains[columns.order])]) / (total or math.nan)
    curve = tuple(Budget(float(rows / count), int(rows), float(bought[rows])) for rows in at)
    few = [round(share * count) for share in SHARES]
    return Spread(
        histogram_of(columns),
        tuple(sources_of(columns)),
        halves_of(columns),
        curve,
        tuple(
            Budget(share, rows, float(bought[rows]))
            for share, rows in zip(SHARES, few, strict=True)
            if rows
        ),
        float((columns.score[columns.order] > 0).mean()),
        float(gains[columns.taken].sum() / (total or math.nan))
        if columns.taken.any()
        else math.nan,
    )


def edges_of(values: Floats, bins: int) -> Floats:
    low, high = np.quantile(values, [BEYOND, 1 - BEYOND])
    least, most = float(values.min()), float(values.max())
    if most - least <= FAR * (high - low) or not low < high:
        low, high = least, most
    wide = abs(low) * 1e-6 or 1e-6  # where all are the same
    return (
        np.linspace(low, high, bins + 1)
        if low < high
        else np.linspace(low - wide, high + wide, bins + 1)
    )


def histogram_of(columns: Columns) -> Histogram:
    values, taken = columns.ranking[columns.order], columns.taken[columns.order]
    edges = edges_of(values, min(BINS, max(8, int(2 * len(values) ** 0.5))))
    inside = np.clip(values, edges[0], edges[-1])
    counts = [np.histogram(inside[which], edges)[0].tolist() for which in (taken, ~taken)]
    beyond = int(((values < edges[0]) | (values > edges[-1])).sum())
    return Histogram(tuple(edges.tolist()), tuple(counts[0]), tuple(counts[1]), beyond)


def sources_of(columns: Columns) -> Iterator[Source]:
    """The largest first."""
    places, values, taken = (
        columns.source.places[columns.order],
        columns.ranking[columns.order],
        columns.taken,
    )
    rows = np.bincount(places, minlength=len(columns.source.names))
    largest = [int(place) for place in np.argsort(-rows, kind="stable")[:SOURCES] if rows[place]]
    rest = np.flatnonzero(rows)[~np.isin(np.flatnonzero(rows), largest)]
    if len(rest) == 1:
        largest, rest = [*largest, int(rest[0])], rest[:0]
    for members, name in [
        *(([place], columns.source.names[place]) for place in largest),
        *([(rest.tolist(), f"{len(rest)} others")] if len(rest) else []),
    ]:
        inside = np.isin(places, members)
        quantiles = np.quantile(values[inside], [0.05, 0.25, 0.5, 0.75, 0.95])
        count = int(taken[columns.order][inside].sum())
        yield Source(name or "no name", int(inside.sum()), count, tuple(quantiles.tolist()))


def halves_of(columns: Columns) -> tuple[Cell, ...]:
    """The cells that are not empty."""
    known = columns.order[np.isfinite(columns.chosen[columns.order])]
    if not len(known):
        return ()
    x, y = columns.rejected[known], columns.chosen[known]
    across, up = edges_of(x, CELLS), edges_of(y, CELLS)
    counts = np.histogram2d(
        np.clip(x, across[0], across[-1]), np.clip(y, up[0], up[-1]), (across, up)
    )[0]
    return tuple(
        Cell(
            (float(across[i]), float(across[i + 1])),
            (float(up[j]), float(up[j + 1])),
            int(counts[i, j]),
        )
        for i, j in zip(*np.nonzero(counts), strict=True)
    )
