"""A set or a list? What a choice that serves groups of pairs is worth in accuracy and win rate.

    python benchmarks/coverage.py --data DIR [--seeds 2] [--budget 5%]    a stopped study resumes

    babi-select, babi-choice    babi.py: the tiny model, pairs of one task
    demo                        the demo's world: pairs of one skill, 24 facts
    demo-kinds                  the same: pairs of four skills, in unequal numbers

    flat, pairs      the highest scores along one direction, by its curvature
    in turn          groups of pairs by their gradients (--groups auto), each takes rows in turn
    concave          the same groups, Σ √(what each has got)
    sixteen, each    sixteen groups; a group for each pair
    named            a target for each kind that the pairs' file names, in turn

Choices made here: every way is a run of its own, trained as `prism evaluate` does, against random
rows of as many tokens and as many steps; the other baselines are trained once for each scenario,
with the run `pairs`. The gain rises with the spread of the gaps too: read it with the win rate."""

import argparse
import json
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import babi
from results_file import figure, write
from scenario import Scenario

import prism_select
from prism_select.demo import world
from prism_select.demo.train import MODEL_DIR
from prism_select.evaluation import evaluate as evaluation
from prism_select.run.config_evaluate import EvaluateConfig

Row = dict[str, Any]
WORK = Path(__file__).parent / "work"
WAYS: Mapping[str, Row] = {
    "pairs": {},
    "flat": {"curvature": "flat"},
    "in turn": {"groups": "auto"},
    "concave": {"groups": "auto", "combine": "concave"},
    "sixteen": {"groups": "16"},
    "each": {"groups": "each"},
    "named": {"combine": "round-robin"},
}
KINDS = {"babi-select": "chosen", "babi-choice": "wanted", "demo": "fact", "demo-kinds": "kind"}
BASELINES = "random,bm25,rds,everything"
MEASURES = {"win_rate": "win rate", "accuracy": "accuracy", "gain": "gain"}


def demo_scenarios(work: Path) -> list[Scenario]:
    skills = {"capitals": 24, "plurals": 12, "opposites": 8, "arithmetic": 6}
    training: Row = {"rate": 1e-3, "steps": "40"}
    pool = babi.save(work / "demo-pool.jsonl", world.pool(2000, 0))
    parts: dict[str, list[tuple[str, int, int]]] = {
        "demo": [("capitals", 40, 100)],
        "demo-kinds": [(name, count, 30) for name, count in skills.items()],
    }
    made = []
    for name, part in parts.items():
        column = KINDS[name]

        def rows(skill: str, count: int, seed: int, column: str = column) -> list[Row]:
            pairs: Sequence[Row] = world.pairs(skill, count, seed)
            kinds = [skill if column == "kind" else pair["chosen"].split()[-1] for pair in pairs]
            return [{**pair, column: kind} for pair, kind in zip(pairs, kinds, strict=True)]

        target = [row for skill, count, _ in part for row in rows(skill, count, 0)]
        seen = {row["prompt"] for row in target}
        held = [row for skill, _, count in part for row in rows(skill, count, 1)]
        held = [row for row in held if row["prompt"] not in seen]
        files = {
            "target": babi.save(work / f"{name}-target.jsonl", target),
            "holdout": babi.save(work / f"{name}-holdout.jsonl", held),
        }
        scenario = Scenario(
            name, "select", Path(MODEL_DIR), pool, **files, truth="", scoring={}, training=training
        )
        made.append(scenario)
    return made


def scenarios(data: Path) -> list[Scenario]:
    for folder in ("babi", "coverage"):
        (WORK / folder).mkdir(parents=True, exist_ok=True)
    tiny = [s for s in babi.scenarios(data, WORK / "babi") if s.command == "select"]
    return [*demo_scenarios(WORK / "coverage"), *tiny]


def folder(scenario: Scenario, way: str, budget: str) -> Path:
    name = way.replace(",", "").replace(" ", "-")
    return WORK / "coverage" / scenario.name / f"{name}-{budget.rstrip('%')}"


