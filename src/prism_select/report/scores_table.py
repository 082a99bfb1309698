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
import pyarrow.parquet as pq
from numpy.typing import NDArray

from prism_select.selection.scores_file import Names, read_columns, scores_tables

__all__ = ["VERDICTS", "Columns", "columns_of"]

Floats: TypeAlias = NDArray[np.float64]
Rows: TypeAlias = NDArray[np.int64]
Bools: TypeAlias = NDArray[np.bool_]

VERDICTS = {"select": "selected", "repair": "removed"}  # of the rows that a command chooses

_RANKINGS = {"tokens": "score_per_token", "norm": "score_cosine"}
_NAMES = ("source", "file", "verdict")


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
    source: Names
    file: Names
    verdict: Names

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
        return int(row - self._first_rows[self.file.codes[row]])

    @cached_property
    def _first_rows(self) -> Rows:
        """The first row of each file."""
        rows = np.zeros(len(self.file.names), dtype=np.int64)
        files, first = np.unique(self.file.codes, return_index=True)
        rows[files] = first
        return rows


def columns_of(path: Path, manifest: Mapping[str, Any]) -> Columns:
    """The columns of the run folder at `path`."""
    rank_by = "rank_by" in pq.read_schema(path / "scores.parquet").names
    normalised = _RANKINGS.get(manifest["config"]["normalize"], "score")
    ranked_by = "rank_by" if rank_by else normalised
    numeric = ("score", "score_chosen", "score_rejected", ranked_by)
    types = {**dict.fromkeys(numeric, np.float64), "tokens": np.int64, **dict.fromkeys(_NAMES, str)}
    columns = read_columns(scores_tables(path, list(types)), types.get)
    ranking, score = columns[ranked_by], columns["score"]
    return Columns(
        manifest["command"],
        ranked_by,
        np.where(np.isfinite(score), ranking, np.nan) if rank_by else ranking,
        score,
        columns["score_chosen"],
        columns["score_rejected"],
        columns["tokens"],
        *(columns.names[name] for name in _NAMES),
    )
