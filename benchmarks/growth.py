"""How does the cost of a run grow? With the rows of the pool, the tokens of a row, the numbers of
the model.

    python benchmarks/growth.py        about ten minutes on two quiet cores

Rows: whole runs on the bundled model, short rows. Tokens and numbers: the engine alone, on random
Llamas in float32, two directions as in a run. Choices made here: an exponent is the slope of a line
through the logarithms of seconds and size, of the last three sizes, since a run's fixed seconds
flatten the first; each point of the engine is the least of three."""

import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from cost import directions_of
from plans import files
from results_file import figure, write
from transformers import LlamaConfig, LlamaForCausalLM

import prism_select
from prism_select.core.engines import reverse
from prism_select.core.likelihood import Batch
from prism_select.demo.story import MODEL
from prism_select.models.causal_lm import CausalLM
from prism_select.models.layer_selection import select_parameters

Row = dict[str, Any]
ROWS, LENGTHS, WIDTHS = (
    (1_000, 4_000, 16_000, 64_000),
    (64, 128, 256, 512, 1024),
    (128, 256, 512, 1024),
)
TOKENS = 2_048


def whole_run(rows: int) -> float:
    with tempfile.TemporaryDirectory() as name:
        given: Row = files(Path(name), rows, 6)
        run = prism_select.select(model=str(MODEL), out=f"{name}/run", budget="5%", **given)
        return float(run.manifest["timings"]["total"])


def engine_alone(width: int, length: int) -> tuple[float, int]:
    """Seconds for `TOKENS` tokens, and the numbers of the model."""
    torch.manual_seed(0)
    size = {
        "hidden_size": width,
        "intermediate_size": 3 * width,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
    }
    model = CausalLM(LlamaForCausalLM(LlamaConfig(vocab_size=4096, **size)))
    weights = select_parameters(model.network, "all")
    engine = reverse(model, weights, directions_of(weights, 2))
    tokens = torch.randint(
        3, 4096, (TOKENS // length, length), generator=torch.Generator().manual_seed(0)
    )
    every = torch.ones_like(tokens, dtype=torch.bool)
    batch, took = Batch(tokens, every, every), []
    for _ in range(4):
        start = time.perf_counter()
        engine(batch)
        took.append(time.perf_counter() - start)
    return min(took[1:]), sum(weight.numel() for weight in weights.values())


def exponent(sizes: Sequence[float], seconds: Sequence[float]) -> float:
    return float(np.polyfit(np.log(sizes[-3:]), np.log(seconds[-3:]), 1)[0])


def main() -> None:
    found: dict[str, list[tuple[float, float]]] = {
        "rows of the pool": [(rows, whole_run(rows)) for rows in ROWS]
    }
    found["tokens of a row"] = [(length, engine_alone(256, length)[0]) for length in LENGTHS]
    wide = [engine_alone(width, 128) for width in WIDTHS]
    found["numbers of the model"] = [(numbers, seconds) for seconds, numbers in wide]
    rows = [
        {"of": of, "size": size, "seconds": seconds}
        for of, points in found.items()
        for size, seconds in points
    ]
    figures = []
    for of, points in found.items():
        slope = exponent(*zip(*points, strict=True))
        what = "a run" if of.startswith("rows") else "scoring as many tokens"
        figures.append(figure(f"{what}: seconds grow with {of} to the power of", slope, "", ""))
    write("growth.json", rows, figures)


if __name__ == "__main__":
    main()
