"""Pool: the rows to score, streamed as often as needed and never held.

    pool.survey()   one pass before anything expensive: formats, counts, bad rows, a sample
    pool.rows()     each row in order: its example, or why it is bad

Choices made here:
- a file has one format, that of its first row with any;
- an id that a row carries itself may occur once in a file: the row that repeats it is bad; two
  files may both count from 0;
- a pool that changes during a run is noticed by the size and time of its files, which cost nothing
  to read, and by their contents at the end.
"""

import hashlib
import os
import random
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, field
from itertools import count

import numpy as np
from numpy.typing import NDArray

from prism_select.data.columns import UnreadColumns
from prism_select.data.fields import Names, columns_of, explicit_id
from prism_select.data.files import find_files, read_rows
from prism_select.data.formats import Format, detect_pool, parse_fields, to_example
from prism_select.data.object_rows import object_fingerprint
from prism_select.data.records import Example, Raw
from prism_select.data.remote import local
from prism_select.run.config import ScoreConfig
from prism_select.run.errors import BadFile, BadRow, EmptyInput
from prism_select.run.objects import is_object

__all__ = ["Pool", "Survey", "changed", "fingerprint"]

SAMPLE = 256
REASONS = 1000  # that are counted: some hold a text of their row


@dataclass(frozen=True)
class Survey:
    """Figures of one pass over the pool. `formats` is by file; `sample` is a uniform sample of the
    good rows, or all of them; `conversation` is the first row that needs a chat template; `columns`
    are the mapped columns that some row has; `unread` are those that nothing reads, by file;
    `reasons` count the bad rows by what is wrong with them."""

    rows: int
    bad: int
    first_bad: BadRow | None
    formats: Mapping[str, str]
    sources: Counter[str]
    sample: Sequence[Example]
    conversation: Example | None
    columns: Set[str] = frozenset()
    unread: Mapping[str, Sequence[str]] = field(default_factory=dict)
    reasons: Mapping[str, int] = field(default_factory=dict)


class Pool:
    def __init__(self, patterns: Sequence[str], mapping: Names) -> None:
        self.files, self.mapping = find_files(patterns), mapping
        self._stamps = _stamps(self.files)

    @classmethod
    def of(cls, config: ScoreConfig) -> "Pool":
        """The pool of a run. Raises what `find_files` and `parse_fields` raise."""
        return cls(config.pool, parse_fields(config.fields))

    def refuse_changes(self, files: Iterable[str] = ()) -> None:
        """Raises BadFile where one of `files` (default: of all) has another size or time than when
        the pool was opened."""
        files = list(files) or self.files
        current = _stamps(files)
        if differ := [file for file in files if current.get(file) != self._stamps.get(file)]:
            raise changed(differ)

    def raw(self) -> Iterator[Raw]:
        for file in self.files:
            yield from read_rows(file)

    def rows(
        self, selected: NDArray[np.bool_] | None = None
    ) -> Iterator[tuple[Raw, Example | BadRow]]:
        """All rows, or those where `selected` is True; these must be good. Memory grows by a hash
        for each id of a file that a row carries itself."""
        positions = count()
        for file in self.files:
            format: Format | None = None
            seen = set[int]()  # ids, of this file alone
            for raw, position in zip(read_rows(file), positions, strict=False):
                requested = selected is None or selected[position]
                try:
                    if format is None and raw.fields is not None:
                        format = detect_pool(raw.fields, self.mapping, raw.file, raw.line)
                    if requested:
                        yield raw, self._example(raw, format, seen)
                except BadRow as bad:
                    if requested:
                        yield raw, bad

    def _example(self, raw: Raw, format: Format | None, seen: set[int]) -> Example:
        example = to_example(raw, format or Format("text"), self.mapping)
        identity = explicit_id(raw, self.mapping)
        if identity is not None:
            key = hash(identity)
            if key in seen:
                advice = "give each row of a file its own id, or leave ids out"
                raise BadRow(raw.file, raw.line, f"duplicate id {identity!r}", advice)
            seen.add(key)
        return example

    def survey(
        self, seed: int, least: int = 0, advance: Callable[[int], None] = lambda rows: None
    ) -> Survey:
        """With a sample of max(`least`, SAMPLE) rows. Raises EmptyInput where there is no good
        row."""
        draw, sample, sources = random.Random(seed), list[Example](), Counter[str]()
        size = max(least, SAMPLE)
        unread = UnreadColumns(self.mapping, detect_pool)
        rows, bad, reasons = 0, 0, Counter[str]()
        first_bad: BadRow | None = None
        conversation: Example | None = None
        columns, mapped = set[str](), {name for names in self.mapping.values() for name in names}
        for raw, example in self.rows():
            rows += 1
            advance(1)
            if columns != mapped and raw.fields:
                columns.update(columns_of(raw.fields, self.mapping).values())
            if isinstance(example, BadRow):
                bad, first_bad = bad + 1, first_bad or example
                if len(reasons) < REASONS or example.what in reasons:
                    reasons[example.what] += 1
                continue
            unread.add(raw)
            sources[example.source] += 1
            conversation = conversation or (example if example.conversation else None)
            if len(sample) < size:
                sample.append(example)
            elif (index := draw.randrange(rows - bad)) < size:
                sample[index] = example
        if not rows:
            raise EmptyInput(
                ", ".join(self.files), None, "the pool has no rows", "give a file with at least one"
            )
        if not sample and first_bad:
            what = f"{first_bad.what} (and none of the pool's {rows} rows is usable)"
            raise EmptyInput(first_bad.file, first_bad.line, what, first_bad.advice)
        return Survey(
            rows,
            bad,
            first_bad,
            unread.formats,
            sources,
            sample,
            conversation,
            columns,
            unread.by_file,
            reasons,
        )


def _stamps(files: Sequence[str]) -> dict[str, tuple[int, int, int]]:
    """Inode, size and time of the last change, of each local file."""
    paths = [file for file in files if not file.startswith("hub:") and os.path.exists(file)]
    stats = {file: os.stat(file) for file in paths}
    return {file: (stat.st_ino, stat.st_size, stat.st_mtime_ns) for file, stat in stats.items()}


def changed(files: Sequence[str]) -> BadFile:
    advice = "start afresh with --overwrite, on files that stay as they are"
    return BadFile(", ".join(files), None, "changed while the run was reading it", advice)


def fingerprint(files: Sequence[str]) -> str:
    """Of names and contents; a hub set counts by its name, an object by its rows alone."""
    digest = hashlib.blake2b(digest_size=16)
    for file in files:
        if is_object(file):
            digest.update(object_fingerprint(file))
            continue
        digest.update(file.rpartition("/")[2].encode() + b"\0")
        if not file.startswith("hub:"):
            with open(local(file), "rb") as stream:
                digest.update(hashlib.file_digest(stream, "blake2b").digest())
    return digest.hexdigest()
