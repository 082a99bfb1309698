"""Profile: what each part of the network adds to each score, and which cut of its layers tells
labelled rows apart.

    contributions[z, part] = Σ over the part's weights of ∇loglik(z) · d      their sum over all parts is the score

Choices made here: one backward pass for all parts; a part is a block, or what stands outside the
blocks under its own word; a cut keeps whole parts, those of `select_parameters`, so its score is a
sum; of equally good cuts the one that keeps most comes first. A cut chosen among many looks better
on the rows it was chosen on than on others."""

import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from jaxtyping import Bool, Float, Int
from torch import nn

from prism_select.core.engines import reverse
from prism_select.core.layers import Direction, Parameters, owners
from prism_select.core.likelihood import Batch, LanguageModel
from prism_select.core.statistics import auroc
from prism_select.data.batches import collate, plan_batches
from prism_select.data.encoding import Encoded, Encoder
from prism_select.data.formats import parse_fields
from prism_select.data.labels import labels_of
from prism_select.data.pool import Pool
from prism_select.data.records import Example
from prism_select.data.targets import read_target
from prism_select.directions.from_pairs import DirectionSet
from prism_select.models.causal_lm import CausalLM
from prism_select.models.layer_selection import blocks_of, upper
from prism_select.run.config import RepairConfig, ScoreConfig, sides_of
from prism_select.run.errors import BadRow
from prism_select.run.progress import Progress

__all__ = ["Anatomy", "Cut", "anatomy_of", "best_cut", "parts_of", "profile"]


@dataclass(frozen=True, slots=True)
class Cut:
    """`name` is a value of `--layers`; `auroc` the chance that a labelled row scores above one that
    is not."""

    name: str
    auroc: float


def parts_of(network: nn.Module, weights: Parameters) -> Mapping[str, str]:
    """{weight: part} in the order of the network: block 0, block 1 and so on; embeddings; head;
    else the module's own word. A head tied to the embeddings is the same weight: embeddings and
    head."""
    _, number = blocks_of(network)
    found: dict[str, str] = {}
    for owner in owners(network, weights):
        for name in owner.weights.values():
            block, word = number(name), owner.name.rpartition(".")[2] or name
            if isinstance(owner.module, nn.Embedding):
                word = "embeddings"
            elif owner.module is network.get_submodule(owner.name.partition(".")[0]):
                word = "embeddings and head" if found.get(name) == "embeddings" else "head"
            found[name] = word if block is None else f"block {block}"
    return {name: found[name] for name in weights}


def profile(
    model: LanguageModel, weights: Parameters, direction: Direction, batches: Iterable[Batch]
) -> Float[np.ndarray, "rows parts"]:
    """Contributions of the parts, in the order in which `parts_of` first names them, rows in that
    of the batches.

    Raises what `reverse` does.
    """
    parts = parts_of(model.network, weights)
    pieces = [
        {name: value for name, value in direction.items() if parts[name] == part}
        for part in dict.fromkeys(parts.values())
    ]
    engine = reverse(model, weights, pieces)
    return np.concatenate([engine(batch).values.double().cpu().numpy() for batch in batches])


def best_cut(
    contributions: Float[np.ndarray, "rows parts"],
    parts: Sequence[str],
    labels: Bool[np.ndarray, " rows"],
    tokens: Int[np.ndarray, " rows"] | None = None,
) -> Sequence[Cut]:
    """Every cut of these parts, best first: all of them, late, and last:N for each N; the first is
    the one to take.

    `tokens` makes scores per token. Labels of one kind alone give an AUROC of NaN everywhere.
    """
    place = {part: i for i, part in enumerate(parts)}
    count = 1 + max(
        (int(part.removeprefix("block ")) for part in parts if part.startswith("block ")),
        default=-1,
    )
    kept = {"all": list(place.values())}
    for wanted in ["late", *(f"last:{n}" for n in range(count, 0, -1))] if count else []:
        blocks = [f"block {i}" for i in upper(count, wanted)]
        if all(block in place for block in blocks):
            kept[wanted] = [place[block] for block in blocks]
    scale = 1 if tokens is None else tokens[:, None]
    each = contributions / scale
    cuts = [Cut(name, auroc(each[:, columns].sum(1), labels)) for name, columns in kept.items()]
    return sorted(cuts, key=lambda cut: (-cut.auroc, -len(kept[cut.name])))


ROWS = 256


@dataclass(frozen=True)
class Anatomy:
    """A table with a row for each profiled one, and what the manifest says of it."""

    table: pa.Table
    told: dict[str, Any]


def anatomy_of(
    config: ScoreConfig,
    model: CausalLM,
    aim: DirectionSet,
    pooled: tuple[Pool, Encoder, int],
    progress: Progress,
) -> Anatomy:
    """`pooled` is the pool, the encoder and the pool's number of rows."""
    pool, encoder, count = pooled
    found = list(
        of_pool(config, pool, encoder, count)
        if config.layer_profile == "pool"
        else of_pairs(config, encoder)
    )
    parts = list(dict.fromkeys(parts_of(model.network, aim.weights).values()))
    rows = [row for _, _, row in found]
    each = np.zeros((len(rows), len(parts)))
    direction = aim.direction
    with progress.task("what each layer adds", len(rows)) as task:
        for few in plan_batches(
            [len(row.tokens) for row in rows], config.tokens_on(model.device.type)
        ):
            batch = collate([rows[i] for i in few], model.device)
            each[few] = profile(model, aim.weights, direction, [batch])
            task.advance(len(few))
    labels = [label for _, label, _ in found]
    told: dict[str, Any] = {
        "rows": len(rows),
        "share": dict(zip(parts, shares_of(each), strict=True)),
    }
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
