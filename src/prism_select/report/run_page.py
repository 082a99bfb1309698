"""Writing: the page of one run, its sections put together from words, charts and tables.

    prism report RUN  →  RUN/report.html

Choices made here: a section whose part of the run folder is not there stays, and says so in a line.
"""

from collections.abc import Iterator, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from prism_select.report import charts
from prism_select.report.checks import checks_of, headline
from prism_select.report.facts import Facts, facts_of, options_of
from prism_select.report.page import percent, render, significant
from prism_select.report.scores_table import TAKEN
from prism_select.report.tables import examples_table, pairs_table
from prism_select.report.text import (
    captions,
    examples_words,
    influence,
    layers_words,
    pairs_words,
    sentence,
    spread_words,
    target_words,
    tiles,
)
from prism_select.run.config import RepairConfig, ScoreConfig, SelectConfig, sides_of
from prism_select.run.folder import Store
from prism_select.run.options import Options

__all__ = ["page_of", "write_report"]

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


KINDS = {
    "selected": "taken",
    "removed": "taken",
    "quarantined": "aside",
    "near duplicate": "caps",
    "source cap": "caps",
}


CONFIGS: Mapping[str, type[Options]] = {
    "score": ScoreConfig,
    "select": SelectConfig,
    "repair": RepairConfig,
}


def write_report(path: str, out: str = "") -> Path:
    """Writes RUN/report.html, or `out`. Raises BadOption for what is no complete run, DiskTrouble
    where it cannot be written."""
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
        "warnings": [*m["warnings"], *(f"{file} was written after the run" for file in facts.newer)],
        "charts": drawn,
        "captions": captions(facts),
        "target_words": target_words(m) if facts.target else "",
        "pairs_words": pairs_words(facts),
        "several": several,
        "influence": influence(facts),
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


def shares(counts: Mapping[str, int]) -> list[dict[str, Any]]:
    """The verdicts that any row has, what was taken first."""
    names = [
        name for name in counts if name not in ("read", "truncated", "scored") and counts[name]
    ]
    names = names or (["scored"] if counts["scored"] else [])
    total = sum(counts[name] for name in names)
    return [
        {
            "name": name,
            "rows": counts[name],
            "share": counts[name] / total,
            "kind": KINDS.get(name, "other"),
        }
        for name in sorted(names, key=lambda name: KINDS.get(name) != "taken")
    ]


def charts_of(facts: Facts) -> dict[str, list[charts.Chart]]:
    """The charts of each place on the page that there are values for."""
    m, spread, columns = facts.manifest, facts.spread, facts.columns
    sides = sides_of(facts.swapped)
    found: dict[str, list[charts.Chart]] = {name: [] for name in PLACES}
    if facts.target:
        found["target"] = [charts.preferences(facts.target, sides[0])]
        told = m["target"]
        if sum(value is not None for value in told["agreement_by_pairs"].values()) > 1:
            found["target"].append(
                charts.agreement(told["agreement_by_pairs"], told["pairs_for_half_agreement"])
            )
        if "cosines" in told:
            found["target"].append(charts.cosines(list(told["targets"]), told["cosines"]))
    if spread:
        taken, share = TAKEN.get(m["command"], ""), float(columns.taken.sum() / len(columns.order))
        found["wide"] = [charts.spread(spread.histogram, columns.cutoff, columns.by, taken)]
        if spread.positive:
            found["spread"] = [
                charts.cumulative(spread.curve, (share, spread.bought), influence(facts))
            ]
        if spread.halves:
            found["spread"].append(charts.halves(spread.halves, sides))
        if len(spread.sources) > 1:
            found["wide"].append(charts.by_source(spread.sources, columns.by, columns.cutoff))
    if facts.layers:
        found["layers"] = [charts.layers(facts.layers)]
    if told := facts.evaluation:
        found["against"] = [charts.intervals(told["against"])]
        found["helps"] = [charts.curves(facts.curves)] if facts.curves else []
        found["helps"].append(
            charts.forecast(told["methods"], told["forecast"]["rank_correlation"])
        )
    return found


