"""Devices: a network whose parts are on several devices, in one process.

    tokens → embedding, blocks 0 to 15 on cuda:0 → blocks 16 to 31, norm, head on cuda:1 → states,
    moved back to where the tokens are

Choices made here:
- a part is the largest module whose tensors are all on one device; what goes into it moves there;
- torch's own hooks before a forward pass do that. accelerate's replace a module's forward pass, as
  this library does too, and fetch weights from the host for each pass, where autograd would keep
  the copies: here a part on the host is computed on the host;
- the hooks that accelerate has put on a network of the caller's come back when it is given back.
"""

from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from prism_select.core.packed import PackedLinear
from prism_select.run.errors import BadModel

__all__ = [
    "bytes_by_device",
    "connect",
    "disconnect",
    "seeded",
    "take_hooks_off",
    "without_accelerate",
]

ACCELERATES = ("forward", "_old_forward", "_hf_hook")  # attributes of a module with its hooks


class _MoveInputs:
    """A hook before the forward pass of a part."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def __call__(self, _: nn.Module, args: Any, kwargs: Any) -> Any:
        return tree_map_only(Tensor, lambda tensor: tensor.to(self.device), (args, kwargs))


def bytes_by_device(network: nn.Module) -> Mapping[torch.device, int]:
    """Of its parameters and buffers, a shared one once, matrices in few bits as they are; the
    device of the first comes first."""
    sizes, packed = Counter[torch.device](), dict[int, int]()
    for module in network.modules():
        if isinstance(module, PackedLinear):
            packed[id(module.weight)] = module.packed.bytes
    for tensors in (network.parameters(), network.buffers()):
        for tensor in tensors:
            sizes[tensor.device] += packed.get(id(tensor), tensor.nbytes)
    return sizes


def connect(network: nn.Module) -> list[torch.device]:
    """Makes what goes into each part move to its device; done again after modules were replaced.
    Does nothing to a network on one device. Returns the devices."""
    disconnect(network)
    devices = [*bytes_by_device(network)]
    if len(devices) > 1:
        _connect(network)
    return devices


def take_hooks_off(network: Any) -> None:
    """Those of accelerate on a network that was loaded here; weights on the host stay there."""
    from accelerate.hooks import remove_hook_from_submodules

    remove_hook_from_submodules(network)
    network.tie_weights()
    vars(network).pop("hf_device_map", None)  # PEFT would put the hooks on again


def _connect(module: nn.Module) -> None:
    devices = [*bytes_by_device(module)]
    if len(devices) == 1:
        module.register_forward_pre_hook(_MoveInputs(devices[0]), prepend=True, with_kwargs=True)
        return
    for child in module.children():
        _connect(child)


def disconnect(network: nn.Module) -> None:
    for module in network.modules():
        hooks = module._forward_pre_hooks
        for number in [n for n, hook in hooks.items() if isinstance(hook, _MoveInputs)]:
            del hooks[number], module._forward_pre_hooks_with_kwargs[number]


@contextmanager
def seeded(network: nn.Module, seed: int) -> Iterator[None]:
    """In the block, random numbers on the network's devices start from `seed`."""
    gpus = [device for device in bytes_by_device(network) if device.type == "cuda"]
    with torch.random.fork_rng(gpus):
        torch.manual_seed(seed)
        yield


@contextmanager
def without_accelerate(network: nn.Module) -> Iterator[None]:
    """In the block the hooks are gone that accelerate has put on the network's modules. Raises
    BadModel for weights that are not in memory."""
    away = [name for name, p in network.named_parameters() if p.is_meta]
    if away:
        raise BadModel(
            f"model: {len(away)} of its weights, {away[0]} say, wait on the host or on disk "
            "(accelerate's offload); load it with max_memory of GPUs alone, or give its folder and "
            "--device-map auto"
        )
    saved = list[tuple[nn.Module, dict[str, Any]]]()
    for module in network.modules():
        if "_hf_hook" in module.__dict__:
            own = {name: module.__dict__.pop(name) for name in ACCELERATES if name in vars(module)}
            saved.append((module, own))
            plain = own.get("_old_forward")
            if plain is not None and getattr(plain, "__func__", None) is not type(module).forward:
                module.forward = plain
    try:
        yield
    finally:
        disconnect(network)
        for module, own in saved:
            module.__dict__.pop("forward", None)
            module.__dict__.update(own)
