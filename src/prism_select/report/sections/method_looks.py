"""Method looks: one colour, dash and shape for each method, the same in every chart of a page.

Choices made here:
- the run's own choice is solid, in the page's first colour; random rows are muted;
- four colours meet five dashes and shapes, so twenty other methods all look different.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import altair as alt

from prism_select.report.charts import DASHES, MUTED, SELECTED, SERIES, SHAPES, cycled
from prism_select.report.evaluation import Evaluation

__all__ = ["MethodLooks", "method_looks"]


@dataclass(frozen=True)
class MethodLooks:
    """Altair's scales from the names of methods."""

    colours: alt.Scale
    dashes: alt.Scale
    shapes: alt.Scale


def method_looks(evaluation: Evaluation, names: Sequence[str]) -> MethodLooks:
    """Of the `names` of one chart; what a method looks like depends on the evaluation alone."""
    every = dict.fromkeys(each.name for each in evaluation.methods)
    every |= dict.fromkeys(point.method for point in evaluation.curves)
    every |= dict.fromkeys(point.method for point in evaluation.removals)
    others = [name for name in every if name not in ("none", "prism", "random")]
    looks = {
        "prism": (SELECTED, DASHES[0], SHAPES[0]),
        "random": (MUTED, DASHES[1], SHAPES[1]),
    }
    ranges = (SERIES[1:-1], [*DASHES[2:], DASHES[1]], [*SHAPES[2:], SHAPES[1]])
    looks |= zip(others, zip(*(cycled(each, others) for each in ranges), strict=True), strict=True)
    colours, dashes, shapes = zip(*(looks[name] for name in names), strict=True)
    return MethodLooks(
        alt.Scale(domain=[*names], range=[*colours]),
        alt.Scale(domain=[*names], range=[*dashes]),
        alt.Scale(domain=[*names], range=[*shapes]),
    )
