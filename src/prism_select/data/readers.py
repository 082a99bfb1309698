"""Readers: files to rows as they came, one at a time.

    find_files   patterns → files   folders, globs, addresses and hub names; each file once
    readable     a file → itself    or what is wrong with it
    read_rows    a file → its rows  with file and line; a row that cannot be read says why
    read_texts   the same rows      as they came, for copying
    rows_at      some of its rows   without parsing the others where the format allows that

Choices made here: one row (of a table, one small batch) is held at a time, whatever the size of the file, and of a row
that is longer than the limit only its beginning, so that neither a long line nor an archive that unpacks to very much
can fill the memory. A broken line costs that line; a broken JSON array or archive costs the rest of the file, since
nothing tells where its next row starts. Lines end at a line feed and are counted after decompression; the rows of a
table (parquet, hub) are numbered. Numbers in CSV stay text.
"""

import codecs
import csv
import glob
import io
import json
import os
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager

import pyarrow as pa  # type: ignore[import-untyped, unused-ignore]
import pyarrow.parquet as pq  # type: ignore[import-untyped, unused-ignore]

from prism_select.config import ROW_BYTES
from prism_select.data.records import Raw, is_text
from prism_select.data.remote import addresses, is_remote, local
from prism_select.errors import BadFile, BadOption

__all__ = ["find_files", "read_rows", "read_texts", "readable", "rows_at"]

_CHUNK = 1 << 16
_SHOWN = 1 << 10  # bytes of a row that is too long
_MARGIN = 16  # an error this near to the end of what was read may only mean that there is more to read
_SUPPORTED = re.compile(r"\.(?:(jsonl|json|csv)(?:\.(gz|zst))?|(parquet))$", re.IGNORECASE)
_ADVICE = "supported are .jsonl, .json and .csv (also with .gz or .zst), .parquet and hub:NAME[:split]"
_DAMAGED = "check its name and that you may read it; if both are right, it is cut short or damaged"
_SPACE = re.compile(r"[ \t\r\n]*")
_LINE_BREAK = re.compile(r"(,?)[ \t]*[\r\n][ \t\r\n]*")
# Python refuses to read integers of more than 4300 digits; such a number overflows like any other.
_DECODER = json.JSONDecoder(parse_int=lambda digits: int(digits) if len(digits) < 4000 else float(digits))


def find_files(patterns: Sequence[str]) -> list[str]:
    """Every file that the patterns reach, once, in the order of the patterns and sorted within each.

    A folder gives all its supported files, at any depth, but no hidden ones. Raises BadFile for a
    pattern that reaches nothing, an unsupported ending named directly and a file that cannot be read.
    """
    found: dict[str, str] = {}
    for pattern in patterns:
        for file in [pattern] if pattern.startswith("hub:") else _matches(pattern):
            found.setdefault(os.path.realpath(file), file)
    return list(found.values())


def _matches(pattern: str) -> list[str]:
    if is_remote(pattern):
        if usable := sorted(file for file in addresses(pattern) if _SUPPORTED.search(file)):
            return usable
        raise BadFile(pattern, None, "no file there, or none with an ending that can be read", _ADVICE)
    paths = [pattern] if os.path.exists(pattern) else glob.glob(pattern, recursive=True)
    if not paths:
        raise BadFile(pattern, None, "no such file or folder, and no file matches", "check the path")
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


def read_rows(file: str, limit: int = ROW_BYTES) -> Iterator[Raw]:
    """The rows of one file of `find_files`, blank lines left out; a row of more than `limit` bytes cannot be read.

    Raises BadFile, after the rows that could be read, where the rest of the file cannot be.
    """
    kind = _kind(file)
    if tables := {"hub": _hub_rows, "parquet": _parquet_rows}.get(kind):
        yield from (_bounded(raw, limit) for raw in tables(file))
        return
    rows = {"lines": _json_lines, "csv": _csv_rows, "array": _json_array}[kind]
    with _opened(file) as stream:
        yield from rows(file, stream, limit)


