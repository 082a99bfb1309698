"""Targets: files of pairs, which are small and read at once.

    --target polite.jsonl --target math=sums.csv      → {"polite": pairs, "math": pairs}
    --target all.jsonl --target-by topic              → a target for each value of `topic`
    --target pairs.jsonl                              → {"": pairs}
    --target good=a.jsonl --target -bad=b.jsonl       → "-bad": away from what is chosen in b
    rows of answers alone, with --weighting unpaired  → pairs with one answer

Choices made here:
- a bad row always stops: a pair that is lost unnoticed changes the direction unnoticed;
- a file called `a=b` is that file, not the target `a`.
"""

import os
import re
import reprlib
from collections import Counter
from collections.abc import Iterator, Sequence, Set
from dataclasses import dataclass
from itertools import islice

from prism_select.data.columns import UnreadColumns
from prism_select.data.fields import Names, columns_of, name_in
from prism_select.data.files import find_files, read_rows
from prism_select.data.formats import (
    TARGET_FORMATS,
    Format,
    detect_anchors,
    parse_fields,
    to_answer,
    to_pairs,
)
from prism_select.data.records import Pair, Raw, any_alone
from prism_select.run.config import ScoreConfig
from prism_select.run.errors import BadOption, BadRow, EmptyInput
from prism_select.run.polarity import Polarity

__all__ = [
    "TargetFile",
    "read_pairs",
    "read_target",
    "read_targets",
    "survey_targets",
    "target_files",
    "target_patterns",
]


@dataclass(frozen=True)
class TargetFile:
    """A file of pairs: `columns` are the mapped ones, `unread` those that nothing reads."""

    file: str
    format: str
    columns: Set[str]
    unread: Sequence[str]


def read_pairs(config: ScoreConfig) -> dict[str, list[Pair]]:
    """The pairs of a run by target; `repair` exchanges their answers. Empty when the run takes a
    saved direction."""
    if not config.target:
        return {}
    mapping, unpaired = parse_fields(config.fields), config.weighting == "unpaired"
    targets = read_targets(config.target, mapping, config.target_by, unpaired)
    if config.tuned and any_alone(targets):
        raise BadOption(
            f"--tune {config.tune}: answers without rejected ones have none to be held out "
            "against; leave it out"
        )
    if not Polarity.of_config(config).swapped:
        return targets
    return {name: [pair.swapped for pair in pairs] for name, pairs in targets.items()}


def read_target(file: str, mapping: Names, unpaired: bool = False) -> list[Pair]:
    """All pairs of a file; `unpaired` takes answers alone, too. Raises EmptyInput where there is
    none, BadRow for the first row that gives none."""
    return [pair for _, pair in _target_rows(file, mapping, unpaired)]


def read_targets(
    targets: Sequence[str], mapping: Names, by: str | None = None, unpaired: bool = False
) -> dict[str, list[Pair]]:
    """The pairs of each target, by name; the name of a single file without one is empty. The values
    of the column `by` are targets of their own. Raises BadOption for a name that comes twice, and
    what `read_target` raises."""
    files = [_split_name(target) for target in targets]
    if len(files) > 1:
        files = [(name or os.path.basename(file).partition(".")[0], file) for name, file in files]
    counts = Counter(name for name, _ in files)
    if twice := [name for name, count in counts.items() if count > 1]:
        raise BadOption(
            f"--target: two targets are called {twice[0]}; name them, as in --target "
            f"NAME={files[-1][1]}"
        )
    if not by:
        return {name: _signed(name, read_target(file, mapping, unpaired)) for name, file in files}
    if len(files) > 1:
        raise BadOption(f"--target-by {by}: it takes one target file, and here are {len(files)}")
    pairs: dict[str, list[Pair]] = {}
    for raw, pair in _target_rows(files[0][1], mapping, unpaired):
        value = (raw.fields or {}).get(by)
        name = str(value) if isinstance(value, bool) else name_in(value)
        if not name or not name.strip():
            what, advice = f"no text in the column {by}", "name it, or leave out --target-by"
            raise BadRow(raw.file, raw.line, what, advice)
        pairs.setdefault(name, []).append(pair)
    return pairs


def _signed(name: str, pairs: list[Pair]) -> list[Pair]:
    """With their answers exchanged where the target's name begins with a minus."""
    return [pair.swapped for pair in pairs] if name.startswith("-") else pairs


def target_files(targets: Sequence[str]) -> list[str]:
    """The files of all targets."""
    return [file for pattern in target_patterns(targets) for file in find_files([pattern])]


def target_patterns(targets: Sequence[str]) -> list[str]:
    """The targets without their names."""
    return [_split_name(target)[1] for target in targets]


def survey_targets(
    targets: Sequence[str], mapping: Names, by: str | None = None
) -> Iterator[TargetFile]:
    """The files of all targets that have a row."""
    for file in find_files(target_patterns(targets)):
        unread, columns = UnreadColumns(mapping, detect_anchors), set[str]()
        for raw in read_rows(file):
            if raw.fields is not None:
                columns = columns or set(columns_of(raw.fields, mapping).values())
                unread.add(raw)
        for name, format in unread.formats.items():
            spare = [column for column in unread.by_file[name] if column != by]
            yield TargetFile(name, format, columns, spare)


def _split_name(target: str) -> tuple[str, str]:
    """Name and file of NAME=FILE."""
    match = None if os.path.exists(target) else re.fullmatch(r"([\w .-]+)=(.+)", target)
    return (match[1], match[2]) if match else ("", target)


def _target_rows(file: str, mapping: Names, unpaired: bool) -> list[tuple[Raw, Pair]]:
    rows: list[tuple[Raw, Pair]] = []
    format: Format | None = None
    for name in find_files([file]):
        for raw in read_rows(name):
            if format is None and raw.fields is not None:
                format = detect_anchors(raw.fields, mapping, raw.file, raw.line)
                if format.name not in TARGET_FORMATS and not unpaired:
                    raise _no_rejected(raw, format)
            if format is None or format.name in TARGET_FORMATS:
                pairs = to_pairs(raw, format or Format("prompt+chosen+rejected"), mapping)
            else:
                pairs = [to_answer(raw, format, mapping)]
            rows += [(raw, pair) for pair in pairs]
    if not rows:
        raise EmptyInput(
            file, None, "the target has no pairs", "give rows with prompt, chosen and rejected"
        )
    return rows


def _no_rejected(raw: Raw, format: Format) -> BadRow:
    fields = ", ".join(map(reprlib.repr, islice(raw.fields or {}, 12)))
    return BadRow(
        raw.file,
        raw.line,
        f"no known format of pairs: the fields are {fields}, an answer alone ({format.name}); "
        f"known are {', '.join(TARGET_FORMATS)}",
        "add a rejected answer to each row; score, select and repair take answers alone with "
        "--weighting unpaired",
    )
