"""Preconditioning: the directions of a run, each divided once by the curvature at the model, and
cut to a rank.

    d ← (H + λ)⁻¹ d    H of a random sample of the pool     RUN/curvature.safetensors keeps H, where asked
                       WEIGHT/eigenvalues, and where it has a basis WEIGHT/left and WEIGHT/right

Choices made here: halves and groups are divided as the direction is, since all this is linear;
other dampings change the mean of the targets alone. A file of Adam's moments has a second moment
for each weight under its own name, and these count as a diagonal of second moments."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from prism_select.core.layers import Direction, Parameters
from prism_select.core.likelihood import Batch
from prism_select.core.target_gradient import dot, norm
from prism_select.data.batches import collate
from prism_select.data.encoding import Encoded
from prism_select.directions.curvature import Block, Blocks, GaussNewton, diagonal, ekfac, solve
from prism_select.directions.from_pairs import DirectionSet, mean_of
from prism_select.models.causal_lm import CausalLM
from prism_select.run.config import ScoreConfig
from prism_select.run.errors import BadFile, BadModel, NotFinite
from prism_select.run.folder import Store
from prism_select.run.progress import Progress

__all__ = ["CURVATURE", "Preconditioned", "curvature_file", "preconditioned", "save_curvature"]

CURVATURE = "curvature.safetensors"


@dataclass(frozen=True)
class Preconditioned:
    """Directions after the curvature, and what is told of it."""

    aim: DirectionSet
    told: Mapping[str, Any]
    blocks: Blocks


def curvature_file(config: ScoreConfig) -> Path | None:
    """Where --curvature-from points: the file itself, or that of a run folder. Raises BadFile where
    it is not there."""
    if not config.curvature_from:
        return None
    given = Path(config.curvature_from)
    place = given / CURVATURE if given.is_dir() else given
    if not place.is_file():
        advice = "give a run folder made with --save-curvature, or a .safetensors file of Adam's second moments"
        raise BadFile(str(place), None, "no such file", advice)
    return place


def preconditioned(
    config: ScoreConfig,
    model: CausalLM,
    aim: DirectionSet,
    rows: Sequence[Encoded],
    progress: Progress,
    blocks: Blocks | None = None,
) -> Preconditioned:
    """`blocks` are the curvature, where it was fitted before. Raises NotFinite when a direction is
    lost in the solve."""
    batches = [collate([row], model.device) for row in rows]
    place = curvature_file(config)
    if blocks is None and place:
        blocks = loaded(config, place, aim.weights)
    elif blocks is None:
        with progress.task(f"curvature of {len(rows)} rows", None):
            blocks = fitted(config, model, aim.weights, batches)
    newton = GaussNewton(model, aim.weights, batches, blocks) if config.curvature == "cg" else None
    count = len(aim.lines.targets)

    def solved(direction: Direction, damping: float) -> Direction:
        return newton.solve(direction, damping) if newton else solve(blocks, direction, damping)

    first, *others = config.dampings
    with progress.task(
        f"dividing {len(aim.directions) + len(others)} directions by the curvature", None
    ):
        directions = [solved(direction, first) for direction in aim.directions]
        residual = newton.residual if newton else None
        mean = mean_of(aim.directions[:count], [1] * count) if others else {}
        more = [solved(mean, damping) for damping in others]
    lengths = [norm(direction) for direction in directions[:count]]
    if not all(0 < length < float("inf") for length in lengths):
        raise NotFinite(
            f"the direction after --curvature {config.curvature} has length {lengths[0]}; raise --damping"
        )
    cosines = [
        dot(a, b) / (norm(a) * size)
        for a, b, size in zip(aim.directions, directions, lengths, strict=False)
    ]
    told = {
        "name": config.curvature,
        "damping": first,
        "rows": len(rows) if not place else None,
        "cosine": {name: cosine for name, cosine in zip(aim.lines.targets, cosines, strict=True)},
        "by_number": sorted(
            n for n, b in blocks.items() if b.left is None and b.eigenvalues.ndim > 1
        ),
        "residual": residual,
    }
    lines = replace(aim.lines, lengths=lengths, dampings=others)
    return Preconditioned(replace(aim, directions=[*directions, *more], lines=lines), told, blocks)


def fitted(
    config: ScoreConfig, model: CausalLM, weights: Parameters, batches: Sequence[Batch]
) -> Blocks:
    seed = config.seed if config.curvature_labels == "sampled" else None
    fit = diagonal if config.curvature == "diagonal" else ekfac  # which also preconditions cg
    return fit(model, weights, batches, seed)


def loaded(config: ScoreConfig, place: Path, weights: Parameters) -> Blocks:
    """Raises BadFile for what cannot be read, BadModel for a weight that is missing or of another
    shape."""
    try:
        saved = load_file(place)
    except (OSError, SafetensorError) as error:
        raise BadFile(
            str(place), None, f"cannot be read ({error})", "give a .safetensors file"
        ) from None
    if any(key.endswith("/left") for key in saved) != (config.curvature == "ekfac"):
        raise BadModel(
            f"--curvature-from {place}: it holds no --curvature {config.curvature}; name the other"
        )
    blocks: dict[str, Block] = {}
    for name, weight in weights.items():
        values = saved.get(f"{name}/eigenvalues", saved.get(name))
        if values is None or values.shape != weight.shape:
            what = (
                f"no second moments of {name}"
                if values is None
                else f"{name} has shape {tuple(values.shape)}"
            )
            raise BadModel(
                f"--curvature-from {place}: {what}; it must have one for each counted weight, by its name"
            )
        sides = [saved.get(f"{name}/{side}") for side in ("left", "right")]
        left, right = (side if side is None else side.to(weight.device) for side in sides)
        blocks[name] = Block(values.to(weight.device), left, right)
    return blocks


def save_curvature(store: Store, blocks: Blocks) -> None:
    tensors: dict[str, Tensor] = {}
    for name, block in blocks.items():
        for part in ("eigenvalues", "left", "right"):
            value = getattr(block, part)
            if value is not None:
                tensors[f"{name}/{part}"] = value
    store.write_tensors(CURVATURE, tensors, {})
