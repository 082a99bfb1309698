"""Inputs: a pool, streamed as often as needed and never held, and a target, which is small.

    survey   one pass before anything expensive: formats, counts, bad rows, a sample, a fingerprint
    rows     every row in order: what it means, or why it means nothing

Choices made here: a file has one format, that of its first row which has any; an id that a row carries itself may
occur once in the pool, and the row that repeats it is bad; a bad target row always stops, since a pair lost in
silence is a direction changed in silence. A pool that changes while it is read is noticed by the size and time of its
files, which cost nothing to ask, and by their contents in the end.
"""

import hashlib
import os
import random
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass
from itertools import count

import numpy as np
from numpy.typing import NDArray

from prism_select.config import ROW_BYTES
from prism_select.data.formats import (
    Format,
    Names,
    columns_of,
    detect_pool,
    detect_target,
    explicit_id,
    to_example,
    to_pairs,
    unused,
)
from prism_select.data.readers import find_files, read_rows
from prism_select.data.records import Example, Pair, Raw
from prism_select.data.remote import local
from prism_select.errors import BadFile, BadOption, BadRow, EmptyInput

__all__ = ["Pool", "Survey", "changed", "fingerprint", "named", "read_target", "read_targets", "seen_in_target"]

SAMPLE = 256


@dataclass(frozen=True)
class Survey:
    """What one pass over the pool found. `sample` is a uniform sample of its good rows, the whole of them while they
    are few; `conversation` is the first that needs a chat template; `columns` are those of the mapping that some row
    has."""

    rows: int
    bad: int
    first_bad: BadRow | None
    formats: Mapping[str, str]
    sources: Counter[str]
    sample: Sequence[Example]
    conversation: Example | None
    columns: Set[str] = frozenset()


class Pool:
    def __init__(self, patterns: Sequence[str], mapping: Names, row_bytes: int = ROW_BYTES) -> None:
        self.files, self.mapping, self.row_bytes = find_files(patterns), mapping, row_bytes
        self._stamps = stamps(self.files)

    def refuse_changes(self, files: Iterable[str] = ()) -> None:
        """Raises BadFile where one of `files`, or any, is not as it was when the pool was opened, by size and time."""
        files = list(files) or self.files
        now = stamps(files)
        if differ := [file for file in files if now.get(file) != self._stamps.get(file)]:
            raise changed(differ)

    def raw(self) -> Iterator[Raw]:
        for file in self.files:
            yield from read_rows(file, self.row_bytes)

    def rows(self, wanted: NDArray[np.bool_] | None = None) -> Iterator[tuple[Raw, Example | BadRow]]:
        """All, or those at the places where `wanted` is True, which are known to be good. The memory taken is that of a
        hash for each id that a row carries itself."""
        seen, places = set[int](), count()
        for file in self.files:
            format: Format | None = None
            for raw, place in zip(read_rows(file, self.row_bytes), places, strict=False):
                asked = wanted is None or wanted[place]
                try:
                    if format is None and raw.fields is not None:
                        format = detect_pool(raw.fields, self.mapping, raw.file, raw.line)
                    if asked:
                        yield raw, self._example(raw, format, seen)
                except BadRow as bad:
                    if asked:
                        yield raw, bad

    def _example(self, raw: Raw, format: Format | None, seen: set[int]) -> Example:
        example = to_example(raw, format or Format("text"), self.mapping)
        own = explicit_id(raw, self.mapping)
        if own is not None:
            key = hash(own)
            if key in seen:
                raise BadRow(raw.file, raw.line, f"duplicate id {own!r}", "give each row its own id, or leave ids out")
            seen.add(key)
        return example

    def survey(self, seed: int, least: int = 0, advance: Callable[[int], None] = lambda rows: None) -> Survey:
        """With a sample of `least` rows, or more. Raises EmptyInput when there is no row at all, or no good one."""
        draw, sample, sources = random.Random(seed), list[Example](), Counter[str]()
        size = max(least, SAMPLE)
        formats: dict[str, str] = {}
        rows = bad = 0
        first_bad: BadRow | None = None
        conversation: Example | None = None
        columns, most = set[str](), {column for each in self.mapping.values() for column in each}
        for raw, example in self.rows():
            rows += 1
            advance(1)
            if columns != most and raw.fields:
                columns.update(columns_of(raw.fields, self.mapping).values())
            if isinstance(example, BadRow):
                bad, first_bad = bad + 1, first_bad or example
                continue
            if raw.file not in formats:
                formats[raw.file] = detect_pool(raw.fields or {}, self.mapping).name
            sources[example.source] += 1
            conversation = conversation or (example if example.conversation else None)
            if len(sample) < size:
                sample.append(example)
            elif (place := draw.randrange(rows - bad)) < size:
                sample[place] = example
        if not rows:
            raise EmptyInput(", ".join(self.files), None, "the pool has no rows", "give a file with at least one")
        if not sample and first_bad:
            what = f"{first_bad.what} (and none of the pool's {rows} rows is usable)"
            raise EmptyInput(first_bad.file, first_bad.line, what, first_bad.advice)
        return Survey(rows, bad, first_bad, formats, sources, sample, conversation, columns)


