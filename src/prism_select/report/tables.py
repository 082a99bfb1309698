"""Tables: rows for the page's script, to be searched, sorted and opened.

Choices made here:
- a row is sent once, with its details;
- only text and numbers are sent, never markup.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, TypeAlias

from prism_select.report.pool_rows import PoolRow
from prism_select.run.polarity import Polarity

__all__ = ["PREVIEW", "Column", "Table", "table_of_rows"]

PREVIEW = 240  # characters of a text that a closed row shows

Kind: TypeAlias = Literal["count", "score", "share", "move", "name", "text"]


@dataclass(frozen=True)
class Column:
    """`key` of a row's values, the column's name, and how its values are written; a `wide` column
    is left out on a phone."""

    key: str
    name: str
    kind: Kind
    wide: bool = False


@dataclass(frozen=True)
class Table:
    """`group` labels the filter by the rows' key "group"; `sort` is a column and whether it falls;
    `details` are shown in an open row."""

    kind: Literal["example", "pair"]
    group: str
    sort: tuple[str, bool]
    columns: tuple[Column, ...]
    details: tuple[Column, ...]
    rows: tuple[Mapping[str, Any], ...]


def table_of_rows(
    rows: Sequence[PoolRow],
    polarity: Polarity,
    columns: Sequence[Column],
    values: Sequence[Mapping[str, Any]],
    sort: tuple[str, bool],
) -> Table:
    """A table of rows of the pool; `values` are those of `columns` that are no fields of a row."""
    return Table(
        kind="example",
        group="Show",
        sort=sort,
        columns=(
            *columns,
            Column("tokens", "tokens", "count", wide=True),
            Column("source", "source", "name", wide=True),
            Column("verdict", "verdict", "name", wide=True),
            Column("text", "text", "text"),
        ),
        details=(
            Column("score", "score", "score"),
            Column("score_per_token", "score per token", "score"),
            Column("score_chosen", f"influence on the {polarity.toward}", "score"),
            Column("score_rejected", f"influence on the {polarity.away}", "score"),
            Column("loglik", "log-likelihood", "score"),
            Column("source", "source", "name"),
            Column("verdict", "verdict", "name"),
            Column("id", "id", "name"),
            Column("origin", "file", "name"),
        ),
        rows=tuple({**_sent(row), **more} for row, more in zip(rows, values, strict=True)),
    )


def _sent(row: PoolRow) -> dict[str, Any]:
    text = " ⏎ ".join(turn.text[:PREVIEW] for turn in row.turns)
    text = text or "".join(token for token, _ in row.token_scores)
    preview = {"text": text[:PREVIEW] or row.missing, "origin": f"{row.file}:{row.line}"}
    return {**asdict(row), **preview}
