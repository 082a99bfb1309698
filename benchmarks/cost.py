"""What does a score cost? In forwards: one pass over the same rows without a graph, for their log-likelihood alone.

    python benchmarks/cost.py        about five minutes on two quiet cores

A random Llama of 34M numbers (8 blocks, width 512, vocabulary 8,192), float32, all weights counted, rows of 127 tokens
that are all supervised. Choices made here: the ways take turns, round by round, so that a slow minute slows them all;
figures are medians over rounds of the ratio to the same round's forward, and their intervals go from least to most.
"""

import argparse
import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from results_file import figure, write
from transformers import LlamaConfig, LlamaForCausalLM

from prism_select.core.engines import difference, forward, reference, reverse
from prism_select.core.layers import Direction, Weights
from prism_select.core.likelihood import Batch, token_logliks
from prism_select.lowrank import factor
from prism_select.models import CausalLM
from prism_select.norms import with_norms
from prism_select.statistics import rank_correlation
from prism_select.weights import select_weights

LENGTH, ROWS_A_BATCH = 127, 32  # the default batch of 4,096 tokens
WANTED = {"difference, one direction": "≤ 2.1", "difference, one direction, late": "≤ 1.6"}


def model_of() -> CausalLM:
    torch.manual_seed(0)
    size = {"hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 8, "num_attention_heads": 8}
    return CausalLM(LlamaForCausalLM(LlamaConfig(vocab_size=8192, **size)))


def batches_of(rows: int) -> list[Batch]:
    tokens = torch.randint(3, 8192, (rows, LENGTH), generator=torch.Generator().manual_seed(0))
    every = torch.ones_like(tokens, dtype=torch.bool)
    return [Batch(tokens, every, every).rows(slice(i, i + ROWS_A_BATCH)) for i in range(0, rows, ROWS_A_BATCH)]


def directions_of(weights: Weights, count: int) -> list[Direction]:
    draw = torch.Generator().manual_seed(1)
    return [{name: torch.randn(w.shape, generator=draw) for name, w in weights.items()} for _ in range(count)]


def ways_of(model: CausalLM) -> Mapping[str, Callable[[Batch], object]]:
    weights = select_weights(model.network, "all")
    many = directions_of(weights, 11)
    late = select_weights(model.network, "late")
    late_two = directions_of(late, 2)
    low = [factor(model.network, direction, 16).direction for direction in many[:2]]

    @torch.no_grad()
    def alone(batch: Batch) -> object:
        return token_logliks(model, batch)

    return {
        "forward": alone,
        "reverse, one direction": reverse(model, weights, many[:1]),
        "reverse, one target (score and chosen half)": reverse(model, weights, many[:2]),
        "reverse, two targets": reverse(model, weights, many[:3]),
        "reverse, ten targets": reverse(model, weights, many),
        "reverse, one direction, rank 16": reverse(model, weights, low[:1]),
        "reverse, one target, rank 16": reverse(model, weights, low),
        "reverse, one target, late": reverse(model, late, late_two),
        "reverse, one target, norms": with_norms(model, weights, many[:2]),
        "forward engine, one direction": forward(model, weights, many[:1]),
        "difference, one direction": difference(model, weights, many[:1]),
        "difference, one direction, late": difference(model, late, late_two[:1]),
    }


def agreements(model: CausalLM, ways: Mapping[str, Callable[[Batch], object]], batch: Batch) -> list[dict[str, Any]]:
    """Rank correlations with the definition, over the rows of a batch."""
    found = []
    for layers in ("all", "late"):
        weights = select_weights(model.network, layers)
        exact = reference(model, weights, directions_of(weights, 1))(batch).values[:, 0].numpy()
        for engine in ("reverse", "difference"):
            name = f"{engine}, one direction" + (", late" if layers == "late" else "")
            if name in ways:
                fast: Any = ways[name](batch)
                rho = rank_correlation(fast.values[:, 0].numpy(), exact)
                found.append(figure(f"{name}: rank correlation with the definition", rho, "ρ", "≥ 0.999"))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=5)
    chosen = parser.parse_args()
    model, batches = model_of(), batches_of(chosen.rows)
    ways = ways_of(model)
    for way in ways.values():
        way(batches[0])  # what is made once
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(chosen.rounds):
        for name, way in ways.items():
            start = time.perf_counter()
            for batch in batches:
                way(batch)
            seconds[name].append(time.perf_counter() - start)
    ratios = {name: np.array(found) / np.array(seconds["forward"]) for name, found in seconds.items()}
    figures = [
        figure(
            name, float(np.median(found)), "forwards", WANTED.get(name, ""), (float(found.min()), float(found.max()))
        )
        for name, found in ratios.items()
    ]
    further = (ratios["reverse, ten targets"] - ratios["reverse, two targets"]) / 8
    figures += agreements(model, ways, batches[0])
    ends = float(further.min()), float(further.max())
    figures.append(figure("each further target", float(np.median(further)), "forwards", "", ends))
    write("cost.json", [{"way": name, "seconds": found} for name, found in seconds.items()], figures)


if __name__ == "__main__":
    main()
