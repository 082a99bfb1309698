"""What does a whole run cost, as a user gives it? `prism select`, 5%, eight groups, by manifests.

    python benchmarks/cost_runs.py        an hour on two quiet cores

A random Llama of 34M numbers as in cost.py, float32, 4,000 rows along one direction; the bundled
model on 20,000 short rows. Rows are random words, the pairs 40: the groups of random words are
random too, so their stage grows to the most that it may take, a fifth of the pool. Scoring without
groups is all rows along the direction, then the chosen ones and a random 200 along its chosen half;
it is told in forward passes over the pool in the same batches, and the groups as a share of it.

Choices made here: each run and each forward pass is a process of its own and they take turns,
round by round; the seconds of groups include worker, engine and choices between their rounds;
figures are medians, from least to most. Memory is the peak of the process beside that of the same
run with `--groups 1`."""

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
CHOICE: Row = {"budget": "5%", "groups": "8"}
SELECT = """
import json, sys, prism_select
print(json.dumps(dict(prism_select.select(**json.loads(sys.argv[1])).manifest)))
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
ROUNDS = 3
WAYS: Mapping[str, tuple[Row, str]] = {
    "all layers": ({}, "≤ 2.2"),
    "late": ({"layers": "late"}, "≤ 1.6"),
    "rank 64": ({"rank": "64"}, "≤ 2.7"),
}


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


def whole_runs(model: str) -> Iterator[tuple[Row, list[Row]]]:
    """Of the 34M model: scoring without groups, in forward passes; groups, as a share of that."""
    with tempfile.TemporaryDirectory() as name:
        given: Row = {"model": model, **files(Path(name), 4_000, 6)}
        alone, runs = list[float](), {way: list[Row]() for way in WAYS}
        for _ in range(ROUNDS):
            alone.append(called(FORWARD, given))
            for way, (options, _) in WAYS.items():
                runs[way].append(called(SELECT, {**given, **options, **CHOICE}))
                print(way, runs[way][-1]["timings"], alone[-1], flush=True)
        one = {
            w: called(SELECT, {**given, **o, **CHOICE, "groups": "1"}) for w, (o, _) in WAYS.items()
        }
    for way, found in runs.items():
        row, figures = groups(f"34M, {way}", found, one[way])
        ratios = [passed / forward for passed, forward in zip(row["pass"], alone, strict=True)]
        title = f"default run, {way} ({row['engine']['name']}): scoring without groups"
        figures.append(ratio_of(title, ratios, "forwards", WAYS[way][1]))
        yield {**row, "forward": alone}, figures


def groups(title: str, rounds: Sequence[Row], one: Row) -> tuple[Row, list[Row]]:
    seconds = [run["choice"]["coverage"]["seconds"] for run in rounds]
    passes = [run["timings"]["score"] - s for run, s in zip(rounds, seconds, strict=True)]
    over = rounds[0]["actual"]["memory_bytes"] - one["actual"]["memory_bytes"]
    row: Row = {"run": title, "engine": rounds[0]["engine"], "groups": seconds, "pass": passes}
    row |= {"coverage": rounds[0]["choice"]["coverage"], "memory_over_one": over}
    row |= {"timings": [run["timings"] for run in rounds]}
    ratios = [s / p for s, p in zip(seconds, passes, strict=True)]
    return row, [
        ratio_of(f"groups, {title}", ratios, "of scoring without them", "≤ 0.3"),
        figure(f"groups, {title}: memory that they add", over / 1e6, "MB", ""),
    ]


def short_rows() -> tuple[Row, list[Row]]:
    with tempfile.TemporaryDirectory() as name:
        given: Row = {"model": str(MODEL), **files(Path(name), 20_000, 6)}
        rounds = [called(SELECT, {**given, **CHOICE}) for _ in range(ROUNDS)]
        one = called(SELECT, {**given, **CHOICE, "groups": "1"})
    return groups("bundled model, 20,000 short rows", rounds, one)


def main() -> None:
    with tempfile.TemporaryDirectory() as name:
        network: Any = model_of().network
        network.save_pretrained(name)
        AutoTokenizer.from_pretrained(MODEL).save_pretrained(name)
        found = [short_rows(), *whole_runs(name)]
    rows = [row for row, _ in found]
    write("cost_runs.json", rows, [line for _, lines in found for line in lines])


if __name__ == "__main__":
    main()
