"""Dry run: an engine on tensors without numbers, and what it would hold and compute.

    with torch.device("meta"), DryRun() as seen:
        engine(batch)
    seen.peak          bytes of all tensors at the highest, without those that were there before
    seen.operations    additions and multiplications of matrix products

Choices made here:
- it is the code of the engine that runs, so no second list of what its graph keeps can go stale;
- what depends on numbers is answered by the largest case: every token is supervised, and a batch
  has padding; experts share their tokens evenly;
- attention is the fused kernel that GPUs take with a mask: no square of positions by head is kept;
- tensors alone are counted: neither what a kernel needs while it runs, nor gaps between tensors.
"""

import weakref
from collections.abc import Iterable, Mapping
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

__all__ = ["DryRun"]

aten = torch.ops.aten


class DryRun(TorchDispatchMode):
    """`there` are tensors that do not count, such as the parameters. Tensors on a real device are
    computed, and counted alike."""

    def __init__(self, there: Iterable[Tensor] = ()) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.alive = self.peak = self.operations = 0
        self._known = {_storage(tensor) for tensor in there}
        self._experts = 1
        self._attention = mock.patch.object(functional, "scaled_dot_product_attention", _attention)

    def __enter__(self) -> "DryRun":
        self._attention.start()
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)  # type: ignore[no-untyped-call]
        self._attention.stop()

    def __torch_dispatch__(
        self,
        function: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        first = args[0] if args else None
        if isinstance(first, Tensor) and first.is_meta:
            if function is aten._local_scalar_dense.default:
                return first.dtype != torch.bool  # no to a question, otherwise 1
            if function is aten.nonzero.default:
                return self._places(first)
            if function is aten.index.Tensor:
                args = (first, [place for index in args[1] for place in _as_places(index)])
        result = function(*args, **kwargs)
        if count := flop_registry.get(function._overloadpacket):
            self.operations += count(*args, **kwargs, out_val=result)
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self._count(tensor)
        return result

    def _places(self, mask: Tensor) -> Tensor:
        """Of all that may be true; of the one-hot choice of experts, what one of them gets."""
        count = mask.numel()
        if mask.ndim == 1:
            self._experts = count
        elif mask.dtype != torch.bool:
            count //= self._experts
        return mask.new_empty(count, mask.ndim, dtype=torch.long)

    def _count(self, tensor: Tensor) -> None:
        key = _storage(tensor)
        if key in self._known:
            return
        storage = tensor.untyped_storage()
        self._known.add(key)
        self.alive += storage.nbytes()
        self.peak = max(self.peak, self.alive)
        weakref.finalize(storage, self._forget, key, storage.nbytes())

    def _forget(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.alive -= size


def _storage(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


def _as_places(index: Tensor | None) -> list[Tensor | None]:
    """A mask as an index for each of its axes, with all that may be true."""
    if index is None or index.dtype != torch.bool:
        return [index]
    return [index.new_empty(index.numel(), dtype=torch.long)] * index.ndim


_torchs_own = functional.scaled_dot_product_attention


def _attention(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, **options: Any
) -> Tensor:
    if not query.is_meta:
        return _torchs_own(query, key, value, attn_mask, **options)
    repeats = query.shape[1] // key.shape[1]
    if repeats > 1:
        key, value = (tensor.repeat_interleave(repeats, 1) for tensor in (key, value))
    if attn_mask is not None:
        attn_mask = attn_mask.to(query.dtype).expand(*query.shape[:3], key.shape[2])
    output: Tensor = aten._scaled_dot_product_efficient_attention(
        query, key, value, attn_mask, True, 0.0, options.get("is_causal", False)
    )[0]
    return output
