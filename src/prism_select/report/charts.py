"""Charts: the style and the pieces shared by all charts of the page.

Each section draws its own charts with Altair: Vega-Lite specifications.

Choices made here:
- colours are CSS variables of the page, so a chart follows the page: light, dark or in print;
- blue against orange and steps of opacity are told apart by colour-blind readers;
- a chart fills its column, and comes with a title, a caption, and a text for screen readers;
- no chart holds a row of the pool: rows are counted first.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle, islice
from typing import Any, TypeAlias

import altair as alt
import numpy as np
from numpy.typing import NDArray

__all__ = [
    "DASHES",
    "INK",
    "MUTED",
    "NEGATIVE",
    "OTHER",
    "SELECTED",
    "SERIES",
    "SHAPES",
    "SURFACE",
    "Cell",
    "Chart",
    "Floats",
    "Interval",
    "chart_of",
    "cycled",
    "heat_map",
    "inline_data",
    "non_empty_cells",
    "rule_at",
]

Floats: TypeAlias = NDArray[np.float64]
Interval: TypeAlias = tuple[float, float]

SELECTED, OTHER, NEGATIVE = "var(--selected)", "var(--other)", "var(--negative)"
INK, LINE, SURFACE = "var(--ink)", "var(--line)", "var(--surface)"
MUTED = "var(--soft)"
SERIES = [SELECTED, NEGATIVE, "var(--third)", "var(--fourth)", "var(--fifth)", OTHER]
SHAPES = ["circle", "square", "triangle-up", "diamond", "cross", "triangle-down"]
DASHES = [[1, 0], [6, 3], [2, 2], [8, 3, 2, 3], [4, 4], [1, 3]]
HEIGHT = 220
FONT = (  # that of the page
    "system-ui, -apple-system, 'Segoe UI', Roboto, 'Helvetica Neue', 'Noto Sans', sans-serif"
)


@dataclass(frozen=True)
class Chart:
    """`name` is unique on a page; `text` is read out in place of the picture."""

    name: str
    title: str
    caption: str
    text: str
    spec: dict[str, Any]


@dataclass(frozen=True)
class Cell:
    """A rectangle of a heat map, and how many rows lie in it."""

    x: Interval
    y: Interval
    rows: int


def chart_of(
    name: str, title: str, caption: str, text: str, drawn: Any, height: int = HEIGHT
) -> Chart:
    """A chart in the style of the page; `drawn` is Altair's."""
    fit = alt.AutoSizeParams(type="fit-x", contains="padding")
    lines = {"domainColor": LINE, "tickColor": LINE, "gridColor": LINE}
    words = {"labelColor": INK, "titleColor": INK, "labelFontSize": 12, "titleFontSize": 12}
    styled = (
        drawn.properties(width="container", height=height, autosize=fit)
        .configure(background="transparent", font=FONT, aria=False)
        .configure_view(stroke=None)
        .configure_axis(**lines, **words, titleFontWeight="normal", gridOpacity=0.6)
        .configure_legend(**words, orient="top", title=None, columnPadding=16)
    )
    return Chart(name, title, caption, text, styled.to_dict())


def inline_data(rows: Iterable[Mapping[str, Any]]) -> alt.InlineData:
    return alt.InlineData(values=[dict(row) for row in rows])


def cycled(values: Sequence[Any], names: Sequence[str]) -> list[Any]:
    """A colour, shape or dash for each name; they repeat after the last."""
    return list(islice(cycle(values), len(names)))


def rule_at(value: float, axis: str, meaning: str, dashed: bool = True) -> Any:
    """A line at a value of the axis x or y, with its meaning as a tooltip."""
    channel = {axis: alt.X("at:Q") if axis == "x" else alt.Y("at:Q")}
    line = alt.Chart(inline_data([{"at": value, "meaning": meaning}])).mark_rule(
        color=INK, strokeWidth=1.5, strokeDash=[5, 4] if dashed else [1, 0]
    )
    return line.encode(tooltip=["meaning:N"], **channel)


def non_empty_cells(x: Floats, y: Floats, edges: tuple[Floats, Floats]) -> tuple[Cell, ...]:
    """Rows of each cell between the edges across and up; outer cells also count rows beyond."""
    inside = [np.clip(values, e[0], e[-1]) for values, e in zip((x, y), edges, strict=True)]
    counts = np.histogram2d(inside[0], inside[1], edges)[0]
    across, up = (line.tolist() for line in edges)
    return tuple(
        Cell((across[i], across[i + 1]), (up[j], up[j + 1]), int(counts[i, j]))
        for i, j in zip(*np.nonzero(counts), strict=True)
    )


def heat_map(cells: Sequence[Cell], across: alt.X, up: alt.Y, opacity: alt.Scale) -> Any:
    """A rectangle for each cell, the darker the more rows it has; axes read x:Q and y:Q."""
    rows = [
        {"x": cell.x[0], "x2": cell.x[1], "y": cell.y[0], "y2": cell.y[1], "rows": cell.rows}
        for cell in cells
    ]
    return (
        alt.Chart(inline_data(rows))
        .mark_rect(color=SELECTED)
        .encode(
            across,
            alt.X2("x2:Q"),
            up,
            alt.Y2("y2:Q"),
            alt.Opacity("rows:Q", scale=opacity, legend=None),
            tooltip=[alt.Tooltip("rows:Q", format=",")],
        )
    )
