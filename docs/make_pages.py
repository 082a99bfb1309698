"""Writes docs/options.md from the configs and docs/measurements.md from benchmarks/results, so that neither a help text
nor a figure stands in two places."""

import json
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

from prism_select.config import ModelConfig, PairsConfig, RepairConfig, ScoreConfig, SelectConfig

DOCS = Path(__file__).parent
RESULTS = DOCS.parent / "benchmarks" / "results"


def values(kind: Any) -> str:
    if get_origin(kind) is Literal:
        return ", ".join(f"`{value}`" for value in get_args(kind) if value)
    return {str: "text", int: "a number", float: "a number", bool: "a flag", Sequence[str]: "text, several"}[kind]


def table(kind: type[ModelConfig], without: set[str]) -> list[str]:
    hints = get_type_hints(kind, include_extras=True)
    lines = ["| option | values | default | |", "|---|---|---|---|"]
    for field in fields(kind):
        if field.name not in without:
            value, text = get_args(hints[field.name])[:2]
            default = f"`{field.default}`" if field.default not in ("", ()) and field.default is not False else ""
            option = "FILE" if field.name == "file" else f"--{field.name.replace('_', '-')}"
            lines.append(f"| `{option}` | {values(value)} | {default} | {text} |")
    return lines


def options_page() -> str:
    shared = {field.name for field in fields(ScoreConfig)}
    parts = ["# Options", "", "Any of them may stand in a TOML file given as `--config`; the command line wins.", ""]
    for title, kind, without in (
        ("prism score, select and repair", ScoreConfig, set[str]()),
        ("prism select", SelectConfig, shared),
        ("prism repair", RepairConfig, shared),
        ("prism pairs", PairsConfig, set[str]()),
    ):
        parts += [f"## {title}", "", *table(kind, without), ""]
    parts += ["## prism demo", "", "`--out` is the folder that it writes, `prism-demo` unless given.", ""]
    return "\n".join(parts)


def measurements_page() -> str:
    """The text of measurements.in.txt, with the figures of NAME.json wherever a line is `{{NAME}}`; of the many of the
    pairs study, a table."""
    lines = (DOCS / "measurements.in.txt").read_text(encoding="utf-8").splitlines()
    tables = {"{{pairs}}": pairs_table}
    return (
        "\n".join(tables[x]() if x in tables else figures(x[2:-2]) if x.startswith("{{") else x for x in lines) + "\n"
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
    remedies = [name for name in next(iter(found.values())) if all(name in each for each in found.values())]
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
    summary = [line for line in result["figures"] if "rank correlation" in line["name"] or line["wanted"]]
    return "\n".join([*lines, "", *(told_figure(line) for line in summary)])


def told_figure(line: dict[str, Any]) -> str:
    state = {True: f", wanted {line['wanted']}: holds", False: f", wanted {line['wanted']}: **falls short**"}
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
        lines.append(f"| {line['name']} | {line['value']:.3f} {line['unit']} | {ends} | {line['wanted']} | {state} |")
    machine = result["machine"]
    return "\n".join([*lines, "", f"{result['date']}, {machine['cores']} cores ({machine['processor']}), {versions}."])


PAGES = {"options.md": options_page, "measurements.md": measurements_page}

if __name__ == "__main__":
    for name, write in PAGES.items():
        (DOCS / name).write_text(write(), encoding="utf-8")
