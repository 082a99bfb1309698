"""Does the choice help? PRISM and every baseline, trained at the same budget, on Gemma-3-270M and
on a tiny model.

    python benchmarks/quality.py --data DIR      hours on two cores; a stopped study resumes
    python benchmarks/quality.py --data DIR --only babi      the tiny model alone: minutes

Scenarios stand in gemma.py and babi.py. Each is scored once and chosen from at 5%, 1% and 20% (in
repair: so much is removed), then `prism evaluate` trains on the choice and on each baseline's:
three seeds on Gemma, ten on the tiny model.

Choices made here: a few baselines come first, for all scenarios, then all. Intervals are those of
`prism evaluate`, at 95%, over seeds and questions; with three seeds they are too narrow. J, the
gain, rises with the spread of the gaps too, so the win rate stands beside it. What a baseline finds
of the truth is told at the budget of its training. The controls are left to the tiny model: on
Gemma they would take longer than all else, and random rows for the price of scoring are trained on
with one seed, so that interval is over questions alone. What was not run is no row of figures, but
one that says `missing`."""

import argparse
import json
import shutil
import warnings
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest import mock

import babi
import gemma
import numpy as np
import pyarrow.parquet as pq
from real import lines
from results_file import RESULTS, figure, write
from scenario import Scenario

import prism_select
from prism_select.core.statistics import auroc
from prism_select.evaluation import evaluate as evaluation
from prism_select.evaluation import past_run, trainings
from prism_select.evaluation.training_results import PRICED
from prism_select.run.config_evaluate import EvaluateConfig
from prism_select.selection.baselines import BASELINES

Row = dict[str, Any]
WORK = Path(__file__).parent / "work"
BUDGETS = ("5%", "1%", "20%")
FIRST = ("everything", "random", "bm25", "rds", "less")  # so that a study cut short tells something
EVERY = (*FIRST, *(name for name in BASELINES if name not in FIRST))
STAGES = [
    (BUDGETS[0], baselines) for baselines in (FIRST, EVERY, (*EVERY, PRICED))
]  # the price buys long trainings
STAGES += [(budget, baselines) for baselines in (FIRST, EVERY) for budget in BUDGETS[1:]]
TITLES = {"gain": "gain", "win_rate": "win rate", "accuracy": "accuracy"}


def folder(scenario: Scenario, budget: str) -> Path:
    return WORK / "quality" / f"{scenario.name}-{budget.rstrip('%')}"


def chosen(scenario: Scenario, budget: str) -> Path:
    """A complete run at this budget, from the scores of the first budget where that can be."""
    out, first = folder(scenario, budget), folder(scenario, BUDGETS[0])
    shared: Row = {"model": str(scenario.model), "pool": scenario.pool, "target": scenario.target}
    scoring = {"curvature": "flat", **scenario.scoring}
    if scenario.command == "repair":
        options: Row = {"label_field": scenario.truth, "remove": budget}
        prism_select.repair(**shared, **scoring, **options, out=str(out))
    elif out == first:
        prism_select.select(**shared, **scoring, budget=budget, out=str(out))
    else:
        prism_select.select(select_from=str(first), budget=budget, out=str(out))
        (out / "evaluation").mkdir(exist_ok=True)
        shutil.copy(first / "evaluation" / "rankings.parquet", out / "evaluation")
    return out


def evaluated(scenario: Scenario, budget: str, baselines: Sequence[str]) -> None:
    options = {**scenario.training, "against": ",".join(baselines)}
    config = EvaluateConfig(run=str(chosen(scenario, budget)), holdout=scenario.holdout, **options)
    real = "gemma" in str(scenario.model)
    with ExitStack() as changed:
        if real:
            changed.enter_context(mock.patch.object(evaluation, "run_controls", lambda *_: []))
            changed.enter_context(mock.patch.object(evaluation, "PRICED_SEEDS", 1))
        told = evaluation.evaluate(config)
    print(
        f"{scenario.name} at {budget}:",
        *(each["words"] for each in told["against"].values()),
        sep="\n  ",
        flush=True,
    )


def truth(scenario: Scenario, budget: str) -> Mapping[str, Mapping[str, float]]:
    """Of each method: the share of rows of the truth among those that it takes (in repair:
    removes), and how well its ranking of the whole pool tells them, as AUROC."""
    past = past_run.open_run(
        EvaluateConfig(run=str(folder(scenario, budget)), holdout=scenario.holdout)
    )
    is_true = np.array([bool(row[scenario.truth]) for row in lines(Path(scenario.pool))])
    table = pq.read_table(folder(scenario, budget) / "evaluation" / "rankings.parquet")
    found = {}
    for name, ranking in {
        "prism": past.ranking,
        **{n: table[n].to_numpy() for n in table.column_names},
    }.items():
        rows = np.flatnonzero(past.chosen) if name == "prism" else trainings.rows_of(past, ranking)
        rows = np.setdiff1d(past.scored, rows) if past.repair else rows
        known = np.isfinite(ranking)
        found[name] = {
            "share": float(is_true[rows].mean()),
            "auroc": auroc(ranking[known], is_true[known]),
        }
    return {"pool": {"share": float(is_true.mean())}, **found}


