"""Encoding notes: what a user should know of how rows became tokens, with counts.

    pool: thoughts dropped by the chat template in 8 of 8 answers that have one
    pool: the tokenizer changes texts: 'fruit.⏎An' reads back as 'fruit.⏎ An'

Choices made here:
- counts are of the rows given: all of a small pool or a uniform sample of it, and all pairs;
- the first READ_BACK rows are read back from their tokens.
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from contextlib import suppress
from itertools import islice

from prism_select.data.encoding import Encoded, Encoder
from prism_select.data.records import Example
from prism_select.run.errors import BadRow

__all__ = ["encoding_notes"]

READ_BACK = 8
ROLES = ("system", "user", "assistant", "tool")


def encoding_notes(
    encoder: Encoder, examples: Iterable[Example], rows: Sequence[Encoded], name: str
) -> list[str]:
    """Lines about the `rows` that `examples` became; `name` is what they are."""
    by = "the chat template" if encoder.template == "chat" else "--template plain"
    lost = Counter(loss for row in rows for loss in row.losses)
    in_rows = Counter(loss for row in rows for loss in set(row.losses))
    notes = list[str]()
    for loss, count in lost.items():
        of_rows = f"in {in_rows[loss]:,} of {len(rows):,} rows"
        if loss == "thought":
            thoughts = sum(row.thoughts for row in rows)
            notes.append(
                f"{name}: thoughts dropped by {by} in {count:,} of {thoughts:,} answers that have "
                "one: they are not scored"
            )
        elif loss == "answer":
            notes.append(f"{name}: answers are changed by {by} {of_rows}: scored is what it shows")
        elif loss in ROLES:
            notes.append(f"{name}: what the {loss} says is left out by {by} {of_rows}")
        else:
            notes.append(f"{name}: {loss} is not shown by {by}, {of_rows}")
    for example in islice(examples, READ_BACK):
        with suppress(BadRow):
            if line := encoder.misread(example):
                return [*notes, f"{name}: the tokenizer changes texts: {line}"]
    return notes
