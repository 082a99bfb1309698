"""Three scenarios on a real pre-trained model, Gemma-3-270M (base), in bfloat16: public data, short
rows.

    gsm8k         pool: 600 rows, a quarter math
                  target: 40 worked solutions and the same with other numbers
                  hold-out: 30 such pairs, and 30 of right and wrong solutions that models wrote, of
                  other questions
    truthfulqa    repair. pool: right and wrong answers    target: 80 pairs    hold-out: 60 pairs
    polite        repair. pool: polite and rude answers    target: 60 pairs    hold-out: 60 pairs
    arc           pool: 600 rows, a third right answers to OpenBookQA
                  target: 40 questions of ARC, all choices
                  hold-out: 40 questions of its test set, all choices

Choices made here: a scenario's way of scoring was fixed before its hold-out was looked at, from
what real.py, pairs.py and curvature.py found on other questions: near pairs for math, EK-FAC with
all weights and cosines for TruthfulQA, the last six blocks for politeness, an anchor for loose
choices. Questions are split by seed `SPLIT`, which no other study has used. Training is the same
everywhere: LoRA, 12 steps at 5e-4, set once and not tried otherwise."""

import random
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from real import asked, lines, model, pair, polite_rows, said, save
from scenario import Scenario

from prism_select.data.pairing import change_numbers

Row = dict[str, Any]
SPLIT, LONGEST, PAIR_LONGEST = 100, 300, 400
SCORING: Row = {"dtype": "bfloat16", "max_length": 256, "layers": "late"}
TRAINING: Row = {"seeds": 3, "steps": "12", "rate": 5e-4}


def scenarios(data: Path) -> list[Scenario]:
    """Files are written under benchmarks/work."""
    return [make(data, random.Random(SPLIT)) for make in MAKERS.values()]


def scenario(name: str, files: Mapping[str, Sequence[Row]], truth: str, scoring: Row) -> Scenario:
    places = {part: save(f"quality-{name}-{part}.jsonl", rows) for part, rows in files.items()}
    command: Any = "repair" if truth == "is_bad" else "select"
    return Scenario(
        name,
        command,
        model(),
        **places,
        truth=truth,
        scoring={**SCORING, **scoring},
        training=TRAINING,
    )


def short(rows: Sequence[tuple[str, str]], longest: int = LONGEST) -> list[tuple[str, str]]:
    return [row for row in rows if row[1].strip() and len(row[0] + row[1]) <= longest]


def general(data: Path, draw: random.Random, counts: Mapping[str, int]) -> list[Row]:
    """Rows of general instruction sets, none of them wanted."""
    files = {
        "alpaca": ("alpaca_demo.json", ("instruction", "input"), "output"),
        "dolly": ("dolly_5000.jsonl", ("instruction",), "response"),
        "t0": ("t0_pool.jsonl", ("prompt",), "completion"),
    }
    rows = []
    for source, count in counts.items():
        file, question, answer = files[source]
        every = [
            (" ".join(str(r.get(q, "")) for q in question), str(r[answer]))
            for r in lines(data / file)
        ]
        rows += [row(*each, source, is_wanted=False) for each in draw.sample(short(every), count)]
    return rows


def row(question: str, answer: str, source: str, **truth: bool) -> Row:
    return {"prompt": asked(question), "completion": said(answer), "source": source, **truth}


def gsm8k(data: Path, draw: random.Random) -> Scenario:
    solved = [
        (r["prompt"], r["chosen"], r["rejected"]) for r in lines(data / "gsm8k_model_pairs.jsonl")
    ]
    solved = [each for each in solved if len(each[0] + max(each[1:], key=len)) <= PAIR_LONGEST]
    draw.shuffle(solved)
    near = [pair(q, right, change_numbers(right, draw)) for q, right, _ in solved[:70]]
    train = short([(r["question"], r["answer"]) for r in lines(data / "gsm8k_train.jsonl")])
    words = short(
        [
            (f"{r['instruction']} {r['input']}", r["output"])
            for r in lines(data / "math_word_problems.json")
        ]
    )
    math = [row(*each, "gsm8k", is_wanted=True) for each in draw.sample(train, 75)]
    math += [row(*each, "math_word_problems", is_wanted=True) for each in draw.sample(words, 75)]
    pool = math + general(data, draw, {"alpaca": 120, "dolly": 190, "t0": 140})
    draw.shuffle(pool)
    written = [pair(*each) for each in solved[70:100]]
    return scenario(
        "gsm8k",
        {"pool": pool, "target": near[:40], "holdout": near[40:] + written},
        "is_wanted",
        {},
    )