def read_target(file: str, mapping: Names, row_bytes: int = ROW_BYTES) -> list[Pair]:
    """All pairs of a file. Raises EmptyInput when there is none, BadRow for the first row that gives none."""
    return [pair for _, pair in _target_rows(file, mapping, row_bytes)]


def read_targets(
    given: Sequence[str], mapping: Names, by: str = "", row_bytes: int = ROW_BYTES
) -> dict[str, list[Pair]]:
    """The pairs of each target, by name; the name of a single file without one is empty. `by` is a column whose values
    are targets. Raises BadOption for a name that comes twice, and what `read_target` raises."""
    files = [named(text) for text in given]
    if len(files) > 1:
        files = [(name or os.path.basename(file).partition(".")[0], file) for name, file in files]
    names = Counter(name for name, _ in files)
    if twice := [name for name, count in names.items() if count > 1]:
        raise BadOption(f"--target: two targets are called {twice[0]}; name them, as in --target NAME={files[-1][1]}")
    if not by:
        return {name: read_target(file, mapping, row_bytes) for name, file in files}
    if len(files) > 1:
        raise BadOption(f"--target-by {by}: it takes one target file, and here are {len(files)}")
    found: dict[str, list[Pair]] = {}
    for raw, pair in _target_rows(files[0][1], mapping, row_bytes):
        value = (raw.fields or {}).get(by)
        if not isinstance(value, str | int) or not str(value).strip():
            raise BadRow(raw.file, raw.line, f"no text in the column {by}", "name it, or leave out --target-by")
        found.setdefault(str(value), []).append(pair)
    return found


def target_files(given: Sequence[str]) -> list[str]:
    """Of all targets, without their names."""
    return [file for text in given for file in find_files([named(text)[1]])]


def named(text: str) -> tuple[str, str]:
    """Name and file of NAME=FILE; a file may have a = in its own name."""
    found = None if os.path.exists(text) else re.fullmatch(r"([\w .-]+)=(.+)", text)
    return (found[1], found[2]) if found else ("", text)


def seen_in_target(
    given: Sequence[str], mapping: Names, by: str = "", row_bytes: int = ROW_BYTES
) -> Iterator[tuple[str, Format, set[str], list[str]]]:
    """By the first row of each file: its format, the columns of --fields that it has, and those that nothing reads."""
    for name in find_files([named(text)[1] for text in given]):
        first = next((raw for raw in read_rows(name, row_bytes) if raw.fields is not None), None)
        if first is not None and first.fields is not None:
            format = detect_target(first.fields, mapping, first.file, first.line)
            left = [column for column in unused(first.fields, mapping, format) if column != by]
            yield name, format, set(columns_of(first.fields, mapping).values()), left


def _target_rows(file: str, mapping: Names, row_bytes: int) -> list[tuple[Raw, Pair]]:
    rows: list[tuple[Raw, Pair]] = []
    format: Format | None = None
    for name in find_files([file]):
        for raw in read_rows(name, row_bytes):
            if format is None and raw.fields is not None:
                format = detect_target(raw.fields, mapping, raw.file, raw.line)
            rows += [(raw, pair) for pair in to_pairs(raw, format or Format("prompt+chosen+rejected"), mapping)]
    if not rows:
        raise EmptyInput(file, None, "the target has no pairs", "give rows with prompt, chosen and rejected")
    return rows


def stamps(files: Sequence[str]) -> dict[str, tuple[int, int, int]]:
    """Of files that are there, what changes when they do: inode, size, time of the last change."""
    local = [file for file in files if not file.startswith("hub:") and os.path.exists(file)]
    return {file: (told.st_ino, told.st_size, told.st_mtime_ns) for file in local for told in [os.stat(file)]}


def changed(files: Sequence[str]) -> BadFile:
    advice = "start afresh with --overwrite, on files that stay as they are"
    return BadFile(", ".join(files), None, "changed while the run was reading it", advice)


def fingerprint(files: Sequence[str]) -> str:
    """Of names and contents; a hub set counts by its name."""
    whole = hashlib.blake2b(digest_size=16)
    for file in files:
        whole.update(file.rpartition("/")[2].encode() + b"\0")
        if not file.startswith("hub:"):
            with open(local(file), "rb") as stream:
                whole.update(hashlib.file_digest(stream, "blake2b").digest())
    return whole.hexdigest()
