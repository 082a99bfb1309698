"""Writes docs/options.md from the configs, docs/measurements.md and plots from benchmarks/results,
so that neither a help text nor a figure stands in two places."""

import json
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import altair as alt
import click
import vl_convert

from prism_select.cli.app import ANYWHERE, app
from prism_select.run.config import RepairConfig, ScoreConfig, SelectConfig
from prism_select.run.config_evaluate import EvaluateConfig, ReportConfig
from prism_select.run.config_pairs import PairsConfig
from prism_select.run.options import Options

DOCS = Path(__file__).parent
ENVIRONMENT = """\
With `--json` the summary is one JSON object, all that a run tells on the way goes to standard error, and exit codes are
as ever: 0 done, 2 you can mend it, 1 a defect of PRISM, 130 interrupted. `NO_COLOR=1` in the environment takes colours
away. Your shell completes options after `eval "$(_PRISM_COMPLETE=bash_source prism)"` (`zsh_source`, `fish_source`)."""
RESULTS = DOCS.parent / "benchmarks" / "results"


def values(kind: Any) -> str:
    if get_origin(kind) is Literal:
        return ", ".join(f"`{value}`" for value in get_args(kind) if value)
    return {
        str: "text",
        int: "a number",
        float: "a number",
        bool: "a flag",
        Sequence[str]: "text, several",
    }[kind]


def table(kind: type[Options], without: set[str]) -> list[str]:
    hints = get_type_hints(kind, include_extras=True)
    lines = ["| option | values | default | |", "|---|---|---|---|"]
    for field in fields(kind):
        if field.name not in without:
            value, text = get_args(hints[field.name])[:2]
            default = (
                f"`{field.default}`"
                if field.default not in ("", ()) and field.default is not False
                else ""
            )
            option = {"file": "FILE", "run": "RUN", "runs": "RUN [RUN]"}.get(
                field.name
            ) or f"--{field.name.replace('_', '-')}"
            lines.append(f"| `{option}` | {values(value)} | {default} | {text} |")
    return lines


def options_page() -> str:
    shared = {field.name for field in fields(ScoreConfig)}
    parts = [
        "# Options",
        "",
        "Any of them may stand in a TOML file given as `--config`; the command line wins.",
        "",
    ]
    for title, kind, without in (
        ("prism score, select and repair", ScoreConfig, set[str]()),
        ("prism select", SelectConfig, shared),
        ("prism repair", RepairConfig, shared),
        ("prism pairs", PairsConfig, set[str]()),
        ("prism evaluate", EvaluateConfig, set[str]()),
        ("prism report", ReportConfig, set[str]()),
    ):
        parts += [f"## {title}", "", *table(kind, without), ""]
    parts += [
        "## prism demo",
        "",
        "`--out` is the folder that it writes, `prism-demo` unless given.",
        "",
    ]
    parts += [
        "## Every command",
        "",
        "These may stand anywhere in a command.",
        "",
        "| option | |",
        "|---|---|",
    ]
    parts += [
        f"| `{param.opts[0]}` | {param.help} |"
        for param in app.params
        if isinstance(param, click.Option) and param.opts[0] in ANYWHERE
    ]
    parts += ["", *ENVIRONMENT.splitlines(), ""]
    return "\n".join(parts)


def measurements_page() -> str:
    """The text of measurements.in.txt, with the figures of NAME.json wherever a line is `{{NAME}}`;
    of the many of the pairs study, a table."""
    lines = (DOCS / "measurements.in.txt").read_text(encoding="utf-8").splitlines()
    tables = {
        "{{pairs}}": pairs_table,
        "{{curvature}}": curvature_table,
        "{{lds}}": lds_table,
        "{{quality}}": quality_table,
        "{{attempts}}": attempts_table,
    }
    return (
        "\n".join(
            tables[x]() if x in tables else figures(x[2:-2]) if x.startswith("{{") else x
            for x in lines
        )
        + "\n"
    )


