"""Targeting: pairs to a direction, and a direction to a file and back.

    direction.safetensors    NAME → direction of the score        chosen/NAME → its half of the chosen answers
                             metadata: which answers of the target file it points towards, and whether after a
                             warm-up; one entry alone, since the order of several is not the same in every file

Choices made here: every pair is pictured on the way (sketching.py), so that every run can say how far its pairs agree;
a pair whose two answers are the same tokens stops the run, since it says nothing.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save

from prism_select.common import without_common
from prism_select.config import ModelConfig, ScoreConfig, sides_of
from prism_select.core.direction import Side, Target, norm, target_gradient
from prism_select.core.layers import Direction, Weights
from prism_select.data.batches import Encoded, Encoder, collate, plan_batches
from prism_select.data.records import Pair
from prism_select.diagnosis import Diagnosis, diagnose
from prism_select.errors import BadFile, BadModel, BadOption, BadRow, NotFinite
from prism_select.models import CausalLM
from prism_select.progress import Progress
from prism_select.sketching import Sketcher
from prism_select.store import Store
from prism_select.weights import select_weights

__all__ = ["Aim", "aim_at", "read_direction", "save_direction", "towards"]

WARMED = ", after a warm-up"


@dataclass(frozen=True)
class Aim:
    """The weights that count, what the pairs say, and two directions: of the score and of its chosen half. A saved
    direction comes without pairs."""

    weights: Weights
    directions: Sequence[Direction]
    target: Target | None = None
    diagnosis: Diagnosis | None = None


def read_direction(
    config: ScoreConfig, model: CausalLM, encoder: Encoder, pairs: Sequence[Pair], progress: Progress
) -> Aim:
    if config.direction:
        return Aim(*load_direction(config.direction, model, towards(config)))
    return aim_at(config, model, encoder, pairs, progress)


def aim_at(config: ModelConfig, model: CausalLM, encoder: Encoder, pairs: Sequence[Pair], progress: Progress) -> Aim:
    weights = select_weights(model.network, config.layers)
    progress.say(
        f"counted: {len(weights)} weights, {sum(w.numel() for w in weights.values()):,} numbers ({config.layers})"
    )
    sides = [encode_side(pairs, side, encoder) for side in ("chosen", "rejected")]
    for pair, chosen, rejected in zip(pairs, *sides, strict=True):
        if chosen.tokens == rejected.tokens:
            advice = "give answers that differ, or raise --max-length"
            raise BadRow(pair.chosen.file, pair.chosen.line, "chosen and rejected are the same tokens", advice)
    chosen, rejected = (as_side(side, config.batch_tokens, model.device) for side in sides)
    sketcher = Sketcher(model.network, weights, len(pairs), config.seed)
    with progress.task(f"direction from {len(pairs)} pairs", None), sketcher.open() as observe:
        target = target_gradient(model, weights, (chosen, rejected), config.weighting, config.anchor, observe)
    refuse_not_finite(target, pairs)
    diagnosis = diagnose(
        (sketcher.pictures["chosen"].numpy(), sketcher.pictures["rejected"].numpy()),
        (answers(sides[0]), answers(sides[1])),
        target,
        sketcher.share,
        config.common == "remove",
        config.seed,
    )
    used = without_common(target) if config.common == "remove" else target
    return Aim(weights, [used.direction, used.chosen], target, diagnosis)


def answers(rows: Sequence[Encoded]) -> list[list[int]]:
    """Supervised tokens of each row."""
    return [[token for token, counts in zip(row.tokens, row.supervised, strict=True) if counts] for row in rows]


def encode_side(pairs: Sequence[Pair], side: str, encoder: Encoder) -> list[Encoded]:
    return [encoder.encode(getattr(pair, side)) for pair in pairs]


def as_side(rows: Sequence[Encoded], batch_tokens: int, device: torch.device) -> Side:
    batches = plan_batches([len(row.tokens) for row in rows], batch_tokens)
    return Side([collate([rows[pair] for pair in batch], device) for batch in batches], [p for b in batches for p in b])


def refuse_not_finite(target: Target, pairs: Sequence[Pair]) -> None:
    for place, finite in enumerate(target.gap.isfinite().tolist()):
        if not finite:
            where = f"{pairs[place].chosen.file}:{pairs[place].chosen.line}"
            raise NotFinite(
                f"{where}: the model gives this pair a log-likelihood that is NaN or infinite; try --dtype float32"
            )
    length = norm(target.direction)
    if not math.isfinite(length) or length == 0:
        raise NotFinite(
            f"the direction of the pairs has length {length}; try --dtype float32, other pairs or other --layers"
        )


def towards(config: ScoreConfig) -> str:
    """Which answers of the target file a positive score moves the model towards."""
    return sides_of(config.command == "repair")[0]


def load_direction(file: str, model: CausalLM, side: str) -> tuple[Weights, list[Direction]]:
    """A direction.safetensors of an earlier run. Raises BadFile, BadModel when it is of another model, and BadOption
    when it points towards the other side than `side`."""
    try:
        saved = load_file(file)
        with safe_open(file, "pt") as opened:
            there = (opened.metadata() or {}).get("towards", side)
    except (OSError, SafetensorError) as error:
        raise BadFile(file, None, f"cannot be read ({error})", "give a run folder's direction.safetensors") from None
    if there.endswith(WARMED):
        raise BadOption(
            f"--direction {file}: it was taken after a warm-up, and fits no other checkpoint; give --target"
        )
    if there != side:
        raise BadOption(
            f"--direction {file}: it points towards the {there} answers, and this command needs the {side} ones; "
            "repair takes the direction of a repair run, score and select take that of score or select"
        )
    known = dict(model.network.named_parameters())
    names = [name for name in saved if not name.startswith("chosen/")]
    wrong = [name for name in names if name not in known or known[name].shape != saved[name].shape]
    if wrong or not names or any(f"chosen/{name}" not in saved for name in names):
        raise BadModel(
            f"--direction {file}: {(wrong or ['its list of weights'])[0]} does not fit this model; use its own model"
        )
    here = {name: value.to(model.device) for name, value in saved.items()}
    return {n: known[n] for n in names}, [{n: here[n] for n in names}, {n: here[f"chosen/{n}"] for n in names}]


def save_direction(store: Store, config: ScoreConfig, aim: Aim, pairs: Sequence[Pair]) -> None:
    score, chosen = aim.directions
    tensors = {**score, **{f"chosen/{name}": value for name, value in chosen.items()}}
    ready = {name: value.cpu().contiguous() for name, value in tensors.items()}
    store.write(
        "direction.safetensors", save(ready, metadata={"towards": towards(config) + WARMED * bool(config.warmup)})
    )
    if aim.target is None or aim.diagnosis is None:
        return
    columns = {
        "target": [Path(pair.chosen.file).name.partition(".")[0] for pair in pairs],
        "prompt": ["\n".join(turn.text for turn in pair.chosen.turns[: pair.chosen.prompt_turns]) for pair in pairs],
        "loglik_chosen": aim.target.mean_loglik_chosen.tolist(),
        "loglik_rejected": aim.target.mean_loglik_rejected.tolist(),
        "gap": aim.target.gap.tolist(),
        "weight": aim.target.weight.tolist(),
        "share": list(aim.diagnosis.shares),
        "line": [pair.chosen.line for pair in pairs],
    }
    store.write_table("pairs.parquet", pa.table(columns))