def rows_at(file: str, places: Collection[int], limit: int = ROW_BYTES) -> Iterator[tuple[int, Raw]]:
    """The rows at these places among those of `read_rows`, counted from 0, each with its place, in order.

    Raises BadFile as `read_rows` does.
    """
    wanted, last, kind = set(places), max(places, default=-1), _kind(file)
    if kind == "parquet":
        yield from ((place, _bounded(raw, limit)) for place, raw in _parquet_rows_at(file, sorted(wanted)))
    elif kind == "lines":
        with _opened(file) as stream:
            for place, (number, line, long) in zip(range(last + 1), _filled(file, stream, limit), strict=False):
                if place in wanted:
                    yield place, long or _json_line(file, number, line)
    else:
        for place, raw in zip(range(last + 1), read_rows(file, limit), strict=False):
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
    with _opened(file) as stream:
        while (head := stream.read(_CHUNK)).isspace():
            pass
    first = head.lstrip()[:1]
    if first not in (b"[", b"{", b""):
        raise BadFile(file, None, "neither a JSON array nor JSON lines", "a .json file starts with [ or {")
    return "array" if first == b"[" else "lines"


def read_texts(file: str, limit: int = ROW_BYTES) -> Iterator[tuple[int, bytes]]:
    """Line and text of each row of `read_rows`; what JSON lines mean, which is most of the work, is not asked."""
    if _kind(file) != "lines":
        yield from ((raw.line, raw.text.encode("utf-8", "surrogatepass")) for raw in read_rows(file, limit))
        return
    with _opened(file) as stream:
        for number, line, long in _filled(file, stream, limit):
            yield number, long.text.encode() if long else line


def _bounded(raw: Raw, limit: int) -> Raw:
    """The row of a table, or what is wrong with it where it is too long."""
    if len(raw.text) <= limit // 4:  # a character takes four bytes at most
        return raw
    size = len(raw.text.encode("utf-8", "replace"))
    return (
        raw
        if size <= limit
        else _too_long(raw.file, raw.line, raw.text[:_SHOWN].encode("utf-8", "replace"), size, limit)
    )


def _too_long(file: str, line: int, beginning: bytes, size: int, limit: int) -> Raw:
    text = _decoded(beginning[:_SHOWN], "row")[0].replace("\n", " ") + " …"
    return Raw(file, line, text, None, f"{size:,} bytes in one row, and --max-row-bytes allows {limit:,}")


def _lines(stream: io.BufferedReader, limit: int) -> Iterator[tuple[bytes, int]]:
    """Each line, and how many bytes it has without its end where it is longer than `limit`: then only its beginning is
    held."""
    while line := stream.readline(limit + 2):
        size, end = len(line), line
        if size > limit:
            while not end.endswith(b"\n") and (end := stream.readline(_CHUNK)):
                size += len(end)
            size -= len(end[-2:]) - len(end[-2:].rstrip(b"\r\n"))
        yield line, size


@contextmanager
def _reading(file: str, failures: type[Exception] | tuple[type[Exception], ...], advice: str) -> Iterator[None]:
    """Turns every failure to read a file, at any time, into a BadFile."""
    try:
        yield
    except failures as error:
        what = " ".join(str(error).split())[:300] or type(error).__name__
        raise BadFile(file, None, f"cannot be read: {what}", advice) from error


@contextmanager
def _opened(file: str) -> Iterator[io.BufferedReader]:
    """The decompressed bytes after a byte order mark."""
    packing = {"gz": "gzip", "zst": "zstd"}.get(file.lower().rpartition(".")[2])
    with _reading(file, OSError, _DAMAGED):
        if packing and os.path.getsize(local(file)) == 0:
            raise OSError("the archive is empty")
        with io.BufferedReader(pa.input_stream(local(file), compression=packing), _CHUNK) as stream:
            head = stream.peek(3)[:3]
            if head[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE) or head[:2].count(0) == 1:
                raise BadFile(file, None, "the text is UTF-16, not UTF-8", "convert it: iconv -f UTF-16 -t UTF-8")
            stream.read(3 if head == codecs.BOM_UTF8 else 0)
            yield stream


def _decoded(data: bytes, unit: str) -> tuple[str, str | None]:
    """The text and, where it is not UTF-8, the problem; then the text shows the wrong bytes as \\xNN."""
    try:
        return data.decode(), None
    except UnicodeDecodeError as error:
        return data.decode(errors="backslashreplace"), f"invalid UTF-8 at byte {error.start + 1} of the {unit}"