def pairs_table() -> str:
    """A line for each kind of pairs and their number; AUROCs per token, with each remedy."""
    place = RESULTS / "pairs.json"
    if not place.exists():
        return "*Not measured yet.*"
    result = json.loads(place.read_text(encoding="utf-8"))
    found: dict[tuple[str, str, int], dict[str, Any]] = {}
    for row in result["rows"]:
        found.setdefault((row["group"], row["set"], row["pairs"]), {})[row["remedy"]] = row
    remedies = [
        name for name in next(iter(found.values())) if all(name in each for each in found.values())
    ]
    lines = [
        "| target | pairs | halves agree | common part | right over wrong: "
        + " / ".join(remedies)
        + " | right over general: the same |",
        "|---|---|---|---|---|---|",
    ]
    for (group, name, count), by_remedy in found.items():
        told = by_remedy["none"]["diagnosis"]
        wrong = "wrong" if "wrong" in by_remedy["none"]["per token"] else "numbers changed"
        cells = [
            " / ".join(f"{by_remedy[remedy]['per token'][kind]:.2f}" for remedy in remedies)
            for kind in (wrong, "general")
        ]
        lines.append(
            f"| {group}: {name} | {count} | {told['split_half_agreement']:.2f} | {told['common_part']:.1f} | "
            f"{cells[0]} | {cells[1]} |"
        )
    summary = [
        line for line in result["figures"] if "rank correlation" in line["name"] or line["wanted"]
    ]
    return "\n".join([*lines, "", *(told_figure(line) for line in summary)])


def curvature_table() -> str:
    """For each task, AUROC by curvature and layers, with prism weights and the common part kept:
    summed / per token / cosine; then what the rest changes, as the mean over all these ways."""
    place = RESULTS / "curvature.json"
    if not place.exists():
        return "*Not measured yet.*"
    result = json.loads(place.read_text(encoding="utf-8"))
    found = result["rows"]
    layers = list(dict.fromkeys(row["layers"] for row in found))
    lines = list[str]()
    for task in dict.fromkeys(row["task"] for row in found):
        plain = {
            (r["curvature"], r["damping"], r["layers"], r["normalize"]): r["auroc"]
            for r in found
            if r["task"] == task and r["common"] == "keep" and r["weighting"] == "prism"
        }
        lines += [
            f"| {task}: curvature | " + " | ".join(layers) + " |",
            "|---" * (1 + len(layers)) + "|",
        ]
        for curvature, damping in dict.fromkeys((c, d) for c, d, _, _ in plain):
            cells = [
                " / ".join(
                    f"{plain[curvature, damping, where, how]:.3f}"
                    for how in ("none", "tokens", "norm")
                )
                for where in layers
            ]
            lines.append(
                f"| {curvature}{f', damping {damping:g}' if damping else ''} | "
                + " | ".join(cells)
                + " |"
            )
        lines += [
            "",
            *(f"- {line}" for line in changes([r for r in found if r["task"] == task])),
            "",
        ]
    return "\n".join([*lines, *(told_figure(line) for line in result["figures"] if line["wanted"])])


def changes(rows: Sequence[dict[str, Any]]) -> list[str]:
    """What another weighting or no common part does to the AUROC of a way that is otherwise the
    same."""
    keys = ("curvature", "damping", "layers", "normalize", "common", "weighting")
    found = {tuple(row[key] for key in keys): row["auroc"] for row in rows}
    told = []
    for name, place, other in (
        ("uniform", 5, "uniform"),
        ("hard", 5, "hard"),
        ("unpaired", 5, "unpaired"),
        ("common part removed before the curvature", 4, "remove"),
        ("common part removed after it", 4, "remove after"),
    ):
        base = [k for k in found if k[4] == "keep" and k[5] == "prism"]
        both = [
            (found[k], found[(*k[:place], other, *k[place + 1 :])])
            for k in base
            if (*k[:place], other, *k[place + 1 :]) in found
        ]
        if both:
            moved = [b - a for a, b in both]
            told.append(
                f"{name}: {sum(moved) / len(moved):+.3f} on average, {min(moved):+.3f} to {max(moved):+.3f}"
            )
    return told


