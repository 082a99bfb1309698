"""Evaluation: does the choice of a run help? Fine-tune on it and on its rivals, and compare on held-out pairs.

    select    rival      the rows at the top of its ranking, as many supervised tokens as were chosen
              prism      the chosen rows             everything    every scored row       none    no training
    repair    rival      all rows but the top of its ranking, as many rows as were removed
              prism      the kept rows

    predicted = Σ score / Σ supervised tokens of the rows trained on       realised = J after − J before

    priced    random rows for as many more steps as scoring would have paid for, and in select as many more rows
              price = forwards of the pool, pairs and curvature included;   a step costs 3 forwards of its rows
    LDS       rank correlation over random halves S of the rows of   J after training on S   with   Σ_{z in S} score(z)

Choices made here: every method takes the same number of steps, the passes of the choice, since passes of its own would
give a method of short rows more steps at the same tokens. A loss is a mean over tokens, so a training's forecast is a
score per token, which at equal tokens orders methods as the sum of scores does. Fine-tuning starts where the scores
were taken. In repair, scores point to the unwanted answers, so forecasts are turned. Target prompts are no held-out
prompts. What is measured of a model stands in retraining.py.

RUN/evaluation/  evaluation.json  methods.parquet  curves.parquet  controls.json  rankings.parquet
                 retrained/METHOD-SEED.parquet
"""

import math
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from prism_select.baselines import COUNT_RIVALS, RIVALS, Texts
from prism_select.boards import known_board
from prism_select.choice import labels_of
from prism_select.config import EvaluateConfig, RepairConfig, ScoreConfig, SelectConfig, settings
from prism_select.controls import Sample, run_controls
from prism_select.core.likelihood import mean_logliks
from prism_select.data.batches import Encoded, Encoder, collate, plan_batches
from prism_select.data.formats import parse_fields
from prism_select.data.inputs import Pool, fingerprint, read_target, read_targets, target_files
from prism_select.data.readers import find_files
from prism_select.data.records import Example, Pair
from prism_select.errors import BadOption, BadRow
from prism_select.models import CausalLM, resolve_device
from prism_select.pipeline import CHECKED_ROWS, choose_engine, fingerprint_of, load_model
from prism_select.planning import timed
from prism_select.preconditioning import reduced
from prism_select.progress import Progress, Silent
from prism_select.rankings import rankings, refuse_rivals
from prism_select.retraining import MEASURES, Bench, Lot, Tried, digest
from prism_select.saving import load_direction, towards
from prism_select.statistics import auroc, halves, lds
from prism_select.store import Run, Store, finite
from prism_select.targeting import as_side, encode_sides
from prism_select.tasks import fingerprints_of, known_tasks
from prism_select.verdicts import PRICED, break_even_of, figures, write_tables
from prism_select.warmup import ADAPTER, RATE, ROWS_A_STEP, Course, has_adapter, merged, refuse_many_gpus

__all__ = ["evaluate", "filled"]

SAMPLED = 512  # rows that controls score again
TIMED = 32  # rows on which scoring is timed against a forward pass
FULL_RATE = 2e-5
DRAWN = ("random", "random-by-source")
PRICED_SEEDS = 3
Floats: TypeAlias = NDArray[np.float64]
Rows: TypeAlias = NDArray[np.int64]
Rivals: TypeAlias = Mapping[str, Floats]


