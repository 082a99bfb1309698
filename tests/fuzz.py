"""Fuzzing: any bytes, as a file of any kind, are rows, bad rows or one line that says what is
wrong.

python tests/fuzz.py -max_total_time=60      guided random bytes; needs the extra [fuzz]
"""

import json
import sys
import tempfile
from pathlib import Path
from unittest.mock import patch

from prism_select.data import streams
from prism_select.data.pool import Pool
from prism_select.data.records import Example
from prism_select.data.targets import read_target
from prism_select.run.errors import BadRow, PrismError

__all__ = ["ENDINGS", "LIMIT", "read_all"]

ENDINGS = (
    "jsonl",
    "json",
    "csv",
    "parquet",
    "arrow",
    "jsonl.gz",
    "json.gz",
    "csv.gz",
    "jsonl.zst",
    "json.zst",
    "csv.zst",
)
LIMIT = 4096  # bytes in a row


def read_all(path: Path) -> int:
    """Reads a file as a pool and as a target; returns the rows of the pool. Raises what no file
    should cause."""
    with patch.object(streams, "ROW_BYTES", LIMIT):
        return _read(path)


def _read(path: Path) -> int:
    count = 0
    try:
        for raw, row in Pool([str(path)], {}).rows():
            count += 1
            assert isinstance(row, Example | BadRow) and (raw.fields is None) == (
                raw.problem is not None
            )
            json.dumps(raw.quarantined("why")).encode()
            if isinstance(row, Example):
                row.text.encode()
            else:
                one_line(row)
    except PrismError as error:
        one_line(error)
    try:
        for pair in read_target(str(path), {}):
            pair.chosen.text.encode()
    except PrismError as error:
        one_line(error)
    return count


def one_line(error: PrismError) -> None:
    assert "\n" not in str(error)
    str(error).encode()


def main() -> None:
    import atheris

    folder = Path(tempfile.mkdtemp())

    def one(data: bytes) -> None:
        path = folder / f"pool.{ENDINGS[data[0] % len(ENDINGS)] if data else 'jsonl'}"
        path.write_bytes(data[1:])
        read_all(path)

    atheris.instrument_all()
    atheris.Setup(sys.argv, one)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
