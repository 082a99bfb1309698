"""Pairing: what people have, made into pairs whose two answers differ in the behaviour and in
little else.

    numbers   a worked solution, and the same with its numbers changed (a near miss)
    choices   the right choice, and wrong ones
    answers   an answer, and the nearest one of the model's own that a check refuses
    weak      an answer, and that of a weaker model, from a column
    swap      an answer, and that of another row: a far negative, for control

Choices made here: `chosen` is always the row's own answer, to the letter; nothing is drawn but from
the generator given, so the same seed makes the same bytes; a row of which no pair can be made is
told with its reason, never lost."""

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
    "other_answers",
    "parts_of",
]

Accepts: TypeAlias = Callable[[str, str], bool]


_DIGITS = re.compile(r"[0-9]+")


_NUMBER = re.compile(r"-?[0-9]+(?:,[0-9]{3})*(?:\.[0-9]+)?(?:/[0-9]+)?")


_LETTER = re.compile(r"\(?([A-H])\b\)?[.):]?")


class NoPair(Exception):
    """Why a row gives no pair; counted and written down, not an error."""


def parts_of(example: Example) -> tuple[tuple[Turn, ...], str]:
    """The prompt's turns and the last answer. Raises NoPair for a bare text or a row that does not
    end in an answer."""
    *prompt, answer = example.turns
    if answer.role != "assistant":
        raise NoPair("it is a bare text" if answer.role == "text" else "its last turn is no answer")
    if not prompt:
        raise NoPair("it has no prompt")
    return tuple(prompt), answer.text


def change_numbers(answer: str, draw: random.Random) -> str:
    """`answer` with every run of digits another one of the same length, so that the final number
    certainly differs and all before the first number is kept. Raises NoPair when there is no number
    in it."""

    def other(found: re.Match[str]) -> str:
        digits = found[0]
        first = "123456789" if len(digits) > 1 and digits[0] != "0" else "0123456789"
        while True:
            drawn = draw.choice(first) + "".join(draw.choices("0123456789", k=len(digits) - 1))
            if drawn != digits:
                return drawn

    changed = _DIGITS.sub(other, answer)
    if changed == answer:
        raise NoPair("its answer has no number")
    return changed


def final_number(text: str) -> str | None:
    """The last number in a text without thousands separators and trailing zeros; None where there
    is none. A fraction such as 3/4 is one number."""
    found = _NUMBER.findall(text.replace("\N{MINUS SIGN}", "-"))
    if not found:
        return None
    return "/".join(_canonical(number) for number in found[-1].replace(",", "").split("/"))


def _canonical(number: str) -> str:
    whole, _, part = number.partition(".")
    sign, whole = whole[: whole.startswith("-")], whole.removeprefix("-").lstrip("0") or "0"
    part = part.rstrip("0")
    return sign + whole + (f".{part}" if part else "")


def accepts_by(rule: str) -> Accepts:
    """Whether an answer agrees with the row's own: `number` (the same final number), `choice` (it
    begins with the letter A to H that is the row's own answer, or is the same text), or
    `regex:PATTERN` (found in the answer). Raises BadOption for anything else."""
    if rule == "number":
        return lambda answer, right: (
            final_number(answer) is not None and final_number(answer) == final_number(right)
        )
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


def _same_choice(answer: str, right: str) -> bool:
    letter = _LETTER.fullmatch(right.strip())
    if letter:
        said = _LETTER.match(answer.strip())
        return said is not None and said[1] == letter[1]
    return _plain(answer) == _plain(right)


def _plain(text: str) -> str:
    return " ".join(text.split()).casefold().rstrip(".")


def nearest(chosen: str, refused: Sequence[str]) -> str:
    """The refused answer with the fewest edits from `chosen`; the first of equals. Raises NoPair
    when there is none."""
    others = [answer for answer in refused if answer.strip() and answer.strip() != chosen.strip()]
    if not others:
        raise NoPair("the check refused none of the answers")
    return min(others, key=lambda answer: Levenshtein.distance(chosen, answer))


def other_answers(answers: Sequence[str], draw: random.Random) -> list[str | None]:
    """For each answer that of the next row in a random order whose answer is another; None where
    all are the same. Empty answers are nobody's."""
    order = [row for row, answer in enumerate(answers) if answer.strip()]
    draw.shuffle(order)
    found: list[str | None] = [None] * len(answers)
    for place, row in enumerate(order):
        others = (answers[order[(place + step) % len(order)]] for step in range(1, len(order)))
        found[row] = next(
            (other for other in others if other.strip() != answers[row].strip()), None
        )
    return found
