"""Target: the pairs, their preferences, their agreement, and their shares in the direction.

    preference π = 1 / (1 + exp(−gap))     share of pair q = d_q · d / ‖d‖²

Choices made here: the `PAIRS` pairs with the largest shares are shown, of either sign.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import altair as alt
import numpy as np
import pyarrow.parquet as pq

from prism_select.data.formats import parse_fields
from prism_select.data.records import Example, Pair
from prism_select.data.targets import read_targets
from prism_select.report.charts import (
    INK,
    NEGATIVE,
    SELECTED,
    Chart,
    chart_of,
    inline_data,
    rule_at,
)
from prism_select.report.formatting import percent, significant
from prism_select.report.pool_rows import ShownTurn, shown_turns
from prism_select.report.run_facts import RunFacts, scoring_options
from prism_select.report.sections.section import Section
from prism_select.report.tables import PREVIEW, Column, Table
from prism_select.run.errors import PrismError
from prism_select.run.thresholds import (
    TARGET_AGREEMENT,
    agreement_in_words,
    auroc_in_words,
    no_validation_in_words,
)

__all__ = ["PAIRS", "SECTION", "NamedTarget", "ShownPair", "TargetFacts", "read"]

PAIRS = 200
WRITTEN = 12  # targets whose cosines are written in the cells

WEIGHTS = {
    "prism": "The weight of a pair is its preference.",
    "hard": "The weight of a pair is 1 − its preference.",
}


@dataclass(frozen=True)
class ShownPair:
    """A pair of the target, counted from 1; answers have the names of the target file. `share` is
    its share in the direction, or NaN."""

    number: int
    target: str
    prompt: str
    preference: float
    gap: float
    weight: float
    share: float
    line: int
    chosen: tuple[ShownTurn, ...] = ()
    rejected: tuple[ShownTurn, ...] = ()


@dataclass(frozen=True)
class NamedTarget:
    """One of several targets."""

    name: str
    pairs: int
    mean_preference: float
    effective_pairs: float
    split_half_agreement: float | None


@dataclass(frozen=True)
class TunedOption:
    """The chosen value, and the AUROC of held-out pairs with each value and all else as chosen."""

    name: str
    chosen: str
    values: tuple[tuple[str, float], ...]


@dataclass(frozen=True)
class TargetFacts:
    """`preferences` are of all pairs, `pairs` are shown; `agreements` are by
    the number of pairs in each half; `cosines` are between the directions of `targets`."""

    words: str
    pair_words: str
    weight_words: str
    side: str
    pairs: tuple[ShownPair, ...]
    preferences: tuple[float, ...]
    agreements: Mapping[int, float]
    pairs_for_half_agreement: int | None
    targets: tuple[NamedTarget, ...]
    cosines: tuple[tuple[float | None, ...], ...]
    held_out: tuple[tuple[float, ...], tuple[float, ...]]
    other: str
    tuning: tuple[TunedOption, ...] = ()
    tuning_words: str = ""


def read(run: RunFacts) -> TargetFacts | None:
    """None for a saved direction."""
    if not (run.path / "pairs.parquet").exists():
        return None
    records = pq.read_table(run.path / "pairs.parquet").to_pylist()
    options, target = scoring_options(run.manifest), run.manifest["target"]
    answers, why = _answers(options, records)
    gaps = np.array([record["gap"] for record in records], dtype=np.float64)
    preferences = (1 / (1 + np.exp(-np.clip(gaps, -700, 700)))).tolist()
    shares = [math.nan if r["share"] is None else float(r["share"]) for r in records]
    first = np.argsort(-np.abs(np.nan_to_num(shares)), kind="stable")[:PAIRS].tolist()
    return TargetFacts(
        words=_words(run),
        pair_words=_pair_words(target, len(first), len(records), why),
        weight_words=WEIGHTS.get(options["weighting"], "All pairs have the same weight."),
        side=run.polarity.toward,
        pairs=tuple(
            _shown_pair(i, records[i], preferences[i], shares[i], answers[i] if answers else None)
            for i in first
        ),
        preferences=tuple(value for value in preferences if math.isfinite(value)),
        agreements={int(m): a for m, a in target["agreement_by_pairs"].items() if a is not None},
        pairs_for_half_agreement=target["pairs_for_half_agreement"],
        targets=tuple(_named_target(name, t) for name, t in target.get("targets", {}).items()),
        cosines=tuple(map(tuple, target.get("cosines", ()))),
        held_out=_held_out(records),
        other=run.polarity.away,
        tuning=tuple(_tuned_options(run.manifest.get("tuning"))),
        tuning_words=_tuning_words(run.manifest.get("tuning")),
    )


FIGURES = ("auroc", "standard_error")  # of a line of `tuning`; the rest are options


def _tuned_options(tuning: Mapping[str, Any] | None) -> Iterator[TunedOption]:
    if not tuning:
        return
    names = [name for name in tuning["chosen"] if name not in FIGURES]
    both = {"curvature", "damping"}  # a flat curvature has none
    options = [(n,) for n in names if n not in both] + [tuple(n for n in names if n in both)]
    for option in filter(None, options):
        others = [name for name in names if name not in option]
        chosen = tuning["chosen"]
        values = {
            _value(line, option): line["auroc"]
            for line in tuning["tried"]
            if all(line[name] == chosen[name] for name in others)
        }
        yield TunedOption(" and ".join(option), _value(chosen, option), tuple(values.items()))


def _value(line: Mapping[str, Any], option: Sequence[str]) -> str:
    if line.get("curvature") == "flat":
        option = [name for name in option if name != "damping"]
    return " ".join(f"{line[name]:g}" if name == "damping" else line[name] for name in option)


def _tuning_words(tuning: Mapping[str, Any] | None) -> str:
    if not tuning:
        return ""
    chosen, first, tried = tuning["chosen"]["auroc"], tuning["tried"][0]["auroc"], tuning["tried"]
    words = (
        f"{len(tried)} ways were tried by cross-validation on the pairs. "
        f"With the defaults held-out pairs have an AUROC of {first:.3f}, in the best way "
        f"{tuning['best']['auroc']:.3f}, and in the chosen one {chosen:.3f}: "
    )
    words += (
        "no way was better than the defaults beyond chance."
        if tuning["chosen"] == tried[0]
        else "the simplest within one standard error of the best."
    )
    return words + (
        " The figure for held-out pairs above is of nested folds, so that choosing adds nothing to "
        "it."
    )


def _held_out(records: Sequence[Mapping[str, Any]]) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Scores of held-out answers of both sides; empty without cross-validation."""
    names = ("held_out_chosen", "held_out_rejected")
    chosen, rejected = (
        tuple(float(r[name]) for r in records if r.get(name) is not None) for name in names
    )
    return chosen, rejected


