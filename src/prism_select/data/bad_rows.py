"""TODO."""

import math

from prism_select.run.config import RowOptions
from prism_select.run.errors import BadRow, TooManyBadRows

__all__ = ["refuse_bad_rows"]


def refuse_bad_rows(config: RowOptions, bad: int, rows: int, first: BadRow | None) -> None:
    """Raises the first bad row itself, or TooManyBadRows, as the options ask."""
    if first is None:
        return
    if config.bad_rows == "stop":
        raise first
    if bad > round(config.allowed_bad * rows, 6):  # 29% of 100 is 29
        enough = f"--max-bad {math.ceil(100 * bad / rows)}%"
        raise TooManyBadRows(
            first.file,
            first.line,
            f"{first.what} (the first of {bad} bad rows found among {rows}, and --max-bad allows {config.max_bad})",
            f"{first.advice}; or set such rows aside, in quarantine.jsonl, with {enough}",
        )
