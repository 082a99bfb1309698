"""TODO."""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

__all__ = ["MANY", "VERDICTS", "Verdicts", "counted", "slices"]

VERDICTS = {
    "score": ("scored", "quarantined"),
    "select": ("selected", "over budget", "near duplicate", "source cap", "quarantined"),
    "repair": ("removed", "kept", "quarantined"),
}


MANY = 1_000_000


@dataclass(frozen=True)
class Verdicts:
    """One for each row: its place among `names`."""

    codes: NDArray[np.int8]
    names: Sequence[str]

    @property
    def counts(self) -> Counter[str]:
        numbers = counted(self.codes, len(self.names)).tolist()
        return Counter(
            {name: count for name, count in zip(self.names, numbers, strict=True) if count}
        )

    def among(self, *names: str) -> NDArray[np.bool_]:
        among: NDArray[np.bool_] = np.array([name in names for name in self.names])[self.codes]
        return among

    def texts(self, start: int, stop: int) -> pa.Array:
        return pa.DictionaryArray.from_arrays(self.codes[start:stop], list(self.names)).cast(
            pa.string()
        )


def slices(rows: int) -> Iterator[slice]:
    """A million rows each."""
    return (slice(start, start + MANY) for start in range(0, rows, MANY))


def counted(
    codes: NDArray[Any], size: int, rows: NDArray[np.bool_] | None = None
) -> NDArray[np.int64]:
    """How often each of `size` numbers stands in `codes`, or in those of some rows."""
    total = np.zeros(size, dtype=np.int64)
    for some in slices(len(codes)):
        total += np.bincount(
            codes[some] if rows is None else codes[some][rows[some]], minlength=size
        )
    return total
