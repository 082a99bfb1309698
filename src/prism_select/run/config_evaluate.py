"""TODO."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from prism_select.run.errors import BadOption
from prism_select.run.options import Options, split_names

__all__ = ["EvaluateConfig", "ReportConfig"]


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig(Options):
    """Does the choice of a run help? Fine-tune on it and on its rivals, and compare on held-out pairs."""

    command: ClassVar[str] = "evaluate"

    run: Annotated[str, "Folder of a complete select or repair run."] = ""
    holdout: Annotated[
        str,
        "File of pairs, none of which the run has seen: chosen is what you want, rejected what you don't.",
    ] = ""
    against: Annotated[
        str,
        "Rivals, with commas between: random, random-by-source, length, bm25, loss-top, loss-mid, ifd, rds, less, "
        "uniform, hard, unpaired, contrast. In select each fills the same number of supervised tokens, in repair each "
        "loses as many rows; everything is the whole pool, in as many steps; random-priced trains for as much "
        "longer as scoring took.",
    ] = "random,length,everything,random-priced"
    seeds: Annotated[
        int, "Trainings of each method: adapter, order of rows and random rows differ."
    ] = 3
    epochs: Annotated[
        float, "Passes over the chosen rows; every method takes the steps that these make."
    ] = 3.0
    steps: Annotated[int, "Steps of 8 rows, in place of --epochs; 0: by --epochs."] = 0
    rate: Annotated[
        float, "Learning rate, falling to 0; 0: 2e-4 for LoRA, 2e-5 with --full (TRL's own)."
    ] = 0.0
    full: Annotated[
        bool, "Train all weights, in float32, instead of a LoRA adapter of rank 16."
    ] = False
    points: Annotated[
        int, "How often the held-out pairs are read in a training, evenly: its learning curve."
    ] = 4
    lds: Annotated[
        int,
        "Also train on this many random halves of the pool: do sums of scores foretell what comes? 0: no.",
    ] = 0
    tasks: Annotated[
        str,
        "Tasks of lm-eval, with commas between, before and after each training; a folder among them defines tasks of "
        "your own. Needs the extra [tasks].",
    ] = ""
    board: Annotated[
        Literal["", "tensorboard", "wandb"],
        "Also write the learning curves for TensorBoard (RUN/evaluation/tensorboard) or Weights & Biases (project "
        "prism), where it is installed.",
    ] = ""
    seed: Annotated[int, "The first seed, and that of everything else that is drawn."] = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("run", "holdout", "against"):
            if not getattr(self, name):
                raise BadOption(
                    f"--{name} is missing; prism evaluate --help shows what it needs".replace(
                        "--run", "RUN"
                    )
                )
        for name, least in {"seeds": 1, "steps": 0, "points": 1, "lds": 0}.items():
            if getattr(self, name) < least:
                raise BadOption(f"--{name} {getattr(self, name)}: must be at least {least}")
        if not (0 < self.epochs < math.inf and 0 <= self.rate < math.inf):
            raise BadOption(
                f"--epochs {self.epochs}, --rate {self.rate}: must be above 0; try 3 and 2e-4"
            )

    @property
    def rivals(self) -> list[str]:
        """Each name once."""
        return split_names(self.against)

    @property
    def task_names(self) -> list[str]:
        """Each name or folder once."""
        return split_names(self.tasks)


@dataclass(frozen=True, kw_only=True)
class ReportConfig(Options):
    """Make the page of a run (RUN/report.html) again, or compare the choices of two runs of one pool."""

    command: ClassVar[str] = "report"

    runs: Annotated[
        Sequence[str], "Folder of a complete run; with a second one, the two are compared."
    ] = ()
    out: Annotated[
        str, "File to write; empty: report.html in RUN, or comparison.html in the first of two."
    ] = ""

    def __post_init__(self) -> None:
        given: Any = self.runs
        object.__setattr__(
            self, "runs", (given,) if isinstance(given, str | Path) else tuple(map(str, given))
        )
        super().__post_init__()
        if not 1 <= len(self.runs) <= 2:
            raise BadOption(
                f"give the folder of one run, or of two to compare; here are {len(self.runs)}"
            )
