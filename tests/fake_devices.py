"""Fake devices: real numbers on the CPU, in tensors that say they are on cpu:1, cpu:2 and so on.

    with fake_devices():
        tensor.to("cpu:1") + other.to("cpu:2")      RuntimeError, as with two GPUs

What torch allows on GPUs is allowed here, and nothing else: a plain tensor on the CPU beside others
if it has no axes, or if it is an index; copies from one device to another. Autograd asks that a
gradient is on the device of its tensor."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map, tree_map_only

aten = torch.ops.aten
COPIES = {aten._to_copy.default, aten.copy_.default}
INDEXED = {aten.index.Tensor, aten.index_put.default, aten.index_put_.default}
INDEXED |= {aten._index_put_impl_.default}


class FakeTensor(Tensor):
    """`held` has the numbers."""

    held: Tensor

    @staticmethod
    def __new__(cls, real: Tensor, device: torch.device) -> "FakeTensor":
        fake: FakeTensor = Tensor._make_wrapper_subclass(
            cls,
            real.shape,
            strides=real.stride(),
            storage_offset=real.storage_offset(),
            dtype=real.dtype,
            device=device,
        )
        fake.held = real
        return fake

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"{self.held!r} on {self.device}"

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    def tolist(self) -> Any:
        return self.held.tolist()

    def numpy(self, **_: Any) -> Any:
        raise TypeError(f"can't convert a tensor on {self.device} to numpy")

    def new_tensor(self, values: Any, dtype: Any = None) -> Tensor:  # type: ignore[override]
        return torch.tensor(values, dtype=dtype or self.dtype).to(self.device)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        return computed(function, args, kwargs or {})


def is_fake(device: Any) -> bool:
    return device is not None and torch.device(device).index not in (None, 0)


def computed(function: Any, args: Any, kwargs: Mapping[str, Any]) -> Any:
    """On the numbers; what comes out is on the device that went in, or that was asked for."""
    if function is aten._efficientzerotensor.default:  # it has no numbers
        function = aten.zeros.default
    devices = {t.device for t in compared(function, args, kwargs)}
    if len(devices) > 1 and function not in COPIES:
        raise RuntimeError(f"{function}: tensors on {sorted(map(str, devices))}")
    asked = kwargs.get("device")
    device = torch.device(asked) if asked is not None else next(iter(devices), None)
    if function is aten.copy_.default:
        device = args[0].device
    plain = tree_map_only(FakeTensor, lambda fake: fake.held, (args, dict(kwargs)))
    if is_fake(asked):
        plain[1]["device"] = torch.device("cpu")
    result = function(*plain[0], **plain[1])
    known = {id(fake.held): fake for fake in tree_leaves((args, kwargs)) if is_one(fake)}

    def wrapped(value: Any) -> Any:
        if not isinstance(value, Tensor) or device is None or not is_fake(device):
            return value
        return known[id(value)] if id(value) in known else FakeTensor(value, device)

    return tree_map(wrapped, result)


def is_one(value: Any) -> bool:
    return isinstance(value, FakeTensor)


def compared(function: Any, args: Any, kwargs: Mapping[str, Any]) -> Iterator[Tensor]:
    """Tensors that must be on one device."""
    if function in INDEXED:
        args = [args[0], [i for i in args[1] if is_one(i)], *args[2:]]
    tensors = [value for value in tree_leaves((args, kwargs)) if isinstance(value, Tensor)]
    several = any(map(is_one, tensors))
    for tensor in tensors:
        if not (several and tensor.ndim == 0 and not is_one(tensor)):
            yield tensor


_torchs_own = torch.tensor


def _tensor(values: Any, device: Any = None, **options: Any) -> Tensor:
    """torch's own tells nobody of the device."""
    made = _torchs_own(values, device="cpu" if is_fake(device) else device, **options)
    return made.to(device) if is_fake(device) else made


class _Mode(TorchDispatchMode):
    """For calls without a fake tensor that ask for a fake device."""

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        return computed(function, args, kwargs or {})


@contextmanager
def fake_devices() -> Iterator[None]:
    torch.__future__.set_swap_module_params_on_conversion(True)  # module.to makes new parameters
    try:
        with mock.patch.object(torch, "tensor", _tensor), _Mode():  # type: ignore[no-untyped-call]
            yield
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)


def moved(network: torch.nn.Module, devices: Mapping[str, str]) -> Any:
    """The network with the modules of these names on fake devices."""
    parameters: dict[int, torch.nn.Parameter] = {}
    for name, device in devices.items():
        for module in network.get_submodule(name).modules():
            for key, weight in module._parameters.items():
                if weight is not None and not is_one(weight):
                    new = torch.nn.Parameter(weight.detach().to(device), requires_grad=False)
                    module._parameters[key] = parameters.setdefault(id(weight), new)
            for key, buffer in module._buffers.items():
                if buffer is not None and not is_one(buffer):
                    module._buffers[key] = buffer.to(device)
    return network
