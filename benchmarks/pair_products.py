"""What --curvature pairs costs, what it does to a ranking, and why its products are exact.

    make pair_products DATA=folder        some minutes on one core

Gemma-3-270M (base), bfloat16, the upper half of its blocks. TruthfulQA: 80 pairs, and 120 rows of
other questions with their right or their wrong answer. Products of the pairs' gradients come from
sketches of several sizes, and exactly. Each gives coefficients, a direction, and scores of rows.

Choices made here: damping is the default; the cost of scoring 10,000 rows is that of these rows,
along one direction by `reverse`, times their number."""

import argparse
import random
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from real import asked, lines, model, said
from results_file import figure, write

from prism_select.core.engines import ENGINES, Engine
from prism_select.core.gains import Slopes, slopes
from prism_select.core.likelihood import Batch
from prism_select.core.statistics import auroc
from prism_select.core.target_gradient import target_gradient, weighted_gradient
from prism_select.data.batches import collate, plan_batches
from prism_select.data.encoding import Encoded, Encoder
from prism_select.data.records import Example, Turn
from prism_select.directions import gradient_sketch
from prism_select.directions.from_pairs import as_side
from prism_select.directions.gradient_sketch import Sketcher
from prism_select.directions.pair_curvature import pair_coefficients
from prism_select.directions.pair_products import pair_products
from prism_select.models.layer_selection import select_parameters
from prism_select.models.loading import load

PAIRS, ROWS, SEED, DAMPING, POOL = 80, 120, 7, 0.1, 10_000
WIDTHS = [2**16, 2**18, 2**20]  # numbers of a pair's sketch


def encoded(encoder: Encoder, question: str, answer: str) -> Encoded:
    turns = (Turn("user", asked(question)), Turn("assistant", said(answer)))
    return encoder.encode(Example(turns, "", "", "", 0, 1))


def timed(engine: Engine, batch: Batch) -> float:
    start = time.perf_counter()
    engine(batch)
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True)
    questions = lines(parser.parse_args().data / "truthfulqa_pairs.jsonl")
    random.Random(SEED).shuffle(questions)
    lm, tokenizer = load(str(model()), "bfloat16", torch.device("cpu"))
    encoder = Encoder(tokenizer, "plain", 256, lm.vocabulary)
    pairs, others = questions[:PAIRS], questions[PAIRS : PAIRS + ROWS]
    chosen = [encoded(encoder, q["prompt"], q["chosen"]) for q in pairs]
    rejected = [encoded(encoder, q["prompt"], q["rejected"]) for q in pairs]
    labels = np.arange(ROWS) % 2 == 0
    rows = [
        encoded(encoder, q["prompt"], q["chosen" if right else "rejected"])
        for q, right in zip(others, labels, strict=True)
    ]
    weights = select_parameters(lm.network, "late")
    sides = as_side(chosen, 512, lm.device), as_side(rejected, 512, lm.device)
    products: dict[str, Any] = {}
    seconds: dict[str, float] = {}
    target: Any = None
    for width in WIDTHS:
        gradient_sketch.LONGEST, gradient_sketch.NUMBERS = width, 2**28
        start = time.perf_counter()
        sketcher = Sketcher(lm.network, weights, PAIRS, 0)
        with sketcher.open() as observe:
            target = target_gradient(lm, weights, sides, "prism", 0.0, observe)
        halves = [sketcher.sketches[side].double() for side in ("chosen", "rejected")]
        differences = PAIRS * (halves[0] - halves[1]) / target.weight[:, None]
        products[f"{width}"] = differences @ differences.T
        seconds[f"{width}"] = time.perf_counter() - start
        print(f"sketches of {width} numbers: {seconds[f'{width}']:.0f} s", flush=True)
    means = target.mean_loglik_chosen, target.mean_loglik_rejected
    slope = slopes("prism", *means)
    start = time.perf_counter()
    products["exact"] = pair_products(lm, weights, sides, (slope.rejected / slope.chosen).tolist())
    seconds["exact"] = time.perf_counter() - start
    print(f"exact products: {seconds['exact']:.0f} s", flush=True)
    directions = [target.direction]
    for values in products.values():
        alpha = PAIRS * pair_coefficients(values, target.weight, DAMPING)
        start = time.perf_counter()
        divided = weighted_gradient(lm, weights, sides, means, Slopes(alpha, alpha))
        again = time.perf_counter() - start
        directions.append(divided.direction)
    batches = plan_batches([len(row.tokens) for row in rows], 512)
    scores = np.zeros((ROWS, len(directions)))
    score = ENGINES["reverse"](lm, weights, directions)
    for batch in batches:
        scores[batch] = score(collate([rows[i] for i in batch])).values.double().numpy()
    single = ENGINES["reverse"](lm, weights, directions[-1:])
    pool = POOL / ROWS * sum(timed(single, collate([rows[i] for i in b])) for b in batches)
    names = ["first order", *products]
    results: list[dict[str, Any]] = [
        {
            "products": name,
            "auroc": auroc(scores[:, k], labels),
            "correlation": float(np.corrcoef(scores[:, k], scores[:, -1])[0, 1]),
            "seconds": seconds.get(name),
        }
        for k, name in enumerate(names)
    ]
    figures = [
        figure(f"correlation of scores, sketches of {w} numbers", float(r["correlation"]), "", "")
        for w, r in zip(WIDTHS, results[1:], strict=False)
    ]
    figures += [
        figure("AUROC, first order", results[0]["auroc"], "", ""),
        figure("AUROC, pairs' curvature", results[-1]["auroc"], "", ""),
        figure(
            "products and second pass, share of scoring 10,000 rows",
            (seconds["exact"] + again) / pool,
            "",
            "≤ 0.05",
        ),
    ]
    write("pair_products.json", results, figures)


if __name__ == "__main__":
    main()
