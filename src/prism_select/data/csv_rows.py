"""CSV rows: a header that names the columns, then one row per record.

    prompt,completion            → {"prompt": "1 + 1", "completion": "2"}
    1 + 1,2

Choices made here:
- a value is text: nothing is taken for a number;
- a record may span lines; its row has the line where it starts;
- after a record that is too long, a row begins at the next line: a quote that is never closed must
  not swallow the file.
"""

import csv
import io
from collections.abc import Iterator

from prism_select.data import streams
from prism_select.data.records import Raw
from prism_select.data.streams import SHOWN_BYTES, bounded_lines, decode, long_row
from prism_select.data.table_rows import table_row
from prism_select.run.errors import BadFile

__all__ = ["csv_rows"]


def csv_rows(file: str, stream: io.BufferedReader) -> Iterator[Raw]:
    """Raises BadFile where the header cannot be read or names a column twice."""
    header: list[str] | None = None
    for line, text, cells, problem in _records(stream):
        if header is None:
            header = [name.strip() for name in cells]
            twice = [name for name in header if name and header.count(name) > 1]
            if problem or twice:
                what = problem or f"two columns are called {twice[0]!r}"
                raise BadFile(
                    file, line, f"the header: {what}", "mend the first line: it names the columns"
                )
        elif problem or len(cells) != len(header):
            problem = problem or f"{len(cells)} columns where the header has {len(header)}"
            yield Raw(file, line, text, None, problem)
        else:
            yield table_row(file, line, dict(zip(header, cells, strict=True)))


class _TooLong(Exception):
    pass


def _records(stream: io.BufferedReader) -> Iterator[tuple[int, str, list[str], str | None]]:
    """First line, text, cells and problem of each record that is not blank."""
    csv.field_size_limit(max(csv.field_size_limit(), streams.ROW_BYTES))
    record: list[bytes] = []  # its lines
    count = size = 0  # lines read; bytes of the record

    def lines() -> Iterator[str]:
        nonlocal count, size
        for line, length in bounded_lines(stream):
            count, size = count + 1, size + length
            record.append(line)
            if size > streams.ROW_BYTES:
                raise _TooLong
            yield line.decode(errors="surrogateescape")

    rows = csv.reader(lines(), strict=True)
    while True:
        record.clear()
        start, size, problem, cells = count + 1, 0, None, list[str]()
        try:
            cells = next(rows)
        except StopIteration:
            return
        except _TooLong:
            long = long_row("", start, b"".join(record)[:SHOWN_BYTES], size)
            yield start, long.text, [], long.problem
            rows = csv.reader(lines(), strict=True)
            continue
        except csv.Error as error:
            problem = f"broken CSV: {error}"
        text, undecodable = decode(b"".join(record).removesuffix(b"\n").removesuffix(b"\r"), "row")
        if text.strip():
            yield start, text, cells, undecodable or ("NUL byte" if "\0" in text else problem)