def _named_target(name: str, target: Mapping[str, Any]) -> NamedTarget:
    keys = ("pairs", "mean_preference", "effective_pairs", "split_half_agreement")
    return NamedTarget(name, *(target[key] for key in keys))


def _shown_pair(
    index: int, record: Mapping[str, Any], preference: float, share: float, answers: Pair | None
) -> ShownPair:
    return ShownPair(
        number=index + 1,
        target=record["target"],
        prompt=record["prompt"],
        preference=preference,
        gap=float(record["gap"]),
        weight=float(record["weight"]),
        share=share,
        line=int(record["line"]),
        chosen=_answer(answers.chosen) if answers else (),
        rejected=_answer(answers.rejected) if answers and not answers.alone else (),
    )


def _answer(example: Example) -> tuple[ShownTurn, ...]:
    turns = example.turns[example.prompt_turns :]
    return tuple(shown_turns((turn.role, turn.shown) for turn in turns))


def _answers(
    options: Mapping[str, Any], records: Sequence[Mapping[str, Any]]
) -> tuple[list[Pair], str]:
    """The pairs of the target files in the order of `records`, or why they cannot be had."""
    fields = parse_fields(options["fields"])
    try:
        unpaired = options["weighting"] == "unpaired"
        targets = read_targets(options["target"], fields, options["target_by"], unpaired)
    except PrismError as error:
        return [], str(error)
    pairs = [pair for target in targets.values() for pair in target]
    if [_key(pair) for pair in pairs] == [(r["line"], r["prompt"]) for r in records]:
        return pairs, ""
    return [], "the target's files have changed since the run"


def _key(pair: Pair) -> tuple[int, str]:
    prompt = "\n".join(turn.text for turn in pair.chosen.turns[: pair.chosen.prompt_turns])
    return pair.chosen.line, prompt


