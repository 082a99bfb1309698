"""Verdicts: what retrainings say, in figures and in words.

    better    the 95% interval of prism − rival, over seeds and questions, is above 0     worse    it is below
    no gain shown    it holds 0

Choices made here: the verdict is on the gain; of every measure the difference and its interval are
told. Seeds and questions are compared each with its own, so what they share falls out."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from prism_select.core.statistics import paired_interval, rank_correlation
from prism_select.evaluation.retraining import MEASURES, Point, TrainedResult
from prism_select.run.folder import Store

__all__ = ["PRICED", "Rows", "figures", "forecasts", "in_words", "means_of", "write_tables"]

PRICED = "random-priced"


TOLD = 5  # trainings, from which a forecast is told


Rows: TypeAlias = NDArray[np.int64]


def write_tables(
    store: Store, before: Point, found: Sequence[TrainedResult], question: Rows
) -> None:
    """methods.parquet: a line for each training and pair.  curves.parquet: one for each training and point."""
    lines, curves = list[pa.Table](), list[dict[str, Any]]()
    for lot, points in found:
        last, count, seed = points[-1], len(question), lot.course.seed
        of = {
            "method": [lot.method] * count,
            "seed": [seed] * count,
            "pair": range(count),
            "question": question,
        }
        after = {"gap": last.gap, "loglik_chosen": last.chosen, "loglik_rejected": last.rejected}
        lines.append(pa.table({**of, "gap_before": before.gap, **after}))
        for point in (before, *points):
            told = {"method": lot.method, "seed": seed, "step": point.step, "loss": point.loss}
            curves.append({**told, **means_of([point], question)})
    store.write_table("methods.parquet", pa.concat_tables(lines))
    store.write_table("curves.parquet", pa.Table.from_pylist(curves))


def figures(
    forecast: Callable[[Rows], float],
    tokens: Rows,
    before: Point,
    found: Sequence[TrainedResult],
    question: Rows,
) -> dict[str, Any]:
    """Of each method its means; prism against each rival; forecasts against what came."""
    names = list(dict.fromkeys(lot.method for lot, _ in found))
    lots = {
        name: [(lot, points[-1]) for lot, points in found if lot.method == name] for name in names
    }
    trained = {name: [after for _, after in each] for name, each in lots.items()}
    methods = {"none": means_of([before], question) | tasks_of([before])}
    for name, each in lots.items():
        methods[name] = {
            **means_of(trained[name], question),
            **tasks_of(trained[name]),
            "rows": [len(lot.rows) for lot, _ in each],
            "tokens": [int(tokens[lot.rows].sum()) for lot, _ in each],
            "steps": each[0][0].course.steps,
            "predicted": [forecast(lot.rows) for lot, _ in each],
            "realised": [
                means_of([point], question)["gain"] - methods["none"]["gain"] for _, point in each
            ],
        }
    same = [name for name in names if name != PRICED]
    both = [
        [value for name in same for value in methods[name][which]]
        for which in ("predicted", "realised")
    ]
    trained["none"] = [before] * len(trained["prism"])
    against: dict[str, Any] = {}
    for name, theirs in trained.items():
        if name != "prism":
            apart = compared(trained["prism"][: len(theirs)], theirs, question)
            against[name] = {"words": in_words(name, apart["gain"]), **apart}
    return {
        "methods": methods,
        "against": against,
        "forecast": {
            "rank_correlation": forecasts(*map(np.array, both)),
            "trainings": len(both[0]),
        },
    }


def forecasts(predicted: NDArray[np.float64], realised: NDArray[np.float64]) -> float:
    """Their rank correlation; NaN of fewer than `TOLD`, which could hardly come out otherwise than
    high or low."""
    return rank_correlation(predicted, realised) if len(predicted) >= TOLD else float("nan")


def means_of(each: Sequence[Point], question: Rows) -> dict[str, Any]:
    """Of every measure, over questions and trainings."""
    return {
        name: float(np.mean([measure(point, question).mean() for point in each]))
        for name, measure in MEASURES.items()
    }


def tasks_of(each: Sequence[Point]) -> dict[str, Any]:
    """What each training gave at each task, where there are tasks."""
    tasks = {task: [point.tasks[task] for point in each] for task in each[0].tasks}
    return {"tasks": tasks} if tasks else {}


def compared(
    ours: Sequence[Point], theirs: Sequence[Point], question: Rows
) -> dict[str, dict[str, float]]:
    """Ours minus theirs, seed by seed and question by question."""
    told = {}
    for name, measure in MEASURES.items():
        apart = np.array(
            [measure(a, question) - measure(b, question) for a, b in zip(ours, theirs, strict=True)]
        )
        low, high = paired_interval(apart, 0)
        told[name] = {"difference": float(apart.mean()), "low": low, "high": high}
    return told


def in_words(baseline: str, gain: Mapping[str, float]) -> str:
    """The verdict on one rival; the interval is at 95%, in nats per token of gain."""
    names = {"none": "no training", PRICED: "random for the price of scoring"}
    name, middle, low, high = (
        names.get(baseline, baseline),
        gain["difference"],
        gain["low"],
        gain["high"],
    )
    if middle and low == high:
        return (
            f"{middle:+.2g} over {name}, and no verdict: one seed and one question have no interval"
        )
    if low > 0:
        return f"better than {name} by {middle:.2g} [{low:.2g}, {high:.2g}]"
    if high < 0:
        return f"worse than {name} by {-middle:.2g} [{-high:.2g}, {-low:.2g}]"
    return f"no gain over {name} shown: {middle:.2g} [{low:.2g}, {high:.2g}]"
