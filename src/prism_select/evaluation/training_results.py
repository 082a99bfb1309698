"""Training results: what trainings say, in figures and in words.

    better           the 95% interval of prism − baseline, over seeds and questions, is above 0
    worse            it is below 0
    no gain shown    it contains 0

Choices made here:
- the verdict is on the gain; of every measure the difference and its interval are given;
- seeds and questions are compared pair by pair, so what two methods share cancels.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, TypeAlias

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from prism_select.core.statistics import paired_interval, rank_correlation
from prism_select.evaluation.retraining import MEASURES, Point, TrainedResult
from prism_select.run.folder import Store

__all__ = [
    "PRICED",
    "Comparison",
    "Difference",
    "MethodResult",
    "Results",
    "Rows",
    "forecast_correlation",
    "in_words",
    "means_of",
    "results_of",
    "write_tables",
]

Floats: TypeAlias = NDArray[np.float64]
Rows: TypeAlias = NDArray[np.int64]

PRICED = "random-priced"
ENOUGH = 5  # trainings: fewer say nothing of a rank correlation


@dataclass(frozen=True)
class MethodResult:
    """A method: `means` of every measure over questions and trainings, what each training gave at
    each task, and `trainings`, what is known of each training."""

    means: Mapping[str, float]
    tasks: Mapping[str, Sequence[float]]
    trainings: Mapping[str, Any] = field(default_factory=dict)  # rows, tokens, steps, forecasts

    def as_json(self) -> dict[str, Any]:
        tasks = {"tasks": self.tasks} if self.tasks else {}
        return {**self.means, **tasks, **self.trainings}


@dataclass(frozen=True)
class Difference:
    """A measure of prism minus that of a baseline, with its 95% interval."""

    difference: float
    low: float
    high: float


@dataclass(frozen=True)
class Comparison:
    """Prism against a baseline: the verdict, and every measure."""

    words: str
    measures: Mapping[str, Difference]

    def as_json(self) -> dict[str, Any]:
        measures = {name: asdict(difference) for name, difference in self.measures.items()}
        return {"words": self.words, **measures}


@dataclass(frozen=True)
class Results:
    """All methods, prism against each, and how well forecasts rank `trainings` trainings."""

    methods: Mapping[str, MethodResult]
    against: Mapping[str, Comparison]
    rank_correlation: float
    trainings: int

    def as_json(self) -> dict[str, Any]:
        """As in evaluation.json."""
        return {
            "methods": {name: method.as_json() for name, method in self.methods.items()},
            "against": {name: result.as_json() for name, result in self.against.items()},
            "forecast": {
                "rank_correlation": self.rank_correlation,
                "trainings": self.trainings,
            },
        }


def write_tables(
    store: Store, before: Point, results: Sequence[TrainedResult], question: Rows
) -> None:
    """methods.parquet: a line for each training and pair.

    curves.parquet: a line for each training and point."""
    lines, curves = list[pa.Table](), list[dict[str, Any]]()
    for result in results:
        method, seed, last = result.job.method, result.job.settings.seed, result.final
        count = len(question)
        lines.append(
            pa.table(
                {
                    "method": [method] * count,
                    "seed": [seed] * count,
                    "pair": range(count),
                    "question": question,
                    "gap_before": before.gap,
                    "gap": last.gap,
                    "loglik_chosen": last.chosen,
                    "loglik_rejected": last.rejected,
                }
            )
        )
        for point in (before, *result.points):
            line = {"method": method, "seed": seed, "step": point.step, "loss": point.loss}
            curves.append({**line, **means_of([point], question)})
    store.write_table("methods.parquet", pa.concat_tables(lines))
    store.write_table("curves.parquet", pa.Table.from_pylist(curves))


def results_of(
    forecast: Callable[[Rows], float],
    tokens: Rows,
    before: Point,
    results: Sequence[TrainedResult],
    question: Rows,
) -> Results:
    """Each method, prism against each baseline, and forecasts against what came.

    `forecast` predicts the change of the gain from the rows of a training; `tokens` counts the
    supervised tokens of each row of the pool.
    """
    by_method: dict[str, list[TrainedResult]] = {}
    for result in results:
        by_method.setdefault(result.job.method, []).append(result)
    untrained = MethodResult(means_of([before], question), tasks_of([before]))
    methods = {"none": untrained}
    for name, trained in by_method.items():
        points = [result.final for result in trained]
        rows = [result.job.rows for result in trained]
        gains = [means_of([point], question)["gain"] for point in points]
        trainings = {
            "rows": [len(chosen) for chosen in rows],
            "tokens": [int(tokens[chosen].sum()) for chosen in rows],
            "steps": trained[0].job.settings.steps,
            "predicted": [forecast(chosen) for chosen in rows],
            "realised": [gain - untrained.means["gain"] for gain in gains],
        }
        methods[name] = MethodResult(means_of(points, question), tasks_of(points), trainings)
    ours = [result.final for result in by_method["prism"]]
    points_by_name = {name: [r.final for r in trained] for name, trained in by_method.items()}
    points_by_name["none"] = [before] * len(ours)
    against = {
        name: compare(name, ours[: len(theirs)], theirs, question)
        for name, theirs in points_by_name.items()
        if name != "prism"
    }
    predicted, realised = (
        np.array([v for name in by_method if name != PRICED for v in methods[name].trainings[key]])
        for key in ("predicted", "realised")
    )
    correlation = forecast_correlation(predicted, realised)
    return Results(methods, against, correlation, len(predicted))


def forecast_correlation(predicted: Floats, realised: Floats) -> float:
    """Rank correlation of the forecasts with what came; NaN for fewer than `ENOUGH` trainings,
    whose correlation is nearly always high or low."""
    return rank_correlation(predicted, realised) if len(predicted) >= ENOUGH else float("nan")


def means_of(points: Sequence[Point], question: Rows) -> dict[str, float]:
    """Of every measure, over questions and trainings."""
    return {
        name: float(np.mean([measure(point, question).mean() for point in points]))
        for name, measure in MEASURES.items()
    }


def tasks_of(points: Sequence[Point]) -> dict[str, list[float]]:
    """What each training gave at each task, where there are tasks."""
    return {task: [point.tasks[task] for point in points] for task in points[0].tasks}


def compare(
    name: str, ours: Sequence[Point], theirs: Sequence[Point], question: Rows
) -> Comparison:
    """Ours minus those of the baseline `name`, seed by seed and question by question."""
    measures = dict[str, Difference]()
    for measure_name, measure in MEASURES.items():
        differences = np.array(
            [measure(a, question) - measure(b, question) for a, b in zip(ours, theirs, strict=True)]
        )
        low, high = paired_interval(differences, 0)
        measures[measure_name] = Difference(float(differences.mean()), low, high)
    return Comparison(in_words(name, measures["gain"]), measures)


def in_words(baseline: str, gain: Difference) -> str:
    """The verdict on one baseline, in nats per token of gain."""
    names = {"none": "no training", PRICED: "random for the price of scoring"}
    name, middle, low, high = names.get(baseline, baseline), gain.difference, gain.low, gain.high
    if middle and low == high:
        return (
            f"{middle:+.2g} over {name}, and no verdict: one seed and one question have no interval"
        )
    if low > 0:
        return f"better than {name} by {middle:.2g} [{low:.2g}, {high:.2g}]"
    if high < 0:
        return f"worse than {name} by {-middle:.2g} [{-high:.2g}, {-low:.2g}]"
    return f"no gain over {name} shown: {middle:.2g} [{low:.2g}, {high:.2g}]"
