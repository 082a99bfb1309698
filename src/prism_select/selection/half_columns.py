"""Half columns: score_chosen and score_rejected where they are taken after the choice, of the
chosen rows and a random sample.

    score_chosen = score along the half C      score_rejected = score_chosen − score

Choices made here:
- what reads them (a warning, a chart, the tables of chosen rows) needs no others, and all others
  are scored along one direction less;
- the sample is a twentieth of the pool, `FEWEST` rows at least and `MOST` at most, so that it costs
  little beside the pass over any pool that is large enough to wait for it.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from prism_select.directions.layout import DirectionLayout
from prism_select.run.config import ScoreConfig
from prism_select.run.folder import SHARD

__all__ = ["HalfColumns", "halves_later", "sampled_rows"]

SMALL = 1000  # rows of a pool whose rows all have them
FEWEST, MOST, SHARE = 200, 1000, 20  # rows of the sample: one of so many


@dataclass(frozen=True)
class HalfColumns:
    """`chosen` are scores along C of some rows of the pool, which ascend."""

    rows: NDArray[np.int64]
    chosen: NDArray[np.float64]

    @classmethod
    def of_no_rows(cls) -> "HalfColumns":
        return cls(np.empty(0, dtype=np.int64), np.empty(0))

    def among(self, sample: NDArray[np.bool_]) -> NDArray[np.float32]:
        """For each row of the pool; NaN beside the sample."""
        column, inside = np.full(len(sample), np.nan, dtype=np.float32), sample[self.rows]
        column[self.rows[inside]] = self.chosen[inside]
        return column

    def added_to(self, tables: Callable[[], Iterable[pa.Table]]) -> Iterator[pa.Table]:
        start = 0
        for table in tables():
            first, last = np.searchsorted(self.rows, [start, start + len(table)])
            chosen = np.full(len(table), np.nan)
            chosen[self.rows[first:last] - start] = self.chosen[first:last]
            rejected = chosen - table["score"].to_numpy()
            place = 1 + table.column_names.index("loglik")
            for name, values in (("score_rejected", rejected), ("score_chosen", chosen)):
                column = pa.array(values, pa.float64(), from_pandas=True)
                table = table.add_column(place, SHARD.field(name), column)
            start += len(table)
            yield table


def halves_later(config: ScoreConfig, layout: DirectionLayout, rows: int) -> bool:
    """Whether rows of a pool are scored along the half after the choice, and few of them."""
    return layout.halves and rows > SMALL and not (layout.best or config.needs_halves)


def sampled_rows(is_scored: NDArray[np.bool_], seed: int) -> NDArray[np.bool_]:
    (rows,) = np.nonzero(is_scored)
    size = min(max(len(rows) // SHARE, FEWEST), MOST)
    sample = np.random.default_rng(seed).permutation(len(rows))[:size]
    mask = np.zeros(len(is_scored), dtype=bool)
    mask[rows[sample]] = True
    return mask
