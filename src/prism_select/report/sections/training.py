"""Training: the findings of `prism evaluate`, from trainings on the choice and on its baselines.

Choices made here: an interval with 0 inside shows no gain.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from statistics import fmean

import altair as alt

from prism_select.report.charts import (
    SELECTED,
    Chart,
    chart_of,
    inline_data,
    rule_at,
)
from prism_select.report.checks import State, interval_state
from prism_select.report.evaluation import Baseline, ControlResult, Evaluation, Method
from prism_select.report.formatting import significant
from prism_select.report.run_facts import RunFacts
from prism_select.report.sections.method_looks import method_looks
from prism_select.report.sections.removals import RemovalFacts, read_removals, removal_charts
from prism_select.report.sections.section import Section

__all__ = ["SECTION", "MethodRow", "TrainingFacts", "Verdict", "read"]

NAMES = {"none": "no training", "random-priced": "random for the price of scoring"}


@dataclass(frozen=True)
class Verdict:
    """On the choice against one baseline."""

    state: State
    words: str


@dataclass(frozen=True)
class MethodRow:
    """The name of a method in the table, its mean number of rows, and its measures."""

    name: str
    rows: str
    measures: Method


@dataclass(frozen=True)
class TrainingFacts:
    words: str
    evaluation: Evaluation
    methods: tuple[MethodRow, ...]
    verdicts: tuple[Verdict, ...]
    removals: RemovalFacts | None
    controls: tuple[ControlResult, ...]
    figures: tuple[tuple[str, str], ...]


def read(run: RunFacts) -> TrainingFacts | None:
    """None if there is no evaluation."""
    evaluation = run.evaluation
    if evaluation is None:
        return None
    return TrainingFacts(
        words=_words(evaluation),
        evaluation=evaluation,
        methods=tuple(map(_method_row, evaluation.methods)),
        verdicts=tuple(map(_verdict, evaluation.baselines)),
        removals=read_removals(evaluation),
        controls=tuple(
            ControlResult(control.name, control.holds, _found(control.words))
            for control in evaluation.controls
        ),
        figures=tuple(_figures(evaluation)),
    )


def _found(words: str) -> str:
    """What a control measured: without its name and verdict, which stand beside it."""
    return words.partition(": ")[2].removeprefix("holds, ").removeprefix("FAILED, ")


def _words(evaluation: Evaluation) -> str:
    words = f"Each training took {evaluation.steps} steps at a rate of {evaluation.rate:g}, with "
    words += "one seed" if evaluation.seeds == 1 else f"{evaluation.seeds} seeds"
    words += f". All were asked {evaluation.pairs} held-out pairs"
    if evaluation.several_answers:
        words += f" of {evaluation.questions} questions"
    if evaluation.pairs_left_out:
        words += f"; {evaluation.pairs_left_out} that the run has seen were left out"
    return f"{words}."


def _method_row(method: Method) -> MethodRow:
    name = "before training" if method.name == "none" else method.name
    return MethodRow(name, f"{fmean(method.rows):,.0f}" if method.rows else "–", method)


def _verdict(baseline: Baseline) -> Verdict:
    words = baseline.words[0].upper() + baseline.words[1:]
    return Verdict(interval_state(baseline.low, baseline.high), words)


def _figures(evaluation: Evaluation) -> Iterator[tuple[str, str]]:
    forecast = f"no rank correlation of {evaluation.trainings} trainings"
    if evaluation.forecast is not None:
        found = significant(evaluation.forecast, 2)
        forecast = f"rank correlation {found} over {evaluation.trainings} trainings"
    yield "forecast", forecast
    if evaluation.break_even:
        yield "compute", evaluation.break_even
    if aurocs := evaluation.label_aurocs:
        ranked = sorted(aurocs.items(), key=lambda item: -(item[1] or 0.0))
        named = ", ".join(f"{significant(value)} {name}" for name, value in ranked)
        yield "AUROC of known bad rows", named
    for method in evaluation.methods:
        if method.tasks:
            means = (f"{task} {fmean(values):.4f}" for task, values in method.tasks.items())
            yield f"tasks, {method.name}", ", ".join(means)


def charts(facts: TrainingFacts) -> list[Chart]:
    drawn = [interval_chart(facts.evaluation), forecast_chart(facts.evaluation)]
    if facts.evaluation.curves:
        drawn.append(curve_chart(facts.evaluation))
    return [*drawn, *removal_charts(facts.evaluation)]


def interval_chart(evaluation: Evaluation) -> Chart:
    """The choice minus each baseline: the gain, with its interval."""
    baselines = evaluation.baselines
    rows = [
        {
            "baseline": NAMES.get(baseline.name, baseline.name),
            "words": baseline.words,
            "difference": baseline.difference,
            "low": baseline.low,
            "high": baseline.high,
        }
        for baseline in baselines
    ]
    axis = alt.Axis(domain=False, ticks=False, labelLimit=170)
    base = alt.Chart(inline_data(rows)).encode(
        alt.Y("baseline:N", title=None, sort=None, axis=axis), tooltip=["baseline:N", "words:N"]
    )
    title = "prism minus the baseline: gain, nats per token"
    bar = base.mark_rule(color=SELECTED, strokeWidth=3).encode(
        alt.X("low:Q", title=title, axis=alt.Axis(tickCount=5)), alt.X2("high:Q")
    )
    dot = base.mark_point(color=SELECTED, filled=True, opacity=1, size=90)
    return chart_of(
        "intervals",
        "Against each baseline",
        "Right of the line the choice is better. An interval that crosses it shows nothing.",
        "; ".join(baseline.words for baseline in baselines) + ".",
        bar + dot.encode(alt.X("difference:Q")) + rule_at(0, "x", "as good", dashed=False),
        max(90, 34 * len(baselines)),
    )


def curve_chart(evaluation: Evaluation) -> Chart:
    """Mean gain over seeds on the held-out pairs, while each method trains."""
    gains: dict[tuple[str, int], list[float]] = {}
    for point in evaluation.curves:
        gains.setdefault((point.method, point.step), []).append(point.gain)
    means = {key: fmean(values) for key, values in gains.items()}
    rows = [{"method": method, "step": s, "gain": gain} for (method, s), gain in means.items()]
    methods = list(dict.fromkeys(method for method, _ in means))
    looks = method_looks(evaluation, methods)
    legend = alt.Legend(columns=2, symbolType="stroke", title=None)
    title = "gain on the held-out pairs"
    line = (
        alt.Chart(inline_data(rows))
        .mark_line(point={"size": 45}, strokeWidth=2.5)
        .encode(
            alt.X("step:Q", title="steps of training", axis=alt.Axis(tickCount=5)),
            alt.Y("gain:Q", title=title, scale=alt.Scale(zero=False)),
            alt.Color("method:N", scale=looks.colours, legend=legend),
            alt.StrokeDash("method:N", scale=looks.dashes, legend=legend),
            tooltip=["method:N", "step:Q", alt.Tooltip("gain:Q", format=".4f")],
        )
    )
    last = {method: gain for (method, _), gain in means.items()}
    text = ", ".join(f"{method} {gain:.3f}" for method, gain in last.items())
    caption = "Mean over seeds, on pairs that the run has not seen."
    return chart_of("curves", "While training", caption, f"At the end: {text}.", line)


def forecast_chart(evaluation: Evaluation) -> Chart:
    """Predicted and realised change of the gain, a point for each training."""
    rows = [
        {"method": method.name, "predicted": predicted, "realised": realised}
        for method in evaluation.methods
        for predicted, realised in zip(method.predicted, method.realised, strict=True)
    ]
    names = list(dict.fromkeys(str(row["method"]) for row in rows))
    looks = method_looks(evaluation, names)
    legend = alt.Legend(columns=2)
    dots = (
        alt.Chart(inline_data(rows))
        .mark_point(filled=True, size=80, opacity=0.85)
        .encode(
            alt.X("predicted:Q", title="predicted: score per token", axis=alt.Axis(tickCount=5)),
            alt.Y("realised:Q", title="realised: change of the gain"),
            alt.Color("method:N", scale=looks.colours, title=None, legend=legend),
            alt.Shape("method:N", scale=looks.shapes, title=None, legend=legend),
            tooltip=[
                "method:N",
                *(alt.Tooltip(f"{name}:Q", format=".3g") for name in ("predicted", "realised")),
            ],
        )
    )
    forecast = evaluation.forecast
    return chart_of(
        "forecast",
        "Predicted against realised",
        "One mark for each training. Where scores predict well, the marks lie on a rising line.",
        f"Scatter of {len(rows)} trainings: predicted against realised change of the gain, rank "
        f"correlation {'not known' if forecast is None else f'{forecast:+.2f}'}.",
        dots,
    )


SECTION = Section("helps", "Did it help?", "Did it help?", read, charts)