def chosen(scenario: Scenario, way: str, budget: str) -> Path:
    options = {**scenario.scoring, **WAYS[way]}
    if options.get("groups") == "each":
        options["groups"] = str(pairs_of(scenario))
    if way == "named":
        options["target_by"] = KINDS[scenario.name]
    out = folder(scenario, way, budget)
    files: Row = {"model": str(scenario.model), "pool": scenario.pool, "target": scenario.target}
    prism_select.select(**files, **options, budget=budget, out=str(out))
    return out


def pairs_of(scenario: Scenario) -> int:
    rows = [json.loads(line) for line in Path(scenario.target).read_text().splitlines()]
    return sum(len(row.get("choices", "ab")) - 1 for row in rows)


def trained(scenario: Scenario, way: str, budget: str, seeds: int) -> None:
    against = BASELINES if way == "pairs" else "random"
    training = {**scenario.training, "seeds": seeds, "against": against}
    run = str(chosen(scenario, way, budget))
    with mock.patch.object(evaluation, "run_controls", lambda *_: []):
        told = evaluation.evaluate(EvaluateConfig(run=run, holdout=scenario.holdout, **training))
    methods = told["methods"] if way == "pairs" else {"prism": told["methods"]["prism"]}
    for name, method in methods.items():
        values = ", ".join(f"{words} {method[key]:.3f}" for key, words in MEASURES.items())
        over = told["against"]["random"] if name == "prism" else {}
        wins = over.get("win_rate", {})
        said = " ".join(f"{wins[key]:+.3f}" for key in ("difference", "low", "high") if wins)
        print(f"{scenario.name} {budget} {way}/{name}: {values}; over random {said}", flush=True)


def rows_of(scenario: Scenario, way: str, budget: str) -> Iterator[Row]:
    """What is there."""
    place = folder(scenario, way, budget)
    if not (place / "evaluation" / "evaluation.json").exists():
        return
    told = json.loads((place / "evaluation" / "evaluation.json").read_text(encoding="utf-8"))
    manifest = prism_select.Run(str(place)).manifest
    for name, method in told["methods"].items():
        if name != "prism" and way != "pairs":
            continue
        row: Row = {"scenario": scenario.name, "budget": budget, "method": name}
        if name == "prism":
            row |= {"method": way, "over random": told["against"]["random"]}
            row["coverage"] = manifest["choice"].get("coverage")
            row["seconds"] = manifest["timings"]
        yield row | {key: method[key] for key in (*MEASURES, "loglik_chosen")}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True, help="folder of the public data sets")
    parser.add_argument("--only", default="", help="scenarios, with commas between")
    parser.add_argument("--ways", default="", help="ways, with a slash between")
    parser.add_argument("--budget", default="5%,1%,20%", help="budgets, with commas between")
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--write", action="store_true", help="run nothing, write what is there")
    given = parser.parse_args()
    warnings.simplefilter("ignore", FutureWarning)
    every, budgets = scenarios(given.data), given.budget.split(",")
    ways = given.ways.split("/") if given.ways else list(WAYS)
    some = [s for s in every if not given.only or s.name in given.only.split(",")]
    for budget in [] if given.write else budgets:
        for scenario in some:
            for way in ways:
                trained(scenario, way, budget, given.seeds)
    if given.write:
        rows = [row for b in budgets for s in every for way in WAYS for row in rows_of(s, way, b)]
        write("coverage.json", rows, [line for row in rows for line in figures_of(row)])


def figures_of(row: Row) -> Iterator[Row]:
    for key, words in MEASURES.items():
        over = row.get("over random", {}).get(key)
        if over:
            name = f"{row['scenario']} {row['budget']}: {row['method']} over random, {words}"
            yield figure(name, over["difference"], "", "", [over["low"], over["high"]])


if __name__ == "__main__":
    main()
