"""One way of scoring, in a process of its own: called by cost.py, in an environment where what it
needs is installed.

    python benchmarks/cost_sides.py WAY FOLDER      reads the model and rows.json there

It prints a line when it is ready, then for each line that it reads scores all rows and prints the
seconds, and at the end its scores and its peak memory. The target is one row, whose gradient is the
direction; it is found before, but for kronfluence, whose call finds it anew each time (one row
more).

Choices made here: peers as they come, exact and unprojected, and timed without their start-up,
their reading of models and their writing of files where these can be told apart: bergson's
gradients and scores, kronfluence's whole call."""

import json
import os
import shutil
import sys
import time
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaForCausalLM

Scored = tuple[float, list[float]]


def rows_a_batch(way: str) -> int:
    """Of 127 tokens, in the default batch of a way: larger where no graph is kept."""
    return 16 if way.startswith(("forward", "difference")) and "engine" not in way else 4


def bergson(folder: Path, rows: list[list[int]]) -> Callable[[], Scored]:
    from bergson.build import build_query
    from bergson.cli.commands import Score
    from bergson.config import (
        DataConfig,
        IndexConfig,
        PreprocessConfig,
        QuerySetConfig,
        ScoreConfig,
    )
    from bergson.data import load_scores
    from bergson.score import score as scoring
    from datasets import Dataset

    place = folder / "bergson"
    shutil.rmtree(place, ignore_errors=True)
    for name, some in (("rows", rows[1:]), ("query", rows[:1])):
        Dataset.from_dict({"input_ids": some, "labels": some}).save_to_disk(place / name)
    data = DataConfig(dataset=str(place / "rows"))
    index = IndexConfig(run_path=str(place / "built"), overwrite=True, model=str(folder), data=data)
    built = build_query(
        deepcopy(index), QuerySetConfig(dataset=str(place / "query")), PreprocessConfig()
    )
    seconds = [0.0]
    collect = scoring.collect_gradients

    def timed(*args: Any, **named: Any) -> None:
        start = time.perf_counter()
        collect(*args, **named)
        seconds[0] = time.perf_counter() - start

    scoring.collect_gradients = timed

    def score() -> Scored:
        index.run_path = str(place / "scored")
        Score(ScoreConfig(query_path=built), index, PreprocessConfig()).execute()
        return seconds[0], load_scores(Path(index.run_path))[:].ravel().tolist()

    return score


def kronfluence(folder: Path, rows: list[list[int]]) -> Callable[[], Scored]:
    from kronfluence.analyzer import Analyzer, prepare_model
    from kronfluence.arguments import FactorArguments, ScoreArguments
    from kronfluence_agreement import gain_task, padded

    task = gain_task((2, 1, -1))
    task.compute_measurement = task.compute_train_loss
    model = prepare_model(LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32), task)
    analyzer = Analyzer(
        "cost", model, task, cpu=True, disable_tqdm=True, output_dir=str(folder / "kronfluence")
    )
    every = padded([(row, [True] * len(row)) for row in rows])
    kept: dict[str, Any] = {"factors_name": "identity", "overwrite_output_dir": True}
    fit = FactorArguments(strategy="identity")
    analyzer.fit_all_factors(dataset=every[:1], per_device_batch_size=1, factor_args=fit, **kept)

    def score() -> Scored:
        start = time.perf_counter()
        analyzer.compute_pairwise_scores(
            scores_name="scores",
            query_dataset=every[:1],
            train_dataset=every[1:],
            per_device_query_batch_size=1,
            per_device_train_batch_size=8,
            score_args=ScoreArguments(damping_factor=None, aggregate_query_gradients=True),
            **kept,
        )
        seconds = time.perf_counter() - start
        return seconds, analyzer.load_pairwise_scores("scores")["all_modules"].ravel().tolist()

    return score


def ours(way: str, folder: Path, rows: list[list[int]]) -> Callable[[], Scored]:
    from prism_select.core.engines import ENGINES
    from prism_select.core.gradients import differentiable
    from prism_select.core.likelihood import Batch, backward, mean_logliks
    from prism_select.models.causal_lm import CausalLM
    from prism_select.models.layer_selection import select_parameters

    name, layers = way.split(maxsplit=1)
    model = CausalLM(LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32))
    weights = select_parameters(model.network, layers)
    tokens = torch.tensor(rows)
    every = torch.ones_like(tokens, dtype=torch.bool)
    whole = Batch(tokens, every, every)
    with differentiable(weights):
        backward(model, whole.rows(slice(0, 1)), torch.ones(1))
        direction = {
            key: weight.grad.clone() for key, weight in weights.items() if weight.grad is not None
        }
    engine: Callable[[Batch], Any]
    if name == "forward":

        @torch.no_grad()
        def engine(batch: Batch) -> Any:
            return mean_logliks(model, batch)
    else:
        engine = ENGINES[name](model, weights, [direction])
    size = rows_a_batch(name)
    batches = [whole.rows(slice(i, i + size)) for i in range(1, len(rows), size)]

    def score() -> Scored:
        start = time.perf_counter()
        found = [engine(batch) for batch in batches]
        seconds = time.perf_counter() - start
        values = [each if isinstance(each, torch.Tensor) else each.values[:, 0] for each in found]
        return seconds, torch.cat(values).tolist()

    return score


def main(way: str, folder: Path) -> None:
    out = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what peers print is no answer
    rows = json.loads((folder / "rows.json").read_text(encoding="utf-8"))
    peers = {"bergson": bergson, "kronfluence": kronfluence}
    score = peers[way](folder, rows) if way in peers else ours(way, folder, rows)
    scores = score()[1]  # what is made once
    print("ready", file=out)
    for _ in sys.stdin:
        seconds, scores = score()
        print(seconds, file=out)
    status = Path("/proc/self/status").read_text(encoding="ascii")
    peak = 1024 * int(status.partition("VmHWM:")[2].split()[0])
    print(json.dumps({"scores": scores, "peak_bytes": peak}), file=out)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
