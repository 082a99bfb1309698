"""The demo: the two main jobs on the bundled model, and what they are worth, in a few lines.

    DEMO/select   5% of a mixed pool for one skill
    DEMO/repair   a fine-tuning that went wrong: DEMO/after is the bundled model after training on
                  a set with 20% wrong answers, all of two skills
                  questions → answers before and after → pairs → ranking → training on what is kept

    accuracy = share of held-out questions whose right answer the model prefers to the usual mistake

Choices made here:
- everything runs anew each time, with the options that a user would start with;
- the repair knows the pairs alone: labels of wrong rows and skills only measure it.
"""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from prism_select.api import execute_evaluation, make_pairs, repair, select
from prism_select.demo.world import DEMO_SKILL, SKILLS, mixture, pairs, pool
from prism_select.run.config_evaluate import EvaluateConfig
from prism_select.run.errors import BadOption, DiskTrouble
from prism_select.run.folder import Run
from prism_select.run.progress import Progress
from prism_select.run.thresholds import auroc_in_words

__all__ = ["MODEL", "Figures", "run_demo"]

MODEL = Path(__file__).parent / "model"
POOL_ROWS, MIXTURE_ROWS, TARGET_PAIRS, SEED = 2000, 1200, 40, 0
HELD_OUT, SEEDS, RATE = 100, 3, 1e-3
WRONG, WRONG_SKILLS = 0.2, ("arithmetic", "units")
ASKED, HELD_OUT_REPAIR, STEPS = 40, 60, "100"


@dataclass(frozen=True)
class Figures:
    """What the demo measured: AUROCs of held-out pairs and of wrong rows, and in `compared` how
    many questions became better or worse. `accuracy` is by method; `repaired` has "before",
    "after", "repaired" and "random"; both are empty without the extra [train]."""

    pool_share: float
    chosen_share: float
    pairs_auroc: float
    auroc: float
    compared: Mapping[str, int]
    accuracy: Mapping[str, float] = field(default_factory=dict)
    repaired: Mapping[str, float] = field(default_factory=dict)


def run_demo(out: str, progress: Progress) -> Figures:
    """Writes the demo's files and runs under `out`, and says what came of it."""
    folder, say = Path(out), progress.say
    trains = bool(find_spec("trl") and find_spec("peft"))
    _prepare(folder)
    say(f"A tiny model knows {len(SKILLS)} skills, with mistakes.")
    say(f"First: 5% of a pool for {DEMO_SKILL}.")
    pool_share, chosen_share, selected = _select(folder, progress)
    accuracy = _train_on_selected(folder, progress) if trains else {}
    say("")
    say("Next: a fine-tuning went wrong. Which rows did it?")
    compared = _compare(folder, progress)
    repaired = _repair(folder, progress)
    benchmark = _train_on_kept(folder, progress) if trains else {}
    figures = Figures(
        pool_share=pool_share,
        chosen_share=chosen_share,
        pairs_auroc=repaired.manifest["target"]["cross_validation"]["auroc"],
        auroc=repaired.manifest["choice"]["labels"]["auroc"],
        compared=compared,
        accuracy=accuracy,
        repaired=benchmark,
    )
    _say_figures(figures, progress)
    for run, name in ((selected, "selected.jsonl"), (repaired, "removed.jsonl")):
        paths = run.path / "report.html", run.path / name, run.path / "scores.parquet"
        say("look at {}, {} and {}".format(*paths))
    say(
        f"few pairs for {DEMO_SKILL}: that run warns of noise, and the figures above show what "
        "came of it all the same"
    )
    say(f"to try your own options: the model is {MODEL}, files are in {folder / 'data'}")
    return figures


def _prepare(folder: Path) -> None:
    """Raises BadOption where the folder holds something else, DiskTrouble where it cannot be
    written."""
    present = {path.name for path in folder.iterdir()} if folder.is_dir() else set[str]()
    if present - {"data", "select", "after", "repair"} or folder.is_file():
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
    say, skills = progress.say, " and ".join(WRONG_SKILLS)
    say("")
    say(
        f"{DEMO_SKILL}: {figures.pool_share:.1%} of the pool and {figures.chosen_share:.1%} of the "
        "chosen 5%"
    )
    if figures.accuracy:
        methods = ("none", "prism", "random", "everything")
        before, ours, random, everything = (figures.accuracy[name] for name in methods)
        say(
            f"accuracy on {DEMO_SKILL}: {before:.1%} before, {ours:.1%} after the chosen 5%; "
            f"{random:.1%} after random rows of as many tokens, {everything:.1%} after as many "
            f"steps on all {POOL_ROWS:,}"
        )
    say(f"wrong answers: AUROC {figures.auroc:.3f} of the repair ranking (0.5 is chance)")
    if not figures.repaired:
        say("no choice was tried in training: PRISM is here without its extra [train]")
        return
    before, after, ours, random = figures.repaired.values()
    say(
        f"accuracy on {skills}: {before:.1%} before, {after:.1%} after, {ours:.1%} repaired; "
        f"{random:.1%} without as many random rows"
    )


