"""TODO."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack
from typing import IO

import pyarrow as pa
import pyarrow.parquet as pq

from prism_select.data.files import read_texts
from prism_select.data.pool import Pool, changed
from prism_select.data.records import Raw
from prism_select.run.folder import Store, json_line
from prism_select.selection.ranking_columns import Columns
from prism_select.selection.verdicts import Verdicts

__all__ = ["write_choice"]

GROUP, GROUP_BYTES = 1 << 16, 1 << 26


def write_choice(
    store: Store, tables: Iterable[pa.Table], verdicts: Verdicts, columns: Columns, pool: Pool
) -> None:
    """Everything of the run folder that follows from the verdicts, in the order of the pool."""
    start = 0
    with store.writing("scores.parquet") as file:
        writer: pq.ParquetWriter | None = None
        for table in in_groups(tables):
            names = verdicts.texts(start, start + len(table))
            start += len(table)
            table = table.drop_columns(["reason"]).append_column("verdict", names)
            writer = writer or pq.ParquetWriter(file, table.schema)
            writer.write_table(table)
        if writer:
            writer.close()
    files = {
        "selected.jsonl": {"selected", "kept"},
        "removed.jsonl": {"removed"},
        "quarantine.jsonl": {"quarantined"},
    }
    present = {*verdicts.counts, "quarantined"}
    if "kept" in present or "removed" in present:
        present |= {"kept", "removed"}
    with ExitStack() as stack:
        places: dict[str, IO[bytes]] = {}
        for name, kinds in files.items():
            if kinds & present:
                places.update(dict.fromkeys(kinds, stack.enter_context(store.writing(name))))
        copy_rows(pool, verdicts, places, columns.reasons)
        pool.refuse_changes()


def in_groups(tables: Iterable[pa.Table]) -> Iterator[pa.Table]:
    """The same rows in groups that suit a file: 65,536 of them, or fewer where they take 64 MB."""
    held: list[pa.Table] = []
    for table in tables:
        held.append(table)
        if sum(map(len, held)) >= GROUP or sum(part.nbytes for part in held) >= GROUP_BYTES:
            yield pa.concat_tables(held)
            held = []
    if held:
        yield pa.concat_tables(held)


def copy_rows(
    pool: Pool, verdicts: Verdicts, places: Mapping[str, IO[bytes]], reasons: Mapping[int, str]
) -> None:
    """Each row of the pool to the file of its verdict, where there is one. Raises BadFile where
    there are fewer rows than verdicts."""
    to = [places.get(name) for name in verdicts.names]
    aside = list(verdicts.names).index("quarantined")
    copied, codes = 0, iter(verdicts.codes.data)
    for file in pool.files:
        texts = read_texts(
            file, pool.row_bytes
        )  # first in the zip: a file that ends takes no code with it
        for (line, text), code in zip(texts, codes, strict=False):
            copied += 1
            if (place := to[code]) is None:
                continue
            if code == aside:
                raw = Raw(file, line, text.decode("utf-8", "backslashreplace"), None)
                place.write(json_line(raw.set_aside(reasons.get(copied - 1, ""))))
            else:
                place.write(text + b"\n")
    if copied < len(verdicts.codes):
        raise changed(pool.files)
