"""Pair diagnostics: do the pairs agree, and how much of their gradient do both answers share?

    agreement(m)      cosine between the directions of two disjoint random sets of m pairs, mean
                      over `SPLITS` draws; split-half agreement: m is half of the pairs
    expected          1 / (1 + κ/m), κ: the noise of one pair over the signal; so halves of 2κ pairs
                      agree at ½
    share of pair q   d_q · d / ‖d‖², which add up to 1

With an agreement a between halves, the direction of all pairs has the cosine √(2a / (1 + a)) with
that of infinitely many.

Choices made here:
- everything comes from the products of answers (answer_products.py), so it costs no pass of the
  model;
- agreement is that of first-order directions, and shares are of the direction in use;
- where the common part is removed from the direction, each set of pairs loses its own;
- κ = Σ m (1 − agreement) / Σ agreement over halves, quarters and eighths, since a ratio of sums
  bears one small agreement.
"""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray
from scipy.special import expit

from prism_select.core.gains import Slopes
from prism_select.core.target_gradient import Target
from prism_select.run.polarity import Polarity
from prism_select.run.thresholds import (
    EFFECTIVE_PAIRS,
    EVEN_AGREEMENT,
    HALF_OF_DIRECTION,
    LONGER_SHARE,
    PAIRS_FOR_LENGTH,
    TARGET_AGREEMENT,
    agreement_in_words,
)

__all__ = ["Diagnosis", "diagnose"]

SPLITS = 200

Floats: TypeAlias = NDArray[np.floating[Any]]
BothTokens: TypeAlias = tuple[Sequence[Sequence[int]], Sequence[Sequence[int]]]


@dataclass(frozen=True)
class PairWeights:
    """Inner products of the gradients of all answers, chosen first, and what each pair counts: by
    the slopes of the gain, and in the direction in use."""

    products: NDArray[np.float64]
    first_order: Slopes
    slopes: Slopes


@dataclass(frozen=True, kw_only=True)
class Diagnosis:
    """What the manifest says of the pairs."""

    pairs: int
    mean_preference: float
    effective_pairs: float  # Kish: (Σ weight)² / Σ weight²
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
    truncated_chosen: int = 0  # answers that lost their end to --max-length
    truncated_rejected: int = 0
    answers_alone: bool = False  # some pairs have one answer: comparisons of both are unknown

    @property
    def without_comparisons(self) -> "Diagnosis":
        """That of pairs of which some have one answer."""
        return replace(
            self,
            answers_alone=True,
            mean_preference=math.nan,
            preferred_share=math.nan,
            common_part=math.nan,
            token_overlap=math.nan,
            chosen_longer_share=math.nan,
            mean_tokens_chosen=math.nan,
            mean_tokens_rejected=math.nan,
        )

    @property
    def dominant(self) -> list[int]:
        """Indices of the pairs, largest share first."""
        return [int(index) for index in np.argsort(-np.array(self.shares), kind="stable")]

    def in_words(self, polarity: Polarity) -> list[str]:
        """Warnings, a line each."""
        lines = []
        if self.truncated_chosen or self.truncated_rejected:
            counts = {"chosen": self.truncated_chosen, "rejected": self.truncated_rejected}
            if polarity.swapped:
                counts = dict(zip(counts, reversed(counts.values()), strict=True))
            lines.append(
                f"of {self.pairs} pairs {counts['chosen']} chosen and {counts['rejected']} "
                "rejected answers are truncated: length and ending may be what they teach; raise "
                "--max-length"
            )
        if self.effective_pairs < EFFECTIVE_PAIRS:
            lines.append(f"{self.pairs} pairs count as {self.effective_pairs:.1f}")
        if self.split_half_agreement < EVEN_AGREEMENT:  # NaN is not below
            lines.append(self._noise())
        half = self.pairs_for_half_of_direction
        if half is not None and half <= HALF_OF_DIRECTION * self.pairs:
            largest = [f"{pair + 1} ({self.shares[pair]:.0%})" for pair in self.dominant[:3]]
            lines.append(
                f"{half} of {self.pairs} pairs make half of the direction: first of all "
                f"{', '.join(largest)}"
            )
        share, side = max(
            (self.chosen_longer_share, polarity.toward),
            (1 - self.chosen_longer_share, polarity.away),
        )
        if share > LONGER_SHARE and self.pairs >= PAIRS_FOR_LENGTH:
            lines.append(
                f"the {side} answer is the longer one in {share:.0%} of the pairs: length may be "
                "what they teach"
            )
        return lines

    def _noise(self) -> str:
        agreement, pairs = self.split_half_agreement, self.pairs_for_half_agreement
        needed = (
            f"about {pairs:,} pairs like these would bring that to {TARGET_AGREEMENT:.2f}; "
            if pairs
            else ""
        )
        return (
            f"two halves of your pairs agree at {agreement:.2f}: the direction is "
            f"{agreement_in_words(agreement)}; {needed}"
            "closer negatives, --common remove or --warmup may help"
        )


