"""Pipeline: the steps, read top to bottom; the only place where everything meets.

    survey the pool → read the target → load the model → direction ÷ curvature → engine, checked → score, shard by shard
    → choose → scores.parquet, selected.jsonl, quarantine.jsonl → manifest.json

Under torchrun the process of rank 0 leads; the others follow from where the direction is found to the last shard. With
Ray the one process leads, and actors score for it.

Choices made here: nothing is written before the engine has passed its check; a window of `WINDOW` rows is a shard, so
memory does not grow with the pool, and a run that was stopped goes on after its last whole shard. `repair` swaps
every pair on reading: from there on, in columns too, `chosen` means the unwanted answer.
"""

import math
import random
import time
from collections.abc import Iterator, Mapping, Sequence, Set
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import count, islice
from pathlib import Path
from typing import Any, cast

import numpy as np
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray

from prism_select import models
from prism_select.adapters import load_adapter, save_adapter
from prism_select.anatomy import anatomy_of
from prism_select.cascade import Cascade, Looker
from prism_select.check import check, disagreement
from prism_select.choice import choose_and_write, early_refusals, refuse_budget, with_ranking
from prism_select.cluster import Crew, hired
from prism_select.config import Amount, ModelConfig, RepairConfig, ScoreConfig, SelectConfig
from prism_select.core.engines import ENGINES, Scores
from prism_select.core.layers import Factored, Factors, Weights
from prism_select.core.likelihood import Batch
from prism_select.data.batches import Encoded, Encoder, collate, plan_batches
from prism_select.data.formats import Names, parse_fields
from prism_select.data.inputs import Pool, Survey, changed, fingerprint, read_targets, seen_in_target, target_files
from prism_select.data.readers import readable
from prism_select.data.records import Example, Pair
from prism_select.data.remote import is_remote
from prism_select.errors import BadOption, BadRow, TooManyBadRows, Unreachable
from prism_select.manifest import Checked, Facts, manifest_of
from prism_select.norms import with_norms
from prism_select.planning import Plan, make_plan, peak_memory, seconds_per_token
from prism_select.preconditioning import Sharpened, curvature_file, reduced, save_curvature, sharpened
from prism_select.progress import Progress, Silent
from prism_select.rankings import rankings, refuse_rivals
from prism_select.saving import load_direction, save_direction, towards
from prism_select.scoring import Fitting, Lines, Measure, Scorer, Window, plainly
from prism_select.store import Run, Store, bad_rows_of
from prism_select.surrogate import looking
from prism_select.targeting import Aim, aim_at
from prism_select.warmup import ADAPTER, drawn, has_adapter, merged, warm_up
from prism_select.world import World, joined

__all__ = ["load_model", "refuse_bad_rows", "run"]

WINDOW = 2048  # rows read, sorted by length, scored and written together
CHECKED_ROWS = 8
STEPS = ("load", "target", "curvature", "score", "choose")


@dataclass(frozen=True)
class Inputs:
    pool: Pool
    survey: Survey
    targets: Mapping[str, Sequence[Pair]]
    fingerprints: Mapping[str, str]


