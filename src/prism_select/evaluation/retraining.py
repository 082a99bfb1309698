"""Retraining: fine-tune on some rows, and measure the model on held-out pairs at some steps.

    gap = mean_loglik(chosen) − mean_loglik(rejected)     gain = softplus(gap)
    win rate = share of gaps > 0
    accuracy = share of questions of which every pair has a gap > 0: the right choice beats each
               wrong one

Choices made here:
- figures are means over questions, first over the pairs of each, so that a question of four choices
  counts no more than one of two;
- a training is one file, marked with what it was made of: it is never made twice, nor taken for
  another;
- jobs of the same rows and settings are one training;
- equal seeds draw equal adapters, whatever the rows;
- the pairs are measured `POINTS` times, at the end and evenly before.
"""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, TypeAlias

import numpy as np
import pyarrow as pa
import torch
from jaxtyping import Float, Int
from numpy.typing import NDArray

from prism_select.core.gains import GAINS
from prism_select.core.target_gradient import Side, pair_logliks
from prism_select.data.encoding import Encoded
from prism_select.evaluation.lm_eval_tasks import task_figures
from prism_select.models.causal_lm import CausalLM
from prism_select.models.loading import LoadedModel
from prism_select.models.lora_training import TrainingSettings, train
from prism_select.run.folder import Store
from prism_select.run.progress import Progress

__all__ = [
    "MEASURES",
    "Point",
    "Retrainer",
    "TrainedResult",
    "TrainingJob",
    "digest",
    "distinct",
    "mean_logliks_of",
    "train_all",
]

Floats: TypeAlias = NDArray[np.float64]

POINTS = 4  # at which a training is measured


@dataclass(frozen=True)
class TrainingJob:
    """A training: its method, the rows of the pool that it takes, and its settings."""

    method: str
    rows: NDArray[np.int64]
    settings: TrainingSettings

    @property
    def name(self) -> str:
        """Its file in the folder of the evaluation."""
        return f"retrained/{self.method}-{self.settings.seed}.parquet"


@dataclass(frozen=True)
class Point:
    """The model after `step` steps.

    `chosen` and `rejected` are mean log-likelihoods of both answers of every held-out pair, `loss`
    the mean training loss in nats per token since the point before, and `tasks` what lm-eval gave,
    at the last point only.
    """

    step: int
    loss: float
    chosen: Floats
    rejected: Floats
    tasks: Mapping[str, float] = field(default_factory=dict)

    @property
    def gap(self) -> Floats:
        return self.chosen - self.rejected

    @property
    def gain(self) -> Floats:
        chosen, rejected = torch.tensor(self.chosen), torch.tensor(self.rejected)
        return np.asarray(GAINS["prism"](chosen, rejected).numpy())


@dataclass(frozen=True)
class TrainedResult:
    """A training that was made, and its points."""

    job: TrainingJob
    points: Sequence[Point]

    @property
    def final(self) -> Point:
        return self.points[-1]


def by_question(
    values: Floats, question: Int[np.ndarray, " pairs"]
) -> Float[np.ndarray, " questions"]:
    """Means over the pairs of each question."""
    return np.asarray(np.bincount(question, values) / np.bincount(question))


def win_rate(point: Point, question: NDArray[np.int64]) -> Floats:
    return by_question((point.gap > 0).astype(np.float64), question)


Measure: TypeAlias = Callable[[Point, NDArray[np.int64]], Floats]
MEASURES: Mapping[str, Measure] = {
    "gain": lambda point, question: by_question(point.gain, question),
    "gap": lambda point, question: by_question(point.gap, question),
    "win_rate": win_rate,
    "accuracy": lambda point, question: (win_rate(point, question) == 1).astype(float),
    "loglik_chosen": lambda point, question: by_question(point.chosen, question),
}


