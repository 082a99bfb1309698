"""Checks: the evidence for a choice and against it.

    holds    the figure is within its threshold       review            it is not: look at it first
    failed   do not trust the choice yet              not judged yet    nothing was measured

Choices made here:
- the worst state is the headline of the page;
- bounds come from run/thresholds.py, for the run's own warnings as well.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

from prism_select.report.formatting import join_words
from prism_select.report.run_facts import RunFacts
from prism_select.run.polarity import Polarity
from prism_select.run.thresholds import (
    CHANCE_AUROC,
    DOMINANT_SHARE,
    EFFECTIVE_PAIRS,
    LENGTH_CORRELATION,
    LONGER_SHARE,
    PAIRS_FOR_LENGTH,
    TRUNCATED_SHARE,
    auroc_in_words,
    no_validation_in_words,
)

__all__ = ["Check", "State", "checks_of", "headline", "interval_state"]

State: TypeAlias = Literal["holds", "review", "failed", "not judged yet"]


@dataclass(frozen=True)
class Check:
    name: str
    state: State
    words: str


def checks_of(run: RunFacts) -> list[Check]:
    manifest = run.manifest
    return [
        _engine(manifest["engine"]),
        *_pairs(manifest["target"], run.polarity),
        _length(manifest),
        _rows(manifest["counts"]),
        *_evaluation(run),
    ]


def headline(checks: list[Check], warnings: int = 0) -> tuple[State, str]:
    """The worst state, and a sentence; `warnings` of the run stand below it."""
    by_state: dict[State, list[str]] = {}
    for check in checks:
        by_state.setdefault(check.state, []).append(check.name)
    if failed := by_state.get("failed"):
        return "failed", f"Do not trust it yet. Failed: {join_words(failed)}."
    if review := by_state.get("review"):
        return "review", f"Review before you trust it: {join_words(review)}."
    if "not judged yet" in by_state:
        return "not judged yet", "Nothing speaks against it. Whether it helps is not judged yet."
    if not warnings:
        return "holds", "Every check holds."
    return "holds", f"Every check holds; {warnings} warning{'s' * (warnings > 1)} below."


def interval_state(low: float, high: float) -> State:
    """Of a 95% interval of a gain; without bounds, or with one value for both, it shows nothing."""
    shows = low < high and not low <= 0 <= high
    return "review" if not shows else "holds" if low > 0 else "failed"


def _engine(engine: Mapping[str, Any]) -> Check:
    check = engine["check"]
    gap, bound = check["disagreement"], check["tolerance"]
    state: State = "holds" if gap is not None and gap <= bound else "failed"
    written = "no number" if gap is None else _power(gap, 1)
    return Check(
        "self-check",
        state,
        f"scores of engine {engine['name']} differ from the definition by {written} on "
        f"{check['rows']} rows; at most {_power(bound, 0)} is allowed",
    )


def _power(value: float, digits: int) -> str:
    """2.0e−7, with a minus sign: no line breaks at it."""
    return f"{value:.{digits}e}".replace("e-0", "e-").replace("-", "−")


def _pairs(target: Mapping[str, Any], polarity: Polarity) -> Iterator[Check]:
    if "pairs" not in target:
        words = "the direction was a saved one: its pairs are not known here"
        yield Check("pairs", "not judged yet", words)
        return
    yield _held_out(target)
    yield _effective_pairs(target)
    if target["pairs"] >= PAIRS_FOR_LENGTH and not target.get("answers_alone"):
        longer = target["chosen_longer_share"]
        share, side = max((longer, polarity.toward), (1 - longer, polarity.away))
        state: State = "review" if share > LONGER_SHARE else "holds"
        words = f"the {side} answer is longer in {share:.0%} of the pairs"
        yield Check("length of the answers", state, words)


def _held_out(target: Mapping[str, Any]) -> Check:
    name, found = "held-out pairs", target.get("cross_validation")
    if not found:
        return Check(name, "not judged yet", no_validation_in_words(target))
    at_chance = found["interval"][0] <= CHANCE_AUROC
    words = f"ranked with an AUROC of {auroc_in_words(found['auroc'], found['interval'])}"
    words += ": no better than chance" if at_chance else ": expect about that of the pool"
    return Check(name, "review" if at_chance else "holds", words)


def _effective_pairs(target: Mapping[str, Any]) -> Check:
    effective = target["effective_pairs"]
    first = next(iter(target["dominant_pairs"]), {"pair": 1, "share": None})
    share = first["share"] or 0.0  # None where it is not known
    state: State = "holds" if effective >= EFFECTIVE_PAIRS and share <= DOMINANT_SHARE else "review"
    words = f"the weights of {target['pairs']} pairs are worth {effective:.1f} equal ones"
    if share > DOMINANT_SHARE:
        words += f"; pair {first['pair']} alone makes {share:.0%} of the direction"
    return Check("effective pairs", state, words)


def _length(manifest: Mapping[str, Any]) -> Check:
    correlations = manifest["choice"]["rank_correlation_with_tokens"]
    value = correlations.get(manifest["config"]["normalize"])
    if value is None:
        return Check("score against length", "holds", "all rows are of one length")
    state: State = "holds" if abs(value) <= LENGTH_CORRELATION else "review"
    words = f"rank correlation {value:+.2f} with the number of supervised tokens"
    return Check("score against length", state, words)


def _rows(counts: Mapping[str, int]) -> Check:
    bad, truncated, read = counts["quarantined"], counts["truncated"], counts["read"]
    words = f"of {read:,} rows {bad:,} were quarantined and {truncated:,} truncated"
    words += "; quarantine.jsonl has the reasons" * bool(bad)
    return Check("rows", "review" if bad or truncated > TRUNCATED_SHARE * read else "holds", words)


def _evaluation(run: RunFacts) -> Iterator[Check]:
    if run.command == "score":
        return
    evaluation = run.evaluation
    if evaluation is None:
        command = f"prism evaluate {run.path} --holdout PAIRS"
        yield Check("controls", "not judged yet", f"{command} runs them")
        yield Check("does it help", "not judged yet", f"{command} finds out")
        return
    failed = [control.words for control in evaluation.controls if not control.holds]
    words = "; ".join(failed) or f"all {len(evaluation.controls)} hold"
    yield Check("controls", "failed" if failed else "holds", words)
    by_name = {baseline.name: baseline for baseline in evaluation.baselines}
    if random := by_name.get("random") or by_name.get("random-by-source"):
        state = interval_state(random.low, random.high)
        yield Check("does it help", state, f"{random.words} (gain, nats per token)")
