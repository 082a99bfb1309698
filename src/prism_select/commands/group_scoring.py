"""Group scoring: scores along the groups' directions, of the rows that the budget can reach.

    all rows, along the one direction → the best `BUDGETS` budgets of them, along each group's
    → the choice: does their last quarter still enter it? → half as many more, and so on

Choices made here:
- half of the next rows are of no use where the last quarter makes less than `ENTERS` of the choice;
- beyond `BUDGETS` budgets it stops at `MOST` of the pool; a budget of 5% has both at once;
- a round has shards of its own, and its rows follow from the shards before it: a run that was
  stopped goes on to the same end;
- scores are held and written in float32, and only of these rows.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from prism_select.data.pool import Pool
from prism_select.run.config import SelectConfig
from prism_select.selection.choice import decide
from prism_select.selection.ranking_columns import RankedRows, rank_rows
from prism_select.selection.rules import best_first, budget_limit

__all__ = ["GroupColumns", "score_groups"]

BUDGETS, MOST = 4, 0.2  # of the pool
GROWTH, ENTERS = 1.5, 0.05  # of the choice

Tables: TypeAlias = Callable[[], Iterator[pa.Table]]


@dataclass(frozen=True)
class GroupColumns:
    """Scores [row, group] of some rows of the pool, which ascend."""

    names: Sequence[str]
    rows: NDArray[np.int64]
    values: NDArray[np.float32]

    def added_to(self, tables: Tables) -> Iterator[pa.Table]:
        """The tables of all rows with a column for each group, null where there is no score."""
        start = 0
        for table in tables():
            first, last = np.searchsorted(self.rows, [start, start + len(table)])
            for group, name in enumerate(self.names):
                column = np.full(len(table), np.nan, dtype=np.float32)
                column[self.rows[first:last] - start] = self.values[first:last, group]
                values = pa.array(column, pa.float32(), from_pandas=True)
                table = table.append_column(f"score_group_{name}", values)
            start += len(table)
            yield table


def score_groups(
    config: SelectConfig,
    names: Sequence[str],
    tables: Tables,
    pool: Pool,
    score: Callable[[int, NDArray[np.int64]], Sequence[Path]],
) -> GroupColumns:
    """Of as many rows as the choice needs. `tables` are the scores of all rows;
    `score(round, rows)` scores some rows along the groups and returns their shards."""
    least, best = reachable(config, tables())
    done, size, paths = np.zeros(0, dtype=np.int64), least, list[Path]()
    for number in count():
        reach = best[:size]
        paths += score(number, np.setdiff1d(reach, done, assume_unique=True))
        columns, done = read_groups(names, paths), reach
        if size >= len(best):
            return columns
        if not last_quarter_enters(
            config, rank_rows(config, columns.added_to(tables)), reach, pool
        ):
            return columns
        size = int(GROWTH * size) + 1
    raise AssertionError("unreachable")


def reachable(config: SelectConfig, tables: Iterable[pa.Table]) -> tuple[int, NDArray[np.int64]]:
    """The best rows, and how many of them are scored in any case."""
    rows = rank_rows(config, tables)
    prices: NDArray[Any] = np.broadcast_to(np.int32(1), len(rows.ranking))
    if config.amount.kind == "tokens":
        prices = rows.tokens
    budgets = BUDGETS * budget_limit(config, rows.ranking, rows.tokens)
    total = float(prices.sum(where=np.isfinite(rows.ranking), dtype=np.float64))
    best = best_within(rows.ranking, prices, max(budgets, MOST * total))
    return len(best_within(rows.ranking, prices, budgets)), best


def best_within(
    ranking: NDArray[np.float64], prices: NDArray[Any], budget: float
) -> NDArray[np.int64]:
    """The best rows, the highest first, whose prices add up to the budget."""
    bands, spent = list[NDArray[np.int64]](), 0.0
    mean = max(1.0, float(prices.mean())) if len(prices) else 1.0
    for rows in best_first(ranking, int(budget / mean) + 1):
        sums = spent + prices[rows].cumsum(dtype=np.float64)
        within = int(np.searchsorted(sums, budget, side="right"))
        bands.append(rows[:within])
        if within < len(rows):
            break
        spent = float(sums[-1])
    return np.concatenate(bands) if bands else np.zeros(0, dtype=np.int64)


def last_quarter_enters(
    config: SelectConfig, rows: RankedRows, reach: NDArray[np.int64], pool: Pool
) -> bool:
    """Whether the choice takes many rows of the last quarter, or rows behind it."""
    chosen = decide(config, rows, pool).among("selected")
    before = chosen[reach[: len(reach) * 3 // 4]].sum()
    return bool(chosen.sum() - before > ENTERS * chosen.sum())


def read_groups(names: Sequence[str], paths: Sequence[Path]) -> GroupColumns:
    columns = [f"score:{name}" for name in names]
    rows, values = list[NDArray[np.int64]](), list[NDArray[np.float32]]()
    for path in paths:
        table = pq.read_table(path, columns=["row", *columns])
        rows.append(table["row"].to_numpy())
        own = [table[name].to_numpy().astype(np.float32) for name in columns]
        values.append(np.column_stack(own))
    if not rows:
        return GroupColumns(
            names, np.zeros(0, dtype=np.int64), np.zeros((0, len(names)), dtype=np.float32)
        )
    every = np.concatenate(rows)
    order = np.argsort(every, kind="stable")
    return GroupColumns(names, every[order], np.concatenate(values)[order])
