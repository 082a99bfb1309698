"""Figures: what the manifest says of a choice, and what a run warns of.

    sources          rows of each source, in the pool and among the chosen
    with tokens      rank correlation of scores and supervised tokens, by kind of score
    dampings         overlap of the best 5% under two values of --damping
    coverage         which group of pairs took how many of the chosen rows
    labels           AUROC and average precision, where a column says which rows are bad

Choices made here:
- rank correlations of more than a million rows are those of a million drawn from them;
- means by source are those of sources with enough scored rows.
"""

from collections.abc import Mapping
from itertools import combinations
from typing import Any

import numpy as np
from numpy.typing import NDArray

from prism_select.core.statistics import (
    auroc,
    average_precision,
    overlap_of_best,
    precision_at,
    rank_correlation,
)
from prism_select.data.labels import labels_of
from prism_select.data.pool import Pool
from prism_select.run.config import ScoreConfig, ScoringOptions
from prism_select.run.thresholds import ROWS_OF_SOURCE, UNSEARCHED_SHARE
from prism_select.selection.ranking_columns import RankedRows
from prism_select.selection.verdicts import SLICE, Verdicts, count_codes, slices

__all__ = [
    "coverage_figures",
    "hidden_source_warnings",
    "label_figures",
    "planted_recall",
    "summary_figures",
    "unreached_warnings",
    "unsearched_warnings",
]

CHOSEN = ("selected", "removed")
BEST = 0.05  # of the rows: the share whose overlap is compared


def unsearched_warnings(searched: int | None, rows: RankedRows, verdicts: Verdicts) -> list[str]:
    """A warning where rows were chosen that a cascade has not searched for, if they are many.

    `searched` is how many of the best rows the cascade searched for; None without a cascade.
    """
    ranks = rows.ranking[verdicts.among(*CHOSEN)]  # of a cascade: counted down from 0
    unsearched = 0 if searched is None else int((ranks <= -searched).sum())
    if unsearched <= UNSEARCHED_SHARE * len(ranks):
        return []
    return [
        f"{unsearched:,} of the {len(ranks):,} chosen rows are not among the best {searched:,} "
        "that the cascade searched for (a cap, near-duplicates or another budget): better rows may "
        "be among those with a predicted score"
    ]


def coverage_figures(rows: RankedRows, verdicts: Verdicts) -> dict[str, Any]:
    """Empty for a choice that does not go by groups. `rows` have scores along them, and rows taken
    by none were chosen by their score alone."""
    if rows.groups is None or verdicts.takers is None:
        return {}
    takers = verdicts.takers[verdicts.among(*CHOSEN)]
    counts = np.bincount(takers + 1, minlength=len(verdicts.groups) + 1).tolist()
    figures = {
        "rule": rows.groups.rule,
        "rows": len(rows.groups.rows),
        "by_group": dict(zip(verdicts.groups, counts[1:], strict=True)),
        "by_score": counts[0],
    }
    return {"coverage": figures}


def unreached_warnings(coverage: Mapping[str, Any]) -> list[str]:
    """A warning where many rows were chosen without scores along the groups."""
    by_score, chosen = coverage["by_score"], sum(coverage["by_group"].values())
    if by_score <= UNSEARCHED_SHARE * (by_score + chosen):
        return []
    return [
        f"{by_score:,} of the {by_score + chosen:,} chosen rows were taken by their score alone: "
        f"{coverage['rows']:,} rows have scores along the groups, and no more of them could be "
        "taken (a cap, near-duplicates or another budget)"
    ]


def label_figures(field: str, rows: RankedRows, verdicts: Verdicts, pool: Pool) -> dict[str, Any]:
    """How well the ranking detects the rows that are labelled bad.

    Rows without a score or a label are left out.
    """
    labels = labels_of(field, pool)
    usable = np.array([label is not None for label in labels]) & np.isfinite(rows.score)
    truth = np.array([bool(label) for label in labels])[usable]
    removed = verdicts.among("removed")[usable]
    per_token = (rows.score / np.maximum(1, rows.tokens))[usable]
    cosine = rows.extra.get("score_cosine")
    return {
        "rows": int(usable.sum()),
        "bad": int(truth.sum()),
        "auroc": auroc(rows.score[usable], truth),
        "auroc_per_token": auroc(per_token, truth),
        "average_precision": average_precision(rows.score[usable], truth),
        "average_precision_per_token": average_precision(per_token, truth),
        "precision_at_removed": precision_at(removed, truth),
        "removed": int(removed.sum()),
        **({"auroc_cosine": auroc(cosine[usable], truth)} if cosine is not None else {}),
        **({"auroc_rank_by": auroc(rows.ranking[usable], truth)} if rows.by_baseline else {}),
    }


