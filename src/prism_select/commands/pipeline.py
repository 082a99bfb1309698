"""Pipeline: the steps, read top to bottom; the only place where everything meets.

    survey the pool → read the target → load the model → direction ÷ curvature → engine, checked →
    score, shard by shard → choose → scores.parquet, selected.jsonl, quarantine.jsonl →
    manifest.json

Under torchrun the process of rank 0 leads; the others follow from where the direction is found to
the last shard. With Ray the one process leads, and actors score for it.

Choices made here: nothing is written before the engine has passed its check; a window of `WINDOW`
rows is a shard, so memory does not grow with the pool, and a run that was stopped goes on after its
last whole shard. `repair` swaps every pair on reading: from there on, in columns too, `chosen`
means the unwanted answer."""

import random
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray

from prism_select.commands.manifest import Facts, manifest_of
from prism_select.commands.read_inputs import encode_sample, read_inputs, refuse_another_pool
from prism_select.core.layers import Factored, Parameters
from prism_select.data.batches import collate, plan_batches
from prism_select.data.encoded_rows import first_rows
from prism_select.data.encoding import Encoded, Encoder
from prism_select.data.pool import Pool, Survey, changed, fingerprint
from prism_select.data.remote import is_remote
from prism_select.directions.from_pairs import DirectionSet, aim_at
from prism_select.directions.layout import DirectionLayout
from prism_select.directions.lora import save_adapter
from prism_select.directions.low_rank import placed
from prism_select.directions.preconditioning import Preconditioned, preconditioned, save_curvature
from prism_select.directions.saved import load_direction, save_direction, towards
from prism_select.models.causal_lm import CausalLM
from prism_select.models.loading import load_model
from prism_select.models.lora_training import ADAPTER, drawn, has_adapter, merged, warm_up
from prism_select.run.config import ScoreConfig, SelectConfig
from prism_select.run.errors import BadOption
from prism_select.run.folder import Run, Store
from prism_select.run.options import Amount
from prism_select.run.progress import Progress, Silent
from prism_select.scoring.batched_engine import BatchedEngine
from prism_select.scoring.cost_plan import Plan, make_plan, peak_memory, seconds_per_token
from prism_select.scoring.engine_choice import choose_engine, measure_by
from prism_select.scoring.layer_profile import anatomy_of
from prism_select.scoring.processes import ProcessGroup, process_group
from prism_select.scoring.rank_check import reduced
from prism_select.scoring.ray_actors import ActorPool, hired
from prism_select.scoring.scorer import Scorer
from prism_select.scoring.shards import Inputs, Work, going_on, score_pool
from prism_select.selection.baselines import rankings
from prism_select.selection.cascade import Cascade, FeatureScorer
from prism_select.selection.cascade_prediction import looking
from prism_select.selection.choice import choose_and_write
from prism_select.selection.ranking_columns import with_ranking

__all__ = ["run"]

STEPS = ("load", "target", "curvature", "score", "choose")


