"""Readers: files to rows as they came, one at a time.

    find_files   patterns → files   folders, globs, addresses and hub names; each file once
    readable     a file → itself    or what is wrong with it
    read_rows    a file → its rows  with file and line; a row that cannot be read says why
    read_texts   the same rows      as they came, for copying
    rows_at      some of its rows   without parsing the others where the format allows that

Choices made here: one row (of a table, one small batch) is held at a time, whatever the size of the
file, and of a row that is longer than the limit only its beginning, so that neither a long line nor
an archive that unpacks to very much can fill the memory. A broken line costs that line; a broken
JSON array or archive costs the rest of the file, since nothing tells where its next row starts.
Lines end at a line feed and are counted after decompression; the rows of a table (parquet, hub) are
numbered. Numbers in CSV stay text."""

import glob
import os
import re
from collections.abc import Collection, Iterator, Sequence

from prism_select.data.csv_rows import csv_rows
from prism_select.data.json_rows import json_array, json_lines, json_row_of_line
from prism_select.data.records import Raw, is_text
from prism_select.data.remote import addresses, is_remote, local
from prism_select.data.streams import CHUNK_BYTES, bounded, filled, open_stream
from prism_select.data.table_rows import hub_rows, parquet_rows, parquet_rows_at
from prism_select.run.errors import BadFile

__all__ = ["find_files", "read_rows", "read_texts", "readable", "rows_at"]

_SUPPORTED = re.compile(r"\.(?:(jsonl|json|csv)(?:\.(gz|zst))?|(parquet))$", re.IGNORECASE)


_ADVICE = (
    "supported are .jsonl, .json and .csv (also with .gz or .zst), .parquet and hub:NAME[:split]"
)


def find_files(patterns: Sequence[str]) -> list[str]:
    """Every file that the patterns reach, once, in the order of the patterns and sorted within
    each.

    A folder gives all its supported files, at any depth, but no hidden ones. Raises BadFile for a
    pattern that reaches nothing, an unsupported ending named directly and a file that cannot be
    read."""
    found: dict[str, str] = {}
    for pattern in patterns:
        for file in [pattern] if pattern.startswith("hub:") else _matches(pattern):
            found.setdefault(os.path.realpath(file), file)
    return list(found.values())


def _matches(pattern: str) -> list[str]:
    if is_remote(pattern):
        if usable := sorted(file for file in addresses(pattern) if _SUPPORTED.search(file)):
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
    usable = sorted(file for file in files if _SUPPORTED.search(file) and os.path.isfile(file))
    if not usable:
        raise BadFile(pattern, None, "no file here has an ending that can be read", _ADVICE)
    return [readable(file) for file in usable]


def readable(file: str) -> str:
    """`file` itself. Raises BadFile where it is no file that can be read."""
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
    """The rows of one file of `find_files`, blank lines left out; a row of more than ROW_BYTES
    cannot be read.

    Raises BadFile, after the rows that could be read, where the rest of the file cannot be.
    """
    kind = _kind(file)
    if tables := {"hub": hub_rows, "parquet": parquet_rows}.get(kind):
        yield from (bounded(raw) for raw in tables(file))
        return
    rows = {"lines": json_lines, "csv": csv_rows, "array": json_array}[kind]
    with open_stream(file) as stream:
        yield from rows(file, stream)


def rows_at(file: str, places: Collection[int]) -> Iterator[tuple[int, Raw]]:
    """The rows at these places among those of `read_rows`, counted from 0, each with its place, in
    order.

    Raises BadFile as `read_rows` does.
    """
    wanted, last, kind = set(places), max(places, default=-1), _kind(file)
    if kind == "parquet":
        yield from ((place, bounded(raw)) for place, raw in parquet_rows_at(file, sorted(wanted)))
    elif kind == "lines":
        with open_stream(file) as stream:
            for place, (number, line, long) in zip(
                range(last + 1), filled(file, stream), strict=False
            ):
                if place in wanted:
                    yield place, long or json_row_of_line(file, number, line)
    else:
        for place, raw in zip(range(last + 1), read_rows(file), strict=False):
            if place in wanted:
                yield place, raw


def _kind(file: str) -> str:
    """hub, lines, array, csv or parquet."""
    if file.startswith("hub:"):
        return "hub"
    ending = _SUPPORTED.search(file)
    if ending is None:
        raise BadFile(file, None, "its ending is not supported", _ADVICE)
    kind = (ending[1] or ending[3]).lower()
    if kind != "json":
        return "lines" if kind == "jsonl" else kind
    with open_stream(file) as stream:
        while (head := stream.read(CHUNK_BYTES)).isspace():
            pass
    first = head.lstrip()[:1]
    if first not in (b"[", b"{", b""):
        raise BadFile(
            file, None, "neither a JSON array nor JSON lines", "a .json file starts with [ or {"
        )
    return "array" if first == b"[" else "lines"


def read_texts(file: str) -> Iterator[tuple[int, bytes]]:
    """Line and text of each row of `read_rows`; what JSON lines mean, which is most of the work, is
    not asked."""
    if _kind(file) != "lines":
        yield from (
            (raw.line, raw.text.encode("utf-8", "surrogatepass")) for raw in read_rows(file)
        )
        return
    with open_stream(file) as stream:
        for number, line, long in filled(file, stream):
            yield number, long.text.encode() if long else line
