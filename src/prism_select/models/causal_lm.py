"""Models: load a causal language model, freeze it, and split it into body and head.

    hidden(batch)  -> states      the network's decoder, positions given explicitly
    logits(states) -> logits      the network's own forward from the last hidden state on: head, bias, scaling, capping

Choices made here: safetensors or GGUF only, never pickle, never code from the model's folder;
evaluation mode, all weights frozen; fused experts run one by one, since that form has a
forward-mode derivative; the split is proved on three tokens when a model is wrapped."""

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from prism_select.core.blocks import decoder_of
from prism_select.core.likelihood import Batch
from prism_select.run.errors import BadModel

__all__ = ["CausalLM"]


class CausalLM:
    """A Hugging Face causal language model as the core sees it."""

    def __init__(self, network: Any) -> None:
        self.network: nn.Module = network.eval().requires_grad_(False)
        self.body: nn.Module = decoder_of(network)[1]
        if self.body is network:
            raise BadModel(
                f"{type(network).__name__}: its body and head are one; try another architecture"
            )
        self.vocabulary: int = network.get_output_embeddings().weight.shape[0]
        self._takes_positions = "position_ids" in inspect.signature(self.body.forward).parameters
        self._prove_split()

    @property
    def device(self) -> torch.device:
        return next(self.network.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        return next(self.network.parameters()).dtype

    def hidden(self, batch: Batch) -> Float[Tensor, "batch time width"]:
        positions = {"position_ids": batch.positions} if self._takes_positions else {}
        output = self.body(
            input_ids=batch.tokens,
            attention_mask=batch.real.long(),
            use_cache=False,
            return_dict=True,
            **positions,
        )
        states: Tensor = output.last_hidden_state
        return states

    def logits(self, hidden: Float[Tensor, "rows width"]) -> Float[Tensor, "rows vocabulary"]:
        start = torch.zeros(1, 1, dtype=torch.long, device=hidden.device)
        with _answering(self.body, hidden[None]):
            logits: Tensor = self.network(
                input_ids=start, use_cache=False, return_dict=True
            ).logits[0]
        return logits

    @torch.no_grad()
    def _prove_split(self) -> None:
        tokens = torch.tensor([[0, 1, 2]], device=self.device) % self.vocabulary
        every = torch.ones_like(tokens, dtype=torch.bool)
        whole = self.network(input_ids=tokens, attention_mask=every.long(), use_cache=False).logits[
            0
        ]
        split = self.logits(self.hidden(Batch(tokens, every, every))[0])
        if whole.isfinite().all() and not torch.allclose(whole, split, rtol=1e-2, atol=1e-2):
            name = type(self.network).__name__
            raise BadModel(
                f"{name}: its output head cannot be run apart from its body; try another architecture"
            )


class _Answer:
    """What a body returns, with nothing but the last hidden state in it."""

    def __init__(self, hidden: Tensor) -> None:
        self.last_hidden_state = hidden

    def __getitem__(self, place: int) -> Tensor | None:
        return self.last_hidden_state if place == 0 else None

    def __getattr__(self, name: str) -> None:
        return None


@contextmanager
def _answering(body: nn.Module, hidden: Tensor) -> Iterator[None]:
    """While open, `body` returns `hidden` without computing anything."""
    before = body.__dict__.get("forward")
    body.forward = lambda *args, **named: _Answer(hidden)
    try:
        yield
    finally:
        del body.forward
        if before is not None:
            body.forward = before
