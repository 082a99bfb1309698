"""TODO."""

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
    "bounded",
    "decoded",
    "filled",
    "open_stream",
    "reading",
    "text_lines",
    "too_long",
]

ROW_BYTES = 1 << 24  # a longer row is bad
CHUNK_BYTES = 1 << 16
SHOWN_BYTES = 1 << 10  # of a row that is too long


DAMAGED_ADVICE = (
    "check its name and that you may read it; if both are right, it is cut short or damaged"
)


def bounded(raw: Raw) -> Raw:
    """The row of a table, or what is wrong with it where it is too long."""
    if len(raw.text) <= ROW_BYTES // 4:  # a character takes four bytes at most
        return raw
    size = len(raw.text.encode("utf-8", "replace"))
    return (
        raw
        if size <= ROW_BYTES
        else too_long(raw.file, raw.line, raw.text[:SHOWN_BYTES].encode("utf-8", "replace"), size)
    )


def too_long(file: str, line: int, beginning: bytes, size: int) -> Raw:
    text = decoded(beginning[:SHOWN_BYTES], "row")[0].replace("\n", " ") + " …"
    problem = f"{size:,} bytes in one row, and at most {ROW_BYTES:,} are read"
    return Raw(file, line, text, None, problem)


def text_lines(stream: io.BufferedReader) -> Iterator[tuple[bytes, int]]:
    """Each line, and how many bytes it has without its end where it is longer than ROW_BYTES: then
    only its beginning is held."""
    while line := stream.readline(ROW_BYTES + 2):
        size, end = len(line), line
        if size > ROW_BYTES:
            while not end.endswith(b"\n") and (end := stream.readline(CHUNK_BYTES)):
                size += len(end)
            size -= len(end[-2:]) - len(end[-2:].rstrip(b"\r\n"))
        yield line, size


@contextmanager
def reading(
    file: str, failures: type[Exception] | tuple[type[Exception], ...], advice: str
) -> Iterator[None]:
    """Turns every failure to read a file, at any time, into a BadFile."""
    try:
        yield
    except failures as error:
        what = " ".join(str(error).split())[:300] or type(error).__name__
        raise BadFile(file, None, f"cannot be read: {what}", advice) from error


@contextmanager
def open_stream(file: str) -> Iterator[io.BufferedReader]:
    """The decompressed bytes after a byte order mark."""
    packing = {"gz": "gzip", "zst": "zstd"}.get(file.lower().rpartition(".")[2])
    with reading(file, OSError, DAMAGED_ADVICE):
        if packing and os.path.getsize(local(file)) == 0:
            raise OSError("the archive is empty")
        with io.BufferedReader(
            pa.input_stream(local(file), compression=packing), CHUNK_BYTES
        ) as stream:
            head = stream.peek(3)[:3]
            if head[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE) or head[:2].count(0) == 1:
                raise BadFile(
                    file,
                    None,
                    "the text is UTF-16, not UTF-8",
                    "convert it: iconv -f UTF-16 -t UTF-8",
                )
            stream.read(3 if head == codecs.BOM_UTF8 else 0)
            yield stream


def decoded(data: bytes, unit: str) -> tuple[str, str | None]:
    """The text and, where it is not UTF-8, the problem; then the text shows the wrong bytes as
    \\xNN."""
    try:
        return data.decode(), None
    except UnicodeDecodeError as error:
        return data.decode(
            errors="backslashreplace"
        ), f"invalid UTF-8 at byte {error.start + 1} of the {unit}"


def filled(file: str, stream: io.BufferedReader) -> Iterator[tuple[int, bytes, Raw | None]]:
    """Lines that are not blank, by number, without their ends; one that is too long comes as what
    is wrong with it."""
    for number, (line, size) in enumerate(text_lines(stream), start=1):
        if size > ROW_BYTES:
            yield number, b"", too_long(file, number, line, size)
        elif line.strip():
            yield number, line.removesuffix(b"\n").removesuffix(b"\r"), None