@dataclass
class Clock:
    """Seconds of each step, and of two that a plan needs: reading the pool, and encoding a sample
    of it."""

    seconds: dict[str, float] = field(
        default_factory=lambda: dict.fromkeys((*STEPS, "read", "encode"), 0.0)
    )
    started: float = field(default_factory=time.perf_counter)

    @contextmanager
    def step(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.seconds[name] += time.perf_counter() - start

    def total(self) -> dict[str, float]:
        return {name: self.seconds[name] for name in STEPS} | {
            "total": time.perf_counter() - self.started
        }


def run(config: ScoreConfig, progress: Progress | None = None) -> Run | Plan:
    """One command from start to end; a Plan when `dry_run` is on. Raises PrismError for what the
    user can mend."""
    progress = progress or Silent()
    with hired(config, progress) as crew, process_group() as processes:
        done = (
            follow(config, processes) if processes.rank else lead(config, progress, processes, crew)
        )
        processes.gather(None)  # nobody leaves before all files are there
        return done


def follow(config: ScoreConfig, processes: ProcessGroup) -> Run | Plan:
    """Scores a part of the pool for the leader, who has found out already that the command is
    sound."""
    work = processes.receive()
    if not isinstance(work, Work):
        return cast("Run | Plan", work)
    if config.device == "auto" and torch.cuda.is_available():
        config = replace(config, device=f"cuda:{processes.local}")
    files = work.inputs.pool.files
    copied = any(map(is_remote, files))  # by each process for itself
    if copied and fingerprint(files) != work.inputs.fingerprints["pool"]:
        raise changed(files)
    store, scorer = Store(config.out), scorer_of(config, work.directions, work.lines, work.engine)
    score_pool(config, store, work, scorer, processes, Silent())
    return Run(store.path)


def scorer_of(
    config: ScoreConfig, directions: Sequence[Factored], lines: DirectionLayout, engine: str
) -> Scorer:
    """Like the leader's, in another process."""
    model, encoder = load_model(config, Silent())
    if config.warmup:
        model = merged(model, Path(config.out) / ADAPTER)
    known = dict(model.network.named_parameters())
    weights = {name: known[name] for name in directions[0]}
    measure = measure_by(config, engine, model, weights, placed(directions, model.device))
    return Scorer(encoder, measure, lines, config, model.device)


def refuse_several(config: ScoreConfig, processes: ProcessGroup, crew: ActorPool | None) -> None:
    """Raises BadOption for what one process alone can do."""
    if config.cascade and (crew or processes.size > 1):
        raise BadOption("--cascade: runs in one process; leave it out with Ray and under torchrun")
    if (
        config.warmup
        and processes.size > 1
        and (config.overwrite or not has_adapter(Path(config.out) / ADAPTER))
    ):
        what = "trains in one process; start the same command without torchrun, and go on with it once it scores"
        raise BadOption(f"--warmup: {what}")


def lead(
    config: ScoreConfig, progress: Progress, processes: ProcessGroup, crew: ActorPool | None
) -> Run | Plan:
    refuse_several(config, processes, crew)
    clock, store = Clock(), Store(config.out)
    with clock.step("read"):
        inputs = read_inputs(config, progress)
    if not config.dry_run:
        store.refuse_others(config, inputs.fingerprints)
        if store.complete and not config.overwrite:
            progress.say(f"{store.path} is complete already; --overwrite starts it afresh")
            return processes.broadcast(Run(store.path))
    with clock.step("load"):
        model, encoder = load_model(config, progress)
        with clock.step("encode"):
            sample = encode_sample(config, inputs, encoder)
        model, adapter = warmed(config, store, inputs.pool, (model, encoder), progress)
    with clock.step("target"):
        aim = find_direction(config, model, encoder, inputs, progress)
    with clock.step("curvature"):
        aim, sharp = precondition_directions(config, model, aim, sample, progress)
    directions, cut = reduced(config, model, aim, sample) if config.rank else (aim.directions, None)
    engine, checked = choose_engine(
        config, model, aim.weights, directions, first_rows(inputs.pool, encoder)
    )
    progress.say(
        f"engine {checked.engine}: {checked.reason}; off by {checked.disagreement:.1e} on {checked.rows} rows"
    )
    plan = plan_run(
        config, engine, aim, (sample, inputs.survey), clock, crew.size if crew else processes.size
    )
    if config.dry_run:
        return processes.broadcast(plan)
    store.begin(config, inputs.fingerprints)
    if adapter:
        store.move_in(ADAPTER, adapter)
    save_direction(store, config, aim)
    if sharp and config.save_curvature:
        save_curvature(store, sharp.blocks)
    work = Work(
        inputs,
        placed(directions, torch.device("cpu")),
        aim.lines,
        checked.engine,
        going_on(store, progress),
    )
    processes.broadcast(work)
    more = extras(config, store, model, aim, (inputs.pool, encoder, inputs.survey.rows), progress)
    own = Scorer(encoder, engine, aim.lines, config, model.device)
    scorer: Scorer | ActorPool = own
    if crew:
        scorer = crew.at_work(
            partial(scorer_of, crew.config, work.directions, work.lines, work.engine)
        )
    with clock.step("score"):
        if config.cascade:
            shards, more["cascade"] = cascaded(
                config, store, work, own, (model, aim.weights), progress
            )
        else:
            shards, _ = score_pool(config, store, work, scorer, processes, progress)
    progress.say(f"padding was {scorer.padding:.1%} of the tokens computed")
    if scorer.repeated:
        progress.say(about_repeats(config, scorer.repeated))
    with clock.step("choose"):
        ranking = baseline_ranking(config, (model, encoder), inputs, progress)
        tables = partial(with_ranking, lambda: map(pq.read_table, shards), ranking)
        chosen = choose_and_write(
            config, store, tables, inputs.pool, searched=more.get("cascade", {}).get("best")
        )
    refuse_another_pool(store, inputs)
    actual = {
        "seconds": clock.total()["total"],
        "memory_bytes": peak_memory(model.device),
        "tokens": scorer.tokens,
    }
    told = {
        "curvature": sharp.told if sharp else {"name": "flat"},
        **({"rank": cut} if cut else {}),
        **more,
    }
    facts = Facts(
        model,
        encoder.template,
        told,
        inputs.fingerprints,
        clock.total(),
        plan,
        actual,
        scorer.padding,
    )
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


def warmed(
    config: ScoreConfig,
    store: Store,
    pool: Pool,
    loaded: tuple[CausalLM, Encoder],
    progress: Progress,
) -> tuple[CausalLM, Path | None]:
    """The model as it is, or with a merged adapter, and the folder of an adapter that is new. A
    plan is made without: it costs no training, and does not count it."""
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
    config: ScoreConfig, model: CausalLM, encoder: Encoder, inputs: Inputs, progress: Progress
) -> DirectionSet:
    if config.direction:
        return load_direction(config.direction, model, towards(config))
    return aim_at(config, model, encoder, inputs.targets, progress)


