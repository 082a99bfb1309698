"""Where a choice falls short: what was tried, on validation pairs and questions that no hold-out
shares.

    python benchmarks/attempts.py --data DIR      about an hour on one core; a stopped study resumes

    bAbI     each option by itself, then three learning rates: gain and win rate on the validation
             pairs of babi.py after training on the best 5% (in repair: without the worst 5%), less
             those of as many random rows
    Gemma    the two repairs of curvature.py: AUROC with flat curvature and each remedy that was not
             tried there

Choices made here: nothing is tried on the hold-out pairs of quality.py. `kinds` makes a target of
each answer that the pairs want and takes their best rows in turn; it is meant for the reason found
in the first study, that the highest scores are of few kinds. The committed rows also have "nearest
50%", the half of the pairs whose two answers are most alike: an option that is gone."""

import argparse
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from unittest import mock

import babi
import numpy as np
from curvature import TASKS, resampled
from real import WORK, model, save
from results_file import figure, write
from scenario import Scenario

import prism_select
from prism_select.core.statistics import auroc
from prism_select.evaluation import evaluate as evaluation
from prism_select.run.config_evaluate import EvaluateConfig

Row = dict[str, Any]
KINDS: Row = {"target_by": "chosen", "combine": "round-robin"}
OPTIONS: Mapping[str, Row] = {
    "as it is": {},
    "weighting uniform": {"weighting": "uniform"},
    "weighting hard": {"weighting": "hard"},
    "layers late": {"layers": "late"},
    "curvature ekfac": {"curvature": "ekfac"},
    "normalize norm": {"normalize": "norm"},
    "ekfac, norm": {"curvature": "ekfac", "normalize": "norm"},
    "common remove": {"common": "remove"},
    "anchor 1": {"anchor": 1.0},
    "warm-up on 30%": {"warmup": "30%"},
    "kinds": KINDS,
    "kinds, ekfac": {**KINDS, "curvature": "ekfac"},
}
RATES = (3e-4, 3e-3)  # beside that of babi.py, 1e-3
REMEDIES: Mapping[str, Row] = {
    "as it is": {},
    "warm-up on 30%": {"warmup": "30%"},
}
LAYERS = {"truthfulqa": "all", "polite": "last:6"}


def run(scenario: Scenario, name: str, options: Row) -> prism_select.Run:
    command = prism_select.repair if scenario.command == "repair" else prism_select.select
    amount: Row = {"remove" if scenario.command == "repair" else "budget": "5%"}
    out = (
        WORK / "attempts" / scenario.name / name.replace(" ", "-").replace("%", "").replace(",", "")
    )
    if "target_by" in options and scenario.name == "babi-choice":
        options = {**options, "target_by": "wanted"}
    files: Row = {"model": str(scenario.model), "pool": scenario.pool, "target": scenario.target}
    return command(**files, **{**scenario.scoring, **options}, **amount, out=str(out))


def trained(scenario: Scenario, folder: Path, rate: float) -> tuple[Row, Row, Row]:
    """Means of the choice and of random rows, and the first less the second with its interval."""
    course = {**scenario.training, "rate": rate, "against": "random"}
    config = EvaluateConfig(
        run=str(folder), holdout=scenario.holdout.replace("holdout", "validation"), **course
    )
    with mock.patch.object(evaluation, "run_controls", lambda *_: []):
        told = evaluation.evaluate(config)
    return told["methods"]["prism"], told["methods"]["random"], told["against"]["random"]


def few_tasks(data: Path) -> tuple[list[Row], list[Row]]:
    (WORK / "babi").mkdir(parents=True, exist_ok=True)
    rows, figures = list[Row](), list[Row]()
    for scenario in babi.scenarios(data, WORK / "babi"):
        tries = [(name, options, 1e-3) for name, options in OPTIONS.items()]
        tries += [(f"rate {rate:g}", {}, rate) for rate in RATES]
        for name, options, rate in tries:
            mine, random_rows, against = trained(scenario, run(scenario, name, options).path, rate)
            rows.append(
                {"scenario": scenario.name, "attempt": name, "prism": mine, "random": random_rows}
            )
            for key in ("gain", "win_rate"):
                line = f"{scenario.name}, {name}: prism over random, {key.replace('_', ' ')}"
                figures.append(figure(line, *difference(against[key])))
            print(figures[-2]["name"], figures[-2]["value"], figures[-1]["value"], flush=True)
    return rows, figures


def difference(told: Mapping[str, float]) -> tuple[float, str, str, list[float]]:
    return told["difference"], "", "", [told["low"], told["high"]]


def repairs(data: Path) -> tuple[list[Row], list[Row]]:
    rows, figures = list[Row](), list[Row]()
    for task, files in TASKS.items():
        pairs, pool = files(data)
        target, place = (
            save(f"attempts-{task}-target.jsonl", pairs),
            save(f"attempts-{task}-pool.jsonl", pool),
        )
        scoring: Row = {"layers": LAYERS[task], "dtype": "bfloat16", "max_length": 256}
        scenario = Scenario(task, "repair", model(), place, target, "", "is_bad", scoring, {})
        bad, question = (np.array([row[key] for row in pool]) for key in ("is_bad", "question"))
        for name, options in REMEDIES.items():
            scores = run(scenario, name, options).scores
            rows.append({"scenario": task, "attempt": name})
            for column, unit in (("score", "summed"), ("score_per_token", "per token")):
                score = scores[column].to_numpy()
                rows[-1][unit], ends = auroc(score, bad), resampled(score, bad, question)
                figures.append(
                    figure(f"{task} repair, {name}, {unit}", rows[-1][unit], "AUROC", "", ends)
                )
                print(figures[-1]["name"], figures[-1]["value"], flush=True)
    return rows, figures


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True, help="folder of the public data sets")
    data = parser.parse_args().data
    warnings.simplefilter(
        "ignore", FutureWarning
    )  # PEFT asks transformers for a name that is about to change
    parts = [few_tasks(data), repairs(data)]
    write(
        "attempts.json",
        [row for rows, _ in parts for row in rows],
        [line for _, lines_ in parts for line in lines_],
    )


if __name__ == "__main__":
    main()
