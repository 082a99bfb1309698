"""Tensor files: tensors by name, with metadata, in the format of safetensors.

    file = length of the header (8 bytes) │ header (JSON) │ bytes of the tensors

Choices made here:
- this is the only module that knows the format; its errors come as ValueError;
- a file is written tensor by tensor, since safetensors.torch.save holds two more copies of all;
- wide types come first, as the format asks.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from safetensors import SafetensorError, safe_open

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["TensorFile", "read_tensors", "tensor_shapes", "write_tensors"]

DTYPES = {
    "torch.float64": "F64",
    "torch.float32": "F32",
    "torch.bfloat16": "BF16",
    "torch.float16": "F16",
}


@dataclass(frozen=True)
class TensorFile:
    tensors: Mapping[str, "Tensor"]
    metadata: Mapping[str, str]


def write_tensors(
    file: IO[bytes], tensors: Mapping[str, "Tensor"], metadata: Mapping[str, str]
) -> None:
    import torch

    ordered = sorted(tensors.items(), key=lambda item: -item[1].element_size())
    header, end = dict[str, Any]({"__metadata__": dict(metadata)}), 0
    for name, value in ordered:
        end, start = end + value.numel() * value.element_size(), end
        header[name] = {
            "dtype": DTYPES[str(value.dtype)],
            "shape": list(value.shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    file.write(len(text).to_bytes(8, "little") + text)
    for _, value in ordered:
        file.write(value.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)


def read_tensors(path: str | Path) -> TensorFile:
    """On the CPU, each tensor in memory of its own: the last bit of a product depends on where a
    tensor starts. Raises OSError, ValueError for a file of another format."""
    try:
        with safe_open(path, "pt") as file:
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
            return TensorFile(tensors, file.metadata() or {})
    except SafetensorError as error:
        raise ValueError(str(error)) from error


def tensor_shapes(path: str | Path) -> dict[str, tuple[int, ...]]:
    """By name. Reads the header alone. Raises OSError, ValueError for a file of another format."""
    try:
        with safe_open(path, "pt") as file:
            return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(str(error)) from error
