"""What a choice goes by: the columns of the scores, and a ranking of the rows, the highest first.

    rank_by        a baseline's ranking, where there is one
    exact          of a cascade: rows with an exact score first, then those with a predicted one
    round-robin    of several targets: minus the turn in which one of them takes the row
    score, score_per_token, score_cosine    as --normalize says

Choices made here:
- a ranking is finite for every row that has a score, and NaN for the others;
- `score_chosen` is held in float32, since only a warning reads it.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from prism_select.run.config import ScoreConfig
from prism_select.run.errors import BadOption
from prism_select.selection.rules import round_robin
from prism_select.selection.scores_file import Names, ScoreColumns, read_columns

__all__ = ["RankedRows", "predicted_last", "rank_rows", "with_ranking"]

_RANKED = re.compile(r"score:|score_cosine$|score_damping_|rank_by$|exact$")
_TYPES = {"score_chosen": np.float32, "tokens": np.int32, "source": str}


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

    def noted() -> Iterator[pa.Table]:
        nonlocal truncated, start
        for table in tables:
            if config.ranking not in table.column_names:
                raise BadOption(
                    f"--normalize {config.normalize}: these scores were made without it; score the "
                    "pool again"
                )
            for row in np.flatnonzero(table["reason"].is_valid()).tolist():
                reasons[start + row] = table["reason"][row].as_py()
            truncated += table["truncated"].to_pylist().count(True)
            start += len(table)
            yield table

    def type_of(name: str) -> type | None:
        numbers = name in ("score", config.ranking) or _RANKED.match(name)
        return np.float64 if numbers else _TYPES.get(name)

    columns = read_columns(noted(), type_of)
    extra = {
        name: columns[name]
        for name in columns
        if _RANKED.match(name) and not re.match("score:|exact", name)
    }
    return RankedRows(
        _ranking_of(config, columns),
        columns["score"],
        columns["score_chosen"],
        columns["tokens"],
        columns.names["source"],
        extra,
        reasons,
        truncated,
        "rank_by" in columns,
    )


def _ranking_of(config: ScoreConfig, columns: ScoreColumns) -> NDArray[np.float64]:
    targets = [name for name in columns if name.startswith("score:")]
    if "rank_by" in columns:
        return unranked_last(columns["rank_by"], columns["score"])
    if "exact" in columns:
        return predicted_last(columns[config.ranking], columns["exact"] > 0)
    if config.combine == "round-robin" and len(targets) > 1:
        tokens = columns["tokens"]
        unit = np.maximum(1, tokens) if config.normalize == "tokens" else np.ones(len(tokens))
        return round_robin(np.column_stack([columns[name] / unit for name in targets]))
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
