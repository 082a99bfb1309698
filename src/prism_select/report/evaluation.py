"""Evaluation: the values of evaluation.json and curves.parquet in a run folder."""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

__all__ = [
    "Baseline",
    "ControlResult",
    "CurvePoint",
    "Evaluation",
    "Method",
    "RemovalPoint",
    "read_evaluation",
]


@dataclass(frozen=True)
class Method:
    """A method of training; measures are means over its trainings. `rows`, `predicted` and
    `realised` have a value for each training, and none before training."""

    name: str
    gain: float
    gap: float
    win_rate: float
    accuracy: float
    loglik_chosen: float
    rows: tuple[int, ...] = ()
    predicted: tuple[float, ...] = ()
    realised: tuple[float, ...] = ()
    tasks: Mapping[str, tuple[float, ...]] = field(default_factory=dict)


@dataclass(frozen=True)
class Baseline:
    """The gain of the choice minus the baseline's, with its 95% interval, or NaN."""

    name: str
    words: str
    difference: float
    low: float
    high: float


@dataclass(frozen=True)
class ControlResult:
    name: str
    holds: bool
    words: str


@dataclass(frozen=True)
class CurvePoint:
    method: str
    step: int
    gain: float


@dataclass(frozen=True)
class RemovalPoint:
    """Trainings without a share of the rows, by one ranking; means over seeds. `over_random` is the
    gain over random removal of as many rows with its 95% interval, None for that itself."""

    removed: float
    rows: int
    method: str
    gain: float
    win_rate: float
    accuracy: float
    tasks: Mapping[str, float]
    over_random: tuple[float, float, float] | None


@dataclass(frozen=True)
class Evaluation:
    """`forecast` is the rank correlation of predicted and realised change of the gain;
    `label_aurocs` tell how well each ranking finds rows with a label "bad"."""

    steps: int
    rate: float
    seeds: int
    pairs: int
    questions: int
    pairs_left_out: int
    methods: tuple[Method, ...]
    baselines: tuple[Baseline, ...]
    controls: tuple[ControlResult, ...]
    forecast: float | None
    trainings: int
    break_even: str
    label_aurocs: Mapping[str, float | None]
    curves: tuple[CurvePoint, ...]
    removals: tuple[RemovalPoint, ...] = ()

    @property
    def several_answers(self) -> bool:
        """Whether a question has more than one pair: then accuracy and win rate differ."""
        return self.questions < self.pairs


def read_evaluation(path: Path) -> Evaluation | None:
    """Of the run folder at `path`; None if there is no evaluation."""
    file, curves = path / "evaluation" / "evaluation.json", path / "evaluation" / "curves.parquet"
    if not file.exists():
        return None
    content = json.loads(file.read_text(encoding="utf-8"))
    points = pq.read_table(curves).to_pylist() if curves.exists() else []
    return Evaluation(
        steps=content["steps"],
        rate=content["rate"],
        seeds=content["config"]["seeds"],
        pairs=content["pairs"],
        questions=content["questions"],
        pairs_left_out=content["pairs_left_out"],
        methods=tuple(_method(name, values) for name, values in content["methods"].items()),
        baselines=tuple(_baseline(name, values) for name, values in content["against"].items()),
        controls=tuple(
            ControlResult(c["name"], c["holds"], c["words"]) for c in content["controls"]
        ),
        forecast=content["forecast"]["rank_correlation"],
        trainings=content["forecast"]["trainings"],
        break_even=content["compute"]["words"] if content["compute"] else "",
        label_aurocs=content["labels"] or {},
        curves=tuple(CurvePoint(p["method"], int(p["step"]), float(p["gain"])) for p in points),
        removals=tuple(map(_removal_point, content.get("curve", ()))),
    )


def _method(name: str, values: Mapping[str, Any]) -> Method:
    return Method(
        name=name,
        gain=values["gain"],
        gap=values["gap"],
        win_rate=values["win_rate"],
        accuracy=values["accuracy"],
        loglik_chosen=values["loglik_chosen"],
        rows=tuple(values.get("rows", ())),
        predicted=tuple(values.get("predicted", ())),
        realised=tuple(values.get("realised", ())),
        tasks={task: tuple(results) for task, results in values.get("tasks", {}).items()},
    )


def _removal_point(values: Mapping[str, Any]) -> RemovalPoint:
    over = (values["over_random"] or {}).get("gain")
    copied = ("removed", "rows", "method", "gain", "win_rate", "accuracy", "tasks")
    return RemovalPoint(
        **{name: values[name] for name in copied},
        over_random=(over["difference"], over["low"], over["high"]) if over else None,
    )


def _baseline(name: str, values: Mapping[str, Any]) -> Baseline:
    gain = {key: math.nan if value is None else value for key, value in values["gain"].items()}
    return Baseline(name, values["words"], gain["difference"], gain["low"], gain["high"])
