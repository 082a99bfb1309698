"""Streams: a file as decompressed bytes, and its lines in bounded memory.

    open_stream(file) → numbered_lines → (number, line, None)    a line without its end
                                       → (number, b"", row)      a line of more than ROW_BYTES

Choices made here:
- a row of more than ROW_BYTES is bad and only its first SHOWN_BYTES are kept: neither an endless
  line nor an archive that unpacks to very much can fill the memory;
- text is UTF-8; a byte order mark is skipped, and UTF-16 is refused by name;
- a line ends at a line feed, and lines are counted after decompression.
"""

import codecs
import io
import os
from collections.abc import Iterator
from contextlib import contextmanager

import pyarrow as pa

from prism_select.data.records import Raw
from prism_select.data.remote import local
from prism_select.run.errors import BadFile

__all__ = [
    "CHUNK_BYTES",
    "DAMAGED_ADVICE",
    "ROW_BYTES",
    "SHOWN_BYTES",
    "bounded_lines",
    "bounded_row",
    "decode",
    "long_row",
    "numbered_lines",
    "open_stream",
    "reading",
]

ROW_BYTES = 1 << 24
CHUNK_BYTES = 1 << 16
SHOWN_BYTES = 1 << 10
DAMAGED_ADVICE = (
    "check its name and that you may read it; if both are right, it is cut short or damaged"
)


@contextmanager
def reading(
    file: str, failures: type[Exception] | tuple[type[Exception], ...], advice: str
) -> Iterator[None]:
    """Raises BadFile, with `advice`, for any of `failures` while the block runs."""
    try:
        yield
    except failures as error:
        what = " ".join(str(error).split())[:300] or type(error).__name__
        raise BadFile(file, None, f"cannot be read: {what}", advice) from error


@contextmanager
def open_stream(file: str) -> Iterator[io.BufferedReader]:
    """The decompressed bytes after a byte order mark. Raises BadFile, also while they are read."""
    packing = {"gz": "gzip", "zst": "zstd"}.get(file.lower().rpartition(".")[2])
    with reading(file, OSError, DAMAGED_ADVICE):
        if packing and os.path.getsize(local(file)) == 0:
            raise OSError("the archive is empty")
        with io.BufferedReader(
            pa.input_stream(local(file), compression=packing), CHUNK_BYTES
        ) as stream:
            head = stream.peek(3)[:3]
            if head[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE) or head[:2].count(0) == 1:
                advice = "convert it: iconv -f UTF-16 -t UTF-8"
                raise BadFile(file, None, "the text is UTF-16, not UTF-8", advice)
            stream.read(3 if head == codecs.BOM_UTF8 else 0)
            yield stream


def bounded_lines(stream: io.BufferedReader) -> Iterator[tuple[bytes, int]]:
    """Each line with its end, and its length in bytes. Of a line of more than ROW_BYTES only the
    beginning is given, and its length leaves out its end."""
    while line := stream.readline(ROW_BYTES + 2):
        size, end = len(line), line
        if size > ROW_BYTES:
            while not end.endswith(b"\n") and (end := stream.readline(CHUNK_BYTES)):
                size += len(end)
            size -= len(end[-2:]) - len(end[-2:].rstrip(b"\r\n"))
        yield line, size


def numbered_lines(file: str, stream: io.BufferedReader) -> Iterator[tuple[int, bytes, Raw | None]]:
    """Number and text of each line that is not blank; for a line that is too long, its bad row."""
    for number, (line, size) in enumerate(bounded_lines(stream), start=1):
        if size > ROW_BYTES:
            yield number, b"", long_row(file, number, line, size)
        elif line.strip():
            yield number, line.removesuffix(b"\n").removesuffix(b"\r"), None


def bounded_row(raw: Raw) -> Raw:
    """`raw` itself, or the bad row in its stead if its text is too long."""
    if len(raw.text) <= ROW_BYTES // 4:  # a character takes at most four bytes
        return raw
    size = len(raw.text.encode("utf-8", "replace"))
    if size <= ROW_BYTES:
        return raw
    beginning = raw.text[:SHOWN_BYTES].encode("utf-8", "replace")
    return long_row(raw.file, raw.line, beginning, size)


def long_row(file: str, line: int, beginning: bytes, size: int) -> Raw:
    """The bad row for a row of `size` bytes."""
    text = decode(beginning[:SHOWN_BYTES], "row")[0].replace("\n", " ") + " …"
    problem = f"{size:,} bytes in one row, and at most {ROW_BYTES:,} are read"
    return Raw(file, line, text, None, problem)


def decode(data: bytes, unit: str) -> tuple[str, str | None]:
    """The text, and the problem if it is not UTF-8; the text then shows a wrong byte as \\xNN."""
    try:
        return data.decode(), None
    except UnicodeDecodeError as error:
        text = data.decode(errors="backslashreplace")
        return text, f"invalid UTF-8 at byte {error.start + 1} of the {unit}"