# --- select --------------------------------------------------------------------------------------


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


def _train_on_selected(folder: Path, progress: Progress) -> Mapping[str, float]:
    """Accuracy by method."""
    progress.say(f"{SEEDS} short trainings on these, on random rows, on all: does it help?")
    held_out = _write(folder / "data" / "held_out.jsonl", pairs(DEMO_SKILL, HELD_OUT, SEED + 1))
    config = EvaluateConfig(
        run=str(folder / "select"),
        holdout=held_out,
        against="random,everything",
        seeds=SEEDS,
        rate=RATE,
    )
    result = execute_evaluation(config, progress)
    _say_verdict("the choice", result, progress)
    return {name: method["accuracy"] for name, method in result["methods"].items()}


# --- repair --------------------------------------------------------------------------------------


def _compare(folder: Path, progress: Progress) -> Mapping[str, int]:
    """Fine-tunes on the mixture, and pairs the answers to what got worse; counts of questions."""
    from prism_select.demo.train import fine_tune  # imports torch

    data, after = folder / "data", folder / "after"
    rows = mixture(MIXTURE_ROWS, SEED, WRONG, WRONG_SKILLS)
    _write(data / "mixture.jsonl", rows)
    fine_tune(rows, after, progress)
    asked = [pair for skill in SKILLS for pair in pairs(skill, ASKED, SEED)]
    made = make_pairs(
        _write(data / "questions.jsonl", asked),
        "before-after",
        data / "worse.jsonl",
        before=str(MODEL),
        after=str(after),
        overwrite=True,
    )
    counts = ", ".join(f"{made.compared[name]} {name}" for name in ("better", "same", "worse"))
    progress.say(f"{made.rows} questions before and after training on {len(rows):,} rows: {counts}")
    return made.compared


def _repair(folder: Path, progress: Progress) -> Run:
    run = repair(
        model=str(MODEL),
        pool=str(folder / "data" / "mixture.jsonl"),
        target=str(folder / "data" / "worse.jsonl"),
        label_field="is_bad",
        remove=f"{WRONG:.0%}",
        out=str(folder / "repair"),
        overwrite=True,
    )
    target = run.manifest["target"]
    found = target["cross_validation"]
    words = auroc_in_words(found["auroc"], found["interval"])
    progress.say(f"answers to what got worse make {target['pairs']} pairs: AUROC {words} held out")
    _say_counts(run, progress)
    return run


def _train_on_kept(folder: Path, progress: Progress) -> Mapping[str, float]:
    """Accuracy on the skills that have wrong rows: the model before, and after a training on all
    rows, on the kept ones, and without as many random ones."""
    progress.say(
        "Does it help? Training again: on all rows, on those kept, without as many random or wrong "
        "ones."
    )
    held_out = [
        pair
        for skill in WRONG_SKILLS
        for pair in pairs(skill, ASKED + HELD_OUT_REPAIR, SEED)[ASKED:]
    ]
    config = EvaluateConfig(
        run=str(folder / "repair"),
        holdout=_write(folder / "data" / "held_out_repair.jsonl", held_out),
        against="random",
        removals=f"{WRONG:.0%}",
        seeds=1,
        steps=STEPS,
        rate=RATE,
    )
    result = execute_evaluation(config, progress)
    _say_verdict("the repair", result, progress)
    before = result["methods"]["none"]["accuracy"]
    after = {point["method"]: point["accuracy"] for point in result["curve"]}
    return {
        "before": before,
        "after": after["everything"],
        "repaired": after["prism"],
        "random": after["random"],
    }


# --- both ----------------------------------------------------------------------------------------


def _say_verdict(what: str, result: Mapping[str, Any], progress: Progress) -> None:
    words = result["against"]["random"]["words"]
    questions = f"{result['questions']} held-out questions"
    progress.say(f"{questions}: {what} is {words} (gain, nats per token)")


def _say_counts(run: Run, progress: Progress) -> None:
    counts, seconds = run.manifest["counts"], run.manifest["timings"]["total"]
    line = ", ".join(f"{count:,} {name}" for name, count in counts.items() if count)
    progress.say(f"{line} in {seconds:.1f} s")


def _write(path: Path, rows: Iterable[Mapping[str, object]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)
