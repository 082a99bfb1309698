"""Scoring: a window of pool rows in, one table with a line per row out.

    score           along the direction                 score_per_token    score / tokens
    score_chosen    along its chosen half               score_rejected     score_chosen − score
    score_cosine    score / (‖∇loglik‖ ‖direction‖)     score_se           from scores along groups of the pairs

    several targets     mean, round-robin: the mean of their scores     max: the best of them, and its chosen half

Choices made here: a row that cannot be encoded, or whose score is not finite, gets a reason and no
numbers, and harms no other row; rows of a window that are the same to the last token are scored
once; the rejected half is a difference, so that the halves add up to the score to the last bit; a
batch that a device has no memory for is tried in halves."""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from prism_select.core.likelihood import Batch
from prism_select.data.batches import collate, plan_batches
from prism_select.data.encoding import Encoded, Encoder
from prism_select.data.records import Example, Raw
from prism_select.directions.layout import DirectionLayout, Floats
from prism_select.run.config import ScoreConfig
from prism_select.run.errors import BadRow
from prism_select.run.folder import SHARD
from prism_select.run.progress import Task
from prism_select.scoring.batched_engine import BatchedEngine

__all__ = ["Scorer", "TokenCounts", "Window"]


@dataclass(frozen=True, slots=True)
class Window:
    """Rows of the pool, and their places in it, that are read, sorted by length, scored and written
    together; `wanted` unless they are another's to score, or scored already."""

    number: int
    places: Sequence[int]
    rows: Sequence[tuple[Raw, Example | BadRow]]
    wanted: bool


