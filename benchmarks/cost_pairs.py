"""What do the pairs cost, beside scoring a pool? Products of their answers' gradients,
cross-validation, and tuning, as shares of scoring 10,000 rows along one direction.

    make bench-cost        alone: python benchmarks/cost_pairs.py, ten minutes on two quiet cores
                           --long: answers as long as the rows, forty minutes more

The random Llama of cost.py, float32; 80 pairs and rows whose every token is supervised. Choices
made here: rows have 127 tokens, and answers a third of that; a round times each step
once and, before and after, sixteen rows; figures are medians over rounds."""

import argparse
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from cost import LENGTH, batches_of, directions_of, model_of
from results_file import figure, write

from prism_select.core.engines import reverse
from prism_select.core.gains import Slopes
from prism_select.core.layers import Parameters
from prism_select.core.likelihood import Batch
from prism_select.core.target_gradient import Side, weighted_gradient
from prism_select.directions.answer_products import AnswerProducts, answer_products
from prism_select.directions.cross_validation import cross_validate
from prism_select.directions.pair_folds import PairGroups
from prism_select.directions.tuning import tune
from prism_select.directions.way import Way
from prism_select.models.causal_lm import CausalLM
from prism_select.models.layer_selection import select_parameters

PAIRS, POOL, ROWS = 80, 10_000, 16
GROUPS = PairGroups(np.arange(PAIRS))


def side_of(answers: int, length: int, seed: int) -> Side:
    draw = torch.Generator().manual_seed(seed)
    tokens = torch.randint(3, 8192, (answers, length), generator=draw)
    every = torch.ones_like(tokens, dtype=torch.bool)
    size = 512 // length
    batches = [
        Batch(tokens[i : i + size], every[i : i + size], every[i : i + size])
        for i in range(0, answers, size)
    ]
    return Side(batches, list(range(answers)))


def taken(step: Callable[[], Any]) -> tuple[float, Any]:
    start = time.perf_counter()
    found = step()
    return time.perf_counter() - start, found


def steps(model: CausalLM, weights: Parameters, length: int) -> Iterator[tuple[str, float]]:
    """Seconds of each."""
    seconds, products = taken(
        lambda: answer_products(model, weights, side_of(2 * PAIRS, length, 1))
    )
    assert isinstance(products, AnswerProducts)
    yield "products", seconds
    yield "cross-validation", taken(lambda: cross_validate(products, Way(), GROUPS, 0))[0]
    yield "tuning", taken(lambda: tune(products, Way(), (), GROUPS, 0))[0]
    sides = side_of(PAIRS, length, 1), side_of(PAIRS, length, 2)
    slopes, means = Slopes(torch.ones(PAIRS), torch.ones(PAIRS)), torch.zeros(PAIRS)
    yield (
        "direction",
        taken(lambda: weighted_gradient(model, weights, sides, (means, means), slopes))[0],
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--long", action="store_true", help="answers as long as the rows, too")
    chosen = parser.parse_args()
    rounds, lengths = chosen.rounds, [LENGTH // 3, *[LENGTH] * chosen.long]
    model, rows, figures = model_of(), list[dict[str, Any]](), list[dict[str, Any]]()
    for layers in ("all", "late"):
        weights = select_parameters(model.network, layers)
        engine = reverse(model, weights, directions_of(weights, 1))
        batches = batches_of(ROWS)

        def scoring(engine: Any = engine, batches: Any = batches) -> None:
            for batch in batches:
                engine(batch)

        scoring()  # what is made once
        for length in lengths:
            shares = dict[str, list[float]]()
            for _ in range(rounds):
                before, _ = taken(scoring)
                found = dict(steps(model, weights, length))
                after, _ = taken(scoring)
                pool = (before + after) / 2 / ROWS * POOL
                rows.append({"layers": layers, "tokens": length, "pool": pool, **found})
                print(rows[-1], flush=True)
                for name, seconds in found.items():
                    shares.setdefault(name, []).append(seconds / pool)
            added = np.array(shares["products"]) + shares["cross-validation"]
            for name, values, wanted in (
                ("products and cross-validation", added, "≤ 0.05"),
                ("products, cross-validation and tuning", added + shares["tuning"], "≤ 0.05"),
                ("a direction of weighted pairs", np.array(shares["direction"]), ""),
            ):
                line = f"{name}, {layers}, answers of {length} tokens"
                ends = float(values.min()), float(values.max())
                share = float(np.median(values))
                figures.append(figure(line, share, "of scoring 10,000 rows", wanted, ends))
    write("cost_pairs.json", rows, figures)


if __name__ == "__main__":
    main()
