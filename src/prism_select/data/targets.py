"""TODO."""

import os
import re
from collections import Counter
from collections.abc import Iterator, Sequence

from rapidfuzz.distance import Indel

from prism_select.data.fields import Names, columns_of
from prism_select.data.files import find_files, read_rows
from prism_select.data.formats import Format, detect_target, to_pairs, unused
from prism_select.data.records import Example, Pair, Raw
from prism_select.run.errors import BadOption, BadRow, EmptyInput

__all__ = ["most_alike", "named", "read_target", "read_targets", "seen_in_target"]


def read_target(file: str, mapping: Names) -> list[Pair]:
    """All pairs of a file. Raises EmptyInput when there is none, BadRow for the first row that
    gives none."""
    return [pair for _, pair in _target_rows(file, mapping)]


def read_targets(
    given: Sequence[str], mapping: Names, by: str | None = None
) -> dict[str, list[Pair]]:
    """The pairs of each target, by name; the name of a single file without one is empty. `by` is a
    column whose values are targets. Raises BadOption for a name that comes twice, and what
    `read_target` raises."""
    files = [named(text) for text in given]
    if len(files) > 1:
        files = [(name or os.path.basename(file).partition(".")[0], file) for name, file in files]
    names = Counter(name for name, _ in files)
    if twice := [name for name, count in names.items() if count > 1]:
        raise BadOption(
            f"--target: two targets are called {twice[0]}; name them, as in --target NAME={files[-1][1]}"
        )
    if not by:
        return {name: read_target(file, mapping) for name, file in files}
    if len(files) > 1:
        raise BadOption(f"--target-by {by}: it takes one target file, and here are {len(files)}")
    found: dict[str, list[Pair]] = {}
    for raw, pair in _target_rows(files[0][1], mapping):
        value = (raw.fields or {}).get(by)
        if not isinstance(value, str | int) or not str(value).strip():
            raise BadRow(
                raw.file,
                raw.line,
                f"no text in the column {by}",
                "name it, or leave out --target-by",
            )
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
    given: Sequence[str], mapping: Names, by: str | None = None
) -> Iterator[tuple[str, Format, set[str], list[str]]]:
    """By the first row of each file: its format, the columns of --fields that it has, and those
    that nothing reads."""
    for name in find_files([named(text)[1] for text in given]):
        first = next((raw for raw in read_rows(name) if raw.fields is not None), None)
        if first is not None and first.fields is not None:
            format = detect_target(first.fields, mapping, first.file, first.line)
            left = [column for column in unused(first.fields, mapping, format) if column != by]
            yield name, format, set(columns_of(first.fields, mapping).values()), left


def _target_rows(file: str, mapping: Names) -> list[tuple[Raw, Pair]]:
    rows: list[tuple[Raw, Pair]] = []
    format: Format | None = None
    for name in find_files([file]):
        for raw in read_rows(name):
            if format is None and raw.fields is not None:
                format = detect_target(raw.fields, mapping, raw.file, raw.line)
            rows += [
                (raw, pair)
                for pair in to_pairs(raw, format or Format("prompt+chosen+rejected"), mapping)
            ]
    if not rows:
        raise EmptyInput(
            file, None, "the target has no pairs", "give rows with prompt, chosen and rejected"
        )
    return rows


def most_alike(pairs: Sequence[Pair], share: float) -> list[Pair]:
    """This share of the pairs, at least one, whose two answers have the most letters in common, in
    their own order. Similarity: 1 − insertions and deletions / letters of both (Indel, as rapidfuzz
    normalises it)."""
    texts = [[_said(side) for side in (pair.chosen, pair.rejected)] for pair in pairs]
    likeness = [Indel.normalized_similarity(*both) for both in texts]
    best = sorted(range(len(pairs)), key=lambda place: -likeness[place])[
        : max(1, round(share * len(pairs)))
    ]
    return [pairs[place] for place in sorted(best)]


def _said(example: Example) -> str:
    return "\n".join(turn.text for turn in example.turns[example.prompt_turns :])
