"""Is the plan right? `--dry-run`, then the run itself, on three models, in a process each.

    python benchmarks/plans.py        about ten minutes on two quiet cores

A random Llama of 34M numbers, as in cost.py, with all weights in float32, and with the upper half
of its blocks in bfloat16 behind EK-FAC; the bundled model on many short rows. Its tokenizer serves
all three. Rows are random words.

Choices made here: memory is the peak of the whole process, Python and torch included. A run keeps
two directions, that of the score and its chosen half."""

import json
import random
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cost import model_of
from memory import text
from results_file import figure, write
from transformers import AutoTokenizer

from prism_select.demo.story import MODEL

Row = dict[str, Any]
PAIRS, NUMBERS = 40, 34_000_000
SCRIPT = """
import json, sys, torch
from prism_select.api import plan, select
from prism_select.run.config import SelectConfig
from prism_select.scoring.cost_plan import peak_memory
given = json.loads(sys.argv[2])
if sys.argv[1] == "plan":
    print(json.dumps(vars(plan(SelectConfig(**given)))))
else:
    print(json.dumps(select(**given).manifest))
print(peak_memory(torch.device("cpu")))
"""
RUNS: Mapping[str, Row] = {
    "34M, all weights, float32": {"rows": 256, "words": 60, "options": {}},
    "34M, late, bfloat16, EK-FAC": {
        "rows": 512,
        "words": 60,
        "options": {
            "layers": "late",
            "dtype": "bfloat16",
            "curvature": "ekfac",
        },
    },
    "bundled model, 20,000 short rows": {"rows": 20_000, "words": 6, "options": {}},
}


def files(folder: Path, rows: int, words: int) -> dict[str, str]:
    draw = random.Random(0)
    pool = [{"prompt": text(draw, 4), "completion": text(draw, words)} for _ in range(rows)]
    sides = ("chosen", "rejected")
    pairs = [
        {"prompt": text(draw, 4)} | {side: text(draw, words // 2) for side in sides}
        for _ in range(PAIRS)
    ]
    for name, each in (("pool", pool), ("target", pairs)):
        (folder / f"{name}.jsonl").write_text(
            "".join(json.dumps(row) + "\n" for row in each), encoding="utf-8"
        )
    return {name: str(folder / f"{name}.jsonl") for name in ("pool", "target")}


def called(what: str, given: Row) -> list[Any]:
    """What a process of its own printed: the plan or the manifest, and its peak memory in bytes."""
    command = [sys.executable, "-W", "ignore", "-c", SCRIPT, what, json.dumps(given)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return [json.loads(line) for line in done.stdout.splitlines()]


def measured(title: str, model: str, run: Row) -> Row:
    with tempfile.TemporaryDirectory() as name:
        given = {"model": model, "out": f"{name}/run", "budget": "5%", **run["options"]}
        given |= files(Path(name), run["rows"], run["words"])
        planned, _ = called("plan", given)
        manifest, peak = called("select", given)
    actual = manifest["actual"]
    print(title, planned, actual, flush=True)
    return {
        "run": title,
        "planned": planned,
        "actual": actual,
        "timings": manifest["timings"],
        "peak_bytes": peak,
    }


def main() -> None:
    with tempfile.TemporaryDirectory() as name:
        network: Any = model_of().network
        network.save_pretrained(name)
        AutoTokenizer.from_pretrained(MODEL).save_pretrained(name)
        rows = [
            measured(title, name if "34M" in title else str(MODEL), run)
            for title, run in RUNS.items()
        ]
    figures = []
    for row in rows:
        for what, bar in (("seconds", 0.25), ("memory_bytes", 0.2)):
            off = abs(row["planned"][what] / row["actual"][what] - 1)
            figures.append(
                figure(
                    f"{row['run']}: plan of {what.partition('_')[0]}, off by",
                    off,
                    "share",
                    f"≤ {bar}",
                )
            )
    over = (rows[0]["peak_bytes"] - 3 * 4 * NUMBERS) / 1e9
    figures.append(
        figure("34M, all weights: peak memory over model and directions", over, "GB", "≤ 1.5")
    )
    write("plans.json", rows, figures)


if __name__ == "__main__":
    main()