def diagnose(
    target: Target,
    pairs: PairWeights,
    tokens: BothTokens,
    without_common: bool,
    seed: int,
) -> Diagnosis:
    """`tokens` are the supervised ones of the chosen and of the rejected answers.
    `without_common`: the run takes the common part out."""
    draw = np.random.default_rng(seed)
    gap, weight = target.gap.numpy(), target.weight.numpy()
    sizes = sorted({len(gap) // sets for sets in (2, 4, 8)} - {0}, reverse=True)
    splits = {m: agreements(m, pairs, without_common, draw) for m in sizes}
    means = {m: float(np.mean(cosines)) for m, cosines in splits.items()}
    halves = splits[sizes[0]] if sizes else np.array([math.nan])
    shares = shares_of(pairs, without_common)
    chosen, rejected = tokens
    longer = np.array([len(a) - len(b) for a, b in zip(chosen, rejected, strict=True)])
    overlaps = [overlap(a, b) for a, b in zip(chosen, rejected, strict=True)]
    return Diagnosis(
        pairs=len(gap),
        mean_preference=float(expit(gap).mean()),
        effective_pairs=float(weight.sum() ** 2 / max(1e-300, np.square(weight).sum())),
        common_part=common_part(pairs),
        split_half_agreement=float(np.mean(halves)),
        agreement_spread=(float(np.quantile(halves, 0.05)), float(np.quantile(halves, 0.95))),
        agreement_by_pairs=means,
        pairs_for_half_agreement=pairs_to_agree(means),
        preferred_share=float((gap > 0).mean()),
        chosen_longer_share=float((longer > 0).mean() + (longer == 0).mean() / 2),
        mean_tokens_chosen=float(np.mean([len(answer) for answer in chosen])),
        mean_tokens_rejected=float(np.mean([len(answer) for answer in rejected])),
        token_overlap=float(np.mean(overlaps)),
        pairs_for_half_of_direction=pairs_for_half(shares),
        shares=tuple(map(float, shares)),
    )


def common_part(pairs: PairWeights) -> float:
    """NaN where the direction is zero."""
    chosen, rejected = (slope.numpy() for slope in pairs.slopes)
    difference, total = (np.concatenate([chosen, sign * rejected])[None] for sign in (-1, 1))
    length = float(dots(difference, pairs.products, difference)[0])
    common = float(dots(total, pairs.products, total)[0]) / 4
    return math.sqrt(max(0.0, common) / length) if length > 0 else math.nan


def agreements(
    m: int, pairs: PairWeights, without_common: bool, draw: np.random.Generator
) -> Floats:
    """Cosines between the directions of `m` pairs and of `m` others, for `SPLITS` draws."""
    count = len(pairs.products) // 2
    a, b = np.zeros((2, SPLITS, count))
    for split in range(SPLITS):
        order = draw.permutation(count)
        a[split, order[:m]], b[split, order[m : 2 * m]] = 1, 1
    x, y = (
        directions_of(sets, pairs.products, pairs.first_order, without_common) for sets in (a, b)
    )
    size = np.sqrt(dots(x, pairs.products, x) * dots(y, pairs.products, y))
    return np.asarray(dots(x, pairs.products, y) / np.where(size > 0, size, math.nan))


def dots(x: Floats, products: Floats, y: Floats) -> Floats:
    """Inner products of directions, row by row, that are given as sums over answers."""
    return np.asarray(((x @ products) * y).sum(1))


def directions_of(sets: Floats, products: Floats, slopes: Slopes, without_common: bool) -> Floats:
    """The direction of each set of pairs as a sum over answers, up to its length; `sets` is
    (sets, pairs), 1 where a pair is in the set."""
    chosen, rejected = (sets * slope.numpy() for slope in slopes)
    direction = np.concatenate([chosen, -rejected], axis=1)
    if without_common:
        common = np.concatenate([chosen, rejected], axis=1)
        square = dots(common, products, common)
        times = dots(direction, products, common) / np.where(square > 0, square, 1)
        direction = direction - times[:, None] * common
    return np.asarray(direction)


def shares_of(pairs: PairWeights, without_common: bool) -> Floats:
    """Each pair's share of the direction of all: they add up to 1."""
    count = len(pairs.products) // 2
    everything = np.ones((1, count))
    direction = directions_of(everything, pairs.products, pairs.slopes, without_common)[0]
    own = direction * (pairs.products @ direction)
    shares = own[:count] + own[count:]
    return np.asarray(shares / (shares.sum() or math.nan))


def pairs_for_half(shares: Floats) -> int | None:
    """How many pairs, largest share first, make half of the direction."""
    return None if np.isnan(shares).any() else int((np.cumsum(-np.sort(-shares)) < 0.5).sum() + 1)


def pairs_to_agree(means: dict[int, float]) -> int | None:
    """How many pairs make halves that agree at ½, from the mean agreement of sets of m pairs; None
    below a mean of 0.01."""
    finite = {m: value for m, value in means.items() if not math.isnan(value)}
    total = sum(finite.values())
    if not finite or total / len(finite) < 0.01:
        return None
    return max(2, round(2 * sum(m * (1 - value) for m, value in finite.items()) / total))


def overlap(a: Sequence[int], b: Sequence[int]) -> float:
    """Dice coefficient of two bags of tokens: 1 where they are the same in any order."""
    return 2 * (Counter(a) & Counter(b)).total() / max(1, len(a) + len(b))
