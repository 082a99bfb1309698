"""Removal curve: the gain after training without a share of the rows, by several rankings.

    share 0     every scored row, whatever the ranking: where all curves start
    share s     all scored rows but the round(s · rows) at the top of the ranking

    prism       the run's ranking              random    drawn for each seed
    a baseline  that of --against              oracle    rows labelled bad first, then the others,
                                                         each in random order, drawn for each seed

Choices made here:
- trainings of all shares start at the same model, take as many steps and have the same seeds as the
  others of the evaluation, so only their rows differ;
- at the share that the run itself removed, trainings are those of its methods;
- each ranking is compared with random removal of as many rows, seed by seed and question by
  question;
- the shares are not corrected for being several.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from prism_select.core.statistics import paired_interval
from prism_select.data.labels import labels_of
from prism_select.data.pool import Pool
from prism_select.evaluation.past_run import FinishedRun, Floats, Rows
from prism_select.evaluation.retraining import MEASURES, Point, TrainedResult, TrainingJob
from prism_select.evaluation.training_results import compare, means_of, tasks_of
from prism_select.evaluation.trainings import (
    DRAWN,
    Rankings,
    kept_rows,
    ranking_by_counts,
    settings_of,
)
from prism_select.run.config import RepairConfig
from prism_select.run.config_evaluate import EvaluateConfig

__all__ = ["Bools", "RemovalJob", "bad_rows", "removal_curve", "removal_jobs"]

Bools: TypeAlias = NDArray[np.bool_]

EVERYTHING, ORACLE = "everything", "oracle"


@dataclass(frozen=True)
class RemovalJob:
    """A training without a share of the rows. `ranking` names what ranked them; `job` may be that
    of a method, with the same rows."""

    share: float
    ranking: str
    job: TrainingJob


def bad_rows(past: FinishedRun) -> tuple[Bools, Bools] | None:
    """For each row of the pool, whether it has a label and whether that is "bad"; None without a
    column of labels."""
    if not (isinstance(past.config, RepairConfig) and past.config.label_field):
        return None
    labels = labels_of(past.config.label_field, Pool.of(past.config))
    return np.array([label is not None for label in labels]), np.array(list(map(bool, labels)))


def removal_jobs(
    config: EvaluateConfig, past: FinishedRun, by_name: Rankings, bad: Bools | None
) -> list[RemovalJob]:
    """Share by share, everything first; none after select. `bad` marks rows for the oracle."""
    shares = config.removal_shares if past.repair else []
    settings = settings_of(config, past)
    jobs = [
        RemovalJob(0.0, EVERYTHING, TrainingJob(EVERYTHING, past.scored, by_seed))
        for by_seed in settings[: len(settings) * bool(shares)]
    ]
    ranked = [name for name in config.baselines if name in by_name or name in DRAWN]
    names = dict.fromkeys(["prism", "random", *ranked, *([ORACLE] if bad is not None else [])])
    for share, name, by_seed in product(shares, names, settings):
        ranking = ranking_of(past, by_name, bad, name, by_seed.seed)
        count = max(1, round(share * len(past.scored)))
        own = count == past.removed and name != ORACLE
        method = name if own else f"{name}-without-{count}"
        job = TrainingJob(method, kept_rows(past, ranking, count), by_seed)
        jobs.append(RemovalJob(share, name, job))
    return jobs


def ranking_of(
    past: FinishedRun, by_name: Rankings, bad: Bools | None, name: str, seed: int
) -> Floats:
    if name == ORACLE and bad is not None:
        return bad + np.random.default_rng(seed).random(len(bad))
    if name in DRAWN:
        return ranking_by_counts(past, name, seed)
    return past.ranking if name == "prism" else by_name[name]


def removal_curve(
    jobs: Sequence[RemovalJob], results: Sequence[TrainedResult], question: Rows
) -> list[dict[str, Any]]:
    """As in evaluation.json: a point for each share and ranking. `results` are those of the
    jobs."""
    by_point: dict[tuple[float, str], list[TrainedResult]] = {}
    for job, result in zip(jobs, results, strict=True):
        by_point.setdefault((job.share, job.ranking), []).append(result)
    points = {key: [result.final for result in found] for key, found in by_point.items()}
    curve = list[dict[str, Any]]()
    for (share, name), found in points.items():
        random = points.get((share, "random")) if name != "random" else None
        over = compare("random removal", found, random, question).as_json() if random else None
        kept = len(by_point[share, name][0].job.rows)
        point = {"removed": share, "rows": kept, "method": name, **figures_of(found, question)}
        curve.append({**point, "over_random": over})
    return curve


def figures_of(points: Sequence[Point], question: Rows) -> Mapping[str, Any]:
    """Means over questions and seeds, the interval of the gain, and each task's mean."""
    gains = np.array([MEASURES["gain"](point, question) for point in points])
    low, high = paired_interval(gains, 0)
    tasks = {task: float(np.mean(values)) for task, values in tasks_of(points).items()}
    return {**means_of(points, question), "gain_interval": [low, high], "tasks": tasks}
