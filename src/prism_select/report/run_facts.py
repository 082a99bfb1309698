"""Run facts: contents of a run folder for several sections of the page. No model is needed.

manifest.json → manifest, options     scores.parquet → columns     evaluation/ → evaluation
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from prism_select.report.evaluation import Evaluation, read_evaluation
from prism_select.report.scores_table import VERDICTS, Columns, columns_of
from prism_select.run.config import SelectConfig
from prism_select.run.errors import BadOption
from prism_select.run.folder import Run
from prism_select.run.options import Mark, marked
from prism_select.run.polarity import Polarity

__all__ = ["RunFacts", "effective_options", "open_run", "read_run_facts", "scoring_options"]


@dataclass(frozen=True)
class RunFacts:
    """`evaluation` is None for a run without one."""

    path: Path
    manifest: Mapping[str, Any]
    columns: Columns
    evaluation: Evaluation | None

    @property
    def command(self) -> str:
        return str(self.manifest["command"])

    @property
    def polarity(self) -> Polarity:
        return Polarity.of_manifest(self.manifest)

    @property
    def verdict(self) -> str:
        """Of the chosen rows: selected or removed; empty without a choice."""
        return VERDICTS.get(self.command, "")

    @property
    def influence(self) -> str:
        """The word for a score above 0: in a repair it means harm."""
        return "harmful" if self.polarity.swapped else "positive"


def open_run(path: str) -> Run:
    """The complete run at `path`. Raises BadOption if there is none."""
    run = Run(Path(path))
    for name in ("manifest.json", "scores.parquet"):
        if not (run.path / name).is_file():
            raise BadOption(
                f"{path}: no complete run there ({name} is missing); give the folder of one"
            )
    try:
        command = run.manifest["command"]
        pq.read_schema(run.path / "scores.parquet")
    except (ValueError, KeyError, OSError, pa.ArrowException) as error:
        first = (str(error).splitlines() or [""])[0]
        raise BadOption(f"{path}: the run is damaged ({first}); make it again") from None
    if command not in ("score", "select", "repair"):
        raise BadOption(f"{path}: a run of {command}; give one of score, select or repair")
    return run


def read_run_facts(path: str) -> RunFacts:
    """Of the complete run at `path`. Raises BadOption if there is none."""
    run = open_run(path)
    columns = columns_of(run.path, run.manifest)
    return RunFacts(run.path, run.manifest, columns, read_evaluation(run.path))


def scoring_options(manifest: Mapping[str, Any]) -> Mapping[str, Any]:
    """The options of the scoring, also for a choice made again from existing scores."""
    options: Mapping[str, Any] = manifest.get("scored_by", manifest["config"])
    return options


def effective_options(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """The options of the scoring, with those of the choice if it was made again."""
    config, scored_by = manifest["config"], manifest.get("scored_by", {})
    chooses = marked(SelectConfig, Mark.IN_CHOICE)
    choice = {n: v for n, v in config.items() if n in chooses or n not in scored_by}
    return {**scored_by, **choice}
