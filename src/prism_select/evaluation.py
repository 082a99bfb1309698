"""Evaluation: does the choice of a run help? Fine-tune on it and on its rivals, and compare on held-out pairs.

    select    rival      the rows at the top of its ranking, as many supervised tokens as were chosen
              prism      the chosen rows             everything    every scored row       none    no training
    repair    rival      all rows but the top of its ranking, as many rows as were removed
              prism      the kept rows

    gain J = mean softplus(gap)     gap = mean_loglik(chosen) − mean_loglik(rejected)     win rate = share of gaps > 0

    predicted = Σ score / Σ supervised tokens of the rows trained on       realised = J after − J before

Choices made here: every method takes the same number of steps, the passes of the choice, since passes of its own would
give a method of short rows more steps at the same tokens. A loss is a mean over tokens, so a training's forecast is a
score per token, which at equal tokens orders methods as the sum of scores does. Fine-tuning starts where the scores
were taken. A retraining is one file, marked with what it was made of: it is never made twice, nor taken for another.
In repair, scores point to the unwanted answers, so forecasts are turned. Target prompts are no held-out prompts.

RUN/evaluation/  evaluation.json  methods.parquet  controls.json  retrained/METHOD-SEED.parquet
"""

import hashlib
import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray

from prism_select.config import EvaluateConfig, RepairConfig, ScoreConfig, SelectConfig
from prism_select.controls import Sample, run_controls
from prism_select.core.direction import Side, pair_logliks
from prism_select.core.gains import GAINS
from prism_select.data.batches import Encoded, Encoder
from prism_select.data.formats import parse_fields
from prism_select.data.inputs import Pool, fingerprint, read_target, read_targets
from prism_select.data.readers import find_files
from prism_select.data.records import Example, Pair
from prism_select.errors import BadOption, BadRow
from prism_select.models import CausalLM
from prism_select.pipeline import fingerprint_of, load_model
from prism_select.progress import Progress, Silent
from prism_select.statistics import paired_interval, rank_correlation
from prism_select.store import Run, Store, finite
from prism_select.targeting import as_side, encode_sides
from prism_select.warmup import ADAPTER, RATE, ROWS_A_STEP, Course, has_adapter, merged, train

__all__ = ["evaluate", "filled", "in_words"]

SAMPLED = 512  # rows that controls score again
FULL_RATE = 2e-5
OWN = ("random", "length", "everything")
Floats: TypeAlias = NDArray[np.float64]
Rows: TypeAlias = NDArray[np.int64]
Rivals: TypeAlias = Mapping[str, Floats]


@dataclass(frozen=True)
class Past:
    """A complete run: `config` is what it scored with, `home` the folder of these scores; of each row of the pool the
    score (NaN without one) and its supervised tokens, and whether training takes it."""

    run: Run
    manifest: Mapping[str, Any]
    config: ScoreConfig
    home: Path
    score: Floats
    tokens: Rows
    taken: NDArray[np.bool_]

    @property
    def repair(self) -> bool:
        return isinstance(self.config, RepairConfig)

    @property
    def scored(self) -> Rows:
        return np.flatnonzero(np.isfinite(self.score))

    def forecast(self, rows: Rows) -> float:
        return float((-1 if self.repair else 1) * self.score[rows].sum() / self.tokens[rows].sum())


@dataclass(frozen=True)
class Lot:
    """One retraining."""

    method: str
    seed: int
    rows: Rows

    @property
    def name(self) -> str:
        return f"retrained/{self.method}-{self.seed}.parquet"


@dataclass(frozen=True)
class Found:
    """Mean log-likelihood of both answers of every held-out pair."""

    chosen: Floats
    rejected: Floats

    @property
    def gap(self) -> Floats:
        return self.chosen - self.rejected

    @property
    def gain(self) -> Floats:
        return np.asarray(GAINS["prism"](torch.tensor(self.chosen), torch.tensor(self.rejected)).numpy())


MEASURES: Mapping[str, Callable[[Found], Floats]] = {
    "gain": lambda found: found.gain,
    "gap": lambda found: found.gap,
    "win_rate": lambda found: (found.gap > 0).astype(np.float64),
    "loglik_chosen": lambda found: found.chosen,
}


