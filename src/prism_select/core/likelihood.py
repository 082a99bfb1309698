"""Log-likelihood of supervised tokens: the only place where a loss is written.

    token_logliks[t] = log p(y_t | x, y_<t)      nats, never above 0
    loglik           = Σ_t token_logliks[t]      over the supervised tokens of one example
    mean_loglik      = loglik / tokens           what a gap compares (nats per token)

Choices made here:
- the head runs on supervised positions alone, and on at most `HEAD_LOGITS` logits at a time, so a
  vocabulary of 262,144 words never makes a full tensor of logits;
- the softmax is taken in float32 or better, on the device of the head; all sums are on that of the
  tokens;
- the first token of a row has no context and is never predicted.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional

__all__ = ["Batch", "LanguageModel", "backward", "mean_logliks", "token_logliks"]

HEAD_LOGITS = 2**25  # logits alive at a time: 128 MB in float32


@dataclass(frozen=True, slots=True)
class Batch:
    """Rows of equal length, padded on either side. `real` is False on padding; `supervised` is True
    on the tokens of the loss."""

    tokens: Int[Tensor, "batch time"]
    real: Bool[Tensor, "batch time"]
    supervised: Bool[Tensor, "batch time"]

    @property
    def positions(self) -> Int[Tensor, "batch time"]:
        """The position of each real token in its own row, from 0, wherever the padding stands."""
        return (self.real.long().cumsum(1) - 1).clamp(min=0)

    @property
    def predicted(self) -> Bool[Tensor, "batch context"]:
        """True at position t where token t + 1 is supervised and token t is there to predict it."""
        return self.supervised[:, 1:] & self.real[:, :-1] & self.real[:, 1:]

    @property
    def counts(self) -> Int[Tensor, " batch"]:
        """Supervised tokens per row."""
        return self.predicted.sum(1)

    def rows(self, index: slice) -> "Batch":
        return Batch(self.tokens[index], self.real[index], self.supervised[index])

    def __len__(self) -> int:
        return len(self.tokens)


class LanguageModel(Protocol):
    """What the core needs of a model: hidden states, then the logits of any of them, so the head
    can run in chunks. Parts of it may be on several devices; hidden states come back to that of the
    tokens."""

    @property
    def network(self) -> nn.Module: ...

    @property
    def vocabulary(self) -> int: ...

    def hidden(self, batch: Batch) -> Float[Tensor, "batch time width"]: ...

    def logits(self, hidden: Float[Tensor, "rows width"]) -> Float[Tensor, "rows vocabulary"]: ...


class _Chunk(NamedTuple):
    """Some states that predict something, the tokens that they predict, and their examples."""

    states: Float[Tensor, "rows width"]
    targets: Int[Tensor, " rows"]
    examples: Int[Tensor, " rows"]


def _logliks(
    model: LanguageModel,
    hidden: Float[Tensor, "rows width"],
    targets: Int[Tensor, " rows"],
    draw: torch.Generator | None = None,
) -> Float[Tensor, " rows"]:
    """The loss of the whole library, with its sign turned: the log-likelihood of each target, or of
    a token that `draw` draws from the model."""
    logits = model.logits(hidden)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if draw is not None:
        shares = logits.detach().softmax(-1).to(draw.device)
        targets = shares.multinomial(1, generator=draw)[:, 0]
    losses = functional.cross_entropy(logits, targets.to(logits.device), reduction="none")
    return -losses.to(hidden.device)


def _head_chunks(
    model: LanguageModel, batch: Batch, hidden: Float[Tensor, "batch time width"]
) -> Iterator[_Chunk]:
    predicted = batch.predicted
    states, targets = hidden[:, :-1][predicted], batch.tokens[:, 1:][predicted]
    examples = predicted.nonzero()[:, 0]
    size = max(1, HEAD_LOGITS // model.vocabulary)
    chunks = zip(states.split(size), targets.split(size), examples.split(size), strict=True)
    return (_Chunk(*chunk) for chunk in chunks)


def token_logliks(model: LanguageModel, batch: Batch) -> Float[Tensor, "batch context"]:
    """Log-likelihood of token t + 1 at position t, and 0 where that token is not supervised."""
    chunks = _head_chunks(model, batch, model.hidden(batch))
    values = torch.cat([_logliks(model, chunk.states, chunk.targets) for chunk in chunks])
    predicted = batch.predicted
    zeros = torch.zeros(predicted.shape, dtype=values.dtype, device=values.device)
    return zeros.masked_scatter(predicted, values)


def mean_logliks(model: LanguageModel, batch: Batch) -> Float[Tensor, " batch"]:
    """mean_loglik of each example, without a graph, in float64 on the CPU."""
    with torch.no_grad():
        return token_logliks(model, batch).cpu().double().sum(1) / batch.counts.cpu()


def backward(
    model: LanguageModel,
    batch: Batch,
    weights: Float[Tensor, " batch"],
    on_rows: Callable[[Int[Tensor, " rows"]], None] = lambda examples: None,
    draw: torch.Generator | None = None,
) -> Float[Tensor, " batch"]:
    """Sends the gradient of Σ_b weights[b] · loglik[b] to every tensor that asks for one; returns
    loglik of each example. `draw` puts tokens drawn from the model in place of the targets.

    Each chunk of the head goes backward at once, so the logits of one chunk are all that is ever
    held; the body follows. `on_rows` gets, before each of these passes, the example of each row of
    the coming gradients."""
    hidden = model.hidden(batch)
    total = torch.zeros(
        len(batch), dtype=torch.promote_types(hidden.dtype, torch.float32), device=hidden.device
    )
    states, gradients = [], []
    for chunk in _head_chunks(model, batch, hidden):
        on_rows(chunk.examples)
        leaf = chunk.states.detach().requires_grad_()
        values = _logliks(model, leaf, chunk.targets, draw)
        (values * weights.to(values)[chunk.examples]).sum().backward()
        total.index_add_(0, chunk.examples, values.detach().to(total))
        states.append(chunk.states)
        gradients.append(leaf.grad)
    if hidden.requires_grad and states:
        on_rows(torch.arange(len(batch), device=hidden.device).repeat_interleave(hidden.shape[1]))
        torch.autograd.backward(states, gradients)
    return total
