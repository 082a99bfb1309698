"""Table rows: rows of Parquet and Arrow files, and of data sets of the Hugging Face hub.

    a batch of rows → cells → {column: value} → JSON text

Choices made here:
- a cell that cannot be a Python value makes its own row bad, and no other;
- of a Parquet file `rows_at` reads only the row groups that hold a requested row;
- an Arrow file is a stream, as `datasets` writes it, or a file with an index; it is read in the
  batches in which it was written (1,000 rows by default);
- the text of a row is strict JSON, so that it can be copied to a .jsonl file: NaN and infinity are
  null, bytes are base64, dates and times ISO 8601.
"""

import base64
import json
from bisect import bisect_left
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import date, time
from typing import Any

import pyarrow as pa
import pyarrow.ipc
import pyarrow.parquet as pq

from prism_select.data.records import Raw
from prism_select.data.remote import local
from prism_select.data.streams import CHUNK_BYTES, DAMAGED_ADVICE, reading
from prism_select.run.errors import BadOption
from prism_select.run.folder import finite

__all__ = [
    "arrow_file_rows",
    "arrow_file_rows_at",
    "arrow_row",
    "arrow_table_at",
    "arrow_tables",
    "hub_rows",
    "hub_tables",
    "parquet_rows",
    "parquet_rows_at",
    "parquet_table_at",
    "parquet_tables",
    "table_of",
    "table_row",
]

MISSING = ("NAType", "NaTType")  # of pandas; the latter is a date
_FAILURES = (OSError, pa.ArrowException, UnicodeDecodeError)


@contextmanager
def _parquet(file: str) -> Iterator[pq.ParquetFile]:
    with (
        reading(file, _FAILURES, DAMAGED_ADVICE),
        # pre_buffer would hold the whole file
        pq.ParquetFile(local(file), buffer_size=CHUNK_BYTES, pre_buffer=False) as table,
    ):
        yield table


def parquet_rows(file: str) -> Iterator[Raw]:
    with _parquet(file) as table:
        yield from _rows_of(file, table.iter_batches(batch_size=256))


def _rows_of(file: str, batches: Iterator[pa.RecordBatch]) -> Iterator[Raw]:
    number = 0
    for batch in batches:
        for cells in zip(*batch.columns, strict=True):
            number += 1
            yield arrow_row(file, number, dict(zip(batch.schema.names, cells, strict=True)))


def parquet_rows_at(file: str, positions: Sequence[int]) -> Iterator[tuple[int, Raw]]:
    """The rows at these ascending positions, counted from 0, each with its position."""
    with _parquet(file) as table:
        end = 0
        for group in range(table.num_row_groups):
            start, end = end, end + table.metadata.row_group(group).num_rows
            if not _between(positions, start, end):
                continue
            batches = table.iter_batches(batch_size=256, row_groups=[group])
            yield from _rows_of_at(file, batches, positions, start)


def _between(positions: Sequence[int], start: int, stop: int) -> Sequence[int]:
    """Those from `start` on and before `stop`."""
    return positions[bisect_left(positions, start) : bisect_left(positions, stop)]


def _rows_of_at(
    file: str, batches: Iterator[pa.RecordBatch], positions: Sequence[int], start: int = 0
) -> Iterator[tuple[int, Raw]]:
    """The rows at these ascending positions; the first row of `batches` is at `start`."""
    for batch in batches:
        stop = start + len(batch)
        for position in _between(positions, start, stop):
            cells = {name: batch[name][position - start] for name in batch.schema.names}
            yield position, arrow_row(file, position + 1, cells)
        start = stop


def parquet_table_at(file: str, positions: Sequence[int]) -> pa.Table:
    """The rows at these ascending positions as one table, with the file's own types."""
    tables, end = list[pa.Table](), 0
    with _parquet(file) as opened:
        for group in range(opened.num_row_groups):
            start, end = end, end + opened.metadata.row_group(group).num_rows
            if rows := [position - start for position in _between(positions, start, end)]:
                tables.append(opened.read_row_group(group).take(rows))
    return pa.concat_tables(tables)


@contextmanager
def _arrow(file: str) -> Iterator[Iterator[pa.RecordBatch]]:
    """The batches of an Arrow file."""
    # a mapped file that becomes shorter meanwhile would kill the process
    with reading(file, _FAILURES, DAMAGED_ADVICE), pa.OSFile(local(file)) as source:
        if source.read(6) == b"ARROW1":
            indexed = pa.ipc.open_file(source)
            yield map(_sound, map(indexed.get_batch, range(indexed.num_record_batches)))
        else:
            source.seek(0)
            yield map(_sound, pa.ipc.open_stream(source))