def evaluate(config: EvaluateConfig, progress: Progress | None = None, rivals: Rivals | None = None) -> dict[str, Any]:
    """What is written to evaluation.json. `rivals` rank the rows of the pool beside `OWN`, the highest first, NaN for
    rows that take no part. Raises PrismError for what the user can mend."""
    progress, started = progress or Silent(), time.perf_counter()
    past = opened(config)
    lots = lots_of(config, past, rivals or {})
    held, left_out = held_out(config, past)
    store = Store(str(past.run.path / "evaluation"))
    for folder in (store, Store(str(store.path / "retrained"))):
        folder.make()
    model, encoder = checkpoint(past, config.full, past.config.layers, progress)
    coded, rows = encode_sides(held, encoder), encoded_rows(past, lots, encoder)
    controls = controlled(past, store, (model, encoder), rows, progress)
    if past.config.layers == "adapter":
        model, encoder = checkpoint(past, config.full, "all", progress)
    sides = [as_side(side, past.config.batch_tokens, model.device) for side in coded]
    before = measured(model, sides)
    steps = config.steps or math.ceil(config.epochs * past.taken.sum() / ROWS_A_STEP)
    rate = config.rate or (FULL_RATE if config.full else RATE)
    made_of = [past.manifest["fingerprints"], asdict(past.config), fingerprint(find_files([config.holdout]))]
    found: list[tuple[Lot, Found]] = []
    with progress.task(f"{len(lots)} trainings of {steps} steps", len(lots)) as task:
        for lot in lots:
            course = Course(lot.seed, steps, rate, config.full)
            mark = digest([made_of, asdict(course), lot.rows.tolist()])
            there = read_back(store, lot, mark)
            if there is None:
                there = retrained(model, encoder, [rows[i] for i in lot.rows.tolist()], course, sides)
                store.write_table(lot.name, as_table(there).replace_schema_metadata({"of": mark}))
            found.append((lot, there))
            task.advance(1)
    store.write_table("methods.parquet", pa.concat_tables(long_table(lot, before, after) for lot, after in found))
    everything = {
        "prism_version": version("prism-select"),
        "config": asdict(config),
        "command": past.manifest["command"],
        **{"steps": steps, "rate": rate, "pairs": len(held), "pairs_left_out": left_out},
        **figures(config, past, before, found),
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
    given = manifest.get("scored_by", manifest["config"])
    kind = RepairConfig if "remove" in given else SelectConfig if "budget" in given else ScoreConfig
    scored = kind(**given)
    home = Path(manifest["config"].get("select_from") or run.path)
    now = {"pool": fingerprint(pool_of(scored).files), "model": fingerprint_of(scored)}
    for name, value in now.items():
        if value != manifest["fingerprints"][name]:
            raise BadOption(f"{run.path}: its {name} has changed since; make the run again")
    if scored.warmup and not has_adapter(home / ADAPTER):
        raise BadOption(f"{home}: the adapter of its warm-up is gone; make the run again")
    table = run.scores
    score = np.array(table["score"].to_pylist(), dtype=np.float64)
    tokens = np.nan_to_num(np.array(table["tokens"].to_pylist(), dtype=np.float64)).astype(np.int64)
    taken = np.isin(np.array(table["verdict"].to_pylist()), ["selected", "kept"])
    if not taken.any():
        raise BadOption(f"{run.path}: no row was chosen; there is nothing to train on")
    return Past(run, manifest, scored, home, score, tokens, taken)


def pool_of(config: ScoreConfig) -> Pool:
    return Pool(config.pool, parse_fields(config.fields))


def held_out(config: EvaluateConfig, past: Past) -> tuple[list[Pair], int]:
    """The pairs whose prompt is in no target pair of the run, and how many others were left out."""
    pairs = read_target(config.holdout, parse_fields(past.config.fields))
    seen = {prompt_of(pair) for each in target_pairs(past.config).values() for pair in each}
    held = [pair for pair in pairs if prompt_of(pair) not in seen]
    if not held:
        raise BadOption(
            f"--holdout {config.holdout}: the prompt of every pair is in the run's target; give other pairs"
        )
    return held, len(pairs) - len(held)


def prompt_of(pair: Pair) -> tuple[Any, ...]:
    return pair.chosen.turns[: pair.chosen.prompt_turns or -1]


def target_pairs(config: ScoreConfig) -> dict[str, list[Pair]]:
    return read_targets(config.target, parse_fields(config.fields), config.target_by) if config.target else {}


def lots_of(config: EvaluateConfig, past: Past, rivals: Rivals) -> list[Lot]:
    """Every method and seed. Raises BadOption for a rival that nobody knows."""
    lots = [Lot("prism", seed, np.flatnonzero(past.taken)) for seed in seeds_of(config)]
    for name in config.rivals:
        if name not in (*OWN, *rivals):
            raise BadOption(f"--against {name}: unknown; try some of {', '.join([*OWN, *rivals])}")
        for seed in seeds_of(config):
            if name == "random":
                ranking = np.random.default_rng(seed).random(len(past.score))
            else:
                ranking = past.tokens.astype(np.float64) if name == "length" else rivals.get(name, past.score)
            lots.append(Lot(name, seed, past.scored if name == "everything" else rows_of(past, ranking)))
    return lots


def seeds_of(config: EvaluateConfig) -> range:
    return range(config.seed, config.seed + config.seeds)


def rows_of(past: Past, ranking: Floats) -> Rows:
    """What a rival trains on, in the order of the pool."""
    usable = past.scored[np.isfinite(ranking[past.scored])]
    order = usable[np.argsort(-ranking[usable], kind="stable")]
    if past.repair:
        return np.setdiff1d(past.scored, order[: len(past.scored) - past.taken.sum()])
    return np.sort(order[: filled(past.tokens[order], int(past.tokens[past.taken].sum()))])


def filled(tokens: Rows, budget: int) -> int:
    """How many rows, from the first on, come nearest to the budget: it is missed by half a row at most."""
    total = np.concatenate([[0], np.cumsum(tokens)])
    return max(1, int(np.abs(total - budget).argmin()))


def encoded_rows(past: Past, lots: Sequence[Lot], encoder: Encoder) -> dict[int, Encoded]:
    """The rows that some lot takes, and those that controls score."""
    wanted = {row for lot in lots for row in lot.rows.tolist()} | set(sampled(past).tolist())
    rows = dict[int, Encoded]()
    for place, (_, example) in enumerate(pool_of(past.config).rows()):
        if place in wanted and isinstance(example, Example):
            with suppress(BadRow):
                rows[place] = encoder.encode(example)
    if lost := wanted - rows.keys():
        raise BadOption(f"row {min(lost)} of the pool cannot be read as it was when it was scored; make the run again")
    return rows


def sampled(past: Past) -> Rows:
    draw = np.random.default_rng(past.config.seed)
    return np.sort(draw.choice(past.scored, min(SAMPLED, len(past.scored)), replace=False))


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
    mark = digest([past.manifest["fingerprints"], asdict(past.config), past.score[places].tolist()])
    place = store.path / "controls.json"
    if place.exists() and (there := json.loads(place.read_text(encoding="utf-8")))["of"] == mark:
        return list(there["controls"])
    targets = target_pairs(past.config)
    if past.repair:
        targets = {n: [Pair(chosen=p.rejected, rejected=p.chosen) for p in pairs] for n, pairs in targets.items()}
    taken = float(past.taken.sum() / len(past.scored))
    sample = Sample([rows[i] for i in places], past.score[places], 1 - taken if past.repair else taken)
    controls = [control.told() for control in run_controls(past.config, loaded, targets, sample, progress)]
    store.write_json("controls.json", {"of": mark, "controls": controls})
    return controls


def digest(values: Sequence[Any]) -> str:
    return hashlib.blake2b(json.dumps(values).encode(), digest_size=16).hexdigest()


def retrained(
    model: CausalLM, encoder: Encoder, rows: Sequence[Encoded], course: Course, sides: Sequence[Side]
) -> Found:
    """What the pairs are after a training; the model is then as it was before."""
    saved = {name: value.clone() for name, value in model.network.state_dict().items()} if course.full else {}
    learner = train(model.network, encoder.tokenizer, rows, course)
    try:
        return measured(CausalLM(learner if course.full else learner.get_base_model()), sides)
    finally:
        model.network.load_state_dict(saved) if course.full else learner.unload()


def measured(model: CausalLM, sides: Sequence[Side]) -> Found:
    chosen, rejected = (pair_logliks(model, side).numpy() for side in sides)
    return Found(chosen, rejected)


def read_back(store: Store, lot: Lot, mark: str) -> Found | None:
    """What an earlier evaluation made of the same rows, in the same way, with the same pairs."""
    place = store.path / lot.name
    if not place.exists():
        return None
    table = pq.read_table(place)
    if (table.schema.metadata or {}).get(b"of") != mark.encode():
        return None
    return Found(*(np.asarray(table[f"loglik_{side}"].to_numpy()) for side in ("chosen", "rejected")))


def as_table(found: Found) -> pa.Table:
    return pa.table({"loglik_chosen": found.chosen, "loglik_rejected": found.rejected})


def long_table(lot: Lot, before: Found, after: Found) -> pa.Table:
    count = len(after.gap)
    told = {"method": [lot.method] * count, "seed": [lot.seed] * count, "pair": range(count)}
    return pa.table(told | {"gap_before": before.gap, "gap": after.gap, **as_table(after).to_pydict()})


def figures(config: EvaluateConfig, past: Past, before: Found, found: Sequence[tuple[Lot, Found]]) -> dict[str, Any]:
    """Of each method its means; prism against each rival; forecasts against what came."""
    names = list(dict.fromkeys(lot.method for lot, _ in found))
    lots = {name: [(lot, after) for lot, after in found if lot.method == name] for name in names}
    trained = {name: [after for _, after in each] for name, each in lots.items()}
    gain = float(before.gain.mean())
    methods = {"none": means_of([before])}
    for name, each in lots.items():
        predicted = [past.forecast(lot.rows) for lot, _ in each]
        methods[name] = {
            **means_of(trained[name]),
            "rows": [len(lot.rows) for lot, _ in each],
            "tokens": [int(past.tokens[lot.rows].sum()) for lot, _ in each],
            "predicted": predicted,
            "realised": [float(after.gain.mean()) - gain for _, after in each],
        }
    both = [[value for name in names for value in methods[name][which]] for which in ("predicted", "realised")]
    trained["none"] = [before] * config.seeds
    against = {name: compared(trained["prism"], trained[name], config.seed) for name in trained if name != "prism"}
    return {
        "methods": methods,
        "against": {name: {"words": in_words(name, each["gain"]), **each} for name, each in against.items()},
        "forecast": {"rank_correlation": rank_correlation(*map(np.array, both)), "trainings": len(both[0])},
    }


def means_of(each: Sequence[Found]) -> dict[str, Any]:
    return {name: float(np.mean([measure(found) for found in each])) for name, measure in MEASURES.items()}


def compared(ours: Sequence[Found], theirs: Sequence[Found], seed: int) -> dict[str, dict[str, float]]:
    """Ours minus theirs, seed by seed and pair by pair."""
    told = {}
    for name, measure in MEASURES.items():
        apart = np.array([measure(a) - measure(b) for a, b in zip(ours, theirs, strict=True)])
        low, high = paired_interval(apart, seed)
        told[name] = {"difference": float(apart.mean()), "low": low, "high": high}
    return told


def in_words(rival: str, gain: Mapping[str, float]) -> str:
    """The verdict on one rival; the interval is at 95%, in nats per token of gain."""
    name = "no training" if rival == "none" else rival
    middle, low, high = gain["difference"], gain["low"], gain["high"]
    if low > 0:
        return f"better than {name} by {middle:.2g} [{low:.2g}, {high:.2g}]"
    if high < 0:
        return f"worse than {name} by {-middle:.2g} [{-high:.2g}, {-low:.2g}]"
    return f"no gain over {name} shown: {middle:.2g} [{low:.2g}, {high:.2g}]"
