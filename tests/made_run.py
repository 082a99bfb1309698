"""A run folder made by hand: every number in it is known, and no model was needed."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from conftest import Row, jsonl
from safetensors.numpy import save_file

from prism_select.run.config import RepairConfig, SelectConfig

PAIRS: list[Row] = [
    {"prompt": f"Question {place}?", "chosen": f"Right {place}.", "rejected": f"Wrong {place}."}
    for place in range(12)
]
TARGET: dict[str, Any] = {
    "pairs": 12,
    "mean_preference": 0.6,
    "effective_pairs": 11.0,
    "common_part": 2.0,
    "split_half_agreement": 0.8,
    "agreement_spread": [0.7, 0.9],
    "agreement_by_pairs": {"6": 0.8, "3": 0.6, "1": 0.3},
    "pairs_for_half_agreement": 4,
    "preferred_share": 0.75,
    "chosen_longer_share": 0.5,
    "mean_tokens_chosen": 5.0,
    "mean_tokens_rejected": 5.0,
    "token_overlap": 0.5,
    "pairs_for_half_of_direction": 5,
    "cross_validation": {
        "auroc": 0.8,
        "interval": [0.7, 0.9],
        "paired": 0.85,
        "folds": 8,
        "by_answers": True,
        "planted_recall": 0.5,
        "planted_interval": [0.3, 0.7],
    },
    "dominant_pairs": [{"pair": 1, "share": 0.2}],
}
CONTROLS = [
    {
        "name": name,
        "holds": True,
        "words": f"{name} holds: rank correlation 1.00, wanted 0.90 or more",
    }
    for name in ("scored again", "length")
]
EVALUATION: dict[str, Any] = {
    "config": {"seeds": 2},
    "steps": 30,
    "rate": 2e-4,
    "pairs": 20,
    "questions": 20,
    "pairs_left_out": 0,
    "methods": {
        name: {
            "gain": gain,
            "gap": gain - 0.6,
            "win_rate": 0.8,
            "accuracy": 0.8,
            "loglik_chosen": -0.4,
            **(
                {}
                if name == "none"
                else {"rows": [6, 6], "predicted": [gain, gain + 0.01], "realised": [0.1, 0.2]}
            ),
        }
        for name, gain in {"none": 0.8, "prism": 0.95, "random": 0.85}.items()
    },
    "against": {
        name: {
            "words": f"better than {name} by 0.1 [0.05, 0.15]",
            "gain": {"difference": 0.1, "low": low, "high": 0.15},
        }
        for name, low in {"random": 0.05, "none": 0.08}.items()
    },
    "forecast": {"rank_correlation": 0.7, "trainings": 4},
    "compute": None,
    "labels": None,
    "controls": CONTROLS,
    "seconds": 12.0,
}


def write_run(
    folder: Path, rows: Sequence[Row], scores: Sequence[float], command: str = "select", **more: Any
) -> Path:
    """A complete run that took the best third of `rows`; `more` are columns of scores.parquet
    beside the usual ones."""
    folder.mkdir(parents=True, exist_ok=True)
    pool, target = (
        jsonl(folder.parent / "pool.jsonl", rows),
        jsonl(folder.parent / "pairs.jsonl", PAIRS),
    )
    values = np.array(scores, dtype=np.float64)
    order = np.argsort(-values, kind="stable")
    taken = np.zeros(len(rows), dtype=bool)
    taken[order[: len(rows) // 3]] = True
    names = ("selected", "over budget") if command == "select" else ("removed", "kept")
    verdicts = [names[0] if mark else names[1] for mark in taken]
    count = len(rows)
    table: dict[str, Any] = {
        "row": range(count),
        "id": [str(row.get("id", f"pool:{place + 1}")) for place, row in enumerate(rows)],
        "source": [str(row.get("source", "pool")) for row in rows],
        "file": [pool] * count,
        "line": range(1, count + 1),
        "score": values,
        "score_per_token": values / 4,
        "tokens": np.full(count, 4, dtype=np.int32),
        "length": np.full(count, 9, dtype=np.int32),
        "loglik": np.full(count, -3.0),
        "score_chosen": values + 1,
        "score_rejected": np.ones(count),
        "truncated": [False] * count,
        **more,
        "verdict": verdicts,
    }
    pq.write_table(pa.table(table), folder / "scores.parquet", row_group_size=50)
    shared = {"model": "m", "pool": pool, "target": target, "out": str(folder)}
    config = SelectConfig(**shared) if command == "select" else RepairConfig(**shared)  # type: ignore[arg-type]
    write_rest(
        folder,
        manifest_of(config, {names[0]: int(taken.sum()), names[1]: int((~taken).sum())}, count),
    )
    return folder


def manifest_of(
    config: SelectConfig | RepairConfig, verdicts: Mapping[str, int], count: int
) -> dict[str, Any]:
    return {
        "prism_version": "0.1.0",
        "versions": {"python": "3.11"},
        "command": config.command,
        "config": {name: value for name, value in vars(config).items()},
        "fingerprints": {"pool": "p", "target": "t", "model": "m"},
        "model": {
            "architecture": "Tiny",
            "device": "cpu",
            "template": "plain",
            "counted_weights": ["a", "b"],
        },
        "score": {
            "definition": "d",
            "sign": "s",
            "unit": "u",
            "swapped": config.command == "repair",
        },
        "target": TARGET,
        "curvature": {"name": "flat"},
        "engine": {
            "name": "reverse",
            "reason": "why",
            "dtype": "float32",
            "check": {"rows": 8, "disagreement": 1e-7, "tolerance": 1e-3},
        },
        "counts": {"read": count, "truncated": 0, **verdicts, "quarantined": 0, "scored": count},
        "choice": {"sources": {}, "rank_correlation_with_tokens": {"none": 0.1, "tokens": 0.0}},
        "padding": 0.05,
        "timings": {"load": 1.0, "total": 2.0},
        "plan": {"seconds": 3.0, "memory_bytes": 2**30, "tokens": 100},
        "actual": {"seconds": 4.0, "memory_bytes": 2**30, "tokens": 110},
        "warnings": [],
    }


def write_rest(folder: Path, manifest: Mapping[str, Any]) -> None:
    gap = np.linspace(-1, 2, len(PAIRS))
    pairs = {
        "target": ["pairs"] * len(PAIRS),
        "prompt": [str(pair["prompt"]) for pair in PAIRS],
        "loglik_chosen": gap - 2,
        "loglik_rejected": np.full(len(PAIRS), -2.0),
        "gap": gap,
        "weight": 1 / (1 + np.exp(-gap)),
        "share": np.arange(1, 13) / 78,
        "line": range(1, len(PAIRS) + 1),
    }
    pq.write_table(pa.table(pairs), folder / "pairs.parquet")
    direction = {
        "model.embed_tokens.weight": np.full((2, 2), 1.0, dtype=np.float32),
        "model.layers.0.mlp.up_proj.weight": np.full((2, 4), 1.0, dtype=np.float32),
        "model.layers.1.mlp.up_proj.weight": np.full((4, 1), 1.0, dtype=np.float32),
        "chosen/model.embed_tokens.weight": np.full((2, 2), 9.0, dtype=np.float32),
    }
    save_file(direction, folder / "direction.safetensors")
    (folder / "manifest.json").write_text(json.dumps(manifest))


def write_evaluation(folder: Path, **changed: Any) -> None:
    place = folder / "evaluation"
    place.mkdir(exist_ok=True)
    (place / "evaluation.json").write_text(json.dumps({**EVALUATION, **changed}))
    points = [
        {
            "method": method,
            "seed": seed,
            "step": step,
            "loss": 1.0,
            "gain": 0.8 + step / 300,
            "gap": 0.1,
        }
        for method in ("prism", "random")
        for seed in (0, 1)
        for step in (0, 15, 30)
    ]
    pq.write_table(pa.Table.from_pylist(points), place / "curves.parquet")


def made_curve(over: Mapping[float, tuple[float, float]], task: str = "") -> list[dict[str, Any]]:
    """Points with these intervals over random removal; the gain rises with the share."""

    def point(share: float, method: str, interval: tuple[float, float] | None) -> dict[str, Any]:
        gain = {"difference": 0.1, "low": interval[0], "high": interval[1]} if interval else None
        return {
            "removed": share,
            "rows": round(100 * (1 - share)),
            "method": method,
            **{"gain": 0.7 + share, "gap": 0.1, "win_rate": 0.6, "accuracy": 0.5},
            **{"loglik_chosen": -1.0, "gain_interval": [0.6, 0.9]},
            "tasks": {task: 0.25 + share} if task else {},
            "over_random": {"words": "words", "gain": gain} if gain else None,
        }

    return [
        point(0.0, "everything", None),
        *(
            point(share, name, interval if name == "prism" else None)
            for share, interval in over.items()
            for name in ("prism", "random")
        ),
    ]


def change(folder: Path, **values: Any) -> None:
    """Other values in the manifest; a part of it is given whole."""
    place = folder / "manifest.json"
    place.write_text(json.dumps({**json.loads(place.read_text()), **values}))
