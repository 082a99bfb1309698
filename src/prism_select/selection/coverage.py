"""Coverage: an order of rows in which every group of pairs is served.

    round-robin    each group takes, in turn, its best row that is left
    concave        each step takes the row that adds most to Σ_k √(Σ_chosen z⁺_k)

    z_k    a row's score along group k, in units of the root mean square of that column
    z⁺     max(z, 0): what a row takes away from a group is not counted

Scaling a column changes neither order, so a group of large gradients has no louder voice.

Choices made here:
- orders ask whether the last row was taken, since one that is passed over (a cap, a near-duplicate)
  costs its group no turn and serves nobody;
- the square root lets a group's next row count less, the more the group has;
- `concave` sweeps over the rows with a falling bar, and takes what is within `NEARLY` of the best:
  a greedy step to that precision, in some hundred sweeps however many rows there are;
- rows that help no group come last, the least harmful first;
- equal values keep the order of the pool.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from prism_select.selection.rules import best_first

__all__ = ["ORDERS", "Order", "concave", "in_turn", "turns"]

Columns: TypeAlias = NDArray[np.floating[Any]]  # [row, group]
Order: TypeAlias = Iterator[tuple[int, int]]  # rows, each with the group that it is for
IsTaken: TypeAlias = Callable[[int], bool]

BAND = 1024  # rows of a column that are sorted first
NEARLY = 0.02  # of the best gain: a row that is so near is taken


def in_turn(columns: Columns, is_taken: IsTaken) -> Order:
    """Every row once; `is_taken` is asked about the last one."""
    visited = np.zeros(len(columns), dtype=bool)
    queues = {group: _best_first(column) for group, column in enumerate(columns.T)}
    while queues:
        for group, queue in [*queues.items()]:
            for row in queue:
                if visited[row]:
                    continue
                visited[row] = True
                yield row, group
                if is_taken(row):
                    break
            else:
                del queues[group]


def _best_first(column: NDArray[np.floating[Any]]) -> Iterator[int]:
    for band in best_first(column, BAND):
        yield from band.tolist()


def concave(columns: Columns, is_taken: IsTaken) -> Order:
    """As `in_turn`; a row is for the group whose term it raises most."""
    size = np.sqrt(np.square(columns, dtype=np.float64).mean(0)) if len(columns) else 1.0
    scaled = columns / np.where(size > 0, size, 1).astype(columns.dtype)
    shares, got = np.clip(scaled, 0, None), np.zeros(columns.shape[1])
    left = np.arange(len(columns))
    while len(left) and (gains := _gains(shares[left], got).sum(1)).max(initial=0) > 0:
        bar = (1 - NEARLY) * gains.max()
        visited = np.zeros(len(left), dtype=bool)
        (above,) = np.nonzero(gains >= bar)
        for place in above[np.argsort(-gains[above], kind="stable")].tolist():
            row = int(left[place])
            added = _gains(shares[row], got)
            if added.sum() < bar:
                continue
            visited[place] = True
            yield row, int(added.argmax())
            got += shares[row] * is_taken(row)
        left = left[~visited]
    harm = -scaled[left].sum(1)
    for row in left[np.argsort(harm, kind="stable")].tolist():
        yield row, int(scaled[row].argmax())


def _gains(shares: Columns, got: NDArray[np.float64]) -> NDArray[np.float64]:
    """What rows add to each group's term."""
    return np.asarray(np.sqrt(got + shares) - np.sqrt(got))


def turns(columns: NDArray[np.float64]) -> NDArray[np.float64]:
    """A ranking: minus the turn in which each row is taken; NaN for a row without a score."""
    (rows,) = np.nonzero(np.isfinite(columns).all(1))
    ranking = np.full(len(columns), np.nan)
    for turn, (row, _) in enumerate(in_turn(columns[rows], lambda _: True)):
        ranking[rows[row]] = -turn
    return ranking


ORDERS: Mapping[str, Callable[[Columns, IsTaken], Order]] = {
    "round-robin": in_turn,
    "concave": concave,
}
