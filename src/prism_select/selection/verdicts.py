"""Verdicts: what became of each row, one of a few words.

    score     scored, quarantined
    select    selected, over budget, near duplicate, source cap, quarantined
    repair    removed, kept, quarantined

Choices made here:
- a verdict is one byte, a number among the words;
- arrays of all rows are worked on a million rows at a time, so that no copy of them is made.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

__all__ = ["SLICE", "VERDICTS", "Verdicts", "count_codes", "slices"]

VERDICTS = {
    "score": ("scored", "quarantined"),
    "select": ("selected", "over budget", "near duplicate", "source cap", "quarantined"),
    "repair": ("removed", "kept", "quarantined"),
}
SLICE = 1_000_000  # rows


@dataclass(frozen=True)
class Verdicts:
    """The verdict of a row is `names[codes[row]]`. With groups to serve, a chosen row was taken for
    the group `groups[takers[row]]`, or for none (-1)."""

    codes: NDArray[np.int8]
    names: Sequence[str]
    groups: Sequence[str] = ()
    takers: NDArray[np.int16] | None = None

    @property
    def counts(self) -> Counter[str]:
        """Rows by verdict; verdicts of no row are left out."""
        numbers = count_codes(self.codes, len(self.names)).tolist()
        return Counter(
            {name: count for name, count in zip(self.names, numbers, strict=True) if count}
        )

    def among(self, *names: str) -> NDArray[np.bool_]:
        """Which rows have one of these verdicts."""
        among: NDArray[np.bool_] = np.array([name in names for name in self.names])[self.codes]
        return among

    def texts(self, start: int, stop: int) -> pa.Array:
        """The verdicts of rows `start` to `stop`, as a column of text."""
        codes = pa.DictionaryArray.from_arrays(self.codes[start:stop], list(self.names))
        return codes.cast(pa.string())

    def group_names(self, start: int, stop: int) -> pa.Array:
        """The groups that took rows `start` to `stop`, as a column of text."""
        assert self.takers is not None
        takers = self.takers[start:stop]
        codes = pa.array(takers, mask=takers < 0)
        return pa.DictionaryArray.from_arrays(codes, list(self.groups)).cast(pa.string())


def slices(rows: int) -> Iterator[slice]:
    """`SLICE` rows each."""
    return (slice(start, start + SLICE) for start in range(0, rows, SLICE))


def count_codes(
    codes: NDArray[Any], size: int, rows: NDArray[np.bool_] | None = None
) -> NDArray[np.int64]:
    """How often each number below `size` is in `codes`, or in the `codes` of some rows."""
    total = np.zeros(size, dtype=np.int64)
    for piece in slices(len(codes)):
        selected = codes[piece] if rows is None else codes[piece][rows[piece]]
        total += np.bincount(selected, minlength=size)
    return total
