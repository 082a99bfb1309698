"""Files: what a run folder holds once every row has a verdict.

    scores.parquet      a line for each row of the pool, with its verdict
    selected.jsonl      the selected rows, or in repair the kept ones, as they came
    removed.jsonl       in repair: the rows that were removed
    selected.parquet, removed.parquet    the same rows with the pool's own types
    quarantine.jsonl    the rows without a score: file, line, reason, raw

Choices made here:
- rows of JSON are copied from the pool byte by byte, in the order of the pool, in one pass that
  holds one row at a time and does not parse it;
- as Parquet they are read twice, 256 at a time: for the types that all of them fit, and to be
  written;
- a row group of scores.parquet has 65,536 rows, or fewer where they take 64 MB.
"""

from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import ExitStack
from typing import IO

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from prism_select.data.files import read_texts
from prism_select.data.pool import Pool, changed
from prism_select.data.records import Raw
from prism_select.data.row_tables import in_schema, joint_schema, row_batches
from prism_select.run.errors import BadOption
from prism_select.run.folder import Store, json_line
from prism_select.selection.verdicts import Verdicts

__all__ = ["write_choice"]

GROUP_ROWS, GROUP_BYTES = 1 << 16, 1 << 26
FILES = {"selected": {"selected", "kept"}, "removed": {"removed"}}


def write_choice(
    store: Store,
    tables: Iterable[pa.Table],
    verdicts: Verdicts,
    reasons: Mapping[int, str],
    pool: Pool,
    output_format: str,
) -> None:
    """Every file of the run folder that follows from the verdicts.

    `tables` are the scores, in the order of the pool; `reasons` say of a row why it has no score;
    the chosen rows are written as `jsonl` or `parquet`.
    """
    with store.writing("scores.parquet") as file:
        write_scores(file, tables, verdicts)
    present = set(verdicts.names)
    files = {f"{name}.{output_format}": kinds for name, kinds in FILES.items() if kinds & present}
    other = {"jsonl": "parquet", "parquet": "jsonl"}[output_format]
    for name in FILES:  # an earlier start may have ended after it wrote them
        (store.path / f"{name}.{other}").unlink(missing_ok=True)
    with ExitStack() as stack:
        opened = {name: stack.enter_context(store.writing(name)) for name in files}
        outputs = {kind: opened[name] for name, kinds in files.items() for kind in kinds & present}
        quarantine = stack.enter_context(store.writing("quarantine.jsonl"))
        if output_format == "parquet":
            copy_tables(pool, verdicts, outputs)
            outputs = {}
        copy_rows(pool, verdicts, outputs | {"quarantined": quarantine}, reasons)
        pool.refuse_changes()


def write_scores(file: IO[bytes], tables: Iterable[pa.Table], verdicts: Verdicts) -> None:
    """The tables as one Parquet file, with the verdict in place of the reason."""
    start = 0
    writer: pq.ParquetWriter | None = None
    for table in in_groups(tables):
        texts = verdicts.texts(start, start + len(table))
        table = table.drop_columns(["reason"]).append_column("verdict", texts)
        if verdicts.takers is not None:
            groups = verdicts.group_names(start, start + len(table))
            table = table.append_column("group", groups)
        start += len(table)
        writer = writer or pq.ParquetWriter(file, table.schema)
        writer.write_table(table)
    if writer:
        writer.close()


def in_groups(tables: Iterable[pa.Table]) -> Iterator[pa.Table]:
    """The same rows in tables that are row groups."""
    group: list[pa.Table] = []
    for table in tables:
        group.append(table)
        rows, size = sum(map(len, group)), sum(piece.nbytes for piece in group)
        if rows >= GROUP_ROWS or size >= GROUP_BYTES:
            yield pa.concat_tables(group)
            group = []
    if group:
        yield pa.concat_tables(group)


def copy_rows(
    pool: Pool, verdicts: Verdicts, outputs: Mapping[str, IO[bytes]], reasons: Mapping[int, str]
) -> None:
    """Each row of the pool to the file of its verdict, where there is one.

    Raises BadFile where the pool has fewer rows than there are verdicts.
    """
    output_of = [outputs.get(name) for name in verdicts.names]
    quarantined = list(verdicts.names).index("quarantined")
    row, codes = 0, iter(verdicts.codes.data)
    for file in pool.files:
        # texts are first in the zip, so that the end of a file takes no code
        for (line, text), code in zip(read_texts(file), codes, strict=False):
            output = output_of[code]
            if output is not None and code == quarantined:
                raw = Raw(file, line, text.decode("utf-8", "backslashreplace"), None)
                output.write(json_line(raw.quarantined(reasons.get(row, ""))))
            elif output is not None:
                output.write(text + b"\n")
            row += 1
    if row < len(verdicts.codes):
        raise changed(pool.files)


def copy_tables(pool: Pool, verdicts: Verdicts, outputs: Mapping[str, IO[bytes]]) -> None:
    """Each row of the pool, with its types, to the Parquet file of its verdict, where there is one.

    Raises BadOption where the values of a column have no type in common.
    """
    try:
        chosen = chosen_tables(pool, verdicts, outputs)
        schema = joint_schema(table.schema for table in chosen)
        for name, file in outputs.items():
            with pq.ParquetWriter(file, schema) as writer:
                rows = chosen_tables(pool, verdicts, {name})
                for table in in_groups(in_schema(table, schema) for table in rows):
                    writer.write_table(table)
    except (pa.ArrowException, TypeError, OverflowError) as error:
        what = " ".join(str(error).split())[:300]
        raise BadOption(
            f"--output-format parquet: the chosen rows have a column without a type ({what}); give "
            "--output-format jsonl, which takes the scores that are there"
        ) from error


def chosen_tables(pool: Pool, verdicts: Verdicts, names: Collection[str]) -> Iterator[pa.Table]:
    """The rows with one of some verdicts, batch by batch."""
    start, chosen = 0, verdicts.among(*names)
    for file in pool.files:
        for batch in row_batches(file):
            positions = np.flatnonzero(chosen[start : start + batch.rows])
            start += batch.rows
            if len(positions):
                yield batch.take(positions.tolist())
