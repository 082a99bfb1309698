"""Blocks: the stack of like modules that a network is built of, how to run its lower part once, and
how torch treats outputs that are watched and words that pad.

Choices made here: nothing is asked of an architecture but that its blocks stand in a list. Whether
each gives the next nothing but its output cannot be seen from outside, so that is tried once."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

__all__ = [
    "blocks_below",
    "decoder_of",
    "padding_still",
    "running_once",
    "same_when_run_once",
    "stack_of",
    "watched",
    "without_padding",
]


def decoder_of(network: nn.Module) -> tuple[str, Any]:
    """The part that reads text, without the head, and its name with a dot; the network itself where
    it names none."""
    body: Any = network.get_decoder() if hasattr(network, "get_decoder") else network  # type: ignore[operator]
    body = getattr(network, "model", network) if body is network else body
    return next(
        (f"{name}." for name, part in network.named_modules() if part is body and name), ""
    ), body


def stack_of(network: nn.Module) -> tuple[str, Sequence[nn.Module]]:
    """The blocks of what reads text, and the name of their list: the longest list of modules that
    is in no other."""
    start, body = decoder_of(network)
    lists: dict[str, Any] = {
        f"{start}{n}": part for n, part in body.named_modules() if isinstance(part, nn.ModuleList)
    }
    outermost = [name for name in lists if not any(name.startswith(other + ".") for other in lists)]
    stack = max(outermost, key=lambda name: len(lists[name]), default="")
    return stack, lists.get(stack, [])


def blocks_below(network: nn.Module, names: Sequence[str]) -> list[nn.Module]:
    """The blocks below all weights of these names; none where one of these is in no block."""
    stack, blocks = stack_of(network)
    places = [name.removeprefix(stack + ".").partition(".")[0] for name in names]
    return list(blocks[: min(map(int, places))]) if all(place.isdigit() for place in places) else []


@contextmanager
def running_once(blocks: Sequence[nn.Module]) -> Iterator[None]:
    """While open, these blocks run in the first pass alone: in later ones each gives what the last
    of them gave."""
    kept: list[Any] = []

    def run(forward: Callable[..., Any], last: bool, *args: Any, **named: Any) -> Any:
        if not kept:
            output = forward(*args, **named)
            kept.extend([output] * last)
            return output
        return kept[0]

    with ExitStack() as patches:
        for block in blocks:
            swap = partial(run, block.forward, block is blocks[-1])
            patches.enter_context(mock.patch.object(block, "forward", swap))
        yield


def same_when_run_once(blocks: Sequence[nn.Module], run: Callable[[], Tensor]) -> bool:
    """Whether two passes give the same with these blocks run once: not where one gives those above
    more than its output."""
    if not blocks:
        return True
    with running_once(blocks):
        shared = run()
    return shared.equal(run())


def watched(
    tensor: Tensor,
    show: Callable[[Tensor], None],
    outputs: Sequence[Any],
    inputs: Mapping[Any, Any],
) -> Tensor:
    """One of a module's outputs, whose gradient is shown: of several, or an input itself, as a node
    of its own, so that the gradient has no part of the others'; alone as it is, since a view that
    is changed in place later loses its hook."""
    if not tensor.requires_grad:
        tensor = tensor.detach().requires_grad_().clone()
    elif len(outputs) > 1 or any(tensor is each for each in inputs.values()):
        tensor = tensor.view_as(tensor)
    tensor.register_hook(show)  # returns None: what a hook returns replaces the gradient
    return tensor


def pads(module: nn.Module) -> bool:
    """Whether it is an embedding with a word whose look-up has no gradient, by torch's rule."""
    return isinstance(module, nn.Embedding) and module.padding_idx is not None


def without_padding(module: Any, inputs: Sequence[Any], values: Sequence[Any]) -> list[Any]:
    """Tensors like its outputs, 0 where it looks up that word."""
    if not pads(module):
        return list(values)
    still = inputs[0].eq(module.padding_idx)[..., None]
    return [None if value is None else value.masked_fill(still, 0) for value in values]


def padding_still(module: Any, moved: dict[str, Any], before: Mapping[str, Any]) -> dict[str, Any]:
    """The moved weights of a tied module, in which that word's row has not moved: that of the head
    does."""
    if not pads(module) or "weight" not in moved:
        return moved
    row = torch.tensor([module.padding_idx], device=before["weight"].device)
    return {**moved, "weight": moved["weight"].index_copy(0, row, before["weight"].detach()[row])}
