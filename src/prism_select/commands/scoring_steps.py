"""Scoring steps: from directions to scores of the pool, and to the choice.

    ScoringJob       all rows along the directions, in a form that other processes can receive
    PoolScores       shards with a score for every row
    along groups     rows within reach of the budget, along the direction of each group of pairs
    halves           the chosen rows and a sample, along the chosen half

Choices made here: what is scored later is a job of its own, with its own kind of shards, so that a
stopped run goes on within it.
"""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from prism_select.commands.group_scoring import GroupColumns, score_groups
from prism_select.commands.steps import RunDirections
from prism_select.core.layers import Factored, Parameters
from prism_select.data.batches import collate
from prism_select.data.encoded_rows import first_rows
from prism_select.directions.layout import DirectionLayout
from prism_select.directions.low_rank import beside, on_cpu
from prism_select.models.causal_lm import CausalLM
from prism_select.models.loading import LoadedModel, load_model
from prism_select.models.lora_training import ADAPTER, with_adapter
from prism_select.run.config import TUNABLE, OutputOptions, ScoreConfig, SelectConfig
from prism_select.run.errors import Unreachable
from prism_select.run.folder import Store
from prism_select.run.progress import Progress, Silent
from prism_select.scoring.engine_choice import make_engine
from prism_select.scoring.processes import ProcessGroup
from prism_select.scoring.ray_actors import ActorPool
from prism_select.scoring.scorer import Scorer, TokenCounts
from prism_select.scoring.shards import RunInputs, ScoringJob, score_pool
from prism_select.selection.baselines import rankings
from prism_select.selection.cascade import Cascade, FeatureScorer, Search
from prism_select.selection.cascade_prediction import feature_extractor
from prism_select.selection.choice import Chosen, Known, choose_and_write
from prism_select.selection.half_columns import HalfColumns
from prism_select.selection.ranking_columns import with_ranking

__all__ = [
    "PoolScores",
    "choose",
    "group_job",
    "make_scorer",
    "score_along_groups",
    "score_cascade",
    "score_half",
    "scoring_job",
    "with_halves",
]


@dataclass(frozen=True)
class PoolScores:
    """A shard for each window of the pool; `search` is how a cascade ended; `groups` are scores
    along groups of pairs, which took `group_seconds`; `halves_of` scores some rows along the chosen
    half after the choice."""

    shards: Sequence[Path]
    counts: TokenCounts
    search: Search | None = None
    groups: GroupColumns | None = None
    group_seconds: float = 0.0
    halves_of: Callable[[NDArray[np.bool_]], HalfColumns] | None = None

    def tables(self) -> Iterator[pa.Table]:
        return map(pq.read_table, self.shards)


def scoring_job(
    inputs: RunInputs,
    directions: RunDirections,
    engine: str,
    finished: Mapping[int, Path],
) -> ScoringJob:
    """The job in a form that other processes can receive: its directions are on the CPU."""
    settled = {n: getattr(directions.config, n) for n in ("template_date", *TUNABLE)}
    factored = on_cpu(directions.factored)
    return ScoringJob(inputs, factored, directions.layout, engine, finished, settled=settled)


def make_scorer(config: ScoreConfig, job: ScoringJob, loaded: LoadedModel | None = None) -> Scorer:
    """The scorer of a job; in another process than the main one the model is loaded first."""
    config = replace(config, **job.settled)
    if loaded is None:
        loaded = load_model(config, config.layers, Silent(), job.inputs.survey.sample)
        if config.warmup:
            loaded = with_adapter(loaded, Path(str(config.out)) / ADAPTER)
    model = loaded.model
    parameters = parameters_of(model, job.directions[0])
    directions = beside(job.directions, parameters)
    batched = make_engine(config, job.engine, model, parameters, directions)
    return Scorer(loaded, batched, job.layout, config)


def parameters_of(model: CausalLM, direction: Factored) -> Parameters:
    """The selected parameters are those of any direction, in its order."""
    named = dict(model.network.named_parameters())
    return {name: named[name] for name in direction}


def score_cascade(
    config: ScoreConfig,
    store: Store,
    job: ScoringJob,
    scorer: Scorer,
    progress: Progress,
) -> PoolScores:
    """Exact scores where the best rows may be, predicted ones elsewhere."""
    model, targets = scorer.loaded.model, len(job.layout.targets)
    parameters = parameters_of(model, job.directions[0])
    directions = beside(job.directions[: targets + 1], parameters)
    first_batch = collate(first_rows(job.inputs.pool, scorer.loaded.encoder), model.device)
    bad_rows = 0

    def scorer_along(directions: Sequence[Factored], layout: DirectionLayout) -> Scorer:
        engine = make_engine(config, job.engine, model, parameters, directions)
        engine(first_batch)  # it sets the step of `difference`: the same after a resumption
        return Scorer(scorer.loaded, engine, layout, config)

    def score_some(kind: str, scorer: Scorer, mask: NDArray[np.bool_] | None) -> list[Path]:
        nonlocal bad_rows
        finished = store.sound_shards(kind)[0]
        some = replace(job, kind=kind, mask=mask, finished=finished, bad_rows=bad_rows)
        scored = score_pool(config, store, some, scorer, ProcessGroup(), progress)
        bad_rows = scored.bad_rows
        return list(scored.paths)

    quick = scorer_along(directions[:targets], replace(job.layout, halves=False))
    half = scorer_along(directions[targets:], DirectionLayout(halves=False))
    features = FeatureScorer(feature_extractor(model, config.seed), scorer)
    shards, search = Cascade(config, store, score_some, features, quick, half, scorer).run()
    return PoolScores(shards, features, search)