def _sound(batch: pa.RecordBatch) -> pa.RecordBatch:
    """The batch itself. Raises ArrowException for damage, which nothing else would notice before
    it reads outside of the memory."""
    batch.validate(full=True)
    return batch


def arrow_file_rows(file: str) -> Iterator[Raw]:
    with _arrow(file) as batches:
        yield from _rows_of(file, batches)


def arrow_file_rows_at(file: str, positions: Sequence[int]) -> Iterator[tuple[int, Raw]]:
    """The rows at these ascending positions, counted from 0, each with its position."""
    with _arrow(file) as batches:
        yield from _rows_of_at(file, batches, positions)


def arrow_table_at(file: str, positions: Sequence[int]) -> pa.Table:
    """The rows at these ascending positions as one table, with the file's own types."""
    tables, end = list[pa.Table](), 0
    with _arrow(file) as batches:
        for batch in batches:
            start, end = end, end + len(batch)
            if rows := [position - start for position in _between(positions, start, end)]:
                tables.append(pa.Table.from_batches([batch]).take(rows))
    return pa.concat_tables(tables)


def parquet_tables(file: str) -> Iterator[pa.Table]:
    with _parquet(file) as table:
        yield from map(_table, table.iter_batches(batch_size=256))


def arrow_tables(file: str) -> Iterator[pa.Table]:
    with _arrow(file) as batches:
        yield from map(_table, batches)


def _table(batch: pa.RecordBatch) -> pa.Table:
    return pa.Table.from_batches([batch])


def hub_tables(file: str) -> Iterator[pa.Table]:
    """The rows of `hub_rows` as tables."""
    with _hub(file) as rows:
        yield from rows.with_format("arrow").iter(batch_size=256)


def table_of(rows: Sequence[Mapping[str, object]]) -> pa.Table:
    """The rows with all columns that any of them has. Raises ArrowException, TypeError or
    OverflowError for a column whose values have no type in common."""
    names = dict.fromkeys(name for row in rows for name in row)
    return pa.table({name: [row.get(name) for row in rows] for name in names})


def arrow_row(file: str, number: int, cells: Mapping[str, pa.Scalar]) -> Raw:
    fields: dict[str, object] = {}
    problem = None
    for name, cell in cells.items():
        try:
            fields[name] = cell.as_py()
        except (ValueError, OverflowError) as error:  # text that is not UTF-8, a date out of range
            fields[name], problem = None, f"column {name!r}: {error}"
    return table_row(file, number, fields, problem)


def hub_rows(file: str) -> Iterator[Raw]:
    """The rows of hub:NAME or hub:NAME:SPLIT (default: train), streamed. Raises BadOption without a
    name or the package datasets, BadFile where they cannot be loaded."""
    with _hub(file) as rows:
        rows = rows.decode(False) if hasattr(rows, "decode") else rows  # images remain bytes
        for number, fields in enumerate(rows, start=1):
            yield table_row(file, number, fields)


@contextmanager
def _hub(file: str) -> Iterator[Any]:
    name, _, split = file.removeprefix("hub:").partition(":")
    if not name:
        raise BadOption(f"{file} names no data set; write hub:NAME or hub:NAME:SPLIT")
    try:
        import datasets  # type: ignore[import-untyped, unused-ignore]
    except ImportError as error:
        raise BadOption(
            f"{file}: needs the package datasets; pip install 'prism-select[hub]'"
        ) from error
    with reading(file, Exception, "check the name, the split (hub:NAME:SPLIT) and the network"):
        yield datasets.load_dataset(name, split=split or "train", streaming=True)


def table_row(
    file: str, line: int, fields: Mapping[str, object], problem: str | None = None
) -> Raw:
    try:
        try:
            text = _ENCODER.encode(fields)
        except (ValueError, TypeError):  # NaN, or a key that JSON does not know
            text = _ENCODER.encode(finite(fields))
    except RecursionError:
        text, problem = "", "nested too deeply"
    return Raw(file, line, text, None if problem else fields, problem)


def _in_json(value: object) -> object:
    """What stands in JSON for a value that it does not know."""
    if isinstance(value, bytes | bytearray | memoryview):
        return base64.b64encode(value).decode()
    if type(value).__name__ in MISSING:
        return None
    if isinstance(value, date | time):
        return value.isoformat()
    values = getattr(value, "tolist", None)  # of numpy
    return finite(values()) if values else str(value)


_ENCODER = json.JSONEncoder(ensure_ascii=False, allow_nan=False, default=_in_json)
