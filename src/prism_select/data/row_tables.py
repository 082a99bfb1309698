"""Row tables: rows of a file as Arrow tables, with the types that they have there.

    row_batches(file) → 256 rows at a time → take([0, 7]) → a table of two rows
    common_schema([{a: int64}, {a: double, b: string}]) → {a: double, b: string}

Choices made here:
- rows of a table (Parquet, Arrow, a data set, a data frame) keep their types; those of JSON, CSV
  and lists get the types that all their values fit;
- a row without a column has null there;
- a number may become wider (int32 and int64, int64 and double); anything else that mixes types has
  no column, and is refused.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice

import pyarrow as pa

from prism_select.data.files import is_table, read_rows
from prism_select.data.object_rows import object_tables
from prism_select.data.table_rows import arrow_tables, hub_tables, parquet_tables, table_of
from prism_select.run.objects import is_object

__all__ = ["RowBatch", "in_schema", "joint_schema", "row_batches"]

ROWS = 256


@dataclass(frozen=True)
class RowBatch:
    """So many rows that follow one another; `take` makes a table of those at some positions."""

    rows: int
    take: Callable[[Sequence[int]], pa.Table]


def row_batches(file: str) -> Iterator[RowBatch]:
    """All rows of a file, in the order and number of `read_rows`."""
    if is_table(file):
        yield from (RowBatch(len(table), table.take) for table in _tables(file))
        return
    rows = read_rows(file)
    while batch := [raw.fields or {} for raw in islice(rows, ROWS)]:
        yield RowBatch(len(batch), partial(_taken, batch))


def _tables(file: str) -> Iterator[pa.Table]:
    if is_object(file):
        return object_tables(file)
    if file.startswith("hub:"):
        return hub_tables(file)
    return (arrow_tables if file.lower().endswith(".arrow") else parquet_tables)(file)


def _taken(rows: Sequence[Mapping[str, object]], positions: Sequence[int]) -> pa.Table:
    return table_of([rows[position] for position in positions])


def joint_schema(schemas: Iterable[pa.Schema]) -> pa.Schema:
    """The columns of all schemas, in types that fit them all, with the metadata of schemas that are
    equal; no columns without schemas. Raises ArrowException where there is no such type."""
    different = list(dict.fromkeys(schemas)) or [pa.schema([])]
    if len(different) == 1:
        return different[0]
    return pa.unify_schemas(different, promote_options="permissive").remove_metadata()


def in_schema(table: pa.Table, schema: pa.Schema) -> pa.Table:
    """The table with the columns and types of a joint schema."""
    if table.schema.equals(schema):
        return table
    filled = pa.concat_tables([schema.empty_table(), table], promote_options="permissive")
    return filled.select(schema.names).cast(schema)