def _words(run: RunFacts) -> str:
    target, side, other = run.manifest["target"], run.polarity.toward, run.polarity.away
    alone = target.get("answers_alone")
    words = _expectation(target)
    words += f"{target['pairs']} {'answers' if alone else 'pairs'}, worth "
    words += f"{significant(target['effective_pairs'])} of equal weight. "
    if not alone:
        words += f"Before training the model prefers the {side} answer in "
        words += f"{percent(target['preferred_share'])} of them, and its mean preference is "
        words += f"{significant(target['mean_preference'])}. "
    agreement = target["split_half_agreement"]
    if agreement is not None:
        words += f"Two halves of the pairs agree at {agreement:.2f}: "
        words += f"{agreement_in_words(agreement)}. "
    if not alone:
        words += "The gradient that both answers share is "
        words += f"{significant(target['common_part'], 2)} times as large as their difference."
    if run.polarity.swapped:
        words += f" This is a repair: it looks for rows that teach the {side} answers instead of "
        words += f"the {other} ones."
    return words


def _expectation(target: Mapping[str, Any]) -> str:
    found = target.get("cross_validation")
    if not found:
        alone = target.get("answers_alone")
        return f"Held-out pairs: {no_validation_in_words(target)}. " if alone else ""
    words = (
        "Held-out pairs are ranked with an AUROC of "
        f"{auroc_in_words(found['auroc'], found['interval'])}: expect a ranking of about that "
        "quality. "
    )
    if "planted_recall" in found:
        words += (
            f"The budget would take {percent(found['planted_recall'])} of their wanted answers. "
        )
    return words


def _pair_words(target: Mapping[str, Any], shown: int, count: int, why: str) -> str:
    words = (
        f"The {shown} of {count} pairs with the largest shares of the direction."
        if shown < count
        else "All pairs, with their shares of the direction."
    )
    words += " A few pairs with large shares decide the ranking."
    if half := target.get("pairs_for_half_of_direction"):
        words += f" {half} of {count} pairs make half of the direction."
    return words + (
        f" Answers are not shown: {why}." if why else " Open a row to read both answers."
    )


def charts(facts: TargetFacts) -> list[Chart]:
    drawn = [preference_chart(facts)] if facts.preferences else []
    if facts.held_out[0]:
        drawn.insert(0, held_out_chart(facts))
    if len(facts.agreements) > 1:
        drawn.append(agreement_chart(facts))
    if facts.cosines:
        drawn.append(cosine_chart(facts))
    return drawn


def held_out_chart(facts: TargetFacts) -> Chart:
    """Number of held-out answers of each side by their score, in 24 steps."""
    sides = dict(zip((facts.side, facts.other), facts.held_out, strict=True))
    edges = np.histogram_bin_edges([*facts.held_out[0], *facts.held_out[1]], 24)
    rows = [
        {"from": float(edges[i]), "to": float(edges[i + 1]), "answers": count, "side": side}
        for side, scores in sides.items()
        for i, count in enumerate(np.histogram(scores, edges)[0].tolist())
    ]
    colours = alt.Scale(domain=[*sides], range=[SELECTED, NEGATIVE])
    bars = (
        alt.Chart(inline_data(rows))
        .mark_bar(opacity=0.6, binSpacing=1)
        .encode(
            alt.X("from:Q", bin="binned", title="score of a held-out answer"),
            alt.X2("to:Q"),
            alt.Y("answers:Q", stack=None, title="answers", axis=alt.Axis(tickMinStep=1)),
            alt.Color("side:N", scale=colours),
            tooltip=[
                alt.Tooltip("side:N"),
                *(alt.Tooltip(f"{name}:Q", format=".3~g") for name in ("from", "to")),
                alt.Tooltip("answers:Q"),
            ],
        )
    )
    means = [float(np.mean(scores)) for scores in facts.held_out]
    return chart_of(
        "held-out",
        "Does the direction rank answers that it has not seen?",
        "Each pair's answers, scored along the direction of other pairs. The further apart the two "
        "colours, the better the ranking of the pool.",
        f"Histogram of held-out scores: {facts.side} answers have a mean of {means[0]:.3g}, "
        f"{facts.other} ones of {means[1]:.3g}.",
        bars + rule_at(0.0, "x", "no influence"),
    )


def preference_chart(facts: TargetFacts) -> Chart:
    """Number of pairs by preference, in twenty steps."""
    counts = np.histogram(facts.preferences, np.linspace(0, 1, 21))[0].tolist()
    rows = [{"from": i / 20, "to": (i + 1) / 20, "pairs": n} for i, n in enumerate(counts)]
    title = f"preference π for the {facts.side} answer"
    quarters = alt.Axis(format=".2~f", values=[0, 0.25, 0.5, 0.75, 1])
    bars = (
        alt.Chart(inline_data(rows))
        .mark_bar(color=SELECTED, binSpacing=1)
        .encode(
            alt.X("from:Q", bin="binned", title=title, axis=quarters),
            alt.X2("to:Q"),
            alt.Y("pairs:Q", title="pairs", axis=alt.Axis(tickMinStep=1)),
            tooltip=[
                *(alt.Tooltip(f"{name}:Q", format=".2f") for name in ("from", "to")),
                alt.Tooltip("pairs:Q"),
            ],
        )
    )
    above = sum(value > 0.5 for value in facts.preferences)
    return chart_of(
        "preferences",
        "What the model prefers now",
        f"Each pair's preference for the {facts.side} answer. {facts.weight_words}",
        f"Histogram of the model's preference before training: {above} of "
        f"{len(facts.preferences)} pairs lie above one half.",
        bars + rule_at(0.5, "x", "no preference"),
    )


