"""Evaluation: does the choice of a run help? Fine-tune on it and on its baselines, and compare on
held-out pairs.

    predicted = Σ score / Σ supervised tokens of the rows trained on
    realised  = J after − J before training                J: the mean gain of the held-out pairs

    RUN/evaluation/  evaluation.json  methods.parquet  curves.parquet  controls.json
                     rankings.parquet  price.json  retrained/METHOD-SEED.parquet

Choices made here:
- fine-tuning starts at the model that the scores were taken of;
- a loss is a mean over tokens, so the forecast of a training is a score per token; at equal tokens
  it orders methods as the sum of scores does;
- in repair, scores point to the unwanted answers, so forecasts have their sign turned;
- held-out pairs share no prompt with the target, nor do the questions of tasks;
- which rows a method trains on stands in trainings.py, what is measured in retraining.py, and what
  other shares of removed rows give in removal_curve.py;
"""

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from importlib.metadata import version
from typing import Any

import numpy as np

from prism_select.core.statistics import auroc
from prism_select.data.columns import format_line
from prism_select.data.encoding import Encoded
from prism_select.data.files import find_files
from prism_select.data.formats import parse_fields
from prism_select.data.pool import fingerprint
from prism_select.data.records import any_alone
from prism_select.data.targets import read_pairs, survey_targets
from prism_select.directions.pair_encoding import (
    EncodedPairs,
    as_side,
    encode_sides,
    refuse_truncated,
)
from prism_select.evaluation.controls import Sample, run_controls
from prism_select.evaluation.lm_eval_tasks import (
    TaskQuestions,
    fingerprints_of,
    questions_of,
    task_names,
)
from prism_select.evaluation.past_run import (
    FinishedRun,
    HeldOutPairs,
    held_out_pairs,
    open_run,
    seen_questions,
)
from prism_select.evaluation.price import break_even_of, price_of
from prism_select.evaluation.removal_curve import (
    Bools,
    bad_rows,
    removal_curve,
    removal_jobs,
)
from prism_select.evaluation.retraining import Retrainer, TrainingJob, digest, distinct, train_all
from prism_select.evaluation.training_results import PRICED, results_of, write_tables
from prism_select.evaluation.trainings import (
    Rankings,
    baseline_rankings,
    encoded_rows,
    load_checkpoint,
    sampled,
    training_jobs,
)
from prism_select.models.loading import LoadedModel, resolve_device
from prism_select.models.lora_training import refuse_apart, refuse_many_gpus
from prism_select.models.quantised import quantised_entry
from prism_select.run.config_evaluate import EvaluateConfig
from prism_select.run.errors import BadOption
from prism_select.run.folder import TOKEN_LIBRARIES, Store, finite
from prism_select.run.polarity import Polarity
from prism_select.run.progress import Progress, Silent
from prism_select.selection.baselines import BASELINES, refuse_baselines

__all__ = ["evaluate"]


def evaluate(
    config: EvaluateConfig, progress: Progress | None = None, baselines: Rankings | None = None
) -> dict[str, Any]:
    """What is written to evaluation.json.

    `baselines` are further rankings of the rows of the pool, by name: the highest number first, NaN
    for rows that take no part. Raises PrismError for what the user can mend.
    """
    progress, started, baselines = progress or Silent(), time.perf_counter(), baselines or {}
    past = open_run(config)
    refuse(config, past, baselines)
    held_out = held_out_pairs(config, past)
    for holdout in survey_targets([str(config.holdout)], parse_fields(past.config.fields)):
        if holdout.unread:
            progress.say(format_line(holdout.file, holdout.format, holdout.unread))
    tasks = tuple(config.task_names)
    questions = questions_of(tasks, seen_questions(past)) if tasks else TaskQuestions({}, {}, {})
    store = Store(str(past.run.path / "evaluation"))
    for folder in (store, Store(str(store.path / "retrained"))):
        folder.make()
    say_libraries(past, progress)
    loaded = load_checkpoint(past, config.full, past.config.layers, progress)
    if config.full and quantised_entry(loaded.model.network):
        raise BadOption(
            f"--full: the model of {past.run.path} is in few bits, in which it cannot be trained; "
            "leave --full out"
        )
    if past.config.layers != "adapter":
        refuse_apart(loaded.model)
    encoded_pairs = encode_holdout(held_out, loaded, progress)
    by_name = {**baseline_rankings(config, past, loaded, store, progress), **baselines}
    price = price_of(past, loaded, store, progress) if PRICED in config.baselines else None
    jobs, labels = training_jobs(config, past, by_name, price), bad_rows(past)
    removals = removal_jobs(config, past, by_name, labels[1] if labels else None)
    every_job = [*jobs, *(removal.job for removal in removals)]
    rows = encoded_rows(past, [sampled(past), *(job.rows for job in every_job)], loaded.encoder)
    controls = controls_of(past, store, loaded, rows, progress)
    if past.config.layers == "adapter":
        loaded = load_checkpoint(past, config.full, "all", progress)
    device = loaded.model.device
    batch_tokens = past.config.tokens_on(device.type, loaded.model.size)
    sides = [as_side(s, batch_tokens, device) for s in encoded_pairs]
    parts = made_of(config, past)
    retrainer = Retrainer(loaded, rows, sides, store, parts, tasks, questions.asked)
    say_plan(questions, every_job, len(jobs), progress)
    before = retrainer.measure(0, math.nan, last=True)
    results = train_all(retrainer, every_job, progress)
    trained, question = results[: len(jobs)], held_out.question
    write_tables(store, before, trained, question)
    figures = results_of(past.forecast, past.tokens, before, trained, question)
    compute = break_even_of(past.cost, price, trained, question) if price else None
    content: dict[str, Any] = finite(
        {
            "prism_version": version("prism-select"),
            "config": asdict(config),
            "command": past.manifest["command"],
            "steps": jobs[0].settings.steps,
            "rate": jobs[0].settings.rate,
            **held_out.as_json(),
            "questions_left_out": questions.left_out,
            **figures.as_json(),
            "curve": removal_curve(removals, results[len(jobs) :], question),
            "compute": asdict(compute) if compute else None,
            "labels": label_aurocs(past, by_name, *labels) if labels else None,
            "controls": controls,
            "seconds": time.perf_counter() - started,
        }
    )
    store.write_json("evaluation.json", content)
    return content


