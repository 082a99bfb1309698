"""Choice: scores in, verdicts and files out. It needs no model, so --select-from takes seconds.

    scores + rules → a verdict for each row
                   → scores.parquet   selected.jsonl   removed.jsonl   quarantine.jsonl

Choices made here:
- columns of numbers are held in memory, the other columns of the scores pass by;
- texts are read again only where near-duplicates are looked for, and only of rows that the budget
  may reach;
- a budget larger than the pool is refused before a model is loaded, as far as a sample shows it.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from prism_select.data.labels import labels_of
from prism_select.data.pool import Pool
from prism_select.data.records import Example
from prism_select.run.config import OutputOptions, RepairConfig, ScoreConfig, SelectConfig
from prism_select.run.folder import Store
from prism_select.run.options import Amount
from prism_select.selection.coverage import BAND, ORDERS, Order
from prism_select.selection.figures import (
    CHOSEN,
    coverage_figures,
    hidden_source_warnings,
    label_figures,
    summary_figures,
    unreached_warnings,
    unsearched_warnings,
)
from prism_select.selection.files import write_choice
from prism_select.selection.half_columns import HalfColumns, sampled_rows
from prism_select.selection.near_duplicates import NearDuplicates, UnreadText
from prism_select.selection.ranking_columns import GroupScores, RankedRows, rank_rows
from prism_select.selection.rules import (
    OUTCOMES,
    Rules,
    best_first,
    budget_limit,
    choose,
    choose_along,
)
from prism_select.selection.verdicts import VERDICTS, Verdicts

__all__ = ["Chosen", "Known", "choose_and_write", "early_refusals", "refuse_budget"]


@dataclass(frozen=True)
class Chosen:
    """What a choice adds to the manifest. `cutoff` is the lowest score that `select` has taken;
    `larger` are the rows that twice the budget would have, where groups are served."""

    counts: Mapping[str, int]
    figures: Mapping[str, Any]
    warnings: Sequence[str]
    cutoff: float | None = None
    larger: NDArray[np.bool_] | None = None


class Known(NamedTuple):
    """Beside the tables: their columns, where these were read before; how many of the best rows a
    cascade has searched for; what scores some rows along the chosen half, where the tables lack
    it."""

    rows: RankedRows | None = None
    searched: int | None = None
    halves_of: Callable[[NDArray[np.bool_]], HalfColumns] | None = None


def early_refusals(config: ScoreConfig, rows: int, pool: Pool) -> None:
    """Raises BadOption for what would stop the choice in the end: a budget of more rows than the
    `rows` of the pool that are good, or labels that cannot be read."""
    if config.amount.kind == "rows":
        budget_limit(config, np.zeros(rows), np.zeros(rows, dtype=np.int64))
    if isinstance(config, RepairConfig) and config.label_field:
        labels_of(config.label_field, pool)


def refuse_budget(
    config: ScoreConfig, sampled: Sequence[int], rows: int, counts: Callable[[], Iterator[int]]
) -> None:
    """Raises BadOption when `rows` good rows do not fill the budget.

    `sampled` are the supervised tokens of a sample of them, 0 where a row cannot be encoded;
    `counts` gives those of every row, and is called only where twice the budget is more than the
    sample promises.
    """
    budget = config.amount
    units = {"rows": [min(1, tokens) for tokens in sampled], "tokens": sampled}.get(budget.kind)
    if units and 2 * budget.value > sum(units) / len(units) * rows:
        tokens = np.fromiter(counts(), dtype=np.int64)
        budget_limit(config, np.zeros(len(tokens)), tokens)


def choose_and_write(
    config: ScoreConfig,
    store: Store,
    tables: Callable[[], Iterable[pa.Table]],
    pool: Pool,
    known: Known | None = None,
) -> Chosen:
    """Verdicts for the rows of `tables`, and the files that follow from them.

    `tables` is called for each pass over the scores.
    """
    known = known or Known()
    rows = known.rows or rank_rows(config, tables())
    verdicts = decide(config, rows, pool)
    if known.halves_of:
        taken, is_scored = verdicts.among(*CHOSEN), np.isfinite(rows.score)
        sample = sampled_rows(is_scored, config.seed)
        halves = known.halves_of(taken | sample)
        tables = partial(halves.added_to, tables)
        rows = replace(rows, score_chosen=halves.among(sample), sampled=True)
    figures: dict[str, Any] = summary_figures(config, rows, verdicts)
    figures |= coverage_figures(rows, verdicts)
    if isinstance(config, RepairConfig) and config.label_field:
        figures["labels"] = label_figures(config.label_field, rows, verdicts, pool)
    output_format = config.output_format if isinstance(config, OutputOptions) else "jsonl"
    write_choice(store, tables(), verdicts, rows.reasons, pool, output_format)
    verdict_counts = verdicts.counts
    counts = {
        "read": len(verdicts.codes),
        "truncated": rows.truncated,
        **{name: verdict_counts[name] for name in VERDICTS[config.command]},
    }
    counts["scored"] = counts["read"] - counts["quarantined"]
    warnings = [] if config.command == "repair" else hidden_source_warnings(config, rows)
    warnings = [*warnings, *unsearched_warnings(known.searched, rows, verdicts)]
    if coverage := figures.get("coverage"):
        warnings += unreached_warnings(coverage)
    larger = None
    if coverage:
        larger = decide(config, rows, pool, times=2).among(*CHOSEN)
    return Chosen(counts, figures, warnings, cutoff_of(config, rows, verdicts), larger)


def cutoff_of(config: ScoreConfig, rows: RankedRows, verdicts: Verdicts) -> float | None:
    """None where rows are not chosen by scores; of a choice that serves groups, what the same
    number of rows by the one score would have."""
    if not isinstance(config, SelectConfig) or rows.by_baseline or config.combine == "max":
        return None
    taken = verdicts.among("selected")
    if not taken.any():
        return None
    if rows.groups:
        return float(
            np.partition(rows.ranking[np.isfinite(rows.ranking)], -taken.sum())[-taken.sum()]
        )
    return float(rows.ranking[taken].min())


def decide(config: ScoreConfig, rows: RankedRows, pool: Pool, times: int = 1) -> Verdicts:
    """A verdict for each row, at so many times the budget. Raises BadOption when the budget is
    larger than the pool."""
    if not isinstance(config, SelectConfig | RepairConfig):
        return Verdicts((~np.isfinite(rows.score)).astype(np.int8), ("scored", "quarantined"))
    select = isinstance(config, SelectConfig)
    names = {"taken": "selected"} if select else {"taken": "removed", "over budget": "kept"}
    words = [names.get(outcome, outcome) for outcome in OUTCOMES]
    limit = times * budget_limit(config, rows.ranking, rows.tokens)
    if not isinstance(config, SelectConfig) or config.near_duplicates is None:
        return _verdicts(rows, _rules(config), limit, words)
    per_row = max(1.0, float(rows.tokens.mean())) if config.amount.kind == "tokens" else 1.0
    count = int(2 * limit / per_row) + 100
    while True:  # texts are read of four times as many rows whenever they run out
        reachable = _reachable(rows, count)
        texts = {row: text for row, text in _texts(pool) if row in reachable}
        rules = _rules(config, NearDuplicates(config.near_duplicates, texts))
        try:
            return _verdicts(rows, rules, limit, words)
        except UnreadText:
            count *= 4


def _rules(config: ScoreConfig, repeats: NearDuplicates | None = None) -> Rules:
    cap = config.per_source if isinstance(config, SelectConfig) else None
    share = Amount.parse("--per-source", cap).value if cap else 1.0
    return Rules(config.amount, share, repeats)


def _verdicts(rows: RankedRows, rules: Rules, limit: float, words: Sequence[str]) -> Verdicts:
    ranking, tokens, sources = rows.ranking, rows.tokens, rows.source.codes
    if not rows.groups:
        return Verdicts(choose(ranking, tokens, sources, rules, limit), words)
    order = partial(_served, rows.groups, ranking)
    codes, takers = choose_along(order, ranking, tokens, sources, rules, limit)
    return Verdicts(codes, words, rows.groups.names, takers)


def _served(
    groups: GroupScores, ranking: NDArray[np.float64], is_taken: Callable[[int], bool]
) -> Order:
    """Rows with scores along the groups, in their order, and after them the others, by rank."""
    in_pool, order = groups.rows, ORDERS[groups.rule]
    for row, group in order(groups.values, lambda row: is_taken(int(in_pool[row]))):
        yield int(in_pool[row]), group
    others = ranking.copy()
    others[groups.rows] = np.nan
    for band in best_first(others, BAND):
        yield from ((row, -1) for row in band.tolist())


def _reachable(rows: RankedRows, count: int) -> set[int]:
    """The best rows of the ranking, and of each group."""
    reachable = next(best_first(rows.ranking, count), np.zeros(0)).tolist()
    if rows.groups:
        for column in rows.groups.values.T:
            best = next(best_first(column, count), np.zeros(0, dtype=np.int64))
            reachable += rows.groups.rows[best].tolist()
    return set(reachable)


def _texts(pool: Pool) -> Iterator[tuple[int, str]]:
    for row, (_, example) in enumerate(pool.rows()):
        yield row, example.text if isinstance(example, Example) else ""
