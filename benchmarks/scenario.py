"""Scenarios: a model, a pool, pairs to aim at and pairs to judge by; what a baseline and PRISM are
both asked to do.

    truth: the field of a pool row that is true on rows that are wanted (select) or bad (repair)

Choices made here: a scenario is files and options and nothing else, so that the one who makes it
need not know who runs it, and no baseline sees more than another."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal


@dataclass(frozen=True)
class Scenario:
    """`scoring` are options of prism_select.select or repair, `training` those of
    prism_select.evaluate."""

    name: str
    command: Literal["select", "repair"]
    model: Path
    pool: str
    target: str
    holdout: str
    truth: str
    scoring: Mapping[str, Any]
    training: Mapping[str, Any]
