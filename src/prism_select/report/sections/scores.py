"""Distribution of the scores: a few hundred numbers for a pool of any size.

    histogram   rows in each bin of the ranking, chosen and not
    source      quantiles of the ranking (5, 25, 50, 75, 95%), rows and chosen rows
    cells       rows by their influence on the rejected and on the chosen answers
    budget      Σ max(score, 0) of the first rows of the ranking / Σ max(score, 0) of all

Choices made here:
- if values reach more than 1.5 times beyond the 0.2% and 99.8% quantiles, bins end at these
  quantiles, and the outer bins count the rows beyond;
- where the bins reach over more than `PEAKED` times the middle half of the values, as with a few
  long rows among many short ones, the axis is symmetric-logarithmic, linear within that half's
  width of 0, and the bins are of one width on it;
- the `SOURCES` largest sources stand by themselves, the others together.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import altair as alt
import numpy as np

from prism_select.report.charts import (
    INK,
    NEGATIVE,
    OTHER,
    SELECTED,
    SURFACE,
    Cell,
    Chart,
    Floats,
    chart_of,
    heat_map,
    inline_data,
    non_empty_cells,
    rule_at,
)
from prism_select.report.formatting import percent
from prism_select.report.run_facts import RunFacts
from prism_select.report.scores_table import Columns
from prism_select.report.sections.section import Section
from prism_select.run.polarity import Polarity

__all__ = ["SECTION", "Budget", "Histogram", "ScoreFacts", "Source", "read"]

BINS, CELLS, SOURCES, POINTS = 60, 40, 12, 160
SHARES = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5)
TAIL, REACH, PEAKED = 0.002, 1.5, 50.0
QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)


@dataclass(frozen=True)
class Histogram:
    """Bin i reaches from edges[i] to edges[i + 1]; `beyond` rows lie outside of all bins and are
    counted in the outer ones. `linear` is the distance from 0 up to which a symmetric-logarithmic
    axis is linear; None where the axis is linear as a whole."""

    edges: tuple[float, ...]
    chosen: tuple[int, ...]
    not_chosen: tuple[int, ...]
    beyond: int
    linear: float | None = None


@dataclass(frozen=True)
class Source:
    """`quantiles` are those of `QUANTILES`."""

    name: str
    rows: int
    chosen: int
    quantiles: tuple[float, ...]

    @property
    def median(self) -> float:
        return self.quantiles[2]


@dataclass(frozen=True)
class Budget:
    """The first `share` of the ranked rows hold `influence` of all positive influence."""

    share: float
    rows: int
    influence: float


@dataclass(frozen=True)
class ScoreFacts:
    """`positive` is the share of scored rows with a score above 0. The influence of `choice` is NaN
    if no row was chosen or no score is positive. `verdict` and `influence` are the run's words for
    chosen rows and for a score above 0."""

    ranked_by: str
    cutoff: float
    verdict: str
    polarity: Polarity
    influence: str
    positive: float
    choice: Budget
    histogram: Histogram
    sources: tuple[Source, ...]
    cells: tuple[Cell, ...]
    curve: tuple[Budget, ...]
    budgets: tuple[Budget, ...]

    @property
    def words(self) -> str:
        words = "A positive score means that training on the row moves the model towards the "
        words += f"{self.polarity.toward} answers; {percent(self.positive)} of the rows have one."
        if not math.isnan(self.choice.influence):
            words += f" The {self.verdict} rows hold {percent(self.choice.influence)} of all "
            words += f"{self.influence} influence."
        return words


def read(run: RunFacts) -> ScoreFacts | None:
    """None if no row has a score."""
    columns = run.columns
    count = len(columns.order)
    if not count:
        return None
    # points of the curve are closer where the budgets are
    points = np.unique(np.round(np.linspace(0, 1, POINTS) ** 2 * count).astype(np.int64))
    total = float(columns.positive_scores.sum()) or math.nan
    first = np.concatenate([[0.0], np.cumsum(columns.positive_scores[columns.order])]) / total
    chosen = int(columns.chosen.sum())
    budgets = [(share, round(share * count)) for share in SHARES]
    return ScoreFacts(
        ranked_by=columns.ranked_by.replace("_", " "),
        cutoff=columns.cutoff,
        verdict=run.verdict,
        polarity=run.polarity,
        influence=run.influence,
        positive=float((columns.score[columns.order] > 0).mean()),
        choice=Budget(chosen / count, chosen, columns.chosen_influence),
        histogram=_histogram(columns),
        sources=tuple(_sources(columns)),
        cells=_cells(columns),
        curve=tuple(Budget(rows / count, rows, float(first[rows])) for rows in points.tolist()),
        budgets=tuple(Budget(share, rows, float(first[rows])) for share, rows in budgets if rows),
    )


def _edges(values: Floats, bins: int) -> Floats:
    low, high = np.quantile(values, [TAIL, 1 - TAIL])
    lowest, highest = float(values.min()), float(values.max())
    if highest - lowest <= REACH * (high - low) or not low < high:
        low, high = lowest, highest
    if not low < high:
        margin = abs(low) * 1e-6 or 1e-6
        low, high = low - margin, high + margin
    return np.linspace(low, high, bins + 1)


def _histogram(columns: Columns) -> Histogram:
    values, chosen = columns.ranking[columns.order], columns.chosen[columns.order]
    edges = _edges(values, min(BINS, max(8, int(2 * len(values) ** 0.5))))
    first, third = np.quantile(values, [0.25, 0.75])
    linear = float(third - first)
    peaked = 0 < PEAKED * linear < edges[-1] - edges[0]
    if peaked:
        low, high = np.arcsinh(edges[[0, -1]] / linear).tolist()
        edges = linear * np.sinh(np.linspace(low, high, len(edges)))
    inside = np.clip(values, edges[0], edges[-1])
    counts = [np.histogram(inside[rows], edges)[0].tolist() for rows in (chosen, ~chosen)]
    beyond = int(((values < edges[0]) | (values > edges[-1])).sum())
    sides = tuple(counts[0]), tuple(counts[1])
    return Histogram(tuple(edges.tolist()), *sides, beyond, linear if peaked else None)


def _sources(columns: Columns) -> Iterator[Source]:
    """The largest first."""
    names, order = columns.source.names, columns.order
    index, values, chosen = (
        columns.source.codes[order],
        columns.ranking[order],
        columns.chosen[order],
    )
    rows = np.bincount(index, minlength=len(names))
    present = [int(source) for source in np.argsort(-rows, kind="stable") if rows[source]]
    size = SOURCES if len(present) != SOURCES + 1 else SOURCES + 1
    groups = [([source], names[source] or "no name") for source in present[:size]]
    if remaining := present[size:]:
        groups.append((remaining, f"{len(remaining)} others"))
    for members, name in groups:
        inside = np.isin(index, members)
        quantiles = np.quantile(values[inside], QUANTILES)
        count = int(chosen[inside].sum())
        yield Source(name, int(inside.sum()), count, tuple(quantiles.tolist()))


def _cells(columns: Columns) -> tuple[Cell, ...]:
    """Empty if no row has a score for either answer."""
    rows = columns.order[np.isfinite(columns.score_chosen[columns.order])]
    if not len(rows):
        return ()
    x, y = columns.score_rejected[rows], columns.score_chosen[rows]
    return non_empty_cells(x, y, (_edges(x, CELLS), _edges(y, CELLS)))


def charts(facts: ScoreFacts) -> list[Chart]:
    drawn = [histogram_chart(facts)]
    if len(facts.sources) > 1:
        drawn.append(source_chart(facts))
    if facts.positive:
        drawn.append(budget_chart(facts))
    if facts.cells:
        drawn.append(answer_chart(facts))
    return drawn


def _cutoff_rule(cutoff: float) -> alt.Chart:
    rule: alt.Chart = rule_at(cutoff, "x", f"cut-off {cutoff:.3g}")
    return rule


def _across(histogram: Histogram, ticks: int) -> dict[str, Any]:
    """Scale and axis of a ranking: with powers of ten where it is symmetric-logarithmic."""
    if histogram.linear is None:
        return {"axis": alt.Axis(tickCount=ticks)}
    ends = max(-histogram.edges[0], 0.0), max(histogram.edges[-1], 0.0)
    first, last = (math.floor(math.log10(value)) for value in (histogram.linear, max(ends)))
    powers = [10.0**power for power in range(first + 1, last + 1)]
    values = (
        [-p for p in powers[::-1] if p <= ends[0]] + [0.0] + [p for p in powers if p <= ends[1]]
    )
    return {
        "axis": alt.Axis(values=values, format="~g", labelOverlap=True),
        "scale": alt.Scale(type="symlog", constant=histogram.linear),
    }


def histogram_chart(facts: ScoreFacts) -> Chart:
    """Rows by their ranking, the chosen apart from the others."""
    histogram, verdict = facts.histogram, facts.verdict
    kinds = {
        verdict or "chosen": histogram.chosen,
        "other rows" if verdict else "rows": histogram.not_chosen,
    }
    rows = [
        {"from": a, "to": b, "rows": count, "kind": kind}
        for kind, counts in kinds.items()
        for (a, b), count in zip(pairwise(histogram.edges), counts, strict=True)
        if count
    ]
    colours = alt.Scale(range=[SELECTED])
    if verdict:
        colours = alt.Scale(domain=list(kinds), range=[SELECTED, OTHER])
    drawn = (
        alt.Chart(inline_data(rows))
        .mark_bar(binSpacing=0.5)
        .encode(
            alt.X("from:Q", bin="binned", title=facts.ranked_by, **_across(histogram, 8)),
            alt.X2("to:Q"),
            alt.Y("rows:Q", title="rows", stack=True, axis=alt.Axis(format="~s", tickMinStep=1)),
            alt.Color("kind:N", scale=colours, legend=alt.Legend(title=None) if verdict else None),
            tooltip=[
                "kind:N",
                alt.Tooltip("rows:Q", format=","),
                *(alt.Tooltip(f"{n}:Q", format=".3g") for n in ("from", "to")),
            ],
        )
    )
    total = sum(histogram.chosen) + sum(histogram.not_chosen)
    low, high = histogram.edges[0], histogram.edges[-1]
    text = f"Histogram of {total:,} rows between {low:.3g} and {high:.3g}"
    caption = "The dashed line is the cut-off."
    if histogram.linear is not None:
        caption += " The axis is logarithmic on either side of 0."
    if histogram.beyond:
        caption += f" The outer bars also count {histogram.beyond:,} rows that lie beyond them."
    if verdict and not math.isnan(facts.cutoff):
        drawn += _cutoff_rule(facts.cutoff)
        text += f"; the cut-off is at {facts.cutoff:.3g}"
    return chart_of("spread", "How the scores are distributed", caption, f"{text}.", drawn, 260)


def source_chart(facts: ScoreFacts) -> Chart:
    """Quantiles of the ranking for each source."""
    quantiles = [f"p{100 * share:.0f}" for share in QUANTILES]
    rows = [
        {
            "source": source.name,
            "rows": source.rows,
            "chosen": source.chosen,
            **dict(zip(quantiles, source.quantiles, strict=True)),
        }
        for source in sorted(facts.sources, key=lambda source: -source.median)
    ]
    axis = alt.Axis(labelLimit=150, domain=False, ticks=False)
    base = alt.Chart(inline_data(rows)).encode(
        alt.Y("source:N", title=None, sort=None, axis=axis),
        tooltip=[
            "source:N",
            *(alt.Tooltip(f"{n}:Q", format=",") for n in ("rows", "chosen")),
            *(alt.Tooltip(f"{n}:Q", format=".3g") for n in quantiles),
        ],
    )
    across = alt.X("p5:Q", title=facts.ranked_by, **_across(facts.histogram, 6))
    line = base.mark_rule(color=OTHER, strokeWidth=2).encode(across, alt.X2("p95:Q"))
    bar = base.mark_bar(color=SELECTED, height=10, cornerRadius=3)
    notch = base.mark_tick(color=SURFACE, thickness=2.5, height=12)
    drawn = line + bar.encode(alt.X("p25:Q"), alt.X2("p75:Q")) + notch.encode(alt.X("p50:Q"))
    if not math.isnan(facts.cutoff):
        drawn += _cutoff_rule(facts.cutoff)
    text = ", ".join(f"{row['source']} {row['p50']:.3g}" for row in rows)
    return chart_of(
        "sources",
        "By source",
        "The line reaches from 5% to 95% of a source's rows, the bar spans its middle half; the "
        "notch is the median.",
        f"Median of each source: {text}.",
        drawn,
        max(90, 26 * len(rows)),
    )


def answer_chart(facts: ScoreFacts) -> Chart:
    """Rows by their influence on either answer of the pairs."""
    cells, side, other = facts.cells, facts.polarity.toward, facts.polarity.away
    axis = alt.Axis(tickCount=6)
    drawn = heat_map(
        cells,
        alt.X("x:Q", bin="binned", title=f"influence on the {other} answers", axis=axis),
        alt.Y("y:Q", bin="binned", title=f"influence on the {side} answers", axis=axis),
        alt.Scale(type="log", domainMin=1, range=[0.15, 1]),
    )
    low = max(min(cell.x[0] for cell in cells), min(cell.y[0] for cell in cells))
    high = min(max(cell.x[1] for cell in cells), max(cell.y[1] for cell in cells))
    if low < high:
        ends = alt.Chart(inline_data([{"x": low, "y": low}, {"x": high, "y": high}]))
        dashed = ends.mark_line(color=INK, strokeDash=[5, 4], strokeWidth=1.5)
        drawn += dashed.encode(alt.X("x:Q"), alt.Y("y:Q"))
    return chart_of(
        "halves",
        "Influence on either answer",
        "The score is the difference of the two: 0 on the dashed diagonal, positive above it. Rows "
        f"high up raise the {side} answers; rows far to the right raise the {other} ones as well.",
        f"Heat map of rows: influence on the {side} answers against influence on the {other} ones. "
        "The score is their difference: 0 on the dashed diagonal, positive above it.",
        drawn,
        260,
    )


def budget_chart(facts: ScoreFacts) -> Chart:
    """Share of all positive influence in the first rows; a point at the choice."""
    of_all, choice = f"of all {facts.influence} influence", facts.choice
    rows = [{"share": b.share, "rows": b.rows, "influence": b.influence} for b in facts.curve]
    across = alt.X(
        "share:Q", title="share of the rows, best first", axis=alt.Axis(format="%", tickCount=6)
    )
    up = alt.Y("influence:Q", title=of_all, axis=alt.Axis(format="%", tickCount=5))
    tips = [alt.Tooltip(f"{name}:Q", format=".1%") for name in ("share", "influence")]
    drawn = (
        alt.Chart(inline_data(rows))
        .mark_line(color=SELECTED, strokeWidth=2.5)
        .encode(across, up, tooltip=[*tips, alt.Tooltip("rows:Q", format=",")])
    )
    steps = facts.curve[:: max(1, len(rows) // 6)]
    text = ", ".join(f"{step.influence:.0%} at {step.share:.0%}" for step in steps)
    text = f"Share {of_all} by share of rows: {text}."
    if not math.isnan(choice.influence):
        point = alt.Chart(inline_data([{"share": choice.share, "influence": choice.influence}]))
        diamond = point.mark_point(
            color=NEGATIVE, filled=True, opacity=1, size=130, shape="diamond"
        )
        drawn += diamond.encode(across, up, tooltip=tips)
        text += f" The choice has {choice.influence:.0%} in {choice.share:.1%} of the rows."
    caption = f"What the first rows hold {of_all}. The diamond is the choice."
    return chart_of("cumulative", "Influence by budget", caption, text, drawn, 260)


SECTION = Section("spread", "Distribution", "How are the scores distributed?", read, charts)
