"""TODO."""

import codecs
import io
import json
import re
from collections.abc import Iterator

from prism_select.data import streams
from prism_select.data.records import Raw
from prism_select.data.streams import CHUNK_BYTES, bounded, decoded, filled
from prism_select.run.errors import BadFile

__all__ = ["json_array", "json_lines", "json_row_of_line"]

_MARGIN = (
    16  # an error this near to the end of what was read may only mean that there is more to read
)


_SPACE = re.compile(r"[ \t\r\n]*")


_LINE_BREAK = re.compile(r"(,?)[ \t]*[\r\n][ \t\r\n]*")


# Python refuses to read integers of more than 4300 digits; such a number overflows like any other.
_DECODER = json.JSONDecoder(
    parse_int=lambda digits: int(digits) if len(digits) < 4000 else float(digits)
)


def json_lines(file: str, stream: io.BufferedReader) -> Iterator[Raw]:
    for number, line, long in filled(file, stream):
        yield long or json_row_of_line(file, number, line)


def json_row_of_line(file: str, line: int, data: bytes) -> Raw:
    text, problem = decoded(data, "line")
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
    found = {"[": "an array", '"': "a string", "t": "true", "f": "false", "n": "null"}.get(
        text.lstrip()[0], "a number"
    )
    return Raw(file, line, text, None, f"{found} where an object was expected")


def json_array(file: str, stream: io.BufferedReader) -> Iterator[Raw]:
    window = _Window(file, stream)
    window.take()
    mark = "," if window.peek() != "]" else window.take()
    while mark != "]":
        window.peek()
        line = window.line
        element, value = window.element()
        on_one_line = _LINE_BREAK.sub(lambda found: ", " if found[1] else "", element)
        text, problem = decoded(on_one_line.encode("utf-8", "surrogateescape"), "row")
        row = (
            Raw(file, line, text, None, problem) if problem else _json_row(file, line, text, value)
        )
        yield bounded(row)
        mark = window.take()
        if mark not in (",", "]"):
            raise window.broken(
                "Expecting ',' delimiter" if mark else "the array has no end", window.line
            )
    if window.peek():
        raise window.broken("more text after the end of the array", window.line)


class _Window:
    """The piece of a long JSON text that is being decoded; what lies before it is forgotten.

    Bytes that are not UTF-8 become lone surrogates on the way in, so that they spoil only their own
    row."""

    def __init__(self, file: str, stream: io.BufferedReader) -> None:
        self.line = 1
        self._file, self._stream = file, stream
        self._text, self._at, self._ended = "", 0, False
        self._decoder = codecs.getincrementaldecoder("utf-8")("surrogateescape")

    def broken(self, what: str, line: int) -> BadFile:
        return BadFile(
            self._file,
            line,
            f"broken JSON array: {what}",
            "mend it there, or write one object per line",
        )

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
                cut = (
                    error.msg.startswith("Unterminated string")
                    or len(self._text) - error.pos <= _MARGIN
                )
                if self._ended or not cut:
                    line = self.line + self._text.count("\n", self._at, error.pos)
                    raise self.broken(error.msg.removesuffix(" at"), line) from error
            except RecursionError as error:
                raise self.broken("nested too deeply", self.line) from error
            if len(self._text) - self._at > streams.ROW_BYTES + CHUNK_BYTES:
                raise self.broken(
                    f"an element has more than {streams.ROW_BYTES:,} bytes", self.line
                )
            self._refill()

    def _move(self, to: int) -> None:
        self.line += self._text.count("\n", self._at, to)
        self._at = to

    def _refill(self) -> None:
        """Read a chunk, or as much again as is kept: an element of any allowed length then costs
        linear time."""
        kept = self._text[self._at :]
        data = self._stream.read(max(CHUNK_BYTES, len(kept)))
        self._text, self._at, self._ended = kept + self._decoder.decode(data, not data), 0, not data
