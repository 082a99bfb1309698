"""Profile: what each part of the network adds to each score, and which cut of its layers tells labelled rows apart.

    contributions[z, part] = Σ over the part's weights of ∇loglik(z) · d      their sum over all parts is the score

Choices made here: one backward pass for all parts; a part is a block, or what stands outside the blocks under its own
word; a cut keeps whole parts, those of `select_weights`, so its score is a sum; of equally good cuts the one that keeps
most comes first. A cut chosen among many looks better on the rows it was chosen on than on others.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Int
from torch import nn

from prism_select.core.engines import reverse
from prism_select.core.layers import Direction, Weights, owners
from prism_select.core.likelihood import Batch, LanguageModel
from prism_select.statistics import auroc
from prism_select.weights import blocks_of, upper

__all__ = ["Cut", "best_cut", "parts_of", "profile"]


@dataclass(frozen=True, slots=True)
class Cut:
    """`name` is a value of `--layers`; `auroc` the chance that a labelled row scores above one that is not."""

    name: str
    auroc: float


def parts_of(network: nn.Module, weights: Weights) -> Mapping[str, str]:
    """{weight: part} in the order of the network: block 0, block 1 and so on; embeddings; head; else the module's own
    word. A head tied to the embeddings is the same weight: embeddings and head."""
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
    model: LanguageModel, weights: Weights, direction: Direction, batches: Iterable[Batch]
) -> Float[np.ndarray, "rows parts"]:
    """Contributions of the parts, in the order in which `parts_of` first names them, rows in that of the batches.

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
    """Every cut of these parts, best first: all of them, late, and last:N for each N; the first is the one to take.

    `tokens` makes scores per token. Labels of one kind alone give an AUROC of NaN everywhere.
    """
    place = {part: i for i, part in enumerate(parts)}
    count = 1 + max((int(part.removeprefix("block ")) for part in parts if part.startswith("block ")), default=-1)
    kept = {"all": list(place.values())}
    for wanted in ["late", *(f"last:{n}" for n in range(count, 0, -1))] if count else []:
        blocks = [f"block {i}" for i in upper(count, wanted)]
        if all(block in place for block in blocks):
            kept[wanted] = [place[block] for block in blocks]
    scale = 1 if tokens is None else tokens[:, None]
    each = contributions / scale
    cuts = [Cut(name, auroc(each[:, columns].sum(1), labels)) for name, columns in kept.items()]
    return sorted(cuts, key=lambda cut: (-cut.auroc, -len(kept[cut.name])))
