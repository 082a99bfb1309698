"""Writing: the page of one run, section by section, in words, charts and tables.

    prism report RUN  →  RUN/report.html

Choices made here: every chart has a sentence that says how to read it; a number stands in words beside its picture, so
the page can be read aloud; what is sent to the page of a row is text and numbers, never markup.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from prism_select.config import Options, RepairConfig, ScoreConfig, SelectConfig, sides_of
from prism_select.report import charts
from prism_select.report.columns import TAKEN
from prism_select.report.examples import Row
from prism_select.report.facts import Facts, facts_of
from prism_select.report.judgement import agreement_in_words, checks_of, headline
from prism_select.report.page import percent, render, significant
from prism_select.store import Store

__all__ = ["page_of", "table_of", "write_report"]

CONTENTS = {
    "chosen": "The choice",
    "target": "The target",
    "spread": "Spread of scores",
    "examples": "Examples",
    "layers": "Layers",
    "helps": "Did it help?",
    "made": "How it was made",
}
PLACES = ("target", "wide", "spread", "layers", "against", "helps")
PREVIEW = 240
KINDS = {"selected": "taken", "removed": "taken", "quarantined": "aside", "near duplicate": "caps", "source cap": "caps"}
CONFIGS: Mapping[str, type[Options]] = {"score": ScoreConfig, "select": SelectConfig, "repair": RepairConfig}


def write_report(path: str, out: str = "") -> Path:
    """Writes RUN/report.html, or `out`. Raises BadOption for what is no complete run, DiskTrouble where it cannot be
    written."""
    page = page_of(facts_of(path))
    place = Path(out or Path(path) / "report.html")
    Store(str(place.parent)).write(place.name, page)
    return place


def page_of(facts: Facts) -> bytes:
    m = facts.manifest
    drawn = charts_of(facts)
    checks = checks_of(facts)
    evaluation = evaluated(facts)
    several = m["target"].get("targets", {})
    values = {
        "title": f"PRISM: {Path(facts.path).name}",
        "kind": f"report of a {m['command']} run",
        "contents": list(CONTENTS.items()),
        "facts": facts,
        "sentence": sentence(facts),
        "judged": headline(checks),
        "checks": checks,
        "tiles": list(tiles(facts)),
        "shares": shares(m["counts"]),
        "warnings": [*m["warnings"], *(f"{file} was written after the run: texts may not be those that were scored" for file in facts.newer)],
        "charts": drawn,
        "captions": captions(facts),
        "target_words": target_words(m) if facts.target else "",
        "pairs_words": pairs_words(facts),
        "several": several,
        "spread_words": spread_words(facts),
        "examples_words": examples_words(facts),
        "layers_words": layers_words(facts),
        "profile": [(name, percent(share)) for name, share in m.get("layers", {}).get("share", {}).items()],
        "taken": TAKEN.get(m["command"], ""),
        "evaluation": evaluation,
        "made": made(facts),
    }  # fmt: skip
    tables = {"examples": examples_table(facts), "pairs": pairs_table(facts)}
    return render("run.html", [chart for few in drawn.values() for chart in few], tables, values)


# ---------------------------------------------------------------- words


def sentence(facts: Facts) -> str:
    counts, command = facts.manifest["counts"], facts.manifest["command"]
    scored = counts["scored"]
    if command == "score":
        return f"{scored:,} rows were scored"
    taken = counts[TAKEN[command]]
    return f"{taken:,} of {scored:,} rows were {TAKEN[command]}, {percent(taken / max(1, scored))}"


def tiles(facts: Facts) -> Iterator[tuple[str, str, str]]:
    m = facts.manifest
    counts, config = m["counts"], m["config"]
    yield "rows read", f"{counts['read']:,}", f"{counts['quarantined']:,} set aside, {counts['truncated']:,} cut"
    if m["command"] != "score":
        taken = TAKEN[m["command"]]
        budget = config["budget"] if m["command"] == "select" else config["remove"]
        yield taken, f"{counts[taken]:,}", f"the budget was {budget}"
        over = facts.columns.passed_over
        yield "cut-off", significant(facts.columns.cutoff), f"{facts.columns.by.replace('_', ' ')} of the last row" + (
            f"; {over:,} above it passed over" if over else ""
        )
        if facts.spread:
            yield "of all positive influence", percent(facts.spread.bought), f"is in the rows {taken}"
    if "pairs" in m["target"]:
        agreement = m["target"]["split_half_agreement"]
        words = "" if agreement is None else agreement_in_words(agreement)
        yield "halves agree", significant(agreement, 2), words
    if labels := m["choice"].get("labels"):
        yield "AUROC of the ranking", significant(labels["auroc"]), f"{labels['bad']:,} of {labels['rows']:,} rows are known to be bad"


def shares(counts: Mapping[str, int]) -> list[dict[str, Any]]:
    """The verdicts that any row has, what was taken first."""
    names = [name for name in counts if name not in ("read", "truncated", "scored") and counts[name]]
    names = names or (["scored"] if counts["scored"] else [])
    total = sum(counts[name] for name in names)
    return [
        {"name": name, "rows": counts[name], "share": counts[name] / total, "kind": KINDS.get(name, "other")}
        for name in sorted(names, key=lambda name: KINDS.get(name) != "taken")
    ]


def target_words(m: Mapping[str, Any]) -> str:
    target = m["target"]
    side, other = sides_of(m["score"]["swapped"])
    told = f"{target['pairs']} pairs, worth {significant(target['effective_pairs'])} equal ones. Before any training the model "
    told += f"prefers the {side} answer in {percent(target['preferred_share'])} of them; the mean preference is {significant(target['mean_preference'])}. "
    agreement = target["split_half_agreement"]
    if agreement is not None:
        told += f"Two halves of the pairs agree at {agreement:.2f}: {agreement_in_words(agreement)}. "
    told += f"What both answers share is {significant(target['common_part'], 2)} times what tells them apart."
    if m["score"]["swapped"]:
        told += f" This is a repair: it looks for rows that teach the {side} answers, in place of the {other} ones."
    return told


def pairs_words(facts: Facts) -> str:
    target = facts.target
    if not target:
        return ""
    some = f"The {len(target.pairs)} of {target.count} with the largest" if len(target.pairs) < target.count else "Their"
    told = f"{some} shares in the direction: a few pairs with large ones decide for all. "
    half = facts.manifest["target"].get("pairs_for_half_of_direction")
    told += f"{half} of {target.count} pairs make half of it. " if half else ""
    told += f"Answers are not shown: {target.without_answers}." if target.without_answers else "A row opens to both answers."
    return told


def spread_words(facts: Facts) -> str:
    if not facts.spread:
        return ""
    m = facts.manifest
    aim = sides_of(m["score"]["swapped"])[0]
    told = f"A positive score means that training on the row moves the model towards the {aim} answers; "
    told += f"{percent(facts.spread.positive)} of the rows have one. "
    if facts.spread.bought == facts.spread.bought:
        told += f"The rows {TAKEN[m['command']]} have {percent(facts.spread.bought)} of all positive influence."
    return told


def examples_words(facts: Facts) -> str:
    groups = dict.fromkeys(row.group for row in facts.rows)
    if set(groups) <= {"top", "below the cut-off"}:
        told = f"All {len(facts.rows)} scored rows. "
    else:
        told = f"{len(facts.rows)} rows of the ranking: {', '.join(groups)}. "
    return told + "A row opens to its text" + (", its learned tokens coloured by what each adds." if any(row.tokens for row in facts.rows) else ".")


def layers_words(facts: Facts) -> str:
    sums: dict[str, float] = {}
    for share in facts.layers:
        sums[share.part] = sums.get(share.part, 0.0) + share.share
    most = sorted(sums, key=lambda part: -sums[part])[:3]
    told = ", ".join(f"{part} ({percent(sums[part])})" for part in most)
    return f"Of the direction's squared norm most lies in {told}. It says where training would move the model, not where it matters."


def captions(facts: Facts) -> dict[str, str]:
    sides = sides_of(facts.manifest["score"]["swapped"])
    beyond = facts.spread.histogram.beyond if facts.spread else 0
    far = f" The outer bars also hold {beyond:,} rows that lie beyond." if beyond else ""
    weighting = facts.scored_by["weighting"]
    weight = {"prism": "A pair weighs as much as its preference.", "hard": "A pair weighs 1 − its preference."}
    return {
        "preferences": f"Each pair's preference for the {sides[0]} answer. {weight.get(weighting, 'All pairs weigh alike.')}",
        "agreement": "Where the line is still rising, more pairs would help.",
        "cosines": "Below 0, two targets pull apart.",
        "spread": f"The dashed line is the cut-off.{far}",
        "sources": "The line reaches from 5% to 95% of a source's rows, the bar over its middle half, the notch is the median.",
        "halves": f"The score is their difference: on the dashed diagonal it is 0. Rows high up raise the {sides[0]} answers; "
        f"far to the right they raise the {sides[1]} ones as well.",
        "cumulative": "How much of what could help a budget buys. The diamond is this choice.",
        "layers": "Embeddings first, then block by block.",
        "intervals": "Right of the line the choice is better; an interval that crosses it shows nothing.",
        "curves": "Mean over seeds, on pairs that the run has not seen.",
        "forecast": "One mark for each training. Scores that forecast put them on a rising line.",
    }


# ---------------------------------------------------------------- charts


def charts_of(facts: Facts) -> dict[str, list[charts.Chart]]:
    """The charts of each place on the page that there are values for."""
    m, spread, columns = facts.manifest, facts.spread, facts.columns
    sides = sides_of(facts.swapped)
    found: dict[str, list[charts.Chart]] = {name: [] for name in PLACES}
    if facts.target:
        found["target"] = [charts.preferences(facts.target, sides[0])]
        told = m["target"]
        if sum(value is not None for value in told["agreement_by_pairs"].values()) > 1:
            found["target"].append(charts.agreement(told["agreement_by_pairs"], told["pairs_for_half_agreement"]))
        if "cosines" in told:
            found["target"].append(charts.cosines(list(told["targets"]), told["cosines"]))
    if spread:
        taken = TAKEN.get(m["command"], "")
        found["wide"] = [charts.spread(spread.histogram, columns.cutoff, columns.by, taken)]
        found["spread"] = [charts.cumulative(spread.curve, columns.taken.sum() / len(columns.order), spread.bought)]
        if spread.halves:
            found["spread"].append(charts.halves(spread.halves, sides))
        if len(spread.sources) > 1:
            found["wide"].append(charts.by_source(spread.sources, columns.by, columns.cutoff))
    if facts.layers:
        found["layers"] = [charts.layers(facts.layers)]
    if told := facts.evaluation:
        found["against"] = [charts.intervals(told["against"])]
        found["helps"] = [charts.curves(facts.curves)] if facts.curves else []
        found["helps"].append(charts.forecast(told["methods"], told["forecast"]["rank_correlation"]))
    return found


# ---------------------------------------------------------------- tables


def table_of(
    rows: Sequence[Row],
    sides: tuple[str, str],
    columns: Sequence[tuple[str, str, str]],
    values: Sequence[Mapping[str, Any]],
) -> dict[str, Any]:
    """What the page's script makes a table of, sorted by the first of `columns` (key, name, kind); `values` are what
    they need beside the fields of each row."""
    columns = [*columns, ("learned", "tokens", "count"), ("source", "source", "name"), ("verdict", "verdict", "name")]
    wide = {"learned", "source", "score_per_token"}
    details = [
        ("score", "score", "score"),
        ("per_token", "score per token", "score"),
        ("chosen", f"raises the {sides[0]}", "score"),
        ("rejected", f"raises the {sides[1]}", "score"),
        ("loglik", "log-likelihood", "score"),
        ("id", "id", "name"),
        ("place", "from", "name"),
    ]
    return {
        "kind": "example",
        "group": "Show",
        "sort": [columns[0][0], False],
        "columns": [
            {"key": key, "name": name, "kind": kind, "wide": key in wide}
            for key, name, kind in [*columns, ("text", "text", "text")]
        ],
        "details": details,
        "rows": [{**_row(row), **more} for row, more in zip(rows, values, strict=True)],
    }


def _row(row: Row) -> dict[str, Any]:
    whole = " ⏎ ".join(said.text[:PREVIEW] for said in row.said) or "".join(text for text, _ in row.tokens)
    return {**asdict(row), "text": whole[:PREVIEW] or row.missing, "place": f"{row.file}:{row.line}"}


def examples_table(facts: Facts) -> dict[str, Any]:
    by = facts.columns.by
    columns = [("rank", "rank", "count"), (by, by.replace("_", " "), "score")]
    return table_of(facts.rows, sides_of(facts.swapped), columns, [{by: row.ranking} for row in facts.rows])


def pairs_table(facts: Facts) -> dict[str, Any]:
    side = sides_of(facts.swapped)[0]
    columns = [("share", "share", "share"), ("preference", f"π for {side}", "share"), ("gap", "gap", "score"), ("weight", "weight", "score")]
    pairs = facts.target.pairs if facts.target else ()
    named = len({pair.target for pair in pairs}) > 1
    columns += [("target", "target", "name")] * named + [("text", "prompt", "text")]
    return {
        "kind": "pair",
        "group": "Target",
        "sort": ["share", True],
        "columns": [{"key": k, "name": n, "kind": kind, "wide": k in ("weight", "gap")} for k, n, kind in columns],
        "details": [("share", "share of the direction", "share"), ("gap", "gap, nats per token", "score"), ("weight", "weight", "score"), ("line", "line", "count")],
        "rows": [{**asdict(pair), "text": pair.prompt[:PREVIEW], "group": pair.target} for pair in pairs],
    }  # fmt: skip


# ---------------------------------------------------------------- did it help, how was it made


def evaluated(facts: Facts) -> dict[str, Any] | None:
    told = facts.evaluation
    if told is None:
        return None
    several = told["questions"] < told["pairs"]
    of = f" of {told['questions']} questions" if several else ""
    left = f", {told['pairs_left_out']} left out that the run has seen" if told["pairs_left_out"] else ""
    methods = [
        {**each, "name": "before training" if name == "none" else name,
         "rows": f"{sum(each['rows']) / len(each['rows']):,.0f}" if "rows" in each else "–"}
        for name, each in told["methods"].items()
    ]  # fmt: skip
    more = [("forecast", f"rank correlation {significant(told['forecast']['rank_correlation'], 2)} over {told['forecast']['trainings']} trainings")]
    more += [("compute", told["compute"]["words"])] if told["compute"] else []
    if lds := told["lds"]:
        more.append(("LDS", f"{significant(lds['lds'])} [{significant(lds['low'])}, {significant(lds['high'])}]"))
    if told["labels"]:
        best = sorted(told["labels"].items(), key=lambda item: -(item[1] or 0.0))
        more.append(("AUROC of known bad rows", ", ".join(f"{significant(value)} {name}" for name, value in best)))
    for name, each in told["methods"].items():
        tasks = {task: sum(values) / len(values) for task, values in each.get("tasks", {}).items()}
        more += [(f"tasks, {name}", ", ".join(f"{task} {value:.4f}" for task, value in tasks.items()))] if tasks else []
    words = f"Trained {told['steps']} steps at a rate of {told['rate']:g}, with {told['config']['seeds']} seeds, and asked {told['pairs']} held-out pairs{of}{left}."
    return {"words": words, "several": several, "methods": methods, "verdicts": list(_verdicts(told["against"])), "controls": [{**each, "words": each["words"].partition(": ")[2]} for each in told["controls"]], "more": more}  # fmt: skip


def _verdicts(against: Mapping[str, Mapping[str, Any]]) -> Iterator[dict[str, str]]:
    for each in against.values():
        low, high = each["gain"]["low"], each["gain"]["high"]
        open_ended = low is None or high is None or low == high or low <= 0 <= high
        words = each["words"][0].upper() + each["words"][1:]
        yield {"state": "look" if open_ended else "holds" if low > 0 else "failed", "words": words}


def made(facts: Facts) -> dict[str, Any]:
    m = facts.manifest
    plan, actual = m["plan"], m["actual"]
    config = {name: _shown(value) for name, value in m["config"].items()}
    defaults = {field.name: _shown(field.default) for field in fields(CONFIGS[m["command"]])}
    given = [(name, value) for name, value in config.items() if value != defaults.get(name)]
    cost = [
        ("seconds", significant(plan["seconds"]), significant(actual["seconds"])),
        ("memory, GiB", significant(plan["memory_bytes"] / 2**30), significant(actual["memory_bytes"] / 2**30)),
        ("tokens", f"{plan['tokens']:,.0f}", f"{actual['tokens']:,.0f}"),
    ]
    model = m["model"]
    about = [("architecture", model["architecture"]), ("device", model["device"]), ("template", model["template"])]
    about += [("counted weights", f"{len(model['counted_weights'])}"), ("PRISM", m["prism_version"])]
    engine = f"{m['engine']['name']} in {m['engine']['dtype']}: {m['engine']['reason']}"
    curvature = ", ".join(f"{name} {_shown(value)}" for name, value in m["curvature"].items() if value is not None)
    score = [("definition", m["score"]["definition"]), ("sign", m["score"]["sign"]), ("unit", m["score"]["unit"])]
    return {
        "score": [*score, ("engine", engine), ("curvature", curvature), ("padding", percent(m["padding"]))],
        "cost": cost,
        "given": given,
        "options": list(config.items()),
        "versions": [*about, *m["versions"].items(), *((f"fingerprint of the {n}", v) for n, v in m["fingerprints"].items())],
    }


def _shown(value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list | tuple):
        return ", ".join(map(str, value)) or "–"
    if isinstance(value, float):
        return significant(value)
    return str(value) if value not in ("", None) else "–"
