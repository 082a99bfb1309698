"""Selection: arrays in, verdicts out.

    rows are walked from the highest score down; each is taken unless a rule speaks against it:
    its source is at its cap, it nearly repeats a row already taken, or the budget is spent

Choices made here: equal scores keep the order of the pool; the walk stops at the first row that no
longer fits the budget, so every row `over budget` scores at most as high as every row taken; a cap
is a share of the budget, in its own unit; rows that cannot be scored never take part. Rows are
sorted in bands, the best first and only as far as the walk goes, so that a hundred million of them
take little more memory than their scores."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from prism_select.run.config import RepairConfig, ScoreConfig, SelectConfig
from prism_select.run.errors import BadOption
from prism_select.run.options import Amount

__all__ = ["OUTCOMES", "Rules", "best_first", "budget_of", "choose", "limit_of", "round_robin"]

Floats = NDArray[np.float64]


Ints = NDArray[np.int64] | NDArray[np.int32]


OUTCOMES = ("taken", "over budget", "near duplicate", "source cap", "quarantined")


TAKEN, OVER, NEAR, CAPPED, QUARANTINED = range(5)


@dataclass(frozen=True)
class Rules:
    """`repeats(row)` says whether a row nearly repeats one for which it was False before."""

    budget: Amount
    per_source: float = 1.0
    repeats: Callable[[int], bool] | None = None


def limit_of(option: str, budget: Amount, scores: Floats, tokens: Ints) -> float:
    """The budget in its own unit (rows, or supervised tokens). Raises BadOption when the pool is
    smaller."""
    scored = np.isfinite(scores)
    if budget.kind == "positive":
        return float((scores[scored] > 0).sum())
    if budget.kind == "share":
        return float(max(1, round(budget.value * scored.sum())))
    in_tokens = budget.kind == "tokens"
    unit, there = (
        ("tokens", tokens.sum(where=scored, dtype=np.int64))
        if in_tokens
        else ("rows", scored.sum())
    )
    if budget.value > there:
        raise BadOption(
            f"{option} {int(budget.value)} {unit}: more than the pool's {int(there)} {unit}; ask for less, or 100%"
        )
    return budget.value


def best_first(scores: Floats, count: int) -> Iterator[NDArray[np.int64]]:
    """Rows from the highest finite score down, in bands: `count` rows or more (a band has all rows
    of equal score), then four times as many, and so on."""
    below, count = np.inf, max(1, count)
    while len(left := scores[(scores < below) & (scores > -np.inf)]):
        if (rest := len(left) - count) > 0:
            left.partition(rest)
        lowest = left[max(0, rest)] if rest > 0 else left.min()
        del left
        rows = np.flatnonzero((scores < below) & (scores >= lowest))
        yield rows[np.argsort(-scores[rows], kind="stable")]
        below, count = lowest, 4 * count


def choose(
    scores: Floats, tokens: Ints, sources: Ints, rules: Rules, limit: float
) -> NDArray[np.int8]:
    """One of OUTCOMES per row, as its place there: quarantined is a row whose score is not finite.
    `sources` are numbers from 0."""
    verdicts = np.full(len(scores), OVER, dtype=np.int8)
    verdicts[~np.isfinite(scores)] = QUARANTINED
    in_tokens, positive = rules.budget.kind == "tokens", rules.budget.kind == "positive"
    mean = max(1.0, float(tokens.mean())) if in_tokens and len(tokens) else 1.0
    walk, spent = _Walk(rules, sources, limit), 0.0
    for rows in best_first(scores, int(1.1 * limit / mean) + 1000):
        good = rows[scores[rows] > 0] if positive else rows
        prices = tokens[good].astype(np.float64) if in_tokens else np.ones(len(good))
        if rules.per_source < 1 or rules.repeats:
            done, spent = walk.through(good, prices, verdicts, spent)
        else:
            sums = spent + prices.cumsum()
            done = int(np.searchsorted(sums, limit, side="right"))
            verdicts[good[:done]], spent = TAKEN, sums[-1] if len(sums) else spent
        if done < len(rows):
            break
    return verdicts


class _Walk:
    """Row by row, where a row's fate hangs on those before it."""

    def __init__(self, rules: Rules, sources: Ints, limit: float) -> None:
        self.repeats, self.sources, self.limit = rules.repeats, sources, limit
        self.cap = round(rules.per_source * limit, 6)  # 29% of 100 is 29
        self.by_source: dict[int, float] = {}

    def through(
        self, rows: NDArray[np.int64], prices: Floats, verdicts: NDArray[np.int8], spent: float
    ) -> tuple[int, float]:
        """How many of `rows` were passed before the budget was spent, and what they cost with
        `spent`."""
        for place, (row, price, source) in enumerate(self._listed(rows, prices)):
            if spent + price > self.limit:
                return place, spent
            if self.by_source.get(source, 0.0) + price > self.cap:
                verdicts[row] = CAPPED
            elif self.repeats and self.repeats(row):
                verdicts[row] = NEAR
            else:
                verdicts[row] = TAKEN
                spent += price
                self.by_source[source] = self.by_source.get(source, 0.0) + price
        return len(rows), spent

    def _listed(self, rows: NDArray[np.int64], prices: Floats) -> Iterator[tuple[int, float, int]]:
        """Row, price and source, of a few rows at a time: as numbers of Python they take much
        memory."""
        for start in range(0, len(rows), 1 << 16):
            some = rows[start : start + (1 << 16)]
            yield from zip(
                some.tolist(),
                prices[start : start + len(some)].tolist(),
                self.sources[some].tolist(),
                strict=True,
            )


def round_robin(each: Floats) -> Floats:
    """Minus the turn at which each row is taken when every target (column) takes its best row that
    is left, one after another; NaN for rows without a score."""
    finite = np.isfinite(each).all(1)
    orders = [iter(np.argsort(-column, kind="stable").tolist()) for column in each[finite].T]
    turns = np.zeros(int(finite.sum()))
    left, turn = set(range(len(turns))), 0
    while left:
        row = next(row for row in orders[turn % len(orders)] if row in left)
        left.remove(row)
        turns[row] = -turn
        turn += 1
    found = np.full(len(each), np.nan)
    found[finite] = turns
    return found


def budget_of(config: ScoreConfig) -> tuple[str, Amount]:
    """The option that says how much is chosen, and what it says."""
    if isinstance(config, SelectConfig):
        return "--budget", Amount.parse("--budget", config.budget)
    if isinstance(config, RepairConfig):
        return "--remove", Amount.parse("--remove", config.remove)
    return "", Amount("positive")
