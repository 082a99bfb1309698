"""Placement: which part of a model goes to which device, from its shapes and from free memory.

    device_map({"cuda:0": 24 GB, "cuda:1": 24 GB, "cpu": 60 GB}) → {"model.layers.0": cuda:0, …}

    weights of a device ≤ its free memory · weights / (weights + scoring)
    scoring = `BESIDE` of a number's bytes for each of the model, and of directions in full `FULL`
              bytes for each selected number

Choices made here:
- accelerate fills the GPUs evenly, in the order of the layers, then the host; it splits no block;
- `BESIDE` is what the plan of an 8-billion-parameter model says (rank 64, the usual batch: 27 GB of
  which weights are 16); larger models need less, and smaller ones fit a device anyway;
- `FULL` is C and R in float32, and two directions in the dtype, as model_plan.py has it; of a
  large selection the one direction in the dtype;
- nothing waits on disk;
- each process of torchrun takes as many GPUs as the others on its machine, the first ones first.
"""

import os
from collections.abc import Mapping
from typing import Any, TypeAlias

import torch
from torch import nn

from prism_select.core.blocks import stack_of
from prism_select.core.layers import is_large
from prism_select.models.devices import bytes_by_device
from prism_select.models.layer_selection import select_parameters
from prism_select.models.quantised import packed_matrices
from prism_select.run.config import BESIDE_PAIRS, ModelOptions
from prism_select.run.errors import BadModel, BadOption

__all__ = ["DeviceMap", "Memory", "free_memory", "network_of", "place", "scoring_share"]

DeviceMap: TypeAlias = Mapping[str, torch.device]
"""Devices of modules by their names; "" is the whole network."""

Memory: TypeAlias = Mapping[torch.device, int]
"""Free bytes of devices, the host last."""

BESIDE, FULL = 0.7, 12
HOST = torch.device("cpu")


def free_memory(host: bool = True) -> Memory:
    """Of the devices that this process may use; without `host` of GPUs alone, where there are any.
    Raises BadOption where there are more processes than GPUs."""
    rank = int(os.environ.get("LOCAL_RANK", 0))
    size = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if count and size > count:
        raise BadOption(
            f"--device-map auto: {size} processes share {count} GPUs; start at most one for each"
        )
    own = range(rank * count // size, (rank + 1) * count // size)
    found = {torch.device("cuda", gpu): torch.cuda.mem_get_info(gpu)[0] for gpu in own}
    return found | ({HOST: _host_memory() // size} if host or not found else {})


def _host_memory() -> int:
    try:
        import psutil
    except ImportError:
        raise _no_accelerate() from None
    return int(psutil.virtual_memory().available)


def _no_accelerate() -> BadOption:
    return BadOption(
        "--device-map auto: accelerate is not installed; pip install 'prism-select[devices]'"
    )


def scoring_share(network: nn.Module, config: ModelOptions, layers: str) -> float:
    """The share of a device's free memory that weights may take."""
    sizes = sum(bytes_by_device(network).values())
    parameters = [*network.parameters()]
    beside = BESIDE * sum(p.numel() * p.element_size() for p in parameters)
    is_curved = getattr(config, "curvature", "") in BESIDE_PAIRS
    in_full = is_curved or getattr(config, "rank", "") == "full"
    if in_full and layers != "adapter":  # which is small, and not there yet
        selected = select_parameters(network, layers)
        is_single = is_large(selected) and not is_curved
        beside += sum(
            weight.numel() * (weight.element_size() if is_single else FULL)
            for weight in selected.values()
        )
    return sizes / (sizes + beside)


def place(network: Any, memory: Memory, share: float) -> DeviceMap:
    """Of a network without numbers. Raises BadModel where the devices have no room for it,
    BadOption without accelerate."""
    try:
        from accelerate import infer_auto_device_map
        from accelerate.utils import CustomDtype, get_balanced_memory
    except ImportError:
        raise _no_accelerate() from None
    room: dict[Any, int] = {
        "cpu" if device == HOST else device.index: int(free * share)
        for device, free in memory.items()
    }
    whole = [*dict.fromkeys(type(block).__name__ for block in stack_of(network)[1])]
    whole += [name for name in network._no_split_modules or () if name not in whole]
    kinds = {8: torch.int8, 4: CustomDtype.INT4}
    packed = {name: kinds[matrix.bits] for name, matrix in packed_matrices(network).items()}
    room = get_balanced_memory(network, room, whole, special_dtypes=packed)
    found = infer_auto_device_map(network, room, whole, special_dtypes=packed)
    if "disk" in found.values():
        size, there = sum(bytes_by_device(network).values()), sum(memory.values())
        raise BadModel(
            f"--device-map auto: the weights take {size / 1e9:.1f} GB, and beside what scoring "
            f"needs there is room for {share * there / 1e9:.1f} GB; add GPUs, or take fewer bits"
        )
    return {name: HOST if d == "cpu" else torch.device("cuda", d) for name, d in found.items()}


def network_of(described: Any, dtype: str = "auto", on_cpu: bool = False) -> Any:
    """A network of transformers' configuration, with shapes and without numbers."""
    import transformers

    precision = described.dtype if dtype == "auto" else getattr(torch, dtype)
    if precision is None or (dtype == "auto" and on_cpu and precision == torch.float16):
        precision = torch.float32
    described._experts_implementation = "eager"
    with torch.device("meta"):
        return transformers.AutoModelForCausalLM.from_config(
            described, dtype=precision, trust_remote_code=False
        )