def told_of(scenario: Scenario, budget: str) -> tuple[list[Row], list[Row]]:
    """Rows and figures of what is there."""
    place = folder(scenario, budget) / "evaluation" / "evaluation.json"
    told, finds, where = (
        json.loads(place.read_text(encoding="utf-8")),
        truth(scenario, budget),
        f"{scenario.name} {budget}",
    )
    figures, rows = [], []
    for name, each in told["methods"].items():
        against = told["against"].get(name, {})
        rows.append(
            {
                "scenario": scenario.name,
                "command": scenario.command,
                "budget": budget,
                "method": name,
            }
        )
        rows[-1] |= {**each, **finds.get(name, {})}
        rows[-1]["prism minus it"] = {key: against[key] for key in TITLES if key in against}
        for key in (
            "gain",
            "win_rate",
            *(["accuracy"] if told["questions"] < told["pairs"] else []),
        ):
            if name in ("random", "everything", "none") and key in against:
                middle, ends = (
                    against[key]["difference"],
                    [against[key]["low"], against[key]["high"]],
                )
                figures.append(
                    figure(f"{where}: prism over {name}, {TITLES[key]}", middle, "", "", ends)
                )
                if (name, key, budget) == ("random", "gain", "5%"):
                    line = f"{where}: prism over random, gain, lower end of the interval"
                    figures.append(figure(line, ends[0], "nats per token", "≥ 0"))
    best = max(
        (name for name in told["methods"] if name in BASELINES),
        key=lambda n: float(told["methods"][n]["gain"]),
    )
    ends = [told["against"][best]["gain"][end] for end in ("low", "high")]
    middle = told["against"][best]["gain"]["difference"]
    figures.append(
        figure(
            f"{where}: prism over the best rival ({best}), gain", middle, "nats per token", "", ends
        )
    )
    kind = "auroc" if scenario.command == "repair" else "share"
    if budget == "5%":
        bar = {"truthfulqa": "≥ 0.82", "polite": "≥ 0.8"}.get(scenario.name, "")
        figures.append(
            figure(f"{where}: {kind} of the truth, prism", finds["prism"][kind], kind, bar)
        )
        figures.append(
            figure(f"{where}: forecast", told["forecast"]["rank_correlation"] or 0.0, "ρ", "")
        )
    if told["compute"]:
        spent = told["compute"]
        figures.append(
            figure(f"{where}: price of scoring", spent["price"], "forwards of the pool", "")
        )
        at = spent["break_even"]
        line = f"{where}: price at which random would do as well" + (
            " (not even at the price paid)" if at is None else ""
        )
        figures.append(
            figure(line, spent["price"] if at is None else at, "forwards of the pool", "")
        )
    return rows, figures


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True, help="folder of the public data sets")
    parser.add_argument(
        "--only",
        default="",
        help="run some only: names of scenarios or models, with commas between",
    )
    parser.add_argument("--budget", default="", help="run one budget only, such as 5%%")
    parser.add_argument("--write", action="store_true", help="run nothing, write what is there")
    given = parser.parse_args()
    warnings.simplefilter("ignore", FutureWarning)
    (WORK / "babi").mkdir(parents=True, exist_ok=True)
    tiny = babi.scenarios(given.data, WORK / "babi")
    models = {"babi": [*tiny, *babi.by_kind(tiny)], "gemma": gemma.scenarios(given.data)}
    every = [scenario for scenarios in models.values() for scenario in scenarios]
    wanted = given.only.split(",") if given.only else list(models)
    todo = [
        each
        for name, some in models.items()
        for each in some
        if name in wanted or each.name in wanted
    ]
    for budget, baselines in [] if given.write else STAGES:
        for scenario in todo if given.budget in ("", budget) else ():
            evaluated(scenario, budget, baselines)
    save(every)


def save(every: Sequence[Scenario]) -> None:
    """What is there, and of scenarios whose folder is gone what was written before."""
    rows, figures = list[Row](), list[Row]()
    before = json.loads((RESULTS / "quality.json").read_text(encoding="utf-8"))
    for scenario in every:
        for budget in BUDGETS:
            if (folder(scenario, budget) / "evaluation" / "evaluation.json").exists():
                for kept, new in zip((rows, figures), told_of(scenario, budget), strict=True):
                    kept.extend(new)
                continue
            here = {"scenario": scenario.name, "budget": budget}
            old = [
                row
                for row in before["rows"]
                if here.items() <= row.items() and "missing" not in row
            ]
            rows += old or [{**here, "missing": True}]
            figures += [
                each
                for each in before["figures"]
                if each["name"].startswith(f"{scenario.name} {budget}:")
            ]
    write("quality.json", rows, figures)


if __name__ == "__main__":
    main()
