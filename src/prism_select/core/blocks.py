"""Blocks: the stack of like modules that a network is built of, how to run its lower part once, and
how torch treats watched outputs and padding words.

    network = decoder + head      decoder = … + stack of blocks + …

Choices made here:
- nothing is asked of an architecture but that its blocks stand in a list;
- whether a block passes nothing on but its output cannot be seen from outside, so it is tried once.
"""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

__all__ = [
    "block_of",
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
    """The module that reads text, without the head, after its name with a dot. The name is "" where
    the network has none for it."""
    decoder: Any = network.get_decoder() if hasattr(network, "get_decoder") else network  # type: ignore[operator]
    if decoder is network:
        decoder = getattr(network, "model", network)
    names = [f"{n}." for n, module in network.named_modules() if n and module is decoder]
    return (names[0] if names else ""), decoder


def stack_of(network: nn.Module) -> tuple[str, Sequence[nn.Module]]:
    """The name of the list of the decoder's blocks, and the blocks: the longest list of modules
    that is in no other list."""
    start, decoder = decoder_of(network)
    lists: dict[str, Any] = {
        f"{start}{n}": module
        for n, module in decoder.named_modules()
        if isinstance(module, nn.ModuleList)
    }
    outermost = [name for name in lists if not any(name.startswith(outer + ".") for outer in lists)]
    stack = max(outermost, key=lambda name: len(lists[name]), default="")
    return stack, lists.get(stack, [])


def block_of(network: nn.Module) -> Callable[[str], str]:
    """The number of the block that a parameter is in, by its name; empty for one in no block."""
    stack, _ = stack_of(network)
    pattern = re.compile(re.escape(stack) + r"\.(\d+)\.")
    return lambda name: found[1] if stack and (found := pattern.match(name)) else ""


def blocks_below(network: nn.Module, names: Sequence[str]) -> list[nn.Module]:
    """The blocks below all parameters of these names; none where one of them is in no block."""
    stack, blocks = stack_of(network)
    numbers = [name.removeprefix(stack + ".").partition(".")[0] for name in names]
    if not all(number.isdigit() for number in numbers):
        return []
    return list(blocks[: min(map(int, numbers))])


@contextmanager
def running_once(blocks: Sequence[nn.Module]) -> Iterator[None]:
    """While open, these blocks run in the first pass alone. In later passes each of them returns
    what the last one returned then."""
    outputs: list[Any] = []

    def run(forward: Callable[..., Any], is_last: bool, *args: Any, **kwargs: Any) -> Any:
        if outputs:
            return outputs[0]
        output = forward(*args, **kwargs)
        if is_last:
            outputs.append(output)
        return output

    with ExitStack() as patches:
        for block in blocks:
            forward = partial(run, block.forward, block is blocks[-1])
            patches.enter_context(mock.patch.object(block, "forward", forward))
        yield


def same_when_run_once(blocks: Sequence[nn.Module], run: Callable[[], Tensor]) -> bool:
    """Whether `run`, of several passes, gives the same with these blocks run once: not where one of
    them passes on more than its output."""
    if not blocks:
        return True
    with running_once(blocks):
        once = run()
    return once.equal(run())


def watched(
    tensor: Tensor,
    show: Callable[[Tensor], None],
    outputs: Sequence[Any],
    inputs: Mapping[Any, Any],
) -> Tensor:
    """One of a module's `outputs`, whose gradient is shown in the backward pass.

    One of several outputs, or an output that is an input, becomes a node of its own, so its
    gradient has no part of the others'. A single output stays as it is, since a view that is
    changed in place later loses its hook."""
    if not tensor.requires_grad:
        tensor = tensor.detach().requires_grad_().clone()
    elif len(outputs) > 1 or any(tensor is argument for argument in inputs.values()):
        tensor = tensor.view_as(tensor)
    tensor.register_hook(show)  # returns None: what a hook returns replaces the gradient
    return tensor


def pads(module: nn.Module) -> bool:
    """Whether it is an embedding with a padding word, whose look-up has no gradient in torch."""
    return isinstance(module, nn.Embedding) and module.padding_idx is not None


def without_padding(module: Any, inputs: Sequence[Any], values: Sequence[Any]) -> list[Any]:
    """Tensors shaped like the module's outputs, with 0 where it looks the padding word up."""
    if not pads(module):
        return list(values)
    padding = inputs[0].eq(module.padding_idx)[..., None]
    return [None if value is None else value.masked_fill(padding, 0) for value in values]


def padding_still(module: Any, moved: dict[str, Any], before: Mapping[str, Any]) -> dict[str, Any]:
    """The moved parameters of an embedding that is tied to a head, where the row of the padding
    word has not moved: in the head it moves."""
    if not pads(module) or "weight" not in moved:
        return moved
    row = torch.tensor([module.padding_idx], device=before["weight"].device)
    return {**moved, "weight": moved["weight"].index_copy(0, row, before["weight"].detach()[row])}