def quality_table() -> str:
    """For each scenario a line for each method: what training on its choice led to, and prism minus
    it."""
    place = RESULTS / "quality.json"
    if not place.exists():
        return "*Not measured yet.*"
    result = json.loads(place.read_text(encoding="utf-8"))
    found = {
        (r["scenario"], r["budget"], r["method"]): r for r in result["rows"] if "missing" not in r
    }
    lines = list[str]()
    for scenario in dict.fromkeys(scenario for scenario, _, _ in found):
        first = {
            name: row for (s, budget, name), row in found.items() if (s, budget) == (scenario, "5%")
        }
        kind = "auroc" if first["prism"]["command"] == "repair" else "share"
        lines += [
            f"**{scenario}**",
            "",
            "| method | gain | win rate | found | prism minus it, gain: 5% | 1% | 20% | win rate, 5% |",
            "|---|---|---|---|---|---|---|---|",
        ]
        for name, row in sorted(first.items(), key=lambda item: -item[1]["gain"]):
            cells = [
                f"{row['gain']:.3f}",
                f"{row['win_rate']:.3f}",
                f"{row[kind]:.2f}" if kind in row else "",
            ]
            cells += [
                minus(found.get((scenario, budget, name), {}), "gain")
                for budget in ("5%", "1%", "20%")
            ]
            lines.append(f"| {name} | " + " | ".join([*cells, minus(row, "win_rate")]) + " |")
        told = [
            line
            for line in result["figures"]
            if line["name"].startswith(f"{scenario} 5%") and line["wanted"]
        ]
        told += [
            line for line in result["figures"] if line["name"].startswith(f"{scenario} 5%: price")
        ]
        lines += ["", *(told_figure(line) for line in told), ""]
    missing = ", ".join(
        f"{row['scenario']} at {row['budget']}" for row in result["rows"] if "missing" in row
    )
    return "\n".join([*lines, f"Not run: {missing}." if missing else "", f"{result['date']}."])


def minus(row: dict[str, Any], measure: str) -> str:
    apart = row.get("prism minus it", {}).get(measure)
    return (
        ""
        if apart is None
        else f"{apart['difference']:+.3f} ({apart['low']:+.3f} to {apart['high']:+.3f})"
    )


def attempts_table() -> str:
    """A line for each attempt, a column for each scenario: prism minus random; and AUROCs of the
    repairs."""
    place = RESULTS / "attempts.json"
    if not place.exists():
        return "*Not measured yet.*"
    result = json.loads(place.read_text(encoding="utf-8"))
    cells = {(row["scenario"], row["attempt"]): "" for row in result["rows"]}
    for scenario, attempt in cells:
        told = [
            x
            for x in result["figures"]
            if x["name"].startswith((f"{scenario}, {attempt}:", f"{scenario} repair, {attempt},"))
        ]
        signed = ":" in told[0]["name"]
        cells[scenario, attempt] = " / ".join(
            f"{line['value']:+.2f}" if signed else f"{line['value']:.3f}" for line in told
        )
    lines = list[str]()
    for tiny in (True, False):
        scenarios = [
            name for name in dict.fromkeys(s for s, _ in cells) if name.startswith("babi") is tiny
        ]
        attempts = list(
            dict.fromkeys(attempt for scenario, attempt in cells if scenario in scenarios)
        )
        what = "gain / win rate, less random's" if tiny else "AUROC, summed / per token"
        lines += [
            "| attempt | " + " | ".join(f"{name}: {what}" for name in scenarios) + " |",
            "|---" * (1 + len(scenarios)) + "|",
        ]
        lines += [
            f"| {attempt} | "
            + " | ".join(cells.get((name, attempt), "") for name in scenarios)
            + " |"
            for attempt in attempts
        ]
        lines.append("")
    return "\n".join([*lines, f"{result['date']}."])


def lds_table() -> str:
    """LDS of each curvature in each regime, with what it is more than flat."""
    place = RESULTS / "lds.json"
    if not place.exists():
        return "*Not measured yet.*"
    figures = {
        line["name"]: line for line in json.loads(place.read_text(encoding="utf-8"))["figures"]
    }
    runs = list(
        dict.fromkeys(name.rsplit(", ", 1)[1] for name in figures if name.startswith("LDS, flat"))
    )
    lines = ["| curvature | " + " | ".join(f"{run}: LDS | more than flat" for run in runs) + " |"]
    lines.append("|---" * (1 + 2 * len(runs)) + "|")
    for name in [
        n
        for n in figures
        if n.startswith("LDS, ") and n.endswith(f", {runs[0]}") and "more than" not in n
    ]:
        way = name.removeprefix("LDS, ").removesuffix(f", {runs[0]}")
        cells = []
        for run in runs:
            more = figures.get(f"LDS, {way}, more than flat, {run}")
            cells.append(f"{figures[f'LDS, {way}, {run}']['value']:.3f}")
            ends = "{:+.3f} to {:+.3f}".format(*more["interval"]) if more else ""
            cells.append(f"{more['value']:+.3f} ({ends})" if more else "")
        lines.append(f"| {way} | " + " | ".join(cells) + " |")
    bars = (
        told_figure(line)
        for name, line in figures.items()
        if line["wanted"] and "more than" in name
    )
    return "\n".join([*lines, "", *bars])


