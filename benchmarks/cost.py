"""What does a score cost? In forwards: one pass over the same rows without a graph, for their
log-likelihood alone.

    make bench-cost        about twenty minutes on two quiet cores; alone: python benchmarks/cost.py

A random Llama of 34M numbers (8 blocks, width 512, vocabulary 8,192), float32, all weights counted,
rows of 127 tokens that are all supervised. Choices made here: the ways take turns, round by round,
so that a slow minute slows them all; figures are medians over rounds of the ratio to the same
round's forward, and their intervals go from least to most. Beside bergson 2.5.1 and kronfluence
1.0.1 each way runs in a process of its own (cost_sides.py), on more rows, since a peer does much
once a call, and the rank correlation of each is with the definition, over the weights that it
counts: kronfluence all linear layers, bergson those but the head."""

import argparse
import copy
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from cost_sides import ours, rows_a_batch
from results_file import figure, write
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from prism_select.core.engines import difference, forward, reference, reverse
from prism_select.core.layers import Direction, Parameters
from prism_select.core.likelihood import Batch, token_logliks
from prism_select.core.statistics import rank_correlation
from prism_select.demo.story import MODEL
from prism_select.directions.low_rank import factor
from prism_select.models.causal_lm import CausalLM
from prism_select.models.layer_selection import select_parameters
from prism_select.scoring.gradient_norms import with_norms

HERE = Path(__file__).parent
PEERS = HERE / "work" / "peers" / "bin" / "python"
LENGTH = 127
WANTED = {"difference, one direction": "≤ 2.1", "difference, one direction, late": "≤ 1.6"}
WANTED |= {"reverse, one direction": "≤ 2.4"}
SIDES = (
    "forward all",
    "difference all",
    "difference late",
    "reverse all",
    "reference all",
)  # the last: one by one
HALF = "reverse, one direction, bfloat16"
BLOCKS, HEAD = r"layers\.\d+\.(self_attn|mlp)", r"|lm_head"


def model_of() -> CausalLM:
    torch.manual_seed(0)
    size = {
        "hidden_size": 512,
        "intermediate_size": 1408,
        "num_hidden_layers": 8,
        "num_attention_heads": 8,
    }
    return CausalLM(LlamaForCausalLM(LlamaConfig(vocab_size=8192, **size)))


def batches_of(rows: int, size: int = 4) -> list[Batch]:
    tokens = torch.randint(3, 8192, (rows, LENGTH), generator=torch.Generator().manual_seed(0))
    every = torch.ones_like(tokens, dtype=torch.bool)
    return [Batch(tokens, every, every).rows(slice(i, i + size)) for i in range(0, rows, size)]


def directions_of(weights: Parameters, count: int) -> list[Direction]:
    draw = torch.Generator().manual_seed(1)
    return [
        {name: torch.randn(w.shape, generator=draw) for name, w in weights.items()}
        for _ in range(count)
    ]


