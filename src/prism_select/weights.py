"""Weights: which of a network's weights count.

Choices made here: `all` means every floating-point weight, embeddings, norms, biases and head included; `late` and
`last:N` mean weights of the upper blocks alone; `adapter` means those that PEFT's LoRA adds; anything else is a regular
expression searched for in weight names.
"""

import re
from collections.abc import Callable

from torch import nn

from prism_select.blocks import stack_of
from prism_select.core.layers import Weights
from prism_select.errors import UnknownLayers

__all__ = ["blocks_of", "select_weights", "upper"]

ADAPTER = r"\.(lora_\w+|modules_to_save)\."


def blocks_of(network: nn.Module) -> tuple[int, Callable[[str], int | None]]:
    """How many blocks there are, and which one a weight is in."""
    stack, blocks = stack_of(network)
    place = re.compile(re.escape(stack) + r"\.(\d+)\.")
    return len(blocks), lambda name: int(found[1]) if (found := place.match(name)) else None


def upper(count: int, wanted: str) -> range:
    """The numbers of those of `count` blocks that `wanted`, late or last:N, keeps."""
    kept = (count + 1) // 2 if wanted == "late" else int(wanted.removeprefix("last:"))
    return range(max(0, count - kept), count)


def _upper_blocks(network: nn.Module, wanted: str) -> Callable[[str], object]:
    count, number = blocks_of(network)
    return lambda name: number(name) in upper(count, wanted)


def select_weights(network: nn.Module, wanted: str) -> Weights:
    """The weights that `wanted` names: all, late (upper half of the blocks), last:N, adapter, or a regular
    expression searched for in weight names. Raises UnknownLayers when none is left or the expression is malformed."""
    known = {name: weight for name, weight in network.named_parameters() if weight.is_floating_point()}
    if wanted == "all":
        return known
    pattern = ADAPTER if wanted == "adapter" else wanted
    named = wanted == "late" or re.fullmatch(r"last:[1-9]\d*", wanted)
    try:
        matches = _upper_blocks(network, wanted) if named else re.compile(pattern).search
    except re.error:
        raise UnknownLayers(wanted, list(known)) from None
    chosen = {name: weight for name, weight in known.items() if matches(name)}
    if not chosen:
        raise UnknownLayers(wanted, list(known))
    return chosen
