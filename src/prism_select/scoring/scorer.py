"""Scorer: a window of pool rows in, one table with a line per row out.

    score           along the direction                 score_per_token    score / tokens
    score_chosen    along its chosen half               score_rejected     score_chosen − score
    score_cosine    score / (‖∇loglik‖ ‖direction‖)

    several targets     mean, round-robin: the mean of their scores
                        max: the highest of them, and the chosen half of that target

Choices made here:
- a row that cannot be encoded, or whose score is not finite, gets a reason and no numbers, and
  harms no other row;
- rows of a window with the same tokens are scored once.
"""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from prism_select.core.likelihood import Batch
from prism_select.data.batches import collate, plan_batches
from prism_select.data.encoding import Encoded
from prism_select.data.records import Example, Raw
from prism_select.directions.layout import DirectionLayout, Floats
from prism_select.models.loading import LoadedModel
from prism_select.run.config import ScoreConfig
from prism_select.run.errors import BadRow
from prism_select.run.folder import SHARD
from prism_select.run.progress import Task
from prism_select.scoring.batched_engine import BatchedEngine

__all__ = ["Scorer", "TokenCounts", "Window"]


@dataclass(frozen=True, slots=True)
class Window:
    """Rows of the pool, with their indices in it, that are read, sorted by length, scored and
    written together. `to_score` is False where another process scores them, or a shard has their
    scores already."""

    number: int
    indices: Sequence[int]
    rows: Sequence[tuple[Raw, Example | BadRow]]
    to_score: bool


class TokenCounts:
    """Sums over windows: `tokens` of all rows, `computed` tokens with padding and `real` ones
    without, and `repeated` rows, whose tokens another row of their window has too."""

    tokens = real = computed = repeated = 0

    @property
    def sums(self) -> tuple[int, int, int, int]:
        return self.tokens, self.real, self.computed, self.repeated

    @sums.setter
    def sums(self, values: Sequence[int]) -> None:
        self.tokens, self.real, self.computed, self.repeated = values

    @property
    def padding(self) -> float:
        """Share of the computed tokens that were padding."""
        return 1 - self.real / self.computed if self.computed else 0.0