@dataclass(frozen=True)
class Past:
    """A complete run: `config` is what it scored with, `home` the folder of these scores; of each row of the pool the
    score and what the choice went by (NaN without one), its supervised tokens and its length in tokens, its source, and
    whether training takes it, and whether its score is exact."""

    run: Run
    manifest: Mapping[str, Any]
    config: ScoreConfig
    home: Path
    score: Floats
    ranking: Floats
    tokens: Rows
    length: Rows
    source: Sequence[str]
    taken: NDArray[np.bool_]
    exact: NDArray[np.bool_]

    @property
    def repair(self) -> bool:
        return isinstance(self.config, RepairConfig)

    @property
    def mark(self) -> list[Any]:
        """What makes its scores: not how many tokens were in a batch."""
        return [self.manifest["fingerprints"], {k: v for k, v in settings(self.config).items() if k != "batch_tokens"}]

    @property
    def reachable(self) -> ScoreConfig:
        """With the engine that reached all weights."""
        return replace(self.config, engine=self.manifest["engine"]["name"])

    @property
    def scored(self) -> Rows:
        return np.flatnonzero(np.isfinite(self.score))

    def forecast(self, rows: Rows) -> float:
        return float((-1 if self.repair else 1) * self.score[rows].sum() / self.tokens[rows].sum())

    def passes(self, lot: Lot) -> float:
        """What a training takes: forwards of the pool, three for each row of a step."""
        steps = lot.course.steps * ROWS_A_STEP * self.length[lot.rows].mean()
        return float(3 * steps / self.length[self.scored].sum())


@dataclass(frozen=True)
class Held:
    """The pairs that count, the question of each, and how many others were left out."""

    pairs: Sequence[Pair]
    question: NDArray[np.int64]
    left_out: int


def evaluate(config: EvaluateConfig, progress: Progress | None = None, rivals: Rivals | None = None) -> dict[str, Any]:
    """What is written to evaluation.json. `rivals` rank the rows of the pool, the highest first, NaN for rows that take
    no part; their names join those of baselines.py. Raises PrismError for what the user can mend."""
    progress, started, rivals = progress or Silent(), time.perf_counter(), rivals or {}
    past = opened(config)
    own = ("everything", PRICED, *RIVALS, *rivals)
    refuse_rivals("--against", config.rivals, bool(past.config.target), own)
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
    ranks = {**ranked(config, past, (model, encoder), store, progress), **rivals}
    price = price_of(past, (model, encoder), store, progress) if PRICED in config.rivals else None
    lots = lots_of(config, past, ranks, price)
    rows = encoded_rows(past, [sampled(past), *(lot.rows for lot in lots)], encoder)
    controls = controlled(past, store, (model, encoder), rows, progress)
    if past.config.layers == "adapter":
        model, encoder = checkpoint(past, config.full, "all", progress)
    sides = [as_side(side, past.config.tokens_on(model.device.type), model.device) for side in coded]
    made_of = [past.mark, fingerprint(find_files([config.holdout])), *fingerprints_of(tuple(config.task_names))]
    bench = Bench(model, encoder, rows, sides, store, made_of, config.points, tuple(config.task_names))
    before = bench.look(0, math.nan, last=True)
    found: list[Tried] = []
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
        **{"pairs": len(held.pairs), "questions": int(held.question.max()) + 1, "pairs_left_out": held.left_out},
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


