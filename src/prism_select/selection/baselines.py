"""Baselines: the other ways to rank the rows of a pool, by name.

    rankings(names, …) → a number for each row, the highest first; NaN for a row that takes no part

Choices made here:
- a baseline is an entry of `BASELINES`; --rank-by, --against and the report read names from there;
- what it computes stands in baseline_scores.py;
- rows of equal numbers keep the order of the pool.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from prism_select.core.layers import Direction
from prism_select.data.encoding import Encoded
from prism_select.data.pool import Pool
from prism_select.data.records import Example, Pair, any_alone
from prism_select.directions.pair_encoding import encode_sides
from prism_select.directions.pair_folds import folds_of, groups_of
from prism_select.models.generation import end_tokens
from prism_select.models.layer_selection import select_parameters
from prism_select.models.loading import LoadedModel
from prism_select.run.config import ScoreConfig
from prism_select.run.errors import BadOption, BadRow
from prism_select.selection import baseline_scores as scores
from prism_select.selection.baseline_scores import Floats, Material, Texts

__all__ = [
    "BASELINES",
    "COUNT_BASELINES",
    "Baseline",
    "count_ranking",
    "rank",
    "rankings",
    "refuse_baselines",
]


@dataclass(frozen=True, kw_only=True)
class Baseline:
    """One way to rank rows: by a number for each (`rank`), or by ∇loglik · `direction`.

    It reads counts (source and supervised tokens of each row), texts as well, or the model as well.
    """

    summary: str
    source: str = ""
    reads: Literal["counts", "texts", "model"] = "model"
    target: bool = True  # whether it needs pairs
    rank: Callable[[Any], Floats] | None = None  # of Texts, or of Material where it reads the model
    direction: Callable[[Material], Direction] | None = None


BASELINES: Mapping[str, Baseline] = {
    "random": Baseline(
        summary="the same chance for every row",
        reads="counts",
        target=False,
        rank=scores.random,
    ),
    "random-by-source": Baseline(
        summary="random within each source, the same share of every source",
        source="stratified sampling with proportional allocation, Cochran 1977, chapter 5",
        reads="counts",
        target=False,
        rank=scores.random_by_source,
    ),
    "length": Baseline(
        summary="supervised tokens, the longest answer first",
        source="Zhao et al. 2024, arXiv 2402.04833, by whole rows",
        reads="counts",
        target=False,
        rank=scores.length,
    ),
    "bm25": Baseline(
        summary="words shared with the target's chosen answers",
        source="Robertson and Zaragoza 2009, with Lucene's idf; a baseline of LESS",
        reads="texts",
        rank=scores.bm25,
    ),
    "loss-top": Baseline(
        summary="mean loss per supervised token: the rows of highest perplexity",
        source="Marion et al. 2023, arXiv 2309.04564 (top)",
        target=False,
        rank=scores.loss_top,
    ),
    "loss-mid": Baseline(
        summary="−|loss − median of the pool|: the rows of middle perplexity",
        source="Marion et al. 2023, arXiv 2309.04564 (middle)",
        target=False,
        rank=scores.loss_mid,
    ),
    "ifd": Baseline(
        summary="instruction-following difficulty: loss after the prompt / loss without it",
        source="Li et al. 2023, arXiv 2308.12032",
        target=False,
        rank=scores.ifd,
    ),
    "rds": Baseline(
        summary="RDS+: each target takes, in turn, the row whose hidden states are nearest",
        source="Ivison et al. 2025, arXiv 2503.01807",
        rank=scores.rds,
    ),
    "less": Baseline(
        summary="cosine of the row's gradient and that of the target's chosen answers",
        source="Xia et al. 2024, arXiv 2402.04333 (LESS)",
        rank=scores.less,
    ),
    "probe": Baseline(
        summary="logistic regression of chosen against rejected answers on mean hidden states",
        source="linear probes, Alain and Bengio 2016, arXiv 1610.01644",
        rank=scores.probe,
    ),
    "vector-filter": Baseline(
        summary="mean hidden state along the mean chosen minus the mean rejected one",
        source="Kowal et al. 2026, arXiv 2602.14869",
        rank=scores.vector_filter,
    ),
    "projection-difference": Baseline(
        summary="the same, minus that of the model's own answer to the row's prompt",
        source="Chen et al. 2025, arXiv 2507.21509, of single samples",
        rank=scores.projection_difference,
    ),
    "concept-influence": Baseline(
        summary="∇loglik · the gradient of the chosen answers' projection on that vector",
        source="Kowal et al. 2026, arXiv 2602.14869, with flat curvature",
        direction=scores.concept_influence,
    ),
    "probe-and-score": Baseline(
        summary="the probe's number and PRISM's score, each standardised over the pool, added",
        rank=scores.probe_and_score,
    ),
    "first-order": Baseline(
        summary="PRISM's score with flat curvature: the sum of the pairs' weighted gradients",
        source="arXiv 2605.21422",
        direction=scores.first_order,
    ),
    "uniform": Baseline(
        summary="PRISM's first-order score with every pair weighted alike",
        direction=scores.uniform,
    ),
    "hard": Baseline(
        summary="PRISM's first-order score, pairs weighted as in DPO: those not yet learned most",
        source="Rafailov et al. 2023, arXiv 2305.18290",
        direction=scores.hard,
    ),
    "unpaired": Baseline(
        summary="PRISM's first-order score with chosen answers alone: the influence on their loss",
        direction=scores.unpaired,
    ),
    "contrast": Baseline(
        summary="∇loglik · (mean ∇loglik of chosen answers − mean ∇loglik of rejected answers)",
        source="IF-Guide's differential attribution, arXiv 2506.01790, by rows",
        direction=scores.contrast,
    ),
}
COUNT_BASELINES = tuple(name for name, entry in BASELINES.items() if entry.reads == "counts")


def refuse_baselines(
    option: str,
    names: Sequence[str],
    targets: Mapping[str, Sequence[Pair]],
    choices: Sequence[str] = tuple(BASELINES),
) -> None:
    """Raises BadOption for a name that is none of the `choices`, or for a baseline that needs pairs
    where the `targets` have none, or answers alone."""
    why = "" if targets else "a saved direction has none; give --target"
    if any_alone(targets):
        why = "answers without rejected ones are none; leave it out"
    for name in names:
        if name not in choices:
            raise BadOption(f"{option} {name}: unknown; try some of {', '.join(choices)}")
        if name in BASELINES and BASELINES[name].target and why:
            raise BadOption(f"{option} {name}: needs pairs, and {why}")


def count_ranking(
    name: str, sources: Sequence[str], tokens: NDArray[np.int64], seed: int
) -> Floats:
    """The ranking of one of `COUNT_BASELINES`; `tokens` counts the supervised tokens of a row."""
    return rank([name], Texts(texts=(), sources=sources, tokens=tokens, seed=seed))[name]


def rank(names: Sequence[str], material: Texts) -> dict[str, Floats]:
    """Of each baseline a number for each row; those with a direction share one pass."""
    entries = {name: BASELINES[name] for name in names}
    ranked = {name: entry.rank(material) for name, entry in entries.items() if entry.rank}
    makers = {name: entry.direction for name, entry in entries.items() if entry.direction}
    if makers:
        assert isinstance(material, Material)
        along = material.along([direction(material) for direction in makers.values()])
        ranked |= dict(zip(makers, along.T, strict=True))
    return ranked


def rankings(
    names: Sequence[str],
    config: ScoreConfig,
    loaded: LoadedModel,
    pool: Pool,
    targets: Mapping[str, Sequence[Pair]],
    own_scores: Floats,
) -> dict[str, Floats]:
    """Of each baseline a number for every row of the pool, NaN for a bad row.

    `targets` are the pairs as the run has them, in repair exchanged already; `own_scores`
    are what the run ranks its rows by.
    """
    encoder, rows, indices = loaded.encoder, list[Encoded](), list[int]()
    texts, sources, count = list[str](), list[str](), 0
    for count, (_, example) in enumerate(pool.rows(), start=1):
        with suppress(BadRow):
            if isinstance(example, Example):
                rows.append(encoder.encode(example))
                texts.append(example.text)
                sources.append(example.source or "")
                indices.append(count - 1)
    pairs = [pair for of_target in targets.values() for pair in of_target]
    material = Material(
        texts=texts,
        sources=sources,
        tokens=np.array([row.targets for row in rows]),
        target_texts=[pair.chosen.text for pair in pairs],
        seed=config.seed,
        model=loaded.model,
        weights=select_parameters(loaded.model.network, config.layers),
        rows=rows,
        pairs=encode_sides(pairs, encoder),
        prefix=encoder.prefix,
        ends=end_tokens(loaded.model.network, encoder.tokenizer),
        folds=folds_of(groups_of(pairs), config.seed) if pairs else [],
        scores=own_scores[indices],
        likelihood=config.likelihood,
        batch_tokens=config.tokens_on(loaded.model.device.type, loaded.model.size),
        engine=config.first_engine,
    )
    numbers = {name: np.full(count, np.nan) for name in names}
    for name, values in rank(names, material).items():
        numbers[name][indices] = values
    return numbers
