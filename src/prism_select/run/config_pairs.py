"""TODO."""

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

from prism_select.run.config import ModelConfig
from prism_select.run.errors import BadOption

__all__ = ["PairsConfig"]


@dataclass(frozen=True, kw_only=True)
class PairsConfig(ModelConfig):
    """Make pairs from what you have, or check pairs that you have (--check)."""

    command: ClassVar[str] = "pairs"

    file: Annotated[
        str, "Rows to make pairs of: questions with answers, in any format of a pool."
    ] = ""
    how: Annotated[
        Literal["", "numbers", "choices", "answers", "weak", "swap"],
        "What the rejected answer is: the same with its numbers changed, a wrong choice, an answer of the model that "
        "--accept refuses, a column, or another row's answer (for control).",
    ] = ""
    check: Annotated[
        str, "Pairs file to diagnose with --model: do its pairs agree, and what do they share?"
    ] = ""
    limit: Annotated[
        int, "At most this many pairs, of rows that the seed draws; 0: of every row."
    ] = 0
    wrong: Annotated[
        Literal["each", "one", "favourite"],
        "choices: a pair for each wrong choice, for one drawn, or for the one that the model likes best.",
    ] = "each"
    weak_field: Annotated[str, "weak: the column with the weaker answer."] = ""
    accept: Annotated[
        str,
        "answers: which of the model's answers are right: number, choice (as the row's own), or regex:PATTERN.",
    ] = "number"
    samples: Annotated[int, "answers: drawn for each row."] = 8
    new_tokens: Annotated[int, "answers: most tokens of each."] = 256
    temperature: Annotated[float, "answers: of the sampling."] = 1.0
    stop: Annotated[
        str, "answers: text at which an answer ends, for models that do not stop by themselves."
    ] = ""

    def __post_init__(self) -> None:
        super().__post_init__()
        if bool(self.check) == bool(self.file):
            raise BadOption(
                "give either FILE with --how, or --check PAIRS"
                + (", not both" if self.file else "")
            )
        needed = {
            "how": bool(self.check or self.how),
            "out": bool(self.check or self.out),
            "model": bool(self.model),
        }
        needed["model"] |= not (
            self.check or self.how == "answers" or (self.how == "choices" and self.favourite)
        )
        needed["weak_field"] = self.how != "weak" or bool(self.weak_field)
        for name, there in needed.items():
            if not there:
                raise BadOption(
                    f"--{name.replace('_', '-')} is missing; prism pairs --help shows what each way needs"
                )
        for name, least in {"samples": 1, "new_tokens": 1, "limit": 0}.items():
            if getattr(self, name) < least:
                raise BadOption(
                    f"--{name.replace('_', '-')} {getattr(self, name)}: must be at least {least}"
                )
        if not 0.01 <= self.temperature <= 100:
            raise BadOption(f"--temperature {self.temperature}: must be between 0.01 and 100")

    @property
    def favourite(self) -> bool:
        return self.wrong == "favourite"
