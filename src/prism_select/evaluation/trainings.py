"""Trainings: which rows each method trains on, and for how long.

    select    baseline    the rows at the top of its ranking, as many supervised tokens as chosen
              prism       the chosen rows             everything    every scored row
    repair    baseline    all rows but the top of its ranking, as many rows as were removed
              prism       the rows that were not removed

    random-priced    random rows for as many more steps as scoring would have paid for, and in
                     select as many more rows

Choices made here:
- every method takes as many steps: passes of its own would give a method of short rows more steps
  for the same tokens;
- random baselines draw anew for every seed; the other rankings are made once and stored;
- random-priced is expensive and gets at most `PRICED_SEEDS` seeds.
"""

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import TypeAlias

import numpy as np
import pyarrow as pa

from prism_select.data.encoding import Encoded, Encoder
from prism_select.data.pool import Pool
from prism_select.data.records import Example
from prism_select.data.targets import read_pairs
from prism_select.evaluation.past_run import FinishedRun, Floats, Rows
from prism_select.evaluation.retraining import TrainingJob, digest
from prism_select.evaluation.training_results import PRICED
from prism_select.models.loading import LoadedModel, load_model
from prism_select.models.lora_training import (
    ADAPTER,
    RATE,
    ROWS_A_STEP,
    TrainingSettings,
    with_adapter,
)
from prism_select.run.config_evaluate import EvaluateConfig
from prism_select.run.errors import BadOption, BadRow
from prism_select.run.folder import Store
from prism_select.run.progress import Progress
from prism_select.selection.baselines import BASELINES, COUNT_BASELINES, count_ranking, rankings

__all__ = [
    "DRAWN",
    "Rankings",
    "baseline_rankings",
    "encoded_rows",
    "kept_rows",
    "load_checkpoint",
    "ranking_by_counts",
    "rows_for_tokens",
    "rows_of",
    "sampled",
    "settings_of",
    "training_jobs",
]

SAMPLED = 512  # rows that controls score again
FULL_RATE = 2e-5
DRAWN = ("random", "random-by-source")
PRICED_SEEDS = 3

Rankings: TypeAlias = Mapping[str, Floats]


def baseline_rankings(
    config: EvaluateConfig, past: FinishedRun, loaded: LoadedModel, store: Store, progress: Progress
) -> dict[str, Floats]:
    """The rankings that do not change with the seed, from a file where the same scores had them."""
    names = [name for name in config.baselines if name in BASELINES and name not in DRAWN]
    mark = digest([past.mark])
    table = store.table_of("rankings.parquet", mark)
    by_name: dict[str, Floats] = {}
    if table is not None:
        by_name = {name: np.asarray(table[name].to_numpy()) for name in table.column_names}
    missing = [name for name in names if name not in by_name]
    for name in missing:
        if name in COUNT_BASELINES:
            by_name[name] = ranking_by_counts(past, name, past.config.seed)
    if costly := [name for name in missing if name not in COUNT_BASELINES]:
        with progress.task(f"rankings of {len(costly)} baselines", None):
            pool, targets = Pool.of(past.config), read_pairs(past.config)
            by_name |= rankings(costly, past.reachable, loaded, pool, targets, past.ranking)
    if missing:
        table = pa.table(by_name).replace_schema_metadata({"of": mark})
        store.write_table("rankings.parquet", table)
    return {name: by_name[name] for name in names}


def ranking_by_counts(past: FinishedRun, name: str, seed: int) -> Floats:
    """The ranking of a baseline that reads sources and tokens alone: the run has those."""
    return count_ranking(name, past.source, past.tokens, seed)


def settings_of(config: EvaluateConfig, past: FinishedRun) -> list[TrainingSettings]:
    """For each seed, what all its trainings have in common."""
    steps = config.steps_for(int(past.chosen.sum()), ROWS_A_STEP)
    rate = config.rate or (FULL_RATE if config.full else RATE)
    seeds = range(config.seed, config.seed + config.seeds)
    return [TrainingSettings(seed, steps, rate, config.full) for seed in seeds]


