"""The page of one run: its sections in order, from the run folder alone.

    prism report RUN  →  RUN/report.html

Choices made here: a section without contents in the run folder stays, and says so in a line;
coverage is asked of choices alone.
"""

from pathlib import Path

from prism_select.report.formatting import percent
from prism_select.report.page import render
from prism_select.report.run_facts import RunFacts, read_run_facts
from prism_select.report.sections import SECTIONS
from prism_select.run.folder import Store

__all__ = ["page_of", "write_report"]


def write_report(path: str, out: str | None = None) -> Path:
    """Writes RUN/report.html, or `out`. Raises BadOption if there is no complete run,
    DiskTrouble when the page cannot be written."""
    page = page_of(read_run_facts(path))
    file = Path(out or Path(path) / "report.html")
    Store(str(file.parent)).write(file.name, page)
    return file


def page_of(run: RunFacts) -> bytes:
    sections = [section.fill(run) for section in SECTIONS if run.command in section.commands]
    values = {
        "title": f"PRISM: {run.path.name}",
        "kind": f"report of a {run.command} run",
        "contents": [(section.id, section.link) for section in sections],
        "sentence": _sentence(run),
        "path": str(run.path),
        "sections": sections,
    }
    charts = [chart for section in sections for chart in section.charts]
    tables = {name: table for section in sections for name, table in section.tables.items()}
    return render("run.html", charts, tables, values)


def _sentence(run: RunFacts) -> str:
    """The heading of the page: the result of the run in one sentence."""
    counts = run.manifest["counts"]
    if not run.verdict:
        return f"{counts['scored']:,} rows were scored"
    chosen, read = counts[run.verdict], counts["read"]
    return f"{chosen:,} of {read:,} rows were {run.verdict}, {percent(chosen / max(1, read))}"
