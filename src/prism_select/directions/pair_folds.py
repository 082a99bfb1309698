"""Folds: which pairs are held out together.

    pairs that repeat a question or an answer → one group → one of `FOLDS` folds

Choices made here:
- texts are compared without case and spacing, and answers of both sides with each other;
- where answers repeat so often that fewer than half of the questions stand apart, or too few to
  hold any out (the same refusal in every pair, or one letter as the answer), questions alone make
  the groups;
- folds follow from the texts and the seed, and not from the order of the pairs.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from prism_select.data.records import Pair, Turn

__all__ = ["FOLDS", "PairGroups", "folds_of", "groups_of"]

FOLDS = 8
FEWEST_GROUPS = 4  # fewer say nothing about new pairs


@dataclass(frozen=True)
class PairGroups:
    """`of_pairs` is the group of each pair, counted from 0; `by_answers`: pairs that repeat an
    answer are in one group, too."""

    of_pairs: NDArray[np.int64]
    by_answers: bool = True

    @property
    def count(self) -> int:
        return int(self.of_pairs.max(initial=-1)) + 1


def groups_of(pairs: Sequence[Pair]) -> PairGroups:
    questions = [_key(pair.chosen.prompt) for pair in pairs]
    sides = [[_key(answer.answer) for answer in (p.chosen, p.rejected)] for p in pairs]
    alone = _connected([[f"question {question}"] for question in questions])
    together = _connected(
        [
            [f"question {question}", *(f"answer {answer}" for answer in answers)]
            for question, answers in zip(questions, sides, strict=True)
        ]
    )
    by_question = PairGroups(alone, by_answers=False)
    by_both = PairGroups(together)
    enough = max(FEWEST_GROUPS, by_question.count / 2)
    return by_both if by_both.count >= enough else by_question


def folds_of(groups: PairGroups, seed: int) -> list[NDArray[np.int64]]:
    """The indices of each fold's pairs; none where there are too few groups."""
    if groups.count < FEWEST_GROUPS:
        return []
    sizes = np.bincount(groups.of_pairs)
    totals = np.zeros(min(FOLDS, groups.count))
    fold = np.zeros(groups.count, dtype=np.int64)
    for group in np.random.default_rng(seed).permutation(groups.count):
        fold[group] = totals.argmin()
        totals[fold[group]] += sizes[group]
    return [np.flatnonzero(fold[groups.of_pairs] == number) for number in range(len(totals))]


def _key(turns: Sequence[Turn]) -> str:
    text = "\n".join(f"{turn.role}: {turn.shown}" for turn in turns)
    return hashlib.sha256(" ".join(text.casefold().split()).encode()).hexdigest()


def _connected(keys: Sequence[Sequence[str]]) -> NDArray[np.int64]:
    """A number for each list of keys, the same for lists that share a key or are linked by others;
    numbers are in the order of each group's first key."""
    parent = dict[str, str]()

    def root(key: str) -> str:
        while parent.setdefault(key, key) != key:
            parent[key] = parent[parent[key]]
            key = parent[key]
        return key

    for first, *others in keys:
        for other in others:
            a, b = sorted((root(first), root(other)))
            parent[b] = a
    roots = [root(own[0]) for own in keys]
    return np.unique(roots, return_inverse=True)[1].astype(np.int64)