def agreement_chart(facts: TargetFacts) -> Chart:
    """Agreement of two disjoint sets of pairs against their size."""
    rows = [{"pairs": m, "agreement": a} for m, a in sorted(facts.agreements.items())]
    lowest = min(0, *facts.agreements.values())
    across = alt.Axis(tickCount=5)
    line = (
        alt.Chart(inline_data(rows))
        .mark_line(color=SELECTED, point={"color": SELECTED, "size": 60})
        .encode(
            alt.X("pairs:Q", title="pairs in each half", axis=across, scale=alt.Scale(zero=True)),
            alt.Y(
                "agreement:Q",
                title="agreement (cosine)",
                scale=alt.Scale(domain=[lowest, 1]),
            ),
            tooltip=["pairs:Q", alt.Tooltip("agreement:Q", format=".2f")],
        )
    )
    text = ", ".join(f"{row['agreement']:.2f} with {row['pairs']}" for row in rows)
    text = f"Agreement: {text} pairs in each half."
    if pairs := facts.pairs_for_half_agreement:
        text += f" About {pairs} pairs would make halves that agree at one half."
    return chart_of(
        "agreement",
        "Do two halves of the pairs agree?",
        "Where the line still rises, more pairs would help.",
        text,
        line + rule_at(TARGET_AGREEMENT, "y", "agreement of one half"),
    )


def cosine_chart(facts: TargetFacts) -> Chart:
    """Cosines between the directions of several targets."""
    names = [target.name for target in facts.targets]
    rows = [
        {"a": a, "b": b, "cosine": value, "size": abs(value or 0.0)}
        for a, line in zip(names, facts.cosines, strict=True)
        for b, value in zip(names, line, strict=True)
    ]
    base = alt.Chart(inline_data(rows)).encode(
        alt.X("a:N", title=None, sort=None, axis=alt.Axis(labelAngle=-30)),
        alt.Y("b:N", title=None, sort=None),
    )
    strength = alt.Scale(domain=[0, 1], range=[0.08, 0.75])
    drawn = base.mark_rect().encode(
        fill=alt.condition("datum.cosine < 0", alt.value(NEGATIVE), alt.value(SELECTED)),
        opacity=alt.Opacity("size:Q", scale=strength, legend=None),
        tooltip=["a:N", "b:N", alt.Tooltip("cosine:Q", format=".2f")],
    )
    if len(names) <= WRITTEN:
        drawn += base.mark_text(color=INK).encode(text=alt.Text("cosine:Q", format=".2f"))
    lowest = min(rows, key=lambda row: (row["cosine"] or 0.0, row["a"], row["b"]))
    return chart_of(
        "cosines",
        "Do the targets agree?",
        "Below 0, two targets conflict.",
        f"Cosines between the directions of {len(names)} targets; the lowest is "
        f"{lowest['cosine'] or 0:.2f}, {lowest['a']} with {lowest['b']}.",
        drawn,
        min(max(120, 36 * len(names)), 640),
    )


def tables(facts: TargetFacts) -> dict[str, Table]:
    several = len({pair.target for pair in facts.pairs}) > 1
    columns = [
        Column("number", "pair", "count"),
        Column("share", "share", "share"),
        Column("preference", f"π for {facts.side}", "share"),
        Column("gap", "gap", "score", wide=True),
        Column("weight", "weight", "score", wide=True),
        *[Column("target", "target", "name")] * several,
        Column("text", "prompt", "text"),
    ]
    details = (
        Column("share", "share of the direction", "share"),
        Column("gap", "gap, nats per token", "score"),
        Column("weight", "weight", "score"),
        Column("line", "line", "count"),
    )
    rows = tuple(
        {**asdict(pair), "text": pair.prompt[:PREVIEW], "group": pair.target}
        for pair in facts.pairs
    )
    return {"pairs": Table("pair", "Target", ("share", True), tuple(columns), details, rows)}


SECTION = Section("target", "The target", "What is the target?", read, charts, tables)
