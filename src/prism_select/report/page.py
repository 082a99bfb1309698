"""Page: one HTML file that needs nothing else, from a template, a style, a script and values in
JSON.

    data     <script type="application/json">, put into the page by the script as text, never as markup
    policy   no network; scripts by their hash alone, so no other runs, whatever a pool says

Choices made here: everything that the template writes is escaped by Jinja2; Vega's expressions are
interpreted, not compiled, so the policy need not allow `eval`; Vega's runtime is part of the
package (vega/), 0.9 MB of the page."""

import base64
import hashlib
import json
import math
import re
from collections.abc import Mapping, Sequence
from functools import cache
from importlib.metadata import version
from importlib.resources import files
from typing import Any

import jinja2
from markupsafe import Markup, escape

from prism_select.report.charts import Chart
from prism_select.run.folder import finite

__all__ = ["in_json", "render", "significant"]

_ESCAPES = {ord(letter): f"\\u{ord(letter):04x}" for letter in "<>&\u2028\u2029"}


def in_json(value: Mapping[str, Any]) -> str:
    """JSON that means the same inside a script element: no markup can end it."""
    return json.dumps(
        finite(value), ensure_ascii=False, separators=(",", ":"), allow_nan=False
    ).translate(_ESCAPES)


def significant(value: float | None, digits: int = 3) -> str:
    """Three digits that matter; a dash where there is no number."""
    if value is None or not math.isfinite(value):
        return "–"
    return (
        f"{value:.{digits}g}".replace("-", "−")
        if abs(value) < 1e4
        else f"{value:,.0f}".replace("-", "−")
    )


def percent(value: float | None) -> str:
    if value is None or not math.isfinite(value):
        return "–"
    return (
        f"{value:.0%}"
        if 0.1 <= abs(value) < 0.995
        else f"{100 * value:.1f}".removesuffix(".0") + "%"
    )


def as_told(line: str) -> Markup:
    """A sentence of the run: options are not broken at their hyphens, and a minus is one."""
    safe = re.sub(r"(?<![\w.-])-(?=\d)", "−", str(escape(line)))
    return Markup(re.sub(r"(?<![\w-])(--[a-z][a-z-]*)", r'<span class="option">\1</span>', safe))


@cache
def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("prism_select.report"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "sig": significant,
        "percent": percent,
        "told": as_told,
        "count": lambda value: f"{value:,}",
    }
    return environment


@cache
def _asset(name: str) -> str:
    return files("prism_select.report").joinpath(name).read_text(encoding="utf-8")


@cache
def _hash(name: str) -> str:
    return (
        "'sha256-" + base64.b64encode(hashlib.sha256(_asset(name).encode()).digest()).decode() + "'"
    )


def render(
    template: str, charts: Sequence[Chart], tables: Mapping[str, Any], values: Mapping[str, Any]
) -> bytes:
    """The page of a template; `values` are what it names. `charts` and `tables` are drawn by the
    page's script."""
    scripts = {"vega": "vega/vega.js", "script": "templates/page.js"}
    allowed = " ".join(_hash(name) for name in scripts.values())
    policy = f"default-src 'none'; script-src {allowed}; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"
    data = in_json({"charts": {chart.name: chart.spec for chart in charts}, "tables": tables})
    text = (
        _environment()
        .get_template(template)
        .render(
            policy=policy,
            version=version("prism-select"),
            style=Markup(_asset("templates/style.css")),
            data=Markup(data),
            **{name: Markup(_asset(file)) for name, file in scripts.items()},
            **values,
        )
    )
    return text.encode("utf-8", "backslashreplace")
