"""Choice: scores in, verdicts and files out. Needs no model, so `--select-from` can choose again in
seconds.

    scores + rules → verdict per row → scores.parquet   selected.jsonl   removed.jsonl   quarantine.jsonl

Choices made here: rows are copied from the pool as they came, in the order of the pool, in one pass
that neither holds nor understands them; texts are read again only for rows that could be chosen,
and only when near-duplicates are looked for. Of the scores, columns of numbers are held and the
rest goes by; rank correlations of more than a million rows are those of a million drawn from them.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from prism_select.data.labels import labels_of
from prism_select.data.pool import Pool
from prism_select.data.records import Example
from prism_select.run.config import RepairConfig, ScoreConfig, SelectConfig
from prism_select.run.folder import Store
from prism_select.run.options import Amount
from prism_select.selection.figures import beyond, hidden_sources, label_figures, summary_figures
from prism_select.selection.files import write_choice
from prism_select.selection.near_duplicates import NearDuplicates, UnreadText
from prism_select.selection.ranking_columns import Columns, columns_of
from prism_select.selection.rules import OUTCOMES, Rules, best_first, budget_of, choose, limit_of
from prism_select.selection.verdicts import VERDICTS, Verdicts

__all__ = ["Chosen", "choose_and_write", "early_refusals", "refuse_budget"]


@dataclass(frozen=True)
class Chosen:
    """What a choice adds to the manifest."""

    counts: Mapping[str, int]
    figures: Mapping[str, Any]
    warnings: Sequence[str]


def early_refusals(config: ScoreConfig, rows: int, pool: Pool) -> None:
    """What would stop the choice in the end, found before a model is loaded: `rows` of the pool are
    good."""
    option, budget = budget_of(config)
    if budget.kind == "rows":
        limit_of(option, budget, np.zeros(rows), np.zeros(rows, dtype=np.int64))
    if isinstance(config, RepairConfig) and config.label_field:
        labels_of(config.label_field, pool)


def refuse_budget(
    config: ScoreConfig, sampled: Sequence[int], rows: int, every: Callable[[], Iterator[int]]
) -> None:
    """Raises BadOption when `rows` good rows do not fill the budget. `sampled` are the supervised
    tokens of a sample of them, 0 where a row cannot be encoded; only where twice the budget is more
    than they promise are the tokens of `every` row counted."""
    option, budget = budget_of(config)
    units = {"rows": [min(1, tokens) for tokens in sampled], "tokens": sampled}.get(budget.kind)
    if units and 2 * budget.value > sum(units) / len(units) * rows:
        tokens = np.fromiter(every(), dtype=np.int64)
        limit_of(option, budget, np.zeros(len(tokens)), tokens)


def choose_and_write(
    config: ScoreConfig,
    store: Store,
    tables: Callable[[], Iterable[pa.Table]],
    pool: Pool,
    columns: Columns | None = None,
    searched: int | None = None,
) -> Chosen:
    """Verdicts for the rows of `tables` (given as often as asked), and the files that follow from
    them. A cascade has `searched` for so many of the best rows."""
    columns = columns or columns_of(config, tables())
    verdicts = decide(config, columns, pool)
    figures: dict[str, Any] = summary_figures(config, columns, verdicts)
    if isinstance(config, RepairConfig) and config.label_field:
        figures["labels"] = label_figures(config.label_field, columns, verdicts, pool)
    write_choice(store, tables(), verdicts, columns, pool)
    verdict_counts = verdicts.counts
    counts = {
        "read": len(verdicts.codes),
        "truncated": columns.truncated,
        **{name: verdict_counts[name] for name in VERDICTS[config.command]},
    }
    counts["scored"] = counts["read"] - counts["quarantined"]
    warnings = [] if config.command == "repair" else hidden_sources(config, columns)
    return Chosen(counts, figures, [*warnings, *beyond(searched, columns, verdicts)])


def decide(config: ScoreConfig, columns: Columns, pool: Pool) -> Verdicts:
    """A verdict per row. Raises BadOption when the budget is larger than the pool."""
    if isinstance(config, SelectConfig):
        share = Amount.parse("--per-source", config.per_source).value if config.per_source else 1.0
        names = {"taken": "selected"}
        verdicts = _walk(config, columns, pool, share)
    elif isinstance(config, RepairConfig):
        names = {"taken": "removed", "over budget": "kept"}
        option, budget = budget_of(config)
        limit = limit_of(option, budget, columns.ranking, columns.tokens)
        verdicts = choose(columns.ranking, columns.tokens, columns.source, Rules(budget), limit)
    else:
        return Verdicts((~np.isfinite(columns.score)).astype(np.int8), ("scored", "quarantined"))
    return Verdicts(verdicts, [names.get(verdict, verdict) for verdict in OUTCOMES])


def _walk(config: SelectConfig, columns: Columns, pool: Pool, share: float) -> NDArray[np.int8]:
    (option, budget), ranking = budget_of(config), columns.ranking
    limit = limit_of(option, budget, ranking, columns.tokens)
    if not config.near_duplicates:
        return choose(ranking, columns.tokens, columns.source, Rules(budget, share), limit)
    per_row = max(1.0, float(columns.tokens.mean())) if budget.kind == "tokens" else 1.0
    count = int(2 * limit / per_row) + 100
    while True:
        wanted = set(next(best_first(ranking, count), np.zeros(0)).tolist())
        texts = {row: text for row, text in _texts(pool) if row in wanted}
        rules = Rules(budget, share, NearDuplicates(config.near_duplicates, texts))
        try:
            return choose(ranking, columns.tokens, columns.source, rules, limit)
        except UnreadText:
            count *= 4


def _texts(pool: Pool) -> Iterator[tuple[int, str]]:
    for row, (_, example) in enumerate(pool.rows()):
        yield row, example.text if isinstance(example, Example) else ""
