"""Columns: the arrays of scores.parquet, and the ranking behind the choice.

    ranking   the column behind the choice: rank_by, score_cosine, score_per_token or score
    order     rows by falling ranking; rows without a score are left out
    chosen    rows selected by `select` or removed by `repair`
    cut-off   the lowest ranking among the chosen rows

Choices made here:
- repeated names (source, file, verdict) are stored once each;
- a choice in turns over targets (round-robin), with caps or without near-duplicates passes over
  rows above its cut-off; they are counted.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

__all__ = ["VERDICTS", "Columns", "NameColumn", "columns_of"]

Floats: TypeAlias = NDArray[np.float64]
Rows: TypeAlias = NDArray[np.int64]
Bools: TypeAlias = NDArray[np.bool_]

VERDICTS = {"select": "selected", "repair": "removed"}  # of the rows that a command chooses

_RANKINGS = {"tokens": "score_per_token", "norm": "score_cosine"}
_NAMES = ("source", "file", "verdict")


@dataclass(frozen=True)
class NameColumn:
    """A column of names: the index of each row's name in `names`."""

    index: Rows
    names: tuple[str, ...]

    def __getitem__(self, row: int) -> str:
        return self.names[int(self.index[row])]

    def equals(self, name: str) -> Bools:
        return np.equal(self.index, self.names.index(name) if name in self.names else -1)


@dataclass(frozen=True)
class Columns:
    """One value for each row of the pool; a row without a score has NaN, and no tokens.

    `score_chosen` and `score_rejected` are the influence on either answer of the pairs.
    """

    command: str
    ranked_by: str
    ranking: Floats
    score: Floats
    score_chosen: Floats
    score_rejected: Floats
    tokens: Rows
    source: NameColumn
    file: NameColumn
    verdict: NameColumn

    def __len__(self) -> int:
        return len(self.score)

    @cached_property
    def order(self) -> Rows:
        scored = np.flatnonzero(np.isfinite(self.ranking))
        return scored[np.argsort(-self.ranking[scored], kind="stable")]

    @cached_property
    def chosen(self) -> Bools:
        """Rows selected, or in repair removed; none in a run of score."""
        return self.verdict.equals(VERDICTS.get(self.command, "")) & np.isfinite(self.ranking)

    @property
    def cutoff(self) -> float:
        """NaN if no row was chosen."""
        return float(self.ranking[self.chosen].min()) if self.chosen.any() else math.nan

    @property
    def passed_over(self) -> int:
        """Rows above the cut-off, but not chosen."""
        return int(((self.ranking > self.cutoff) & ~self.chosen).sum())

    @cached_property
    def positive_scores(self) -> Floats:
        """The scores, with 0 for those below 0 and for rows without one."""
        return np.clip(np.nan_to_num(self.score), 0, None)

    @property
    def chosen_influence(self) -> float:
        """Share of all positive influence in the chosen rows; NaN if no row was chosen or no
        score is positive."""
        total = float(self.positive_scores.sum())
        if not total or not self.chosen.any():
            return math.nan
        return float(self.positive_scores[self.chosen].sum()) / total

    def row_in_file(self, row: int) -> int:
        """The index of a row among those of its file."""
        return int(row - self._first_rows[self.file.index[row]])

    @cached_property
    def _first_rows(self) -> Rows:
        """The first row of each file."""
        rows = np.zeros(len(self.file.names), dtype=np.int64)
        files, first = np.unique(self.file.index, return_index=True)
        rows[files] = first
        return rows


def columns_of(path: Path, manifest: Mapping[str, Any]) -> Columns:
    """The columns of the run folder at `path`."""
    file = path / "scores.parquet"
    rank_by = "rank_by" in pq.read_schema(file).names
    normalised = _RANKINGS.get(manifest["config"]["normalize"], "score")
    ranked_by = "rank_by" if rank_by else normalised
    numeric = {"score", "score_chosen", "score_rejected", "tokens", ranked_by}
    table = pq.read_table(file, columns=sorted({*numeric, *_NAMES}), read_dictionary=list(_NAMES))

    def numbers(name: str) -> Floats:
        return np.asarray(table[name].to_numpy(), dtype=np.float64)

    ranking, score = numbers(ranked_by), numbers("score")
    return Columns(
        manifest["command"],
        ranked_by,
        np.where(np.isfinite(score), ranking, np.nan) if rank_by else ranking,
        score,
        numbers("score_chosen"),
        numbers("score_rejected"),
        np.nan_to_num(numbers("tokens")).astype(np.int64),
        *(_name_column(table[name]) for name in _NAMES),
    )


def _name_column(column: pa.ChunkedArray) -> NameColumn:
    array = column.unify_dictionaries().combine_chunks().fill_null("")
    if isinstance(array, pa.ChunkedArray):  # a table without rows has no chunk
        array = pa.array([], pa.dictionary(pa.int32(), pa.string()))
    names = tuple(map(str, array.dictionary.to_pylist()))
    return NameColumn(np.asarray(array.indices, dtype=np.int64), names)
