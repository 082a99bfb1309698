"""Causal language models: a Hugging Face network, frozen, and split into body and head.

    hidden(batch)  → states      the network's decoder, with explicit positions
    logits(states) → logits      the network's own forward pass after the last hidden state

Choices made here:
- the head, its bias, scaling and capping are the network's own, whatever its architecture: while
  `logits` runs, the body returns the given states;
- evaluation mode, and every parameter frozen;
- parts may be on several devices (devices.py): states come back to where the tokens are;
- the split is checked on three tokens when a network that has weights is wrapped.
"""

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from prism_select.core.blocks import decoder_of
from prism_select.core.likelihood import Batch
from prism_select.models.devices import connect
from prism_select.models.quantised import MARKS
from prism_select.run.errors import BadModel

__all__ = ["CausalLM", "unchanged"]


class CausalLM:
    """A Hugging Face causal language model as the core sees it. Raises BadModel for a network whose
    body and head cannot be run apart."""

    def __init__(self, network: Any) -> None:
        self.network: nn.Module = network.eval().requires_grad_(False)
        self.body: nn.Module = decoder_of(network)[1]
        self.devices: Sequence[torch.device] = connect(network)
        if self.body is network:
            raise BadModel(
                f"{type(network).__name__}: its body and head are one; try another architecture"
            )
        self.vocabulary: int = network.get_output_embeddings().weight.shape[0]
        self._takes_positions = "position_ids" in inspect.signature(self.body.forward).parameters
        if self.device.type != "meta":
            self._prove_split()

    @property
    def device(self) -> torch.device:
        """Where tokens go in."""
        embeddings: Any = self.network.get_input_embeddings()  # type: ignore[operator]
        device: torch.device = embeddings.weight.device
        return device

    @cached_property
    def size(self) -> int:
        """Numbers in all parameters."""
        return sum(parameter.numel() for parameter in self.network.parameters())

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
        return states.to(batch.tokens.device)

    def logits(self, hidden: Float[Tensor, "rows width"]) -> Float[Tensor, "rows vocabulary"]:
        start = torch.zeros(1, 1, dtype=torch.long, device=hidden.device)
        with _returning(self.body, hidden[None]):
            logits: Tensor = self.network(
                input_ids=start, use_cache=False, return_dict=True
            ).logits[0]
        return logits

    @torch.no_grad()
    def _prove_split(self) -> None:
        tokens = torch.tensor([[0, 1, 2]], device=self.device) % self.vocabulary
        ones = torch.ones_like(tokens, dtype=torch.bool)
        output = self.network(input_ids=tokens, attention_mask=ones.long(), use_cache=False)
        expected = output.logits[0]
        split = self.logits(self.hidden(Batch(tokens, ones, ones))[0]).to(expected.device)
        if expected.isfinite().all() and not torch.allclose(expected, split, rtol=1e-2, atol=1e-2):
            name = type(self.network).__name__
            raise BadModel(
                f"{name}: its output head cannot be run apart from its body; try another "
                "architecture"
            )


@contextmanager
def unchanged(network: nn.Module) -> Iterator[None]:
    """After the block, `network` is in training or evaluation mode and requires gradients as before
    it, module by module, and has its own modules again where others stood in for quantised ones.
    Within it the mixed precision that accelerate puts around the forward pass of a network in
    training is gone: body and head would not have it."""
    forward, plain = map(network.__dict__.get, ("forward", "_original_forward"))  # accelerate's
    if plain is not None:
        network.forward = plain
    training = {module: module.training for module in network.modules()}
    children = [(module, dict(module._modules)) for module in network.modules()]
    marks = [(m, {n: vars(m)[n] for n in MARKS & vars(m).keys()}) for m in network.modules()]
    gradients = {parameter: parameter.requires_grad for parameter in network.parameters()}
    config: Any = getattr(network, "config", None)
    experts = getattr(config, "_experts_implementation", None)
    try:
        yield
    finally:
        if forward is not None:
            network.forward = forward
        for module, inside in children:
            module._modules.update(inside)
        for module, values in marks:
            vars(module).update(values)
        for module, mode in training.items():
            module.training = mode
        for parameter, needed in gradients.items():
            parameter.requires_grad_(needed)
        if experts is not None:
            config._experts_implementation = experts


class _Output:
    """The output of a body with nothing but the last hidden state."""

    def __init__(self, hidden: Tensor) -> None:
        self.last_hidden_state = hidden

    def __getitem__(self, index: int) -> Tensor | None:
        return self.last_hidden_state if index == 0 else None

    def __getattr__(self, name: str) -> None:
        return None


@contextmanager
def _returning(body: nn.Module, hidden: Tensor) -> Iterator[None]:
    """In the block, `body` returns `hidden` and computes nothing."""
    before = body.__dict__.get("forward")
    body.forward = lambda *_args, **_kwargs: _Output(hidden)
    try:
        yield
    finally:
        del body.forward
        if before is not None:
            body.forward = before
