"""Files: what a run folder holds once every row has a verdict.

    scores.parquet      a line for each row of the pool, with its verdict
    selected.jsonl      the selected rows, or in repair the kept ones, as they came
    removed.jsonl       in repair: the rows that were removed
    quarantine.jsonl    the rows without a score: file, line, reason, raw

Choices made here:
- rows are copied from the pool byte by byte, in the order of the pool, in one pass that holds one
  row at a time and does not parse it;
- a row group of scores.parquet has 65,536 rows, or fewer where they take 64 MB.
"""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack
from typing import IO

import pyarrow as pa
import pyarrow.parquet as pq

from prism_select.data.files import read_texts
from prism_select.data.pool import Pool, changed
from prism_select.data.records import Raw
from prism_select.run.folder import Store, json_line
from prism_select.selection.verdicts import Verdicts

__all__ = ["write_choice"]

GROUP_ROWS, GROUP_BYTES = 1 << 16, 1 << 26
FILES = {
    "selected.jsonl": {"selected", "kept"},
    "removed.jsonl": {"removed"},
    "quarantine.jsonl": {"quarantined"},
}


def write_choice(
    store: Store,
    tables: Iterable[pa.Table],
    verdicts: Verdicts,
    reasons: Mapping[int, str],
    pool: Pool,
) -> None:
    """Every file of the run folder that follows from the verdicts.

    `tables` are the scores, in the order of the pool; `reasons` say of a row why it has no score.
    """
    with store.writing("scores.parquet") as file:
        write_scores(file, tables, verdicts)
    present = {*verdicts.counts, "quarantined"}
    if "kept" in present or "removed" in present:
        present |= {"kept", "removed"}
    with ExitStack() as stack:
        outputs: dict[str, IO[bytes]] = {}
        for name, kinds in FILES.items():
            if kinds & present:
                outputs.update(dict.fromkeys(kinds, stack.enter_context(store.writing(name))))
        copy_rows(pool, verdicts, outputs, reasons)
        pool.refuse_changes()


def write_scores(file: IO[bytes], tables: Iterable[pa.Table], verdicts: Verdicts) -> None:
    """The tables as one Parquet file, with the verdict in place of the reason."""
    start = 0
    writer: pq.ParquetWriter | None = None
    for table in in_groups(tables):
        texts = verdicts.texts(start, start + len(table))
        start += len(table)
        table = table.drop_columns(["reason"]).append_column("verdict", texts)
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
