"""Diagnosis: do the pairs say one thing, and how much of what they say is shared by both answers?

    agreement(m)    cosine between the directions of two disjoint random sets of m pairs, mean over `SPLITS` draws
                    expected 1 / (1 + κ/m), κ the noise of one pair over the signal  →  halves of 2κ pairs agree at ½
                    and then all n pairs have the cosine √(2a / (1 + a)) with what endlessly many
                    would say
    share of pair q     d_q · d / ‖d‖², which add up to 1

All from the pairs' pictures (sketching.py), so it costs no pass of the model.

Choices made here: where the common part is taken out of the direction it is taken out of each set's
own; κ is Σ m (1 − agreement) / Σ agreement over halves, quarters and eighths, since a ratio of sums
bears one small agreement."""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray
from scipy.special import expit

from prism_select.core.target_gradient import Target
from prism_select.directions.common_part import common_part

__all__ = ["Diagnosis", "diagnose"]

SPLITS = 200


NOISE, EVEN = (
    0.1,
    1 / 3,
)  # agreements: below the second, a direction of all pairs is more noise than signal


Floats: TypeAlias = NDArray[np.floating[Any]]


Tokens = Sequence[Sequence[int]]


@dataclass(frozen=True, kw_only=True)
class Diagnosis:
    """What the manifest says about the pairs."""

    pairs: int
    mean_preference: float
    effective_pairs: (
        float  # (Σ weight)² / Σ weight²: as many equal weights would spread as much (Kish)
    )
    common_part: float  # ‖½(C + R)‖ / ‖C − R‖
    split_half_agreement: float
    agreement_spread: tuple[float, float]  # 5% and 95% of the splits
    agreement_by_pairs: dict[int, float]  # pairs in each of the two sets → mean agreement
    pairs_for_half_agreement: int | None  # None: no agreement to extrapolate from
    preferred_share: float  # of pairs whose chosen answer the model prefers already
    chosen_longer_share: float
    mean_tokens_chosen: float
    mean_tokens_rejected: float
    token_overlap: float  # Dice coefficient of the two answers' tokens, mean over pairs
    pairs_for_half_of_direction: int | None
    shares: tuple[float, ...]  # of each pair in the direction
    covered_share: float  # of the counted weights that the pictures cover

    @property
    def dominant(self) -> list[int]:
        """The pairs, largest share first."""
        return [int(place) for place in np.argsort(-np.array(self.shares), kind="stable")]

    def in_words(self, sides: tuple[str, str] = ("chosen", "rejected")) -> list[str]:
        """What the user should know before believing the ranking; `sides` is what the two answers
        are called."""
        told = (
            [f"{self.pairs} pairs count as {self.effective_pairs:.1f}"]
            if self.effective_pairs < 5
            else []
        )
        if self.covered_share == 0:
            told.append(
                "no counted weight is the matrix of a plain linear layer: whether the pairs agree is not known"
            )
        agreement, pairs, half = (
            self.split_half_agreement,
            self.pairs,
            self.pairs_for_half_of_direction,
        )
        if not math.isnan(agreement) and agreement < EVEN:
            more = self.pairs_for_half_agreement
            wanted = f"about {more:,} pairs like these would bring that to 0.50; " if more else ""
            strength = "mostly noise" if agreement < NOISE else "more noise than signal"
            told.append(
                f"two halves of your pairs agree at {agreement:.2f}: the direction is {strength}; "
                f"{wanted}nearer negatives, --common remove or --warmup may help"
            )
        if half is not None and half <= 0.05 * pairs:
            first = ", ".join(
                f"{place + 1} ({self.shares[place]:.0%})" for place in self.dominant[:3]
            )
            told.append(f"{half} of {pairs} pairs make half of the direction: first of all {first}")
        longer, side = max(
            (self.chosen_longer_share, sides[0]), (1 - self.chosen_longer_share, sides[1])
        )
        if longer > 0.8 and pairs >= 10:
            told.append(
                f"the {side} answer is the longer one in {longer:.0%} of the pairs: length may be what they teach"
            )
        return told


def directions_of(sets: Floats, sketches: tuple[Floats, Floats], without_common: bool) -> Floats:
    """The direction of each set of pairs, up to its length; `sets` is (sets, pairs), 1 where a pair
    is in the set."""
    chosen, rejected = (sets @ side for side in sketches)
    direction = chosen - rejected
    if without_common:
        common = chosen + rejected
        size = np.square(common).sum(1, keepdims=True)
        direction = (
            direction
            - (direction * common).sum(1, keepdims=True) / np.where(size > 0, size, 1) * common
        )
    return np.asarray(direction)


