"""What does a whole run cost, as a user gives it? `prism score`, `prism select`, by the manifest.

    python benchmarks/cost_runs.py        twenty minutes on two quiet cores

A random Llama of 34M numbers as in cost.py, float32, and the bundled model; rows are random words,
the pairs 40. Default runs of 1,200 rows, along one direction: seconds of the pass over all rows, in
forward passes over the same rows in the same batches. Then what serving eight groups of pairs adds
to a choice of 5%, by the engine `difference` (directions in full) and `reverse` (rank 64); the
groups of random words are random too, so the second stage grows to the most that it may take.

Choices made here: each run and each forward pass is a process of its own and they take turns,
round by round; the seconds of groups are all that follows the pass, worker, engine and choices
between its rounds included; medians, from least to most. Memory is the peak of the process beside
that of the same run with `--groups 1`."""

import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from cost import model_of
from plans import files
from results_file import figure, write
from transformers import AutoTokenizer

from prism_select.demo.story import MODEL

Row = dict[str, Any]
SCRIPT = """
import json, sys, prism_select
print(json.dumps(dict(prism_select.{}(**json.loads(sys.argv[1])).manifest)))
"""
FORWARD = """
import json, sys, time, torch
from prism_select.commands.read_inputs import read_inputs
from prism_select.core.engines import Scores
from prism_select.core.likelihood import token_logliks
from prism_select.data.records import Example
from prism_select.models.loading import load_model
from prism_select.run.config import ScoreConfig
from prism_select.run.progress import Silent
from prism_select.scoring.batched_engine import BatchedEngine, score_rows
config = ScoreConfig(**json.loads(sys.argv[1]))
inputs = read_inputs(config, Silent())
loaded = load_model(config, "all", Silent())
rows = [loaded.encoder.encode(row) for _, row in inputs.pool.rows() if isinstance(row, Example)]
tokens = config.tokens_on("cpu", loaded.model.size, graph=False)

@torch.no_grad()
def alone(batch):
    loglik = token_logliks(loaded.model, batch).sum(1)
    return Scores(loglik, loglik[:, None]), None

score_rows(BatchedEngine(alone, tokens), rows[:20], loaded.model.device)
start = time.perf_counter()
score_rows(BatchedEngine(alone, tokens), rows, loaded.model.device)
print(json.dumps(time.perf_counter() - start))
"""
DEFAULTS: Mapping[str, tuple[Row, str]] = {
    "all layers": ({}, "≤ 2.2"),
    "late": ({"layers": "late"}, "≤ 1.6"),
    "rank 64": ({"rank": "64"}, "≤ 2.7"),
}
GROUPS: Mapping[str, Row] = {
    "34M, in full": {"rows": 400, "words": 30, "options": {}},
    "34M, rank 64": {"rows": 400, "words": 30, "options": {"rank": "64"}},
    "bundled model, short rows": {"rows": 20_000, "words": 6, "options": {}},
}
ROUNDS = 3


def called(script: str, given: Row) -> Any:
    with tempfile.TemporaryDirectory() as name:
        words = [sys.executable, "-W", "ignore", "-c", script]
        words.append(json.dumps({**given, "out": f"{name}/run"}))
        done = subprocess.run(words, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stderr[-2000:])
    return json.loads(done.stdout.splitlines()[-1])


def ratio_of(name: str, ratios: Sequence[float], unit: str, wanted: str) -> Row:
    return figure(name, float(np.median(ratios)), unit, wanted, (min(ratios), max(ratios)))


def defaults(model: str) -> Iterator[tuple[Row, list[Row]]]:
    with tempfile.TemporaryDirectory() as name:
        given: Row = {"model": model, **files(Path(name), 1_200, 8)}
        alone, runs = list[float](), {way: list[Row]() for way in DEFAULTS}
        for _ in range(ROUNDS):
            alone.append(called(FORWARD, given))
            for way, (options, _) in DEFAULTS.items():
                runs[way].append(called(SCRIPT.format("score"), {**given, **options}))
    for way, found in runs.items():
        timings = [run["timings"] for run in found]
        ratios = [t["score"] / one for t, one in zip(timings, alone, strict=True)]
        engine = found[0]["engine"]["name"]
        row = {"run": way, "engine": engine, "forward": alone, "timings": timings}
        name = f"default run, {way} ({engine}): its pass"
        yield row, [ratio_of(name, ratios, "forwards", DEFAULTS[way][1])]


def groups(title: str, model: str) -> tuple[Row, list[Row]]:
    run = GROUPS[title]
    with tempfile.TemporaryDirectory() as name:
        given: Row = {
            "model": model,
            "budget": "5%",
            **files(Path(name), run["rows"], run["words"]),
        }
        given |= run["options"]
        script = SCRIPT.format("select")
        rounds = [called(script, {**given, "groups": "8"}) for _ in range(ROUNDS)]
        alone = called(script, {**given, "groups": "1"})
    seconds = [round_["choice"]["coverage"]["seconds"] for round_ in rounds]
    passes = [r["timings"]["score"] - s for r, s in zip(rounds, seconds, strict=True)]
    over = rounds[0]["actual"]["memory_bytes"] - alone["actual"]["memory_bytes"]
    row: Row = {"run": title, "engine": rounds[0]["engine"], "seconds": seconds, "pass": passes}
    row |= {"coverage": rounds[0]["choice"]["coverage"], "memory_over_one": over}
    ratios = [s / p for s, p in zip(seconds, passes, strict=True)]
    return row, [
        ratio_of(f"groups, {title}", ratios, "of the pass", "≤ 0.3"),
        figure(f"groups, {title}: memory that they add", over / 1e6, "MB", ""),
    ]


def main() -> None:
    found, only = list[tuple[Row, list[Row]]](), sys.argv[1:]
    with tempfile.TemporaryDirectory() as name:
        network: Any = model_of().network
        network.save_pretrained(name)
        AutoTokenizer.from_pretrained(MODEL).save_pretrained(name)
        for title in only or GROUPS:
            if title in GROUPS:
                found.append(groups(title, name if "34M" in title else str(MODEL)))
                print(*found[-1], flush=True)
        if not only or "defaults" in only:
            found += defaults(name)
            print(*found, flush=True)
    if not only:
        rows = [row for row, _ in found]
        write("cost_runs.json", rows, [line for _, lines in found for line in lines])


if __name__ == "__main__":
    main()
