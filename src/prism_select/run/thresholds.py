"""Thresholds: the bounds at which a figure of a run becomes a warning or a verdict in words.

    split-half agreement    mostly noise | 0.1 | more noise than signal | ⅓ | more signal than noise
                            | 0.7 | mostly signal

Choices made here:
- a bound stands here once: warnings, checks of the report and controls all read it;
- the middle bound of agreement follows from its expectation 1 / (1 + κ/m) for halves of m pairs:
  at ⅓ all 2m pairs together have as much signal as noise.
"""

from collections.abc import Mapping, Sequence
from typing import Any

__all__ = [
    "CHANCE_AUROC",
    "CHANCE_CORRELATION",
    "CONFLICTING_COSINE",
    "CONTROL_SHARE_OF_OVERLAP",
    "DOMINANT_SHARE",
    "EFFECTIVE_PAIRS",
    "EVEN_AGREEMENT",
    "HALF_OF_DIRECTION",
    "HARDLY_HELPED",
    "LENGTH_CORRELATION",
    "LONGER_SHARE",
    "NOISE_AGREEMENT",
    "PAIRS_FOR_LENGTH",
    "REPEATED_CORRELATION",
    "ROWS_OF_SOURCE",
    "SILHOUETTE",
    "STRONG_AGREEMENT",
    "SWAPPED_CORRELATION",
    "TARGET_AGREEMENT",
    "TRUNCATED_SHARE",
    "UNCOVERED",
    "UNSEARCHED_SHARE",
    "WORSE_QUESTIONS",
    "agreement_in_words",
    "auroc_in_words",
    "no_validation_in_words",
]

# Pairs
CHANCE_AUROC = 0.5  # in the interval of held-out pairs, or above it: they are ranked at chance
NOISE_AGREEMENT = 0.1  # below: the direction is mostly noise
EVEN_AGREEMENT = 1 / 3  # below: a direction of all pairs is more noise than signal
STRONG_AGREEMENT = 0.7  # from here on: mostly signal
TARGET_AGREEMENT = 0.5  # the agreement that `pairs_for_half_agreement` would reach
EFFECTIVE_PAIRS = 5  # fewer, and the weights rest on too few pairs
DOMINANT_SHARE = 0.25  # of the direction: more than one pair should make
HALF_OF_DIRECTION = 0.05  # so small a share of the pairs makes half of the direction: a warning
LONGER_SHARE = 0.8  # of the pairs with the same side longer: length may be what they teach
PAIRS_FOR_LENGTH = 10  # fewer pairs say nothing about length
HARDLY_HELPED = 0.1  # of the pairs' mean help by a choice: a pair that gets less
UNCOVERED = 0.05  # of a direction's length, missing in products of gradients: a warning
WORSE_QUESTIONS = 10  # fewer, and a fine-tuning has hardly gone wrong, or too little was asked
SILHOUETTE = 0.1  # of the pairs' gradients in groups: below, no number of them is clear
CONFLICTING_COSINE = -0.1  # below: the directions of two targets conflict

# Rows
LENGTH_CORRELATION = 0.7  # rank correlation of scores with supervised tokens, either sign
TRUNCATED_SHARE = 0.05  # of the rows: more is worth a review
UNSEARCHED_SHARE = 0.05  # of the chosen rows that a cascade did not search for: more is a warning
ROWS_OF_SOURCE = 10  # scored rows that a source needs before its mean is told

# Controls
REPEATED_CORRELATION = 0.9  # the same pairs scored again: at least
SWAPPED_CORRELATION = -0.5  # chosen and rejected exchanged: at most
CHANCE_CORRELATION = 0.4  # shuffled pairs and random directions, either sign: at most
CONTROL_SHARE_OF_OVERLAP = 1 / 3  # of the way from chance to the same rows, for resampled pairs


def auroc_in_words(auroc: float, interval: Sequence[float]) -> str:
    """0.82 [0.67, 0.92]"""
    low, high = interval
    return f"{auroc:.2f} [{low:.2f}, {high:.2f}]"


def no_validation_in_words(target: Mapping[str, Any]) -> str:
    """Why `target` of a manifest says nothing of held-out pairs."""
    if target.get("answers_alone"):
        return "not known: answers without rejected ones have none to be ranked above"
    return "too few questions for cross-validation"


def agreement_in_words(agreement: float) -> str:
    """What a split-half agreement says about the direction of all pairs."""
    if agreement < NOISE_AGREEMENT:
        return "mostly noise"
    if agreement < EVEN_AGREEMENT:
        return "more noise than signal"
    return "more signal than noise" if agreement < STRONG_AGREEMENT else "mostly signal"
