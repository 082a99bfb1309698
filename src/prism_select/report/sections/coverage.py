"""Coverage: what the choice takes for each group of pairs, and pairs that it hardly helps.

Choices made here:
- groups stand in the order of their share of the choice;
- without groups to serve, a line says how to get them.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from prism_select.report.run_facts import RunFacts
from prism_select.report.sections.section import Section

__all__ = ["SECTION", "CoverageFacts", "GroupLine", "read"]


@dataclass(frozen=True)
class GroupLine:
    """A group of pairs: prompts of a few of them, how many it has, and how many rows it took."""

    name: str
    prompts: tuple[str, ...]
    pairs: int
    rows: int
    share: float


@dataclass(frozen=True)
class CoverageFacts:
    """`hardly_helped` pairs get less than a tenth of the mean help; None where it is not known."""

    rule: str
    rows: int
    lines: tuple[GroupLine, ...]
    by_score: int
    pairs: int
    hardly_helped: int | None
    by_twice: int | None

    @property
    def words(self) -> str:
        words = (
            f"{len(self.lines)} groups of pairs are served by {self.rule}, from {self.rows:,} rows "
            "with scores along each of them."
        )
        if self.by_score:
            words += f" {self.by_score:,} rows more were taken by their score alone."
        if self.hardly_helped is not None:
            words += (
                f" {self.hardly_helped} of {self.pairs} pairs get less than a tenth of the mean "
                "help of the chosen rows."
            )
        if self.by_twice is not None:
            words += f" At twice the budget {self.by_twice} would."
        return words


def read(run: RunFacts) -> CoverageFacts | None:
    """None for a choice along one direction."""
    coverage = run.manifest["choice"].get("coverage")
    if not coverage:
        return None
    target = run.manifest["target"]
    lines = sorted(_lines(coverage, target), key=lambda line: -line.rows)
    return CoverageFacts(
        coverage["rule"],
        coverage["rows"],
        tuple(lines),
        coverage["by_score"],
        coverage.get("pairs", 0),
        coverage.get("hardly_helped"),
        coverage.get("hardly_helped_by_twice"),
    )


def _lines(coverage: Mapping[str, Any], target: Mapping[str, Any]) -> Iterator[GroupLine]:
    groups = target.get("groups") or target.get("targets") or {}
    total = sum(coverage["by_group"].values()) + coverage["by_score"]
    for name, rows in coverage["by_group"].items():
        of_group = groups.get(name, {})
        prompts = tuple(of_group.get("prompts", ()))
        yield GroupLine(name, prompts, of_group.get("pairs", 0), rows, rows / max(1, total))


SECTION = Section(
    "coverage", "Coverage", "Is every kind of pair served?", read, commands=["select"]
)
