"""Pairing: answers that differ from a row's own in the behaviour, and in little else.

    numbers   the same solution with its numbers changed (a near miss)
    choices   a wrong choice
    answers   the model's own answer, the nearest one that a check refuses
    weak      the answer of a weaker model, from a column
    swap      the answer of another row: a far negative, for control

Choices made here:
- `chosen` is always the row's own answer, to the letter;
- whatever is drawn comes from the generator given: the same seed makes the same bytes;
- a row without a pair has a reason, NoPair, and is never lost.
"""

import random
import re
from collections.abc import Callable, Sequence
from typing import TypeAlias

from rapidfuzz.distance import Levenshtein

from prism_select.data.records import Example, Turn
from prism_select.run.errors import BadOption

__all__ = [
    "Accepts",
    "NoPair",
    "accepts_by",
    "change_numbers",
    "final_number",
    "nearest",
    "prompt_and_answer",
    "swapped_answers",
]

Accepts: TypeAlias = Callable[[str, str], bool]  # answer, the row's own answer

_DIGITS = re.compile(r"[0-9]+")
_NUMBER = re.compile(r"-?[0-9]+(?:,[0-9]{3})*(?:\.[0-9]+)?(?:/[0-9]+)?")
_LETTER = re.compile(r"\(?([A-H])\b\)?[.):]?")


class NoPair(Exception):
    """Why a row gives no pair: it is counted and written down, and no error."""


def prompt_and_answer(example: Example) -> tuple[tuple[Turn, ...], str]:
    """The turns before the last answer, and its text. Raises NoPair for a bare text and for a row
    that does not end in an answer."""
    *prompt, answer = example.turns
    if answer.role != "assistant":
        raise NoPair("it is a bare text" if answer.role == "text" else "its last turn is no answer")
    if not prompt:
        raise NoPair("it has no prompt")
    if answer.thought or answer.calls:
        what = "a tool call" if answer.calls else "a thought beside its text"
        raise NoPair(f"its answer has {what}, which a pair of texts would lose")
    return tuple(prompt), answer.text


def change_numbers(answer: str, draw: random.Random) -> str:
    """`answer` with each run of digits replaced by another of the same length, so that its final
    number differs and the text before its first number is the same. Raises NoPair for an answer
    without a number."""

    def replaced(match: re.Match[str]) -> str:
        digits = match[0]
        first = "123456789" if len(digits) > 1 and digits[0] != "0" else "0123456789"
        while True:
            drawn = draw.choice(first) + "".join(draw.choices("0123456789", k=len(digits) - 1))
            if drawn != digits:
                return drawn

    changed = _DIGITS.sub(replaced, answer)
    if changed == answer:
        raise NoPair("its answer has no number")
    return changed


def final_number(text: str) -> str | None:
    """The last number in a text, without thousands separators and trailing zeros; None without one.
    A fraction such as 3/4 is one number."""
    numbers = _NUMBER.findall(text.replace("\N{MINUS SIGN}", "-"))
    if not numbers:
        return None
    return "/".join(_canonical(number) for number in numbers[-1].replace(",", "").split("/"))


def _canonical(number: str) -> str:
    integer, _, fraction = number.partition(".")
    sign = integer[: integer.startswith("-")]
    integer = integer.removeprefix("-").lstrip("0") or "0"
    fraction = fraction.rstrip("0")
    return sign + integer + (f".{fraction}" if fraction else "")


def accepts_by(rule: str) -> Accepts:
    """Whether an answer agrees with the row's own: `number` (the same final number), `choice` (it
    begins with the letter A to H that is the row's own answer, or is the same text), or
    `regex:PATTERN` (found in the answer). Raises BadOption for another rule; with `number` the
    function raises NoPair where the row's own answer has none."""
    if rule == "number":
        return _same_number
    if rule == "choice":
        return _same_choice
    if rule.startswith("regex:"):
        try:
            pattern = re.compile(rule.removeprefix("regex:"))
        except re.error as error:
            raise BadOption(
                f"--accept {rule}: not a regular expression ({error}); mend it"
            ) from None
        return lambda answer, right: bool(pattern.search(answer))
    raise BadOption(f"--accept {rule}: unknown; try number, choice or regex:PATTERN")


def _same_number(answer: str, right: str) -> bool:
    wanted = final_number(right)
    if wanted is None:
        raise NoPair("its own answer has no number to compare with; give --accept choice or regex:")
    return final_number(answer) == wanted


def _same_choice(answer: str, right: str) -> bool:
    if letter := _LETTER.fullmatch(right.strip()):
        first = _LETTER.match(answer.strip())
        return first is not None and first[1] == letter[1]
    return _normalised(answer) == _normalised(right)


def _normalised(text: str) -> str:
    return " ".join(text.split()).casefold().rstrip(".")


def nearest(chosen: str, refused: Sequence[str]) -> str:
    """The refused answer with the fewest edits from `chosen`, the first of equals. Raises NoPair
    where there is none."""
    answers = [answer for answer in refused if answer.strip() and answer.strip() != chosen.strip()]
    if not answers:
        raise NoPair("the check refused none of the answers")
    return min(answers, key=lambda answer: Levenshtein.distance(chosen, answer))


def swapped_answers(answers: Sequence[str], draw: random.Random) -> list[str | None]:
    """For each answer, the different one of the next row in a random order; None where all are the
    same. Empty answers are not used."""
    order = [row for row, answer in enumerate(answers) if answer.strip()]
    draw.shuffle(order)
    swapped: list[str | None] = [None] * len(answers)
    for index, row in enumerate(order):
        following = (answers[order[(index + step) % len(order)]] for step in range(1, len(order)))
        swapped[row] = next(
            (answer for answer in following if answer.strip() != answers[row].strip()), None
        )
    return swapped
