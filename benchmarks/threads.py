"""How should threads wait? Scoring alone, and beside a process that keeps one core busy.

    python benchmarks/threads.py             about four minutes
    python benchmarks/threads.py --quick     about two: fewer seconds for each figure

Each setting is a process of its own, since OpenMP reads its environment once: torch's default, in
which a thread that waits spins 300,000 times before it sleeps; a tenth and a hundredth of that;
passive waiting, with no spin; one thread. A neighbour is a Python process that counts. A process
scores batches of random tokens with three random Llamas through `reverse`, each for some seconds,
and the mean time of a row counts.

Choices made here:
- torch's wheels for Linux bring GNU's OpenMP (libgomp): KMP_BLOCKTIME is of another one, and
  GOMP_SPINCOUNT is what it has in its place;
- `busy` is the load of the machine before a process starts: a figure is to be trusted where the
  load of `alone` is near 0."""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from results_file import figure, write

Row = dict[str, Any]
SETTINGS: Mapping[str, Mapping[str, str]] = {
    "default": {},
    "passive": {"OMP_WAIT_POLICY": "passive"},
    "30,000 spins": {"GOMP_SPINCOUNT": "30000"},
    "3,000 spins": {"GOMP_SPINCOUNT": "3000"},
    "one thread": {"OMP_NUM_THREADS": "1"},
}
# hidden size, blocks, vocabulary; a batch is 4 rows of 64 tokens
MODELS: Mapping[str, tuple[int, int, int]] = {
    "0.3M": (64, 4, 1024),
    "5M": (256, 6, 4096),
    "34M": (512, 8, 8192),
}
SCRIPT = """
import json, sys, time
import torch
from transformers import LlamaConfig, LlamaForCausalLM
from prism_select.core.engines import reverse
from prism_select.core.likelihood import Batch
from prism_select.models.causal_lm import CausalLM
from prism_select.models.layer_selection import select_parameters

models, seconds = json.loads(sys.argv[1]), float(sys.argv[2])
for name, (width, blocks, vocabulary) in models.items():
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=vocabulary, hidden_size=width, num_attention_heads=8,
                         intermediate_size=11 * width // 4, num_hidden_layers=blocks)
    model = CausalLM(LlamaForCausalLM(config))
    weights = select_parameters(model.network, "all")
    engine = reverse(model, weights, [{n: torch.randn(w.shape) for n, w in weights.items()}] * 2)
    tokens = torch.randint(3, vocabulary, (4, 64))
    real = torch.ones_like(tokens, dtype=torch.bool)
    batch = Batch(tokens, real, real)
    engine(batch)
    start, rows = time.perf_counter(), 0
    while (elapsed := time.perf_counter() - start) < seconds:
        engine(batch)
        rows += 4
    print(json.dumps([name, elapsed / rows]), flush=True)
"""


@contextmanager
def neighbour(present: bool) -> Iterator[None]:
    """A process that keeps one core busy."""
    process = subprocess.Popen([sys.executable, "-c", "while True: pass"]) if present else None
    try:
        yield
    finally:
        if process:
            process.kill()
            process.wait()


def measure(setting: str, beside: bool, seconds: float) -> list[Row]:
    """Seconds of a row, for each model."""
    clean = {n: v for n, v in os.environ.items() if not n.startswith(("OMP_", "GOMP_", "KMP_"))}
    words = [sys.executable, "-W", "ignore", "-c", SCRIPT, json.dumps(MODELS), str(seconds)]
    busy = os.getloadavg()[0]
    with neighbour(beside):
        output = subprocess.run(
            words, env={**clean, **SETTINGS[setting]}, capture_output=True, text=True, check=True
        ).stdout
    return [
        {
            "model": name,
            "setting": setting,
            "beside": "a busy process" if beside else "nothing",
            "seconds": of_a_row,
            "busy": busy,
        }
        for name, of_a_row in map(json.loads, output.splitlines())
    ]


def figures_of(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Each setting's time over the default's alone."""
    alone = {
        r["model"]: r["seconds"]
        for r in rows
        if r["setting"] == "default" and r["beside"] == "nothing"
    }
    figures = []
    for row in rows:
        where = "alone" if row["beside"] == "nothing" else "beside a busy process"
        name = f"{row['model']}, {row['setting']}, {where}"
        figures.append(figure(name, row["seconds"] / alone[row["model"]], "times", ""))
    loads = [row["busy"] for row in rows if row["beside"] == "nothing"]
    return [*figures, figure("load of the machine before", max(loads), "processes", "")]


def main() -> None:
    parser = argparse.ArgumentParser(description="How should threads wait?")
    parser.add_argument("--quick", action="store_true", help="fewer seconds for each figure")
    seconds = 1.5 if parser.parse_args().quick else 5.0
    rows, started = list[Row](), time.perf_counter()
    for beside in (False, True):
        for setting in SETTINGS:
            rows += measure(setting, beside, seconds)
            where = "beside a busy process" if beside else "alone"
            print(f"{setting}, {where}: after {time.perf_counter() - started:.0f} s")
    write("threads.json", rows, figures_of(rows))


if __name__ == "__main__":
    main()
