"""Selection: arrays in, verdicts out.

    rows are walked from the highest score down; each is taken unless a rule speaks against it:
    its source is at its cap, it nearly repeats a row already taken, or the budget is spent

Choices made here: equal scores keep the order of the pool; the walk stops at the first row that no longer fits the
budget, so every row `over budget` scores at most as high as every row taken; a cap is a share of the budget, in its
own unit; rows that cannot be scored never take part.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from prism_select.config import Amount
from prism_select.errors import BadOption

__all__ = ["NearDuplicates", "Rules", "UnreadText", "choose", "limit_of", "round_robin"]

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


@dataclass(frozen=True)
class Rules:
    """`repeats(row)` says whether a row nearly repeats one for which it was False before."""

    budget: Amount
    per_source: float = 1.0
    repeats: Callable[[int], bool] = lambda row: False


def limit_of(option: str, budget: Amount, scores: Floats, tokens: Ints) -> float:
    """The budget in its own unit (rows, or supervised tokens). Raises BadOption when the pool is smaller."""
    scored = np.isfinite(scores)
    if budget.kind == "positive":
        return float((scores[scored] > 0).sum())
    if budget.kind == "share":
        return float(max(1, round(budget.value * scored.sum())))
    unit, there = ("tokens", tokens[scored].sum()) if budget.kind == "tokens" else ("rows", scored.sum())
    if budget.value > there:
        raise BadOption(
            f"{option} {int(budget.value)} {unit}: more than the pool's {int(there)} {unit}; ask for less, or 100%"
        )
    return budget.value


def choose(
    scores: Floats, tokens: Ints, sources: Sequence[str] | NDArray[np.object_], rules: Rules, limit: float
) -> list[str]:
    """One of taken, over budget, near duplicate, source cap or quarantined (score not finite) per row."""
    verdicts = np.full(len(scores), "over budget", dtype=object)
    verdicts[~np.isfinite(scores)] = "quarantined"
    cost = tokens if rules.budget.kind == "tokens" else np.ones(len(scores), dtype=np.int64)
    order = np.argsort(-np.where(np.isfinite(scores), scores, -np.inf), kind="stable")[: int(np.isfinite(scores).sum())]
    spent, by_source, cap = 0.0, dict[str, float](), round(rules.per_source * limit, 6)  # 29% of 100 is 29
    for row in order.tolist():
        price, source = float(cost[row]), str(sources[row])
        if spent + price > limit or (rules.budget.kind == "positive" and scores[row] <= 0):
            break
        if by_source.get(source, 0.0) + price > cap:
            verdicts[row] = "source cap"
        elif rules.repeats(row):
            verdicts[row] = "near duplicate"
        else:
            verdicts[row] = "taken"
            spent += price
            by_source[source] = by_source.get(source, 0.0) + price
    return list(verdicts)


def round_robin(each: Floats) -> Floats:
    """Minus the turn at which each row is taken when every target (column) takes its best row that is left, one after
    another; NaN for rows without a score."""
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


class UnreadText(LookupError):
    """A row came up whose text was not among those that were read."""


class NearDuplicates:
    """Says of each row, in the order asked, whether a row taken before is `threshold` similar or more.

    Similarity: share of common runs of three words (Jaccard), estimated by MinHash with 128 permutations
    (Broder 1997; standard error at most 0.045).
    """

    def __init__(self, threshold: float, texts: Mapping[int, str]) -> None:
        from datasketch import MinHash, MinHashLSH

        self.threshold, self.texts = threshold, texts
        self._new = MinHash
        self._index = MinHashLSH(threshold=min(threshold, 0.9), num_perm=128)  # what it finds is compared below
        self._taken: dict[int, MinHash] = {}

    def __call__(self, row: int) -> bool:
        if row not in self.texts:
            raise UnreadText(row)
        words = self.texts[row].lower().split()
        sketch = self._new(num_perm=128)
        sketch.update_batch([" ".join(words[i : i + 3]).encode() for i in range(max(1, len(words) - 2))])
        for other in self._index.query(sketch):
            if self._taken[other].jaccard(sketch) >= self.threshold:
                return True
        self._taken[row] = sketch
        self._index.insert(row, sketch)
        return False