def told_figure(line: dict[str, Any]) -> str:
    state = {
        True: f", wanted {line['wanted']}: holds",
        False: f", wanted {line['wanted']}: **falls short**",
    }
    return f"- {line['name']}: {line['value']:.3f} {line['unit']}{state.get(line['holds'], '')}"


def figures(name: str) -> str:
    place = RESULTS / f"{name}.json"
    if not place.exists():
        return "*Not measured yet.*"
    result = json.loads(place.read_text(encoding="utf-8"))
    versions = ", ".join(f"{library} {version}" for library, version in result["versions"].items())
    lines = ["| figure | value | 95% interval | wanted | |", "|---|---|---|---|---|"]
    for line in result["figures"]:
        ends = "{:.3f} to {:.3f}".format(*line["interval"]) if "interval" in line else ""
        state = {True: "holds", False: "**falls short**", None: ""}[line["holds"]]
        lines.append(
            f"| {line['name']} | {line['value']:.3f} {line['unit']} | {ends} | {line['wanted']} | {state} |"
        )
    machine = result["machine"]
    return "\n".join(
        [
            *lines,
            "",
            f"{result['date']}, {machine['cores']} cores ({machine['processor']}), {versions}.",
        ]
    )


def drawn(chart: Any) -> str:
    """As SVG on white, which a dark page shows, too."""
    plain = chart.configure(background="white", padding=12, font="sans-serif").configure_axis(
        grid=False
    )
    return str(vl_convert.vegalite_to_svg(plain.to_dict())) + "\n"


def cost_plot() -> str:
    """Forwards of each way to the same scores, PRISM's darker, with the least and the most of its
    rounds."""
    result = json.loads((RESULTS / "cost_peers.json").read_text(encoding="utf-8"))
    ways = {
        "forward all": "forward pass: the unit",
        "difference late": "PRISM, upper half of the blocks",
        "difference all": "PRISM, all weights",
        "kronfluence": "kronfluence",
        "bergson": "bergson",
        "reference all": "row by row",
    }
    found = {line["name"].removeprefix("beside peers: "): line for line in result["figures"]}
    rows = [
        {
            "way": title,
            "forwards": line["value"],
            "low": line["interval"][0],
            "high": line["interval"][1],
        }
        for name, title in ways.items()
        for line in [found[name]]
    ]
    base = alt.Chart(alt.Data(values=rows)).encode(y=alt.Y("way:N", sort=None, title=None))
    ours = alt.condition(
        "substring(datum.way, 0, 5) == 'PRISM'", alt.value("#0b5394"), alt.value("#9aa5b1")
    )
    bars = base.mark_bar(height=16).encode(
        x=alt.X("forwards:Q", title="forward passes over the pool"), color=ours
    )
    spread = base.mark_rule(strokeWidth=1.5).encode(x="low:Q", x2="high:Q")
    return drawn((bars + spread).properties(width=420, height=170))


def growth_plot() -> str:
    """Seconds against each size, both by powers of ten."""
    rows = json.loads((RESULTS / "growth.json").read_text(encoding="utf-8"))["rows"]
    panels = []
    for of in dict.fromkeys(row["of"] for row in rows):
        points = alt.Chart(alt.Data(values=[row for row in rows if row["of"] == of])).mark_line(
            point=True
        )
        panels.append(
            points.encode(
                x=alt.X(
                    "size:Q",
                    title=of,
                    scale=alt.Scale(type="log"),
                    axis=alt.Axis(tickCount=4, format="~s"),
                ),
                y=alt.Y(
                    "seconds:Q",
                    title="seconds",
                    scale=alt.Scale(type="log"),
                    axis=alt.Axis(tickCount=4),
                ),
                color=alt.value("#0b5394"),
            ).properties(width=150, height=150)
        )
    return drawn(alt.hconcat(*panels))


PAGES = {
    "options.md": options_page,
    "measurements.md": measurements_page,
    "cost.svg": cost_plot,
    "growth.svg": growth_plot,
}

if __name__ == "__main__":
    for name, write in PAGES.items():
        (DOCS / name).write_text(write(), encoding="utf-8")
