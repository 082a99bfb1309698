"""Rows of objects: a datasets.Dataset, a list of dicts, a data frame or an Arrow table as a pool.

    memory:pool → Arrow tables of 256 rows → one row at a time      `line` is the index, from 0

Choices made here:
- an object is sliced where it lies: no more than 256 of its rows are Python objects at once;
- a list is read as it is, so that a row of it may be bad without harm to the others;
- two objects are the same where their rows are, read as JSON.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import pyarrow as pa

from prism_select.data.records import Raw
from prism_select.data.table_rows import MISSING, arrow_row, table_of, table_row
from prism_select.run.errors import BadOption
from prism_select.run.objects import MEMORY, object_at

__all__ = [
    "is_rows",
    "is_typed",
    "object_fingerprint",
    "object_rows",
    "object_rows_at",
    "object_tables",
    "refuse_object",
    "table_at",
]

SLICE = 256
EXPECTED = (
    "a file name, a datasets.Dataset, a list of dicts, a pandas or Polars frame or an Arrow table"
)


def kind_of(rows: Any) -> str:
    """dataset, pandas, polars, arrow or list; empty for anything else."""
    if isinstance(rows, pa.Table):
        return "arrow"
    if isinstance(rows, Sequence) and not isinstance(rows, str | bytes):
        return "list"
    name = f"{type(rows).__module__.partition('.')[0]}.{type(rows).__name__}"
    known = {
        "datasets.Dataset": "dataset",
        "pandas.DataFrame": "pandas",
        "polars.DataFrame": "polars",
    }
    return known.get(name, "")


def is_rows(rows: Any) -> bool:
    """Whether `rows` is an object with rows; a list of file names is not."""
    kind = kind_of(rows)
    return bool(kind) and not (
        kind == "list" and any(not isinstance(row, Mapping) for row in rows[:1])
    )


def is_typed(address: str) -> bool:
    """Whether the rows of an object have columns with types: those of a list have none."""
    return kind_of(object_at(address)) != "list"


def refuse_object(name: str, rows: Any) -> None:
    """Raises BadOption for an object that has no rows to read."""
    if is_rows(rows):
        return
    advice = EXPECTED
    if isinstance(rows, Mapping):
        advice = "one split of a DatasetDict, or datasets.Dataset.from_dict(columns)"
    elif type(rows).__name__ in ("IterableDataset", "generator"):
        advice = "a list or a Dataset: its rows are read more than once"
    raise BadOption(f"{name}: {type(rows).__name__} has no rows to read; give {advice}")


def table_slice(rows: Any, start: int, stop: int) -> pa.Table:
    """Rows start to stop of anything but a list, as an Arrow table."""
    kind = kind_of(rows)
    if kind == "arrow":
        return rows.slice(start, stop - start)
    if kind == "dataset":
        return rows.with_format("arrow")[start:stop]
    if kind == "polars":
        return rows.slice(start, stop - start).to_arrow()
    return pa.Table.from_pandas(rows.iloc[start:stop], preserve_index=False)


def object_rows(address: str) -> Iterator[Raw]:
    """The rows of an object, in order."""
    rows = object_at(address)
    for start in range(0, len(rows), SLICE):
        yield from _slice_rows(address, rows, start, min(start + SLICE, len(rows)))


def _slice_rows(address: str, rows: Any, start: int, stop: int) -> Iterator[Raw]:
    if kind_of(rows) == "list":
        yield from (_list_row(address, index, rows[index]) for index in range(start, stop))
        return
    try:
        table = table_slice(rows, start, stop)
    except (pa.ArrowException, TypeError) as error:
        what = " ".join(str(error).split())[:200]
        name = address.removeprefix(MEMORY)
        raise BadOption(
            f"{name}[{start}] to [{stop - 1}]: a column mixes types ({what}); give a list of dicts"
        ) from error
    for index, cells in enumerate(zip(*table.columns, strict=True), start=start):
        yield arrow_row(address, index, dict(zip(table.column_names, cells, strict=True)))


def object_tables(address: str) -> Iterator[pa.Table]:
    """The rows of an object with typed columns, as tables."""
    rows = object_at(address)
    for start in range(0, len(rows), SLICE):
        yield table_slice(rows, start, min(start + SLICE, len(rows)))


def _list_row(address: str, index: int, row: Any) -> Raw:
    if not isinstance(row, Mapping):
        text = json.dumps(row, ensure_ascii=False, default=str)
        return Raw(address, index, text, None, f"{type(row).__name__} where a dict was expected")
    return table_row(address, index, _fields_of(row))


def _fields_of(row: Mapping[Any, Any]) -> dict[str, Any]:
    return {str(name): _plain(value) for name, value in row.items()}


def _plain(value: Any) -> Any:
    """A number of numpy as one of Python, and a missing value of pandas as None."""
    if type(value).__module__ == "numpy" and not hasattr(value, "__len__"):
        return value.item()
    return None if type(value).__name__ in MISSING else value


def object_rows_at(address: str, positions: Sequence[int]) -> Iterator[tuple[int, Raw]]:
    """The rows at these ascending positions, each with its position."""
    rows = object_at(address)
    for position in positions:
        if position < len(rows):
            yield from (
                (position, raw) for raw in _slice_rows(address, rows, position, position + 1)
            )


def table_at(address: str, positions: Sequence[int]) -> pa.Table:
    """The rows at these positions as an Arrow table with the object's own types."""
    rows = object_at(address)
    kind = kind_of(rows)
    if kind == "arrow":
        return rows.take(positions)
    if kind == "dataset":
        return rows.select(positions).with_format("arrow")[:]
    if kind == "polars":
        return rows[list(positions)].to_arrow()
    if kind == "pandas":
        return pa.Table.from_pandas(rows.iloc[list(positions)], preserve_index=False)
    return table_of([_fields_of(rows[position]) for position in positions])


def object_fingerprint(address: str) -> bytes:
    """Of the rows, in order."""
    digest = hashlib.blake2b(digest_size=16)
    for raw in object_rows(address):
        digest.update(raw.text.encode("utf-8", "surrogatepass") + b"\0")
    return digest.digest()
