"""Words: what the page says beside its pictures, a sentence or two for each section.

Choices made here: a number stands in a sentence before it stands in a picture, so the page can be
read aloud; answers are called as in the target file, also where a repair swaps them."""

from collections.abc import Iterator, Mapping
from typing import Any

from prism_select.report.checks import agreement_in_words
from prism_select.report.facts import Facts
from prism_select.report.page import percent, significant
from prism_select.report.scores_table import TAKEN
from prism_select.run.config import sides_of

__all__ = [
    "captions",
    "examples_words",
    "influence",
    "layers_words",
    "pairs_words",
    "sentence",
    "spread_words",
    "target_words",
    "tiles",
]


def sentence(facts: Facts) -> str:
    counts, command = facts.manifest["counts"], facts.manifest["command"]
    if command == "score":
        return f"{counts['scored']:,} rows were scored"
    taken, read = counts[TAKEN[command]], counts["read"]
    return f"{taken:,} of {read:,} rows were {TAKEN[command]}, {percent(taken / max(1, read))}"


def influence(facts: Facts) -> str:
    """What a score above 0 is called: in a repair it is the harm that a row does."""
    return "harmful" if facts.swapped else "positive"


def tiles(facts: Facts) -> Iterator[tuple[str, str, str]]:
    m = facts.manifest
    counts, config = m["counts"], m["config"]
    yield (
        "rows read",
        f"{counts['read']:,}",
        f"{counts['quarantined']:,} set aside, {counts['truncated']:,} cut",
    )
    if m["command"] != "score":
        taken = TAKEN[m["command"]]
        budget = config["budget"] if m["command"] == "select" else config["remove"]
        yield taken, f"{counts[taken]:,}", f"the budget was {budget}"
        over = facts.columns.passed_over
        yield (
            "cut-off",
            significant(facts.columns.cutoff),
            f"{facts.columns.by.replace('_', ' ')} of the last row"
            + (f"; {over:,} above it passed over" if over else ""),
        )
        if facts.spread:
            yield (
                f"{influence(facts)} influence",
                percent(facts.spread.bought),
                f"of all is in the rows {taken}",
            )
    if "pairs" in m["target"]:
        agreement = m["target"]["split_half_agreement"]
        words = "" if agreement is None else agreement_in_words(agreement)
        yield "halves agree", significant(agreement, 2), words
    if labels := m["choice"].get("labels"):
        yield (
            "AUROC of the ranking",
            significant(labels["auroc"]),
            f"{labels['bad']:,} of {labels['rows']:,} rows are known to be bad",
        )


def target_words(m: Mapping[str, Any]) -> str:
    target = m["target"]
    side, other = sides_of(m["score"]["swapped"])
    told = f"{target['pairs']} pairs, worth {significant(target['effective_pairs'])} equal ones. Before any training the "
    told += f"model prefers the {side} answer in {percent(target['preferred_share'])} of them; the mean preference is "
    told += f"{significant(target['mean_preference'])}. "
    agreement = target["split_half_agreement"]
    if agreement is not None:
        told += (
            f"Two halves of the pairs agree at {agreement:.2f}: {agreement_in_words(agreement)}. "
        )
    told += f"What both answers share is {significant(target['common_part'], 2)} times what tells them apart."
    if m["score"]["swapped"]:
        told += f" This is a repair: it looks for rows that teach the {side} answers, in place of the {other} ones."
    return told


def pairs_words(facts: Facts) -> str:
    target = facts.target
    if not target:
        return ""
    some = (
        f"The {len(target.pairs)} of {target.count} with the largest"
        if len(target.pairs) < target.count
        else "Their"
    )
    told = f"{some} shares in the direction: a few pairs with large ones decide for all. "
    half = facts.manifest["target"].get("pairs_for_half_of_direction")
    told += f"{half} of {target.count} pairs make half of it. " if half else ""
    told += (
        f"Answers are not shown: {target.without_answers}."
        if target.without_answers
        else "A row opens to both answers."
    )
    return told


def spread_words(facts: Facts) -> str:
    if not facts.spread:
        return ""
    m = facts.manifest
    aim = sides_of(m["score"]["swapped"])[0]
    told = f"A positive score means that training on the row moves the model towards the {aim} answers; "
    told += f"{percent(facts.spread.positive)} of the rows have one. "
    if facts.spread.bought == facts.spread.bought:
        told += f"The rows {TAKEN[m['command']]} have {percent(facts.spread.bought)} of all {influence(facts)} influence."
    return told


def examples_words(facts: Facts) -> str:
    groups = dict.fromkeys(row.group for row in facts.rows)
    if set(groups) <= {"top", "below the cut-off"}:
        told = f"All {len(facts.rows)} scored rows. "
    else:
        told = f"{len(facts.rows)} rows of the ranking: {', '.join(groups)}. "
    return (
        told
        + "A row opens to its text"
        + (
            ", its learned tokens coloured by what each adds."
            if any(row.tokens for row in facts.rows)
            else "."
        )
    )


def layers_words(facts: Facts) -> str:
    sums: dict[str, float] = {}
    for share in facts.layers:
        sums[share.part] = sums.get(share.part, 0.0) + share.share
    most = sorted(sums, key=lambda part: -sums[part])[:3]
    told = ", ".join(f"{part} ({percent(sums[part])})" for part in most)
    return f"Most of the direction's squared norm lies in {told}. That is where training would move the model most."


def captions(facts: Facts) -> dict[str, str]:
    sides = sides_of(facts.manifest["score"]["swapped"])
    beyond = facts.spread.histogram.beyond if facts.spread else 0
    far = f" The outer bars also hold {beyond:,} rows that lie beyond." if beyond else ""
    weights = {
        "prism": "A pair weighs as much as its preference.",
        "hard": "A pair weighs 1 − its preference.",
    }
    weight = weights.get(facts.scored_by["weighting"], "All pairs weigh alike.")
    return {
        "preferences": f"Each pair's preference for the {sides[0]} answer. {weight}",
        "agreement": "Where the line is still rising, more pairs would help.",
        "cosines": "Below 0, two targets pull apart.",
        "spread": f"The dashed line is the cut-off.{far}",
        "sources": "The line reaches from 5% to 95% of a source's rows, the bar over its middle half; the notch is the "
        "median.",
        "halves": f"The score is their difference: on the dashed diagonal it is 0. Rows high up raise the {sides[0]} "
        f"answers; far to the right they raise the {sides[1]} ones as well.",
        "cumulative": f"What of all {influence(facts)} influence the first rows have. The diamond is the choice.",
        "layers": "Embeddings first, then block by block.",
        "intervals": "Right of the line the choice is better; an interval that crosses it shows nothing.",
        "curves": "Mean over seeds, on pairs that the run has not seen.",
        "forecast": "One mark for each training. Scores that forecast put them on a rising line.",
    }
