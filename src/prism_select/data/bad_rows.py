"""Bad rows: whether there are too many of them to go on.

bad rows > --max-bad × rows   →   TooManyBadRows, with the first of them
"""

import math

from prism_select.run.config import RowOptions
from prism_select.run.errors import BadRow, TooManyBadRows

__all__ = ["refuse_bad_rows"]


def refuse_bad_rows(config: RowOptions, bad: int, rows: int, first: BadRow | None) -> None:
    """Raises `first`, the first of `bad` bad rows, with --bad-rows stop; TooManyBadRows where they
    are more than --max-bad allows."""
    if first is None:
        return
    if config.bad_rows == "stop":
        raise first
    if bad > round(config.allowed_bad * rows, 6):  # 29% of 100 is 29
        raise TooManyBadRows(
            first.file,
            first.line,
            f"{first.what} (the first of {bad} bad rows found among {rows}, and --max-bad allows "
            f"{config.max_bad})",
            f"{first.advice}; or quarantine such rows, in quarantine.jsonl, with --max-bad "
            f"{math.ceil(100 * bad / rows)}%",
        )
