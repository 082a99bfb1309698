"""Tables: rows of the pool and pairs of the target as the page's script takes them, to be searched,
sorted and opened.

Choices made here: a row is sent once, with all that it opens to; what is sent is text and numbers,
never markup."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from prism_select.report.examples import Row
from prism_select.report.facts import Facts
from prism_select.run.config import sides_of

__all__ = ["examples_table", "pairs_table", "table_of"]

PREVIEW = 240


def table_of(
    rows: Sequence[Row],
    sides: tuple[str, str],
    columns: Sequence[tuple[str, str, str]],
    values: Sequence[Mapping[str, Any]],
) -> dict[str, Any]:
    """What the page's script makes a table of, sorted by the first of `columns` (key, name, kind);
    `values` are what they need beside the fields of each row."""
    columns = [
        *columns,
        ("learned", "tokens", "count"),
        ("source", "source", "name"),
        ("verdict", "verdict", "name"),
    ]
    wide = {"learned", "source", "verdict"}
    details = [
        ("score", "score", "score"),
        ("per_token", "score per token", "score"),
        ("chosen", f"moves the {sides[0]}", "score"),
        ("rejected", f"moves the {sides[1]}", "score"),
        ("loglik", "log-likelihood", "score"),
        ("source", "source", "name"),
        ("verdict", "verdict", "name"),
        ("id", "id", "name"),
        ("place", "from", "name"),
    ]
    return {
        "kind": "example",
        "group": "Show",
        "sort": [columns[0][0], False],
        "columns": [
            {"key": key, "name": name, "kind": kind, "wide": key in wide}
            for key, name, kind in [*columns, ("text", "text", "text")]
        ],
        "details": details,
        "rows": [{**_row(row), **more} for row, more in zip(rows, values, strict=True)],
    }


def _row(row: Row) -> dict[str, Any]:
    whole = " ⏎ ".join(said.text[:PREVIEW] for said in row.said) or "".join(
        text for text, _ in row.tokens
    )
    return {
        **asdict(row),
        "text": whole[:PREVIEW] or row.missing,
        "place": f"{row.file}:{row.line}",
    }


def examples_table(facts: Facts) -> dict[str, Any]:
    by = facts.columns.by
    columns = [("rank", "rank", "count"), (by, by.replace("_", " "), "score")]
    return table_of(
        facts.rows, sides_of(facts.swapped), columns, [{by: row.ranking} for row in facts.rows]
    )


def pairs_table(facts: Facts) -> dict[str, Any]:
    side = sides_of(facts.swapped)[0]
    columns = [
        ("number", "pair", "count"),
        ("share", "share", "share"),
        ("preference", f"π for {side}", "share"),
        ("gap", "gap", "score"),
        ("weight", "weight", "score"),
    ]
    pairs = facts.target.pairs if facts.target else ()
    named = len({pair.target for pair in pairs}) > 1
    columns += [("target", "target", "name")] * named + [("text", "prompt", "text")]
    return {
        "kind": "pair",
        "group": "Target",
        "sort": ["share", True],
        "columns": [{"key": k, "name": n, "kind": kind, "wide": k in ("weight", "gap")} for k, n, kind in columns],
        "details": [
            ("share", "share of the direction", "share"),
            ("gap", "gap, nats per token", "score"),
            ("weight", "weight", "score"),
            ("line", "line", "count"),
        ],
        "rows": [{**asdict(pair), "text": pair.prompt[:PREVIEW], "group": pair.target} for pair in pairs],
    }  # fmt: skip