class Scorer(TokenCounts):
    def __init__(
        self,
        loaded: LoadedModel,
        engine: BatchedEngine,
        layout: DirectionLayout,
        config: ScoreConfig,
    ) -> None:
        self.loaded, self.engine, self.layout, self.config = loaded, engine, layout, config

    @property
    def schema(self) -> pa.Schema:
        """Columns of every run, and those of this one."""
        names = [f"score:{name}" for name in self.layout.targets if name]
        names += [f"score_damping_{value:g}" for value in self.layout.dampings]
        names += ["gradient_norm", "score_cosine"] if self.config.normalize == "norm" else []
        added = [pa.field(name, pa.float64()) for name in names]
        if self.config.tokens:
            added += [
                pa.field("token_scores", pa.list_(pa.float32())),
                pa.field("token_texts", pa.list_(pa.string())),
            ]
        dropped = () if self.layout.halves else ("score_chosen", "score_rejected")
        return pa.schema([*(field for field in SHARD if field.name not in dropped), *added])

    def tables(
        self, windows: Iterable[Window], task: Task
    ) -> Iterator[tuple[Window, pa.Table | None]]:
        """Each window, with its table where it is to be scored."""
        for window in windows:
            yield window, self.table(window, task) if window.to_score else None

    def table(self, window: Window, task: Task) -> pa.Table:
        """A line for each row of the window."""
        reasons: dict[int, str] = {}
        encoded = self._encode(window, reasons, task)
        by_tokens = defaultdict[Any, list[int]](list)
        for row, coded in encoded.items():
            by_tokens[tuple(coded.tokens), tuple(coded.supervised), coded.truncated].append(row)
        groups, order, scores = list(by_tokens.values()), list[list[int]](), list[pa.Table]()
        self.tokens += sum(len(coded.tokens) for coded in encoded.values())
        self.repeated += len(encoded) - len(groups)
        lengths = [len(encoded[group[0]].tokens) for group in groups]
        for batch in plan_batches(lengths, self.engine.tokens):
            coded_rows = [encoded[groups[i][0]] for i in batch]
            columns = self.batch_columns(coded_rows, collate(coded_rows, self.loaded.model.device))
            for i, reason in zip(batch, columns.pop("reason"), strict=True):
                reasons |= dict.fromkeys(groups[i], reason) if reason else {}
            order += [groups[i] for i in batch]
            scores.append(pa.table(columns))
            tokens = sum(len(coded.tokens) for coded in coded_rows)
            task.advance(sum(len(groups[i]) for i in batch), tokens)
        lines = {row: line for line, group in enumerate(order) for row in group}
        return self._with_rows(window, pa.concat_tables(scores) if scores else None, lines, reasons)

    def _encode(self, window: Window, reasons: dict[int, str], task: Task) -> dict[int, Encoded]:
        """The rows that can be encoded, by their index in the window; adds the others' reasons."""
        encoded: dict[int, Encoded] = {}
        for row, (_, example) in enumerate(window.rows):
            try:
                if isinstance(example, BadRow):
                    raise example
                encoded[row] = self.loaded.encoder.encode(example)
            except BadRow as bad:
                reasons[row] = bad.what
                task.advance(1)
        return encoded

    def batch_columns(self, rows: Sequence[Encoded], batch: Batch) -> dict[str, Any]:
        """Columns of a batch; `reason` is None where a row's numbers are finite."""
        (loglik, values, tokens), norms = self.engine(batch)
        self.real += sum(len(row.tokens) for row in rows)
        self.computed += batch.tokens.numel()
        along, likelihood = values.double().cpu().numpy(), loglik.double().cpu().numpy()
        lengths = None if norms is None else norms.double().cpu().numpy()
        columns: dict[str, Any] = self.layout.columns(along, lengths)
        if self.config.tokens and tokens is not None:
            columns |= self._token_columns(batch, tokens.double().cpu().numpy(), along)
        numbers = [along, likelihood] if lengths is None else [along, likelihood, lengths]
        finite = np.isfinite(np.column_stack(numbers)).all(1)
        supervised = np.array([row.targets for row in rows])
        return columns | {
            "loglik": likelihood,
            "tokens": supervised,
            "score_per_token": columns["score"] / supervised,
            "length": [len(row.tokens) for row in rows],
            "truncated": [row.truncated for row in rows],
            "reason": [
                None if good else f"its score is not finite ({score}, log-likelihood {value})"
                for good, score, value in zip(finite, columns["score"], likelihood, strict=True)
            ],
        }

    def _token_columns(self, batch: Batch, tokens: Floats, along: Floats) -> dict[str, Any]:
        """What each supervised token adds to the score, and its text. `tokens[b, t, k]` belongs to
        token t + 1, which is predicted at position t."""
        targets, best = len(self.layout.targets), self.layout.best
        highest = along[:, :targets].argmax(1)
        added = [
            values[:, target] if best else values[:, :targets].mean(1)
            for values, target in zip(tokens, highest, strict=True)
        ]
        predicted, ids = batch.predicted.cpu().numpy(), batch.tokens[:, 1:].cpu().numpy()
        decode = self.loaded.encoder.tokenizer.decode
        return {
            "token_scores": [v[mask].tolist() for v, mask in zip(added, predicted, strict=True)],
            "token_texts": [
                [decode([token]) for token in row[mask].tolist()]
                for row, mask in zip(ids, predicted, strict=True)
            ],
        }

    def _with_rows(
        self,
        window: Window,
        scores: pa.Table | None,
        lines: Mapping[int, int],
        reasons: Mapping[int, str],
    ) -> pa.Table:
        """The table of a window; `lines[row]` is a row's line in `scores`."""
        rows = range(len(window.rows))
        index = pa.array([None if row in reasons else lines.get(row) for row in rows], pa.int64())
        examples = [example if isinstance(example, Example) else None for _, example in window.rows]
        described = {
            "row": window.indices,
            "id": [example and example.id for example in examples],
            "source": [example and example.source for example in examples],
            "file": [raw.file for raw, _ in window.rows],
            "line": [raw.line for raw, _ in window.rows],
            "reason": [reasons.get(row) for row in rows],
        }
        columns = [
            pa.array(described[field.name], field.type)
            if field.name in described
            else pa.nulls(len(rows), field.type)
            if scores is None
            else scores[field.name].cast(field.type).take(index)
            for field in self.schema
        ]
        return pa.table(columns, schema=self.schema)
