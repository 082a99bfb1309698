"""Table rows: rows of parquet files, and of data sets of the Hugging Face hub.

    a batch of 256 rows → cells → {column: value} → JSON text

Choices made here:
- a cell that cannot be a Python value makes its own row bad, and no other;
- `rows_at` reads only the row groups that hold a requested row;
- the text of a row is JSON, so that it can be copied to a .jsonl file.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import pyarrow as pa
import pyarrow.parquet as pq

from prism_select.data.records import Raw
from prism_select.data.remote import local
from prism_select.data.streams import CHUNK_BYTES, DAMAGED_ADVICE, reading
from prism_select.run.errors import BadOption

__all__ = [
    "arrow_row",
    "hub_rows",
    "parquet_rows",
    "parquet_rows_at",
    "parquet_table_at",
    "table_row",
]


@contextmanager
def _parquet(file: str) -> Iterator[pq.ParquetFile]:
    with (
        reading(file, (OSError, pa.ArrowException, UnicodeDecodeError), DAMAGED_ADVICE),
        # pre_buffer would hold the whole file
        pq.ParquetFile(local(file), buffer_size=CHUNK_BYTES, pre_buffer=False) as table,
    ):
        yield table


def parquet_rows(file: str) -> Iterator[Raw]:
    number = 0
    with _parquet(file) as table:
        for batch in table.iter_batches(batch_size=256):
            for cells in zip(*batch.columns, strict=True):
                number += 1
                yield arrow_row(file, number, dict(zip(batch.schema.names, cells, strict=True)))


def parquet_rows_at(file: str, positions: Sequence[int]) -> Iterator[tuple[int, Raw]]:
    """The rows at these positions, counted from 0, each with its position."""
    with _parquet(file) as table:
        end = 0
        for group in range(table.num_row_groups):
            start, end = end, end + table.metadata.row_group(group).num_rows
            if not any(start <= position < end for position in positions):
                continue
            for batch in table.iter_batches(batch_size=256, row_groups=[group]):
                stop = start + len(batch)
                for position in (row for row in positions if start <= row < stop):
                    cells = {name: batch[name][position - start] for name in batch.schema.names}
                    yield position, arrow_row(file, position + 1, cells)
                start = stop


def parquet_table_at(file: str, positions: Sequence[int]) -> pa.Table:
    """The rows at these ascending positions as one table, with the file's own types."""
    tables, end = list[pa.Table](), 0
    with _parquet(file) as opened:
        for group in range(opened.num_row_groups):
            start, end = end, end + opened.metadata.row_group(group).num_rows
            if rows := [position - start for position in positions if start <= position < end]:
                tables.append(opened.read_row_group(group).take(rows))
    return pa.concat_tables(tables)


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
        rows = datasets.load_dataset(name, split=split or "train", streaming=True)
        for number, fields in enumerate(rows, start=1):
            yield table_row(file, number, fields)


def table_row(
    file: str, line: int, fields: Mapping[str, object], problem: str | None = None
) -> Raw:
    text = json.dumps(fields, ensure_ascii=False, default=str)
    return Raw(file, line, text, None if problem else fields, problem)
