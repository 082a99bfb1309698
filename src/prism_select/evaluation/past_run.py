"""Past run: a complete run folder, read for an evaluation.

    open_run(config) → FinishedRun          its scores, its choice, what it was made of
    held_out_pairs(config, past)            pairs whose prompt is in no target pair of the run

Choices made here:
- files that the run has read must still be the same, by their fingerprints;
- scores that were chosen from again (--select-from) belong to the run that took them: its folder
  has the direction and the adapter.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from prism_select.data.formats import parse_fields
from prism_select.data.pool import Pool, fingerprint
from prism_select.data.records import Pair
from prism_select.data.targets import read_pairs, read_target, target_files
from prism_select.evaluation.retraining import TrainingJob
from prism_select.models.loading import fingerprint_of
from prism_select.models.lora_training import ADAPTER, ROWS_A_STEP, has_adapter
from prism_select.run.config import RepairConfig, ScoreConfig, SelectConfig
from prism_select.run.config_evaluate import EvaluateConfig
from prism_select.run.errors import BadOption
from prism_select.run.folder import Run
from prism_select.run.options import settings
from prism_select.run.polarity import Polarity
from prism_select.selection.scores_file import ScoreColumns, read_columns, scores_tables

__all__ = [
    "FinishedRun",
    "Floats",
    "HeldOutPairs",
    "Rows",
    "held_out_pairs",
    "open_run",
    "seen_questions",
]

Floats: TypeAlias = NDArray[np.float64]
Rows: TypeAlias = NDArray[np.int64]


@dataclass(frozen=True)
class FinishedRun:
    """A complete run, with a value for each row of the pool.

    `config` is what the scores were taken with, `home` the folder where they were taken. `ranking`
    is what the choice went by; `score` and `ranking` are NaN for a row without them. `tokens`
    counts supervised tokens, `length` all tokens. `chosen` rows are trained on; `exact` is False
    where a score is predicted.
    """

    run: Run
    manifest: Mapping[str, Any]
    config: ScoreConfig
    home: Path
    score: Floats
    ranking: Floats
    tokens: Rows
    length: Rows
    source: Sequence[str]
    chosen: NDArray[np.bool_]
    exact: NDArray[np.bool_]

    @property
    def repair(self) -> bool:
        return isinstance(self.config, RepairConfig)

    @property
    def mark(self) -> list[Any]:
        """What decides its scores: files and options, but not the tokens in a batch."""
        options = settings(self.config)
        options.pop("batch_tokens", None)
        return [self.manifest["fingerprints"], options]

    @property
    def reachable(self) -> ScoreConfig:
        """The config with the engine that reached every parameter."""
        return replace(self.config, engine=self.manifest["engine"]["name"])

    @property
    def removed(self) -> int:
        """How many scored rows a repair has removed."""
        return int(len(self.scored) - self.chosen.sum())

    @property
    def scored(self) -> Rows:
        """Rows with a score."""
        return np.flatnonzero(np.isfinite(self.score))

    def forecast(self, rows: Rows) -> float:
        """Predicted change of the gain after training on these rows: score per supervised token.

        In repair, scores point to the unwanted answers, so their sign is turned.
        """
        sign = Polarity.of_config(self.config).sign
        return float(sign * self.score[rows].sum() / self.tokens[rows].sum())

    def cost(self, job: TrainingJob) -> float:
        """What a training costs, in forward passes over the pool: three for each row of a step."""
        tokens = job.settings.steps * ROWS_A_STEP * self.length[job.rows].mean()
        return float(3 * tokens / self.length[self.scored].sum())


@dataclass(frozen=True)
class HeldOutPairs:
    """Pairs, the question of each as a number, and how many pairs were left out."""

    pairs: Sequence[Pair]
    question: NDArray[np.int64]
    left_out: int

    def as_json(self) -> dict[str, int]:
        """As in evaluation.json."""
        questions = int(self.question.max()) + 1
        return {"pairs": len(self.pairs), "questions": questions, "pairs_left_out": self.left_out}


def open_run(config: EvaluateConfig) -> FinishedRun:
    """Raises BadOption for what is no complete select or repair run of files that are still the
    same."""
    run = Run(Path(config.run or ""))
    if not (run.path / "manifest.json").exists():
        raise BadOption(f"{run.path}: no complete run there; give the folder of one")
    manifest = run.manifest
    if manifest["command"] not in ("select", "repair"):
        raise BadOption(
            f"{run.path}: a {manifest['command']} run has chosen nothing; give one of select or "
            "repair"
        )
    if baseline := manifest["config"].get("rank_by"):
        raise BadOption(
            f"{run.path}: chosen by {baseline}; give a run that chose by its scores, and --against "
            f"{baseline}"
        )
    if manifest.get("checkpoints"):
        raise BadOption(
            f"{run.path}: its scores are of several checkpoints; give the run of one, as in "
            f"{run.path}/checkpoints/1"
        )
    scored_by = config_of(manifest.get("scored_by", manifest["config"]))
    home = scores_folder(run)
    refuse_changes(run, manifest, scored_by)
    if scored_by.warmup and not has_adapter(home / ADAPTER):
        raise BadOption(f"{home}: the adapter of its warm-up is gone; make the run again")
    ranking = config_of(manifest["config"]).ranking
    columns = read_scores(run, ranking)
    verdict, source = columns.names["verdict"], columns.names["source"]
    chosen = verdict.equals("selected") | verdict.equals("kept")
    if not chosen.any():
        raise BadOption(f"{run.path}: no row was chosen; there is nothing to train on")
    return FinishedRun(
        run=run,
        manifest=manifest,
        config=scored_by,
        home=home,
        score=columns["score"],
        ranking=columns[ranking],
        tokens=columns["tokens"],
        length=columns["length"],
        source=[source.names[code] for code in source.codes.tolist()],
        chosen=chosen,
        exact=columns["exact"] if "exact" in columns else np.isfinite(columns["score"]),
    )


def config_of(options: Mapping[str, Any]) -> ScoreConfig:
    """The config that a manifest holds, of the command that has these options."""
    kind = SelectConfig if "budget" in options else ScoreConfig
    return (RepairConfig if "remove" in options else kind)(**options)


def read_scores(run: Run, ranking: str) -> ScoreColumns:
    types = {
        "score": np.float64,
        ranking: np.float64,
        "tokens": np.int64,
        "length": np.int64,
        "exact": bool,
        "source": str,
        "verdict": str,
    }
    return read_columns(scores_tables(run.path, list(types)), types.get)


def refuse_changes(run: Run, manifest: Mapping[str, Any], config: ScoreConfig) -> None:
    """Raises BadOption where the pool, the model or the target is not what the run has read."""
    prints = {"pool": fingerprint(Pool.of(config).files), "model": fingerprint_of(config)}
    if config.target:
        prints["target"] = fingerprint(target_files(config.target))
    for name, value in prints.items():
        if value != manifest["fingerprints"][name]:
            raise BadOption(f"{run.path}: its {name} has changed since; make the run again")


def scores_folder(run: Run) -> Path:
    """The folder where the scores were taken, behind every --select-from; the last that exists."""
    path = run.path
    while (before := Run(path).manifest["config"].get("select_from")) and (
        Path(before) / "manifest.json"
    ).exists():
        path = Path(before)
    return path


def held_out_pairs(config: EvaluateConfig, past: FinishedRun) -> HeldOutPairs:
    """The pairs whose prompt is in no target pair of the run. Raises BadOption where none is."""
    pairs = read_target(config.holdout or "", parse_fields(past.config.fields))
    seen = {prompt_of(pair) for of_target in read_pairs(past.config).values() for pair in of_target}
    held_out = [pair for pair in pairs if prompt_of(pair) not in seen]
    if not held_out:
        raise BadOption(
            f"--holdout {config.holdout}: the prompt of every pair is in the run's target; give "
            "pairs of other prompts"
        )
    prompts = dict.fromkeys(prompt_of(pair) for pair in held_out)
    numbers = {prompt: number for number, prompt in enumerate(prompts)}
    question = np.array([numbers[prompt_of(pair)] for pair in held_out])
    return HeldOutPairs(held_out, question, len(pairs) - len(held_out))


def prompt_of(pair: Pair) -> tuple[tuple[str, ...], ...]:
    """What each turn says, whatever the answers are and however words are spaced."""
    turns = pair.chosen.turns[: pair.chosen.prompt_turns or -1]
    return tuple((turn.role, " ".join(turn.text.split()), turn.beside) for turn in turns)


def seen_questions(past: FinishedRun) -> frozenset[str]:
    """Texts of the last turn of each prompt in the run's target."""
    pairs = (pair for of_target in read_pairs(past.config).values() for pair in of_target)
    prompts = (prompt_of(pair) for pair in pairs)
    return frozenset(prompt[-1][1] for prompt in prompts if prompt and prompt[-1][1])
