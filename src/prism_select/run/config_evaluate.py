"""Configuration of `prism evaluate` and `prism report`, the commands on a complete run."""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar, get_args

from prism_select.run.config import Ranking
from prism_select.run.errors import BadOption
from prism_select.run.options import Mark, Options, parse_share, split_names

__all__ = ["EvaluateConfig", "ReportConfig"]

REMOVALS = "5%,10%,20%,35%,50%"


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig(Options):
    """Does the choice of a run help? Fine-tune on it and on its baselines, and compare on held-out
    pairs."""

    command: ClassVar[str] = "evaluate"
    group: ClassVar[str] = "Evaluation"

    run: Annotated[
        str | None,
        "Folder of a complete select or repair run.",
        Mark.REQUIRED | Mark.ARGUMENT | Mark.PATH,
    ] = None
    holdout: Annotated[
        str | None,
        "File of pairs, none of which the run has seen: chosen is what you want, rejected what you "
        "don't.",
        Mark.REQUIRED | Mark.PATH,
    ] = None
    against: Annotated[
        str,
        f"Baselines, with commas between: {', '.join(get_args(Ranking))}. In "
        "select each fills the same number of supervised tokens, in repair each loses as many "
        "rows; everything is the whole pool, in as many steps; random-priced trains for as much "
        "longer as scoring took.",
    ] = "random,length,everything"
    removals: Annotated[
        str | None,
        "After repair: a curve over these shares of the scored rows, removed by each ranking; "
        f"each point is a training on the rest, and off makes none  [default: {REMOVALS}].",
    ] = None
    seeds: Annotated[
        int, "Trainings of each method: adapter, order of rows and random rows differ."
    ] = 3
    steps: Annotated[
        str,
        "Length of each training: passes over the chosen rows, as in 3epochs, or steps of 8 rows, "
        "as in 40; every method takes as many steps.",
    ] = "3epochs"
    rate: Annotated[
        float | None,
        "Learning rate, falling to 0  [default: 2e-4 for LoRA, 2e-5 with --full (TRL's own)].",
    ] = None
    full: Annotated[
        bool, "Train all parameters, in float32, instead of a LoRA adapter of rank 16."
    ] = False
    tasks: Annotated[
        str | None,
        "Tasks of lm-eval, with commas between, before and after each training; a folder among "
        "them defines tasks of your own. Needs the extra [tasks].",
    ] = None
    seed: Annotated[int, "The first seed, and that of everything else that is drawn."] = 0

    def validate(self) -> None:
        for name, value in {"RUN": self.run, "--holdout": self.holdout}.items():
            if not value:
                raise BadOption(f"{name} is missing; prism evaluate --help shows what it needs")
        if not self.baselines:
            raise BadOption("--against is empty; try random,length,everything")
        shares = self.removal_shares
        if not all(0 < share < 1 for share in shares) or (self.removals != "off" and not shares):
            raise BadOption(f"--removals {self.removals}: not shares below 100%; try 5%,10%")
        if self.seeds < 1:
            raise BadOption(f"--seeds {self.seeds}: must be at least 1")
        if not self._amount > 0:
            raise BadOption(
                f"--steps {self.steps}: no length above 0; try 3epochs, or 40 for steps"
            )
        if self.rate is not None and not 0 < self.rate < math.inf:
            raise BadOption(f"--rate {self.rate}: must be above 0; try 2e-4")
        if not 0 <= self.seed < 2**32:
            raise BadOption(f"--seed {self.seed}: must be between 0 and {2**32 - 1}")

    @property
    def baselines(self) -> list[str]:
        """Each name once."""
        return split_names(self.against)

    @property
    def removal_shares(self) -> list[float]:
        """Each share once, the smallest first; none where they are off."""
        names = [] if self.removals == "off" else split_names(self.removals or REMOVALS)
        return sorted({round(parse_share(name), 12) for name in names})

    @property
    def task_names(self) -> list[str]:
        """Each name or folder once."""
        return split_names(self.tasks)

    @property
    def _amount(self) -> float:
        """The number in `steps`; NaN if there is none."""
        match = re.fullmatch(r"(\d{1,9}(?:\.\d{1,9})?) ?epochs?|(\d{1,9})", self.steps.strip())
        return float(match[1] or match[2]) if match else math.nan

    def steps_for(self, rows: int, rows_per_step: int) -> int:
        """Steps of each training for `rows` chosen rows."""
        if "epoch" not in self.steps:
            return int(self._amount)
        return math.ceil(self._amount * rows / rows_per_step)


@dataclass(frozen=True, kw_only=True)
class ReportConfig(Options):
    """Make the page of a run (RUN/report.html) again, or compare the choices of two runs of one
    pool."""

    command: ClassVar[str] = "report"
    group: ClassVar[str] = "Running"

    runs: Annotated[
        Sequence[str],
        "Folder of a complete run; with a second one, the two are compared.",
        Mark.REQUIRED | Mark.ARGUMENT | Mark.PATH,
    ] = ()
    out: Annotated[
        str | None,
        "File to write  [default: report.html in RUN, or comparison.html in the first of two].",
        Mark.PATH,
    ] = None

    def validate(self) -> None:
        if not 1 <= len(self.runs) <= 2:
            raise BadOption(
                f"give the folder of one run, or of two to compare; here are {len(self.runs)}"
            )