def opened(config: EvaluateConfig) -> Past:
    """Raises BadOption for what is no complete select or repair run of files that are still the same."""
    run = Run(Path(config.run))
    if not (run.path / "manifest.json").exists():
        raise BadOption(f"{run.path}: no complete run there; give the folder of one")
    manifest = run.manifest
    if manifest["command"] not in ("select", "repair"):
        raise BadOption(f"{run.path}: a {manifest['command']} run has chosen nothing; give one of select or repair")
    if rival := manifest["config"].get("rank_by"):
        raise BadOption(f"{run.path}: chosen by {rival}; give a run that chose by its scores, and --against {rival}")
    given = manifest.get("scored_by", manifest["config"])
    kind = RepairConfig if "remove" in given else SelectConfig if "budget" in given else ScoreConfig
    scored = kind(**given)
    home = origin(run)
    now = {"pool": fingerprint(pool_of(scored).files), "model": fingerprint_of(scored)}
    if scored.target:
        now["target"] = fingerprint(target_files(scored.target))
    for name, value in now.items():
        if value != manifest["fingerprints"][name]:
            raise BadOption(f"{run.path}: its {name} has changed since; make the run again")
    if scored.warmup and not has_adapter(home / ADAPTER):
        raise BadOption(f"{home}: the adapter of its warm-up is gone; make the run again")
    by = (RepairConfig if manifest["command"] == "repair" else SelectConfig)(**manifest["config"]).ranking
    table = run.columns("score", by, "tokens", "length", "source", "verdict", "exact")
    score, ranking = (table[name].to_numpy().astype(np.float64) for name in ("score", by))
    tokens, length = (np.nan_to_num(table[name].to_numpy()).astype(np.int64) for name in ("tokens", "length"))
    source = [name or "" for name in table["source"].to_pylist()]
    taken = np.isin(table["verdict"].to_numpy(), ["selected", "kept"])
    if not taken.any():
        raise BadOption(f"{run.path}: no row was chosen; there is nothing to train on")
    exact = table["exact"].to_numpy() if "exact" in table.column_names else np.isfinite(score)
    return Past(run, manifest, scored, home, score, ranking, tokens, length, source, taken, exact)


def origin(run: Run) -> Path:
    """The folder where the scores were taken, behind all choices made again; the last of these that is there."""
    path = run.path
    while (before := Run(path).manifest["config"].get("select_from")) and (Path(before) / "manifest.json").exists():
        path = Path(before)
    return path


def pool_of(config: ScoreConfig) -> Pool:
    return Pool(config.pool, parse_fields(config.fields), config.max_row_bytes)


def held_out(config: EvaluateConfig, past: Past) -> Held:
    """The pairs whose prompt is in no target pair of the run. Raises BadOption where there are none."""
    pairs = read_target(config.holdout, parse_fields(past.config.fields), past.config.max_row_bytes)
    seen = {prompt_of(pair) for each in target_pairs(past).values() for pair in each}
    held = [pair for pair in pairs if prompt_of(pair) not in seen]
    if not held:
        raise BadOption(
            f"--holdout {config.holdout}: the prompt of every pair is in the run's target; give other pairs"
        )
    prompts = {prompt_of(pair): None for pair in held}
    place = {prompt: number for number, prompt in enumerate(prompts)}
    return Held(held, np.array([place[prompt_of(pair)] for pair in held]), len(pairs) - len(held))


def prompt_of(pair: Pair) -> tuple[Any, ...]:
    return pair.chosen.turns[: pair.chosen.prompt_turns or -1]


def target_pairs(past: Past) -> dict[str, list[Pair]]:
    """As the run had them: in repair exchanged."""
    config = past.config
    found = dict[str, list[Pair]]()
    if config.target:
        found = read_targets(config.target, parse_fields(config.fields), config.target_by, config.max_row_bytes)
    if past.repair:
        return {name: [pair.swapped for pair in pairs] for name, pairs in found.items()}
    return found


def ranked(
    config: EvaluateConfig, past: Past, loaded: tuple[CausalLM, Encoder], store: Store, progress: Progress
) -> dict[str, Floats]:
    """The rankings of the rivals that know one, kept in a file: of the same scores they are the same."""
    names = [name for name in config.rivals if name in RIVALS and name not in DRAWN]
    mark = digest([past.mark])
    table = store.table_of("rankings.parquet", mark)
    there = {} if table is None else {name: np.asarray(table[name].to_numpy()) for name in table.column_names}
    missing = [name for name in names if name not in there]
    there |= {name: counted(past, name, past.config.seed) for name in missing if name in COUNT_RIVALS}
    if costly := [name for name in missing if name not in COUNT_RIVALS]:
        with progress.task(f"rankings of {len(costly)} rivals", None):
            there |= rankings(costly, past.reachable, loaded, pool_of(past.config), target_pairs(past))
    if missing:
        store.write_table("rankings.parquet", pa.table(there).replace_schema_metadata({"of": mark}))
    return {name: there[name] for name in names}