def evaluated(facts: Facts) -> dict[str, Any] | None:
    told = facts.evaluation
    if told is None:
        return None
    several = told["questions"] < told["pairs"]
    of = f" of {told['questions']} questions" if several else ""
    left = (
        f", {told['pairs_left_out']} left out that the run has seen"
        if told["pairs_left_out"]
        else ""
    )
    methods = [
        {**each, "name": "before training" if name == "none" else name,
         "rows": f"{sum(each['rows']) / len(each['rows']):,.0f}" if "rows" in each else "–"}
        for name, each in told["methods"].items()
    ]  # fmt: skip
    forecast = told["forecast"]
    more = [
        (
            "forecast",
            f"rank correlation {significant(forecast['rank_correlation'], 2)} over {forecast['trainings']} trainings",
        )
    ]
    more += [("compute", told["compute"]["words"])] if told["compute"] else []
    if lds := told["lds"]:
        more.append(
            (
                "LDS",
                f"{significant(lds['lds'])} [{significant(lds['low'])}, {significant(lds['high'])}]",
            )
        )
    if told["labels"]:
        best = sorted(told["labels"].items(), key=lambda item: -(item[1] or 0.0))
        more.append(
            (
                "AUROC of known bad rows",
                ", ".join(f"{significant(value)} {name}" for name, value in best),
            )
        )
    for name, each in told["methods"].items():
        tasks = {task: sum(values) / len(values) for task, values in each.get("tasks", {}).items()}
        more += (
            [(f"tasks, {name}", ", ".join(f"{task} {value:.4f}" for task, value in tasks.items()))]
            if tasks
            else []
        )
    seeds = told["config"]["seeds"]
    words = f"Trained {told['steps']} steps at a rate of {told['rate']:g}, with {seeds} seeds, and asked {told['pairs']} "
    return {
        "words": f"{words}held-out pairs{of}{left}.",
        "several": several,
        "methods": methods,
        "verdicts": list(_verdicts(told["against"])),
        "controls": [
            {**each, "words": each["words"].partition(": ")[2]} for each in told["controls"]
        ],
        "more": more,
    }


def _verdicts(against: Mapping[str, Mapping[str, Any]]) -> Iterator[dict[str, str]]:
    for each in against.values():
        low, high = each["gain"]["low"], each["gain"]["high"]
        open_ended = low is None or high is None or low == high or low <= 0 <= high
        words = each["words"][0].upper() + each["words"][1:]
        yield {"state": "look" if open_ended else "holds" if low > 0 else "failed", "words": words}


def made(facts: Facts) -> dict[str, Any]:
    m = facts.manifest
    plan, actual = m["plan"], m["actual"]
    config = {name: _shown(value) for name, value in options_of(m).items()}
    defaults = {
        field.name: _shown(field.default) for kind in CONFIGS.values() for field in fields(kind)
    }
    given = [(name, value) for name, value in config.items() if value != defaults.get(name)]
    cost = [
        ("seconds", significant(plan["seconds"]), significant(actual["seconds"])),
        (
            "memory, GB",
            significant(plan["memory_bytes"] / 1e9),
            significant(actual["memory_bytes"] / 1e9),
        ),
        ("tokens", f"{plan['tokens']:,.0f}", f"{actual['tokens']:,.0f}"),
    ]
    model = m["model"]
    about = [
        ("architecture", model["architecture"]),
        ("device", model["device"]),
        ("template", model["template"]),
    ]
    about += [
        ("counted weights", f"{len(model['counted_weights'])}"),
        ("PRISM", m["prism_version"]),
    ]
    engine = f"{m['engine']['name']} in {m['engine']['dtype']}: {m['engine']['reason']}"
    told = {
        name: value
        for name, value in m["curvature"].items()
        if name != "name" and isinstance(value, float | int)
    }
    curvature = ", ".join(
        [m["curvature"]["name"], *(f"{name} {_shown(value)}" for name, value in told.items())]
    )
    score = [
        ("definition", m["score"]["definition"]),
        ("sign", m["score"]["sign"]),
        ("unit", m["score"]["unit"]),
    ]
    return {
        "score": [
            *score,
            ("engine", engine),
            ("curvature", curvature),
            ("padding", percent(m["padding"])),
        ],
        "cost": cost,
        "given": given,
        "options": list(config.items()),
        "versions": [
            *about,
            *m["versions"].items(),
            *((f"fingerprint of the {n}", v) for n, v in m["fingerprints"].items()),
        ],
    }


def _shown(value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list | tuple):
        return ", ".join(map(str, value)) or "–"
    if isinstance(value, float):
        return significant(value)
    return str(value) if value not in ("", None) else "–"
