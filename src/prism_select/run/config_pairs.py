"""Configuration of `prism pairs`: how to make pairs, or a file of pairs to check."""

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

from prism_select.run.config import (
    BESIDE_PAIRS,
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
        Literal["numbers", "choices", "answers", "weak", "swap", "before-after"] | None,
        "What the rejected answer is: the same with its numbers changed (numbers), each wrong "
        "choice, or with --model only the one that the model likes best (choices), an answer of "
        "the model that --accept refuses (answers), the column that --fields weak=COLUMN names "
        "(weak), another row's answer (swap, for control), or the answer after a fine-tuning to a "
        "question that got worse (before-after).",
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
        "answers, before-after: which of the model's answers are right: number, choice (as the "
        "row's own), or regex:PATTERN.",
    ] = "number"
    before: Annotated[
        str | None,
        "before-after: the model before fine-tuning (folder, hub id, or an adapter on --model), or "
        "its log of answers (lm-eval's samples, Inspect's, or JSONL with prompt, response, score).",
        Mark.PATH,
    ] = None
    after: Annotated[
        str | None, "before-after: the model after fine-tuning, or its log.", Mark.PATH
    ] = None
    judge_url: Annotated[
        str | None,
        "before-after: an OpenAI-compatible endpoint that scores answers (with the extra [judge]; "
        "its key from PRISM_JUDGE_KEY or OPENAI_API_KEY).",
        Mark.RARE,
    ] = None
    judge_model: Annotated[str | None, "before-after: the judge's name there.", Mark.RARE] = None
    samples: Annotated[
        int | None,
        "answers, before-after: sampled for each row  [default: 8; before-after: one, greedily].",
    ] = None
    new_tokens: Annotated[int, "answers, before-after: at most so many tokens each."] = 256
    stop: Annotated[
        str | None,
        "answers, before-after: text at which an answer ends, for models that do not stop by "
        "themselves.",
        Mark.RARE,
    ] = None

    def validate(self) -> None:
        self._check_sides()
        if bool(self.check) == bool(self.file) and not (self.before and not self.check):
            raise BadOption(
                "give either FILE with --how, or --check PAIRS" + ", not both" * bool(self.file)
            )
        if self.curvature in BESIDE_PAIRS:
            raise BadOption(f"--curvature {self.curvature}: not of pairs alone; try pairs or flat")
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

    def _check_sides(self) -> None:
        sides = {name: getattr(self, name) for name in ("before", "after")}
        judge = {name: getattr(self, name) for name in ("judge_url", "judge_model")}
        if self.how != "before-after":
            for name, value in {**sides, **judge}.items():
                if value:
                    raise BadOption(f"{flag_of(name)}: only with --how before-after")
            return
        for name, value in sides.items():
            if not value:
                raise BadOption(f"{flag_of(name)} is missing: --how before-after compares two")
        for name, value in judge.items():
            if not value and any(judge.values()):
                raise BadOption(f"{flag_of(name)} is missing: a judge needs its URL and its name")

    @property
    def favourite(self) -> bool:
        """Whether only the wrong choice with the highest likelihood makes a pair."""
        return self.how == "choices" and bool(self.model)
