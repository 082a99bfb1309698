"""Facts: everything that the page says of a run, read from its folder. Plain frozen values; needs
no model.

    scores.parquet → Spread, Rows      pairs.parquet → Pair      direction.safetensors → Share
    manifest.json, evaluation/ → as they are

Choices made here: a part of the folder that is not there is None, and the page says so in a line;
pairs are shown by the size of their share in the direction, `PAIRS` at most; a direction of more
than `READ` bytes is not read in passing."""

import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from prism_select.data.formats import parse_fields
from prism_select.data.records import Pair as Answers
from prism_select.data.targets import read_targets
from prism_select.report.distribution import Spread, spread_of
from prism_select.report.examples import PairDiagnosis, Row, cut, rows_of, shown
from prism_select.report.scores_table import Columns, columns_of
from prism_select.run.config import OF_CHOICE, ROW_BYTES
from prism_select.run.errors import BadOption, PrismError
from prism_select.run.folder import Run

__all__ = ["Facts", "Pair", "Share", "Target", "facts_of", "opened", "options_of"]

PAIRS = 200


READ = 4 * 2**30


_KINDS = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2"}


_INSIDE = (
    "weight",
    "bias",
    "default",
    "base_layer",
    "lora_A",
    "lora_B",
)  # of a module, or of its adapter


_BLOCK = re.compile(r"(?:^|\.)(\d+)\.")


@dataclass(frozen=True)
class Pair:
    """A pair of the target, counted from 1; answers are called as in the target file. `share` is
    its part in the direction, NaN where that is not known."""

    number: int
    target: str
    prompt: str
    preference: float
    gap: float
    weight: float
    share: float
    line: int
    chosen: tuple[PairDiagnosis, ...] = ()
    rejected: tuple[PairDiagnosis, ...] = ()


@dataclass(frozen=True)
class Target:
    """The pairs with the largest shares, how many there are, and every pair's preference before."""

    pairs: tuple[Pair, ...]
    count: int
    preferences: tuple[float, ...]
    without_answers: str


@dataclass(frozen=True)
class Share:
    """Of the squared norm of the direction: what one kind of weight has in one part of the
    network."""

    part: str
    kind: str
    share: float


@dataclass(frozen=True)
class Facts:
    """`scored_by` are the options that made the scores, where the choice was made again; `newer`
    are pool files that were written after the run."""

    path: str
    manifest: Mapping[str, Any]
    scored_by: Mapping[str, Any]
    columns: Columns
    spread: Spread | None
    rows: tuple[Row, ...]
    target: Target | None
    layers: tuple[Share, ...]
    evaluation: Mapping[str, Any] | None
    curves: tuple[Mapping[str, Any], ...]
    newer: tuple[str, ...]

    @property
    def swapped(self) -> bool:
        return bool(self.manifest["score"]["swapped"])


def opened(path: str) -> Run:
    """Raises BadOption for what is no complete run."""
    run = Run(Path(path))
    for name in ("manifest.json", "scores.parquet"):
        if not (run.path / name).is_file():
            raise BadOption(
                f"{path}: no complete run there ({name} is missing); give the folder of one"
            )
    try:
        command = run.manifest["command"]
        pq.read_schema(run.path / "scores.parquet")
    except (ValueError, KeyError, OSError, pa.ArrowException) as error:
        first = (str(error).splitlines() or [""])[0]
        raise BadOption(f"{path}: the run is damaged ({first}); make it again") from None
    if command not in ("score", "select", "repair"):
        raise BadOption(f"{path}: a run of {command}; give one of score, select or repair")
    return run