def hidden_source_warnings(config: ScoringOptions, rows: RankedRows) -> list[str]:
    """A warning where the source with the highest influence on the chosen answers has the lowest
    score: the gap between the answers may not be what the user wants.

    There is none where only the best rows have halves, and a sample of the rows speaks for all.
    """
    size, codes = len(rows.source.names), rows.source.codes
    count = np.zeros(size, dtype=np.int64)
    on_chosen, score = np.zeros(size), np.zeros(size)
    for piece in slices(len(rows.score)):
        scored, source = np.isfinite(rows.score_chosen[piece]), codes[piece]
        if not rows.sampled and (np.isfinite(rows.score[piece]) > scored).any():
            return []
        per_token = config.ranking == "score_per_token"
        unit = np.maximum(1, rows.tokens[piece]) if per_token else np.ones(len(scored))
        count += np.bincount(source[scored], minlength=size)
        on_chosen += np.bincount(source[scored], (rows.score_chosen[piece] / unit)[scored], size)
        score += np.bincount(source[scored], (rows.score[piece] / unit)[scored], size)
    means = {
        rows.source.names[i]: (on_chosen[i] / count[i], score[i] / count[i])
        for i in np.flatnonzero(count >= ROWS_OF_SOURCE).tolist()
    }
    if len(means) < 2:
        return []
    best = max(means, key=lambda name: means[name][0])
    if means[best][0] <= 0 or means[best][1] > min(mean for _, mean in means.values()):
        return []
    return [
        f"source {best} has the highest influence on the chosen answers ({means[best][0]:+.2g} a "
        f"row on average) but the lowest score ({means[best][1]:+.2g}), because it raises the "
        "rejected answers even more; try closer negatives, or --common remove"
    ]


def summary_figures(config: ScoreConfig, rows: RankedRows, verdicts: Verdicts) -> dict[str, Any]:
    """Rows by source, and how far scores depend on length and on damping."""
    scored = np.isfinite(rows.score)
    figures: dict[str, Any] = {
        "sources": _source_figures(rows, scored, verdicts.among(*CHOSEN)),
        "rank_correlation_with_tokens": _length_figures(config.seed, rows, scored),
    }
    if len(config.dampings) > 1:
        by_damping = {f"{config.dampings[0]:g}": rows.score}
        for name, score in rows.extra.items():
            if name.startswith("score_damping_"):
                by_damping[name.removeprefix("score_damping_")] = score
        figures["damping_overlap"] = [
            {
                "dampings": [a, b],
                "overlap": overlap_of_best(by_damping[a][scored], by_damping[b][scored], BEST),
            }
            for a, b in combinations(by_damping, 2)
        ]
    return figures


def _source_figures(
    rows: RankedRows, scored: NDArray[np.bool_], chosen: NDArray[np.bool_]
) -> Mapping[str, Mapping[str, int]]:
    names, codes = rows.source.names, rows.source.codes
    in_pool, in_choice = (count_codes(codes, len(names), which) for which in (scored, chosen))
    figures = {
        name: {"pool": int(in_pool[i]), "chosen": int(in_choice[i])}
        for i, name in enumerate(names)
        if in_pool[i]
    }
    return dict(sorted(figures.items()))


def _length_figures(seed: int, rows: RankedRows, scored: NDArray[np.bool_]) -> Mapping[str, float]:
    sample = np.arange(min(len(scored), SLICE))
    if len(scored) > SLICE:
        sample = np.unique(np.random.default_rng(seed).integers(len(scored), size=SLICE))
    sample = sample[scored[sample]]
    tokens = rows.tokens[sample].astype(np.float64)
    scores = {"none": rows.score[sample], "tokens": rows.score[sample] / np.maximum(1, tokens)}
    if "score_cosine" in rows.extra:
        scores["norm"] = rows.extra["score_cosine"][sample]
    return {name: rank_correlation(values, tokens) for name, values in scores.items()}


def planted_recall(held_out: NDArray[np.float64], cutoff: float | None) -> dict[str, Any]:
    """Which share of held-out chosen answers the budget would take if they stood in the pool, with
    its 95% interval (Wilson 1927). Empty without a cutoff."""
    if cutoff is None:
        return {}
    taken = int((held_out >= cutoff).sum())
    from scipy.stats import binomtest

    low, high = binomtest(taken, len(held_out)).proportion_ci(method="wilson")
    return {
        "planted_recall": taken / len(held_out),
        "planted_interval": [float(low), float(high)],
    }
