"""Checkpoints: scores at several checkpoints of one training, added up.

    --checkpoint PATH[=WEIGHT] …  →  a run at each, in OUT/checkpoints/1, 2, …
                                  →  Σ weight · score  →  the choice

The sum of first-order effects along a training (TracIn, arXiv 2002.08484); weighted by learning
rates it is LESS's (arXiv 2402.04333).

Choices made here:
- the output folder of a Trainer stands for all checkpoints in it, each weighted by the learning
  rate in its log; a folder without weights of its own, and a checkpoint alone, weigh 1;
- each checkpoint's run is complete by itself, so a stopped command goes on at the checkpoint where
  it stopped;
- columns that are no scores, and what is said of the pairs, are those of the last checkpoint.
"""

import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from prism_select.commands import pipeline
from prism_select.commands.select_again import score_tables
from prism_select.data.pool import Pool, fingerprint
from prism_select.data.targets import target_files
from prism_select.directions.adam_moments import moments_file
from prism_select.models.loading import fingerprint_of
from prism_select.run.config import ScoreConfig, SelectConfig
from prism_select.run.errors import BadOption
from prism_select.run.folder import Run, Store
from prism_select.run.options import parse_number
from prism_select.run.progress import Progress
from prism_select.selection.choice import Chosen, choose_and_write

__all__ = ["WeightedCheckpoint", "checkpoints_of", "run_checkpoints"]

SUMS = re.compile(r"score($|[:_])")
FOLDER = "checkpoints"


@dataclass(frozen=True)
class WeightedCheckpoint:
    path: str
    weight: float = 1.0


def checkpoints_of(texts: Sequence[str]) -> list[WeightedCheckpoint]:
    """Raises BadOption for a folder without checkpoints, and for weights that are all 0."""
    found = [point for text in texts for point in _expanded(*_split(text))]
    if not any(point.weight for point in found):
        raise BadOption("--checkpoint: all weights are 0; give PATH=WEIGHT")
    return found


def _split(text: str) -> tuple[str, float | None]:
    path, mark, tail = text.rpartition("=")
    weight = parse_number(tail)
    return (path, weight) if mark and not math.isnan(weight) else (text, None)


def _expanded(path: str, weight: float | None) -> Iterator[WeightedCheckpoint]:
    inside = sorted(Path(path).glob("checkpoint-*"), key=_step)
    if not inside or any(Path(path).glob("*.safetensors")):
        yield WeightedCheckpoint(path, 1.0 if weight is None else weight)
        return
    if weight is not None:
        raise BadOption(f"--checkpoint {path}={weight:g}: holds several; give each its weight")
    for folder in inside:
        yield WeightedCheckpoint(str(folder), _learning_rate(folder))


def _step(folder: Path) -> int:
    number = folder.name.removeprefix("checkpoint-")
    return int(number) if number.isdecimal() else -1


def _learning_rate(folder: Path) -> float:
    """The mean in the log of the Trainer since the checkpoint before; 1 without a log."""
    try:
        state = json.loads((folder / "trainer_state.json").read_text(encoding="utf-8"))
        rates = {int(e["step"]): float(e["learning_rate"]) for e in _logged(state)}
    except (OSError, ValueError, KeyError, TypeError):
        return 1.0
    earlier = [_step(other) for other in folder.parent.glob("checkpoint-*")]
    before = max((step for step in earlier if step < _step(folder)), default=0)
    own = [rate for step, rate in rates.items() if before < step <= _step(folder)]
    return float(np.mean(own)) if own else 1.0


def _logged(state: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    return [entry for entry in state["log_history"] if "learning_rate" in entry]


def run_checkpoints(config: ScoreConfig, progress: Progress) -> Run:
    """Raises what a run raises."""
    points, store = checkpoints_of(config.checkpoint), Store(str(config.out))
    parts = [at_checkpoint(config, points[k], k + 1) for k in range(len(points))]
    for part in parts if config.curvature == "adam" else ():
        moments_file(part)  # raises where there is none
    pool = Pool.of(config)
    fingerprints = {
        "pool": fingerprint(pool.files),
        "target": fingerprint(target_files(config.target)),
        "model": "+".join(map(fingerprint_of, parts)),
    }
    store.refuse_others(config, fingerprints)
    if store.complete and not config.overwrite:
        progress.say(f"{store.path} is complete already; --overwrite starts it afresh")
        return Run(store.path)
    store.begin(config, fingerprints)
    runs = list[Run]()
    for number, (point, part) in enumerate(zip(points, parts, strict=True), start=1):
        line = f"checkpoint {number} of {len(points)}: {point.path}, weight {point.weight:g}"
        progress.say(line)
        run = pipeline.run(part, progress)
        assert isinstance(run, Run)
        runs.append(run)

    def tables() -> Iterator[pa.Table]:
        return summed(runs, [point.weight for point in points])

    chosen = choose_and_write(config, store, tables, pool)
    if (runs[-1].path / "pairs.parquet").exists():
        store.write("pairs.parquet", (runs[-1].path / "pairs.parquet").read_bytes())
    manifest = manifest_of_sum(config, points, [run.manifest for run in runs], chosen)
    store.write_json("manifest.json", manifest)
    store.drop_shards()
    return Run(store.path)


def at_checkpoint(config: ScoreConfig, point: WeightedCheckpoint, number: int) -> ScoreConfig:
    """The run of one checkpoint: a model, or an adapter on --model or on the base that it names."""
    out = str(Path(str(config.out)) / FOLDER / str(number))
    own: dict[str, Any] = {"checkpoint": (), "out": out, "halves": True}
    if isinstance(config, SelectConfig):
        own["groups"] = "1"
    if config.model and (Path(point.path) / "adapter_config.json").is_file():
        return replace(config, adapter=point.path, **own)
    return replace(config, model=point.path, adapter=None, **own)


def summed(runs: Sequence[Run], weights: Sequence[float]) -> Iterator[pa.Table]:
    """The scores of all runs, group by group, added up."""
    for parts in zip(*map(score_tables, runs), strict=True):
        last = parts[-1]
        for name in filter(SUMS.match, last.column_names):
            columns = [part[name].to_numpy() for part in parts]
            total = sum(w * column for w, column in zip(weights, columns, strict=True))
            values = pa.array(np.asarray(total), pa.float64(), from_pandas=True)
            last = last.set_column(last.column_names.index(name), name, values)
        yield last


def manifest_of_sum(
    config: ScoreConfig,
    points: Sequence[WeightedCheckpoint],
    manifests: Sequence[Mapping[str, Any]],
    chosen: Chosen,
) -> dict[str, Any]:
    """That of the last checkpoint, with the checkpoints, and costs added up."""
    last = manifests[-1]

    def added(name: str) -> dict[str, float]:
        numbers = [key for key, value in last[name].items() if isinstance(value, int | float)]
        return {key: sum(m[name][key] for m in manifests) for key in numbers}

    peaks = {name: max(m[name]["memory_bytes"] for m in manifests) for name in ("plan", "actual")}
    warnings = [line for m in manifests for line in m["warnings"]]
    return {
        **last,
        "config": asdict(config),
        "checkpoints": [asdict(point) for point in points],
        "counts": dict(chosen.counts),
        "choice": dict(chosen.figures),
        "timings": added("timings"),
        **{name: {**last[name], **added(name), "memory_bytes": peaks[name]} for name in peaks},
        "warnings": list(dict.fromkeys([*warnings, *chosen.warnings])),
    }
