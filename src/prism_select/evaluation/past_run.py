"""TODO."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from prism_select.data.formats import parse_fields
from prism_select.data.pool import Pool, fingerprint
from prism_select.data.records import Pair
from prism_select.data.targets import read_target, read_targets, target_files
from prism_select.evaluation.retraining import TrainingJob
from prism_select.models.loading import fingerprint_of
from prism_select.models.lora_training import ADAPTER, ROWS_A_STEP, has_adapter
from prism_select.run.config import RepairConfig, ScoreConfig, SelectConfig
from prism_select.run.config_evaluate import EvaluateConfig
from prism_select.run.errors import BadOption
from prism_select.run.folder import Run
from prism_select.run.options import settings

__all__ = ["FinishedRun", "Floats", "Rows", "held_out", "opened", "pool_of", "target_pairs"]

Floats: TypeAlias = NDArray[np.float64]


Rows: TypeAlias = NDArray[np.int64]


@dataclass(frozen=True)
class FinishedRun:
    """A complete run: `config` is what it scored with, `home` the folder of these scores; of each
    row of the pool the score and what the choice went by (NaN without one), its supervised tokens
    and its length in tokens, its source, and whether training takes it, and whether its score is
    exact."""

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
        return [
            self.manifest["fingerprints"],
            {k: v for k, v in settings(self.config).items() if k != "batch_tokens"},
        ]

    @property
    def reachable(self) -> ScoreConfig:
        """With the engine that reached all weights."""
        return replace(self.config, engine=self.manifest["engine"]["name"])

    @property
    def scored(self) -> Rows:
        return np.flatnonzero(np.isfinite(self.score))

    def forecast(self, rows: Rows) -> float:
        return float((-1 if self.repair else 1) * self.score[rows].sum() / self.tokens[rows].sum())

    def passes(self, lot: TrainingJob) -> float:
        """What a training takes: forwards of the pool, three for each row of a step."""
        steps = lot.course.steps * ROWS_A_STEP * self.length[lot.rows].mean()
        return float(3 * steps / self.length[self.scored].sum())


@dataclass(frozen=True)
class HeldOutPairs:
    """The pairs that count, the question of each, and how many others were left out."""

    pairs: Sequence[Pair]
    question: NDArray[np.int64]
    left_out: int


def opened(config: EvaluateConfig) -> FinishedRun:
    """Raises BadOption for what is no complete select or repair run of files that are still the
    same."""
    run = Run(Path(config.run))
    if not (run.path / "manifest.json").exists():
        raise BadOption(f"{run.path}: no complete run there; give the folder of one")
    manifest = run.manifest
    if manifest["command"] not in ("select", "repair"):
        raise BadOption(
            f"{run.path}: a {manifest['command']} run has chosen nothing; give one of select or repair"
        )
    if baseline := manifest["config"].get("rank_by"):
        raise BadOption(
            f"{run.path}: chosen by {baseline}; give a run that chose by its scores, and --against {baseline}"
        )
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
    by = (RepairConfig if manifest["command"] == "repair" else SelectConfig)(
        **manifest["config"]
    ).ranking
    table = run.columns("score", by, "tokens", "length", "source", "verdict", "exact")
    score, ranking = (table[name].to_numpy().astype(np.float64) for name in ("score", by))
    tokens, length = (
        np.nan_to_num(table[name].to_numpy()).astype(np.int64) for name in ("tokens", "length")
    )
    source = [name or "" for name in table["source"].to_pylist()]
    taken = np.isin(table["verdict"].to_numpy(), ["selected", "kept"])
    if not taken.any():
        raise BadOption(f"{run.path}: no row was chosen; there is nothing to train on")
    exact = table["exact"].to_numpy() if "exact" in table.column_names else np.isfinite(score)
    return FinishedRun(
        run, manifest, scored, home, score, ranking, tokens, length, source, taken, exact
    )


def origin(run: Run) -> Path:
    """The folder where the scores were taken, behind all choices made again; the last of these that
    is there."""
    path = run.path
    while (before := Run(path).manifest["config"].get("select_from")) and (
        Path(before) / "manifest.json"
    ).exists():
        path = Path(before)
    return path


def pool_of(config: ScoreConfig) -> Pool:
    return Pool(config.pool, parse_fields(config.fields), config.max_row_bytes)


def held_out(config: EvaluateConfig, past: FinishedRun) -> HeldOutPairs:
    """The pairs whose prompt is in no target pair of the run. Raises BadOption where there are
    none."""
    pairs = read_target(config.holdout, parse_fields(past.config.fields), past.config.max_row_bytes)
    seen = {prompt_of(pair) for each in target_pairs(past).values() for pair in each}
    held = [pair for pair in pairs if prompt_of(pair) not in seen]
    if not held:
        raise BadOption(
            f"--holdout {config.holdout}: the prompt of every pair is in the run's target; give other pairs"
        )
    prompts = {prompt_of(pair): None for pair in held}
    place = {prompt: number for number, prompt in enumerate(prompts)}
    return HeldOutPairs(
        held, np.array([place[prompt_of(pair)] for pair in held]), len(pairs) - len(held)
    )


def prompt_of(pair: Pair) -> tuple[Any, ...]:
    return pair.chosen.turns[: pair.chosen.prompt_turns or -1]


def target_pairs(past: FinishedRun) -> dict[str, list[Pair]]:
    """As the run had them: in repair exchanged."""
    config = past.config
    found = dict[str, list[Pair]]()
    if config.target:
        found = read_targets(
            config.target, parse_fields(config.fields), config.target_by, config.max_row_bytes
        )
    if past.repair:
        return {name: [pair.swapped for pair in pairs] for name, pairs in found.items()}
    return found
