"""The sections of the page of a run, in order."""

from typing import Any

from prism_select.report.sections.choice import SECTION as CHOICE
from prism_select.report.sections.coverage import SECTION as COVERAGE
from prism_select.report.sections.examples import SECTION as EXAMPLES
from prism_select.report.sections.layers import SECTION as LAYERS
from prism_select.report.sections.scores import SECTION as SCORES
from prism_select.report.sections.section import Section
from prism_select.report.sections.settings import SECTION as SETTINGS
from prism_select.report.sections.target import SECTION as TARGET
from prism_select.report.sections.training import SECTION as TRAINING

__all__ = ["SECTIONS"]

SECTIONS: tuple[Section[Any], ...] = (
    CHOICE,
    COVERAGE,
    TARGET,
    SCORES,
    EXAMPLES,
    LAYERS,
    TRAINING,
    SETTINGS,
)
