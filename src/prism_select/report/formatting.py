"""Formatting: how numbers and sentences of a run are written on the page.

significant(−0.04567) = −0.0457     percent(0.053) = 5.3%     sentence("--rank, -1") = --rank, −1
"""

import math
import re

from markupsafe import Markup, escape

__all__ = ["count", "join_words", "percent", "sentence", "significant"]


def significant(value: float | None, digits: int = 3) -> str:
    """`digits` significant digits, whole numbers from 10,000 on; a dash for none."""
    if value is None or not math.isfinite(value):
        return "–"
    text = f"{value:.{digits}g}" if abs(value) < 1e4 else f"{value:,.0f}"
    return text.replace("-", "−")


def percent(value: float | None) -> str:
    """0.123 → 12%, 0.0123 → 1.2%; a dash for no number."""
    if value is None or not math.isfinite(value):
        return "–"
    if 0.1 <= abs(value) < 0.995:
        return f"{value:.0%}"
    return f"{100 * value:.1f}".removesuffix(".0") + "%"


def count(value: int) -> str:
    """12345 → 12,345."""
    return f"{value:,}"


def join_words(names: list[str]) -> str:
    """a, b and c."""
    return names[0] if len(names) == 1 else ", ".join(names[:-1]) + " and " + names[-1]


def sentence(line: str) -> Markup:
    """An escaped sentence of the run: no line breaks inside an option, and minus signs are
    typographic."""
    safe = re.sub(r"(?<![\w.-])-(?=\d)", "−", str(escape(line)))
    return Markup(re.sub(r"(?<![\w-])(--[a-z][a-z-]*)", r'<span class="option">\1</span>', safe))
