"""Rankings: what the rivals of PRISM say of a pool, for `select --rank-by` and `evaluate --against`.

Choices made here: the pool is read and encoded whole, since some rivals look at all rows together; a row that cannot be
encoded has NaN and takes no part. Several targets are one list of pairs.
"""

from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from prism_select.baselines import COUNT_RIVALS, RIVALS, Material, rank
from prism_select.config import ScoreConfig
from prism_select.data.batches import Encoded, Encoder
from prism_select.data.inputs import Pool
from prism_select.data.pairing import most_alike
from prism_select.data.records import Example, Pair
from prism_select.errors import BadOption, BadRow
from prism_select.models import CausalLM
from prism_select.targeting import encode_sides
from prism_select.weights import select_weights

__all__ = ["rankings", "refuse_rivals"]

Floats: TypeAlias = NDArray[np.float64]
WITHOUT_TARGET = (*COUNT_RIVALS, "loss-top", "loss-mid", "ifd")


def refuse_rivals(option: str, names: Sequence[str], target: bool, known: Sequence[str] = RIVALS) -> None:
    """Raises BadOption for a rival that nobody knows, or that needs pairs where there are none."""
    for name in names:
        if name not in known:
            raise BadOption(f"{option} {name}: unknown; try some of {', '.join(known)}")
        if name in RIVALS and name not in WITHOUT_TARGET and not target:
            raise BadOption(f"{option} {name}: needs pairs, and a saved direction has none; give --target")


def rankings(
    names: Sequence[str],
    config: ScoreConfig,
    loaded: tuple[CausalLM, Encoder],
    pool: Pool,
    targets: Mapping[str, Sequence[Pair]],
) -> dict[str, Floats]:
    """Of each rival a number for every row of the pool, the highest first; `targets` are the pairs as the run has them,
    in repair exchanged already."""
    model, encoder = loaded
    pairs = [pair for each in targets.values() for pair in most_alike(each, config.nearest_share)]
    rows, texts, sources, places, count = list[Encoded](), list[str](), list[str](), list[int](), 0
    for count, (_, example) in enumerate(pool.rows(), start=1):
        with suppress(BadRow):
            if isinstance(example, Example):
                rows.append(encoder.encode(example))
                texts.append(example.text)
                sources.append(example.source or "")
                places.append(count - 1)
    material = Material(
        texts=texts,
        sources=sources,
        tokens=np.array([row.targets for row in rows]),
        wanted=[pair.chosen.text for pair in pairs],
        seed=config.seed,
        model=model,
        weights=select_weights(model.network, config.layers),
        rows=rows,
        pairs=encode_sides(pairs, encoder),
        prefix=encoder.prefix,
        batch_tokens=config.tokens_on(model.device.type),
        engine=config.first_engine,
    )
    found = {name: np.full(count, np.nan) for name in names}
    for name, numbers in rank(names, material).items():
        found[name][places] = numbers
    return found
