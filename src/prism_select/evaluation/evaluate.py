"""Evaluation: does the choice of a run help? Fine-tune on it and on its rivals, and compare on
held-out pairs.

    select    rival      the rows at the top of its ranking, as many supervised tokens as were chosen
              prism      the chosen rows             everything    every scored row       none    no training
    repair    rival      all rows but the top of its ranking, as many rows as were removed
              prism      the kept rows

    predicted = Σ score / Σ supervised tokens of the rows trained on       realised = J after − J before

    priced    random rows for as many more steps as scoring would have paid for, and in select as many more rows
              price = forwards of the pool, pairs and curvature included;   a step costs 3 forwards of its rows
    LDS       rank correlation over random halves S of the rows of   J after training on S   with   Σ_{z in S} score(z)

Choices made here: every method takes the same number of steps, the passes of the choice, since
passes of its own would give a method of short rows more steps at the same tokens. A loss is a mean
over tokens, so a training's forecast is a score per token, which at equal tokens orders methods as
the sum of scores does. Fine-tuning starts where the scores were taken. In repair, scores point to
the unwanted answers, so forecasts are turned. Target prompts are no held-out prompts. What is
measured of a model stands in retraining.py.

RUN/evaluation/  evaluation.json  methods.parquet  curves.parquet  controls.json  rankings.parquet
                 retrained/METHOD-SEED.parquet
"""

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from importlib.metadata import version
from typing import Any

import numpy as np

from prism_select.core.statistics import auroc, lds
from prism_select.data.encoding import Encoded, Encoder
from prism_select.data.files import find_files
from prism_select.data.labels import labels_of
from prism_select.data.pool import fingerprint
from prism_select.directions.from_pairs import as_side, encode_sides
from prism_select.evaluation.controls import Sample, run_controls
from prism_select.evaluation.lm_eval_tasks import fingerprints_of, known_tasks
from prism_select.evaluation.loggers import known_board
from prism_select.evaluation.past_run import (
    FinishedRun,
    Rows,
    held_out,
    opened,
    pool_of,
    target_pairs,
)
from prism_select.evaluation.price import break_even_of, price_of
from prism_select.evaluation.retraining import MEASURES, Retrainer, TrainedResult, digest
from prism_select.evaluation.training_results import PRICED, figures, write_tables
from prism_select.evaluation.trainings import (
    Baselines,
    checkpoint,
    encoded_rows,
    lots_of,
    ranked,
    sampled,
)
from prism_select.models.causal_lm import CausalLM
from prism_select.models.loading import resolve_device
from prism_select.models.lora_training import refuse_many_gpus
from prism_select.run.config import RepairConfig
from prism_select.run.config_evaluate import EvaluateConfig
from prism_select.run.folder import Store, finite
from prism_select.run.progress import Progress, Silent
from prism_select.selection.baselines import BASELINES, refuse_baselines

__all__ = ["evaluate"]