def group_job(
    config: ScoreConfig, job: ScoringJob, directions: RunDirections, loaded: LoadedModel
) -> ScoringJob:
    """The job along the groups' directions, by the engine that takes several at once where it
    reaches all parameters. Their scores are summed over tokens."""
    groups = directions.direction_set.groups
    assert groups
    factored = on_cpu(directions.of_groups)
    layout = DirectionLayout(targets=groups.names, lengths=[1.0] * len(factored), halves=False)
    settled = {**job.settled, "normalize": "none", "tokens": False}
    job = replace(job, directions=factored, layout=layout, settled=settled)
    if config.engine != "auto" or job.engine != "difference":
        return job
    together = replace(job, engine="reverse")
    first_batch = collate(first_rows(job.inputs.pool, loaded.encoder), loaded.model.device)
    try:
        make_scorer(config, together, loaded).engine(first_batch)
    except Unreachable:
        return job
    return together


def score_along_groups(
    config: SelectConfig,
    store: Store,
    job: ScoringJob,
    scores: PoolScores,
    worker: Callable[[ScoringJob], tuple[Scorer | ActorPool, ProcessGroup]],
    progress: Progress,
) -> PoolScores:
    """With the scores along groups of pairs; `worker` scores a job of `job`'s kind."""
    start = time.perf_counter()

    def score_some(number: int, rows: NDArray[np.int64]) -> list[Path]:
        kind, mask = f"group{number}", np.zeros(job.inputs.survey.rows, dtype=bool)
        mask[rows] = True
        finished = store.sound_shards(kind)[0]
        some = replace(job, kind=kind, mask=mask, finished=finished)
        scorer, processes = worker(some)
        return list(score_pool(config, store, some, scorer, processes, progress).paths)

    names, pool = job.layout.targets, job.inputs.pool
    groups = score_groups(config, names, scores.tables, pool, score_some)
    progress.say(f"{len(groups.rows):,} rows scored along {len(names)} groups of pairs")
    return replace(scores, groups=groups, group_seconds=time.perf_counter() - start)


def half_job(job: ScoringJob, half: Factored) -> ScoringJob:
    """The job along the chosen half alone."""
    factored = on_cpu([half])
    settled = {**job.settled, "normalize": "none", "tokens": False}
    layout = DirectionLayout(halves=False)
    return replace(job, kind="halves", directions=factored, layout=layout, settled=settled)


def with_halves(
    scores: PoolScores,
    job: ScoringJob,
    directions: RunDirections,
    score_some: Callable[[ScoringJob, NDArray[np.bool_]], HalfColumns],
) -> PoolScores:
    """With what scores some rows along the chosen half after the choice; none where there is no
    half."""
    if directions.half:
        return replace(scores, halves_of=partial(score_some, half_job(job, directions.half)))
    if job.layout.halves:
        return scores
    return replace(scores, halves_of=lambda rows: HalfColumns.of_no_rows())


def score_half(
    config: ScoreConfig,
    store: Store,
    worker: Callable[[ScoringJob], tuple[Scorer | ActorPool, ProcessGroup]],
    progress: Progress,
    job: ScoringJob,
    mask: NDArray[np.bool_],
) -> HalfColumns:
    """Of some rows. `job` is along the chosen half."""
    some = replace(job, mask=mask, finished=store.sound_shards(job.kind)[0])
    scorer, processes = worker(some)
    paths = score_pool(config, store, some, scorer, processes, progress).paths
    table = pa.concat_tables([pq.read_table(path, columns=["row", "score"]) for path in paths])
    table = table.sort_by("row")
    return HalfColumns(table["row"].to_numpy(), table["score"].to_numpy())


def choose(
    config: ScoreConfig,
    store: Store,
    inputs: RunInputs,
    scores: PoolScores,
    loaded: LoadedModel,
    progress: Progress,
) -> Chosen:
    """Verdicts for all rows, and the files of the choice; by a baseline with --rank-by."""
    ranking: NDArray[np.float64] | None = None
    if isinstance(config, OutputOptions) and config.rank_by:
        name, columns = config.rank_by, [config.ranking]
        shards = [pq.read_table(shard, columns=columns)[columns[0]] for shard in scores.shards]
        own = pa.chunked_array(shards, pa.float64()).to_numpy()
        with progress.task(f"ranking by {name}", None):
            ranking = rankings([name], config, loaded, inputs.pool, inputs.targets, own)[name]
    tables = partial(with_ranking, scores.tables, ranking)
    if scores.groups:
        tables = partial(scores.groups.added_to, scores.tables)
    best = scores.search.best if scores.search else None
    known = Known(searched=best, halves_of=scores.halves_of)
    return choose_and_write(config, store, tables, inputs.pool, known)
