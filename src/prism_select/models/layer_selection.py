"""Layer selection: which parameters of a network are differentiated.

    --layers all       every floating-point parameter: embeddings, norms, biases and head included
    --layers late      the upper half of the blocks           last:N     the upper N blocks
    --layers adapter   what PEFT's LoRA adds                  REGEX      searched for in their names

Choices made here:
- parameters beside the decoder are left out: text does not pass an image or audio encoder;
- of a PEFT model with its adapter apart, all, late and last:N leave the adapter out, so they mean
  the parameters of the merged model, whose gradients are the same.
"""

import re
from collections.abc import Callable
from typing import Any

from torch import nn

from prism_select.core.blocks import decoder_of, stack_of
from prism_select.core.layers import Parameters
from prism_select.run.errors import UnknownLayers

__all__ = ["beside_text", "select_parameters"]

_ADAPTER = r"\.(lora_\w+|modules_to_save)\."
_APART = re.compile(r"\.(lora_\w+|original_module)\.")  # what a merged model does not have


def select_parameters(network: nn.Module, layers: str) -> Parameters:
    """The selected parameters, by name. Raises UnknownLayers where there is none, or the regular
    expression is malformed."""
    is_beside = beside_text(network)
    candidates = {
        name: parameter
        for name, parameter in network.named_parameters()
        if parameter.is_floating_point() and not is_beside(name)
    }
    by_block = layers == "late" or re.fullmatch(r"last:[1-9]\d*", layers)
    if layers == "all" or by_block:
        candidates = {n: p for n, p in candidates.items() if not _APART.search(n)}
    if layers == "all":
        return candidates
    pattern = _ADAPTER if layers == "adapter" else layers
    try:
        matches = _in_upper_blocks(network, layers) if by_block else re.compile(pattern).search
    except re.error:
        raise UnknownLayers(layers, list(candidates)) from None
    selected = {name: parameter for name, parameter in candidates.items() if matches(name)}
    if not selected:
        raise UnknownLayers(layers, list(candidates))
    return selected


def _in_upper_blocks(network: nn.Module, layers: str) -> Callable[[str], object]:
    """Whether a parameter is in a block that `layers`, late or last:N, selects."""
    stack, blocks = stack_of(network)
    pattern = re.compile(re.escape(stack) + r"\.(\d+)\.")
    count = (len(blocks) + 1) // 2 if layers == "late" else int(layers.removeprefix("last:"))
    return lambda name: (match := pattern.match(name)) and int(match[1]) >= len(blocks) - count


def beside_text(network: nn.Module) -> Callable[[str], bool]:
    """Whether a parameter belongs to a module that text does not pass: one beside the decoder, in
    the largest module around the decoder that does not hold the head."""
    start, _ = decoder_of(network)
    head: Any = (
        network.get_output_embeddings() if hasattr(network, "get_output_embeddings") else None  # type: ignore[operator]
    )
    around = [
        (f"{name}.", outer)
        for name, outer in network.named_modules()
        if name and f"{name}." != start and start.startswith(f"{name}.")
    ]
    headless = [
        name for name, outer in around if all(module is not head for module in outer.modules())
    ]
    return lambda name: (
        bool(headless) and name.startswith(headless[0]) and not name.startswith(start)
    )
