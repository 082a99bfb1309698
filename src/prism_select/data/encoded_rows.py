"""Encoded rows: a pass over the pool for what needs tokens before anything is scored.

    pool → example → tokens      a row that cannot be encoded is passed over

Choices made here:
- an engine is checked on the first CHECKED_ROWS rows, so a check costs no pass over the pool.
"""

from collections.abc import Iterator

from prism_select.data.encoding import Encoded, Encoder
from prism_select.data.pool import Pool
from prism_select.data.records import Example
from prism_select.run.errors import BadRow

__all__ = ["CHECKED_ROWS", "first_rows", "supervised_tokens"]

CHECKED_ROWS = 8


def supervised_tokens(pool: Pool, encoder: Encoder) -> Iterator[int]:
    """The number of supervised tokens of each row that can be encoded."""
    for row in _encoded(pool, encoder):
        if isinstance(row, Encoded):
            yield row.targets


def first_rows(pool: Pool, encoder: Encoder) -> list[Encoded]:
    """The first CHECKED_ROWS rows that can be encoded. Raises the first BadRow where there is
    none."""
    rows: list[Encoded] = []
    bad: BadRow | None = None
    for row in _encoded(pool, encoder):
        if isinstance(row, Encoded):
            rows.append(row)
        else:
            bad = bad or row
        if len(rows) == CHECKED_ROWS:
            break
    if not rows and bad:
        raise bad
    return rows


def _encoded(pool: Pool, encoder: Encoder) -> Iterator[Encoded | BadRow]:
    for _, example in pool.rows():
        try:
            yield encoder.encode(example) if isinstance(example, Example) else example
        except BadRow as bad:
            yield bad
