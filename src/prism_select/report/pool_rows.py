"""Pool rows: some rows of the pool, with their scores and texts, for the page to show.

Choices made here:
- texts are read again from the pool's files, for the shown rows alone;
- a changed or missing row says so in place of its text;
- a text is truncated to `CHARACTERS`, and its token scores to `TOKENS`, so the page stays small.
"""

import math
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from prism_select.data.fields import Names
from prism_select.data.files import read_rows, readable, rows_at
from prism_select.data.formats import Format, detect_pool, parse_fields, to_example
from prism_select.data.records import Raw
from prism_select.report.scores_table import Columns
from prism_select.run.errors import BadFile, BadRow, PrismError

__all__ = ["CHARACTERS", "PoolRow", "ShownTurn", "Text", "pool_rows", "shown_turns"]

CHARACTERS, TOKENS = 4000, 600


@dataclass(frozen=True)
class ShownTurn:
    """Who speaks, the text, and how many characters it had before it was truncated."""

    role: str
    text: str
    characters: int


@dataclass(frozen=True)
class Text:
    """The turns of a row, or why they cannot be shown."""

    turns: tuple[ShownTurn, ...] = ()
    missing: str = ""


@dataclass(frozen=True)
class PoolRow:
    """`group` is the reason to show the row; `rank` counts from 1; `token_scores` are supervised
    tokens with their part of the score, without the last `hidden_tokens`; `missing` says why there
    is no text."""

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
    score_per_token: float
    score_chosen: float
    score_rejected: float
    loglik: float
    tokens: int
    truncated: bool
    token_scores: tuple[tuple[str, float], ...] = ()
    hidden_tokens: int = 0
    turns: tuple[ShownTurn, ...] = ()
    missing: str = ""


def pool_rows(
    path: Path,
    columns: Columns,
    config: Mapping[str, Any],
    shown: Sequence[tuple[str, int]],
) -> list[PoolRow]:
    """The rows of `shown`: a group and a rank from 0 each. `config` has the options of the
    scoring."""
    rows = [int(columns.order[rank]) for _, rank in shown]
    records = _records(path, rows)
    ids = {row: str(record["id"]) for row, record in records.items()}
    texts = _texts(columns, parse_fields(config["fields"]), ids)
    return [
        replace(
            _pool_row(group, rank, columns, records[row]),
            turns=texts[row].turns,
            missing=texts[row].missing,
        )
        for (group, rank), row in zip(shown, rows, strict=True)
    ]


def _records(path: Path, rows: Collection[int]) -> dict[int, dict[str, Any]]:
    """Lines of scores.parquet by row; row groups without one of them are not read."""
    file = pq.ParquetFile(path / "scores.parquet")
    records, start = dict[int, dict[str, Any]](), 0
    for group in range(file.num_row_groups):
        count = file.metadata.row_group(group).num_rows
        inside = [row for row in rows if start <= row < start + count]
        if inside:
            table = file.read_row_group(group).take(pa.array([row - start for row in inside]))
            records.update(zip(inside, table.to_pylist(), strict=True))
        start += count
    return records


def _pool_row(group: str, rank: int, columns: Columns, record: Mapping[str, Any]) -> PoolRow:
    def number(name: str) -> float:
        value = record.get(name)
        return math.nan if value is None else float(value)

    row = int(columns.order[rank])
    texts, scores = record.get("token_texts") or [], record.get("token_scores") or []
    return PoolRow(
        group=group,
        row=row,
        rank=rank + 1,
        id=str(record["id"]),
        source=columns.source[row],
        file=columns.file[row],
        line=int(record["line"] or 0),
        verdict=columns.verdict[row],
        ranking=float(columns.ranking[row]),
        score=number("score"),
        score_per_token=number("score_per_token"),
        score_chosen=number("score_chosen"),
        score_rejected=number("score_rejected"),
        loglik=number("loglik"),
        tokens=int(record["tokens"] or 0),
        truncated=bool(record["truncated"]),
        token_scores=tuple(zip(texts[:TOKENS], map(float, scores[:TOKENS]), strict=True)),
        hidden_tokens=max(0, len(texts) - TOKENS),
    )


def _texts(columns: Columns, mapping: Names, ids: Mapping[int, str]) -> dict[int, Text]:
    """The text of each row, or why it cannot be shown; `ids` are those of scores.parquet."""
    by_file: dict[str, dict[int, int]] = {}
    for row in ids:
        by_file.setdefault(columns.file[row], {})[columns.row_in_file(row)] = row
    texts: dict[int, Text] = {}
    for file, rows in by_file.items():
        reason = "the file has fewer rows than it had"
        try:
            if file.startswith("hub:"):
                raise BadFile(file, None, "a hub data set is not read again", "look there")
            format = _format_of(file, mapping)
            for index, raw in rows_at(file, rows):
                texts[rows[index]] = _text(raw, format, mapping, ids[rows[index]])
        except PrismError as error:
            reason = str(error)
        texts |= {row: Text(missing=reason) for row in rows.values() if row not in texts}
    return texts


def _format_of(file: str, mapping: Names) -> Format:
    for raw in read_rows(readable(file)):
        if raw.fields is not None:
            return detect_pool(raw.fields, mapping, raw.file, raw.line)
    return Format("text")


def _text(raw: Raw, format: Format, mapping: Names, id: str) -> Text:
    try:
        example = to_example(raw, format, mapping)
    except BadRow as error:
        return Text(missing=str(error))
    if example.id != id:
        return Text(missing=f"the file has changed: the row is {example.id} now")
    return Text(tuple(shown_turns((turn.role, turn.shown) for turn in example.turns)))


def shown_turns(turns: Iterable[tuple[str, str]]) -> Iterator[ShownTurn]:
    """The first turns, `CHARACTERS` in all; the last of them is truncated."""
    room = CHARACTERS
    for role, text in turns:
        if room > 0:
            yield ShownTurn(role, text[:room], len(text))
            room -= len(text)
