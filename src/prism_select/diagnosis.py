"""Diagnosis: do the pairs say one thing, and how much of what they say is shared by both answers?

    agreement(m)    cosine between the directions of two disjoint random sets of m pairs, mean over `SPLITS` draws
                    expected 1 / (1 + κ/m), κ the noise of one pair over the signal  →  halves of 2κ pairs agree at ½
    share of pair q     d_q · d / ‖d‖², which add up to 1

All from the inner products of the pairs' pictures (sketching.py), so it costs no pass of the model.

Choices made here: where the common part is taken out of the direction it is taken out of each set's own; κ is
Σ m (1 − agreement) / Σ agreement over halves, quarters and eighths, since a ratio of sums bears one small agreement.
"""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.special import expit

from prism_select.core.direction import Target

__all__ = ["Diagnosis", "diagnose"]

SPLITS = 200
NOISE, WEAK = 0.1, 0.3  # agreements below which a direction is called mostly noise, and weak

Floats = NDArray[np.float64]
Tokens = Sequence[Sequence[int]]


@dataclass(frozen=True, kw_only=True)
class Diagnosis:
    """What the manifest says about the pairs."""

    pairs: int
    mean_preference: float
    effective_pairs: float  # (Σ weight)² / Σ weight²: as many equal weights would spread as much (Kish)
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
    pairs_for_half_of_direction: int
    shares: tuple[float, ...]  # of each pair in the direction
    covered_share: float  # of the counted weights that the pictures cover

    @property
    def dominant(self) -> list[int]:
        """The pairs, largest share first."""
        return [int(place) for place in np.argsort(-np.array(self.shares), kind="stable")]

    def in_words(self) -> list[str]:
        """What the user should know before believing the ranking."""
        told = [f"only {self.effective_pairs:.1f} pairs count"] if self.effective_pairs < 5 else []
        agreement, pairs = self.split_half_agreement, self.pairs
        if not math.isnan(agreement) and agreement < WEAK:
            more = self.pairs_for_half_agreement
            advice = f"about {more} pairs like these" if more else "more pairs than these can tell"
            strength = "mostly noise" if agreement < NOISE else "weak"
            told.append(
                f"two halves of your pairs agree at {agreement:.2f}: the direction is {strength}; {advice} would bring "
                "that to 0.50, and nearer negatives, --common remove or a warm-up may help"
            )
        if self.pairs_for_half_of_direction <= 0.05 * pairs:
            first = ", ".join(f"{place + 1} ({self.shares[place]:.0%})" for place in self.dominant[:3])
            told.append(
                f"{self.pairs_for_half_of_direction} of {pairs} pairs make half of the direction: first of all {first}"
            )
        if max(self.chosen_longer_share, 1 - self.chosen_longer_share) > 0.8 and pairs >= 10:
            share = self.chosen_longer_share
            side = (
                f"chosen answer is the longer one in {share:.0%}" if share > 0.5 else f"rejected one in {1 - share:.0%}"
            )
            told.append(f"the {side} of the pairs: length may be what they teach")
        return told


@dataclass(frozen=True)
class Products:
    """Inner products of the pairs' pictures: of d = C − R and of c = ½(C + R)."""

    dd: Floats
    dc: Floats
    cc: Floats
    without_common: bool

    @classmethod
    def of(cls, chosen: Floats, rejected: Floats, without_common: bool) -> "Products":
        d, c = chosen - rejected, (chosen + rejected) / 2
        return cls(d @ d.T, d @ c.T, c @ c.T, without_common)

    def taken(self, a: Floats) -> float:
        """How much of its own common part the direction of the pairs in `a` loses."""
        size = float(a @ self.cc @ a)
        return float(a @ self.dc @ a) / size if self.without_common and size else 0.0

    def dot(self, a: Floats, b: Floats) -> float:
        """Between the directions of two sets of pairs, given as 0 and 1 per pair."""
        x, y = self.taken(a), self.taken(b)
        return float(a @ self.dd @ b - y * (a @ self.dc @ b) - x * (b @ self.dc @ a) + x * y * (a @ self.cc @ b))

    def cosine(self, a: Floats, b: Floats) -> float:
        size = math.sqrt(max(0.0, self.dot(a, a)) * max(0.0, self.dot(b, b)))
        return self.dot(a, b) / size if size else math.nan

    def agreements(self, m: int, draw: np.random.Generator) -> Floats:
        found = []
        for _ in range(SPLITS):
            order = draw.permutation(len(self.dd))
            a, b = np.zeros((2, len(self.dd)))
            a[order[:m]], b[order[m : 2 * m]] = 1.0, 1.0
            found.append(self.cosine(a, b))
        return np.array(found)

    def shares(self) -> Floats:
        every = np.ones(len(self.dd))
        x = self.taken(every)
        own = self.dd @ every - x * (self.dc @ every + self.dc.T @ every) + x * x * (self.cc @ every)
        return np.asarray(own / (own.sum() or math.nan))


def diagnose(
    pictures: tuple[Floats, Floats],
    tokens: tuple[Tokens, Tokens],
    target: Target,
    covered_share: float,
    without_common: bool,
    seed: int,
) -> Diagnosis:
    """`pictures` are of the pairs' parts in C and in R, (pairs, numbers) each; `tokens` are the answers' own."""
    products, draw = Products.of(*pictures, without_common), np.random.default_rng(seed)
    gap, weight = target.gap.numpy(), target.weight.numpy()
    sizes = sorted({len(gap) // parts for parts in (2, 4, 8)} - {0}, reverse=True)
    splits = {m: products.agreements(m, draw) for m in sizes}
    means = {m: float(np.mean(found)) for m, found in splits.items()}
    halves = splits[sizes[0]] if sizes else np.array([math.nan])
    shares = products.shares()
    longer = np.array([len(a) - len(b) for a, b in zip(*tokens, strict=True)])
    return Diagnosis(
        pairs=len(gap),
        mean_preference=float(expit(gap).mean()),
        effective_pairs=float(weight.sum() ** 2 / max(1e-300, np.square(weight).sum())),
        common_part=target.common_part,
        split_half_agreement=float(np.mean(halves)),
        agreement_spread=(float(np.quantile(halves, 0.05)), float(np.quantile(halves, 0.95))),
        agreement_by_pairs=means,
        pairs_for_half_agreement=pairs_wanted(means),
        preferred_share=float((gap > 0).mean()),
        chosen_longer_share=float((longer > 0).mean() + (longer == 0).mean() / 2),
        mean_tokens_chosen=float(np.mean([len(answer) for answer in tokens[0]])),
        mean_tokens_rejected=float(np.mean([len(answer) for answer in tokens[1]])),
        token_overlap=float(np.mean([overlap(a, b) for a, b in zip(*tokens, strict=True)])),
        pairs_for_half_of_direction=int(np.searchsorted(np.cumsum(-np.sort(-shares)), 0.5) + 1),
        shares=tuple(map(float, shares)),
        covered_share=covered_share,
    )


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
