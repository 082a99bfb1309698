"""TODO."""

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import pyarrow as pa
import pyarrow.parquet as pq

from prism_select.data.records import Raw
from prism_select.data.remote import local
from prism_select.data.streams import CHUNK_BYTES, DAMAGED_ADVICE, reading
from prism_select.run.errors import BadOption

__all__ = ["arrow_row", "hub_rows", "parquet_rows", "parquet_rows_at", "table_row"]


@contextmanager
def _parquet(file: str) -> Iterator[pq.ParquetFile]:
    with (
        reading(file, (OSError, pa.ArrowException, UnicodeDecodeError), DAMAGED_ADVICE),
        pq.ParquetFile(
            local(file), buffer_size=CHUNK_BYTES, pre_buffer=False
        ) as table,  # which would hold the whole file
    ):
        yield table


def parquet_rows(file: str) -> Iterator[Raw]:
    number = 0
    with _parquet(file) as table:
        for batch in table.iter_batches(batch_size=256):
            for cells in zip(*batch.columns, strict=True):
                number += 1
                yield arrow_row(file, number, dict(zip(batch.schema.names, cells, strict=True)))


def parquet_rows_at(file: str, places: Sequence[int]) -> Iterator[tuple[int, Raw]]:
    """Row groups without a wanted row are not read."""
    with _parquet(file) as table:
        end = 0
        for group in range(table.num_row_groups):
            start, end = end, end + table.metadata.row_group(group).num_rows
            if not any(start <= place < end for place in places):
                continue
            for batch in table.iter_batches(batch_size=256, row_groups=[group]):
                for place in (place for place in places if start <= place < start + len(batch)):
                    cells = {name: batch[name][place - start] for name in batch.schema.names}
                    yield place, arrow_row(file, place + 1, cells)
                start += len(batch)


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
        for number, fields in enumerate(
            datasets.load_dataset(name, split=split or "train", streaming=True), start=1
        ):
            yield table_row(file, number, fields)


def table_row(
    file: str, line: int, fields: Mapping[str, object], problem: str | None = None
) -> Raw:
    text = json.dumps(fields, ensure_ascii=False, default=str)
    return Raw(file, line, text, None if problem else fields, problem)
