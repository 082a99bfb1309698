"""Shelf: tensors for later, in memory as far as there is room, then in a temporary file.

Choices made here: the file has no name and goes with the process; what is on a GPU stays there.
"""

import shutil
import tempfile
from typing import IO, NamedTuple

import numpy as np
import torch
from torch import Tensor

from prism_select.run.errors import DiskTrouble

__all__ = ["Shelf", "Shelved", "free_disk"]


class Shelved(NamedTuple):
    """Where a tensor is in the file."""

    start: int
    shape: torch.Size
    dtype: torch.dtype


class Shelf:
    """`room`: bytes that stay in memory."""

    def __init__(self, room: int) -> None:
        self.room = room
        self._file: IO[bytes] | None = None

    def put(self, tensor: Tensor) -> Tensor | Shelved:
        """Raises DiskTrouble."""
        size = tensor.numel() * tensor.element_size()
        if tensor.is_cuda or size <= self.room:
            self.room -= size
            return tensor
        try:
            self._file = self._file or tempfile.TemporaryFile()  # noqa: SIM115
            start = self._file.seek(0, 2)
            self._file.write(tensor.contiguous().flatten().view(torch.uint8).numpy().data)
        except OSError as error:
            raise DiskTrouble(
                f"{tempfile.gettempdir()}: temporary files cannot be written "
                f"({error.strerror or error}); free some space, or set TMPDIR to another folder"
            ) from error
        return Shelved(start, tensor.shape, tensor.dtype)

    def get(self, kept: Tensor | Shelved) -> Tensor:
        if isinstance(kept, Tensor):
            return kept
        assert self._file
        self._file.seek(kept.start)
        size = kept.shape.numel() * kept.dtype.itemsize
        found = np.fromfile(self._file, dtype=np.uint8, count=size)
        return torch.from_numpy(found).view(kept.dtype).reshape(kept.shape)

    def close(self) -> None:
        if self._file:
            self._file.close()


def free_disk() -> int:
    """Bytes where temporary files are."""
    return shutil.disk_usage(tempfile.gettempdir()).free
