"""Batches: encoded rows side by side, of even length.

    lengths 9 8 8 2 2   batch_tokens 27   →   batches [9 8 8] [2 2]   (sizes with padding: 27, 4)

Choices made here:
- rows are batched in order of length, longest first: padding is small, and running out of memory
  happens at once or not at all;
- padding holds token 0, which no mask lets through.
"""

from collections.abc import Sequence

import torch

from prism_select.core.likelihood import Batch
from prism_select.data.encoding import Encoded

__all__ = ["collate", "plan_batches"]


def plan_batches(lengths: Sequence[int], batch_tokens: int) -> list[list[int]]:
    """Indices of rows in batches of at most `batch_tokens` tokens, padding included (a single row
    may be longer). A batch that is an eighth full takes no row that is more than a tenth shorter
    than its longest."""
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
    """The rows as one batch, padded on `side`."""
    width = max(len(row.tokens) for row in rows)
    tokens = torch.zeros(len(rows), width, dtype=torch.long)
    real = torch.zeros(len(rows), width, dtype=torch.bool)
    supervised = torch.zeros(len(rows), width, dtype=torch.bool)
    for index, row in enumerate(rows):
        start = width - len(row.tokens) if side == "left" else 0
        span = slice(start, start + len(row.tokens))
        tokens[index, span] = torch.tensor(row.tokens)
        real[index, span] = True
        supervised[index, span] = torch.tensor(row.supervised)
    return Batch(tokens.to(device), real.to(device), supervised.to(device))