def ways_of(model: CausalLM) -> Mapping[str, Callable[[Batch], object]]:
    weights = select_parameters(model.network, "all")
    many = directions_of(weights, 11)
    late = select_parameters(model.network, "late")
    late_two = directions_of(late, 2)
    half = CausalLM(copy.deepcopy(model.network).bfloat16())
    narrow = select_parameters(half.network, "all")
    low = [factor(model.network, direction, 16).direction for direction in many[:2]]

    @torch.no_grad()
    def alone(batch: Batch) -> object:
        return token_logliks(model, batch)

    return {
        "forward": alone,
        "reverse, one direction": reverse(model, weights, many[:1]),
        HALF: reverse(half, narrow, many[:1]),
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


def agreements(
    model: CausalLM, ways: Mapping[str, Callable[[Batch], object]], batch: Batch
) -> list[dict[str, Any]]:
    """Rank correlations with the definition, over the rows of a batch."""
    found = []
    for layers in ("all", "late"):
        weights = select_parameters(model.network, layers)
        exact = reference(model, weights, directions_of(weights, 1))(batch).values[:, 0].numpy()
        for engine in ("reverse", "difference"):
            name = f"{engine}, one direction" + (", late" if layers == "late" else "")
            if name in ways:
                fast: Any = ways[name](batch)
                rho = rank_correlation(fast.values[:, 0].numpy(), exact)
                found.append(
                    figure(f"{name}: rank correlation with the definition", rho, "ρ", "≥ 0.999")
                )
        if layers == "all":
            rough: Any = ways[HALF](batch)
            rho = rank_correlation(rough.values[:, 0].numpy(), exact)
            found.append(
                figure(f"{HALF}: rank correlation with the definition", rho, "ρ", "≥ 0.99")
            )
    return found


class Side:
    """A way of scoring in a process of its own."""

    def __init__(self, way: str, folder: Path) -> None:
        self.way, python = way, PEERS if way in ("bergson", "kronfluence") else Path(sys.executable)
        command = [str(python), "-W", "ignore", str(HERE / "cost_sides.py"), way, str(folder)]
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(
            command, stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL, text=True
        )
        assert self._line() == "ready"

    def _line(self) -> str:
        assert self.process.stdout
        line = self.process.stdout.readline().strip()
        if not line:
            raise RuntimeError(f"{self.way}: its process ended")
        return line

    def seconds(self) -> float:
        assert self.process.stdin
        print(file=self.process.stdin, flush=True)
        return float(self._line())

    def end(self) -> dict[str, Any]:
        assert self.process.stdin
        self.process.stdin.close()
        return dict(json.loads(self._line()))


def beside_peers(
    network: Any, count: int, rounds: int
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Rows and figures of every way beside the peers', round by round."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        network.save_pretrained(folder)
        AutoTokenizer.from_pretrained(MODEL, model_max_length=2048).save_pretrained(
            folder
        )  # bergson wants one
        rows = torch.cat([batch.tokens for batch in batches_of(count + 1)]).tolist()
        (folder / "rows.json").write_text(json.dumps(rows), encoding="utf-8")
        exact = {
            layers: ours(f"reference {layers}", folder, rows)()[1]
            for layers in ("all", "late", BLOCKS, BLOCKS + HEAD)
        }
        sides = [Side(way, folder) for way in (*SIDES, "bergson", "kronfluence")]
        took = {side.way: list[float]() for side in sides}
        for _ in range(rounds):
            for side in sides:
                took[side.way].append(side.seconds())
        ends = {side.way: side.end() for side in sides}
    counted = {"bergson": BLOCKS, "kronfluence": BLOCKS + HEAD, "difference late": "late"}
    ratios = {
        way: np.array(seconds) / np.array(took["forward all"]) for way, seconds in took.items()
    }
    found = [
        {"way": way, "rows": count, "seconds": took[way], "peak_bytes": ends[way]["peak_bytes"]}
        for way in took
    ]
    figures = []
    for way, ratio in ratios.items():
        span = float(ratio.min()), float(ratio.max())
        figures.append(
            figure(f"beside peers: {way}", float(np.median(ratio)), "forwards", "", span)
        )
        figures.append(
            figure(f"beside peers: {way}, peak memory", ends[way]["peak_bytes"] / 1e9, "GB", "")
        )
        if not way.startswith("forward"):
            rho = abs(
                rank_correlation(
                    np.array(ends[way]["scores"]), np.array(exact[counted.get(way, "all")])
                )
            )
            bar = "≥ 0.999" if way in SIDES else ""
            figures.append(
                figure(f"beside peers: {way}, rank correlation with the definition", rho, "ρ", bar)
            )
    for peer, bars in (("bergson", ("≥ 1.6", "≥ 2")), ("kronfluence", ("≥ 1.45", "≥ 2"))):
        for way, bar in zip(("difference all", "difference late"), bars, strict=True):
            ratio = ratios[peer] / ratios[way]
            span = float(ratio.min()), float(ratio.max())
            figures.append(
                figure(f"{peer} over {way}", float(np.median(ratio)), "times the cost", bar, span)
            )
        ratio = ends[peer]["peak_bytes"] / ends["difference all"]["peak_bytes"]
        figures.append(figure(f"{peer} over difference all, peak memory", ratio, "times", "≥ 1"))
    return found, figures


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--only", default="", help="peers: leave out what has no peer")
    parser.add_argument("--peer-rows", type=int, default=96)
    parser.add_argument("--rounds", type=int, default=5)
    chosen = parser.parse_args()
    model, batches = model_of(), {size: batches_of(chosen.rows, size) for size in (4, 16)}
    if PEERS.exists():
        write("cost_peers.json", *beside_peers(model.network, chosen.peer_rows, chosen.rounds))
    if chosen.only == "peers":
        return
    ways = ways_of(model)
    for way in ways.values():
        way(batches[4][0])  # what is made once
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(chosen.rounds):
        for name, way in ways.items():
            start = time.perf_counter()
            for batch in batches[rows_a_batch(name)]:
                way(batch)
            seconds[name].append(time.perf_counter() - start)
    ratios = {
        name: np.array(found) / np.array(seconds["forward"]) for name, found in seconds.items()
    }
    figures = [
        figure(
            name,
            float(np.median(found)),
            "forwards",
            WANTED.get(name, ""),
            (float(found.min()), float(found.max())),
        )
        for name, found in ratios.items()
    ]
    faster = ratios["reverse, one direction"] / ratios[HALF]
    ends = float(faster.min()), float(faster.max())
    figures.append(
        figure(
            "float32 over bfloat16, reverse",
            float(np.median(faster)),
            "times the cost",
            "≥ 1.8",
            ends,
        )
    )
    further = (ratios["reverse, ten targets"] - ratios["reverse, two targets"]) / 8
    figures += agreements(model, ways, batches[4][0])
    ends = float(further.min()), float(further.max())
    figures.append(figure("each further target", float(np.median(further)), "forwards", "", ends))
    rows = [{"way": name, "rows": chosen.rows, "seconds": found} for name, found in seconds.items()]
    write("cost.json", rows, figures)


if __name__ == "__main__":
    main()