def _filled(file: str, stream: io.BufferedReader, limit: int) -> Iterator[tuple[int, bytes, Raw | None]]:
    """Lines that are not blank, by number, without their ends; one that is too long comes as what is wrong with it."""
    for number, (line, size) in enumerate(_lines(stream, limit), start=1):
        if size > limit:
            yield number, b"", _too_long(file, number, line, size, limit)
        elif line.strip():
            yield number, line.removesuffix(b"\n").removesuffix(b"\r"), None


def _json_lines(file: str, stream: io.BufferedReader, limit: int) -> Iterator[Raw]:
    for number, line, long in _filled(file, stream, limit):
        yield long or _json_line(file, number, line)


def _json_line(file: str, line: int, data: bytes) -> Raw:
    text, problem = _decoded(data, "line")
    if problem is None:
        try:
            return _json_row(file, line, text, _DECODER.decode(text))
        except json.JSONDecodeError as error:
            problem = f"broken JSON: {error.msg.removesuffix(' at')} at column {error.colno}"
        except RecursionError:
            problem = "broken JSON: nested too deeply"
    return Raw(file, line, text, None, problem)


def _json_row(file: str, line: int, text: str, value: object) -> Raw:
    if isinstance(value, dict):
        return Raw(file, line, text, value)
    found = {"[": "an array", '"': "a string", "t": "true", "f": "false", "n": "null"}.get(text.lstrip()[0], "a number")
    return Raw(file, line, text, None, f"{found} where an object was expected")


def _json_array(file: str, stream: io.BufferedReader, limit: int) -> Iterator[Raw]:
    window = _Window(file, stream, limit)
    window.take()
    mark = "," if window.peek() != "]" else window.take()
    while mark != "]":
        window.peek()
        line = window.line
        element, value = window.element()
        on_one_line = _LINE_BREAK.sub(lambda found: ", " if found[1] else "", element)
        text, problem = _decoded(on_one_line.encode("utf-8", "surrogateescape"), "row")
        row = Raw(file, line, text, None, problem) if problem else _json_row(file, line, text, value)
        yield _bounded(row, limit)
        mark = window.take()
        if mark not in (",", "]"):
            raise window.broken("Expecting ',' delimiter" if mark else "the array has no end", window.line)
    if window.peek():
        raise window.broken("more text after the end of the array", window.line)


class _Window:
    """The piece of a long JSON text that is being decoded; what lies before it is forgotten.

    Bytes that are not UTF-8 become lone surrogates on the way in, so that they spoil only their own row.
    """

    def __init__(self, file: str, stream: io.BufferedReader, limit: int) -> None:
        self.line = 1
        self._file, self._stream, self._limit = file, stream, limit
        self._text, self._at, self._ended = "", 0, False
        self._decoder = codecs.getincrementaldecoder("utf-8")("surrogateescape")

    def broken(self, what: str, line: int) -> BadFile:
        return BadFile(self._file, line, f"broken JSON array: {what}", "mend it there, or write one object per line")

    def peek(self) -> str:
        """The next character that is not a space, '' at the end; the window then starts at it."""
        while True:
            space = _SPACE.match(self._text, self._at)
            self._move(space.end() if space else self._at)
            if self._at < len(self._text) or self._ended:
                return self._text[self._at : self._at + 1]
            self._refill()

    def take(self) -> str:
        mark = self.peek()
        self._move(self._at + len(mark))
        return mark

    def element(self) -> tuple[str, object]:
        """The JSON value at the start of the window: its text and what it means."""
        while True:
            try:
                value, end = _DECODER.raw_decode(self._text, self._at)
                if self._ended or len(self._text) - end > _MARGIN:  # else a number may go on
                    text = self._text[self._at : end]
                    self._move(end)
                    return text, value
            except json.JSONDecodeError as error:
                cut = error.msg.startswith("Unterminated string") or len(self._text) - error.pos <= _MARGIN
                if self._ended or not cut:
                    line = self.line + self._text.count("\n", self._at, error.pos)
                    raise self.broken(error.msg.removesuffix(" at"), line) from error
            except RecursionError as error:
                raise self.broken("nested too deeply", self.line) from error
            if len(self._text) - self._at > self._limit + _CHUNK:
                raise self.broken(f"an element is longer than --max-row-bytes allows ({self._limit:,})", self.line)
            self._refill()

    def _move(self, to: int) -> None:
        self.line += self._text.count("\n", self._at, to)
        self._at = to

    def _refill(self) -> None:
        """Read a chunk, or as much again as is kept: an element of any allowed length then costs linear time."""
        kept = self._text[self._at :]
        data = self._stream.read(max(_CHUNK, len(kept)))
        self._text, self._at, self._ended = kept + self._decoder.decode(data, not data), 0, not data


