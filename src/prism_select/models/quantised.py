"""Quantised models: matrices that bitsandbytes keeps in 8 or 4 bits, and how they are scored.

    Linear4bit, Linear8bitLt → PackedLinear (core/packed.py)      the same bytes, not copied

    4 bits   a number of a table of 16 (NF4 of QLoRA, arXiv 2305.14314) times the scale of its 64
    8 bits   a whole number times the scale of its row (arXiv 2208.07339)

Choices made here:
- a score is that of the model whose matrices are the unpacked ones: the activations of 8-bit
  matrices are not rounded, as bitsandbytes rounds them, since rounding has no derivative;
- `--quantize` packs what transformers packs: every Linear and Conv1D but the output head; the rest
  keeps the model's dtype;
- a loaded model keeps its own modules: others stand in their place while it is scored.
"""

import copy
import logging
import sys
from collections.abc import Iterator, Mapping
from functools import partial
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn

from prism_select.core.packed import Packed, PackedLinear
from prism_select.run.errors import BadModel, BadOption

__all__ = [
    "BITS",
    "MARKS",
    "bits_in",
    "pack",
    "pack_shapes",
    "packed_bytes",
    "packed_matrices",
    "quantised_entry",
    "quantizer_of",
    "values_of",
]

BITS = {"8bit": 8, "4bit": 4}
# its import misses a kernel that is not used here
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)

INSTALL = "pip install 'prism-select[quantize]'"
# what transformers leaves on a network that it has quantised
MARKS = {
    *("hf_quantizer", "is_quantized", "quantization_method"),
    *("is_loaded_in_4bit", "is_loaded_in_8bit"),
}
BLOCK = 64  # numbers that share a scale in 4 bits


def bits_in(name: str, config: Any) -> int:
    """8 or 4 of a configuration whose weights bitsandbytes has packed, 0 of others. Raises BadModel
    for weights that another method has quantised."""
    found = getattr(config, "quantization_config", None)
    if not found:
        return 0
    kind = found if isinstance(found, Mapping) else found.to_dict()
    loads = {bits: kind.get(f"load_in_{bits}bit") for bits in (8, 4)}
    method = kind.get("quant_method") or ("bitsandbytes" if any(loads.values()) else "unknown")
    method = str(getattr(method, "value", method))
    for bits, is_loaded in loads.items():
        if method == "bitsandbytes" and is_loaded:
            return bits
    raise BadModel(
        f"{name}: its weights are quantised ({method}), and have no gradient; give the model in "
        "full precision, with the adapter, if there is one, as --adapter, or in 8 or 4 bits of "
        "bitsandbytes"
    )


def quantizer_of(asked_by: str, bits: int, dtype: Any, device: torch.device) -> Any:
    """Transformers' configuration that packs a model in so many bits. Raises BadOption where
    bitsandbytes is missing, or cannot do it here."""
    import transformers

    for library in ("bitsandbytes", "accelerate"):
        if find_spec(library) is None:
            raise BadOption(f"{asked_by}: needs {library}; {INSTALL}")
    try:
        _try(bits, device)
    except Exception as error:  # of any kind: a library of kernels may fail in its own ways
        why = " ".join(str(error).split())[:200] or type(error).__name__
        raise BadOption(
            f"{asked_by}: bitsandbytes cannot unpack {bits} bits on {device} ({why}); try another "
            f"version ({INSTALL}), or another --device"
        ) from error
    if bits == 8:
        return transformers.BitsAndBytesConfig(load_in_8bit=True)
    compute = {"bnb_4bit_compute_dtype": dtype} if isinstance(dtype, torch.dtype) else {}
    return transformers.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", **compute)


def _try(bits: int, device: torch.device) -> None:
    """Packs and unpacks a small matrix."""
    from bitsandbytes import functional

    matrix = torch.ones(BLOCK, BLOCK, dtype=torch.float16, device=device)
    if bits == 4:
        packed, state = functional.quantize_4bit(matrix, quant_type="nf4")
        unpacked = functional.dequantize_4bit(packed, state)
    else:
        unpacked = functional.int8_vectorwise_dequant(*functional.int8_vectorwise_quant(matrix)[:2])
    if not torch.allclose(unpacked.float(), matrix.float(), atol=0.1):
        raise RuntimeError("a matrix of ones is no such matrix after it")


def _of_bitsandbytes(network: nn.Module) -> list[tuple[str, Any]]:
    """Its modules by name; none where it was never imported."""
    library = sys.modules.get("bitsandbytes")
    kinds = (library.nn.Linear4bit, library.nn.Linear8bitLt) if library else ()
    return [(name, module) for name, module in network.named_modules() if isinstance(module, kinds)]


