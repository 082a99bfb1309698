"""The demo: the two main jobs on the bundled model and what they are worth, told in a dozen lines.

DEMO/select   5% of a mixed pool for one skill          DEMO/repair   a fine-tuning set with 15% wrong answers

accuracy = share of held-out questions of the skill whose right answer the model prefers to the
usual mistake"""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path

from prism_select.api import execute_evaluation, repair, select
from prism_select.demo.world import DEMO_SKILL, SKILLS, mixture, pairs, pool
from prism_select.run.config_evaluate import EvaluateConfig
from prism_select.run.errors import BadOption, DiskTrouble
from prism_select.run.folder import Run
from prism_select.run.progress import Progress

__all__ = ["MODEL", "Figures", "tell"]

MODEL = Path(__file__).parent / "model"


POOL_ROWS, MIXTURE_ROWS, TARGET_PAIRS, PAIRS_PER_SKILL, SEED = 2000, 1200, 40, 20, 0


HELD_OUT, SEEDS, RATE = 100, 3, 1e-3


@dataclass(frozen=True)
class Figures:
    pool_share: float
    chosen_share: float
    auroc: float
    accuracy: Mapping[str, float] = field(
        default_factory=dict
    )  # none, and after training on prism, random, everything


def tell(out: str, progress: Progress) -> Figures:
    """Writes the demo's files and runs under `out`, anew each time, and says what came of it."""
    folder = Path(out)
    others = (
        {path.name for path in folder.iterdir()} - {"data", "select", "repair"}
        if folder.is_dir()
        else {}
    )
    if others or folder.is_file():
        raise BadOption(
            f"--out {folder}: there is something else of that name; give an empty or new folder"
        )
    try:
        (folder / "data").mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DiskTrouble(
            f"{folder}: cannot be written ({error.strerror}); give another --out"
        ) from None
    progress.say(
        f"A tiny model knows {len(SKILLS)} skills, with mistakes. First: 5% of a pool for {DEMO_SKILL}."
    )
    share, chosen_share, choice = _select(folder, progress)
    progress.say("")
    progress.say(f"Next: a fine-tuning set of {MIXTURE_ROWS:,} rows, 15% of them wrong. Which?")
    repaired = _repair(folder, progress)
    auroc = repaired.manifest["choice"]["labels"]["auroc"]
    progress.say("")
    progress.say(
        f"Last: does training on the chosen 5% help? {SEEDS} short trainings on it, on random rows, on all."
    )
    accuracy = _evaluate(folder, progress) if find_spec("trl") and find_spec("peft") else {}
    progress.say("")
    progress.say(f"{DEMO_SKILL}: {share:.1%} of the pool and {chosen_share:.1%} of the chosen 5%")
    progress.say(f"wrong answers: AUROC {auroc:.3f} of the repair ranking (0.5 is chance)")
    if accuracy:
        before, ours, random, everything = (
            accuracy[name] for name in ("none", "prism", "random", "everything")
        )
        progress.say(
            f"accuracy on {DEMO_SKILL}, {before:.1%} before: {ours:.1%} after the chosen 5%, {random:.1%} after "
            f"random rows of as many tokens, {everything:.1%} after as many steps on all {POOL_ROWS:,}"
        )
    else:
        progress.say("no training was tried: PRISM is here without its extra [train]")
    for run, name in ((choice, "selected.jsonl"), (repaired, "removed.jsonl")):
        progress.say(
            f"look at {run.path / 'report.html'}, {run.path / name} and {run.path / 'scores.parquet'}"
        )
    progress.say(
        "few pairs: the runs warn of noise, and the figures above tell what came of it all the same"
    )
    progress.say(f"to try your own options: the model is {MODEL}, files are in {folder / 'data'}")
    return Figures(share, chosen_share, auroc, accuracy)


def _select(folder: Path, progress: Progress) -> tuple[float, float, Run]:
    rows = pool(POOL_ROWS, SEED)
    run = select(
        model=str(MODEL),
        pool=_write(folder / "data" / "pool.jsonl", rows),
        target=_write(
            folder / "data" / f"{DEMO_SKILL}.jsonl", pairs(DEMO_SKILL, TARGET_PAIRS, SEED)
        ),
        out=str(folder / "select"),
        overwrite=True,
    )
    _say_counts(run, progress)
    chosen = [row["source"] == DEMO_SKILL for row in run.selected]
    return (
        sum(row["source"] == DEMO_SKILL for row in rows) / len(rows),
        sum(chosen) / len(chosen),
        run,
    )


def _repair(folder: Path, progress: Progress) -> Run:
    target = [pair for skill in SKILLS for pair in pairs(skill, PAIRS_PER_SKILL, SEED)]
    run = repair(
        model=str(MODEL),
        pool=_write(folder / "data" / "mixture.jsonl", mixture(MIXTURE_ROWS, SEED)),
        target=_write(folder / "data" / "truth.jsonl", target),
        label_field="is_bad",
        remove="15%",
        out=str(folder / "repair"),
        overwrite=True,
    )
    _say_counts(run, progress)
    return run


def _evaluate(folder: Path, progress: Progress) -> Mapping[str, float]:
    held = _write(folder / "data" / "held_out.jsonl", pairs(DEMO_SKILL, HELD_OUT, SEED + 1))
    config = EvaluateConfig(
        run=str(folder / "select"),
        holdout=held,
        against="random,everything",
        seeds=SEEDS,
        rate=RATE,
        points=1,
    )
    told = execute_evaluation(config, progress)
    progress.say(
        f"{told['pairs']} questions: the choice is {told['against']['random']['words']} (gain, nats per token)"
    )
    return {name: each["accuracy"] for name, each in told["methods"].items()}


def _say_counts(run: Run, progress: Progress) -> None:
    counts, seconds = run.manifest["counts"], run.manifest["timings"]["total"]
    told = ", ".join(f"{count:,} {name}" for name, count in counts.items() if count)
    progress.say(f"{told} in {seconds:.1f} s")


def _write(path: Path, rows: Iterable[Mapping[str, object]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)
