"""Comparison: two runs of one pool, and what differs between their choices.

    place(z)    share of the scored rows that stand before z in a ranking: 0 is the best, 1 the worst
    moved(z)    place in A − place in B: above 0, B ranks it higher
    by chance   two choices of a and b of n rows share a·b / n

    prism report RUN_A RUN_B  →  RUN_A/comparison.html

Choices made here: rows are compared where both runs scored them; texts and the columns of a row are
B's."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from prism_select.core.statistics import rank_correlation
from prism_select.report import charts
from prism_select.report.distribution import Cell
from prism_select.report.examples import Row, rows_of
from prism_select.report.facts import opened, options_of
from prism_select.report.page import percent, render, significant
from prism_select.report.scores_table import TAKEN, Columns, columns_of
from prism_select.report.tables import table_of
from prism_select.run.config import sides_of
from prism_select.run.errors import BadOption
from prism_select.run.folder import Run, Store

__all__ = ["Comparison", "Shared", "compared", "write_comparison"]

CONTENTS = {
    "choices": "The choices",
    "rankings": "The rankings",
    "moved": "Examples",
    "options": "What was different",
}


CELLS, MOST, FIRST = 30, 60, 40


SHARES = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5)


Floats: TypeAlias = NDArray[np.float64]


Places: TypeAlias = tuple[Floats, Floats]


@dataclass(frozen=True)
class Shared:
    """Of the best `rows` of either ranking: how many are the same, as a share, and by chance."""

    share: float
    rows: int
    same: float
    chance: float


@dataclass(frozen=True)
class Moved:
    """A row with its places in the rankings of A and B, from 1."""

    row: Row
    rank_a: int
    rank_b: int
    moved: float


@dataclass(frozen=True)
class Comparison:
    """`both`, `only_a` and `only_b` count the rows taken; `sources` has the rows taken by A and by
    B of each."""

    names: tuple[str, str]
    paths: tuple[str, str]
    manifests: tuple[Mapping[str, Any], Mapping[str, Any]]
    rows: int
    correlation: float
    both: int
    only_a: int
    only_b: int
    shared: tuple[Shared, ...]
    cells: tuple[Cell, ...]
    sources: tuple[tuple[str, int, int, int], ...]
    moved: tuple[Moved, ...]
    options: tuple[tuple[str, str, str], ...]

    @property
    def chance(self) -> float:
        """Rows that choices of these sizes share by chance."""
        return (self.both + self.only_a) * (self.both + self.only_b) / max(1, self.rows)


def compared(a: str, b: str) -> Comparison:
    """Raises BadOption for what is no complete run, and where the pools are not the same."""
    runs = opened(a), opened(b)
    manifests = runs[0].manifest, runs[1].manifest
    columns = columns_of(runs[0].path, manifests[0]), columns_of(runs[1].path, manifests[1])
    prints = [manifest["fingerprints"]["pool"] for manifest in manifests]
    if prints[0] != prints[1] or len(columns[0]) != len(columns[1]):
        raise BadOption(f"{a}, {b}: their pools are not the same; compare two runs of one pool")
    known = np.flatnonzero(np.isfinite(columns[0].ranking) & np.isfinite(columns[1].ranking))
    if not len(known):
        raise BadOption(f"{a}, {b}: no row was scored by both; there is nothing to compare")
    places = _places(columns[0]), _places(columns[1])
    taken = columns[0].taken, columns[1].taken
    names = (Path(a).resolve().name, Path(b).resolve().name)
    return Comparison(
        names=names if names[0] != names[1] else (a, b),
        paths=(a, b),
        manifests=manifests,
        rows=len(known),
        correlation=rank_correlation(columns[0].ranking[known], columns[1].ranking[known]),
        both=int((taken[0] & taken[1]).sum()),
        only_a=int((taken[0] & ~taken[1]).sum()),
        only_b=int((taken[1] & ~taken[0]).sum()),
        shared=tuple(_shared(columns, share) for share in SHARES),
        cells=_cells(places, known),
        sources=_sources(columns),
        moved=_moved(runs[1], columns, places, known),
        options=_options(manifests),
    )


def _places(columns: Columns) -> Floats:
    """NaN where a row has no score."""
    found = np.full(len(columns), np.nan)
    found[columns.order] = np.arange(len(columns.order)) / max(1, len(columns.order) - 1)
    return found


def _shared(columns: tuple[Columns, Columns], share: float) -> Shared:
    count = max(1, round(share * min(len(each.order) for each in columns)))
    same = len(np.intersect1d(columns[0].order[:count], columns[1].order[:count]))
    return Shared(share, count, same / count, count / max(len(each.order) for each in columns))


def _cells(places: Places, known: NDArray[np.int64]) -> tuple[Cell, ...]:
    edges = np.linspace(0, 1, CELLS + 1)
    counts = np.histogram2d(places[0][known], places[1][known], (edges, edges))[0]
    return tuple(
        Cell(
            (float(edges[i]), float(edges[i + 1])),
            (float(edges[j]), float(edges[j + 1])),
            int(counts[i, j]),
        )
        for i, j in zip(*np.nonzero(counts), strict=True)
    )


def _sources(columns: tuple[Columns, Columns]) -> tuple[tuple[str, int, int, int], ...]:
    """Name, rows, and rows taken by A and by B; the twenty largest."""
    source = columns[0].source
    count = len(source.names)
    rows, a, b = (
        np.bincount(source.places, weights, count)
        for weights in (np.ones(len(source.places)), columns[0].taken, columns[1].taken)
    )
    return tuple(
        (source.names[i] or "no name", int(rows[i]), int(a[i]), int(b[i]))
        for i in np.argsort(-rows)[:20]
    )


def _moved(
    run: Run, columns: tuple[Columns, Columns], places: Places, known: NDArray[np.int64]
) -> tuple[Moved, ...]:
    """Rows that rose and fell most, and the first of those that one choice has and the other has
    not."""
    moved = places[0] - places[1]
    by = known[np.argsort(-moved[known], kind="stable")]
    groups: dict[int, str] = {}
    for group, rows in {"rose most": by[:MOST], "fell most": by[::-1][:MOST]}.items():
        up = 1 if group == "rose most" else -1
        groups |= {
            int(row): group for row in rows if up * moved[row] > 0 and int(row) not in groups
        }
    for name, ours, theirs in (
        ("only in A", columns[0], columns[1]),
        ("only in B", columns[1], columns[0]),
    ):
        first = [int(row) for row in ours.order if ours.taken[row] and not theirs.taken[row]][
            :FIRST
        ]
        groups |= {row: name for row in first if row not in groups and np.isfinite(moved[row])}
    place = np.full(len(columns[1]), -1)
    place[columns[1].order] = np.arange(len(columns[1].order))
    scored_by = run.manifest.get("scored_by", run.manifest["config"])
    shown = rows_of(
        run.path, columns[1], scored_by, [(group, int(place[row])) for row, group in groups.items()]
    )
    last = max(1, len(columns[0].order) - 1)
    found = [
        Moved(row, round(places[0][row.row] * last) + 1, row.rank, float(moved[row.row]))
        for row in shown
    ]
    return tuple(sorted(found, key=lambda each: -each.moved))


def _options(
    manifests: tuple[Mapping[str, Any], Mapping[str, Any]],
) -> tuple[tuple[str, str, str], ...]:
    """Options that differ, and whether model and target are the same."""
    configs = [options_of(each) for each in manifests]
    names = [
        name
        for name in dict.fromkeys([*configs[0], *configs[1]])
        if name not in ("out", "overwrite")
    ]
    told = [("command", manifests[0]["command"], manifests[1]["command"])]
    told += [
        (name, _text(configs[0].get(name, "")), _text(configs[1].get(name, ""))) for name in names
    ]
    prints = [each["fingerprints"] for each in manifests]
    told += [
        (f"fingerprint of the {name}", prints[0][name], prints[1][name])
        for name in ("model", "target")
    ]
    return tuple((name, a, b) for name, a, b in told if a != b)


def _text(value: object) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value) or "–"


def write_comparison(a: str, b: str, out: str = "") -> Path:
    """Writes RUN_A/comparison.html, or `out`. Raises what `compared` does, and DiskTrouble."""
    told = compared(a, b)
    place = Path(out or Path(a) / "comparison.html")
    Store(str(place.parent)).write(place.name, page_of(told))
    return place


def page_of(told: Comparison) -> bytes:
    chosen = any(manifest["command"] in TAKEN for manifest in told.manifests)
    drawn = [charts.ranks(told.cells, told.names)]
    values = {
        "title": f"PRISM: {told.names[0]} and {told.names[1]}",
        "kind": "comparison of two runs",
        "contents": list(CONTENTS.items()),
        "told": told,
        "chosen": chosen,
        "sentence": sentence(told, chosen),
        "words": words(told),
        "chart": drawn[0],
        "share": percent(told.both / max(1, told.both + told.only_b)),
    }  # fmt: skip
    columns = [
        ("rank_a", "rank in A", "count"),
        ("rank_b", "rank in B", "count"),
        ("moved", "moved", "move"),
    ]
    values_of = [
        {"rank_a": each.rank_a, "rank_b": each.rank_b, "moved": each.moved} for each in told.moved
    ]
    sides = sides_of(bool(told.manifests[1]["score"]["swapped"]))
    table = {
        **table_of([each.row for each in told.moved], sides, columns, values_of),
        "sort": ["moved", True],
    }
    return render("comparison.html", drawn, {"moved": table}, values)


def sentence(told: Comparison, chosen: bool) -> str:
    if not chosen:
        return f"Two rankings of {told.rows:,} rows: rank correlation {significant(told.correlation, 2)}"
    size = told.both + told.only_b
    return (
        f"{told.both:,} of the {size:,} rows in B are in A too, {percent(told.both / max(1, size))}"
    )


def words(told: Comparison) -> str:
    rows = f"over {told.rows:,} rows that both scored"
    found = f"Rank correlation of the two rankings: {significant(told.correlation, 2)}, {rows}."
    if told.manifests[0]["score"]["swapped"] != told.manifests[1]["score"]["swapped"]:
        found += " One is a repair, whose scores point the other way: expect a correlation below 0."
    return found
