"""Scoring: a window of pool rows in, one table with a line per row out.

    score           along the direction                 score_per_token    score / tokens
    score_chosen    along its chosen half               score_rejected     score_chosen − score

Choices made here: a row that cannot be encoded, or whose score is not finite, gets a reason and no numbers, and harms
no other row; the rejected half is a difference, so that the halves add up to the score to the last bit.
"""

import math
from collections.abc import Sequence
from typing import Any

import pyarrow as pa
import torch

from prism_select.core.engines import Engine
from prism_select.data.batches import Encoded, Encoder, collate, plan_batches
from prism_select.data.records import Example, Raw
from prism_select.errors import BadRow
from prism_select.progress import Task
from prism_select.store import SHARD

__all__ = ["Scorer"]


class Scorer:
    """Adds up, over its windows, the tokens that were real and those that were computed."""

    def __init__(self, encoder: Encoder, engine: Engine, batch_tokens: int, device: torch.device) -> None:
        self.encoder, self.engine, self.batch_tokens, self.device = encoder, engine, batch_tokens, device
        self.real = self.computed = 0

    @property
    def padding(self) -> float:
        """Share of the computed tokens that were padding."""
        return 1 - self.real / self.computed if self.computed else 0.0

    def table(self, start: int, window: Sequence[tuple[Raw, Example | BadRow]], task: Task) -> pa.Table:
        records = [self._empty(start + place, *row) for place, row in enumerate(window)]
        encoded: dict[int, Encoded] = {}
        for place, (_, example) in enumerate(window):
            try:
                if isinstance(example, BadRow):
                    raise example
                encoded[place] = self.encoder.encode(example)
            except BadRow as bad:
                records[place]["reason"] = bad.what
                task.advance(1)
        places = list(encoded)
        for batch in plan_batches([len(encoded[place].tokens) for place in places], self.batch_tokens):
            chosen = [places[i] for i in batch]
            self._score([encoded[place] for place in chosen], [records[place] for place in chosen])
            task.advance(len(chosen), sum(len(encoded[place].tokens) for place in chosen))
        return pa.Table.from_pylist(records, schema=SHARD)

    def _empty(self, row: int, raw: Raw, example: Example | BadRow) -> dict[str, Any]:
        record: dict[str, Any] = dict.fromkeys(SHARD.names)
        record |= {"row": row, "file": raw.file, "line": raw.line}
        if isinstance(example, Example):
            record |= {"id": example.id, "source": example.source}
        return record

    def _score(self, rows: Sequence[Encoded], records: Sequence[dict[str, Any]]) -> None:
        batch = collate(rows, self.device)
        loglik, values, _ = self.engine(batch)
        self.real += sum(len(row.tokens) for row in rows)
        self.computed += batch.tokens.numel()
        for row, record, likelihood, (score, chosen) in zip(
            rows, records, loglik.tolist(), values.tolist(), strict=True
        ):
            if not all(map(math.isfinite, (likelihood, score, chosen))):
                record["reason"] = f"its score is not finite ({score}, log-likelihood {likelihood})"
                continue
            record |= {
                "score": score,
                "score_per_token": score / row.targets,
                "tokens": row.targets,
                "length": len(row.tokens),
                "loglik": likelihood,
                "score_chosen": chosen,
                "score_rejected": chosen - score,
                "truncated": row.truncated,
            }
