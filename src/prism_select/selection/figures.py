"""TODO."""

from itertools import combinations
from typing import Any

import numpy as np

from prism_select.core.statistics import (
    auroc,
    average_precision,
    overlap_of_best,
    precision_at,
    rank_correlation,
    stable_share,
)
from prism_select.data.labels import labels_of
from prism_select.data.pool import Pool
from prism_select.run.config import ScoreConfig
from prism_select.selection.ranking_columns import Columns
from prism_select.selection.verdicts import MANY, Verdicts, counted, slices

__all__ = ["beyond", "hidden_sources", "label_figures", "summary_figures"]

ENOUGH = 10


def beyond(searched: int | None, columns: Columns, verdicts: Verdicts) -> list[str]:
    """A warning where more than a few rows are taken that a cascade has not searched for."""
    taken = columns.ranking[verdicts.among("selected", "removed")]  # places, counted down from 0
    below = 0 if searched is None else int((taken <= -searched).sum())
    if below <= 0.05 * len(taken):
        return []
    return [
        f"{below:,} of the {len(taken):,} rows that were taken are not among the best {searched:,} that the cascade "
        "looked for (a cap, near-duplicates or another budget): better ones may be among its guesses"
    ]


def label_figures(field: str, columns: Columns, verdicts: Verdicts, pool: Pool) -> dict[str, Any]:
    """How well the ranking finds the rows that are known to be bad; rows without a score or a label
    are left out."""
    labels = labels_of(field, pool)
    usable = np.array([label is not None for label in labels]) & np.isfinite(columns.score)
    truth = np.array([bool(label) for label in labels])[usable]
    removed = verdicts.among("removed")[usable]
    per_token = (columns.score / np.maximum(1, columns.tokens))[usable]
    cosine = columns.others.get("score_cosine")
    return {
        "rows": int(usable.sum()),
        "bad": int(truth.sum()),
        "auroc": auroc(columns.score[usable], truth),
        "auroc_per_token": auroc(per_token, truth),
        "average_precision": average_precision(columns.score[usable], truth),
        "average_precision_per_token": average_precision(per_token, truth),
        "precision_at_removed": precision_at(removed, truth),
        "removed": int(removed.sum()),
        **({"auroc_cosine": auroc(cosine[usable], truth)} if cosine is not None else {}),
    }


def hidden_sources(config: ScoreConfig, columns: Columns) -> list[str]:
    """A warning where the source that raises the chosen answers most stands last, because it raises
    the rejected ones more: a gap alone may not be what the user wants. Means by source, of those
    with `ENOUGH` scored rows; none where only the best rows have halves."""
    size = len(columns.sources)
    count, raised, stands = np.zeros(size, dtype=np.int64), np.zeros(size), np.zeros(size)
    for some in slices(len(columns.score)):
        scored, source = np.isfinite(columns.score_chosen[some]), columns.source[some]
        if (np.isfinite(columns.score[some]) > scored).any():
            return []
        unit = (
            np.maximum(1, columns.tokens[some])
            if config.ranking == "score_per_token"
            else np.ones(len(scored))
        )
        count += np.bincount(source[scored], minlength=size)
        raised += np.bincount(source[scored], (columns.score_chosen[some] / unit)[scored], size)
        stands += np.bincount(source[scored], (columns.score[some] / unit)[scored], size)
    means = {
        columns.sources[i]: (raised[i] / count[i], stands[i] / count[i])
        for i in np.flatnonzero(count >= ENOUGH).tolist()
    }
    if len(means) < 2:
        return []
    best = max(means, key=lambda name: means[name][0])
    if means[best][0] <= 0 or means[best][1] > min(mean for _, mean in means.values()):
        return []
    return [
        f"source {best} raises the chosen answers most ({means[best][0]:+.2g} a row on average) and still stands last "
        f"({means[best][1]:+.2g}), since it raises the rejected ones more; nearer negatives or --common remove may help"
    ]


def summary_figures(config: ScoreConfig, columns: Columns, verdicts: Verdicts) -> dict[str, Any]:
    """Shares of each source in the pool and in the choice, and how far length, damping and the
    pairs decide."""
    scored, taken = np.isfinite(columns.score), verdicts.among("selected", "removed")
    read, chosen = (counted(columns.source, len(columns.sources), rows) for rows in (scored, taken))
    shares = {
        name: {"pool": int(read[i]), "chosen": int(chosen[i])}
        for i, name in enumerate(columns.sources)
        if read[i]
    }
    few = np.arange(min(len(scored), MANY))
    if len(scored) > MANY:
        few = np.unique(np.random.default_rng(config.seed).integers(len(scored), size=MANY))
    few = few[scored[few]]
    tokens = columns.tokens[few].astype(np.float64)
    by_length = {"none": columns.score[few], "tokens": columns.score[few] / np.maximum(1, tokens)}
    if "score_cosine" in columns.others:
        by_length["norm"] = columns.others["score_cosine"][few]
    figures: dict[str, Any] = {
        "sources": dict(sorted(shares.items())),
        "rank_correlation_with_tokens": {
            name: rank_correlation(s, tokens) for name, s in by_length.items()
        },
    }
    dampings = {
        name.removeprefix("score_damping_"): s
        for name, s in columns.others.items()
        if "_damping_" in name
    }
    if len(config.dampings) > 1:
        every = {f"{config.dampings[0]:g}": columns.score, **dampings}
        figures["damping_overlap"] = [
            {
                "dampings": [a, b],
                "overlap": overlap_of_best(every[a][scored], every[b][scored], 0.05),
            }
            for a, b in combinations(every, 2)
        ]
    if "score_groups" in columns.others and taken.any():
        unit = (
            np.maximum(1, columns.tokens)
            if config.ranking == "score_per_token"
            else np.ones(len(scored))
        )
        groups = (columns.others["score_groups"] / unit[:, None])[scored]
        figures["stable_share"] = stable_share(groups, taken[scored], config.seed)
    return figures
