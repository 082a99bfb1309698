"""Pipeline: the steps of score, select and repair, from top to bottom.

    read the pool and the pairs → load the model → direction ÷ curvature → engine, checked → plan →
    score, shard by shard → choose → scores.parquet, selected.jsonl, quarantine.jsonl →
    manifest.json

Choices made here:
- nothing is written before the engine has passed its check;
- under torchrun the process of rank 0 runs all steps, and the others only score; with Ray this
  process runs all steps, and actors score;
- `repair` exchanges the two answers of each pair on reading: from there on, in columns too,
  `chosen` means the unwanted answer.
"""

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import cast

import torch

from prism_select.commands.manifest import RunRecord, diagnosis_warnings, manifest_of
from prism_select.commands.pair_help import with_pair_help
from prism_select.commands.plan_without_weights import plan_without_weights
from prism_select.commands.read_inputs import read_inputs, refuse_changed_pool
from prism_select.commands.scoring_steps import (
    PoolScores,
    choose,
    group_job,
    make_scorer,
    score_along_groups,
    score_cascade,
    score_half,
    scoring_job,
    with_halves,
)
from prism_select.commands.select_again import refuse_other_format
from prism_select.commands.steps import (
    Checkpoint,
    RunDirections,
    StepTimer,
    begin_run,
    check_engine,
    export_adapter,
    find_directions,
    load_checkpoint,
    plan_run,
)
from prism_select.data.batches import collate
from prism_select.data.encoded_rows import first_rows
from prism_select.data.pool import changed, fingerprint
from prism_select.data.remote import is_remote
from prism_select.models.loading import LoadedModel
from prism_select.models.lora_training import ADAPTER, has_adapter
from prism_select.models.without_weights import config_alone
from prism_select.run.config import ScoreConfig, SelectConfig
from prism_select.run.errors import BadOption
from prism_select.run.folder import Run, Store
from prism_select.run.polarity import Polarity
from prism_select.run.progress import Progress, Silent
from prism_select.scoring.cost_plan import Plan, peaks_by_device
from prism_select.scoring.processes import ProcessGroup, process_group
from prism_select.scoring.ray_actors import ActorPool, actor_pool
from prism_select.scoring.scorer import Scorer
from prism_select.scoring.shards import RunInputs, ScoringJob, finished_shards, score_pool

__all__ = ["run"]


def run(config: ScoreConfig, progress: Progress | None = None) -> Run | Plan:
    """One command from start to end; with `dry_run` its Plan. Raises PrismError for what the user
    can correct."""
    progress = progress or Silent()
    with actor_pool(config, progress) as actors, process_group() as processes:
        if processes.rank:
            result = run_worker(config, processes)
        else:
            result = run_main(config, progress, processes, actors)
        processes.gather(None)  # no process leaves before all files are there
        return result


def run_main(
    config: ScoreConfig, progress: Progress, processes: ProcessGroup, actors: ActorPool | None
) -> Run | Plan:
    """All steps; the other processes receive the job, the plan or the finished run."""
    refuse_parallel(config, processes, actors)
    timer, store = StepTimer(), Store(str(config.out))
    config = store.with_first_day(config)
    with timer.step("read"):
        inputs = read_inputs(config, progress)
    size = actors.size if actors else processes.size
    if early := without_a_model(config, store, inputs, size, progress):
        return processes.broadcast(early)

    with timer.step("load"):
        checkpoint = load_checkpoint(config, store, inputs, progress)
        loaded = checkpoint.loaded
        config = with_day(config, store, inputs, loaded)
    directions = find_directions(config, checkpoint, inputs, timer, progress)
    given, config = config, say_diagnosis(directions, progress)
    with timer.step("check"):
        engine, check = check_engine(config, loaded, directions, inputs.pool, progress)
    with timer.step("plan"):
        plan = plan_run(config, engine, directions, checkpoint, timer, size)
    if config.dry_run:
        return processes.broadcast(plan)

    with timer.step("save"):
        begin_run(given, store, inputs, checkpoint, directions)
    job = scoring_job(inputs, directions, check.engine, finished_shards(store, progress))
    processes.broadcast(job)
    adapter = export_adapter(config, loaded, directions.direction_set, progress)
    scorer = Scorer(loaded, engine, job.layout, config)
    with timer.step("score"):
        if config.cascade:
            scores = score_cascade(config, store, job, scorer, progress)
        else:
            worker = start_actors(actors, job) if actors else scorer
            shards = score_pool(config, store, job, worker, processes, progress)
            scores = PoolScores(shards.paths, worker)
        worker_of = partial(other_worker, config, checkpoint, processes, actors)
        if directions.of_groups and isinstance(config, SelectConfig):
            along = group_job(config, job, directions, loaded)
            scores = score_along_groups(config, store, along, scores, worker_of, progress)
    take = timer.timed("score", partial(score_half, config, store, worker_of, progress))
    scores = with_halves(scores, job, directions, take)
    say_counts(config, scores, progress)

    with timer.step("choose"):
        chosen = choose(config, store, inputs, scores, loaded, progress)
        processes.broadcast(Run(store.path))  # no more jobs
        chosen = with_pair_help(config, store, job, checkpoint, directions, chosen)
    refuse_changed_pool(store, inputs)
    record = RunRecord(
        input_warnings=[*inputs.warnings, *checkpoint.sample.warnings],
        fingerprints=inputs.fingerprints,
        loaded=loaded,
        directions=directions,
        engine=check,
        adapter=adapter,
        scores=scores,
        chosen=chosen,
        timings=timer.timings,
        plan=plan,
        memory_bytes=sum(peaks_by_device(loaded.model.devices).values()),
    )
    store.write_json("manifest.json", manifest_of(config, record))
    store.drop_shards()
    say_price(record, progress)
    return Run(store.path)


