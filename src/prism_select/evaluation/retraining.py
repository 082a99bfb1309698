"""Retraining: fine-tune on some rows, and see at some steps how the model then stands to held-out
pairs.

    gap = mean_loglik(chosen) − mean_loglik(rejected)     gain = softplus(gap)     win rate = share of gaps > 0
    accuracy = share of questions of which every pair has a gap > 0: the right choice over each
    wrong one

Choices made here: figures are means over questions, first over the pairs of each, so that a
question of four choices counts no more than one of two. A retraining is one file, marked with what
it was made of: it is never made twice, nor taken for another. The same seed draws the same adapter,
whatever the rows."""

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
from prism_select.data.encoding import Encoded, Encoder
from prism_select.evaluation.lm_eval_tasks import task_figures
from prism_select.models.causal_lm import CausalLM
from prism_select.models.lora_training import TrainingSettings, train
from prism_select.run.folder import Store

__all__ = ["MEASURES", "Point", "Retrainer", "TrainedResult", "TrainingJob", "digest", "measured"]

Floats: TypeAlias = NDArray[np.float64]


@dataclass(frozen=True)
class TrainingJob:
    """One retraining: the rows of the pool that are trained on, and the course that it takes."""

    method: str
    rows: NDArray[np.int64]
    course: TrainingSettings

    @property
    def name(self) -> str:
        return f"retrained/{self.method}-{self.course.seed}.parquet"


@dataclass(frozen=True)
class Point:
    """Mean log-likelihood of both answers of every held-out pair after `step` steps, the mean
    training loss in nats per token of the steps since the point before, and at the end what the
    tasks gave."""

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
        return np.asarray(
            GAINS["prism"](torch.tensor(self.chosen), torch.tensor(self.rejected)).numpy()
        )


TrainedResult: TypeAlias = tuple[TrainingJob, list[Point]]


def by_question(
    values: Floats, question: Int[np.ndarray, " pairs"]
) -> Float[np.ndarray, " questions"]:
    """Means over the pairs of each question."""
    return np.asarray(np.bincount(question, values) / np.bincount(question))


Measure: TypeAlias = Callable[[Point, NDArray[np.int64]], Floats]


MEASURES: Mapping[str, Measure] = {
    "gain": lambda point, question: by_question(point.gain, question),
    "gap": lambda point, question: by_question(point.gap, question),
    "win_rate": lambda point, question: by_question((point.gap > 0).astype(np.float64), question),
    "accuracy": lambda point, question: (
        by_question((point.gap > 0).astype(np.float64), question) == 1
    ).astype(float),
    "loglik_chosen": lambda point, question: by_question(point.chosen, question),
}


@dataclass(frozen=True)
class Retrainer:
    """What retrainings have in common: the model and where they are kept; `made_of` is all that
    decides what comes out, beside the lot; the pairs are looked at `points` times, at the end and
    evenly before."""

    model: CausalLM
    encoder: Encoder
    rows: Mapping[int, Encoded]
    sides: Sequence[Side]
    store: Store
    made_of: Sequence[Any]
    points: int = 1
    tasks: tuple[str, ...] = ()

    def made(self, lot: TrainingJob) -> list[Point]:
        """The points of a lot, the last at the end of its training; read where they are there
        already."""
        mark = digest(
            [self.made_of, self.points, asdict(lot.course), lot.rows.tolist(), *self.tasks]
        )
        if (table := self.store.table_of(lot.name, mark)) is not None:
            return points_of(table)
        points = self.trained(lot)
        told = {"of": mark, "tasks": json.dumps(points[-1].tasks)}
        self.store.write_table(lot.name, as_table(points).replace_schema_metadata(told))
        return points

    def look(self, step: int, loss: float, last: bool) -> Point:
        """How the model stands now."""
        tasks = (
            task_figures(self.model, self.encoder.tokenizer, self.tasks)
            if last and self.tasks
            else {}
        )
        return Point(step, loss, *measured(self.model, self.sides), tasks)

    def trained(self, lot: TrainingJob) -> list[Point]:
        """The model is afterwards as it was before."""
        network: Any = self.model.network
        saved = (
            {name: value.clone() for name, value in network.state_dict().items()}
            if lot.course.full
            else {}
        )
        points, losses = list[Point](), list[float]()
        looks = {round(lot.course.steps * (k + 1) / self.points) for k in range(self.points)}

        def look(step: int, loss: float) -> None:
            losses.append(loss)
            if step in looks:
                network.eval()
                points.append(self.look(step, float(np.mean(losses)), step == lot.course.steps))
                losses.clear()

        rows = [self.rows[row] for row in lot.rows.tolist()]
        learner = train(self.model, self.encoder.tokenizer, rows, lot.course, look)
        network.load_state_dict(saved) if lot.course.full else learner.unload()
        network.eval().requires_grad_(False)
        return points


def measured(model: CausalLM, sides: Sequence[Side]) -> tuple[Floats, Floats]:
    chosen, rejected = (np.asarray(pair_logliks(model, side).numpy()) for side in sides)
    return chosen, rejected


def as_table(points: Sequence[Point]) -> pa.Table:
    """A line for each point and pair."""
    each = [
        {
            "step": [point.step] * len(point.gap),
            "loss": [point.loss] * len(point.gap),
            "pair": range(len(point.gap)),
            "loglik_chosen": point.chosen,
            "loglik_rejected": point.rejected,
        }
        for point in points
    ]
    return pa.concat_tables([pa.table(one) for one in each])


def points_of(table: pa.Table) -> list[Point]:
    columns = {name: table[name].to_numpy() for name in table.column_names}
    found = []
    for step in dict.fromkeys(columns["step"].tolist()):
        here = columns["step"] == step
        sides = (columns[f"loglik_{side}"][here] for side in ("chosen", "rejected"))
        found.append(Point(step, float(columns["loss"][here][0]), *sides))
    tasks = json.loads((table.schema.metadata or {}).get(b"tasks", b"{}"))
    return [*found[:-1], replace(found[-1], tasks=tasks)]


def digest(values: Sequence[Any]) -> str:
    return hashlib.blake2b(json.dumps(values).encode(), digest_size=16).hexdigest()
