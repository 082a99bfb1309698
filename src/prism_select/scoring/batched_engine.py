"""Batched engine: as many rows at a time as the memory of the device allows.

    rows at a time = tokens / width      width: tokens of the longest row, padding included

Choices made here:
- rows that do not fit are tried again at half the tokens, and the lower limit stays;
- scores come in the order of the rows, whatever the batches were.
"""

from collections.abc import Callable, Sequence
from typing import TypeAlias, cast

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from prism_select.core.engines import Engine, Scores
from prism_select.core.likelihood import Batch
from prism_select.data.batches import collate, plan_batches
from prism_select.data.encoding import Encoded
from prism_select.directions.layout import Floats
from prism_select.run.errors import TooLarge, out_of_memory

__all__ = ["BatchedEngine", "Measure", "score_rows", "without_norms"]

Norms: TypeAlias = Float[Tensor, " batch"]
Measure: TypeAlias = Callable[[Batch], tuple[Scores, Norms | None]]  # ‖∇loglik‖ where measured


def without_norms(engine: Engine) -> Measure:
    return lambda batch: (engine(batch), None)


class BatchedEngine:
    """A measure that takes at most `tokens` tokens at a time, padding included. Raises TooLarge for
    a single row that does not fit."""

    def __init__(self, measure: Measure, tokens: int) -> None:
        self.measure, self.tokens = measure, tokens

    def __call__(self, batch: Batch) -> tuple[Scores, Norms | None]:
        results, start, width = list[tuple[Scores, Norms | None]](), 0, batch.tokens.shape[1]
        while start < len(batch):
            rows = batch.rows(slice(start, start + max(1, self.tokens // width)))
            try:
                results.append(self.measure(rows))
                start += len(rows)
            except (RuntimeError, MemoryError) as error:
                if not out_of_memory(error):
                    raise
                if len(rows) == 1:
                    raise TooLarge(f"a row of {width} tokens", str(rows.tokens.device)) from None
                self.tokens = rows.tokens.numel() // 2
        if len(results) == 1:
            return results[0]
        columns = zip(*((*scores, norms) for scores, norms in results), strict=True)
        loglik, values, tokens, norms = (
            None if column[0] is None else torch.cat(column) for column in columns
        )
        return Scores(cast("Tensor", loglik), cast("Tensor", values), tokens), norms


def score_rows(
    engine: BatchedEngine, rows: Sequence[Encoded], device: torch.device
) -> tuple[Floats, Floats | None]:
    """Scores [row, direction], and ‖∇loglik‖ of each row where the engine measures it."""
    order, values, lengths = list[int](), list[Floats](), list[Floats]()
    for indices in plan_batches([len(row.tokens) for row in rows], engine.tokens):
        scores, norms = engine(collate([rows[i] for i in indices], device))
        order += indices
        values.append(scores.values.double().cpu().numpy())
        lengths += [] if norms is None else [norms.double().cpu().numpy()]
    back = np.argsort(order)
    return np.concatenate(values)[back], np.concatenate(lengths)[back] if lengths else None
