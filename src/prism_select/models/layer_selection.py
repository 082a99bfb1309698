"""Layer selection: which parameters of a network are differentiated.

    --layers all       every floating-point parameter: embeddings, norms, biases and head included
    --layers late      the upper half of the blocks           last:N     the upper N blocks
    --layers adapter   what PEFT's adapter adds               REGEX      searched for in their names

Choices made here:
- parameters beside the decoder are left out: text does not pass an image or audio encoder;
- of a PEFT model with its adapter apart, all, late and last:N leave the adapter out, so they mean
  the parameters of the merged model; where LoRA is all of the adapter, the gradients are the same;
- an expression is searched for in the names of the merged model too.
"""

import re
from collections.abc import Callable
from typing import Any

from torch import nn

from prism_select.core.blocks import decoder_of, stack_of
from prism_select.core.layers import Parameters
from prism_select.run.errors import UnknownLayers

__all__ = ["adapter_names", "beside_text", "select_parameters", "upper_blocks"]

_INSIDE = re.compile(r"\.(base_layer|original_module|token_adapter|modules_to_save\.\w+)(?=\.)")


def select_parameters(network: nn.Module, layers: str) -> Parameters:
    """The selected parameters, by name. Raises UnknownLayers where there is none, or the regular
    expression is malformed."""
    is_beside = beside_text(network)
    candidates = {
        name: parameter
        for name, parameter in network.named_parameters()
        if parameter.is_floating_point() and not is_beside(name)
    }
    if layers == "all" or _by_block(layers):
        beside_base = adapter_names(network) | replaced_names(network)
        candidates = {n: p for n, p in candidates.items() if n not in beside_base}
    if layers == "all":
        return candidates
    try:
        matches = _matches(network, layers)
    except re.error:
        raise UnknownLayers(layers, list(candidates)) from None
    selected = {name: parameter for name, parameter in candidates.items() if matches(name)}
    if not selected:
        raise UnknownLayers(layers, list(candidates))
    return selected


def adapter_names(network: nn.Module) -> set[str]:
    """Names of the parameters that PEFT's layers add to the base's own."""
    names = set[str]()
    for path, layer in network.named_modules():
        if hasattr(layer, "adapter_layer_names") and hasattr(layer, "base_layer"):
            names |= {f"{path}.{n}" for n in _names(layer) if not n.startswith("base_layer.")}
    return names


def saved_names(network: nn.Module) -> set[str]:
    """Names of the parameters of modules that an adapter has saved whole."""
    return {
        f"{path}.modules_to_save.{name}"
        for path, wrapper in _wrappers(network)
        for name in _names(wrapper.modules_to_save)
    }


def replaced_names(network: nn.Module) -> set[str]:
    """Names of the parameters that are no longer used, since a saved module stands in their
    place; a tied one is still that of another module."""
    unused = {id(m) for _, wrapper in _wrappers(network) for m in wrapper.original_module.modules()}
    used = {
        id(parameter)
        for module in network.modules()
        if id(module) not in unused
        for parameter in module._parameters.values()
    }
    return {
        f"{path}.original_module.{name}"
        for path, wrapper in _wrappers(network)
        for name, parameter in wrapper.original_module.named_parameters()
        if id(parameter) not in used
    }


def _wrappers(network: nn.Module) -> list[tuple[str, Any]]:
    """PEFT's modules with a saved module in place of the original one."""
    return [
        (path, module)
        for path, module in network.named_modules()
        if len(getattr(module, "modules_to_save", None) or ())
        and hasattr(module, "original_module")
    ]


def _names(module: nn.Module) -> list[str]:
    return [name for name, _ in module.named_parameters()]


def _matches(network: nn.Module, layers: str) -> Callable[[str], object]:
    """Whether `layers`, other than all, selects a parameter of this name."""
    if layers == "adapter":
        return (adapter_names(network) | saved_names(network)).__contains__
    if _by_block(layers):
        return _in_upper_blocks(network, layers)
    pattern = re.compile(layers)
    return lambda name: pattern.search(name) or pattern.search(_INSIDE.sub("", name))


def _by_block(layers: str) -> bool:
    return upper_blocks(layers, 0) is not None


def upper_blocks(layers: str, count: int) -> int | None:
    """How many of `count` blocks, from the top, late or last:N means; None for any other text."""
    if layers == "late":
        return (count + 1) // 2
    return int(layers[5:]) if re.fullmatch(r"last:[1-9]\d*", layers) else None


def _in_upper_blocks(network: nn.Module, layers: str) -> Callable[[str], object]:
    """Whether a parameter is in a block that `layers`, late or last:N, selects."""
    stack, blocks = stack_of(network)
    pattern = re.compile(re.escape(stack) + r"\.(\d+)\.")
    lowest = len(blocks) - (upper_blocks(layers, len(blocks)) or 0)
    return lambda name: (match := pattern.match(name)) and int(match[1]) >= lowest


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
