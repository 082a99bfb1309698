"""Rules: arrays in, a verdict for each row out.

    rows are visited from the highest ranking down; each is taken unless a rule speaks against it:
    its source is at its cap, it nearly repeats a row taken before, or the budget is spent

Choices made here:
- equal rankings keep the order of the pool;
- the visit ends at the first row that does not fit the budget, so no row `over budget` ranks above
  a row that was taken;
- a cap is a share of the budget, in the budget's unit;
- a row without a score never takes part;
- rows are sorted in bands, the best first and only as far as the visit goes: a hundred million rows
  take little more memory than their scores.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from prism_select.run.config import RepairConfig, ScoreConfig
from prism_select.run.errors import BadOption
from prism_select.run.options import Amount

__all__ = ["OUTCOMES", "Rules", "best_first", "budget_limit", "choose", "choose_along", "limit_of"]

Floats = NDArray[np.float64]
Ints = NDArray[np.int64] | NDArray[np.int32]

OUTCOMES = ("taken", "over budget", "near duplicate", "source cap", "quarantined")
TAKEN, OVER, NEAR, CAPPED, QUARANTINED = range(5)
LISTED = 1 << 16  # rows that are Python numbers at a time


@dataclass(frozen=True)
class Rules:
    """`repeats(row)` says whether a row nearly repeats a row for which it was False before."""

    budget: Amount
    per_source: float = 1.0
    repeats: Callable[[int], bool] | None = None


def budget_limit(config: ScoreConfig, scores: Floats, tokens: Ints) -> float:
    """The budget of a command in its own unit. Raises BadOption when the pool is smaller."""
    option = "--remove" if isinstance(config, RepairConfig) else "--budget"
    return limit_of(option, config.amount, scores, tokens)


def limit_of(option: str, budget: Amount, scores: Floats, tokens: Ints) -> float:
    """The budget in its own unit: rows, or supervised tokens.

    Rows whose score is not finite do not count. Raises BadOption when the pool is smaller.
    """
    scored = np.isfinite(scores)
    if budget.kind == "positive":
        return float((scores[scored] > 0).sum())
    if budget.kind == "share":
        return float(max(1, round(budget.value * scored.sum())))
    if budget.kind == "tokens":
        unit, total = "tokens", int(tokens.sum(where=scored, dtype=np.int64))
    else:
        unit, total = "rows", int(scored.sum())
    if budget.value > total:
        raise BadOption(
            f"{option} {int(budget.value)} {unit}: more than the pool's {total} {unit}; ask for "
            "less, or 100%"
        )
    return budget.value


def best_first(scores: NDArray[np.floating[Any]], count: int) -> Iterator[NDArray[np.int64]]:
    """Rows from the highest finite score down, in bands.

    The first band has `count` rows or more (all rows of equal score are in one band), the next four
    times as many, and so on.
    """
    below, count = np.inf, max(1, count)
    while len(remaining := scores[(scores < below) & (scores > -np.inf)]):
        if (beyond := len(remaining) - count) > 0:
            remaining.partition(beyond)
        lowest = remaining[beyond] if beyond > 0 else remaining.min()
        del remaining
        rows = np.flatnonzero((scores < below) & (scores >= lowest))
        yield rows[np.argsort(-scores[rows], kind="stable")]
        below, count = lowest, 4 * count


def choose(
    scores: Floats, tokens: Ints, sources: Ints, rules: Rules, limit: float
) -> NDArray[np.int8]:
    """One of OUTCOMES for each row, as its position there.

    `scores` rank the rows; a row whose score is not finite is quarantined. `sources` are numbers
    from 0. `limit` is what `limit_of` returns.
    """
    verdicts = _untaken(scores)
    in_tokens, positive = rules.budget.kind == "tokens", rules.budget.kind == "positive"
    mean = max(1.0, float(tokens.mean())) if in_tokens and len(tokens) else 1.0
    visit, spent = _Visit(rules, sources, limit), 0.0
    for rows in best_first(scores, int(1.1 * limit / mean) + 1000):
        good = rows[scores[rows] > 0] if positive else rows
        prices = tokens[good].astype(np.float64) if in_tokens else np.ones(len(good))
        if rules.per_source < 1 or rules.repeats:
            visited = visit.through(good, prices, verdicts)
        else:
            sums = spent + prices.cumsum()
            visited = int(np.searchsorted(sums, limit, side="right"))
            verdicts[good[:visited]], spent = TAKEN, sums[-1] if len(sums) else spent
        if visited < len(rows):
            break
    return verdicts


def choose_along(
    order: Callable[[Callable[[int], bool]], Iterable[tuple[int, int]]],
    scores: Floats,
    tokens: Ints,
    sources: Ints,
    rules: Rules,
    limit: float,
) -> tuple[NDArray[np.int8], NDArray[np.int16]]:
    """Verdicts as `choose` gives them, for rows in an order that depends on what was taken before:
    `order(is_taken)`. Also the number that comes with each taken row, -1 for other rows."""
    verdicts, numbers = _untaken(scores), np.full(len(scores), -1, dtype=np.int16)
    visit = _Visit(rules, sources, limit)
    for row, number in order(lambda row: verdicts[row] == TAKEN):
        price = float(tokens[row]) if rules.budget.kind == "tokens" else 1.0
        if not visit.has_room(price):
            break
        verdicts[row] = visit.verdict(row, price, int(sources[row]))
        if verdicts[row] == TAKEN:
            numbers[row] = number
    return verdicts, numbers


def _untaken(scores: Floats) -> NDArray[np.int8]:
    verdicts = np.full(len(scores), OVER, dtype=np.int8)
    verdicts[~np.isfinite(scores)] = QUARANTINED
    return verdicts


class _Visit:
    """Row by row, where the verdict on a row depends on the rows before it."""

    def __init__(self, rules: Rules, sources: Ints, limit: float) -> None:
        self.repeats, self.sources, self.limit = rules.repeats, sources, limit
        self.cap = round(rules.per_source * limit, 6)  # 29% of 100 is 29
        self.by_source: dict[int, float] = {}
        self.spent = 0.0

    def through(self, rows: NDArray[np.int64], prices: Floats, verdicts: NDArray[np.int8]) -> int:
        """Writes verdicts until the budget is spent. How many rows were visited."""
        for count, (row, price, source) in enumerate(self._listed(rows, prices)):
            if not self.has_room(price):
                return count
            verdicts[row] = self.verdict(row, price, source)
        return len(rows)

    def has_room(self, price: float) -> bool:
        return self.spent + price <= self.limit

    def verdict(self, row: int, price: float, source: int) -> int:
        of_source = self.by_source.get(source, 0.0) + price
        if of_source > self.cap:
            return CAPPED
        if self.repeats and self.repeats(row):
            return NEAR
        self.spent += price
        self.by_source[source] = of_source
        return TAKEN

    def _listed(self, rows: NDArray[np.int64], prices: Floats) -> Iterator[tuple[int, float, int]]:
        """Row, price and source as Python numbers, which take much memory."""
        for start in range(0, len(rows), LISTED):
            band = rows[start : start + LISTED]
            yield from zip(
                band.tolist(),
                prices[start : start + LISTED].tolist(),
                self.sources[band].tolist(),
                strict=True,
            )
