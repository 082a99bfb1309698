"""Steps: what `pipeline.py` calls one after the other, and the typed values between them.

    Checkpoint       the model that rows are scored at, and a sample of the pool in tokens
    RunDirections    the directions, after curvature and a cut to a rank
    Plan             what the run will cost

Scoring and choosing follow in scoring_steps.py.

Choices made here:
- a step takes the values of earlier steps and returns one value of its own;
- a warm-up's adapter moves into the run folder only after the engine has passed its check.
"""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

from prism_select.commands.read_inputs import EncodedSample, encode_sample
from prism_select.core.layers import Factored
from prism_select.data.batches import collate, plan_batches
from prism_select.data.encoded_rows import first_rows
from prism_select.data.pool import Pool
from prism_select.directions.direction_set import DirectionSet
from prism_select.directions.from_pairs import directions_from_pairs
from prism_select.directions.layout import DirectionLayout
from prism_select.directions.lora import save_adapter
from prism_select.directions.low_rank import stored_numbers
from prism_select.directions.preconditioning import (
    CurvatureFacts,
    fit_curvature,
    pair_curvature_facts,
    preconditioned,
)
from prism_select.directions.saved import load_direction, save_direction
from prism_select.directions.way import with_way
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
    ScoreConfig,
)
from prism_select.run.errors import BadOption
from prism_select.run.folder import Store
from prism_select.run.options import Amount
from prism_select.run.polarity import Polarity
from prism_select.run.progress import Progress
from prism_select.scoring.batched_engine import BatchedEngine
from prism_select.scoring.cost_plan import Plan, make_plan, seconds_per_token
from prism_select.scoring.engine_choice import EngineCheck, choose_engine
from prism_select.scoring.rank_check import RankCheck, compare_ranks, cut_to_rank
from prism_select.scoring.shards import RunInputs
from prism_select.selection.half_columns import halves_later

__all__ = [
    "Checkpoint",
    "ExportedAdapter",
    "RunDirections",
    "StepTimer",
    "begin_run",
    "check_engine",
    "export_adapter",
    "find_directions",
    "load_checkpoint",
    "plan_run",
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
    """From the pairs or from a file, divided by the curvature and cut to --rank. Raises BadOption
    for a file without the chosen half that the options need."""
    model, curvature = checkpoint.loaded.model, None
    with timer.step("target"):
        if config.direction:
            toward = Polarity.of_config(config).toward
            direction_set = load_direction(config.direction, model, toward)
            if config.needs_halves and not direction_set.layout.halves:
                raise BadOption(
                    f"--direction {config.direction}: it has no chosen half, which --halves and "
                    "--cascade need; take one that was made with --halves"
                )
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
