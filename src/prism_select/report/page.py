"""Page: one self-contained HTML file from templates, a style, a script and JSON.

    data     <script type="application/json">: the script writes it as text, never as markup
    policy   no network, and only scripts with a named hash: no text of a pool can run

Choices made here:
- Jinja2 escapes all values in templates;
- Vega's expressions are interpreted, not compiled, so the policy need not allow `eval`;
- Vega's runtime is part of the package (vega/) and is 0.9 MB of the page.
"""

import base64
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import cache
from importlib.metadata import version
from importlib.resources import files
from typing import Any

import jinja2
from markupsafe import Markup

from prism_select.report import formatting
from prism_select.report.charts import Chart
from prism_select.report.tables import Table
from prism_select.run.folder import finite

__all__ = ["in_json", "render", "render_part"]

_ESCAPES = {ord(letter): f"\\u{ord(letter):04x}" for letter in "<>&\u2028\u2029"}


def in_json(value: Mapping[str, Any]) -> str:
    """JSON with the same meaning inside a script element: no markup can end it."""
    text = json.dumps(finite(value), ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    return text.translate(_ESCAPES)


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
        "sig": formatting.significant,
        "percent": formatting.percent,
        "sentence": formatting.sentence,
        "count": formatting.count,
    }
    return environment


@cache
def _asset(name: str) -> str:
    return files("prism_select.report").joinpath(name).read_text(encoding="utf-8")


@cache
def _hash(name: str) -> str:
    digest = hashlib.sha256(_asset(name).encode()).digest()
    return f"'sha256-{base64.b64encode(digest).decode()}'"


def render_part(template: str, **values: object) -> Markup:
    """The HTML of one template."""
    return Markup(_environment().get_template(template).render(**values))


def render(
    template: str, charts: Sequence[Chart], tables: Mapping[str, Table], values: Mapping[str, Any]
) -> bytes:
    """A page: its template reads `values`, its script draws `charts` and `tables`."""
    scripts = {"vega": "vega/vega.js", "script": "templates/page.js"}
    policy = (
        f"default-src 'none'; script-src {' '.join(_hash(name) for name in scripts.values())}; "
        "style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"
    )
    data = {
        "charts": {chart.name: chart.spec for chart in charts},
        "tables": {name: asdict(table) for name, table in tables.items()},
    }
    text = render_part(
        template,
        policy=policy,
        version=version("prism-select"),
        style=Markup(_asset("templates/style.css")),
        data=Markup(in_json(data)),
        **{name: Markup(_asset(file)) for name, file in scripts.items()},
        **values,
    )
    return text.encode("utf-8", "backslashreplace")
