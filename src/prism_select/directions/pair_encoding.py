"""Pair encoding: the two answers of each pair in tokens, each with its prompt.

Choices made here:
- a pair whose two answers are the same tokens stops the run, because it says nothing; so do pairs
  that lose the end of most answers of one side, because they say how long an answer is.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch

from prism_select.core.target_gradient import Side
from prism_select.data.batches import collate, plan_batches
from prism_select.data.encoding import Encoded, Encoder
from prism_select.data.encoding_notes import encoding_notes
from prism_select.data.records import Pair
from prism_select.run.errors import BadFile, BadRow
from prism_select.run.polarity import Polarity

__all__ = [
    "EncodedPairs",
    "as_side",
    "encode_sides",
    "notes_on",
    "refuse_truncated",
    "supervised_tokens",
]


class EncodedPairs(NamedTuple):
    """Both answers of the same pairs, each with its prompt."""

    chosen: Sequence[Encoded]
    rejected: Sequence[Encoded]


def encode_sides(pairs: Sequence[Pair], encoder: Encoder) -> EncodedPairs:
    """Raises BadRow for a pair whose two answers are the same tokens."""
    chosen = [encoder.encode(pair.chosen) for pair in pairs]
    rejected = [encoder.encode(pair.rejected) for pair in pairs]
    for pair, a, b in zip(pairs, chosen, rejected, strict=True):
        if a.tokens == b.tokens and not pair.alone:
            raise BadRow(
                pair.chosen.file,
                pair.chosen.line,
                "chosen and rejected are the same tokens" + _lost(a, b),
                "give answers that differ, or raise --max-length",
            )
    return EncodedPairs(chosen, rejected)


def _lost(*answers: Encoded) -> str:
    """What the template leaves out of answers that differ in it."""
    losses = sorted({loss for answer in answers for loss in answer.losses})
    return f": the template leaves out their {' and '.join(losses)}" if losses else ""


def notes_on(
    name: str, pairs: Sequence[Pair], encoded: EncodedPairs, encoder: Encoder
) -> list[str]:
    """What encoding does to both sides of a target's pairs."""
    examples = [answer for pair in pairs for answer in (pair.chosen, pair.rejected)]
    rows = [row for rows in zip(*encoded, strict=True) for row in rows]
    label = f"target {name}" if name else "pairs"
    notes = encoding_notes(encoder, examples, rows, label)
    if repeated := sum(pair.repeated for pair in pairs):
        notes.append(
            f"{label}: both answers begin with their prompt again in {repeated:,} of "
            f"{len(pairs):,} pairs: it is cut off"
        )
    return notes


def refuse_truncated(
    pairs: Sequence[Pair], encoded: EncodedPairs, encoder: Encoder, polarity: Polarity
) -> None:
    """Raises BadFile where more than half of the chosen or of the rejected answers lose their
    end."""
    names = (polarity.toward, polarity.away)
    counts = {
        name: sum(row.truncated for row in rows) for name, rows in zip(names, encoded, strict=True)
    }
    for name, count in counts.items():
        if 2 * count > len(pairs):
            raise BadFile(
                pairs[0].chosen.file,
                None,
                f"{count} of {len(pairs)} {name} answers lose their end, being cut to "
                f"{encoder.max_length} tokens with their prompts",
                "raise --max-length as far as the model goes, shorten the prompts, or leave long "
                "pairs out",
            )


def as_side(rows: Sequence[Encoded], batch_tokens: int, device: torch.device) -> Side:
    """One side of the pairs, in batches of rows of like length."""
    plan = plan_batches([len(row.tokens) for row in rows], batch_tokens)
    batches = [collate([rows[pair] for pair in batch], device) for batch in plan]
    return Side(batches, [pair for batch in plan for pair in batch])


def supervised_tokens(rows: Sequence[Encoded]) -> list[list[int]]:
    return [
        [token for token, counts in zip(row.tokens, row.supervised, strict=True) if counts]
        for row in rows
    ]
