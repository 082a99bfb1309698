"""Charts: facts → Vega-Lite specifications, by Altair. Nothing is computed here, and no row of a
pool comes in.

Choices made here: colours are CSS variables of the page, so a chart is light, dark or printed as
the page is; blue against orange and steps of opacity can be told apart by colour-blind readers; a
chart fills its column. Each comes with a title and a text that says what it shows to who cannot see
it."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle, islice, pairwise
from typing import Any, TypeAlias

import altair as alt
import numpy as np

from prism_select.report.distribution import Budget, Cell, Histogram, Source
from prism_select.report.facts import Share, Target

__all__ = [
    "Chart",
    "agreement",
    "by_source",
    "cosines",
    "cumulative",
    "curves",
    "forecast",
    "halves",
    "intervals",
    "layers",
    "preferences",
    "ranks",
    "spread",
]

Spec: TypeAlias = dict[str, Any]


TAKEN, OTHER, AGAINST, INK, LINE = (
    "var(--taken)",
    "var(--other)",
    "var(--against)",
    "var(--ink)",
    "var(--line)",
)


SERIES = [
    "var(--taken)",
    "var(--against)",
    "var(--third)",
    "var(--fourth)",
    "var(--fifth)",
    "var(--other)",
]


SHAPES = ["circle", "square", "triangle-up", "diamond", "cross", "triangle-down"]


DASHES = [[1, 0], [6, 3], [2, 2], [8, 3, 2, 3], [4, 4], [1, 3]]


QUANTILES = ("p5", "p25", "p50", "p75", "p95")


TALL, WRITTEN = 220, 12


FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Helvetica Neue', 'Noto Sans', sans-serif"  # as the page's


@dataclass(frozen=True)
class Chart:
    """`text` is read out in place of the picture."""

    name: str
    title: str
    text: str
    spec: Spec


def _made(name: str, title: str, text: str, chart: Any, tall: int | None = TALL) -> Chart:
    sized = chart.properties(
        width="container", autosize=alt.AutoSizeParams(type="fit-x", contains="padding")
    )
    if tall:
        sized = sized.properties(height=tall)
    quiet = {
        "domainColor": LINE,
        "tickColor": LINE,
        "gridColor": LINE,
        "labelColor": INK,
        "titleColor": INK,
    }
    themed = (
        sized.configure(background="transparent", font=FONT, aria=False)
        .configure_view(stroke=None)
        .configure_axis(
            **quiet, titleFontWeight="normal", labelFontSize=12, titleFontSize=12, gridOpacity=0.6
        )
        .configure_legend(
            labelColor=INK,
            titleColor=INK,
            labelFontSize=12,
            titleFontSize=12,
            orient="top",
            title=None,
            columnPadding=16,
        )
    )
    return Chart(name, title, text, themed.to_dict())


def _data(rows: Iterable[Mapping[str, Any]]) -> alt.InlineData:
    return alt.InlineData(values=[dict(row) for row in rows])


def _rule(value: float, axis: str, words: str, dashed: bool = True) -> Any:
    """A line at a value, with its meaning as a tooltip."""
    field = {f"{axis}": alt.X("at:Q") if axis == "x" else alt.Y("at:Q")}
    marked = alt.Chart(_data([{"at": value, "meaning": words}])).mark_rule(
        color=INK, strokeWidth=1.5, strokeDash=[5, 4] if dashed else [1, 0]
    )
    return marked.encode(tooltip=["meaning:N"], **field)


def preferences(target: Target, side: str) -> Chart:
    """How many pairs prefer `side`, in twenty steps of the preference."""
    counts = np.histogram(target.preferences, np.linspace(0, 1, 21))[0].tolist()
    rows = [{"from": i / 20, "to": (i + 1) / 20, "pairs": count} for i, count in enumerate(counts)]
    bars = (
        alt.Chart(_data(rows))
        .mark_bar(color=TAKEN, binSpacing=1)
        .encode(
            alt.X(
                "from:Q",
                bin="binned",
                title=f"preference π for the {side} answer",
                axis=alt.Axis(format=".2~f", values=[0, 0.25, 0.5, 0.75, 1]),
            ),
            alt.X2("to:Q"),
            alt.Y("pairs:Q", title="pairs", axis=alt.Axis(tickMinStep=1)),
            tooltip=[alt.Tooltip(f"{name}:Q", format=".2f") for name in ("from", "to")]
            + [alt.Tooltip("pairs:Q")],
        )
    )
    above = sum(value > 0.5 for value in target.preferences)
    text = f"Histogram of the model's preference before training: {above} of {target.count} pairs lie above one half."
    return _made(
        "preferences", "What the model prefers now", text, bars + _rule(0.5, "x", "no preference")
    )


def agreement(by_pairs: Mapping[str, float | None], half: int | None) -> Chart:
    """Agreement of two disjoint sets of pairs against their size."""
    rows = [
        {"pairs": int(m), "agreement": a}
        for m, a in sorted(by_pairs.items(), key=lambda i: int(i[0]))
        if a
    ]
    line = (
        alt.Chart(_data(rows))
        .mark_line(color=TAKEN, point={"color": TAKEN, "size": 60})
        .encode(
            alt.X(
                "pairs:Q",
                title="pairs in each half",
                axis=alt.Axis(tickCount=5),
                scale=alt.Scale(zero=True),
            ),
            alt.Y(
                "agreement:Q",
                title="agreement (cosine)",
                scale=alt.Scale(domain=[min(0, *_of(rows, "agreement")), 1]),
            ),
            tooltip=["pairs:Q", alt.Tooltip("agreement:Q", format=".2f")],
        )
    )
    told = ", ".join(f"{row['agreement']:.2f} with {row['pairs']}" for row in rows)
    more = f" About {half} pairs would make halves that agree at one half." if half else ""
    return _made("agreement", "Do two halves of the pairs agree?", f"Agreement: {told} pairs in each half.{more}",
                 line + _rule(0.5, "y", "agreement of one half"))  # fmt: skip


def _of(rows: Sequence[Mapping[str, Any]], name: str) -> list[float]:
    return [float(row[name]) for row in rows]


def cosines(names: Sequence[str], values: Sequence[Sequence[float | None]]) -> Chart:
    """How the directions of several targets stand to each other."""
    rows = [
        {"a": a, "b": b, "cosine": value, "size": abs(value or 0.0)}
        for a, line in zip(names, values, strict=True)
        for b, value in zip(names, line, strict=True)
    ]
    base = alt.Chart(_data(rows)).encode(
        alt.X("a:N", title=None, sort=None, axis=alt.Axis(labelAngle=-30)),
        alt.Y("b:N", title=None, sort=None),
    )
    cells = base.mark_rect().encode(
        fill=alt.condition("datum.cosine < 0", alt.value(AGAINST), alt.value(TAKEN)),
        opacity=alt.Opacity(
            "size:Q", scale=alt.Scale(domain=[0, 1], range=[0.08, 0.75]), legend=None
        ),
        tooltip=["a:N", "b:N", alt.Tooltip("cosine:Q", format=".2f")],
    )
    written = base.mark_text(color=INK).encode(text=alt.Text("cosine:Q", format=".2f"))
    chart = cells + written if len(names) <= WRITTEN else cells
    worst = min(
        (
            (v or 0.0, a, b)
            for a, line in zip(names, values, strict=True)
            for b, v in zip(names, line, strict=True)
        )
    )
    lowest, a, b = worst
    text = f"Cosines between the directions of {len(names)} targets; the lowest is {lowest:.2f}, {a} with {b}."
    return _made(
        "cosines", "Do the targets want the same?", text, chart, min(max(120, 36 * len(names)), 640)
    )


def spread(found: Histogram, cutoff: float, by: str, taken: str) -> Chart:
    """Rows by score, those taken apart from the others."""
    kinds = {taken or "taken": found.taken, "other rows" if taken else "rows": found.others}
    rows = [
        {"from": a, "to": b, "rows": count, "kind": kind}
        for kind, counts in kinds.items()
        for (a, b), count in zip(pairwise(found.edges), counts, strict=True)
        if count
    ]
    colours = (
        alt.Scale(domain=list(kinds), range=[TAKEN, OTHER]) if taken else alt.Scale(range=[TAKEN])
    )
    bars = (
        alt.Chart(_data(rows))
        .mark_bar(binSpacing=0.5)
        .encode(
            alt.X("from:Q", bin="binned", title=by.replace("_", " "), axis=alt.Axis(tickCount=8)),
            alt.X2("to:Q"),
            alt.Y("rows:Q", title="rows", stack=True, axis=alt.Axis(format="~s", tickMinStep=1)),
            alt.Color("kind:N", scale=colours, legend=alt.Legend(title=None) if taken else None),
            tooltip=[
                "kind:N",
                alt.Tooltip("rows:Q", format=","),
                *(alt.Tooltip(f"{n}:Q", format=".3g") for n in ("from", "to")),
            ],
        )
    )
    layered = (
        bars + _rule(cutoff, "x", f"cut-off {cutoff:.3g}") if taken and cutoff == cutoff else bars
    )
    total = sum(found.taken) + sum(found.others)
    text = f"Histogram of {total:,} rows between {found.edges[0]:.3g} and {found.edges[-1]:.3g}"
    text += f"; the cut-off is at {cutoff:.3g}." if taken and cutoff == cutoff else "."
    return _made("spread", "How the rows spread", text, layered, 260)


def by_source(found: Sequence[Source], by: str, cutoff: float) -> Chart:
    """Quantiles of the ranking for each source."""
    rows = [
        {
            "source": one.name,
            "rows": one.rows,
            "taken": one.taken,
            **dict(zip(QUANTILES, one.quantiles, strict=True)),
        }
        for one in sorted(found, key=lambda one: -one.quantiles[2])
    ]
    tips: list[Any] = ["source:N", *(alt.Tooltip(f"{n}:Q", format=",") for n in ("rows", "taken"))]
    tips += [alt.Tooltip(f"{n}:Q", format=".3g") for n in ("p5", "p25", "p50", "p75", "p95")]
    axis = alt.Axis(labelLimit=150, domain=False, ticks=False)
    base = alt.Chart(_data(rows)).encode(
        alt.Y("source:N", title=None, sort=None, axis=axis), tooltip=tips
    )
    title = by.replace("_", " ")
    whole = base.mark_rule(color=OTHER, strokeWidth=2).encode(
        alt.X("p5:Q", title=title, axis=alt.Axis(tickCount=6)), alt.X2("p95:Q")
    )
    middle = base.mark_bar(color=TAKEN, height=10, cornerRadius=3).encode(
        alt.X("p25:Q"), alt.X2("p75:Q")
    )
    half = base.mark_tick(color="var(--surface)", thickness=2.5, height=12).encode(alt.X("p50:Q"))
    chart = whole + middle + half
    if cutoff == cutoff:
        chart += _rule(cutoff, "x", f"cut-off {cutoff:.3g}")
    text = (
        "Median of each source: "
        + ", ".join(f"{row['source']} {row['p50']:.3g}" for row in rows)
        + "."
    )
    return _made("sources", "By source", text, chart, max(90, 26 * len(rows)))


def _heat(cells: Sequence[Cell], across: alt.X, up: alt.Y, opacity: alt.Scale) -> alt.Chart:
    """A rectangle for each cell, the darker the more rows it has."""
    rows = [
        {
            "x": cell.rejected[0],
            "x2": cell.rejected[1],
            "y": cell.chosen[0],
            "y2": cell.chosen[1],
            "rows": cell.rows,
        }
        for cell in cells
    ]
    darkness, tip = (
        alt.Opacity("rows:Q", scale=opacity, legend=None),
        alt.Tooltip("rows:Q", format=","),
    )
    chart: alt.Chart = alt.Chart(_data(rows)).mark_rect(color=TAKEN)
    return chart.encode(across, alt.X2("x2:Q"), up, alt.Y2("y2:Q"), darkness, tooltip=[tip])


def halves(cells: Sequence[Cell], sides: tuple[str, str]) -> Chart:
    """Rows by their influence along either half of the direction."""
    axis = alt.Axis(tickCount=6)
    heat = _heat(
        cells,
        alt.X("x:Q", bin="binned", title=f"what raises the {sides[1]} answers", axis=axis),
        alt.Y("y:Q", bin="binned", title=f"what raises the {sides[0]} answers", axis=axis),
        alt.Scale(type="log", domainMin=1, range=[0.15, 1]),
    )
    low = max(min(cell.rejected[0] for cell in cells), min(cell.chosen[0] for cell in cells))
    high = min(max(cell.rejected[1] for cell in cells), max(cell.chosen[1] for cell in cells))
    ends = [{"x": low, "y": low}, {"x": high, "y": high}] if low < high else []
    diagonal = (
        alt.Chart(_data(ends))
        .mark_line(color=INK, strokeDash=[5, 4], strokeWidth=1.5)
        .encode(alt.X("x:Q"), alt.Y("y:Q"))
    )
    text = f"Heat map of rows: influence on the {sides[0]} answers against influence on the {sides[1]} ones. The score is "
    text += "their difference: 0 on the dashed diagonal, positive above it."
    return _made("halves", "Two halves of a score", text, heat + diagonal if ends else heat, 260)


def cumulative(curve: Sequence[Budget], choice: tuple[float, float], influence: str) -> Chart:
    """What the first rows have of all influence above 0; a point at `choice`: its share of the
    rows, and of that."""
    share, bought = choice
    rows = [{"share": each.share, "rows": each.rows, "bought": each.bought} for each in curve]
    across = alt.X(
        "share:Q", title="share of the rows, best first", axis=alt.Axis(format="%", tickCount=6)
    )
    up = alt.Y(
        "bought:Q", title=f"of all {influence} influence", axis=alt.Axis(format="%", tickCount=5)
    )
    tips = [
        alt.Tooltip("share:Q", format=".1%"),
        alt.Tooltip("bought:Q", format=".1%"),
        alt.Tooltip("rows:Q", format=","),
    ]
    line = (
        alt.Chart(_data(rows))
        .mark_line(color=TAKEN, strokeWidth=2.5)
        .encode(across, up, tooltip=tips)
    )
    text = f"Share of all {influence} influence by share of rows: " + ", ".join(
        f"{row['bought']:.0%} at {row['share']:.0%}" for row in rows[:: max(1, len(rows) // 6)]
    )
    if bought != bought:
        return _made("cumulative", "What a budget buys", text + ".", line, 260)
    point = alt.Chart(_data([{"share": share, "bought": bought}])).mark_point(
        color=AGAINST, filled=True, opacity=1, size=130, shape="diamond"
    )
    chart = line + point.encode(across, up, tooltip=tips[:2])
    return _made(
        "cumulative",
        "What a budget buys",
        f"{text}. The choice has {bought:.0%} in {share:.1%} of the rows.",
        chart,
        260,
    )


def layers(shares: Sequence[Share]) -> Chart:
    """The direction's squared norm, by part of the network; each bar is made of the kinds of its
    weights."""
    order = list(dict.fromkeys(share.part for share in shares))
    by_kind: dict[str, float] = {}
    for share in shares:
        by_kind[share.kind] = by_kind.get(share.kind, 0.0) + share.share
    named = sorted(by_kind, key=lambda kind: -by_kind[kind])[: len(SERIES) - 1]
    found: dict[tuple[str, str], float] = {}
    for share in shares:
        key = (share.part, share.kind if share.kind in named else "other kinds")
        found[key] = found.get(key, 0.0) + share.share
    rows: list[dict[str, Any]] = [
        {"part": part, "kind": kind, "share": value} for (part, kind), value in found.items()
    ]
    kinds = [
        *named,
        *(["other kinds"] if any(row["kind"] == "other kinds" for row in rows) else []),
    ]
    bars = (
        alt.Chart(_data(rows))
        .mark_bar(stroke="var(--surface)", strokeWidth=0.5)
        .encode(
            alt.Y("part:N", sort=order, title=None, axis=alt.Axis(domain=False, ticks=False)),
            alt.X(
                "share:Q",
                title="of the direction's squared norm",
                axis=alt.Axis(format="%", tickCount=6),
            ),
            alt.Color(
                "kind:N",
                scale=alt.Scale(domain=kinds, range=SERIES[: len(kinds)]),
                legend=alt.Legend(columns=2),
            ),
            tooltip=["part:N", "kind:N", alt.Tooltip("share:Q", format=".1%")],
        )
    )
    sums = {part: sum(row["share"] for row in rows if row["part"] == part) for part in order}
    text = (
        "Share of the direction: "
        + ", ".join(f"{part} {value:.0%}" for part, value in sums.items())
        + "."
    )
    return _made(
        "layers",
        "Where the direction lies",
        text,
        bars,
        max(90, (24 if len(order) <= 24 else 15) * len(order)),
    )


def intervals(against: Mapping[str, Mapping[str, Any]]) -> Chart:
    """The choice minus each rival: the gain, with its interval."""
    names = {"none": "no training", "random-priced": "random for the price of scoring"}
    rows = [
        {"rival": names.get(name, name), "words": each["words"], **each["gain"]}
        for name, each in against.items()
    ]
    axis = alt.Axis(domain=False, ticks=False, labelLimit=170)
    base = alt.Chart(_data(rows)).encode(
        alt.Y("rival:N", title=None, sort=None, axis=axis), tooltip=["rival:N", "words:N"]
    )
    title = "prism minus the rival: gain, nats per token"
    bar = base.mark_rule(color=TAKEN, strokeWidth=3).encode(
        alt.X("low:Q", title=title, axis=alt.Axis(tickCount=5)), alt.X2("high:Q")
    )
    dot = base.mark_point(color=TAKEN, filled=True, opacity=1, size=90).encode(
        alt.X("difference:Q")
    )
    text = "; ".join(str(row["words"]) for row in rows) + "."
    return _made(
        "intervals",
        "Against each rival",
        text,
        bar + dot + _rule(0, "x", "as good", dashed=False),
        max(90, 34 * len(rows)),
    )


def curves(points: Sequence[Mapping[str, Any]], measure: str = "gain") -> Chart:
    """Mean over seeds of a measure on the held-out pairs, while each method trains."""
    found: dict[tuple[str, int], list[float]] = {}
    for point in points:
        if not point["method"].startswith("half-"):
            found.setdefault((point["method"], int(point["step"])), []).append(
                float(point[measure])
            )
    rows: list[dict[str, Any]] = [
        {"method": m, "step": step, measure: sum(each) / len(each)}
        for (m, step), each in found.items()
    ]
    methods = list(dict.fromkeys(row["method"] for row in rows))
    colours, dashes = (
        list(islice(cycle(SERIES), len(methods))),
        list(islice(cycle(DASHES), len(methods))),
    )
    legend = alt.Legend(columns=2, symbolType="stroke", title=None)
    line = (
        alt.Chart(_data(rows))
        .mark_line(point={"size": 45}, strokeWidth=2.5)
        .encode(
            alt.X("step:Q", title="steps of training", axis=alt.Axis(tickCount=5)),
            alt.Y(f"{measure}:Q", title=f"{measure} on the held-out pairs", scale=alt.Scale(zero=False)),
            alt.Color("method:N", scale=alt.Scale(domain=methods, range=colours), legend=legend),
            alt.StrokeDash("method:N", scale=alt.Scale(domain=methods, range=dashes), legend=legend),
            tooltip=["method:N", "step:Q", alt.Tooltip(f"{measure}:Q", format=".4f")],
        )
    )  # fmt: skip
    last = {row["method"]: row[measure] for row in rows}
    text = "At the end: " + ", ".join(f"{name} {value:.3f}" for name, value in last.items()) + "."
    return _made("curves", "While training", text, line)


def forecast(methods: Mapping[str, Mapping[str, Any]], correlation: float | None) -> Chart:
    """What scores foretold of each training against what came."""
    rows = [
        {"method": name, "predicted": a, "realised": b}
        for name, each in methods.items()
        if "predicted" in each
        for a, b in zip(each["predicted"], each["realised"], strict=True)
    ]
    names = list(dict.fromkeys(row["method"] for row in rows))
    colours, shapes = (list(islice(cycle(each), len(names))) for each in (SERIES, SHAPES))
    wide = alt.Legend(columns=2)
    dots = (
        alt.Chart(_data(rows))
        .mark_point(filled=True, size=80, opacity=0.85)
        .encode(
            alt.X("predicted:Q", title="predicted: score per token", axis=alt.Axis(tickCount=5)),
            alt.Y("realised:Q", title="realised: change of the gain"),
            alt.Color("method:N", scale=alt.Scale(domain=names, range=colours), title=None, legend=wide),
            alt.Shape("method:N", scale=alt.Scale(domain=names, range=shapes), title=None, legend=wide),
            tooltip=["method:N", alt.Tooltip("predicted:Q", format=".3g"), alt.Tooltip("realised:Q", format=".3g")],
        )
    )  # fmt: skip
    told = "not known" if correlation is None else f"{correlation:+.2f}"
    text = f"Scatter of {len(rows)} trainings: predicted against realised change of the gain, rank correlation {told}."
    return _made("forecast", "Predicted against realised", text, dots)


def ranks(cells: Sequence[Cell], names: tuple[str, str]) -> Chart:
    """Where each row stands in two rankings, as shares from the best (0) to the worst (1)."""
    axis = alt.Axis(format="%", tickCount=5)
    heat = _heat(
        cells,
        alt.X("x:Q", bin="binned", title=f"place in {names[0]}, best first", axis=axis),
        alt.Y(
            "y:Q",
            bin="binned",
            title=f"place in {names[1]}",
            axis=axis,
            scale=alt.Scale(reverse=True),
        ),
        alt.Scale(domainMin=0, range=[0, 1]),
    )
    return _made(
        "ranks",
        "Place in either ranking",
        f"Heat map of the places of rows in {names[0]} and in {names[1]}.",
        heat,
        320,
    )