def counted(past: Past, name: str, seed: int) -> Floats:
    """The ranking of a rival that looks at sources and tokens alone: those of the run are known."""
    return COUNT_RIVALS[name](Texts(texts=(), sources=past.source, tokens=past.tokens, seed=seed))


def lots_of(config: EvaluateConfig, past: Past, ranks: Rivals, price: float | None) -> list[Lot]:
    """Every method and seed, prism first, and the halves of the LDS."""
    seeds = range(config.seed, config.seed + config.seeds)
    steps = config.steps or math.ceil(config.epochs * past.taken.sum() / ROWS_A_STEP)
    rate = config.rate or (FULL_RATE if config.full else RATE)
    courses = [Course(seed, steps, rate, config.full) for seed in seeds]
    lots = [Lot("prism", np.flatnonzero(past.taken), course) for course in courses]
    for name in config.rivals:
        if name == PRICED:
            lots += [dearer(past, lot, price) for lot in lots[: min(len(courses), PRICED_SEEDS)]] if price else []
            continue
        for course in courses:
            ranking = counted(past, name, course.seed) if name in DRAWN else ranks.get(name, past.score)
            lots.append(Lot(name, past.scored if name == "everything" else rows_of(past, ranking), course))
    members = halves(len(past.scored), config.lds, config.seed)
    return lots + [Lot(f"half-{place}", past.scored[half], courses[0]) for place, half in enumerate(members)]


def dearer(past: Past, lot: Lot, price: float) -> Lot:
    """Random rows in place of a lot, with the price of scoring spent on more of them and on more steps: what the lot
    takes and the price, to half a step. In repair no more rows are left to take."""
    spent = past.passes(lot) + price
    rows = rows_of(past, counted(past, "random", lot.course.seed), spent / past.passes(lot))
    a_step = past.passes(Lot(PRICED, rows, replace(lot.course, steps=1)))
    return Lot(PRICED, rows, replace(lot.course, steps=max(1, round(spent / a_step))))


def rows_of(past: Past, ranking: Floats, times: float = 1.0) -> Rows:
    """What a rival trains on, in the order of the pool: as much as the choice, or so many times more, or all."""
    usable = past.scored[np.isfinite(ranking[past.scored])]
    order = usable[np.argsort(-ranking[usable], kind="stable")]
    if past.repair:
        return np.setdiff1d(past.scored, order[: len(past.scored) - past.taken.sum()])
    return np.sort(order[: filled(past.tokens[order], int(times * past.tokens[past.taken].sum()))])


def filled(tokens: Rows, budget: int) -> int:
    """How many rows, from the first on, come nearest to the budget: it is missed by half a row at most."""
    total = np.concatenate([[0], np.cumsum(tokens)])
    return max(1, int(np.abs(total - budget).argmin()))


def encoded_rows(past: Past, places: Sequence[Rows], encoder: Encoder) -> dict[int, Encoded]:
    """The rows of the pool in any of `places`, by their place. Raises BadOption where one cannot be read any more."""
    wanted = {row for each in places for row in each.tolist()}
    rows = dict[int, Encoded]()
    for place, (_, example) in enumerate(pool_of(past.config).rows()):
        if place in wanted and isinstance(example, Example):
            with suppress(BadRow):
                rows[place] = encoder.encode(example)
    if lost := wanted - rows.keys():
        raise BadOption(f"row {min(lost)} of the pool cannot be read as it was when it was scored; make the run again")
    return rows


def sampled(past: Past) -> Rows:
    """Of the rows whose scores were taken: a guess says nothing of what a control asks."""
    draw, rows = np.random.default_rng(past.config.seed), past.scored[past.exact[past.scored]]
    return np.sort(draw.choice(rows, min(SAMPLED, len(rows)), replace=False))


