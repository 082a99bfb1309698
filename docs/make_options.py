"""Writes docs/options.md from the configs, so that a help text stands in one place."""

from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

from prism_select.config import RepairConfig, ScoreConfig, SelectConfig

PAGE = Path(__file__).parent / "options.md"


def values(kind: Any) -> str:
    if get_origin(kind) is Literal:
        return ", ".join(f"`{value}`" for value in get_args(kind))
    return {str: "text", int: "a number", float: "a number", bool: "a flag", Sequence[str]: "text, several"}[kind]


def table(kind: type[ScoreConfig], without: set[str]) -> list[str]:
    hints = get_type_hints(kind, include_extras=True)
    lines = ["| option | values | default | |", "|---|---|---|---|"]
    for field in fields(kind):
        if field.name not in without:
            value, text = get_args(hints[field.name])[:2]
            default = f"`{field.default}`" if field.default not in ("", (), False) else ""
            lines.append(f"| `--{field.name.replace('_', '-')}` | {values(value)} | {default} | {text} |")
    return lines


def page() -> str:
    shared = {field.name for field in fields(ScoreConfig)}
    parts = ["# Options", "", "Any of them may stand in a TOML file given as `--config`; the command line wins.", ""]
    for title, kind, without in (
        ("prism score, select and repair", ScoreConfig, set[str]()),
        ("prism select", SelectConfig, shared),
        ("prism repair", RepairConfig, shared),
    ):
        parts += [f"## {title}", "", *table(kind, without), ""]
    parts += ["## prism demo", "", "`--out` is the folder that it writes, `prism-demo` unless given.", ""]
    return "\n".join(parts)


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