def truthfulqa(data: Path, draw: random.Random) -> Scenario:
    rows = lines(data / "truthfulqa_pairs.jsonl")
    draw.shuffle(rows)
    pairs = [pair(r["prompt"], r["chosen"], r["rejected"]) for r in rows[:140]]
    pool = [
        row(r["prompt"], r[side], r["category"], is_bad=side == "rejected")
        for r in rows[140:290]
        for side in ("chosen", "rejected")
    ]
    files = {"pool": pool, "target": pairs[:80], "holdout": pairs[80:]}
    scoring = {"layers": "all", "curvature": "ekfac", "normalize": "norm"}
    return scenario("truthfulqa", files, "is_bad", scoring)


def polite(data: Path, draw: random.Random) -> Scenario:
    rows = polite_rows(data)
    known = list(dict.fromkeys(each[0] for each in rows))[
        300:
    ]  # others took part in real.py and curvature.py
    draw.shuffle(known)
    parts = [
        [each for each in rows if each[0] in set(known[a:b])]
        for a, b in ((0, 60), (60, 120), (120, 220))
    ]
    target, holdout = ([pair_as_is(*each) for each in part][:60] for part in parts[:2])
    pool = [
        {"prompt": q, "completion": answer, "source": "", "is_bad": bad}
        for q, chosen, rejected in parts[2]
        for answer, bad in ((chosen, False), (rejected, True))
    ]
    scoring = {"layers": "last:6", "curvature": "ekfac"}
    return scenario(
        "polite", {"pool": pool, "target": target, "holdout": holdout}, "is_bad", scoring
    )


def pair_as_is(question: str, chosen: str, rejected: str) -> Row:
    return {"prompt": question, "chosen": chosen, "rejected": rejected}


def quizzes(path: Path) -> list[Row]:
    """Short questions of multiple choice."""
    return [
        r for r in lines(path) if len(r["question"]) <= 150 and max(map(len, r["choices"])) <= 60
    ]


def put(quiz: Row) -> Row:
    """As the model is asked it."""
    return {
        **quiz,
        "question": asked(quiz["question"]),
        "choices": [said(choice) for choice in quiz["choices"]],
    }


def right(quizzes: Sequence[Row], longest: int = LONGEST) -> list[tuple[str, str]]:
    """Short questions with their right answers."""
    return short([(r["question"], r["choices"][r["answer"]]) for r in quizzes], longest)


def arc(data: Path, draw: random.Random) -> Scenario:
    def quiz(name: str) -> list[Row]:
        return [put(each) for each in draw.sample(quizzes(data / name), 40)]

    facts = right(lines(data / "openbookqa_train.jsonl"))
    pool = [row(*each, "openbookqa", is_wanted=True) for each in draw.sample(facts, 200)]
    pool += general(data, draw, {"alpaca": 100, "dolly": 150, "t0": 150})
    draw.shuffle(pool)
    files = {
        "pool": pool,
        "target": quiz("arc_easy_train.jsonl"),
        "holdout": quiz("arc_easy_test.jsonl"),
    }
    return scenario("arc", files, "is_wanted", {"anchor": 0.1})


MAKERS: Mapping[str, Callable[[Path, random.Random], Scenario]] = {
    "gsm8k": gsm8k,
    "truthfulqa": truthfulqa,
    "arc": arc,
    "polite": polite,
}