def evaluate(
    config: EvaluateConfig, progress: Progress | None = None, baselines: Baselines | None = None
) -> dict[str, Any]:
    """What is written to evaluation.json. `baselines` rank the rows of the pool, the highest first,
    NaN for rows that take no part; their names join those of baselines.py. Raises PrismError for
    what the user can mend."""
    progress, started, baselines = progress or Silent(), time.perf_counter(), baselines or {}
    past = opened(config)
    own = ("everything", PRICED, *BASELINES, *baselines)
    refuse_baselines("--against", config.baselines, bool(past.config.target), own)
    if config.task_names:
        known_tasks(tuple(config.task_names))
    known_board(config.board)
    refuse_many_gpus(resolve_device(past.config.device))
    held = held_out(config, past)
    store = Store(str(past.run.path / "evaluation"))
    for folder in (store, Store(str(store.path / "retrained"))):
        folder.make()
    model, encoder = checkpoint(past, config.full, past.config.layers, progress)
    coded = encode_sides(held.pairs, encoder)
    ranks = {**ranked(config, past, (model, encoder), store, progress), **baselines}
    price = (
        price_of(past, (model, encoder), store, progress) if PRICED in config.baselines else None
    )
    lots = lots_of(config, past, ranks, price)
    rows = encoded_rows(past, [sampled(past), *(lot.rows for lot in lots)], encoder)
    controls = controlled(past, store, (model, encoder), rows, progress)
    if past.config.layers == "adapter":
        model, encoder = checkpoint(past, config.full, "all", progress)
    sides = [
        as_side(side, past.config.tokens_on(model.device.type), model.device) for side in coded
    ]
    made_of = [
        past.mark,
        fingerprint(find_files([config.holdout])),
        *fingerprints_of(tuple(config.task_names)),
    ]
    bench = Retrainer(
        model, encoder, rows, sides, store, made_of, config.points, tuple(config.task_names)
    )
    before = bench.look(0, math.nan, last=True)
    found: list[TrainedResult] = []
    with progress.task(f"{len(lots)} trainings", len(lots)) as task:
        for lot in lots:
            found.append((lot, bench.made(lot)))
            task.advance(1)
    found, halved = found[: len(found) - config.lds], found[len(found) - config.lds :]
    write_tables(store, before, found, held.question)
    everything = {
        "prism_version": version("prism-select"),
        "config": asdict(config),
        "command": past.manifest["command"],
        **{"steps": lots[0].course.steps, "rate": lots[0].course.rate},
        **{
            "pairs": len(held.pairs),
            "questions": int(held.question.max()) + 1,
            "pairs_left_out": held.left_out,
        },
        **figures(past.forecast, past.tokens, before, found, held.question),
        "compute": break_even_of(past.passes, price, found, held.question) if price else None,
        "lds": attributed(past, halved, held.question, config.seed) if halved else None,
        "labels": labelled(past, ranks),
        "controls": controls,
        "seconds": time.perf_counter() - started,
    }
    told: dict[str, Any] = finite(everything)
    store.write_json("evaluation.json", told)
    return told


def controlled(
    past: FinishedRun,
    store: Store,
    loaded: tuple[CausalLM, Encoder],
    rows: Mapping[int, Encoded],
    progress: Progress,
) -> list[dict[str, Any]]:
    """Those of an earlier evaluation of the same scores, where there was one."""
    places = sampled(past)
    mark = digest([past.mark, past.score[places].tolist()])
    if there := store.json_of("controls.json", mark):
        return list(there["controls"])
    targets = target_pairs(past)
    taken = float(past.taken.sum() / len(past.scored))
    each = past.run.columns(*(f"score:{name}" for name in targets)).columns
    score = (
        np.mean(each, axis=0) if each else past.score
    )  # that of the mean direction, whatever the choice went by
    sample = Sample([rows[i] for i in places], score[places], 1 - taken if past.repair else taken)
    controls = [
        control.told()
        for control in run_controls(past.reachable, loaded, targets, sample, progress)
    ]
    store.write_json("controls.json", {"of": mark, "controls": controls})
    return controls


def attributed(
    past: FinishedRun, found: Sequence[TrainedResult], question: Rows, seed: int
) -> dict[str, float]:
    """The linear datamodeling score of the run's scores."""
    members = np.array([np.isin(past.scored, lot.rows) for lot, _ in found])
    gains = np.array([MEASURES["gain"](points[-1], question).mean() for _, points in found])
    return lds((-1 if past.repair else 1) * past.score[past.scored], members, gains, seed)


def labelled(past: FinishedRun, ranks: Baselines) -> dict[str, float] | None:
    """How well each ranking finds the rows that are known to be bad: AUROC, of the scored rows with
    a label."""
    if not (isinstance(past.config, RepairConfig) and past.config.label_field):
        return None
    labels = labels_of(past.config.label_field, pool_of(past.config))
    known = np.array([label is not None for label in labels]) & np.isfinite(past.score)
    bad = np.array([bool(label) for label in labels])
    every = {"prism": past.ranking, **ranks}
    return {
        name: auroc(ranking[known & np.isfinite(ranking)], bad[known & np.isfinite(ranking)])
        for name, ranking in every.items()
    }
