"""scores.parquet as arrays: one value for each row of the pool.

    read_columns(tables, types)     types(column name) = np.float64, np.int32, bool, str or None

    numbers    columns["score"]           null is NaN, or 0 of a whole number, or False
    names      columns.names["source"]    a number for each row, and the names behind the numbers

Choices made here:
- arrays grow in place, table by table: a hundred million rows take the memory of their arrays once;
- the caller says what it reads and as which type; a column of type None is not decoded;
- the shards that scores.parquet is written from are read in the same way.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

__all__ = ["Names", "ScoreColumns", "read_columns", "scores_tables"]

ColumnType: TypeAlias = type | None  # a numpy type for numbers, str for names


@dataclass(frozen=True)
class Names:
    """A column of names that repeat: the name of a row is `names[codes[row]]`, "" for null."""

    codes: NDArray[np.int32]
    names: Sequence[str]

    def __getitem__(self, row: int) -> str:
        return self.names[int(self.codes[row])]

    def equals(self, name: str) -> NDArray[np.bool_]:
        """Which rows have this name."""
        code = list(self.names).index(name) if name in self.names else -1
        return np.equal(self.codes, code)


@dataclass(frozen=True)
class ScoreColumns:
    """Columns of numbers by `[name]`, columns of names in `names`."""

    numbers: Mapping[str, NDArray[Any]]
    names: Mapping[str, Names]
    rows: int

    def __getitem__(self, name: str) -> NDArray[Any]:
        return self.numbers[name]

    def __contains__(self, name: str) -> bool:
        return name in self.numbers

    def __iter__(self) -> Iterator[str]:
        return iter(self.numbers)

    def __len__(self) -> int:
        return self.rows


def scores_tables(folder: Path, columns: Sequence[str] | None = None) -> Iterator[pa.Table]:
    """scores.parquet of a run folder, 65,536 rows at a time; only the `columns` that it has."""
    file = pq.ParquetFile(folder / "scores.parquet", pre_buffer=False)
    if columns is not None:
        columns = [name for name in columns if name in file.schema_arrow.names]
    for batch in file.iter_batches(columns=columns):
        yield pa.Table.from_batches([batch])


def read_columns(tables: Iterable[pa.Table], types: Callable[[str], ColumnType]) -> ScoreColumns:
    """The columns of tables that follow one another, read as `types` says."""
    arrays = defaultdict[str, bytearray](bytearray)
    dtypes = dict[str, type]()
    codes = dict[str, dict[str, int]]()
    rows = 0
    for table in tables:
        rows += len(table)
        for name in table.column_names:
            kind = types(name)
            if kind is None:
                continue
            if kind is str:
                values = _codes_of(table[name], codes.setdefault(name, {}))
            else:
                values = _numbers_of(table[name], kind)
            dtypes[name] = kind
            arrays[name] += values.data
    numbers: dict[str, NDArray[Any]] = {
        name: np.frombuffer(arrays[name], dtype=kind)
        for name, kind in dtypes.items()
        if kind is not str
    }
    names = {
        name: Names(np.frombuffer(arrays[name], dtype=np.int32), list(by_name))
        for name, by_name in codes.items()
    }
    return ScoreColumns(numbers, names, rows)


def _numbers_of(column: pa.ChunkedArray, kind: type) -> NDArray[Any]:
    if column.null_count and not issubclass(kind, np.floating):
        column = column.fill_null(False if kind is bool else 0)
    return np.ascontiguousarray(column.to_numpy(), dtype=kind)


def _codes_of(column: pa.ChunkedArray, codes: dict[str, int]) -> NDArray[np.int32]:
    """Names as numbers; `codes` grows with the names that are new."""
    coded = column.combine_chunks().fill_null("").dictionary_encode()
    numbers = [codes.setdefault(name, len(codes)) for name in coded.dictionary.to_pylist()]
    values: NDArray[np.int32] = np.array(numbers, dtype=np.int32)[coded.indices.to_numpy()]
    return values
