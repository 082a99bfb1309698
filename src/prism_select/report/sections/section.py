"""Section: a part of the page of a run, with the answer to one question.

    run folder → facts → charts, tables, HTML of templates/sections/ID.html

A new section is a file with a SECTION, its template part, and a line in sections/__init__.py.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

from markupsafe import Markup

from prism_select.report.charts import Chart
from prism_select.report.page import render_part
from prism_select.report.run_facts import RunFacts
from prism_select.report.tables import Table

__all__ = ["FilledSection", "Section"]

Facts = TypeVar("Facts")


@dataclass(frozen=True)
class FilledSection:
    """A section of one run, ready for the page."""

    id: str
    link: str
    title: str
    body: Markup
    charts: tuple[Chart, ...]
    tables: Mapping[str, Table]


def no_charts(facts: object) -> Sequence[Chart]:
    return ()


def no_tables(facts: object) -> Mapping[str, Table]:
    return {}


@dataclass(frozen=True)
class Section(Generic[Facts]):
    """`id` is the anchor and names the template part, `link` stands in the contents, `title` is the
    question. `read` gives the facts, or None if the run folder has none for this section; the
    template part then says so in a line. It stands on the pages of `commands`."""

    id: str
    link: str
    title: str
    read: Callable[[RunFacts], Facts | None]
    charts: Callable[[Facts], Sequence[Chart]] = no_charts
    tables: Callable[[Facts], Mapping[str, Table]] = no_tables
    commands: Collection[str] = ("score", "select", "repair")

    def fill(self, run: RunFacts) -> FilledSection:
        """The template part reads `facts`, `charts` by name, and `run`."""
        facts = self.read(run)
        charts = tuple(self.charts(facts)) if facts is not None else ()
        tables = self.tables(facts) if facts is not None else {}
        body = render_part(
            f"sections/{self.id}.html",
            facts=facts,
            charts={chart.name: chart for chart in charts},
            run=run,
        )
        return FilledSection(self.id, self.link, self.title, body, charts, tables)
