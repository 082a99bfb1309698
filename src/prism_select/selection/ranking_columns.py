"""What a choice goes by: the columns of the scores, and a ranking of the rows, the highest first.

    rank_by        a baseline's ranking, where there is one
    exact          of a cascade: rows with an exact score first, then those with a predicted one
    score, score_per_token, score_cosine    as --normalize says

    score:NAME, score_group_1 …    with --combine round-robin or concave, the groups to serve:
                                   several targets, or groups of pairs, in the unit of the ranking

Choices made here:
- a ranking is finite for every row that has a score, and NaN for the others;
- scores along groups are held in float32, and only of rows that have them;
- `score_chosen` is held in float32, since only a warning reads it.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from prism_select.run.config import ScoreConfig
from prism_select.run.errors import BadOption
from prism_select.selection.coverage import ORDERS
from prism_select.selection.scores_file import Names, ScoreColumns, read_columns

__all__ = ["GroupScores", "RankedRows", "predicted_last", "rank_rows", "with_ranking"]

_RANKED = re.compile(r"score_cosine$|score_damping_|rank_by$|exact$")
_GROUPS = re.compile(r"score_group_(.+)"), re.compile(r"score:(.+)")
_TYPES = {"score_chosen": np.float32, "tokens": np.int32, "source": str}


@dataclass(frozen=True)
class GroupScores:
    """Scores [row, group] of some rows of the pool, along several groups of pairs, for a choice by
    `rule`."""

    rule: str
    names: Sequence[str]
    rows: NDArray[np.int64]
    values: NDArray[np.float32]


@dataclass(frozen=True)
class RankedRows:
    """What a choice needs of the scores, one value per row; NaN where a row has no score."""

    ranking: NDArray[np.float64]  # what the choice goes by, the highest first
    score: NDArray[np.float64]
    score_chosen: NDArray[np.float32]
    tokens: NDArray[np.int32]
    source: Names
    extra: Mapping[str, NDArray[np.float64]]  # cosines, and scores with further dampings
    reasons: Mapping[int, str]  # by row: why it has no score
    truncated: int
    by_baseline: bool = False  # ranked by --rank-by
    groups: GroupScores | None = None  # to be served by the choice
    sampled: bool = False  # a random sample of the rows has `score_chosen`


def with_ranking(
    tables: Callable[[], Iterable[pa.Table]], ranking: NDArray[np.float64] | None
) -> Iterator[pa.Table]:
    """The tables, with a column `rank_by` where there is a ranking of all their rows."""
    start = 0
    for table in tables():
        if ranking is not None:
            values = ranking[start : start + len(table)]
            table = table.append_column("rank_by", pa.array(values, pa.float64(), from_pandas=True))
        start += len(table)
        yield table


def rank_rows(config: ScoreConfig, tables: Iterable[pa.Table]) -> RankedRows:
    """The columns of tables that follow one another, ranked as the options say.

    Raises BadOption where the scores of an earlier run lack the column that the choice goes by.
    """
    reasons, truncated, start = dict[int, str](), 0, 0
    groups: _GroupColumns | None = None

    def noted() -> Iterator[pa.Table]:
        nonlocal truncated, start, groups
        for table in tables:
            if config.ranking not in table.column_names:
                raise BadOption(
                    f"--normalize {config.normalize}: these scores were made without it; score the "
                    "pool again"
                )
            for row in np.flatnonzero(table["reason"].is_valid()).tolist():
                reasons[start + row] = table["reason"][row].as_py()
            truncated += table["truncated"].to_pylist().count(True)
            groups = groups or _GroupColumns(config, table.column_names)
            groups.add(table, start)
            start += len(table)
            yield table

    def type_of(name: str) -> type | None:
        numbers = name in ("score", config.ranking) or _RANKED.match(name)
        return np.float64 if numbers else _TYPES.get(name)

    columns = read_columns(noted(), type_of)
    extra = {name: columns[name] for name in columns if _RANKED.match(name) and name != "exact"}
    ranking, by_baseline = _ranking_of(config, columns), "rank_by" in columns
    return RankedRows(
        ranking,
        columns["score"],
        columns["score_chosen"] if "score_chosen" in columns else _unknown(len(columns)),
        columns["tokens"],
        columns.names["source"],
        extra,
        reasons,
        truncated,
        by_baseline,
        None if by_baseline or groups is None else groups.scores,
    )


def _unknown(count: int) -> NDArray[np.float32]:
    return np.broadcast_to(np.float32(np.nan), count)


class _GroupColumns:
    """Collects what the groups of a choice need, table by table."""

    def __init__(self, config: ScoreConfig, columns: Sequence[str]) -> None:
        of_pairs, targets = (
            {match[0]: match[1] for match in map(pattern.fullmatch, columns) if match}
            for pattern in _GROUPS
        )
        self.names = of_pairs or targets
        self.rule = config.combine or ("round-robin" if of_pairs else "mean")
        units = {"tokens": "tokens", "norm": "gradient_norm"}
        self.unit = units.get(config.normalize)
        self.is_served = self.rule in ORDERS and len(self.names) > 1
        self.rows, self.values = list[NDArray[np.int64]](), list[NDArray[np.float32]]()

    def add(self, table: pa.Table, start: int) -> None:
        if not self.is_served:
            return
        values = np.column_stack([table[name].to_numpy() for name in self.names])
        if self.unit:
            unit = table[self.unit].to_numpy()
            values = values / np.where(unit > 0, unit, 1)[:, None]
        (rows,) = np.nonzero(np.isfinite(values).all(1))
        self.rows.append(start + rows)
        self.values.append(values[rows].astype(np.float32))

    @property
    def scores(self) -> GroupScores | None:
        """None where the choice does not go by groups."""
        if not self.is_served:
            return None
        rows, values = np.concatenate(self.rows), np.concatenate(self.values)
        return GroupScores(self.rule, [*self.names.values()], rows, values)


def _ranking_of(config: ScoreConfig, columns: ScoreColumns) -> NDArray[np.float64]:
    if "rank_by" in columns:
        return unranked_last(columns["rank_by"], columns["score"])
    if "exact" in columns:
        return predicted_last(columns[config.ranking], columns["exact"] > 0)
    return columns[config.ranking]


def predicted_last(ranking: NDArray[np.float64], exact: NDArray[np.bool_]) -> NDArray[np.float64]:
    """Ranks, counted down from 0: exact scores in their order, then predicted ones in theirs.

    NaN where a row has neither.
    """
    order = np.lexsort((-ranking, ~exact))
    ranks = np.empty(len(ranking))
    ranks[order] = -np.arange(len(ranking))
    return np.where(np.isfinite(ranking), ranks, np.nan)


def unranked_last(ranking: NDArray[np.float64], score: NDArray[np.float64]) -> NDArray[np.float64]:
    """A ranking of the rows that have a score; rows that it does not rank come last."""
    ranked = ranking[np.isfinite(ranking)]
    last = ranked.min() - 1 if len(ranked) else 0.0
    return np.where(np.isfinite(score), np.where(np.isfinite(ranking), ranking, last), np.nan)
