"""Files: what a user names → files → rows as they came, one at a time.

    find_files   patterns → files   folders, globs, addresses and hub names; each file once
    read_rows    a file → its rows  with file and line; a bad row has the reason
    read_texts   a file → texts     the same rows as bytes, for copying
    rows_at      a file → some rows the others are not parsed where the format allows that

Choices made here:
- one row is held at a time (of a table, one small batch), whatever the size of the file;
- the ending decides how a file is read; a .json file by its first character;
- rows of files have their line; rows of a table (parquet, hub) have their number, rows of an
  object in memory their index from 0.
"""

import glob
import os
import re
from collections.abc import Collection, Iterator, Sequence

from prism_select.data.csv_rows import csv_rows
from prism_select.data.json_rows import json_array, json_lines, json_row_of_line
from prism_select.data.object_rows import object_rows, object_rows_at
from prism_select.data.records import Raw, is_text
from prism_select.data.remote import addresses, is_remote, local
from prism_select.data.streams import CHUNK_BYTES, bounded_row, numbered_lines, open_stream
from prism_select.data.table_rows import hub_rows, parquet_rows, parquet_rows_at
from prism_select.run.errors import BadFile
from prism_select.run.objects import is_object

__all__ = ["SUPPORTED_ENDING", "find_files", "read_rows", "read_texts", "readable", "rows_at"]

SUPPORTED_ENDING = re.compile(r"\.(?:(jsonl|json|csv)(?:\.(?:gz|zst))?|(parquet))$", re.IGNORECASE)
_ADVICE = (
    "supported are .jsonl, .json and .csv (also with .gz or .zst), .parquet and hub:NAME[:split]"
)


_TABLES = {"hub": hub_rows, "parquet": parquet_rows, "object": object_rows}


def find_files(patterns: Sequence[str]) -> list[str]:
    """The files of all patterns, each once, in the order of the patterns and sorted within one.

    A folder gives its supported files at any depth, but no hidden ones. Raises BadFile for a
    pattern that reaches nothing, an ending that is not supported and a file that cannot be read."""
    files: dict[str, str] = {}
    for pattern in patterns:
        named = pattern.startswith("hub:") or is_object(pattern)
        for file in [pattern] if named else _matches(pattern):
            files.setdefault(os.path.realpath(file), file)
    return list(files.values())


def _matches(pattern: str) -> list[str]:
    if is_remote(pattern):
        if usable := sorted(file for file in addresses(pattern) if SUPPORTED_ENDING.search(file)):
            return usable
        raise BadFile(
            pattern, None, "no file there, or none with an ending that can be read", _ADVICE
        )
    paths = [pattern] if os.path.exists(pattern) else glob.glob(pattern, recursive=True)
    if not paths:
        raise BadFile(
            pattern, None, "no such file or folder, and no file matches", "check the path"
        )
    files: set[str] = set()
    for path in paths:
        inside = os.path.join(glob.escape(path), "**", "*")
        files.update(glob.glob(inside, recursive=True) if os.path.isdir(path) else [path])
    usable = sorted(
        file for file in files if SUPPORTED_ENDING.search(file) and os.path.isfile(file)
    )
    if not usable:
        raise BadFile(pattern, None, "no file here has an ending that can be read", _ADVICE)
    return [readable(file) for file in usable]


def readable(file: str) -> str:
    """`file` itself. Raises BadFile if it cannot be read."""
    if is_object(file):
        return file
    if is_remote(file):
        local(file)
        return file
    if not os.path.isfile(file):
        raise BadFile(file, None, "no such file", "check the path")
    if not os.access(file, os.R_OK):
        raise BadFile(file, None, "permission denied", "make the file readable, or leave it out")
    if not is_text(file):
        raise BadFile(file, None, "its name is not UTF-8", "rename it")
    return file


def read_rows(file: str) -> Iterator[Raw]:
    """The rows of one file of `find_files`, without blank lines. Raises BadFile, after the rows
    before it, where the file cannot be read any further."""
    kind = _kind(file)
    if tables := _TABLES.get(kind):
        yield from (bounded_row(raw) for raw in tables(file))
        return
    rows = {"lines": json_lines, "csv": csv_rows, "array": json_array}[kind]
    with open_stream(file) as stream:
        yield from rows(file, stream)


def rows_at(file: str, positions: Collection[int]) -> Iterator[tuple[int, Raw]]:
    """The rows of `read_rows` at these positions, counted from 0, each with its position, in order.
    Raises BadFile as `read_rows` does."""
    selected, count, kind = set(positions), max(positions, default=-1) + 1, _kind(file)
    if read := {"parquet": parquet_rows_at, "object": object_rows_at}.get(kind):
        for position, raw in read(file, sorted(selected)):
            yield position, bounded_row(raw)
    elif kind == "lines":
        with open_stream(file) as stream:
            lines = zip(range(count), numbered_lines(file, stream), strict=False)
            for position, (number, line, long) in lines:
                if position in selected:
                    yield position, long or json_row_of_line(file, number, line)
    else:
        for position, raw in zip(range(count), read_rows(file), strict=False):
            if position in selected:
                yield position, raw


def _kind(file: str) -> str:
    """hub, object, lines, array, csv or parquet."""
    if is_object(file):
        return "object"
    if file.startswith("hub:"):
        return "hub"
    ending = SUPPORTED_ENDING.search(file)
    if ending is None:
        raise BadFile(file, None, "its ending is not supported", _ADVICE)
    kind = (ending[1] or ending[2]).lower()
    if kind != "json":
        return "lines" if kind == "jsonl" else kind
    with open_stream(file) as stream:
        while (head := stream.read(CHUNK_BYTES)).isspace():
            pass
    first = head.lstrip()[:1]
    if first not in (b"[", b"{", b""):
        advice = "a .json file starts with [ or {"
        raise BadFile(file, None, "neither a JSON array nor JSON lines", advice)
    return "array" if first == b"[" else "lines"


def read_texts(file: str) -> Iterator[tuple[int, bytes]]:
    """Line and text of each row of `read_rows`. JSON lines are not parsed, which saves most of the
    time."""
    if _kind(file) != "lines":
        for raw in read_rows(file):
            yield raw.line, raw.text.encode("utf-8", "surrogatepass")
        return
    with open_stream(file) as stream:
        for number, line, long in numbered_lines(file, stream):
            yield number, long.text.encode() if long else line
