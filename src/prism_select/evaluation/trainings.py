"""TODO."""

import math
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import TypeAlias

import numpy as np
import pyarrow as pa

from prism_select.core.statistics import halves
from prism_select.data.encoding import Encoded, Encoder
from prism_select.data.records import Example
from prism_select.evaluation.past_run import FinishedRun, Floats, Rows, pool_of, target_pairs
from prism_select.evaluation.retraining import TrainingJob, digest
from prism_select.evaluation.training_results import PRICED
from prism_select.models.causal_lm import CausalLM
from prism_select.models.loading import load_model
from prism_select.models.lora_training import ADAPTER, RATE, ROWS_A_STEP, TrainingSettings, merged
from prism_select.run.config_evaluate import EvaluateConfig
from prism_select.run.errors import BadOption, BadRow
from prism_select.run.folder import Store
from prism_select.run.progress import Progress
from prism_select.selection.baselines import BASELINES, COUNT_BASELINES, Texts, rankings

__all__ = ["Baselines", "checkpoint", "encoded_rows", "filled", "lots_of", "ranked", "sampled"]

SAMPLED = 512  # rows that controls score again


FULL_RATE = 2e-5


DRAWN = ("random", "random-by-source")


PRICED_SEEDS = 3


Baselines: TypeAlias = Mapping[str, Floats]


def ranked(
    config: EvaluateConfig,
    past: FinishedRun,
    loaded: tuple[CausalLM, Encoder],
    store: Store,
    progress: Progress,
) -> dict[str, Floats]:
    """The rankings of the rivals that know one, kept in a file: of the same scores they are the
    same."""
    names = [name for name in config.baselines if name in BASELINES and name not in DRAWN]
    mark = digest([past.mark])
    table = store.table_of("rankings.parquet", mark)
    there = (
        {}
        if table is None
        else {name: np.asarray(table[name].to_numpy()) for name in table.column_names}
    )
    missing = [name for name in names if name not in there]
    there |= {
        name: counted(past, name, past.config.seed) for name in missing if name in COUNT_BASELINES
    }
    if costly := [name for name in missing if name not in COUNT_BASELINES]:
        with progress.task(f"rankings of {len(costly)} rivals", None):
            there |= rankings(
                costly, past.reachable, loaded, pool_of(past.config), target_pairs(past)
            )
    if missing:
        store.write_table("rankings.parquet", pa.table(there).replace_schema_metadata({"of": mark}))
    return {name: there[name] for name in names}


def counted(past: FinishedRun, name: str, seed: int) -> Floats:
    """The ranking of a rival that looks at sources and tokens alone: those of the run are known."""
    return COUNT_BASELINES[name](
        Texts(texts=(), sources=past.source, tokens=past.tokens, seed=seed)
    )


def lots_of(
    config: EvaluateConfig, past: FinishedRun, ranks: Baselines, price: float | None
) -> list[TrainingJob]:
    """Every method and seed, prism first, and the halves of the LDS."""
    seeds = range(config.seed, config.seed + config.seeds)
    steps = config.steps or math.ceil(config.epochs * past.taken.sum() / ROWS_A_STEP)
    rate = config.rate or (FULL_RATE if config.full else RATE)
    courses = [TrainingSettings(seed, steps, rate, config.full) for seed in seeds]
    lots = [TrainingJob("prism", np.flatnonzero(past.taken), course) for course in courses]
    for name in config.baselines:
        if name == PRICED:
            lots += (
                [dearer(past, lot, price) for lot in lots[: min(len(courses), PRICED_SEEDS)]]
                if price
                else []
            )
            continue
        for course in courses:
            ranking = (
                counted(past, name, course.seed) if name in DRAWN else ranks.get(name, past.score)
            )
            lots.append(
                TrainingJob(
                    name, past.scored if name == "everything" else rows_of(past, ranking), course
                )
            )
    members = halves(len(past.scored), config.lds, config.seed)
    return lots + [
        TrainingJob(f"half-{place}", past.scored[half], courses[0])
        for place, half in enumerate(members)
    ]


def dearer(past: FinishedRun, lot: TrainingJob, price: float) -> TrainingJob:
    """Random rows in place of a lot, with the price of scoring spent on more of them and on more
    steps: what the lot takes and the price, to half a step. In repair no more rows are left to
    take."""
    spent = past.passes(lot) + price
    rows = rows_of(past, counted(past, "random", lot.course.seed), spent / past.passes(lot))
    a_step = past.passes(TrainingJob(PRICED, rows, replace(lot.course, steps=1)))
    return TrainingJob(PRICED, rows, replace(lot.course, steps=max(1, round(spent / a_step))))


def rows_of(past: FinishedRun, ranking: Floats, times: float = 1.0) -> Rows:
    """What a rival trains on, in the order of the pool: as much as the choice, or so many times
    more, or all."""
    usable = past.scored[np.isfinite(ranking[past.scored])]
    order = usable[np.argsort(-ranking[usable], kind="stable")]
    if past.repair:
        return np.setdiff1d(past.scored, order[: len(past.scored) - past.taken.sum()])
    return np.sort(order[: filled(past.tokens[order], int(times * past.tokens[past.taken].sum()))])


def filled(tokens: Rows, budget: int) -> int:
    """How many rows, from the first on, come nearest to the budget: it is missed by half a row at
    most."""
    total = np.concatenate([[0], np.cumsum(tokens)])
    return max(1, int(np.abs(total - budget).argmin()))


def encoded_rows(past: FinishedRun, places: Sequence[Rows], encoder: Encoder) -> dict[int, Encoded]:
    """The rows of the pool in any of `places`, by their place. Raises BadOption where one cannot be
    read any more."""
    wanted = {row for each in places for row in each.tolist()}
    rows = dict[int, Encoded]()
    for place, (_, example) in enumerate(pool_of(past.config).rows()):
        if place in wanted and isinstance(example, Example):
            with suppress(BadRow):
                rows[place] = encoder.encode(example)
    if lost := wanted - rows.keys():
        raise BadOption(
            f"row {min(lost)} of the pool cannot be read as it was when it was scored; make the run again"
        )
    return rows


def sampled(past: FinishedRun) -> Rows:
    """Of the rows whose scores were taken: a guess says nothing of what a control asks."""
    draw, rows = np.random.default_rng(past.config.seed), past.scored[past.exact[past.scored]]
    return np.sort(draw.choice(rows, min(SAMPLED, len(rows)), replace=False))


def checkpoint(
    past: FinishedRun, full: bool, layers: str, progress: Progress
) -> tuple[CausalLM, Encoder]:
    """Where the run took its scores."""
    dtype = "float32" if full else past.config.dtype
    model, encoder = load_model(replace(past.config, layers=layers, dtype=dtype), progress)
    return (merged(model, past.home / ADAPTER) if past.config.warmup else model), encoder