def checkpoint(past: Past, full: bool, layers: str, progress: Progress) -> tuple[CausalLM, Encoder]:
    """Where the run took its scores."""
    dtype = "float32" if full else past.config.dtype
    model, encoder = load_model(replace(past.config, layers=layers, dtype=dtype), progress)
    return (merged(model, past.home / ADAPTER) if past.config.warmup else model), encoder


def controlled(
    past: Past, store: Store, loaded: tuple[CausalLM, Encoder], rows: Mapping[int, Encoded], progress: Progress
) -> list[dict[str, Any]]:
    """Those of an earlier evaluation of the same scores, where there was one."""
    places = sampled(past)
    mark = digest([past.mark, past.score[places].tolist()])
    if there := store.json_of("controls.json", mark):
        return list(there["controls"])
    targets = target_pairs(past)
    taken = float(past.taken.sum() / len(past.scored))
    each = past.run.columns(*(f"score:{name}" for name in targets)).columns
    score = np.mean(each, axis=0) if each else past.score  # that of the mean direction, whatever the choice went by
    sample = Sample([rows[i] for i in places], score[places], 1 - taken if past.repair else taken)
    controls = [control.told() for control in run_controls(past.reachable, loaded, targets, sample, progress)]
    store.write_json("controls.json", {"of": mark, "controls": controls})
    return controls


def price_of(past: Past, loaded: tuple[CausalLM, Encoder], store: Store, progress: Progress) -> float:
    """What the scores cost, in forwards of the pool: the run's engine is timed against a forward pass on some of its
    rows, once for all evaluations, and the time of pairs and curvature is added as the run measured it beside that of
    scoring."""
    mark = digest([past.mark])
    if there := store.json_of("price.json", mark):
        return float(there["price"])
    took = Run(past.home).manifest["timings"]
    if not took["score"]:
        raise BadOption(f"{past.home}: the run that took its scores is gone; leave {PRICED} out of --against")
    model, encoder = loaded
    places = sampled(past)
    rows = list(encoded_rows(past, [places[:: math.ceil(len(places) / TIMED)]], encoder).values())
    saved = str(past.home / "direction.safetensors")
    aim = load_direction(saved, model, towards(past.config), bool(past.config.warmup))
    directions = reduced(past.config, model, aim, rows)[0] if past.config.rank else aim.directions
    engine, _ = choose_engine(past.config, model, aim.weights, directions, rows[:CHECKED_ROWS])
    plan = plan_batches([len(row.tokens) for row in rows], engine.tokens)
    batches = [collate([rows[i] for i in batch], model.device) for batch in plan]
    seconds = np.zeros((4, 2))
    with progress.task("price of scoring", None):
        for times in seconds:
            times[:] = [sum(map(partial(timed, way), batches)) for way in (engine, partial(mean_logliks, model))]
    score, forward = np.median(seconds[1:], axis=0)
    every = past.length[past.scored].sum()
    share = Run(past.home).manifest["actual"]["tokens"] / every  # what the last start scored: less after a resume
    whole = took["score"] / share if share else score * every / sum(len(row.tokens) for row in rows)
    price = float(score / forward * (1 + (took["target"] + took["curvature"]) / whole))
    store.write_json("price.json", {"of": mark, "price": price})
    return price


def attributed(past: Past, found: Sequence[Tried], question: Rows, seed: int) -> dict[str, float]:
    """The linear datamodeling score of the run's scores."""
    members = np.array([np.isin(past.scored, lot.rows) for lot, _ in found])
    gains = np.array([MEASURES["gain"](points[-1], question).mean() for _, points in found])
    return lds((-1 if past.repair else 1) * past.score[past.scored], members, gains, seed)


def labelled(past: Past, ranks: Rivals) -> dict[str, float] | None:
    """How well each ranking finds the rows that are known to be bad: AUROC, of the scored rows with a label."""
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