def _csv_rows(file: str, stream: io.BufferedReader, limit: int) -> Iterator[Raw]:
    header: list[str] | None = None
    for line, text, cells, problem in _csv_cells(stream, limit):
        if header is None:
            header = [name.strip() for name in cells]
            twice = [name for name in header if name and header.count(name) > 1]
            if problem or twice:
                what = problem or f"two columns are called {twice[0]!r}"
                raise BadFile(file, line, f"the header: {what}", "mend the first line: it names the columns")
        elif problem or len(cells) != len(header):
            problem = problem or f"{len(cells)} columns where the header has {len(header)}"
            yield Raw(file, line, text, None, problem)
        else:
            yield _table_row(file, line, dict(zip(header, cells, strict=True)))


class _TooLong(Exception):
    pass


def _csv_cells(stream: io.BufferedReader, limit: int) -> Iterator[tuple[int, str, list[str], str | None]]:
    """Each row that is not blank: the line where it starts, its text, its cells, what is wrong with it. After a row
    that is too long the next line begins one: a quote that is never closed must not swallow the file."""
    csv.field_size_limit(max(csv.field_size_limit(), limit))
    seen: list[bytes] = []  # the lines of the row
    count = size = 0  # lines before the next one; bytes of the row

    def lines() -> Iterator[str]:
        nonlocal count, size
        for line, length in _lines(stream, limit):
            count, size = count + 1, size + length
            seen.append(line)
            if size > limit:
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
            long = _too_long("", start, b"".join(seen)[:_SHOWN], size, limit)
            yield start, long.text, [], long.problem
            rows = csv.reader(lines(), strict=True)
            continue
        except csv.Error as error:
            problem = f"broken CSV: {error}"
        text, undecodable = _decoded(b"".join(seen).removesuffix(b"\n").removesuffix(b"\r"), "row")
        if text.strip():
            yield start, text, cells, undecodable or ("NUL byte" if "\0" in text else problem)


@contextmanager
def _parquet(file: str) -> Iterator[pq.ParquetFile]:
    with (
        _reading(file, (OSError, pa.ArrowException, UnicodeDecodeError), _DAMAGED),
        pq.ParquetFile(local(file), buffer_size=_CHUNK, pre_buffer=False) as table,  # which would hold the whole file
    ):
        yield table


def _parquet_rows(file: str) -> Iterator[Raw]:
    number = 0
    with _parquet(file) as table:
        for batch in table.iter_batches(batch_size=256):
            for cells in zip(*batch.columns, strict=True):
                number += 1
                yield _parquet_row(file, number, dict(zip(batch.schema.names, cells, strict=True)))


def _parquet_rows_at(file: str, places: Sequence[int]) -> Iterator[tuple[int, Raw]]:
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
                    yield place, _parquet_row(file, place + 1, cells)
                start += len(batch)


def _parquet_row(file: str, number: int, cells: Mapping[str, pa.Scalar]) -> Raw:
    fields: dict[str, object] = {}
    problem = None
    for name, cell in cells.items():
        try:
            fields[name] = cell.as_py()
        except (ValueError, OverflowError) as error:  # text that is not UTF-8, a date out of range
            fields[name], problem = None, f"column {name!r}: {error}"
    return _table_row(file, number, fields, problem)


def _hub_rows(file: str) -> Iterator[Raw]:
    name, _, split = file.removeprefix("hub:").partition(":")
    if not name:
        raise BadOption(f"{file} names no data set; write hub:NAME or hub:NAME:SPLIT")
    try:
        import datasets  # type: ignore[import-untyped, unused-ignore]
    except ImportError as error:
        raise BadOption(f"{file}: needs the package datasets; pip install 'prism-select[hub]'") from error
    with _reading(file, Exception, "check the name, the split (hub:NAME:SPLIT) and the network"):
        for number, fields in enumerate(datasets.load_dataset(name, split=split or "train", streaming=True), start=1):
            yield _table_row(file, number, fields)


def _table_row(file: str, line: int, fields: Mapping[str, object], problem: str | None = None) -> Raw:
    text = json.dumps(fields, ensure_ascii=False, default=str)
    return Raw(file, line, text, None if problem else fields, problem)