def precondition_directions(
    config: ScoreConfig,
    model: CausalLM,
    aim: DirectionSet,
    sample: Sequence[Encoded],
    progress: Progress,
) -> tuple[DirectionSet, Preconditioned | None]:
    """The directions divided by the curvature of a random part of the sample; as they are where it
    is flat."""
    if config.curvature == "flat":
        return aim, None
    rows = random.Random(config.seed).sample(sample, min(len(sample), config.curvature_rows))
    done = preconditioned(config, model, aim, rows, progress)
    for name, cosine in done.told["cosine"].items():
        target = f" of {name}" if name else ""
        progress.say(
            f"curvature {config.curvature}: cosine {cosine:.2f} between the direction{target} before and after"
        )
    if done.told["residual"] is not None:
        progress.say(f"conjugate gradients left {done.told['residual']:.1e} of the direction")
    return done.aim, done


def baseline_ranking(
    config: ScoreConfig, loaded: tuple[CausalLM, Encoder], inputs: Inputs, progress: Progress
) -> NDArray[np.float64] | None:
    if not (isinstance(config, SelectConfig) and config.rank_by):
        return None
    with progress.task(f"ranking by {config.rank_by}", None):
        return rankings([config.rank_by], config, loaded, inputs.pool, inputs.targets)[
            config.rank_by
        ]


def extras(
    config: ScoreConfig,
    store: Store,
    model: CausalLM,
    aim: DirectionSet,
    pooled: tuple[Pool, Encoder, int],
    progress: Progress,
) -> dict[str, Any]:
    """The files that were asked for beside the choice, and what the manifest says of them."""
    told: dict[str, Any] = {}
    if config.save_adapter:
        kept = save_adapter(
            model.network, aim.direction, config.rank or 16, Path(config.save_adapter)
        )
        told["adapter"] = {
            "folder": config.save_adapter,
            "energy_kept": kept["total"],
            "by_weight": dict(kept),
        }
        progress.say(
            f"adapter in {config.save_adapter}: {kept['total']:.0%} of the direction's energy"
        )
    if config.layer_profile:
        anatomy = anatomy_of(config, model, aim, pooled, progress)
        store.write_table("layers.parquet", anatomy.table)
        told["layers"] = anatomy.told
    return told


def plan_run(
    config: ScoreConfig,
    engine: BatchedEngine,
    aim: DirectionSet,
    sampled: tuple[Sequence[Encoded], Survey],
    clock: Clock,
    size: int,
) -> Plan:
    """For `size` processes: a plan takes a few seconds, a run a fiftieth of its scoring."""
    sample, survey = sampled
    rows, lengths = survey.rows - survey.bad, [len(row.tokens) for row in sample]
    tokens = round(sum(lengths) / len(lengths) * rows)
    device = next(iter(aim.weights.values())).device
    encode = clock.seconds["encode"] / max(1, len(survey.sample))
    other = clock.total()["total"] + 2 * clock.seconds["read"] + rows * encode
    batches = [
        collate([sample[place] for place in few], device)
        for few in plan_batches(lengths, engine.tokens)
    ]
    per_token = seconds_per_token(engine, batches, tokens, config.dry_run) / size
    numbers = len(aim.directions) * sum(weight.numel() for weight in aim.weights.values())
    return make_plan(per_token, tokens, rows, numbers, other, device)


def cascaded(
    config: ScoreConfig,
    store: Store,
    work: Work,
    scorer: Scorer,
    loaded: tuple[CausalLM, Parameters],
    progress: Progress,
) -> tuple[list[Path], dict[str, Any]]:
    """In place of `score_pool`; and what the manifest says of it."""
    model, weights = loaded
    targets = len(work.lines.targets)
    directions = placed(work.directions[: targets + 1], model.device)
    first, bad = collate(first_rows(work.inputs.pool, scorer.encoder), model.device), 0

    def along(few: Sequence[Factored], lines: DirectionLayout) -> Scorer:
        measure = measure_by(config, work.engine, model, weights, few)
        measure(
            first
        )  # a difference takes its step from the batch it sees first: after a stop, too, from this one
        return Scorer(scorer.encoder, measure, lines, config, model.device)

    quick = along(directions[:targets], replace(work.lines, halves=False))
    half = along(directions[targets:], DirectionLayout(halves=False))
    looker = FeatureScorer(looking(model, config.seed), scorer)

    def through(kind: str, scorer: Scorer, wanted: NDArray[np.bool_] | None) -> list[Path]:
        nonlocal bad
        part = replace(work, kind=kind, wanted=wanted, there=store.sound_shards(kind)[0], bad=bad)
        paths, bad = score_pool(config, store, part, scorer, ProcessGroup(), progress)
        return paths

    shards, told = Cascade(config, store, through, looker, quick, half, scorer).run()
    scorer.sums = looker.sums
    return shards, told