def options_of(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """The options that count: those of the scores, and where the choice was made again those of the
    choice."""
    config, scored_by = manifest["config"], manifest.get("scored_by", {})
    return {
        **scored_by,
        **{
            name: value
            for name, value in config.items()
            if name in OF_CHOICE or name not in scored_by
        },
    }


def facts_of(path: str) -> Facts:
    """Of a complete run. Raises BadOption for what is none."""
    run = opened(path)
    manifest = run.manifest
    scored_by = manifest.get("scored_by", manifest["config"])
    columns = columns_of(run.path, manifest)
    place = run.path / "evaluation"
    told = json.loads(text) if (text := _text(place / "evaluation.json")) else None
    curves = (
        pq.read_table(place / "curves.parquet").to_pylist()
        if (place / "curves.parquet").exists()
        else []
    )
    return Facts(
        path=str(run.path),
        manifest=manifest,
        scored_by=scored_by,
        columns=columns,
        spread=spread_of(columns),
        rows=tuple(rows_of(run.path, columns, scored_by, shown(columns))),
        target=target_of(run.path, scored_by),
        layers=layers_of(run.path / "direction.safetensors"),
        evaluation=told,
        curves=tuple(curves) if told else (),
        newer=tuple(newer_than(run.path / "manifest.json", columns.file.names)),
    )


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8") if path.exists() else ""


def newer_than(manifest: Path, files: Iterable[str]) -> list[str]:
    """The files that were written after the manifest."""
    then = manifest.stat().st_mtime
    return [
        file for file in files if Path(file).is_file() and Path(file).stat().st_mtime > then + 1
    ]


def target_of(path: Path, scored_by: Mapping[str, Any]) -> Target | None:
    """None where the direction was a saved one."""
    if not (path / "pairs.parquet").exists():
        return None
    table = pq.read_table(path / "pairs.parquet")
    rows = table.to_pylist()
    answers, why = answers_of(scored_by, rows)
    gaps = np.asarray(table["gap"].to_numpy(), dtype=np.float64)
    preferences = 1 / (1 + np.exp(-np.clip(gaps, -700, 700)))
    shares = np.array([math.nan if row["share"] is None else row["share"] for row in rows])
    first = np.argsort(-np.abs(np.nan_to_num(shares)), kind="stable")[:PAIRS]
    pairs = [
        Pair(
            number=i + 1,
            target=rows[i]["target"],
            prompt=rows[i]["prompt"],
            preference=float(preferences[i]),
            gap=float(gaps[i]),
            weight=float(rows[i]["weight"]),
            share=float(shares[i]),
            line=int(rows[i]["line"]),
            **(_sides(answers[i]) if answers else {}),
        )
        for i in first.tolist()
    ]
    return Target(tuple(pairs), len(rows), tuple(preferences.tolist()), why)


def _sides(pair: Answers) -> dict[str, tuple[PairDiagnosis, ...]]:
    sides = {"chosen": pair.chosen, "rejected": pair.rejected}
    return {
        name: tuple(cut((turn.role, turn.text) for turn in side.turns[side.prompt_turns :]))
        for name, side in sides.items()
    }


def answers_of(
    config: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]
) -> tuple[list[Answers], str]:
    """The pairs of the target files in the order of `rows`, or why they cannot be had."""
    try:
        limit = config.get("max_row_bytes", ROW_BYTES)
        targets = read_targets(
            config["target"], parse_fields(config["fields"]), config["target_by"], limit
        )
    except PrismError as error:
        return [], str(error)
    every = [pair for pairs in targets.values() for pair in pairs]
    by_line: dict[tuple[int, str], list[Answers]] = {}
    for pair in every:
        prompt = "\n".join(turn.text for turn in pair.chosen.turns[: pair.chosen.prompt_turns])
        by_line.setdefault((pair.chosen.line, prompt), []).append(pair)
    if [pair.chosen.line for pair in every] == [row["line"] for row in rows]:
        return every, ""
    found = [by_line.get((row["line"], row["prompt"]), []) for row in rows]
    if all(len(pairs) == 1 for pairs in found):
        return [pairs[0] for pairs in found], ""
    return (
        [],
        "the target's files have changed, or only the nearest pairs were taken: answers are not shown",
    )


def layers_of(file: Path) -> tuple[Share, ...]:
    """By part and kind of weight, in the order of the network; of several targets the mean of their
    shares. Nothing where there is no direction, or one that is too large to read in passing."""
    squares = squares_of(file) if file.exists() and file.stat().st_size <= READ else {}
    total = sum(squares.values())
    found: dict[tuple[str, str], float] = {}
    for name, value in squares.items():
        key = part_of(name)
        found[key] = found.get(key, 0.0) + value / (total or math.nan)
    return tuple(
        Share(part, kind, share) for (part, kind), share in sorted(found.items(), key=_in_network)
    )


def squares_of(file: Path) -> dict[str, float]:
    """Σ d² of each weight, over all targets; chosen halves are left out. Read by hand, since numpy
    has no bfloat16."""
    with file.open("rb") as stream:
        size = int.from_bytes(stream.read(8), "little")
        header = json.loads(stream.read(size))
    found: dict[str, float] = {}
    for name, told in header.items():
        if name == "__metadata__" or re.match(r"chosen[:/]", name):
            continue
        weight = name.partition("/")[2] if name.startswith("target:") else name
        start, end = told["data_offsets"]
        kind = np.dtype(_KINDS[told["dtype"]])
        value = np.fromfile(file, kind, (end - start) // kind.itemsize, offset=8 + size + start)
        if told["dtype"] == "BF16":
            value = (value.astype(np.uint32) << 16).view(np.float32)
        found[weight] = found.get(weight, 0.0) + float(np.square(value, dtype=np.float64).sum())
    return found


def part_of(weight: str) -> tuple[str, str]:
    """`block 3` and the module's own word; a weight outside of the blocks is a part of its own."""
    words = [word for word in weight.split(".") if word not in _INSIDE] or [weight]
    block = _BLOCK.search(weight)
    return (f"block {block[1]}" if block else words[-1], words[-1])


def _in_network(item: tuple[tuple[str, str], float]) -> tuple[int, int]:
    """Embeddings, blocks, what follows them, the head."""
    part = item[0][0]
    if part.startswith("block "):
        return 1, int(part.removeprefix("block "))
    return (
        (0, 0) if "emb" in part or part in ("wte", "wpe") else (3, 0) if "head" in part else (2, 0)
    )