def run_worker(config: ScoreConfig, processes: ProcessGroup) -> Run | Plan:
    """Scores the windows of this process. The main process has found out already that the command
    is sound."""
    store = Store(str(config.out))
    while isinstance(job := processes.receive(), ScoringJob):
        one_each = config.device == "auto" and config.device_map == "none"
        if one_each and torch.cuda.is_available():
            config = replace(config, device=f"cuda:{processes.local_rank}")
        files = job.inputs.pool.files
        downloaded = any(map(is_remote, files))  # by each process on its own
        if downloaded and fingerprint(files) != job.inputs.fingerprints["pool"]:
            raise changed(files)
        scorer = make_scorer(config, job)
        score_pool(config, store, job, scorer, processes, Silent())
    return cast("Run | Plan", job)


def other_worker(
    config: ScoreConfig,
    checkpoint: Checkpoint,
    processes: ProcessGroup,
    actors: ActorPool | None,
    job: ScoringJob,
) -> tuple[Scorer | ActorPool, ProcessGroup]:
    """Who scores a job along other directions: all processes, or new actors."""
    processes.broadcast(job)
    if actors:
        return start_actors(actors, job), processes
    scorer = make_scorer(config, job, checkpoint.loaded)
    rows = first_rows(job.inputs.pool, checkpoint.loaded.encoder)
    scorer.engine(collate(rows, checkpoint.loaded.model.device))  # sets the step of `difference`
    return scorer, processes


def start_actors(actors: ActorPool, job: ScoringJob) -> ActorPool:
    """Each actor makes a scorer of its own."""
    return actors.start(partial(make_scorer, actors.config, job))


def refuse_parallel(config: ScoreConfig, processes: ProcessGroup, actors: ActorPool | None) -> None:
    """Raises BadOption for what needs a single process."""
    if config.cascade and (actors or processes.size > 1):
        raise BadOption("--cascade: runs in one process; leave it out with Ray and under torchrun")
    if not config.warmup or processes.size == 1:
        return
    if config.overwrite or not has_adapter(Path(str(config.out)) / ADAPTER):
        raise BadOption(
            "--warmup: trains in one process; start the same command without torchrun, and go on "
            "with it once it scores"
        )


def with_day(
    config: ScoreConfig, store: Store, inputs: RunInputs, loaded: LoadedModel
) -> ScoreConfig:
    """The config with the day that the chat template shows, where it asks for one. Raises
    RunMismatch where the run folder is that of another day."""
    if config.template_date or not loaded.encoder.date.day:
        return config
    config = replace(config, template_date=loaded.encoder.date.day)
    if not config.dry_run:
        store.refuse_others(config, inputs.fingerprints)
    return config


def without_a_model(
    config: ScoreConfig, store: Store, inputs: RunInputs, processes: int, progress: Progress
) -> Run | Plan | None:
    """A complete run, or the plan of a model whose weights are not here."""
    if config.dry_run and config_alone(str(config.model)):
        return plan_without_weights(config, inputs, processes, progress)
    if not config.dry_run and is_complete(config, store, inputs, progress):
        return Run(store.path)
    return None


def is_complete(config: ScoreConfig, store: Store, inputs: RunInputs, progress: Progress) -> bool:
    """Whether the run folder holds this run already, complete. Raises RunMismatch where it holds
    another."""
    store.refuse_others(config, inputs.fingerprints)
    if not store.complete or config.overwrite:
        return False
    refuse_other_format(config, store)
    progress.say(f"{store.path} is complete already; --overwrite starts it afresh")
    return True


def say_diagnosis(directions: RunDirections, progress: Progress) -> ScoreConfig:
    """The config, with what --tune has chosen."""
    polarity = Polarity.of_config(directions.config)
    for line in diagnosis_warnings(directions.direction_set, polarity):
        progress.say(line)
    return directions.config


def say_price(record: RunRecord, progress: Progress) -> None:
    plan, seconds = record.plan, record.timings["total"]
    progress.say(
        f"took {seconds:.1f} s and {record.memory_bytes / 1e9:.2f} GB at its peak; planned were "
        f"{plan.seconds:.1f} s and {plan.memory_bytes / 1e9:.2f} GB"
    )


def say_counts(config: ScoreConfig, scores: PoolScores, progress: Progress) -> None:
    progress.say(f"padding was {scores.counts.padding:.1%} of the tokens computed")
    if not scores.counts.repeated:
        return
    line = f"{scores.counts.repeated:,} rows repeat another to the last token and took its score"
    if isinstance(config, SelectConfig) and config.near_duplicates is None:
        line += (
            "; each chosen one counts towards the budget, unless --near-duplicates 1 leaves "
            "repeats out"
        )
    progress.say(line)
