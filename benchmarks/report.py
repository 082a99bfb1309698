"""The report of a million rows: how long it takes to build, how large it is, and how long a browser
takes to open it.

    python benchmarks/report.py [--rows 1000000] [--repeats 3]

The run folder is made up: scores of four sources, texts of 20 to 120 words, and a direction of the
demo model's size. A build is the whole command `prism report`, from start to end; a page is open
when all of its charts are drawn."""

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from playwright.sync_api import sync_playwright
from results_file import figure, write
from safetensors.numpy import save_file

from prism_select.run.config import SelectConfig

SOURCES = ("web", "books", "chat", "code")
WORDS = (
    "the",
    "a",
    "of",
    "water",
    "stone",
    "reads",
    "quickly",
    "under",
    "seven",
    "because",
    "answers",
    "Paris",
    "number",
)
GROUP = 2048  # rows that a run writes together
FLAGS = (
    "--no-sandbox",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--repeats", type=int, default=3)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        run = made(Path(folder), asked.rows)
        builds = [built(run) for _ in range(asked.repeats)]
        opened = opens(run / "report.html", asked.repeats)
        size = (run / "report.html").stat().st_size / 1e6
        pool = (Path(folder) / "pool.jsonl").stat().st_size / 1e6
    rows: list[dict[str, Any]] = [
        {
            "rows": asked.rows,
            "pool_mb": pool,
            "build_seconds": builds,
            "open_seconds": opened,
            "page_mb": size,
        }
    ]
    million = asked.rows == 1_000_000
    figures = [
        figure(
            "report of a million rows: time to build",
            median(builds),
            "s",
            "≤ 10" if million else "",
        ),
        figure("report of a million rows: size", size, "MB", "≤ 15" if million else ""),
        figure(
            "report of a million rows: time to open", median(opened), "s", "≤ 3" if million else ""
        ),
    ]
    write("report.json", rows, figures)


def made(folder: Path, count: int) -> Path:
    """A run folder of so many rows, of which 5% were selected, and the pool that it speaks of."""
    draw = np.random.default_rng(0)
    run, pool = folder / "run", folder / "pool.jsonl"
    run.mkdir()
    texts = [" ".join(draw.choice(WORDS, size)) for size in draw.integers(20, 120, 1000)]
    with pool.open("w", encoding="utf-8") as file:
        for row in range(count):
            told = {"prompt": texts[row % 997], "completion": texts[row % 991], "id": f"row-{row}"}
            file.write(json.dumps(told | {"source": SOURCES[row % 4]}) + "\n")
    target = folder / "pairs.jsonl"
    pairs = [{"prompt": f"Question {i}?", "chosen": "yes", "rejected": "no"} for i in range(400)]
    target.write_text("".join(json.dumps(pair) + "\n" for pair in pairs), encoding="utf-8")
    score, chosen = draw.standard_t(3, count), draw.normal(size=count)
    score += 0.2 * (np.arange(count) % 4)
    taken = score >= np.sort(score)[-count // 20]
    table = {
        "row": np.arange(count),
        "id": [f"row-{row}" for row in range(count)],
        "source": [SOURCES[row % 4] for row in range(count)],
        "file": pa.array([str(pool)]).take(pa.array(np.zeros(count, dtype=np.int64))),
        "line": np.arange(1, count + 1),
        "score": score,
        "score_per_token": score / 60,
        "tokens": np.full(count, 60, dtype=np.int32),
        "length": np.full(count, 120, dtype=np.int32),
        "loglik": draw.normal(-90, 9, count),
        "score_chosen": chosen,
        "score_rejected": chosen - score,
        "truncated": np.zeros(count, dtype=bool),
        "verdict": np.where(taken, "selected", "over budget"),
    }
    pq.write_table(pa.table(table), run / "scores.parquet", row_group_size=GROUP)
    rest(
        run,
        SelectConfig(model="m", pool=str(pool), target=str(target), out=str(run)),
        count,
        int(taken.sum()),
        draw,
    )
    return run


def rest(
    run: Path, config: SelectConfig, count: int, taken: int, draw: np.random.Generator
) -> None:
    gap = draw.normal(size=400)
    pairs = {
        "target": ["pairs"] * 400,
        "prompt": [f"Question {i}?" for i in range(400)],
        "loglik_chosen": gap - 2,
        "loglik_rejected": np.full(400, -2.0),
        "gap": gap,
        "weight": 1 / (1 + np.exp(-gap)),
        "share": draw.dirichlet(np.ones(400)),
        "line": range(1, 401),
    }
    pq.write_table(pa.table(pairs), run / "pairs.parquet")
    weights = {
        f"model.layers.{i}.mlp.up_proj.weight": draw.normal(size=(384, 128)) for i in range(24)
    }
    save_file(weights, run / "direction.safetensors")
    manifest = {
        "prism_version": "0",
        "versions": {},
        "command": "select",
        "config": asdict(config),
        "fingerprints": {"pool": "p", "target": "t", "model": "m"},
        "model": {
            "architecture": "made up",
            "device": "cpu",
            "template": "plain",
            "counted_weights": list(weights),
        },
        "score": {"definition": "made up", "sign": "made up", "unit": "made up", "swapped": False},
        "target": {
            "pairs": 400,
            "mean_preference": 0.5,
            "effective_pairs": 350.0,
            "common_part": 1.0,
            "split_half_agreement": 0.6,
            "agreement_by_pairs": {"200": 0.6, "100": 0.4, "50": 0.2},
            "pairs_for_half_agreement": 270,
            "preferred_share": 0.5,
            "chosen_longer_share": 0.5,
            "pairs_for_half_of_direction": 90,
        },
        "curvature": {"name": "flat"},
        "engine": {
            "name": "reverse",
            "reason": "made up",
            "dtype": "float32",
            "check": {"rows": 8, "disagreement": 0.0, "tolerance": 1e-3},
        },
        "counts": {
            "read": count,
            "truncated": 0,
            "selected": taken,
            "over budget": count - taken,
            "quarantined": 0,
            "scored": count,
        },
        "choice": {"sources": {}, "rank_correlation_with_tokens": {"none": 0.0, "tokens": 0.0}},
        "padding": 0.0,
        "timings": {"total": 0.0},
        "plan": {"seconds": 0.0, "memory_bytes": 0, "tokens": 0},
        "actual": {"seconds": 0.0, "memory_bytes": 0, "tokens": 0},
        "warnings": [],
    }
    (run / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")


def built(run: Path) -> float:
    """Seconds of the command."""
    started = time.perf_counter()
    subprocess.run(
        [sys.executable, "-m", "prism_select", "report", str(run)], check=True, capture_output=True
    )
    return time.perf_counter() - started


def opens(page: Path, repeats: int) -> Sequence[float]:
    """Seconds until everything is drawn, in a browser that is already running, without its
    cache."""
    found = []
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=shutil.which("chromium"), args=list(FLAGS)
        )
        for _ in range(repeats):
            context = browser.new_context(offline=True)
            shown = context.new_page()
            started = time.perf_counter()
            shown.goto(f"file://{page}")
            shown.wait_for_selector("body[data-ready=all]")
            found.append(time.perf_counter() - started)
            context.close()
        browser.close()
    return found


if __name__ == "__main__":
    main()
