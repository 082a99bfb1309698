"""Examples: rows of the pool with their scores and texts.

    top                  the first rows of the ranking
    around the cut-off   rows on either side of the last chosen one
    bottom               the last rows of the ranking

Choices made here: a pool of up to `ALL` scored rows is shown in full.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from prism_select.report.pool_rows import PoolRow, pool_rows
from prism_select.report.run_facts import RunFacts, scoring_options
from prism_select.report.scores_table import Columns
from prism_select.report.sections.section import Section
from prism_select.report.tables import Column, Table, table_of_rows
from prism_select.run.polarity import Polarity

__all__ = ["BESIDE", "BOTTOM", "SECTION", "TOP", "ExampleFacts", "read", "shown_ranks"]

ALL, TOP, BESIDE, BOTTOM = 400, 120, 60, 80

TOP_ROWS, NEAR_ROWS, BOTTOM_ROWS = "top", "around the cut-off", "bottom"
LOWER_ROWS = "below the cut-off"


@dataclass(frozen=True)
class ExampleFacts:
    rows: tuple[PoolRow, ...]
    ranked_by: str
    polarity: Polarity

    @property
    def words(self) -> str:
        groups = list(dict.fromkeys(row.group for row in self.rows))
        words = f"{len(self.rows)} rows of the ranking: {', '.join(groups)}."
        if set(groups) <= {TOP_ROWS, LOWER_ROWS}:
            words = f"All {len(self.rows)} scored rows."
        words += " Open a row to read its text"
        if any(row.token_scores for row in self.rows):
            words += ", with supervised tokens coloured by what each adds to the score"
        return f"{words}."


def read(run: RunFacts) -> ExampleFacts | None:
    """None if no row has a score."""
    columns = run.columns
    shown = shown_ranks(columns)
    rows = pool_rows(run.path, columns, scoring_options(run.manifest), shown)
    return ExampleFacts(tuple(rows), columns.ranked_by, run.polarity) if rows else None


def shown_ranks(columns: Columns) -> list[tuple[str, int]]:
    """Group and rank, from 0, of each row to show, in the order of the ranking."""
    count = len(columns.order)
    chosen = np.flatnonzero(columns.chosen[columns.order])
    last = int(chosen[-1]) if len(chosen) else -1
    if count <= ALL:
        return [
            (TOP_ROWS if rank <= last or last < 0 else LOWER_ROWS, rank) for rank in range(count)
        ]
    groups = dict.fromkeys(range(count - BOTTOM, count), BOTTOM_ROWS)
    if last >= 0:
        around = range(max(0, last - BESIDE + 1), min(count, last + BESIDE + 1))
        groups |= dict.fromkeys(around, NEAR_ROWS)
    groups |= dict.fromkeys(range(TOP), TOP_ROWS)
    return [(groups[rank], rank) for rank in sorted(groups)]


def tables(facts: ExampleFacts) -> Mapping[str, Table]:
    name = facts.ranked_by
    columns = [Column("rank", "rank", "count"), Column(name, name.replace("_", " "), "score")]
    values = [{name: row.ranking} for row in facts.rows]
    table = table_of_rows(facts.rows, facts.polarity, columns, values, sort=("rank", False))
    return {"examples": table}


SECTION = Section("examples", "Examples", "Which examples?", read, tables=tables)