class TokenCounts:
    """Adds up, over windows: the tokens of all rows; of those that were computed, all and the real
    ones; the rows that needed no computing, since another of their window is the same."""

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
        encoder: Encoder,
        measure: BatchedEngine,
        lines: DirectionLayout,
        config: ScoreConfig,
        device: torch.device,
    ) -> None:
        self.encoder, self.measure, self.lines, self.config, self.device = (
            encoder,
            measure,
            lines,
            config,
            device,
        )

    @property
    def schema(self) -> pa.Schema:
        """Columns of every run, and those of this one."""
        names = [f"score:{name}" for name in self.lines.targets if name]
        names += [f"score_damping_{value:g}" for value in self.lines.dampings]
        names += ["gradient_norm", "score_cosine"] if self.config.normalize == "norm" else []
        more = [pa.field(name, pa.float64()) for name in names]
        if self.lines.groups:
            more += [
                pa.field("score_se", pa.float64()),
                pa.field("score_groups", pa.list_(pa.float64())),
            ]
        if self.config.tokens:
            more += [
                pa.field("token_scores", pa.list_(pa.float32())),
                pa.field("token_texts", pa.list_(pa.string())),
            ]
        halves = () if self.lines.halves else ("score_chosen", "score_rejected")
        return pa.schema([*(part for part in SHARD if part.name not in halves), *more])

    def tables(
        self, windows: Iterable[Window], task: Task
    ) -> Iterator[tuple[Window, pa.Table | None]]:
        """Each window, with its table where it is wanted."""
        for window in windows:
            yield window, self.table(window.places, window.rows, task) if window.wanted else None

    def table(
        self, places: Sequence[int], window: Sequence[tuple[Raw, Example | BadRow]], task: Task
    ) -> pa.Table:
        """A line for each row of a window; `places` are theirs in the pool."""
        reasons: dict[int, str] = {}
        encoded: dict[int, Encoded] = {}
        for place, (_, example) in enumerate(window):
            try:
                if isinstance(example, BadRow):
                    raise example
                encoded[place] = self.encoder.encode(example)
            except BadRow as bad:
                reasons[place] = bad.what
                task.advance(1)
        alike = defaultdict[Any, list[int]](list)
        for place, row in encoded.items():
            alike[tuple(row.tokens), tuple(row.supervised), row.truncated].append(place)
        groups, order, parts = list(alike.values()), list[list[int]](), list[pa.Table]()
        self.tokens += sum(len(row.tokens) for row in encoded.values())
        self.repeated += len(encoded) - len(groups)
        for few in plan_batches(
            [len(encoded[group[0]].tokens) for group in groups], self.measure.tokens
        ):
            rows = [encoded[groups[i][0]] for i in few]
            columns = self._score(rows, collate(rows, self.device))
            told = zip(few, columns.pop("reason"), strict=True)
            reasons |= {place: why for i, why in told if why for place in groups[i]}
            order += [groups[i] for i in few]
            parts.append(pa.table(columns))
            task.advance(sum(len(groups[i]) for i in few), sum(len(row.tokens) for row in rows))
        return self._as_table(
            places, window, (pa.concat_tables(parts) if parts else None, order), reasons
        )

    def _score(self, rows: Sequence[Encoded], batch: Batch) -> dict[str, Any]:
        (loglik, values, tokens), norms = self.measure(batch)
        self.real += sum(len(row.tokens) for row in rows)
        self.computed += batch.tokens.numel()
        along, likelihood = values.double().cpu().numpy(), loglik.double().cpu().numpy()
        lengths = None if norms is None else norms.double().cpu().numpy()
        columns: dict[str, Any] = self.lines.columns(along, lengths)
        if self.config.tokens and tokens is not None:
            columns |= self._by_token(batch, tokens.double().cpu().numpy(), along)
        numbers = [along, likelihood] if lengths is None else [along, likelihood, lengths]
        finite = np.isfinite(np.column_stack(numbers)).all(1)
        return columns | {
            "loglik": likelihood,
            "tokens": (counted := np.array([row.targets for row in rows])),
            "score_per_token": columns["score"] / counted,
            "length": [len(row.tokens) for row in rows],
            "truncated": [row.truncated for row in rows],
            "reason": [
                None if good else f"its score is not finite ({score}, log-likelihood {value})"
                for good, score, value in zip(finite, columns["score"], likelihood, strict=True)
            ],
        }

    def _by_token(self, batch: Batch, tokens: Floats, along: Floats) -> dict[str, Any]:
        """What each supervised token adds to the score, and its text: a score belongs to the token
        predicted."""
        count, best = len(self.lines.targets), self.lines.best
        each = [
            part[:, place] if best else part[:, :count].mean(1)
            for part, place in zip(tokens, along[:, :count].argmax(1), strict=True)
        ]
        predicted, ids = batch.predicted.cpu().numpy(), batch.tokens[:, 1:].cpu().numpy()
        texts = [row[here].tolist() for row, here in zip(ids, predicted, strict=True)]
        return {
            "token_scores": [
                part[here].tolist() for part, here in zip(each, predicted, strict=True)
            ],
            "token_texts": [
                [self.encoder.tokenizer.decode([token]) for token in row] for row in texts
            ],
        }

    def _as_table(
        self,
        places: Sequence[int],
        window: Sequence[tuple[Raw, Example | BadRow]],
        found: tuple[pa.Table | None, Sequence[Sequence[int]]],
        reasons: Mapping[int, str],
    ) -> pa.Table:
        scored, order = found
        at = {place: i for i, group in enumerate(order) for place in group if place not in reasons}
        index = pa.array([at.get(place) for place in range(len(window))], pa.int64())
        good = [example if isinstance(example, Example) else None for _, example in window]
        told = {
            "row": places,
            "id": [example and example.id for example in good],
            "source": [example and example.source for example in good],
            "file": [raw.file for raw, _ in window],
            "line": [raw.line for raw, _ in window],
            "reason": [reasons.get(place) for place in range(len(window))],
        }
        columns = [
            pa.array(told[field.name], field.type)
            if field.name in told
            else pa.nulls(len(window), field.type)
            if scored is None
            else scored[field.name].cast(field.type).take(index)
            for field in self.schema
        ]
        return pa.table(columns, schema=self.schema)
