"""Judgement: what speaks for a choice and what against it, check by check.

    holds      what was asked is so              look        it may be well, and is worth a look
    failed     do not trust the choice yet       not tried   nobody has looked

Choices made here: the worst state is the headline; bounds are those of the diagnosis and of the
controls; one more is for a pair that makes much of the direction."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

from prism_select.report.facts import Facts
from prism_select.run.config import sides_of

__all__ = ["AGREEMENTS", "BY_LENGTH", "Check", "agreement_in_words", "checks_of", "headline"]

State: TypeAlias = Literal["holds", "look", "failed", "not tried"]


AGREEMENTS = (
    (0.1, "mostly noise"),
    (1 / 3, "more noise than signal"),
    (0.7, "more signal than noise"),
)


BY_LENGTH = 0.7


FEW = 5  # effective pairs


MOST = 0.25  # of the direction that one pair may make


@dataclass(frozen=True)
class Check:
    name: str
    state: State
    words: str


def agreement_in_words(agreement: float) -> str:
    """Two halves of the pairs, each taken alone, point the same way in so far."""
    return next((words for bound, words in AGREEMENTS if agreement < bound), "they say the same")


def checks_of(facts: Facts) -> list[Check]:
    manifest = facts.manifest
    found = [
        _engine(manifest["engine"]),
        *_pairs(manifest),
        _length(facts),
        _rows(manifest["counts"]),
    ]
    return [*found, *_evaluated(facts)]


def headline(checks: list[Check]) -> tuple[State, str]:
    """The worst state, and a sentence."""
    named: dict[str, list[str]] = {}
    for check in checks:
        named.setdefault(check.state, []).append(check.name)
    if failed := named.get("failed"):
        return "failed", f"Do not trust it yet: {_joined(failed)} failed."
    if look := named.get("look"):
        return "look", f"Look before you trust it: {_joined(look)}."
    if named.get("not tried"):
        return "not tried", "Nothing speaks against it; whether it helps has not been tried."
    return "holds", "Every check holds."


def _joined(names: list[str]) -> str:
    return names[0] if len(names) == 1 else ", ".join(names[:-1]) + " and " + names[-1]


def _engine(engine: Mapping[str, Any]) -> Check:
    check = engine["check"]
    off, bound = check["disagreement"], check["tolerance"]
    state: State = "holds" if off is not None and off <= bound else "failed"
    told = "no number" if off is None else _small(off, 1)
    allowed = f"{_small(bound, 0)} is allowed"
    words = f"engine {engine['name']} is off by {told} from the definition on {check['rows']} rows; {allowed}"
    return Check("self-check", state, words)


def _small(value: float, digits: int) -> str:
    """2.0e-7, with a minus that no line breaks at."""
    return f"{value:.{digits}e}".replace("e-0", "e-").replace("-", "−")


def _pairs(manifest: Mapping[str, Any]) -> Iterator[Check]:
    target = manifest["target"]
    if "pairs" not in target:
        yield Check(
            "pairs", "not tried", "the direction was a saved one: its pairs are not known here"
        )
        return
    agreement = target["split_half_agreement"]
    if agreement is None:
        yield Check(
            "agreement of the pairs", "not tried", f"{target['pairs']} pairs: too few to split"
        )
    else:
        state: State = "holds" if agreement >= AGREEMENTS[1][0] else "look"
        wanted = target["pairs_for_half_agreement"]
        more = (
            f"; about {wanted:,} pairs like these would bring that to 0.50"
            if wanted and agreement < 0.5
            else ""
        )
        words = f"two halves agree at {agreement:.2f}: {agreement_in_words(agreement)}{more}"
        yield Check("agreement of the pairs", state, words)
    effective = target["effective_pairs"]
    first = next(iter(target["dominant_pairs"]), {"pair": 1, "share": 0.0})
    share = first["share"] or 0.0  # None where it is not known
    state = "holds" if effective >= FEW and share <= MOST else "look"
    words = f"the weights of {target['pairs']} pairs are worth {effective:.1f} equal ones"
    if share > MOST:
        words += f"; pair {first['pair']} alone makes {share:.0%} of the direction"
    yield Check("effective pairs", state, words)
    longer = target["chosen_longer_share"]
    if target["pairs"] >= 10:
        sides = sides_of(manifest["score"]["swapped"])
        share, side = max((longer, sides[0]), (1 - longer, sides[1]))
        state = "look" if share > 0.8 else "holds"
        yield Check(
            "length of the answers",
            state,
            f"the {side} answer is the longer one in {share:.0%} of the pairs",
        )


def _length(facts: Facts) -> Check:
    told = facts.manifest["choice"]["rank_correlation_with_tokens"]
    how = facts.manifest["config"]["normalize"]
    value = told.get(how)
    if value is None:
        return Check("score against length", "holds", "all rows are of one length")
    state: State = "holds" if abs(value) <= BY_LENGTH else "look"
    return Check(
        "score against length",
        state,
        f"rank correlation {value:+.2f} with the number of learned tokens",
    )


def _rows(counts: Mapping[str, int]) -> Check:
    bad, cut = counts["quarantined"], counts["truncated"]
    words = (
        f"of {counts['read']:,} rows {bad:,} set aside, {cut:,} cut"
        + "; quarantine.jsonl says why" * bool(bad)
    )
    return Check("rows", "look" if bad or cut > 0.05 * counts["read"] else "holds", words)


def _evaluated(facts: Facts) -> Iterator[Check]:
    if facts.manifest["command"] == "score":
        return
    told = facts.evaluation
    if told is None:
        how = f"prism evaluate {facts.path} --holdout PAIRS"
        yield Check("controls", "not tried", f"they come with {how}")
        yield Check("does it help", "not tried", how)
        return
    failed = [control for control in told["controls"] if not control["holds"]]
    words = "; ".join(control["words"] for control in failed) or f"all {len(told['controls'])} hold"
    yield Check("controls", "failed" if failed else "holds", words)
    for baseline in [name for name in ("random", "random-by-source") if name in told["against"]][
        :1
    ]:
        verdict = told["against"][baseline]
        low, high = verdict["gain"]["low"], verdict["gain"]["high"]
        state: State = (
            "look"
            if low is None or high is None or low <= 0 <= high
            else "holds"
            if low > 0
            else "failed"
        )
        yield Check("does it help", state, verdict["words"] + " (gain, nats per token)")
