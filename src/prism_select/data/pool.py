"""Inputs: a pool, streamed as often as needed and never held, and a target, which is small.

    survey   one pass before anything expensive: formats, counts, bad rows, a sample, a fingerprint
    rows     every row in order: what it means, or why it means nothing

Choices made here: a file has one format, that of its first row which has any; an id that a row
carries itself may occur once in the pool, and the row that repeats it is bad; a bad target row
always stops, since a pair lost in silence is a direction changed in silence. A pool that changes
while it is read is noticed by the size and time of its files, which cost nothing to ask, and by
their contents in the end."""

import hashlib
import os
import random
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass
from itertools import count

import numpy as np
from numpy.typing import NDArray

from prism_select.data.fields import Names, columns_of, explicit_id
from prism_select.data.files import find_files, read_rows
from prism_select.data.formats import Format, detect_pool, parse_fields, to_example
from prism_select.data.records import Example, Raw
from prism_select.data.remote import local
from prism_select.run.config import ScoreConfig
from prism_select.run.errors import BadFile, BadRow, EmptyInput

__all__ = ["Pool", "Survey", "changed", "fingerprint"]

SAMPLE = 256


@dataclass(frozen=True)
class Survey:
    """What one pass over the pool found. `sample` is a uniform sample of its good rows, the whole
    of them while they are few; `conversation` is the first that needs a chat template; `columns`
    are those of the mapping that some row has."""

    rows: int
    bad: int
    first_bad: BadRow | None
    formats: Mapping[str, str]
    sources: Counter[str]
    sample: Sequence[Example]
    conversation: Example | None
    columns: Set[str] = frozenset()


class Pool:
    def __init__(self, patterns: Sequence[str], mapping: Names) -> None:
        self.files, self.mapping = find_files(patterns), mapping
        self._stamps = stamps(self.files)

    @classmethod
    def of(cls, config: ScoreConfig) -> "Pool":
        """The pool of a run."""
        return cls(config.pool, parse_fields(config.fields))

    def refuse_changes(self, files: Iterable[str] = ()) -> None:
        """Raises BadFile where one of `files`, or any, is not as it was when the pool was opened,
        by size and time."""
        files = list(files) or self.files
        now = stamps(files)
        if differ := [file for file in files if now.get(file) != self._stamps.get(file)]:
            raise changed(differ)

    def raw(self) -> Iterator[Raw]:
        for file in self.files:
            yield from read_rows(file)

    def rows(
        self, wanted: NDArray[np.bool_] | None = None
    ) -> Iterator[tuple[Raw, Example | BadRow]]:
        """All, or those at the places where `wanted` is True, which are known to be good. The
        memory taken is that of a hash for each id that a row carries itself."""
        seen, places = set[int](), count()
        for file in self.files:
            format: Format | None = None
            for raw, place in zip(read_rows(file), places, strict=False):
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
                raise BadRow(
                    raw.file,
                    raw.line,
                    f"duplicate id {own!r}",
                    "give each row its own id, or leave ids out",
                )
            seen.add(key)
        return example

    def survey(
        self, seed: int, least: int = 0, advance: Callable[[int], None] = lambda rows: None
    ) -> Survey:
        """With a sample of `least` rows, or more. Raises EmptyInput when there is no row at all, or
        no good one."""
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
            raise EmptyInput(
                ", ".join(self.files), None, "the pool has no rows", "give a file with at least one"
            )
        if not sample and first_bad:
            what = f"{first_bad.what} (and none of the pool's {rows} rows is usable)"
            raise EmptyInput(first_bad.file, first_bad.line, what, first_bad.advice)
        return Survey(rows, bad, first_bad, formats, sources, sample, conversation, columns)


def stamps(files: Sequence[str]) -> dict[str, tuple[int, int, int]]:
    """Of files that are there, what changes when they do: inode, size, time of the last change."""
    local = [file for file in files if not file.startswith("hub:") and os.path.exists(file)]
    return {
        file: (told.st_ino, told.st_size, told.st_mtime_ns)
        for file in local
        for told in [os.stat(file)]
    }


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
