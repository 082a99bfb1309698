"""Comparison: two runs of one pool, and the differences between their choices.

    position(z)   share of the scored rows with a better rank than z: 0 is the best, 1 the worst
    moved(z)      position in A − position in B: above 0, B ranks it higher
    by chance     two choices of a and b of n rows share a·b / n

    prism report RUN_A RUN_B  →  RUN_A/comparison.html

Choices made here:
- only rows with scores of both runs are compared;
- texts and the columns of a row come from B.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import altair as alt
import numpy as np
from numpy.typing import NDArray

from prism_select.core.statistics import rank_correlation
from prism_select.report.charts import (
    Cell,
    Chart,
    Floats,
    chart_of,
    heat_map,
    non_empty_cells,
)
from prism_select.report.formatting import percent, significant
from prism_select.report.page import render
from prism_select.report.pool_rows import PoolRow, pool_rows
from prism_select.report.run_facts import (
    RunFacts,
    effective_options,
    read_run_facts,
    scoring_options,
)
from prism_select.report.scores_table import Columns
from prism_select.report.tables import Column, Table, table_of_rows
from prism_select.run.errors import BadOption
from prism_select.run.folder import Store

__all__ = ["BestRows", "Comparison", "MovedRow", "SourceRows", "compare", "write_comparison"]

CONTENTS = {
    "choices": "The choices",
    "rankings": "The rankings",
    "moved": "Examples",
    "options": "What was different",
}
CELLS, MOVED, EXCLUSIVE, SOURCES = 30, 60, 40, 20
SHARES = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5)

ColumnPair: TypeAlias = tuple[Columns, Columns]
Rows: TypeAlias = NDArray[np.int64]


@dataclass(frozen=True)
class BestRows:
    """Of the best `rows` of each ranking: the share in both, and the share expected by chance."""

    share: float
    rows: int
    shared: float
    chance: float


@dataclass(frozen=True)
class SourceRows:
    """Rows of a source, and those chosen by A and by B."""

    name: str
    rows: int
    chosen_a: int
    chosen_b: int


@dataclass(frozen=True)
class MovedRow:
    """A row with its ranks in A and B, from 1."""

    row: PoolRow
    rank_a: int
    rank_b: int
    moved: float


@dataclass(frozen=True)
class Comparison:
    """`rows` were scored by both; `shared`, `only_a` and `only_b` count the chosen rows; `options`
    have different values in A and B."""

    names: tuple[str, str]
    runs: tuple[RunFacts, RunFacts]
    rows: int
    correlation: float
    shared: int
    only_a: int
    only_b: int
    best: tuple[BestRows, ...]
    cells: tuple[Cell, ...]
    sources: tuple[SourceRows, ...]
    moved: tuple[MovedRow, ...]
    options: tuple[tuple[str, str, str], ...]

    @property
    def chance(self) -> float:
        """Rows shared by two random choices of these sizes."""
        return (self.shared + self.only_a) * (self.shared + self.only_b) / max(1, self.rows)

    @property
    def chosen(self) -> bool:
        """Whether a run made a choice."""
        return any(run.verdict for run in self.runs)

    @property
    def sentence(self) -> str:
        """The heading of the page."""
        size = self.shared + self.only_b
        if self.chosen:
            share = percent(self.shared / max(1, size))
            return f"{self.shared:,} of the {size:,} rows in B are in A too, {share}"
        correlation = significant(self.correlation, 2)
        return f"Two rankings of {self.rows:,} rows: rank correlation {correlation}"

    @property
    def words(self) -> str:
        words = f"The rank correlation of the two rankings is {significant(self.correlation, 2)}, "
        words += f"over {self.rows:,} rows that both runs scored."
        if self.runs[0].polarity != self.runs[1].polarity:
            words += " One run is a repair, whose scores point the other way: expect a correlation "
            words += "below 0."
        return words


def compare(a: str, b: str) -> Comparison:
    """Raises BadOption without a complete run at a path, and for two different pools."""
    runs = read_run_facts(a), read_run_facts(b)
    columns = runs[0].columns, runs[1].columns
    pools = [run.manifest["fingerprints"]["pool"] for run in runs]
    if pools[0] != pools[1] or len(columns[0]) != len(columns[1]):
        raise BadOption(f"{a}, {b}: their pools are not the same; compare two runs of one pool")
    scored = np.flatnonzero(np.isfinite(columns[0].ranking) & np.isfinite(columns[1].ranking))
    if not len(scored):
        raise BadOption(f"{a}, {b}: no row was scored by both; there is nothing to compare")
    positions = _positions(columns[0]), _positions(columns[1])
    chosen = columns[0].chosen, columns[1].chosen
    names = Path(a).resolve().name, Path(b).resolve().name
    edges = np.linspace(0, 1, CELLS + 1)
    return Comparison(
        names=names if names[0] != names[1] else (a, b),
        runs=runs,
        rows=len(scored),
        correlation=rank_correlation(columns[0].ranking[scored], columns[1].ranking[scored]),
        shared=int((chosen[0] & chosen[1]).sum()),
        only_a=int((chosen[0] & ~chosen[1]).sum()),
        only_b=int((chosen[1] & ~chosen[0]).sum()),
        best=tuple(_best_rows(columns, share) for share in SHARES),
        cells=non_empty_cells(positions[0][scored], positions[1][scored], (edges, edges)),
        sources=tuple(_source_rows(columns)),
        moved=_moved_rows(runs, positions, scored),
        options=_different_options(runs),
    )


def _positions(columns: Columns) -> Floats:
    """NaN where a row has no score."""
    positions = np.full(len(columns), np.nan)
    positions[columns.order] = np.arange(len(columns.order)) / max(1, len(columns.order) - 1)
    return positions


def _best_rows(columns: ColumnPair, share: float) -> BestRows:
    a, b = columns[0].order, columns[1].order
    count = max(1, round(share * min(len(a), len(b))))
    shared = len(np.intersect1d(a[:count], b[:count]))
    return BestRows(share, count, shared / count, count / max(len(a), len(b)))


def _source_rows(columns: ColumnPair) -> Iterator[SourceRows]:
    """The largest sources first."""
    source = columns[0].source
    rows, a, b = (
        np.bincount(source.codes, weights, len(source.names))
        for weights in (np.ones(len(source.codes)), columns[0].chosen, columns[1].chosen)
    )
    for i in np.argsort(-rows)[:SOURCES]:
        yield SourceRows(source.names[i] or "no name", int(rows[i]), int(a[i]), int(b[i]))


def _moved_rows(
    runs: tuple[RunFacts, RunFacts], positions: tuple[Floats, Floats], scored: Rows
) -> tuple[MovedRow, ...]:
    """Rows that rose and fell most, and the first rows chosen by one run only."""
    columns, moved = (runs[0].columns, runs[1].columns), positions[0] - positions[1]
    ranks = np.full(len(columns[1]), -1)
    ranks[columns[1].order] = np.arange(len(columns[1].order))
    groups = _groups(columns, moved, scored)
    shown = [(group, int(ranks[row])) for row, group in groups.items()]
    rows = pool_rows(runs[1].path, columns[1], scoring_options(runs[1].manifest), shown)
    last = max(1, len(columns[0].order) - 1)
    moved_rows = [
        MovedRow(row, round(positions[0][row.row] * last) + 1, row.rank, float(moved[row.row]))
        for row in rows
    ]
    return tuple(sorted(moved_rows, key=lambda row: -row.moved))


def _groups(columns: ColumnPair, moved: Floats, scored: Rows) -> dict[int, str]:
    """Why each row is shown, by row."""
    rising = scored[np.argsort(-moved[scored], kind="stable")]
    groups = {int(row): "rose most" for row in rising[:MOVED] if moved[row] > 0}
    fallen = (int(row) for row in rising[::-1][:MOVED] if moved[row] < 0)
    groups |= {row: "fell most" for row in fallen if row not in groups}
    for group, ours, theirs in (
        ("only in A", columns[0], columns[1]),
        ("only in B", columns[1], columns[0]),
    ):
        exclusive = ours.order[ours.chosen[ours.order] & ~theirs.chosen[ours.order]]
        for row in exclusive[:EXCLUSIVE].tolist():
            if np.isfinite(moved[row]):
                groups.setdefault(row, group)
    return groups


def _different_options(runs: tuple[RunFacts, RunFacts]) -> tuple[tuple[str, str, str], ...]:
    """Also the command, the model and the target."""
    tables = [_options_and_fingerprints(run.manifest) for run in runs]
    names = dict.fromkeys([*tables[0], *tables[1]])
    values = [(name, tables[0].get(name, "–"), tables[1].get(name, "–")) for name in names]
    return tuple((name, a, b) for name, a, b in values if a != b)


def _options_and_fingerprints(manifest: Mapping[str, Any]) -> dict[str, str]:
    options = effective_options(manifest)
    shown = {n: _written(v) for n, v in options.items() if n not in ("out", "overwrite")}
    prints = manifest["fingerprints"]
    return {
        "command": manifest["command"],
        **shown,
        **{f"fingerprint of the {name}": prints[name] for name in ("model", "target")},
    }


def _written(value: object) -> str:
    if isinstance(value, list | tuple):
        return ", ".join(map(str, value)) or "–"
    return "–" if value in ("", None) else str(value)


def write_comparison(a: str, b: str, out: str | None = None) -> Path:
    """Writes RUN_A/comparison.html, or `out`. Raises the errors of `compare`, and
    DiskTrouble when the page cannot be written."""
    page = page_of(compare(a, b))
    file = Path(out or Path(a) / "comparison.html")
    Store(str(file.parent)).write(file.name, page)
    return file


def page_of(comparison: Comparison) -> bytes:
    chart = rank_chart(comparison)
    values = {
        "title": f"PRISM: {comparison.names[0]} and {comparison.names[1]}",
        "kind": "comparison of two runs",
        "contents": list(CONTENTS.items()),
        "comparison": comparison,
        "chart": chart,
    }
    return render("comparison.html", [chart], {"moved": moved_table(comparison)}, values)


def rank_chart(comparison: Comparison) -> Chart:
    """Positions of each row in the two rankings."""
    a, b = comparison.names
    axis = alt.Axis(format="%", tickCount=5)
    reverse = alt.Scale(reverse=True)
    return chart_of(
        "ranks",
        "Position in each ranking",
        "The best rows are at the upper left. Rows on the falling diagonal rank the same; above it "
        "B ranks them higher.",
        f"Heat map of the positions of rows in {a} and in {b}.",
        heat_map(
            comparison.cells,
            alt.X("x:Q", bin="binned", title=f"position in {a}, best first", axis=axis),
            alt.Y("y:Q", bin="binned", title=f"position in {b}", axis=axis, scale=reverse),
            alt.Scale(domainMin=0, range=[0, 1]),
        ),
        320,
    )


def moved_table(comparison: Comparison) -> Table:
    """The largest rise comes first."""
    columns = [
        Column("rank_a", "rank in A", "count"),
        Column("rank_b", "rank in B", "count"),
        Column("moved", "moved", "move"),
    ]
    values = [
        {"rank_a": moved.rank_a, "rank_b": moved.rank_b, "moved": moved.moved}
        for moved in comparison.moved
    ]
    rows = [moved.row for moved in comparison.moved]
    return table_of_rows(rows, comparison.runs[1].polarity, columns, values, sort=("moved", True))
