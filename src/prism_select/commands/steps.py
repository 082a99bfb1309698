"""Steps: what `pipeline.py` calls one after the other, and the typed values between them.

    Checkpoint       the model that rows are scored at, and a sample of the pool in tokens
    RunDirections    the directions, after curvature and a cut to a rank
    Plan             what the run will cost
    PoolScores       shards with a score for every row

Choices made here:
- a step takes the values of earlier steps and returns one value of its own;
- a warm-up's adapter moves into the run folder only after the engine has passed its check.
"""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from prism_select.commands.group_scoring import GroupColumns, score_groups
from prism_select.commands.pair_help import drawn_rows, mean_gradient, pair_help
from prism_select.commands.read_inputs import EncodedSample, encode_sample
from prism_select.core.layers import Factored, Parameters
from prism_select.data.batches import collate, plan_batches
from prism_select.data.encoded_rows import first_rows
from prism_select.data.pool import Pool
from prism_select.directions.direction_set import DirectionSet
from prism_select.directions.from_pairs import directions_from_pairs
from prism_select.directions.layout import DirectionLayout
from prism_select.directions.lora import save_adapter
from prism_select.directions.low_rank import beside, on_cpu, stored_numbers
from prism_select.directions.pair_directions import RANK
from prism_select.directions.preconditioning import (
    CurvatureFacts,
    fit_curvature,
    pair_curvature_facts,
    preconditioned,
)
from prism_select.directions.saved import load_direction, save_direction
from prism_select.directions.way import with_way
from prism_select.models.causal_lm import CausalLM
from prism_select.models.layer_selection import is_large
from prism_select.models.loading import LoadedModel, load_model
from prism_select.models.lora_training import (
    ADAPTER,
    has_adapter,
    random_rows,
    warm_up,
    with_adapter,
)
from prism_select.run.config import (
    BESIDE_PAIRS,
    TUNABLE,
    OutputOptions,
    ScoreConfig,
    SelectConfig,
)
from prism_select.run.errors import Unreachable
from prism_select.run.folder import Store
from prism_select.run.options import Amount
from prism_select.run.polarity import Polarity
from prism_select.run.progress import Progress, Silent
from prism_select.run.thresholds import HARDLY_HELPED
from prism_select.scoring.batched_engine import BatchedEngine
from prism_select.scoring.cost_plan import Plan, make_plan, seconds_per_token
from prism_select.scoring.engine_choice import EngineCheck, choose_engine, make_engine
from prism_select.scoring.processes import ProcessGroup
from prism_select.scoring.rank_check import RankCheck, compare_ranks, cut_to_rank
from prism_select.scoring.ray_actors import ActorPool
from prism_select.scoring.scorer import Scorer, TokenCounts
from prism_select.scoring.shards import RunInputs, ScoringJob, score_pool
from prism_select.selection.baselines import rankings
from prism_select.selection.cascade import Cascade, FeatureScorer, Search
from prism_select.selection.cascade_prediction import feature_extractor
from prism_select.selection.choice import Chosen, Known, choose_and_write
from prism_select.selection.half_columns import HalfColumns, halves_later
from prism_select.selection.ranking_columns import with_ranking
from prism_select.selection.scores_file import scores_tables

__all__ = [
    "Checkpoint",
    "ExportedAdapter",
    "PoolScores",
    "RunDirections",
    "StepTimer",
    "begin_run",
    "check_engine",
    "choose",
    "export_adapter",
    "find_directions",
    "group_job",
    "load_checkpoint",
    "make_scorer",
    "plan_run",
    "score_along_groups",
    "score_cascade",
    "score_half",
    "scoring_job",
    "with_halves",
    "with_pair_help",
]

STEPS = ("read", "load", "target", "curvature", "check", "plan", "save", "score", "choose")
ADAPTER_RANK = 16  # of --save-adapter without --rank


Result = TypeVar("Result")


@dataclass
class StepTimer:
    """Seconds of each step; one within another counts for itself alone."""

    seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(STEPS, 0.0))
    started: float = field(default_factory=time.perf_counter)

    @contextmanager
    def step(self, name: str) -> Iterator[None]:
        start, within = time.perf_counter(), sum(self.seconds.values())
        yield
        others = sum(self.seconds.values()) - within
        self.seconds[name] += time.perf_counter() - start - others

    def timed(self, name: str, function: Callable[..., Result]) -> Callable[..., Result]:
        """The function, as that step."""

        def run(*given: Any) -> Result:
            with self.step(name):
                return function(*given)

        return run

    @property
    def total(self) -> float:
        return time.perf_counter() - self.started

    @property
    def timings(self) -> dict[str, float]:
        return {name: self.seconds[name] for name in STEPS} | {"total": self.total}