@dataclass(frozen=True)
class Retrainer:
    """Makes trainings of one model.

    `rows` are encoded rows of the pool, by index; `sides` are both answers of the held-out pairs.
    `made_of` is everything beside the job that decides the result; `tasks` are names of lm-eval,
    and `questions` numbers those that a task may ask, where it may not ask all.
    """

    loaded: LoadedModel
    rows: Mapping[int, Encoded]
    sides: Sequence[Side]
    store: Store
    made_of: Sequence[Any]
    tasks: tuple[str, ...] = ()
    questions: Mapping[str, Sequence[int]] = field(default_factory=dict)

    def result(self, job: TrainingJob) -> TrainedResult:
        """The training, read from its file where it was made before."""
        settings = asdict(job.settings)
        asked = [dict(self.questions)] if self.questions else []
        mark = digest([self.made_of, POINTS, settings, job.rows.tolist(), *self.tasks, *asked])
        if (table := self.store.table_of(job.name, mark)) is not None:
            return TrainedResult(job, points_of(table))
        points = self.train(job)
        metadata = {"of": mark, "tasks": json.dumps(points[-1].tasks)}
        self.store.write_table(job.name, as_table(points).replace_schema_metadata(metadata))
        return TrainedResult(job, points)

    def measure(self, step: int, loss: float, last: bool) -> Point:
        """The model as it is at this step."""
        tasks: Mapping[str, float] = {}
        if last and self.tasks:
            tokenizer = self.loaded.encoder.tokenizer
            tasks = task_figures(self.loaded.model, tokenizer, self.tasks, self.questions)
        return Point(step, loss, *mean_logliks_of(self.loaded.model, self.sides), tasks)

    def train(self, job: TrainingJob) -> list[Point]:
        """The model is afterwards as it was before."""
        network: Any = self.loaded.model.network
        full, steps = job.settings.full, job.settings.steps
        before = network.state_dict() if full else {}
        before = {name: value.clone() for name, value in before.items()}
        points, losses = list[Point](), list[float]()
        measured_steps = {round(steps * (k + 1) / POINTS) for k in range(POINTS)}

        def on_step(step: int, loss: float) -> None:
            losses.append(loss)
            if step in measured_steps:
                network.eval()
                points.append(self.measure(step, float(np.mean(losses)), step == steps))
                losses.clear()

        rows = [self.rows[row] for row in job.rows.tolist()]
        tokenizer = self.loaded.encoder.tokenizer
        trained = train(self.loaded.model, tokenizer, rows, job.settings, on_step)
        network.load_state_dict(before) if full else trained.unload()
        network.eval().requires_grad_(False)
        return points


def mean_logliks_of(model: CausalLM, sides: Sequence[Side]) -> tuple[Floats, Floats]:
    """Mean log-likelihoods of the chosen and of the rejected answers, in nats per token."""
    chosen, rejected = (np.asarray(pair_logliks(model, side).numpy()) for side in sides)
    return chosen, rejected


def as_table(points: Sequence[Point]) -> pa.Table:
    """A line for each point and pair."""
    tables = [
        pa.table(
            {
                "step": [point.step] * len(point.gap),
                "loss": [point.loss] * len(point.gap),
                "pair": range(len(point.gap)),
                "loglik_chosen": point.chosen,
                "loglik_rejected": point.rejected,
            }
        )
        for point in points
    ]
    return pa.concat_tables(tables)


def points_of(table: pa.Table) -> list[Point]:
    """The points that `as_table` wrote, with the tasks of the last one from its metadata."""
    columns = {name: table[name].to_numpy() for name in table.column_names}
    points = list[Point]()
    for step in dict.fromkeys(columns["step"].tolist()):
        lines = columns["step"] == step
        sides = (columns[f"loglik_{side}"][lines] for side in ("chosen", "rejected"))
        points.append(Point(step, float(columns["loss"][lines][0]), *sides))
    tasks = json.loads((table.schema.metadata or {}).get(b"tasks", b"{}"))
    return [*points[:-1], replace(points[-1], tasks=tasks)]


def digest(values: Sequence[Any]) -> str:
    """A short mark of values that JSON has."""
    return hashlib.blake2b(json.dumps(values).encode(), digest_size=16).hexdigest()


def distinct(jobs: Sequence[TrainingJob]) -> dict[Any, TrainingJob]:
    """The first job of all with the same rows and settings, by these."""
    by_content = dict[Any, TrainingJob]()
    for job in jobs:
        by_content.setdefault(content_of(job), job)
    return by_content


def content_of(job: TrainingJob) -> tuple[Any, ...]:
    return job.rows.tobytes(), job.settings


def train_all(
    retrainer: Retrainer, jobs: Sequence[TrainingJob], progress: Progress
) -> list[TrainedResult]:
    """The result of each job; jobs of the same rows and settings are trained once."""
    found, to_train = dict[Any, TrainedResult](), distinct(jobs)
    with progress.task(f"{len(to_train)} trainings", len(to_train)) as task:
        for content, job in to_train.items():
            found[content] = retrainer.result(job)
            task.advance(1)
    return [replace(found[content_of(job)], job=job) for job in jobs]