def packed_matrices(network: nn.Module, owner: str = "model") -> Mapping[str, Packed]:
    """The matrices in few bits, by the names of their parameters. Raises BadModel for one that
    is not packed, or whose numbers or scales are not as many as its shape asks for."""
    modules = network.named_modules()
    found = {f"{n}.weight": m.packed for n, m in modules if isinstance(m, PackedLinear)}
    for name, module in _of_bitsandbytes(network):
        packed = _in_8_bits(module) if hasattr(module, "state") else _in_4_bits(module)
        if packed is None:
            raise BadModel(
                f"{owner}: {name} should be packed by bitsandbytes, and is not, or has not its "
                "numbers and scales; save it again as BitsAndBytesConfig loads it, without "
                "llm_int8_has_fp16_weight"
            )
        found[f"{name}.weight"] = packed
    return found


def _in_4_bits(module: Any) -> Packed | None:
    from bitsandbytes import functional

    state = getattr(module.weight, "quant_state", None) or module.quant_state
    if state is None:
        return None
    data = module.weight.data
    if getattr(state, "packing_format_for_cpu", False):  # as a forward pass leaves it
        state = copy.copy(state)
        state.original_nested = False
        data, state = functional._convert_weight_packed_for_cpu_inverse(data, state)
        state.absmax = state.absmax.T.reshape(-1).float()
    shape, blocks = _shape_of(module), -(-_shape_of(module).numel() // max(1, state.blocksize))
    own = state.state2.absmax.numel() * state.state2.blocksize if state.nested else blocks
    fits = state.shape == shape and state.absmax.numel() == blocks <= own
    if not fits or data.nbytes != -(-shape.numel() // 2):
        return None
    return Packed(
        lambda: functional.dequantize_4bit(data, state),
        (shape[0], shape[1]),
        4,
        data.nbytes + state.absmax.nbytes,
    )


def _in_8_bits(module: Any) -> Packed | None:
    from bitsandbytes import functional

    data: Tensor = module.weight.data
    scales: Any = module.state.SCB
    scales = getattr(module.weight, "SCB", None) if scales is None else scales
    shape = _shape_of(module)
    is_packed = data.dtype == torch.int8 and scales is not None
    if not is_packed or data.shape != shape or scales.numel() != shape[0]:
        return None
    return Packed(
        lambda: functional.int8_vectorwise_dequant(data, scales),
        (shape[0], shape[1]),
        8,
        data.numel() + 4 * scales.numel(),
    )


def _shape_of(module: Any) -> torch.Size:
    """The shape that the matrix has unpacked; numbers of other counts would be read beyond them."""
    return torch.Size([module.out_features, module.in_features])


def pack(network: Any, owner: str = "model") -> None:
    """Puts a PackedLinear in place of each module of bitsandbytes; to transformers the network is
    no longer quantised. `unchanged` undoes it."""
    packed = packed_matrices(network, owner)
    embeddings = network.get_input_embeddings().weight
    for name, module in _of_bitsandbytes(network):
        like = embeddings.new_empty((), device=module.weight.device)
        made = PackedLinear(packed[f"{name}.weight"], like, module.bias, _was_conv(module))
        network.set_submodule(name, made)
    for module in network.modules():
        for mark in MARKS & vars(module).keys():
            delattr(module, mark)


def pack_shapes(network: Any, bits: int) -> None:
    """The same for a network on torch's meta device: of what transformers would pack."""
    from transformers.quantizers.base import get_keys_to_not_convert
    from transformers.quantizers.quantizers_utils import should_convert_module

    left_out = get_keys_to_not_convert(network)
    for name, module in list(network.named_modules()):
        is_conv = type(module).__name__ == "Conv1D"
        if (is_conv or type(module) is nn.Linear) and should_convert_module(name, left_out):
            weight: Any = module.weight
            rows, columns = reversed(weight.shape) if is_conv else weight.shape
            packed = Packed(
                partial(weight.new_empty, (rows, columns)),
                (rows, columns),
                bits,
                packed_bytes(rows, columns, bits),
            )
            bias: Any = module.bias
            network.set_submodule(name, PackedLinear(packed, weight, bias, is_conv))


def packed_bytes(rows: int, columns: int, bits: int) -> int:
    """With scales in float32: one for each row of 8 bits, for each `BLOCK` numbers of 4."""
    numbers = rows * columns
    return numbers + 4 * rows if bits == 8 else numbers // 2 + 4 * -(-numbers // BLOCK)


def _was_conv(module: Any) -> bool:
    """Whether transformers put it in place of a Conv1D, whose matrix it has turned."""
    return getattr(getattr(module, "source_cls", None), "__name__", "") == "Conv1D"


def values_of(network: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """All parameters by name, matrices in few bits as they unpack."""
    packed = packed_matrices(network)
    for name, parameter in network.named_parameters():
        yield name, packed[name].unpack() if name in packed else parameter.detach()


def quantised_entry(network: nn.Module) -> dict[str, int] | None:
    """What the manifest says of matrices in few bits; None without any."""
    packed = packed_matrices(network).values()
    if not packed:
        return None
    return {
        "bits": min(matrix.bits for matrix in packed),
        "matrices": len(packed),
        "numbers": sum(rows * columns for _, (rows, columns), _, _ in packed),
        "bytes": sum(matrix.bytes for matrix in packed),
    }
