"""TODO."""

import csv
import io
from collections.abc import Iterator

from prism_select.data import streams
from prism_select.data.records import Raw
from prism_select.data.streams import SHOWN_BYTES, decoded, text_lines, too_long
from prism_select.data.table_rows import table_row
from prism_select.run.errors import BadFile

__all__ = ["csv_rows"]


def csv_rows(file: str, stream: io.BufferedReader) -> Iterator[Raw]:
    header: list[str] | None = None
    for line, text, cells, problem in _csv_cells(stream):
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


def _csv_cells(stream: io.BufferedReader) -> Iterator[tuple[int, str, list[str], str | None]]:
    """Each row that is not blank: the line where it starts, its text, its cells, what is wrong with
    it. After a row that is too long the next line begins one: a quote that is never closed must not
    swallow the file."""
    csv.field_size_limit(max(csv.field_size_limit(), streams.ROW_BYTES))
    seen: list[bytes] = []  # the lines of the row
    count = size = 0  # lines before the next one; bytes of the row

    def lines() -> Iterator[str]:
        nonlocal count, size
        for line, length in text_lines(stream):
            count, size = count + 1, size + length
            seen.append(line)
            if size > streams.ROW_BYTES:
                raise _TooLong
            yield line.decode(errors="surrogateescape")

    rows = csv.reader(lines(), strict=True)
    while True:
        seen.clear()
        start, size, problem, cells = count + 1, 0, None, list[str]()
        try:
            cells = next(rows)
        except StopIteration:
            return
        except _TooLong:
            long = too_long("", start, b"".join(seen)[:SHOWN_BYTES], size)
            yield start, long.text, [], long.problem
            rows = csv.reader(lines(), strict=True)
            continue
        except csv.Error as error:
            problem = f"broken CSV: {error}"
        text, undecodable = decoded(b"".join(seen).removesuffix(b"\n").removesuffix(b"\r"), "row")
        if text.strip():
            yield start, text, cells, undecodable or ("NUL byte" if "\0" in text else problem)