def agreements(
    m: int, sketches: tuple[Floats, Floats], without_common: bool, draw: np.random.Generator
) -> Floats:
    """Cosines between the directions of `m` pairs and of `m` others, for `SPLITS` draws."""
    count = len(sketches[0])
    a, b = np.zeros((2, SPLITS, count), dtype=sketches[0].dtype)
    for split in range(SPLITS):
        order = draw.permutation(count)
        a[split, order[:m]], b[split, order[m : 2 * m]] = 1, 1
    x, y = (directions_of(sets, sketches, without_common) for sets in (a, b))
    size = np.linalg.norm(x, axis=1) * np.linalg.norm(y, axis=1)
    return np.asarray((x * y).sum(1) / np.where(size > 0, size, math.nan), dtype=np.float64)


def shares_of(sketches: tuple[Floats, Floats], without_common: bool) -> Floats:
    """Each pair's own part in the direction of all: they add up to 1."""
    every = directions_of(
        np.ones((1, len(sketches[0])), dtype=sketches[0].dtype), sketches, without_common
    )
    own = ((sketches[0] - sketches[1]) @ every[0]).astype(np.float64)
    return np.asarray(own / (own.sum() or math.nan))


def diagnose(
    sketches: tuple[Floats, Floats],
    tokens: tuple[Tokens, Tokens],
    target: Target,
    covered_share: float,
    without_common: bool,
    seed: int,
) -> Diagnosis:
    """`sketches` are of the pairs' parts in C and in R, (pairs, numbers) each; `tokens` are the
    answers' own."""
    draw = np.random.default_rng(seed)
    gap, weight = target.gap.numpy(), target.weight.numpy()
    sizes = sorted({len(gap) // parts for parts in (2, 4, 8)} - {0}, reverse=True)
    splits = {m: agreements(m, sketches, without_common, draw) for m in sizes}
    means = {m: float(np.mean(found)) for m, found in splits.items()}
    halves = splits[sizes[0]] if sizes else np.array([math.nan])
    shares = shares_of(sketches, without_common)
    longer = np.array([len(a) - len(b) for a, b in zip(*tokens, strict=True)])
    return Diagnosis(
        pairs=len(gap),
        mean_preference=float(expit(gap).mean()),
        effective_pairs=float(weight.sum() ** 2 / max(1e-300, np.square(weight).sum())),
        common_part=common_part(target),
        split_half_agreement=float(np.mean(halves)),
        agreement_spread=(float(np.quantile(halves, 0.05)), float(np.quantile(halves, 0.95))),
        agreement_by_pairs=means,
        pairs_for_half_agreement=pairs_wanted(means),
        preferred_share=float((gap > 0).mean()),
        chosen_longer_share=float((longer > 0).mean() + (longer == 0).mean() / 2),
        mean_tokens_chosen=float(np.mean([len(answer) for answer in tokens[0]])),
        mean_tokens_rejected=float(np.mean([len(answer) for answer in tokens[1]])),
        token_overlap=float(np.mean([overlap(a, b) for a, b in zip(*tokens, strict=True)])),
        pairs_for_half_of_direction=pairs_for_half(shares),
        shares=tuple(map(float, shares)),
        covered_share=covered_share,
    )


def pairs_for_half(shares: Floats) -> int | None:
    """How many pairs, largest share first, make half of the direction."""
    return None if np.isnan(shares).any() else int((np.cumsum(-np.sort(-shares)) < 0.5).sum() + 1)


def pairs_wanted(means: dict[int, float]) -> int | None:
    """How many pairs make halves that agree at ½, by 1 / (1 + κ/m)."""
    known = {m: value for m, value in means.items() if not math.isnan(value)}
    total = sum(known.values())
    if not known or total / len(known) < 0.01:
        return None
    return max(2, round(2 * sum(m * (1 - value) for m, value in known.items()) / total))


def overlap(a: Sequence[int], b: Sequence[int]) -> float:
    """Dice coefficient of two bags of tokens: 1 where they are the same in any order."""
    return 2 * (Counter(a) & Counter(b)).total() / max(1, len(a) + len(b))