def refuse(config: EvaluateConfig, past: FinishedRun, baselines: Rankings) -> None:
    """Raises BadOption, before a model is loaded, for what the run or this machine cannot do."""
    choices = ("everything", PRICED, *BASELINES, *baselines)
    refuse_baselines("--against", config.baselines, read_pairs(past.config), choices)
    if config.removals not in (None, "off") and not past.repair:
        raise BadOption(
            f"--removals {config.removals}: {past.run.path} is a run of select, which removes no "
            "rows; leave it out, or give a repair run"
        )
    if config.task_names:
        task_names(tuple(config.task_names))
    if past.config.device_map == "none":
        refuse_many_gpus(resolve_device(past.config.device))


def say_libraries(past: FinishedRun, progress: Progress) -> None:
    """What makes tokens may have changed since the run."""
    for name in TOKEN_LIBRARIES:
        before, here = past.manifest["versions"].get(name), version(name)
        if before != here:
            progress.say(
                f"the run was made with {name} {before}, and here is {here}: see that "
                "tokens are the same"
            )


def say_plan(
    questions: TaskQuestions, jobs: Sequence[TrainingJob], first: int, progress: Progress
) -> None:
    """Questions that are left out, and how many trainings there are: the jobs after the `first`
    are those of the removal curve."""
    for task, count in questions.left_out.items():
        if count:
            progress.say(
                f"of the {questions.total[task]} questions of {task}, {count} are left out: "
                "the run's target has them"
            )
    count = len(distinct(jobs))
    if for_curve := count - len(distinct(jobs[:first])):
        progress.say(
            f"{count} trainings, {for_curve} of them for the curve over shares of removed rows "
            "(none with --removals off)"
        )


def encode_holdout(held_out: HeldOutPairs, loaded: LoadedModel, progress: Progress) -> EncodedPairs:
    """Raises BadFile where most answers of one side are truncated; says how many are."""
    pairs = encode_sides(held_out.pairs, loaded.encoder)
    refuse_truncated(held_out.pairs, pairs, loaded.encoder, Polarity())
    chosen, rejected = (sum(row.truncated for row in rows) for rows in pairs)
    if chosen or rejected:
        progress.say(
            f"of {len(pairs.chosen)} held-out pairs {chosen} chosen and {rejected} rejected "
            "answers are truncated: raise --max-length of the run"
        )
    return pairs


def made_of(config: EvaluateConfig, past: FinishedRun) -> list[Any]:
    """What decides the figures of a training beside its rows and settings."""
    holdout = fingerprint(find_files([config.holdout or ""]))
    return [past.mark, holdout, *fingerprints_of(tuple(config.task_names))]


def controls_of(
    past: FinishedRun,
    store: Store,
    loaded: LoadedModel,
    rows: Mapping[int, Encoded],
    progress: Progress,
) -> list[dict[str, Any]]:
    """The controls of the scores, from a file where an earlier evaluation had the same scores."""
    sample = sampled(past)
    mark = digest([past.mark, past.score[sample].tolist()])
    if stored := store.json_of("controls.json", mark):
        return list(stored["controls"])
    targets = read_pairs(past.config)
    if any_alone(targets):
        progress.say("no controls: they exchange the answers of pairs, and some have one alone")
        return []
    by_target = past.run.columns(*(f"score:{name}" for name in targets)).columns
    # the score along the mean direction, whatever the choice went by
    score = np.mean(by_target, axis=0) if by_target else past.score
    share = float(past.chosen.sum() / len(past.scored))
    scored = Sample(
        [rows[row] for row in sample], score[sample], 1 - share if past.repair else share
    )
    results = run_controls(past.reachable, loaded, targets, scored, progress)
    controls = [control.as_json() for control in results]
    store.write_json("controls.json", {"of": mark, "controls": controls})
    return controls


def label_aurocs(
    past: FinishedRun, by_name: Rankings, labelled: Bools, bad: Bools
) -> dict[str, float]:
    """How well each ranking detects the rows that are labelled bad: AUROC, of the scored rows with
    a label."""
    labelled = labelled & np.isfinite(past.score)
    aurocs = dict[str, float]()
    for name, ranking in {"prism": past.ranking, **by_name}.items():
        usable = labelled & np.isfinite(ranking)
        aurocs[name] = auroc(ranking[usable], bad[usable])
    return aurocs
