"""The demo: the two main jobs on the bundled model, and what they are worth, in a dozen lines.

    DEMO/select   5% of a mixed pool for one skill
    DEMO/repair   a fine-tuning set with 15% wrong answers

    accuracy = share of held-out questions of the skill whose right answer the model prefers to the
               usual mistake

Choices made here: everything runs anew each time, with the options that a user would start with.
"""

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

__all__ = ["MODEL", "Figures", "run_demo"]

MODEL = Path(__file__).parent / "model"
POOL_ROWS, MIXTURE_ROWS, TARGET_PAIRS, PAIRS_PER_SKILL, SEED = 2000, 1200, 40, 20, 0
HELD_OUT, SEEDS, RATE = 100, 3, 1e-3


@dataclass(frozen=True)
class Figures:
    """What the demo measured; `accuracy` is by method, and empty without the extra [train]."""

    pool_share: float
    chosen_share: float
    auroc: float
    accuracy: Mapping[str, float] = field(default_factory=dict)


def run_demo(out: str, progress: Progress) -> Figures:
    """Writes the demo's files and runs under `out`, and says what came of it."""
    folder, say = Path(out), progress.say
    _prepare(folder)
    say(f"A tiny model knows {len(SKILLS)} skills, with mistakes.")
    say(f"First: 5% of a pool for {DEMO_SKILL}.")
    pool_share, chosen_share, selected = _select(folder, progress)
    say("")
    say(f"Next: a fine-tuning set of {MIXTURE_ROWS:,} rows, 15% of them wrong. Which?")
    repaired = _repair(folder, progress)
    say("")
    say(
        "Last: does training on the chosen 5% help? "
        f"{SEEDS} short trainings on it, on random rows, on all."
    )
    accuracy = _evaluate(folder, progress) if find_spec("trl") and find_spec("peft") else {}
    auroc = repaired.manifest["choice"]["labels"]["auroc"]
    figures = Figures(pool_share, chosen_share, auroc, accuracy)
    _say_figures(figures, progress)
    for run, name in ((selected, "selected.jsonl"), (repaired, "removed.jsonl")):
        paths = run.path / "report.html", run.path / name, run.path / "scores.parquet"
        say("look at {}, {} and {}".format(*paths))
    say(
        "few pairs: the runs warn of noise, and the figures above show what came of it all the same"
    )
    say(f"to try your own options: the model is {MODEL}, files are in {folder / 'data'}")
    return figures


def _prepare(folder: Path) -> None:
    """Raises BadOption where the folder holds something else, DiskTrouble where it cannot be
    written."""
    present = {path.name for path in folder.iterdir()} if folder.is_dir() else set[str]()
    if present - {"data", "select", "repair"} or folder.is_file():
        raise BadOption(
            f"--out {folder}: there is something else of that name; give an empty or new folder"
        )
    try:
        (folder / "data").mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DiskTrouble(
            f"{folder}: cannot be written ({error.strerror}); give another --out"
        ) from None


def _say_figures(figures: Figures, progress: Progress) -> None:
    progress.say("")
    progress.say(
        f"{DEMO_SKILL}: {figures.pool_share:.1%} of the pool and {figures.chosen_share:.1%} of the "
        "chosen 5%"
    )
    progress.say(f"wrong answers: AUROC {figures.auroc:.3f} of the repair ranking (0.5 is chance)")
    if not figures.accuracy:
        progress.say("no training was tried: PRISM is here without its extra [train]")
        return
    methods = ("none", "prism", "random", "everything")
    before, ours, random, everything = (figures.accuracy[name] for name in methods)
    progress.say(
        f"accuracy on {DEMO_SKILL}, {before:.1%} before: {ours:.1%} after the chosen 5%, "
        f"{random:.1%} after random rows of as many tokens, {everything:.1%} after as many steps "
        f"on all {POOL_ROWS:,}"
    )


def _select(folder: Path, progress: Progress) -> tuple[float, float, Run]:
    """Shares of the skill in the pool and in the choice, and the run."""
    rows = pool(POOL_ROWS, SEED)
    target = pairs(DEMO_SKILL, TARGET_PAIRS, SEED)
    run = select(
        model=str(MODEL),
        pool=_write(folder / "data" / "pool.jsonl", rows),
        target=_write(folder / "data" / f"{DEMO_SKILL}.jsonl", target),
        out=str(folder / "select"),
        overwrite=True,
    )
    _say_counts(run, progress)
    in_pool = [row["source"] == DEMO_SKILL for row in rows]
    chosen = [row["source"] == DEMO_SKILL for row in run.selected]
    return sum(in_pool) / len(in_pool), sum(chosen) / len(chosen), run


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
    """Accuracy by method."""
    held_out = _write(folder / "data" / "held_out.jsonl", pairs(DEMO_SKILL, HELD_OUT, SEED + 1))
    config = EvaluateConfig(
        run=str(folder / "select"),
        holdout=held_out,
        against="random,everything",
        seeds=SEEDS,
        rate=RATE,
    )
    result = execute_evaluation(config, progress)
    words = result["against"]["random"]["words"]
    progress.say(f"{result['pairs']} questions: the choice is {words} (gain, nats per token)")
    return {name: method["accuracy"] for name, method in result["methods"].items()}


def _say_counts(run: Run, progress: Progress) -> None:
    counts, seconds = run.manifest["counts"], run.manifest["timings"]["total"]
    line = ", ".join(f"{count:,} {name}" for name, count in counts.items() if count)
    progress.say(f"{line} in {seconds:.1f} s")


def _write(path: Path, rows: Iterable[Mapping[str, object]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)
