"""Columns: scores.parquet as arrays, ranked as the choice was made.

    ranking   what the choice went by: rank_by, score_cosine, score_per_token or score, the highest first
    order     rows by falling ranking; rows without a score have no place in it
    cut-off   the lowest ranking among the rows taken (selected, or in repair removed)

Choices made here: names that repeat (source, file, verdict) are held once each; a choice in turns
over targets (round-robin), with caps or without near-duplicates passes over rows above its cut-off,
which are counted."""

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

__all__ = ["TAKEN", "Columns", "Named", "columns_of"]

Floats: TypeAlias = NDArray[np.float64]


Rows: TypeAlias = NDArray[np.int64]


TAKEN = {"select": "selected", "repair": "removed"}


_BY = {"tokens": "score_per_token", "norm": "score_cosine"}


@dataclass(frozen=True)
class Named:
    """A column of names: the place of each row's name among them."""

    places: Rows
    names: tuple[str, ...]

    def __getitem__(self, row: int) -> str:
        return self.names[int(self.places[row])]

    def equals(self, name: str) -> NDArray[np.bool_]:
        return np.equal(self.places, self.names.index(name) if name in self.names else -1)


@dataclass(frozen=True)
class Columns:
    """One value for each row of the pool; NaN, or no tokens, where it has no score."""

    command: str
    by: str
    ranking: Floats
    score: Floats
    chosen: Floats
    rejected: Floats
    tokens: Rows
    source: Named
    file: Named
    verdict: Named

    def __len__(self) -> int:
        return len(self.score)

    @cached_property
    def order(self) -> Rows:
        known = np.flatnonzero(np.isfinite(self.ranking))
        return known[np.argsort(-self.ranking[known], kind="stable")]

    @cached_property
    def taken(self) -> NDArray[np.bool_]:
        """Selected, or in repair removed; none where no choice was made."""
        return self.verdict.equals(TAKEN.get(self.command, "")) & np.isfinite(self.ranking)

    @property
    def cutoff(self) -> float:
        """NaN where nothing was taken."""
        return float(self.ranking[self.taken].min()) if self.taken.any() else math.nan

    @property
    def passed_over(self) -> int:
        """Rows above the cut-off that were not taken."""
        above = self.ranking > self.cutoff
        return int((above & ~self.taken).sum())

    def place_in_file(self, row: int) -> int:
        """Where a row stands among the rows of its file, from 0."""
        return int(row - self._starts[self.file.places[row]])

    @cached_property
    def _starts(self) -> Rows:
        found = np.zeros(len(self.file.names), dtype=np.int64)
        present, first = np.unique(self.file.places, return_index=True)
        found[present] = first
        return found


def columns_of(path: Path, manifest: Mapping[str, Any]) -> Columns:
    """Of the run folder at `path`."""
    names = ["score", "score_chosen", "score_rejected", "tokens", "source", "file", "verdict"]
    there = set(pq.read_schema(path / "scores.parquet").names)
    by = _BY.get(manifest["config"]["normalize"], "score")
    if "rank_by" in there:
        by = "rank_by"
    named = ["source", "file", "verdict"]
    table = pq.read_table(
        path / "scores.parquet", columns=sorted({*names, by}), read_dictionary=named
    )

    def numbers(name: str) -> Floats:
        return np.asarray(table[name].to_numpy(), dtype=np.float64)

    ranking = numbers(by)
    if by == "rank_by":
        ranking = np.where(np.isfinite(numbers("score")), ranking, np.nan)
    return Columns(
        manifest["command"],
        by,
        ranking,
        numbers("score"),
        numbers("score_chosen"),
        numbers("score_rejected"),
        np.nan_to_num(numbers("tokens")).astype(np.int64),
        *(_names_of(table[name]) for name in named),
    )


def _names_of(column: pa.ChunkedArray) -> Named:
    whole = column.unify_dictionaries().combine_chunks().fill_null("")
    if isinstance(whole, pa.ChunkedArray):  # a table without rows has no chunk
        whole = pa.array([], pa.dictionary(pa.int32(), pa.string()))
    return Named(
        np.asarray(whole.indices, dtype=np.int64), tuple(map(str, whole.dictionary.to_pylist()))
    )