@dataclass
class Clock:
    """Seconds of each step, and of two that a plan needs: reading the pool, and encoding a sample of it."""

    seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys((*STEPS, "read", "encode"), 0.0))
    started: float = field(default_factory=time.perf_counter)

    @contextmanager
    def step(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.seconds[name] += time.perf_counter() - start

    def total(self) -> dict[str, float]:
        return {name: self.seconds[name] for name in STEPS} | {"total": time.perf_counter() - self.started}


@dataclass(frozen=True)
class Work:
    """What the leader tells the others: all that scoring takes but the model; `there` are shards already scored. A
    part of the rows may be `wanted`, in shards of a `kind` of their own."""

    inputs: Inputs
    directions: Sequence[Factored]
    lines: Lines
    engine: str
    there: Mapping[int, Path]
    kind: str = ""
    wanted: NDArray[np.bool_] | None = None
    bad: int = 0  # rows of the pool, in what was scored before


def run(config: ScoreConfig, progress: Progress | None = None) -> Run | Plan:
    """One command from start to end; a Plan when `dry_run` is on. Raises PrismError for what the user can mend."""
    progress = progress or Silent()
    with hired(config, progress) as crew, joined() as world:
        done = follow(config, world) if world.rank else lead(config, progress, world, crew)
        world.gather(None)  # nobody leaves before all files are there
        return done


def follow(config: ScoreConfig, world: World) -> Run | Plan:
    """Scores a part of the pool for the leader, who has found out already that the command is sound."""
    work = world.hear()
    if not isinstance(work, Work):
        return cast("Run | Plan", work)
    if config.device == "auto" and torch.cuda.is_available():
        config = replace(config, device=f"cuda:{world.local}")
    files = work.inputs.pool.files
    copied = any(map(is_remote, files))  # by each process for itself
    if copied and fingerprint(files) != work.inputs.fingerprints["pool"]:
        raise changed(files)
    store, scorer = Store(config.out), scorer_of(config, work.directions, work.lines, work.engine)
    score_pool(config, store, work, scorer, world, Silent())
    return Run(store.path)


def scorer_of(config: ScoreConfig, directions: Sequence[Factored], lines: Lines, engine: str) -> Scorer:
    """Like the leader's, in another process."""
    model, encoder = load_model(config, Silent())
    if config.warmup:
        model = merged(model, Path(config.out) / ADAPTER)
    known = dict(model.network.named_parameters())
    weights = {name: known[name] for name in directions[0]}
    measure = measure_by(config, engine, model, weights, placed(directions, model.device))
    return Scorer(encoder, measure, lines, config, model.device)


def refuse_several(config: ScoreConfig, world: World, crew: Crew | None) -> None:
    """Raises BadOption for what one process alone can do."""
    if config.cascade and (crew or world.size > 1):
        raise BadOption("--cascade: runs in one process; leave it out with Ray and under torchrun")
    if config.warmup and world.size > 1 and (config.overwrite or not has_adapter(Path(config.out) / ADAPTER)):
        what = "trains in one process; start the same command without torchrun, and go on with it once it scores"
        raise BadOption(f"--warmup: {what}")


def lead(config: ScoreConfig, progress: Progress, world: World, crew: Crew | None) -> Run | Plan:
    refuse_several(config, world, crew)
    clock, store = Clock(), Store(config.out)
    with clock.step("read"):
        inputs = read_inputs(config, progress)
    if not config.dry_run:
        store.refuse_others(config, inputs.fingerprints)
        if store.complete and not config.overwrite:
            progress.say(f"{store.path} is complete already; --overwrite starts it afresh")
            return world.tell(Run(store.path))
    with clock.step("load"):
        model, encoder = load_model(config, progress)
        with clock.step("encode"):
            sample = encode_sample(config, inputs, encoder)
        model, adapter = warmed(config, store, inputs.pool, (model, encoder), progress)
    with clock.step("target"):
        aim = find_direction(config, model, encoder, inputs, progress)
    with clock.step("curvature"):
        aim, sharp = sharpened_by(config, model, aim, sample, progress)
    directions, cut = reduced(config, model, aim, sample) if config.rank else (aim.directions, None)
    engine, checked = choose_engine(config, model, aim.weights, directions, first_rows(inputs.pool, encoder))
    progress.say(f"engine {checked.engine}: {checked.reason}; off by {checked.disagreement:.1e} on {checked.rows} rows")
    plan = plan_run(config, engine, aim, (sample, inputs.survey), clock, crew.size if crew else world.size)
    if config.dry_run:
        return world.tell(plan)
    store.begin(config, inputs.fingerprints)
    if adapter:
        store.move_in(ADAPTER, adapter)
    save_direction(store, config, aim)
    if sharp and config.save_curvature:
        save_curvature(store, sharp.blocks)
    work = Work(inputs, placed(directions, torch.device("cpu")), aim.lines, checked.engine, going_on(store, progress))
    world.tell(work)
    more = extras(config, store, model, aim, (inputs.pool, encoder, inputs.survey.rows), progress)
    own = Scorer(encoder, engine, aim.lines, config, model.device)
    scorer: Scorer | Crew = own
    if crew:
        scorer = crew.at_work(partial(scorer_of, crew.config, work.directions, work.lines, work.engine))
    with clock.step("score"):
        if config.cascade:
            shards, more["cascade"] = cascaded(config, store, work, own, (model, aim.weights), progress)
        else:
            shards, _ = score_pool(config, store, work, scorer, world, progress)
    progress.say(f"padding was {scorer.padding:.1%} of the tokens computed")
    if scorer.repeated:
        progress.say(about_repeats(config, scorer.repeated))
    with clock.step("choose"):
        ranking = rival_ranking(config, (model, encoder), inputs, progress)
        tables = partial(with_ranking, lambda: map(pq.read_table, shards), ranking)
        chosen = choose_and_write(config, store, tables, inputs.pool, searched=more.get("cascade", {}).get("best"))
    refuse_another_pool(store, inputs)
    actual = {"seconds": clock.total()["total"], "memory_bytes": peak_memory(model.device), "tokens": scorer.tokens}
    told = {"curvature": sharp.told if sharp else {"name": "flat"}, **({"rank": cut} if cut else {}), **more}
    facts = Facts(model, encoder.template, told, inputs.fingerprints, clock.total(), plan, actual, scorer.padding)
    store.write_json("manifest.json", manifest_of(config, aim, checked, chosen, facts))
    store.drop_shards()
    progress.say(
        f"took {actual['seconds']:.1f} s and {actual['memory_bytes'] / 1e9:.2f} GB at its peak; planned were "
        f"{plan.seconds:.1f} s and {plan.memory_bytes / 1e9:.2f} GB"
    )
    return Run(store.path)


def about_repeats(config: ScoreConfig, rows: int) -> str:
    line = f"{rows:,} rows repeat another to the last token and took its score"
    if isinstance(config, SelectConfig) and not config.near_duplicates:
        line += "; each chosen one takes its part of the budget, unless --near-duplicates 1 leaves repeats out"
    return line


def read_inputs(config: ScoreConfig, progress: Progress) -> Inputs:
    """Survey of the pool, pairs of the target: what is wrong with them is found before a model is loaded."""
    models.weights_of(config.model)  # raises where there are none
    mapping = parse_fields(config.fields)
    targets = read_targets(config.target, mapping, config.target_by, config.max_row_bytes) if config.target else {}
    if isinstance(config, RepairConfig):
        targets = {name: [pair.swapped for pair in pairs] for name, pairs in targets.items()}
    if isinstance(config, SelectConfig) and config.rank_by:
        refuse_rivals("--rank-by", [config.rank_by], bool(config.target))
    curvature_file(config)
    if config.layer_profile not in ("", "pool"):
        readable(config.layer_profile)
    pool = Pool(config.pool, mapping, config.max_row_bytes)
    with progress.task("reading the pool", None) as task:
        survey = pool.survey(config.seed, config.curvature_rows * (config.curvature != "flat"), task.advance)
    for file, name in survey.formats.items():
        progress.say(f"{file}: {name}")
    columns = set(survey.columns)
    for file, format, mapped, left in seen_in_target(config.target, mapping, config.target_by, config.max_row_bytes):
        progress.say(f"{file}: {format.name}" + (f"; not used: {', '.join(left[:6])}" if left else ""))
        columns |= mapped
    refuse_columns(config, mapping, columns)
    refuse_bad_rows(config, survey.bad, survey.rows, survey.first_bad)
    early_refusals(config, survey.rows - survey.bad, pool)
    files = target_files(config.target) if config.target else [readable(config.direction)]
    prints = {"pool": fingerprint(pool.files), "target": fingerprint(files), "model": fingerprint_of(config)}
    return Inputs(pool, survey, targets, prints)


def fingerprint_of(config: ScoreConfig) -> str:
    """Of the model, with the adapter on it."""
    return models.fingerprint(config.model) + ("+" + models.fingerprint(config.adapter) if config.adapter else "")


def refuse_another_pool(store: Store, inputs: Inputs) -> None:
    """Raises BadFile where the pool is no longer what it was at the start; its scores, of nobody knows what, go."""
    if fingerprint(inputs.pool.files) != inputs.fingerprints["pool"]:
        store.drop_shards()
        raise changed(inputs.pool.files)


def refuse_columns(config: ScoreConfig, mapping: Names, there: Set[str]) -> None:
    """Raises BadOption for a field of which no row has any column."""
    for name, columns in mapping.items():
        if not there & set(columns):
            where = "pool or target has" if config.target else "the pool has"
            raise BadOption(f"--fields {name}={columns[0]}: no row of {where} such a column; check the name")


def refuse_bad_rows(config: ModelConfig, bad: int, rows: int, first: BadRow | None) -> None:
    """Raises the first bad row itself, or TooManyBadRows, as the options ask."""
    if first is None:
        return
    if config.bad_rows == "stop":
        raise first
    if bad > round(config.allowed_bad * rows, 6):  # 29% of 100 is 29
        enough = f"--max-bad {math.ceil(100 * bad / rows)}%"
        raise TooManyBadRows(
            first.file,
            first.line,
            f"{first.what} (the first of {bad} bad rows found among {rows}, and --max-bad allows {config.max_bad})",
            f"{first.advice}; or set such rows aside, in quarantine.jsonl, with {enough}",
        )


def load_model(config: ModelConfig, progress: Progress) -> tuple[models.CausalLM, Encoder]:
    with progress.task(f"loading {config.model}", None):
        model, tokenizer = models.load(config.model, config.dtype, models.resolve_device(config.device))
        if config.adapter:
            model = load_adapter(model.network, Path(config.adapter), merge=config.layers != "adapter")
    limit = getattr(model.network.config, "max_position_embeddings", None) or config.max_length
    encoder = Encoder(tokenizer, config.template, min(config.max_length, limit), model.vocabulary, config.skip_end)
    progress.say(
        f"{type(model.network).__name__} in {str(model.dtype).removeprefix('torch.')} on {model.device}, template "
        f"{encoder.template}, at most {encoder.max_length} tokens a row"
    )
    return model, encoder


def warmed(
    config: ScoreConfig, store: Store, pool: Pool, loaded: tuple[models.CausalLM, Encoder], progress: Progress
) -> tuple[models.CausalLM, Path | None]:
    """The model as it is, or with a merged adapter, and the folder of an adapter that is new. A plan is made without:
    it costs no training, and does not count it."""
    model, encoder = loaded
    if not config.warmup or config.dry_run:
        return model, None
    if not config.overwrite and has_adapter(store.path / ADAPTER):
        progress.say("warm-up: the adapter that is in the run folder")
        return merged(model, store.path / ADAPTER), None
    with progress.task(f"warm-up on {config.warmup} of the pool", None):
        share = Amount.parse("--warmup", config.warmup).value
        rows = drawn((example for _, example in pool.rows()), encoder, share, config.seed)
        progress.say(f"warm-up: {len(rows):,} rows, a LoRA adapter of all linear layers")
        return warm_up(model, encoder, rows, config.seed)


def find_direction(
    config: ScoreConfig, model: models.CausalLM, encoder: Encoder, inputs: Inputs, progress: Progress
) -> Aim:
    if config.direction:
        return load_direction(config.direction, model, towards(config))
    return aim_at(config, model, encoder, inputs.targets, progress)


def sharpened_by(
    config: ScoreConfig, model: models.CausalLM, aim: Aim, sample: Sequence[Encoded], progress: Progress
) -> tuple[Aim, Sharpened | None]:
    """The directions divided by the curvature of a random part of the sample; as they are where it is flat."""
    if config.curvature == "flat":
        return aim, None
    rows = random.Random(config.seed).sample(sample, min(len(sample), config.curvature_rows))
    done = sharpened(config, model, aim, rows, progress)
    for name, cosine in done.told["cosine"].items():
        target = f" of {name}" if name else ""
        progress.say(
            f"curvature {config.curvature}: cosine {cosine:.2f} between the direction{target} before and after"
        )
    if done.told["residual"] is not None:
        progress.say(f"conjugate gradients left {done.told['residual']:.1e} of the direction")
    return done.aim, done


def rival_ranking(
    config: ScoreConfig, loaded: tuple[models.CausalLM, Encoder], inputs: Inputs, progress: Progress
) -> NDArray[np.float64] | None:
    if not (isinstance(config, SelectConfig) and config.rank_by):
        return None
    with progress.task(f"ranking by {config.rank_by}", None):
        return rankings([config.rank_by], config, loaded, inputs.pool, inputs.targets)[config.rank_by]


def extras(
    config: ScoreConfig,
    store: Store,
    model: models.CausalLM,
    aim: Aim,
    pooled: tuple[Pool, Encoder, int],
    progress: Progress,
) -> dict[str, Any]:
    """The files that were asked for beside the choice, and what the manifest says of them."""
    told: dict[str, Any] = {}
    if config.save_adapter:
        kept = save_adapter(model.network, aim.direction, config.rank or 16, Path(config.save_adapter))
        told["adapter"] = {"folder": config.save_adapter, "energy_kept": kept["total"], "by_weight": dict(kept)}
        progress.say(f"adapter in {config.save_adapter}: {kept['total']:.0%} of the direction's energy")
    if config.layer_profile:
        anatomy = anatomy_of(config, model, aim, pooled, progress)
        store.write_table("layers.parquet", anatomy.table)
        told["layers"] = anatomy.told
    return told


def encode_sample(config: ScoreConfig, inputs: Inputs, encoder: Encoder) -> list[Encoded]:
    """The rows of the survey's sample that can be encoded. What would stop the run hours later stops it here: too many
    rows that cannot be encoded, a conversation without a template, a budget larger than the pool."""
    survey, sample, bad = inputs.survey, list[Encoded](), list[BadRow]()
    for example in survey.sample:
        try:
            sample.append(encoder.encode(example))
        except BadRow as error:
            bad.append(error)
    if survey.conversation:
        with suppress(BadRow):
            encoder.encode(survey.conversation)
    refuse_bad_rows(config, survey.bad + len(bad), survey.rows, survey.first_bad or next(iter(bad), None))
    sampled = [row.targets for row in sample] + [0] * len(bad)
    refuse_budget(config, sampled, survey.rows - survey.bad, partial(targets_of, inputs.pool, encoder))
    return sample or first_rows(inputs.pool, encoder)


def targets_of(pool: Pool, encoder: Encoder) -> Iterator[int]:
    """Supervised tokens of each row of the pool that can be encoded."""
    for _, example in pool.rows():
        if isinstance(example, Example):
            with suppress(BadRow):
                yield encoder.encode(example).targets


def first_rows(pool: Pool, encoder: Encoder) -> list[Encoded]:
    """The first rows that can be scored: what the engine is checked on. Raises BadRow where there are none."""
    rows: list[Encoded] = []
    first_bad: BadRow | None = None
    for _, example in pool.rows():
        try:
            rows.append(encoder.encode(example) if isinstance(example, Example) else _raise(example))
        except BadRow as bad:
            first_bad = first_bad or bad
        if len(rows) == CHECKED_ROWS:
            break
    if not rows and first_bad:
        raise first_bad
    return rows


def _raise(error: BadRow) -> Encoded:
    raise error


def choose_engine(
    config: ScoreConfig,
    model: models.CausalLM,
    weights: Weights,
    directions: Sequence[Factored],
    rows: Sequence[Encoded],
) -> tuple[Fitting, Checked]:
    """The engine asked for, or the cheapest that reaches every weight and tells what is asked; checked against the
    definition either way, on those of `rows` that have a score."""
    order = engines_for(config, torch.finfo(model.dtype).bits < 32)
    slow = ENGINES["reference"](model, weights, directions)
    exact = slow(collate(rows, model.device))
    finite = exact.values.isfinite().all(dim=1) & exact.loglik.isfinite()
    kept = finite if finite.any() else ~finite  # where no row has a score, the check says so
    known = Scores(exact.loglik[kept], exact.values[kept])
    batch = collate([row for row, keep in zip(rows, kept.tolist(), strict=True) if keep], model.device)
    dtype = str(model.dtype).removeprefix("torch.")
    why = f"asked for, {dtype}"
    for name in order:
        if config.engine == "auto" and name == "reverse":
            why = f"one backward pass reaches all {len(weights)} weights in {dtype}"
        if config.engine == "auto" and config.cascade and name == "difference":
            why = f"the cheapest along one direction at a time, {dtype}"
        measure = measure_by(config, name, model, weights, directions)
        try:
            return measure, Checked(name, why, dtype, len(batch), *apart(name, measure, known, batch, model.dtype))
        except Unreachable as error:
            why = str(error).partition("; try")[0]
            if name == order[-1] and config.normalize == "norm":
                raise BadOption(f"--normalize norm: {why}; try --normalize tokens") from error
            if name == order[-1]:
                raise
    raise AssertionError("unreachable")


def apart(name: str, measure: Measure, known: Scores, batch: Batch, dtype: torch.dtype) -> tuple[float, float]:
    """Of an engine's scores from the definition's, and from themselves when taken twice. Raises what `check` does."""
    (found, _), (again, _) = (measure(batch) for _ in range(2))
    return check(name, lambda _: found, lambda _: known, batch, dtype), disagreement(again.values, found.values)


def engines_for(config: ScoreConfig, narrow: bool) -> list[str]:
    """In the order in which they are tried; `narrow` is a dtype below float32."""
    if config.engine != "auto":
        return [config.engine]
    if config.tokens:
        return ["forward"] if narrow else ["forward", "difference"]
    if config.normalize == "norm":
        return ["reverse"]
    if config.cascade and not narrow:
        return ["difference"]
    return ["reverse", "forward" if narrow else "difference", "reference"]


def measure_by(
    config: ScoreConfig, engine: str, model: models.CausalLM, weights: Weights, directions: Sequence[Factored]
) -> Fitting:
    cosines = config.normalize == "norm"
    plain = with_norms(model, weights, directions) if cosines else plainly(ENGINES[engine](model, weights, directions))
    return Fitting(plain, config.tokens_on(model.device.type, graph=engine != "difference"))


def placed(directions: Sequence[Factored], device: torch.device) -> list[Factored]:
    def moved(value: torch.Tensor | Factors) -> torch.Tensor | Factors:
        if isinstance(value, torch.Tensor):
            return value.to(device)
        return Factors(*(part.to(device) for part in value))

    return [{name: moved(value) for name, value in direction.items()} for direction in directions]


def plan_run(
    config: ScoreConfig, engine: Fitting, aim: Aim, sampled: tuple[Sequence[Encoded], Survey], clock: Clock, size: int
) -> Plan:
    """For `size` processes: a plan takes a few seconds, a run a fiftieth of its scoring."""
    sample, survey = sampled
    rows, lengths = survey.rows - survey.bad, [len(row.tokens) for row in sample]
    tokens = round(sum(lengths) / len(lengths) * rows)
    device = next(iter(aim.weights.values())).device
    encode = clock.seconds["encode"] / max(1, len(survey.sample))
    other = clock.total()["total"] + 2 * clock.seconds["read"] + rows * encode
    batches = [collate([sample[place] for place in few], device) for few in plan_batches(lengths, engine.tokens)]
    per_token = seconds_per_token(engine, batches, tokens, config.dry_run) / size
    numbers = len(aim.directions) * sum(weight.numel() for weight in aim.weights.values())
    return make_plan(per_token, tokens, rows, numbers, other, device)


def going_on(store: Store, progress: Progress) -> dict[int, Path]:
    """The shards of an earlier start of the same command."""
    there, damaged = store.sound_shards()
    if there:
        progress.say(f"{len(there)} shards of {WINDOW} rows are there already: going on with the others")
    if damaged:
        progress.say(f"shards that were damaged on the disk and are scored again: {', '.join(map(str, damaged))}")
    return there


def cascaded(
    config: ScoreConfig,
    store: Store,
    work: Work,
    scorer: Scorer,
    loaded: tuple[models.CausalLM, Weights],
    progress: Progress,
) -> tuple[list[Path], dict[str, Any]]:
    """In place of `score_pool`; and what the manifest says of it."""
    model, weights = loaded
    targets = len(work.lines.targets)
    directions = placed(work.directions[: targets + 1], model.device)
    first, bad = collate(first_rows(work.inputs.pool, scorer.encoder), model.device), 0

    def along(few: Sequence[Factored], lines: Lines) -> Scorer:
        measure = measure_by(config, work.engine, model, weights, few)
        measure(first)  # a difference takes its step from the batch it sees first: after a stop, too, from this one
        return Scorer(scorer.encoder, measure, lines, config, model.device)

    quick = along(directions[:targets], replace(work.lines, halves=False))
    half = along(directions[targets:], Lines(halves=False))
    looker = Looker(looking(model, config.seed), scorer)

    def through(kind: str, scorer: Scorer, wanted: NDArray[np.bool_] | None) -> list[Path]:
        nonlocal bad
        part = replace(work, kind=kind, wanted=wanted, there=store.sound_shards(kind)[0], bad=bad)
        paths, bad = score_pool(config, store, part, scorer, World(), progress)
        return paths

    shards, told = Cascade(config, store, through, looker, quick, half, scorer).run()
    scorer.sums = looker.sums
    return shards, told


def score_pool(
    config: ScoreConfig, store: Store, work: Work, scorer: Scorer | Crew, world: World, progress: Progress
) -> tuple[list[Path], int]:
    """Every row that is wanted, window by window; returns the shards, those of all processes, and how many bad rows
    this one has met so far. Stops as soon as there are too many, or the pool changes; what is scored by then stays,
    since --max-bad may be raised for the same run."""
    pool, rows = work.inputs.pool, work.inputs.survey.rows
    wanted = rows if work.wanted is None else int(work.wanted.sum())
    windows, bad = 0, work.bad
    first: tuple[int, BadRow] | None = None  # in the order of the pool, whatever that of the windows
    with progress.task(f"scoring {work.kind}".rstrip(), wanted) as task:
        for window, table in scorer.tables(windows_of(work, world), task):
            windows += 1
            task.advance(len(window.rows) * (table is None))
            pool.refuse_changes({raw.file for raw, _ in window.rows})
            shard = store.write_shard(window.number, table, work.kind) if table else work.there.get(window.number)
            found = bad_rows_of(shard) if shard else []
            bad += len(found)
            if found and (first is None or window.number < first[0]):
                first = window.number, found[0]
            refuse_bad_rows(config, bad, rows, first and first[1])
    pool.refuse_changes()
    scorer.sums = [sum(part) for part in zip(*world.gather(scorer.sums), strict=True)]
    shards = store.present_shards(work.kind)
    if world.size > 1:
        every = [row for number in range(windows) for row in bad_rows_of(shards[number])]
        refuse_bad_rows(config, len(every), rows, next(iter(every), None))
        world.gather(None)  # all have read the shards before the leader drops them
    return [shards[number] for number in range(windows)], bad


def windows_of(work: Work, world: World) -> Iterator[Window]:
    """The pool, or the part of it that is asked for, in windows; wanted are those that this process has to score, and
    that are not there already."""
    part = work.wanted
    asked = count() if part is None else np.flatnonzero(part).tolist()
    found = zip(asked, work.inputs.pool.rows(part), strict=False)
    for number in count():
        if not (window := list(islice(found, WINDOW))):
            return
        places, rows = zip(*window, strict=True)
        yield Window(number, places, rows, world.has(number) and number not in work.there)