@dataclass(frozen=True)
class Checkpoint:
    """`new_adapter` is the temporary folder of a warm-up's adapter that was trained just now."""

    loaded: LoadedModel
    sample: EncodedSample
    new_adapter: Path | None


@dataclass(frozen=True)
class RunDirections:
    """`factored` are the directions that rows are scored along: those of the set, cut to a rank
    where the options say so; those `of_groups` have a low rank in any case. `config` has the
    options that --tune has chosen."""

    config: ScoreConfig
    direction_set: DirectionSet
    factored: Sequence[Factored]
    layout: DirectionLayout
    curvature: CurvatureFacts | None
    rank_check: RankCheck | None
    of_groups: Sequence[Factored] = ()
    half: Factored | None = None  # along which some rows are scored after the choice

    @property
    def with_half_later(self) -> "RunDirections":
        """The chosen half apart."""
        count = len(self.layout.targets)
        factored = [*self.factored[:count], *self.factored[count + 1 :]]
        layout = replace(self.layout, halves=False)
        return replace(self, factored=factored, layout=layout, half=self.factored[count])


@dataclass(frozen=True)
class ExportedAdapter:
    """What the manifest says of --save-adapter: the kept shares of the direction's energy."""

    folder: str
    energy_kept: float
    by_weight: Mapping[str, float]


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


def load_checkpoint(
    config: ScoreConfig, store: Store, inputs: RunInputs, progress: Progress
) -> Checkpoint:
    """The model, with a warm-up's adapter merged into it. A plan leaves the warm-up out."""
    loaded = load_model(config, config.layers, progress, inputs.survey.sample)
    sample = encode_sample(config, inputs, loaded.encoder)
    for line in sample.warnings:
        progress.say(line)
    if not config.warmup or config.dry_run:
        return Checkpoint(loaded, sample, None)
    if not config.overwrite and has_adapter(store.path / ADAPTER):
        progress.say("warm-up: the adapter that is in the run folder")
        return Checkpoint(with_adapter(loaded, store.path / ADAPTER), sample, None)
    with progress.task(f"warm-up on {config.warmup} of the pool", None):
        share = Amount.parse("--warmup", config.warmup).value
        examples = (example for _, example in inputs.pool.rows())
        rows = random_rows(examples, loaded.encoder, share, config.seed)
        progress.say(f"warm-up: {len(rows):,} rows, a LoRA adapter of all linear layers")
        warmed, folder = warm_up(loaded, rows, config.seed)
    return Checkpoint(warmed, sample, folder)


def find_directions(
    config: ScoreConfig,
    checkpoint: Checkpoint,
    inputs: RunInputs,
    timer: StepTimer,
    progress: Progress,
) -> RunDirections:
    """From the pairs or from a file, divided by the curvature and cut to --rank."""
    model, curvature = checkpoint.loaded.model, None
    with timer.step("target"):
        if config.direction:
            toward = Polarity.of_config(config).toward
            direction_set = load_direction(config.direction, model, toward)
        else:
            direction_set = directions_from_pairs(
                config, checkpoint.loaded, inputs.targets, progress, checkpoint.sample.rows
            )
            if direction_set.tuning:
                tuning = direction_set.tuning
                config = with_way(config, tuning.chosen.way, tuning.options)
            if config.curvature == "pairs":
                curvature = pair_curvature_facts(config, direction_set)
    if config.curvature in BESIDE_PAIRS:
        with timer.step("curvature"):
            parameters, rows = direction_set.weights, checkpoint.sample.rows
            fitted = fit_curvature(config, model, parameters, rows, config.seed, progress)
            divided = preconditioned(config, direction_set, fitted, progress)
        direction_set, curvature = divided.direction_set, divided.facts
    if curvature:
        for name, cosine in curvature.cosine.items():
            target = f" of {name}" if name else ""
            progress.say(
                f"curvature {config.curvature}: cosine {cosine:.2f} between the direction{target} "
                "before and after"
            )
    groups = direction_set.groups.directions if direction_set.groups else []
    factored, check = direction_set.directions, None
    if direction_set.full:
        check = compare_ranks(config, model, direction_set, direction_set.full)
    elif config.rank_number:
        sample = checkpoint.sample.rows
        factored, check = cut_to_rank(config, config.rank_number, model, direction_set, sample)
    layout = direction_set.layout
    found = RunDirections(config, direction_set, factored, layout, curvature, check, groups)
    later = halves_later(config, layout, checkpoint.sample.pool_rows)
    return found.with_half_later if later else found


