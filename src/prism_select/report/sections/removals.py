"""Removals: a repair at several shares of removed rows, as part of the findings of training.

    before      the model as it is               after     trained on every scored row
    repaired    trained without the share of rows that the ranking puts first

Choices made here:
- the best share is that of the highest gain; its interval does not know that it was picked.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import altair as alt

from prism_select.report.charts import Chart, chart_of, inline_data, rule_at
from prism_select.report.checks import State, interval_state
from prism_select.report.evaluation import Evaluation, Method, RemovalPoint
from prism_select.report.formatting import percent, significant
from prism_select.report.sections.method_looks import method_looks

__all__ = ["RemovalFacts", "RemovalRow", "read_removals", "removal_charts"]

SHOWN_TASKS = 4  # in charts and in the table


@dataclass(frozen=True)
class RemovalRow:
    """The model before training, or after training without some rows; texts of the table."""

    name: str
    rows: str
    measures: Method | RemovalPoint
    tasks: tuple[float, ...]
    over_random: str


@dataclass(frozen=True)
class RemovalFacts:
    """`state` and `words` are the verdict on the best share."""

    state: State
    words: str
    tasks: tuple[str, ...]
    rows: tuple[RemovalRow, ...]
    charts: tuple[str, ...]


def read_removals(evaluation: Evaluation) -> RemovalFacts | None:
    """None if rows were removed at one share alone, that of the run."""
    if not evaluation.removals:
        return None
    state, words = _verdict(evaluation)
    tasks = _tasks(evaluation)
    before = _before(evaluation)
    first = RemovalRow("before training", "–", before, _means(before, tasks), "–")
    return RemovalFacts(
        state=state,
        words=words,
        tasks=tasks,
        rows=(first, *(_row(point, tasks) for point in _line(evaluation, "prism"))),
        charts=tuple(f"removals-{number}" for number in range(1 + len(tasks))),
    )


def _verdict(evaluation: Evaluation) -> tuple[State, str]:
    after, *points = _line(evaluation, "prism")
    best = max(points, key=lambda point: point.gain)
    before = _before(evaluation)
    which = "is best" if len(points) > 1 else "was tried"
    words = (
        f"The repair {which} without {percent(best.removed)} of the rows: gain "
        f"{significant(best.gain)}, after {significant(after.gain)} with all rows and "
        f"{significant(before.gain)} before training. "
    )
    over = best.over_random or (0.0, 0.0, 0.0)
    state = interval_state(over[1], over[2])
    interval = _interval(best)
    if all(interval_state(*(p.over_random or over)[1:]) == "review" for p in points):
        return state, f"{words}No share has an interval over random removal that excludes 0."
    verb = {"holds": "excludes", "failed": "is below"}.get(state, "contains")
    return state, f"{words}Its interval over random removal, {interval}, {verb} 0."


def _line(evaluation: Evaluation, method: str) -> list[RemovalPoint]:
    """The points of one ranking, from all rows on."""
    return [point for point in evaluation.removals if point.method in ("everything", method)]


def _before(evaluation: Evaluation) -> Method:
    return next(method for method in evaluation.methods if method.name == "none")


def _tasks(evaluation: Evaluation) -> tuple[str, ...]:
    return tuple(evaluation.removals[0].tasks)[:SHOWN_TASKS]


def _means(before: Method, tasks: Sequence[str]) -> tuple[float, ...]:
    return tuple(before.tasks[task][0] for task in tasks)


def _row(point: RemovalPoint, tasks: Sequence[str]) -> RemovalRow:
    return RemovalRow(
        name=f"{percent(point.removed)} removed" if point.removed else "all rows",
        rows=f"{point.rows:,}",
        measures=point,
        tasks=tuple(point.tasks[task] for task in tasks),
        over_random=_interval(point) if point.over_random else "–",
    )


def _interval(point: RemovalPoint) -> str:
    difference, low, high = (significant(value, 2) for value in point.over_random or (0, 0, 0))
    return f"{difference} [{low}, {high}]"


def removal_charts(evaluation: Evaluation) -> list[Chart]:
    """The gain, and each of the first tasks."""
    if not evaluation.removals:
        return []
    before = _before(evaluation)
    gains = [point.gain for point in evaluation.removals]
    charts = [_chart(evaluation, 0, "gain on the held-out pairs", gains, before.gain)]
    for number, task in enumerate(_tasks(evaluation), start=1):
        values = [point.tasks[task] for point in evaluation.removals]
        charts.append(_chart(evaluation, number, task, values, before.tasks[task][0]))
    return charts


def _chart(
    evaluation: Evaluation, number: int, measure: str, values: Sequence[float], before: float
) -> Chart:
    """A line for each ranking over the share that was removed; all start with all rows."""
    valued = list(zip(evaluation.removals, values, strict=True))
    names = [name for name in dict.fromkeys(p.method for p, _ in valued) if name != "everything"]
    rows = [
        {"method": name, "removed": point.removed, "value": value, "rows": point.rows}
        for name in names
        for point, value in valued
        if point.method in (name, "everything")
    ]
    shares = sorted({point.removed for point, _ in valued})
    legend = alt.Legend(columns=2, symbolType="stroke", title=None)
    looks = method_looks(evaluation, names)
    line = (
        alt.Chart(inline_data(rows))
        .mark_line(point={"size": 45}, strokeWidth=2.5)
        .encode(
            alt.X(
                "removed:Q",
                title="share of rows removed",
                axis=alt.Axis(format="~%", values=shares),
            ),
            alt.Y("value:Q", title=measure, scale=alt.Scale(zero=False)),
            alt.Color("method:N", scale=looks.colours, legend=legend),
            alt.StrokeDash("method:N", scale=looks.dashes, legend=legend),
            tooltip=[
                "method:N",
                alt.Tooltip("removed:Q", format=".3~%"),
                alt.Tooltip("rows:Q", title="rows kept"),
                alt.Tooltip("value:Q", title=measure, format=".4f"),
            ],
        )
    )
    title = "Without a share of the rows" if number == 0 else measure
    text = "; ".join(
        f"{name} "
        + ", ".join(f"{percent(p.removed)} {v:.3f}" for p, v in valued if p.method == name)
        for name in names
    )
    note = "Mean over seeds. The level line is the model before training."
    if len(shares) > 2:
        note += " The best share was picked on these questions, so it looks better than it is."
    return chart_of(
        f"removals-{number}",
        title,
        note,
        f"{measure} before training {before:.3f}, with all rows {valued[0][1]:.3f}; without a "
        f"share of the rows: {text}.",
        line + rule_at(before, "y", f"before training: {before:.4f}"),
    )
