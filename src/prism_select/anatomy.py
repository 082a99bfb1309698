"""Anatomy: what each block of the network adds to the scores of some rows of a run, and which cut would rank best.

    layers.parquet    row, label (where known) and a column for each part; the parts add up to the score

The rows are a random sample of the pool, labelled by --label-field, or both answers of held-out pairs, labelled by
which is aimed at. Choices made here: cuts are compared by the score per token, since rows differ in length; a cut that
was chosen on some rows looks better on them than on others, so the held-out pairs should not be those of the target.
"""

import random
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from prism_select.choice import labels_of
from prism_select.config import RepairConfig, ScoreConfig, sides_of
from prism_select.data.batches import Encoded, Encoder, collate, plan_batches
from prism_select.data.formats import parse_fields
from prism_select.data.inputs import Pool, read_target
from prism_select.data.records import Example
from prism_select.errors import BadRow
from prism_select.models import CausalLM
from prism_select.profile import best_cut, parts_of, profile
from prism_select.progress import Progress
from prism_select.targeting import Aim

__all__ = ["Anatomy", "anatomy_of"]

ROWS = 256


@dataclass(frozen=True)
class Anatomy:
    """A table with a row for each profiled one, and what the manifest says of it."""

    table: pa.Table
    told: dict[str, Any]


def anatomy_of(
    config: ScoreConfig, model: CausalLM, aim: Aim, pooled: tuple[Pool, Encoder, int], progress: Progress
) -> Anatomy:
    """`pooled` is the pool, the encoder and the pool's number of rows."""
    pool, encoder, count = pooled
    found = list(of_pool(config, pool, encoder, count) if config.layer_profile == "pool" else of_pairs(config, encoder))
    parts = list(dict.fromkeys(parts_of(model.network, aim.weights).values()))
    rows = [row for _, _, row in found]
    each = np.zeros((len(rows), len(parts)))
    direction = aim.direction
    with progress.task("what each layer adds", len(rows)) as task:
        for few in plan_batches([len(row.tokens) for row in rows], config.tokens_on(model.device.type)):
            batch = collate([rows[i] for i in few], model.device)
            each[few] = profile(model, aim.weights, direction, [batch])
            task.advance(len(few))
    labels = [label for _, label, _ in found]
    told: dict[str, Any] = {"rows": len(rows), "share": dict(zip(parts, shares_of(each), strict=True))}
    known = np.array([label is not None for label in labels], dtype=bool)
    truth = np.array([bool(label) for label in labels])[known]
    if truth.any() and not truth.all():
        tokens = np.array([row.targets for row in rows])
        cuts = best_cut(each[known], parts, truth, tokens[known])
        told |= {"cuts": [asdict(cut) for cut in cuts], "suggestion": cuts[0].name}
    columns = {"row": [row for row, _, _ in found], "label": pa.array(labels, pa.bool_())}
    return Anatomy(pa.table({**columns, **dict(zip(parts, each.T, strict=True))}), told)


def shares_of(each: np.ndarray) -> list[float]:
    """Of the sum of absolute contributions, by part."""
    total = np.abs(each).sum(0)
    return [float(value) for value in total / (total.sum() or 1.0)]


def of_pool(
    config: ScoreConfig, pool: Pool, encoder: Encoder, count: int
) -> Iterator[tuple[int, bool | None, Encoded]]:
    wanted = set(random.Random(config.seed).sample(range(count), min(ROWS, count)))
    labelled = isinstance(config, RepairConfig) and bool(config.label_field)
    labels = labels_of(getattr(config, "label_field", ""), pool) if labelled else [None] * count
    for row, (_, example) in enumerate(pool.rows()):
        if row in wanted and isinstance(example, Example):
            with suppress(BadRow):
                yield row, labels[row], encoder.encode(example)


def of_pairs(config: ScoreConfig, encoder: Encoder) -> Iterator[tuple[int, bool | None, Encoded]]:
    aimed = sides_of(config.command == "repair")[0]
    for place, pair in enumerate(read_target(config.layer_profile, parse_fields(config.fields))):
        for side in ("chosen", "rejected"):
            with suppress(BadRow):
                yield place, side == aimed, encoder.encode(getattr(pair, side))
