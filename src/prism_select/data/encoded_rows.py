"""TODO."""

from collections.abc import Iterator
from contextlib import suppress

from prism_select.data.encoding import Encoded, Encoder
from prism_select.data.pool import Pool
from prism_select.data.records import Example
from prism_select.run.errors import BadRow

__all__ = ["first_rows", "targets_of"]

CHECKED_ROWS = 8


def targets_of(pool: Pool, encoder: Encoder) -> Iterator[int]:
    """Supervised tokens of each row of the pool that can be encoded."""
    for _, example in pool.rows():
        if isinstance(example, Example):
            with suppress(BadRow):
                yield encoder.encode(example).targets


def first_rows(pool: Pool, encoder: Encoder) -> list[Encoded]:
    """The first rows that can be scored: what the engine is checked on. Raises BadRow where there
    are none."""
    rows: list[Encoded] = []
    first_bad: BadRow | None = None
    for _, example in pool.rows():
        try:
            rows.append(
                encoder.encode(example) if isinstance(example, Example) else _raise(example)
            )
        except BadRow as bad:
            first_bad = first_bad or bad
        if len(rows) == CHECKED_ROWS:
            break
    if not rows and first_bad:
        raise first_bad
    return rows


def _raise(error: BadRow) -> Encoded:
    raise error
