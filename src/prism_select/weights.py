"""Weights: which of a network's weights count.

Choices made here: `all` means every floating-point weight, embeddings, norms, biases and head included; `late` and
`last:N` mean weights of the upper blocks alone; `adapter` means those that PEFT's LoRA adds; anything else is a regular
expression searched for in weight names.
"""

import re
from collections.abc import Callable

from torch import nn

from prism_select.core.layers import Weights
from prism_select.errors import UnknownLayers

__all__ = ["select_weights"]

ADAPTER = r"\.(lora_\w+|modules_to_save)\."


def _upper_blocks(network: nn.Module, wanted: str) -> Callable[[str], object]:
    """Whether a weight is in the upper blocks; the blocks are the longest list of modules in no other list."""
    lists = {name: len(part) for name, part in network.named_modules() if isinstance(part, nn.ModuleList)}
    outermost = [name for name in lists if not any(name.startswith(other + ".") for other in lists)]
    stack = max(outermost, key=lists.__getitem__, default="")
    count = (lists.get(stack, 0) + 1) // 2 if wanted == "late" else int(wanted.removeprefix("last:"))
    kept = range(max(0, lists.get(stack, 0) - count), lists.get(stack, 0))
    place = re.compile(re.escape(stack) + r"\.(\d+)\.")
    return lambda name: bool((found := place.match(name)) and int(found[1]) in kept)


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
