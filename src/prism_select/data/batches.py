"""Batches: conversations to tokens, which of them are supervised, and batches of even length.

    chat    the tokenizer's own template, rendered once; an assistant turn is supervised from where its generation
            prompt ends to its end-of-turn token, which counts
    plain   BOS (if the tokenizer adds one), the turns as they are, a line break after a prompt unless white space
            stands there already, and EOS after each assistant turn, which counts; a bare text is
            supervised from end to end

Choices made here: a special token that the text already carries is not doubled; `skip_end` leaves
the end-of-turn tokens in the text and out of what is supervised; long rows lose their end; batches
are filled in order of length within a window of rows, so that padding is small and memory does not
grow with the pool."""

from collections.abc import Sequence

import torch

from prism_select.core.likelihood import Batch
from prism_select.data.encoding import Encoded

__all__ = ["collate", "plan_batches"]


def plan_batches(lengths: Sequence[int], batch_tokens: int) -> list[list[int]]:
    """Indices of rows in batches of at most `batch_tokens` tokens with padding (one row may be
    longer), longest first, so that running out of memory happens at once or not at all. A batch
    that is an eighth full takes no row that is more than a tenth shorter than its longest."""
    batches: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if batches:
            size, longest = len(batches[-1]), lengths[batches[-1][0]]
            near = lengths[index] >= 0.9 * longest or size * longest < batch_tokens / 8
            if near and (size + 1) * longest <= batch_tokens:
                batches[-1].append(index)
                continue
        batches.append([index])
    return batches


def collate(
    rows: Sequence[Encoded], device: torch.device | str = "cpu", side: str = "right"
) -> Batch:
    """Rows side by side; padding stands on `side` and holds token 0, which no mask lets through."""
    width = max(len(row.tokens) for row in rows)
    tokens = torch.zeros(len(rows), width, dtype=torch.long)
    real = torch.zeros(len(rows), width, dtype=torch.bool)
    supervised = torch.zeros(len(rows), width, dtype=torch.bool)
    for place, row in enumerate(rows):
        start = width - len(row.tokens) if side == "left" else 0
        span = slice(start, start + len(row.tokens))
        tokens[place, span] = torch.tensor(row.tokens)
        real[place, span] = True
        supervised[place, span] = torch.tensor(row.supervised)
    return Batch(tokens.to(device), real.to(device), supervised.to(device))