def check_engine(
    config: ScoreConfig,
    loaded: LoadedModel,
    directions: RunDirections,
    pool: Pool,
    progress: Progress,
) -> tuple[BatchedEngine, EngineCheck]:
    """An engine that agrees with the definition on the first rows of the pool."""
    parameters, rows = directions.direction_set.weights, first_rows(pool, loaded.encoder)
    engine, check = choose_engine(config, loaded.model, parameters, directions.factored, rows)
    progress.say(
        f"engine {check.engine}: {check.reason}; off by {check.disagreement:.1e} on {check.rows} "
        "rows"
    )
    return engine, check


def plan_run(
    config: ScoreConfig,
    engine: BatchedEngine,
    directions: RunDirections,
    checkpoint: Checkpoint,
    timer: StepTimer,
    processes: int,
) -> Plan:
    """The plan of scoring in so many `processes`. It times the engine for a few seconds with
    --dry-run, otherwise for a fiftieth of the scoring."""
    sample, model = checkpoint.sample, checkpoint.loaded.model
    lengths = [len(row.tokens) for row in sample.rows]
    tokens = round(sum(lengths) / len(lengths) * sample.pool_rows)
    reading = 2 * timer.seconds["read"] + sample.pool_rows * sample.seconds_per_row
    batches = [
        collate([sample.rows[i] for i in batch], model.device)
        for batch in plan_batches(lengths, engine.tokens)
    ]
    elapsed = timer.total
    per_token = seconds_per_token(engine, batches, tokens, config.dry_run) / processes
    numbers = sum(map(stored_numbers, directions.direction_set.directions))
    other_seconds = elapsed + reading
    return make_plan(per_token, tokens, sample.pool_rows, numbers, other_seconds, model.devices)


def begin_run(
    config: ScoreConfig,
    store: Store,
    inputs: RunInputs,
    checkpoint: Checkpoint,
    directions: RunDirections,
) -> None:
    """Makes the run folder: its config, a new adapter, the directions."""
    store.begin(config, inputs.fingerprints)
    if checkpoint.new_adapter:
        store.move_in(ADAPTER, checkpoint.new_adapter)
    save_direction(store, directions.config, directions.direction_set)


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


def export_adapter(
    config: ScoreConfig, loaded: LoadedModel, direction_set: DirectionSet, progress: Progress
) -> ExportedAdapter | None:
    """Writes the direction as a LoRA adapter with --save-adapter."""
    if not config.save_adapter:
        return None
    folder, rank = Path(config.save_adapter), config.rank_number or ADAPTER_RANK
    energy = save_adapter(loaded.model.network, direction_set.direction, rank, folder)
    progress.say(f"adapter in {folder}: {energy.total:.0%} of the direction's energy")
    by_weight = {**energy.by_weight, "total": energy.total}
    return ExportedAdapter(config.save_adapter, energy.total, by_weight)


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


def half_job(job: ScoringJob, half: Factored) -> ScoringJob:
    """The job along the chosen half alone."""
    factored = on_cpu([half])
    settled = {**job.settled, "normalize": "none", "tokens": False}
    layout = DirectionLayout(halves=False)
    return replace(job, kind="halves", directions=factored, layout=layout, settled=settled)


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


def with_pair_help(
    config: ScoreConfig,
    store: Store,
    job: ScoringJob,
    checkpoint: Checkpoint,
    directions: RunDirections,
    chosen: Chosen,
) -> Chosen:
    """With how many pairs the chosen rows hardly help, where the choice serves groups."""
    inputs, loaded = job.inputs, checkpoint.loaded
    if "coverage" not in chosen.figures or not inputs.targets or not chosen.counts.get("selected"):
        return chosen
    verdicts = (table["verdict"] for table in scores_tables(store.path, ["verdict"]))
    taken = np.concatenate([pc.equal(texts, "selected").to_numpy() for texts in verdicts])
    weights, plain = directions.direction_set.weights, replace(config, normalize="none")
    full = directions.direction_set.full
    pairs = [pair for pairs in inputs.targets.values() for pair in pairs]

    choices = {"hardly_helped": taken}
    if chosen.larger is not None:
        choices["hardly_helped_by_twice"] = chosen.larger
    rows = [drawn_rows(inputs.pool, each, loaded, config.seed) for each in choices.values()]
    rank = full.rank if full else RANK if is_large(weights) else None
    along = [mean_gradient(config, loaded, weights, some, rank) for some in rows]
    engine = make_engine(plain, job.engine, loaded.model, weights, along)
    help_of = pair_help(loaded, engine, pairs)
    few = (help_of < HARDLY_HELPED * help_of.mean(0)).sum(0).tolist()
    coverage = {
        **chosen.figures["coverage"],
        "pairs": len(pairs),
        **dict(zip(choices, few, strict=True)),
    }
    return replace(chosen, figures={**chosen.figures, "coverage": coverage})
