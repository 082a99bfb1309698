"""Weights: which of a network's weights count.

Choices made here: `all` means every floating-point weight, embeddings, norms, biases and head
included, but not those of what reads pictures or sound beside a decoder; `late` and `last:N` mean
weights of the upper blocks alone; `adapter` means those that PEFT's LoRA adds; anything else is a
regular expression searched for in weight names."""

import re
from collections.abc import Callable
from typing import Any

from torch import nn

from prism_select.core.blocks import decoder_of, stack_of
from prism_select.core.layers import Parameters
from prism_select.run.errors import UnknownLayers

__all__ = ["beside_text", "blocks_of", "select_parameters", "upper"]

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


def beside_text(network: nn.Module) -> Callable[[str], bool]:
    """Whether a weight is in a part that text does not pass: beside the decoder, in what holds it
    but not the head."""
    start, _ = decoder_of(network)
    head: Any = (
        network.get_output_embeddings() if hasattr(network, "get_output_embeddings") else None  # type: ignore[operator]
    )
    outer = [(name, part) for name, part in network.named_modules() if name and f"{name}." != start]
    outer = [(name, part) for name, part in outer if start.startswith(f"{name}.")]
    apart = [f"{name}." for name, part in outer if all(each is not head for each in part.modules())]
    return lambda name: bool(apart) and name.startswith(apart[0]) and not name.startswith(start)


def select_parameters(network: nn.Module, wanted: str) -> Parameters:
    """The weights that `wanted` names: all, late (upper half of the blocks), last:N, adapter, or a
    regular expression searched for in weight names. Raises UnknownLayers when none is left or the
    expression is malformed."""
    beside = beside_text(network)
    known = {
        n: weight
        for n, weight in network.named_parameters()
        if weight.is_floating_point() and not beside(n)
    }
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
