"""JSON rows: one object per line, or the elements of one array.

    {"text": "a"}        [{"text": "a"},
    {"text": "b"}         {"text": "b"}]

Choices made here:
- a broken line costs that line; a broken array costs the rest of the file, since nothing shows
  where its next row starts;
- an array is decoded through a window of one element, so memory does not grow with the file;
- the window is our own: ijson gives neither the line nor the text of an element;
- an element over several lines becomes one line, so that it can be copied to a .jsonl file;
- an integer of any length is a number.
"""

import codecs
import io
import json
import re
from collections.abc import Iterator

from prism_select.data import streams
from prism_select.data.records import Raw
from prism_select.data.streams import CHUNK_BYTES, bounded_row, decode, numbered_lines
from prism_select.run.errors import BadFile

__all__ = ["json_array", "json_lines", "json_row_of_line"]

_MARGIN = 16  # bytes: an error this close to the end of the window may only mean that it is cut
_SPACE = re.compile(r"[ \t\r\n]*")
_LINE_BREAK = re.compile(r"(,?)[ \t]*[\r\n][ \t\r\n]*")
# Python refuses to read integers of more than 4300 digits; such a number overflows like any other.
_DECODER = json.JSONDecoder(
    parse_int=lambda digits: int(digits) if len(digits) < 4000 else float(digits)
)


def json_lines(file: str, stream: io.BufferedReader) -> Iterator[Raw]:
    for number, line, long in numbered_lines(file, stream):
        yield long or json_row_of_line(file, number, line)


def json_row_of_line(file: str, line: int, data: bytes) -> Raw:
    text, problem = decode(data, "line")
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
    kinds = {"[": "an array", '"': "a string", "t": "true", "f": "false", "n": "null"}
    kind = kinds.get(text.lstrip()[0], "a number")
    return Raw(file, line, text, None, f"{kind} where an object was expected")


def json_array(file: str, stream: io.BufferedReader) -> Iterator[Raw]:
    """The elements of the array, each with the line where it starts. Raises BadFile, after the
    elements before it, where the array is broken."""
    window = _Window(file, stream)
    window.take()
    mark = "," if window.peek() != "]" else window.take()
    while mark != "]":
        window.peek()
        line = window.line
        element, value = window.element()
        one_line = _LINE_BREAK.sub(lambda match: ", " if match[1] else "", element)
        text, problem = decode(one_line.encode("utf-8", "surrogateescape"), "row")
        row = (
            Raw(file, line, text, None, problem) if problem else _json_row(file, line, text, value)
        )
        yield bounded_row(row)
        mark = window.take()
        if mark not in (",", "]"):
            raise window.broken(
                "Expecting ',' delimiter" if mark else "the array has no end", window.line
            )
    if window.peek():
        raise window.broken("more text after the end of the array", window.line)


class _Window:
    """The piece of a long JSON text that is being decoded; the text before it is forgotten.

    A byte that is not UTF-8 becomes a lone surrogate, so that it spoils only its own row."""

    def __init__(self, file: str, stream: io.BufferedReader) -> None:
        self.line = 1
        self._file, self._stream = file, stream
        self._text, self._position, self._ended = "", 0, False
        self._decoder = codecs.getincrementaldecoder("utf-8")("surrogateescape")

    def broken(self, what: str, line: int) -> BadFile:
        advice = "mend it there, or write one object per line"
        return BadFile(self._file, line, f"broken JSON array: {what}", advice)

    def peek(self) -> str:
        """The next character that is not a space, or '' at the end; the window then starts at
        it."""
        while True:
            space = _SPACE.match(self._text, self._position)
            self._move(space.end() if space else self._position)
            if self._position < len(self._text) or self._ended:
                return self._text[self._position : self._position + 1]
            self._refill()

    def take(self) -> str:
        """The character of `peek`; the window then starts after it."""
        mark = self.peek()
        self._move(self._position + len(mark))
        return mark

    def element(self) -> tuple[str, object]:
        """Text and value of the JSON value at the start of the window."""
        while True:
            try:
                value, end = _DECODER.raw_decode(self._text, self._position)
                if self._ended or len(self._text) - end > _MARGIN:  # else a number may go on
                    text = self._text[self._position : end]
                    self._move(end)
                    return text, value
            except json.JSONDecodeError as error:
                cut = (
                    error.msg.startswith("Unterminated string")
                    or len(self._text) - error.pos <= _MARGIN
                )
                if self._ended or not cut:
                    line = self.line + self._text.count("\n", self._position, error.pos)
                    raise self.broken(error.msg.removesuffix(" at"), line) from error
            except RecursionError as error:
                raise self.broken("nested too deeply", self.line) from error
            if len(self._text) - self._position > streams.ROW_BYTES + CHUNK_BYTES:
                raise self.broken(
                    f"an element has more than {streams.ROW_BYTES:,} bytes", self.line
                )
            self._refill()

    def _move(self, to: int) -> None:
        self.line += self._text.count("\n", self._position, to)
        self._position = to

    def _refill(self) -> None:
        """Read a chunk, or as much as the window holds: an element of any allowed length then costs
        linear time."""
        tail = self._text[self._position :]
        data = self._stream.read(max(CHUNK_BYTES, len(tail)))
        self._text, self._position, self._ended = (
            tail + self._decoder.decode(data, not data),
            0,
            not data,
        )