def training_jobs(
    config: EvaluateConfig, past: FinishedRun, by_name: Rankings, price: float | None
) -> list[TrainingJob]:
    """Every method and seed, prism first. `price` is that of scoring, None where it is unknown."""
    settings = settings_of(config, past)
    jobs = [TrainingJob("prism", np.flatnonzero(past.chosen), by_seed) for by_seed in settings]
    ours = jobs[:]
    for name in config.baselines:
        if name == PRICED:
            jobs += [priced_job(past, job, price) for job in ours[:PRICED_SEEDS] if price]
            continue
        for by_seed in settings:
            jobs.append(
                TrainingJob(name, baseline_rows(past, name, by_name, by_seed.seed), by_seed)
            )
    return jobs


def baseline_rows(past: FinishedRun, name: str, by_name: Rankings, seed: int) -> Rows:
    if name == "everything":
        return past.scored
    ranking = ranking_by_counts(past, name, seed) if name in DRAWN else by_name[name]
    return rows_of(past, ranking)


def priced_job(past: FinishedRun, job: TrainingJob, price: float) -> TrainingJob:
    """Random rows in place of a job, which spends the price of scoring too: on more of them and on
    more steps, to half a step. In repair there are no more rows."""
    spent = past.cost(job) + price
    random = ranking_by_counts(past, "random", job.settings.seed)
    rows = rows_of(past, random, spent / past.cost(job))
    step = past.cost(TrainingJob(PRICED, rows, replace(job.settings, steps=1)))
    return TrainingJob(PRICED, rows, replace(job.settings, steps=max(1, round(spent / step))))


def rows_of(past: FinishedRun, ranking: Floats, times: float = 1.0) -> Rows:
    """What a baseline trains on, in the order of the pool: as much as the choice, or `times` as
    much, as far as the pool goes."""
    if past.repair:
        return kept_rows(past, ranking, past.removed)
    order = best_first(past, ranking)
    budget = int(times * past.tokens[past.chosen].sum())
    return np.sort(order[: rows_for_tokens(past.tokens[order], budget)])


def best_first(past: FinishedRun, ranking: Floats) -> Rows:
    usable = past.scored[np.isfinite(ranking[past.scored])]
    return usable[np.argsort(-ranking[usable], kind="stable")]


def kept_rows(past: FinishedRun, ranking: Floats, count: int) -> Rows:
    """All scored rows but the `count` at the top of the ranking."""
    return np.setdiff1d(past.scored, best_first(past, ranking)[:count])


def rows_for_tokens(tokens: Rows, budget: int) -> int:
    """How many rows, from the first on, come nearest to the budget: they miss it by half a row at
    most."""
    total = np.concatenate([[0], np.cumsum(tokens)])
    return max(1, int(np.abs(total - budget).argmin()))


def encoded_rows(
    past: FinishedRun, selections: Sequence[Rows], encoder: Encoder
) -> dict[int, Encoded]:
    """The rows of the pool in any of the selections, by index.

    Raises BadOption where one cannot be encoded any more.
    """
    needed = {row for selection in selections for row in selection.tolist()}
    rows = dict[int, Encoded]()
    for index, (_, example) in enumerate(Pool.of(past.config).rows()):
        if index in needed and isinstance(example, Example):
            with suppress(BadRow):
                rows[index] = encoder.encode(example)
    if lost := needed - rows.keys():
        raise BadOption(
            f"row {min(lost)} of the pool cannot be read as it was when it was scored; make the "
            "run again"
        )
    return rows


def sampled(past: FinishedRun) -> Rows:
    """Rows that controls score again: at random, of those with an exact score."""
    draw, rows = np.random.default_rng(past.config.seed), past.scored[past.exact[past.scored]]
    return np.sort(draw.choice(rows, min(SAMPLED, len(rows)), replace=False))


def load_checkpoint(past: FinishedRun, full: bool, layers: str, progress: Progress) -> LoadedModel:
    """The model that the run took its scores of, in float32 where all parameters are trained."""
    dtype = "float32" if full else past.config.dtype
    loaded = load_model(replace(past.config, dtype=dtype), layers, progress)
    return with_adapter(loaded, past.home / ADAPTER) if past.config.warmup else loaded
