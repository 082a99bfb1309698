"""Examples: which rows of a pool the page shows, and what they say.

    top             the first rows of the ranking       cut-off   those on either side of the lowest row taken
    bottom          its last                            moved     in a comparison, the largest changes of rank

Choices made here: a small pool is shown whole; of a large one a few hundred rows, whose texts are
cut to `LETTERS` and whose tokens to `TOKENS`, so the page stays small. Texts are read again from
the pool's files, and only there where a row is shown; a row that does not stand there any more says
so."""

import math
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from prism_select.data.fields import Names
from prism_select.data.files import read_rows, readable, rows_at
from prism_select.data.formats import Format, detect_pool, parse_fields, to_example
from prism_select.data.records import Raw
from prism_select.report.scores_table import Columns
from prism_select.run.config import ROW_BYTES
from prism_select.run.errors import BadFile, BadRow, PrismError

__all__ = ["PairDiagnosis", "Row", "Text", "cut", "rows_of", "shown"]

WHOLE, TOP, BESIDE, BOTTOM = 400, 120, 60, 80


LETTERS, TOKENS, GROUPS = 4000, 600, 64


MORE = ("score_se", "score_groups", "token_scores", "token_texts")


@dataclass(frozen=True)
class PairDiagnosis:
    """Who speaks, the text, and how many letters it had before it was cut."""

    role: str
    text: str
    letters: int


@dataclass(frozen=True)
class Text:
    """The turns of a row, or why they cannot be shown."""

    said: tuple[PairDiagnosis, ...] = ()
    missing: str = ""


@dataclass(frozen=True)
class Row:
    """One row of the pool as the page shows it. `missing` says why there is no text; `tokens` are
    texts and what each adds to the score; `groups` are scores along groups of the pairs."""

    group: str
    row: int
    rank: int
    id: str
    source: str
    file: str
    line: int
    verdict: str
    ranking: float
    score: float
    per_token: float
    chosen: float
    rejected: float
    loglik: float
    learned: int
    truncated: bool
    error: float = math.nan
    groups: tuple[float, ...] = ()
    tokens: tuple[tuple[str, float], ...] = ()
    more_tokens: int = 0
    said: tuple[PairDiagnosis, ...] = ()
    missing: str = ""


def shown(columns: Columns) -> list[tuple[str, int]]:
    """Group and place in the ranking of each row to show, in the order of the ranking."""
    count = len(columns.order)
    taken = np.flatnonzero(columns.taken[columns.order])
    last = int(taken[-1]) if len(taken) else -1
    if count <= WHOLE:
        return [
            ("top" if place <= last or last < 0 else "below the cut-off", place)
            for place in range(count)
        ]
    groups = {place: "top" for place in range(TOP)}
    if last >= 0:
        around = range(max(0, last - BESIDE + 1), min(count, last + BESIDE + 1))
        groups |= {place: "around the cut-off" for place in around if place not in groups}
    groups |= {place: "bottom" for place in range(count - BOTTOM, count) if place not in groups}
    return [(groups[place], place) for place in sorted(groups)]


def rows_of(
    path: Path, columns: Columns, config: Mapping[str, Any], places: Sequence[tuple[str, int]]
) -> list[Row]:
    """The rows at these places of the ranking, with their texts; `config` is what the pool was
    scored with."""
    rows = [int(columns.order[place]) for _, place in places]
    details = details_of(path, rows)
    texts = texts_of(columns, config, {row: str(told["id"]) for row, told in details.items()})
    return [
        replace(
            _row(group, place, columns, row, details[row]),
            said=texts[row].said,
            missing=texts[row].missing,
        )
        for (group, place), row in zip(places, rows, strict=True)
    ]


def details_of(path: Path, rows: Collection[int]) -> dict[int, dict[str, Any]]:
    """Lines of scores.parquet by row; row groups without one of them are not read."""
    file = pq.ParquetFile(path / "scores.parquet")
    found, start = dict[int, dict[str, Any]](), 0
    plain = [
        name
        for name in file.schema_arrow.names
        if name not in ("score_groups", "token_scores", "token_texts")
    ]
    heavy = [name for name in MORE if name in file.schema_arrow.names]
    for group in range(file.num_row_groups):
        count = file.metadata.row_group(group).num_rows
        inside = [row for row in rows if start <= row < start + count]
        if inside:
            table = file.read_row_group(group, columns=sorted({*plain, *heavy}))
            few = table.take(pa.array([row - start for row in inside]))
            found.update(zip(inside, few.to_pylist(), strict=True))
        start += count
    return found


def _row(group: str, place: int, columns: Columns, row: int, told: Mapping[str, Any]) -> Row:
    def number(name: str) -> float:
        value = told.get(name)
        return math.nan if value is None else float(value)

    texts, scores = told.get("token_texts") or [], told.get("token_scores") or []
    tokens = tuple(
        (text, float(score)) for text, score in zip(texts[:TOKENS], scores[:TOKENS], strict=True)
    )
    return Row(
        group=group,
        row=row,
        rank=place + 1,
        id=str(told["id"]),
        source=columns.source[row],
        file=columns.file[row],
        line=int(told["line"] or 0),
        verdict=columns.verdict[row],
        ranking=float(columns.ranking[row]),
        score=number("score"),
        per_token=number("score_per_token"),
        chosen=number("score_chosen"),
        rejected=number("score_rejected"),
        loglik=number("loglik"),
        learned=int(told["tokens"] or 0),
        truncated=bool(told["truncated"]),
        error=number("score_se"),
        groups=tuple(float(value) for value in (told.get("score_groups") or [])[:GROUPS]),
        tokens=tokens,
        more_tokens=max(0, len(texts) - TOKENS),
    )


def texts_of(
    columns: Columns, config: Mapping[str, Any], ids: Mapping[int, str]
) -> dict[int, Text]:
    """What each row says, or why that cannot be shown; `ids` are those of scores.parquet, by
    row."""
    mapping, limit = parse_fields(config["fields"]), config.get("max_row_bytes", ROW_BYTES)
    by_file: dict[str, dict[int, int]] = {}
    for row in ids:
        by_file.setdefault(columns.file[row], {})[columns.place_in_file(row)] = row
    found: dict[int, Text] = {}
    for file, places in by_file.items():
        why = "the file has fewer rows than it had"
        try:
            if file.startswith("hub:"):
                raise BadFile(file, None, "a hub data set is not read again", "look there")
            format = _format_of(file, mapping, limit)
            for place, raw in rows_at(file, places, limit):
                found[places[place]] = _text(raw, format, mapping, ids[places[place]])
        except PrismError as error:
            why = str(error)
        found |= {row: Text(missing=why) for row in places.values() if row not in found}
    return found


def _format_of(file: str, mapping: Names, limit: int) -> Format:
    for raw in read_rows(readable(file), limit):
        if raw.fields is not None:
            return detect_pool(raw.fields, mapping, raw.file, raw.line)
    return Format("text")


def _text(raw: Raw, format: Format, mapping: Names, id: str) -> Text:
    try:
        example = to_example(raw, format, mapping)
    except BadRow as bad:
        return Text(missing=str(bad))
    if example.id != id:
        return Text(missing=f"the file has changed: the row is {example.id} now")
    return Text(tuple(cut((turn.role, turn.text) for turn in example.turns)))


def cut(turns: Iterable[tuple[str, str]]) -> Iterator[PairDiagnosis]:
    """`LETTERS` in all: as many turns as have room, the last of them cut."""
    left = LETTERS
    for role, text in turns:
        if left > 0:
            yield PairDiagnosis(role, text[:left], len(text))
            left -= len(text)
