"""Configuration of `prism pairs`: how to make pairs, or a file of pairs to check."""

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

from prism_select.run.config import (
    OF_POOL,
    CurvatureOptions,
    DirectionOptions,
    FolderOptions,
    ModelOptions,
    RowOptions,
)
from prism_select.run.errors import BadOption
from prism_select.run.options import Mark, flag_of

__all__ = ["PairsConfig"]


@dataclass(frozen=True, kw_only=True)
class PairsConfig(FolderOptions, CurvatureOptions, DirectionOptions, RowOptions, ModelOptions):
    """Make pairs from rows with answers, or check a file of pairs (--check)."""

    command: ClassVar[str] = "pairs"
    group: ClassVar[str] = "Pairs"

    file: Annotated[
        str | None,
        "Rows to make pairs of: questions with answers, in any format of a pool.",
        Mark.REQUIRED | Mark.ARGUMENT | Mark.PATH,
    ] = None
    how: Annotated[
        Literal["numbers", "choices", "answers", "weak", "swap"] | None,
        "What the rejected answer is: the same with its numbers changed (numbers), each wrong "
        "choice, or with --model only the one that the model likes best (choices), an answer of "
        "the model that --accept refuses (answers), the column that --fields weak=COLUMN names "
        "(weak), or another row's answer (swap, for control).",
        Mark.REQUIRED,
    ] = None
    check: Annotated[
        str | None,
        "Pairs file to diagnose with --model: do its pairs agree, and what do they share?",
        Mark.PATH,
    ] = None
    limit: Annotated[
        int | None, "At most this many pairs, of rows drawn at random  [default: of every row]."
    ] = None
    accept: Annotated[
        str,
        "answers: which of the model's answers are right: number, choice (as the row's own), or "
        "regex:PATTERN.",
    ] = "number"
    samples: Annotated[int, "answers: sampled for each row."] = 8
    new_tokens: Annotated[int, "answers: at most so many tokens each."] = 256
    stop: Annotated[
        str | None,
        "answers: text at which an answer ends, for models that do not stop by themselves.",
        Mark.RARE,
    ] = None

    def validate(self) -> None:
        if bool(self.check) == bool(self.file):
            raise BadOption(
                "give either FILE with --how, or --check PAIRS" + ", not both" * bool(self.file)
            )
        if self.curvature in OF_POOL:
            raise BadOption(f"--curvature {self.curvature}: is taken of a pool; try pairs or flat")
        required = {
            "how": self.check or self.how,
            "out": self.check or self.out,
            "model": self.model or not (self.check or self.how == "answers"),
        }
        for name, value in required.items():
            if not value:
                raise BadOption(
                    f"{flag_of(name)} is missing; prism pairs --help shows what each way needs"
                )
        for name in ("samples", "new_tokens", "limit"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise BadOption(f"{flag_of(name)} {value}: must be at least 1")

    @property
    def favourite(self) -> bool:
        """Whether only the wrong choice with the highest likelihood makes a pair."""
        return self.how == "choices" and bool(self.model)
