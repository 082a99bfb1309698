"""The choice: counts, checks and warnings, and whether to trust it.

Choices made here: chosen rows come first among the verdicts.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prism_select.report.checks import Check, State, checks_of, headline
from prism_select.report.formatting import percent, significant
from prism_select.report.run_facts import RunFacts
from prism_select.report.sections.section import Section
from prism_select.run.thresholds import no_validation_in_words

__all__ = ["SECTION", "ChoiceFacts", "Tile", "VerdictShare", "newer_than", "read"]

CLASSES = {
    "selected": "selected",
    "removed": "selected",
    "quarantined": "quarantined",
    "near duplicate": "capped",
    "source cap": "capped",
}


@dataclass(frozen=True)
class Tile:
    name: str
    value: str
    note: str


@dataclass(frozen=True)
class VerdictShare:
    """Rows with one verdict; `style` is the class of its colour."""

    name: str
    rows: int
    share: float
    style: str


@dataclass(frozen=True)
class ChoiceFacts:
    state: State
    headline: str
    checks: tuple[Check, ...]
    tiles: tuple[Tile, ...]
    verdicts: tuple[VerdictShare, ...]
    warnings: tuple[str, ...]


def read(run: RunFacts) -> ChoiceFacts:
    checks = checks_of(run)
    newer = newer_than(run.path / "manifest.json", run.columns.file.names)
    return ChoiceFacts(
        *headline(checks, len(run.manifest["warnings"])),
        checks=tuple(checks),
        tiles=tuple(_tiles(run)),
        verdicts=tuple(_verdicts(run.manifest["counts"])),
        warnings=(
            *run.manifest["warnings"],
            *(f"{file} was written after the run" for file in newer),
        ),
    )


def newer_than(manifest: Path, files: Iterable[str]) -> list[str]:
    """The files written after the manifest."""
    written = manifest.stat().st_mtime + 1
    return [f for f in files if Path(f).is_file() and Path(f).stat().st_mtime > written]


def _tiles(run: RunFacts) -> Iterator[Tile]:
    counts, target = run.manifest["counts"], run.manifest["target"]
    note = f"{counts['quarantined']:,} quarantined, {counts['truncated']:,} truncated"
    yield Tile("rows read", f"{counts['read']:,}", note)
    if run.verdict:
        yield from _tiles_of_choice(run)
    if "pairs" in target:
        yield _held_out(target)
    if labels := run.manifest["choice"].get("labels"):
        note = f"{labels['bad']:,} of {labels['rows']:,} rows are known to be bad"
        yield Tile("AUROC of the ranking", significant(labels["auroc"]), note)


def _held_out(target: Mapping[str, Any]) -> Tile:
    found = target.get("cross_validation")
    if not found:
        return Tile("held-out pairs", "–", no_validation_in_words(target))
    low, high = found["interval"]
    return Tile(
        "held-out pairs", f"{found['auroc']:.2f}", f"AUROC, between {low:.2f} and {high:.2f}"
    )


def _tiles_of_choice(run: RunFacts) -> Iterator[Tile]:
    config, columns = run.manifest["config"], run.columns
    budget = config["budget"] if run.command == "select" else config["remove"]
    rows = run.manifest["counts"][run.verdict]
    yield Tile(run.verdict, f"{rows:,}", f"the budget was {budget}")
    note = f"{columns.ranked_by.replace('_', ' ')} of the last row"
    if columns.passed_over:
        note += f"; {columns.passed_over:,} above it passed over"
    yield Tile("cut-off", significant(columns.cutoff), note)
    if len(columns.order):
        name, note = f"{run.influence} influence", f"of all is in the {run.verdict} rows"
        yield Tile(name, percent(columns.chosen_influence), note)


def _verdicts(counts: Mapping[str, int]) -> Iterator[VerdictShare]:
    """The verdicts of at least one row."""
    rows = {
        name: count
        for name, count in counts.items()
        if name not in ("read", "truncated", "scored") and count
    }
    if not rows and counts["scored"]:
        rows = {"scored": counts["scored"]}
    total = sum(rows.values())
    for name in sorted(rows, key=lambda name: CLASSES.get(name) != "selected"):
        yield VerdictShare(name, rows[name], rows[name] / total, CLASSES.get(name, "other"))


SECTION = Section("chosen", "The choice", "What was chosen, and should I trust it?", read)
