"""A set or a list? What a choice that serves groups of pairs is worth in accuracy and win rate.

    python benchmarks/coverage.py --data DIR [--seeds 2] [--budget 5%]    a stopped study resumes

    babi-select, babi-choice    babi.py: the tiny model, pairs of one task
    demo                        the demo's world: pairs of one skill, 24 facts
    demo-kinds                  the same: pairs of four skills, in unequal numbers
    gsm8k, gsm8k-two            gemma.py: 40 pairs of a solution and the same with other numbers;
                                of a right and a wrong solution that models wrote
    arc, openbookqa             gemma.py: 40 questions of one of the two with all choices, and the
                                right answers to 200 of the other in the pool

    flat, pairs      the highest scores along one direction, by its curvature
    in turn          groups of pairs by their gradients (--groups auto), each takes rows in turn
    concave          the same groups, Σ √(what each has got)
    eight            eight groups, whatever the pairs say
    sixteen, each    sixteen groups; a group for each pair
    named            a target for each kind that the pairs' file names, in turn

Choices made here: every way is a run of its own, trained as `prism evaluate` does, against random
rows of as many tokens and as many steps; the other baselines are trained once for each scenario,
with the run `pairs`. The gain rises with the spread of the gaps too: read it with the win rate."""

import argparse
import json
import random
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import babi
import gemma
from real import lines, pair
from results_file import RESULTS, figure, write
from scenario import Scenario

import prism_select
from prism_select.data.pairing import change_numbers
from prism_select.demo import world
from prism_select.demo.train import MODEL_DIR
from prism_select.evaluation import evaluate as evaluation
from prism_select.run.config_evaluate import EvaluateConfig

Row = dict[str, Any]
WORK = Path(__file__).parent / "work"
WAYS: Mapping[str, Row] = {
    "pairs": {"groups": "1"},
    "flat": {"curvature": "flat", "groups": "1"},
    "in turn": {"groups": "auto"},
    "concave": {"groups": "auto", "combine": "concave"},
    "eight": {"groups": "8"},
    "sixteen": {"groups": "16"},
    "each": {"groups": "each"},
    "named": {"combine": "round-robin"},
}
KINDS = {"babi-select": "chosen", "babi-choice": "wanted", "demo": "fact", "demo-kinds": "kind"}
BASELINES = "random,bm25,rds,less,probe,everything"
REAL_BASELINES = "random,bm25,rds,less,probe"
SPLIT = 200  # of questions: no other study has used it
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


def real_scenarios(data: Path) -> list[Scenario]:
    """On Gemma-3-270M; a third of each pool or a quarter is of the target's kind."""
    draw, made = random.Random(SPLIT), dict[str, Mapping[str, list[Row]]]()
    solved = [
        (r["prompt"], r["chosen"], r["rejected"]) for r in lines(data / "gsm8k_model_pairs.jsonl")
    ]
    solved = [each for each in solved if len(each[0] + max(each[1:], key=len)) <= 400]
    draw.shuffle(solved)
    near = [pair(q, right, change_numbers(right, draw)) for q, right, _ in solved[:80]]
    written = [pair(*each) for each in solved[:80]]
    train = gemma.short([(r["question"], r["answer"]) for r in lines(data / "gsm8k_train.jsonl")])
    math = [gemma.row(*each, "gsm8k", is_wanted=True) for each in draw.sample(train, 150)]
    math += gemma.general(data, draw, {"alpaca": 120, "dolly": 190, "t0": 140})
    for name, pairs in {"gsm8k": near, "gsm8k-two": written}.items():
        made[name] = {"pool": math, "target": pairs[:40], "holdout": pairs[40:]}
    quizzes = {
        name: gemma.quizzes(data / f"{name}.jsonl")
        for name in ("arc_easy_train", "arc_easy_test", "openbookqa_train")
    }
    general = gemma.general(data, draw, {"alpaca": 100, "dolly": 150, "t0": 150})
    for name, asked, held, other in (
        ("arc", "arc_easy_train", "arc_easy_test", "openbookqa_train"),
        ("openbookqa", "openbookqa_train", "openbookqa_train", "arc_easy_train"),
    ):
        target = draw.sample(quizzes[asked], 40)
        left = [quiz for quiz in quizzes[held] if quiz not in target]
        facts = draw.sample(gemma.right(quizzes[other]), 200)
        pool = [gemma.row(*each, other, is_wanted=True) for each in facts] + general
        holdout = draw.sample(left, 60)
        made[name] = {
            "pool": draw.sample(pool, len(pool)),
            "target": [gemma.put(quiz) for quiz in target],
            "holdout": [gemma.put(quiz) for quiz in holdout],
        }
    training = {"seeds": 3, "steps": "12", "rate": 5e-4}
    return [
        replace(gemma.scenario(f"coverage-{name}", files, "", {}), name=name, training=training)
        for name, files in made.items()
    ]


def scenarios(data: Path) -> list[Scenario]:
    for folder in ("babi", "coverage"):
        (WORK / folder).mkdir(parents=True, exist_ok=True)
    tiny = [s for s in babi.scenarios(data, WORK / "babi") if s.command == "select"]
    return [*demo_scenarios(WORK / "coverage"), *tiny, *real_scenarios(data)]


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
    every = (
        BASELINES if scenario.training.get("full") or "demo" in scenario.name else REAL_BASELINES
    )
    against = every if way == "pairs" else "random"
    seeds = min(seeds, int(scenario.training.get("seeds", seeds)))
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
    parser.add_argument(
        "--write",
        action="store_true",
        help="run nothing; write what is there, beside what is on record",
    )
    given = parser.parse_args()
    warnings.simplefilter("ignore", FutureWarning)
    every, budgets = scenarios(given.data), given.budget.split(",")
    ways = given.ways.split("/") if given.ways else list(WAYS)
    some = [s for s in every if not given.only or s.name in given.only.split(",")]
    for budget in [] if given.write else budgets:
        for scenario in some:
            for way in ways:
                if way != "named" or scenario.name in KINDS:
                    trained(scenario, way, budget, given.seeds)
    if given.write:
        rows = [row for b in budgets for s in every for way in WAYS for row in rows_of(s, way, b)]
        rows = beside(json.loads((RESULTS / "coverage.json").read_text())["rows"], rows)
        write("coverage.json", rows, [line for row in rows for line in figures_of(row)])


def beside(old: Sequence[Row], new: Sequence[Row]) -> list[Row]:
    """What is on record already, and what is there now in its place."""

    def by_name(rows: Sequence[Row]) -> dict[tuple[str, str, str], Row]:
        return {(row["scenario"], row["budget"], row["method"]): row for row in rows}

    return [*{**by_name(old), **by_name(new)}.values()]


def figures_of(row: Row) -> Iterator[Row]:
    where = f"{row['scenario']} {row['budget']}: {row['method']}"
    for key, words in MEASURES.items():
        yield figure(f"{where}, {words}", row[key], "", "")
        over = row.get("over random", {}).get(key)
        if over:
            name = f"{where} over random, {words}"
            yield figure(name, over["difference"], "", "", [over["low"], over["high"]])


if __name__ == "__main__":
    main()
