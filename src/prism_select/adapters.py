"""Adapters: a direction as a LoRA adapter that stock PEFT loads, and an adapter of PEFT's on a model.

    ΔW = (lora_alpha / r) lora_B lora_A = L / ‖L‖      L: the direction's matrices, each cut to rank r; ‖L‖ over all

    loaded with scale ε, the gain rises by ε ‖L‖ + O(ε²) where the direction is the gain's own gradient

    adapter_config.json          r, lora_alpha = r, the modules by their full names
    adapter_model.safetensors    base_model.model.MODULE.lora_A.weight (r, d_in), lora_B.weight (d_out, r), float32

Choices made here: the adapter has length one, so that a scale is a distance; matrices of lower rank than r are padded
with zeros; embeddings, heads tied to them, norms, biases and fused experts have no LoRA and are left out. A loaded
adapter is LoRA in safetensors whose names all fit; kept apart, it has the model's dtype.
"""

import json
import math
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.nn import functional

from prism_select.core.direction import norm
from prism_select.core.layers import Direction, dense
from prism_select.errors import BadModel, BadOption
from prism_select.lowrank import matrices, truncated
from prism_select.models import CausalLM
from prism_select.store import Store

__all__ = ["load_adapter", "save_adapter"]

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


def save_adapter(network: nn.Module, direction: Direction, rank: int, folder: Path) -> Mapping[str, float]:
    """The share of the direction's squared length that the adapter keeps: of each weight, 0 where it is left out, and
    of all together under `total`. Raises BadOption where nothing can be kept, DiskTrouble."""
    if any("lora_" in name for name, _ in network.named_parameters()):
        raise BadOption("--save-adapter: the model has an adapter already, kept apart; merge it, or leave it out")
    used = {name: owner for name, owner in matrices(network, direction).items() if direction[name].any()}
    if not used:
        raise BadOption("--save-adapter: no matrix counts that LoRA could move; count more with --layers")
    low = {name: truncated(direction[name], rank) for name in used}
    lengths = {name: norm(dense({name: value})) for name, value in low.items()}
    length, tensors, transposed = math.hypot(*lengths.values()), dict[str, Tensor](), False
    for name, value in low.items():
        left, right = value / length
        if not isinstance(used[name].module, nn.Linear):  # Conv1D keeps (d_in, d_out)
            left, right, transposed = right.mT, left.mT, True
        lacking = rank - len(right)
        parts = {"A": functional.pad(right, (0, 0, 0, lacking)), "B": functional.pad(left, (0, lacking))}
        for part, padded in parts.items():
            tensors[f"base_model.model.{used[name].name}.lora_{part}.weight"] = padded.float()
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": getattr(network, "name_or_path", ""),
        "r": rank,
        "lora_alpha": rank,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": transposed,
        "target_modules": sorted(owner.name for owner in used.values()),
        "inference_mode": True,
    }
    store = Store(str(folder))
    store.make()
    store.write_tensors(WEIGHTS, tensors, {"format": "pt"})
    store.write_json(CONFIG, config)
    whole = {name: norm({name: value}) for name, value in direction.items()}
    kept = {name: (lengths.get(name, 0.0) / size) ** 2 if size else 1.0 for name, size in whole.items()}
    return kept | {"total": (length / norm(direction)) ** 2}


def load_adapter(network: Any, folder: Path, merge: bool) -> CausalLM:
    """The network, changed in place, with an adapter in its weights, or beside them as weights of its own, frozen like
    the rest. Raises BadOption without PEFT or without such a folder, BadModel where the adapter cannot be used."""
    _check(folder)
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError:
        raise BadOption("an adapter needs PEFT; install PRISM with its extra [train]") from None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            config = LoraConfig.from_pretrained(str(folder))
            adapted: Any = get_peft_model(network, config, autocast_adapter_dtype=merge)
            told = adapted.load_adapter(
                str(folder),
                "default",
                autocast_adapter_dtype=merge,
                torch_device=str(next(network.parameters()).device),
            )
            if odd := [*told.missing_keys, *told.unexpected_keys]:
                raise ValueError(f"{odd[0]} is in one of them alone")
        except (OSError, ValueError, RuntimeError, KeyError, TypeError) as error:
            why = " ".join(str(error).split())[:200]
            raise BadModel(
                f"adapter {folder}: it does not fit this model ({why}); give the model that it was made for"
            ) from error
        return CausalLM(adapted.merge_and_unload() if merge else adapted.get_base_model())


def _check(folder: Path) -> None:
    if not folder.is_dir():
        raise BadOption(f"adapter {folder}: no such folder; give the one that PEFT's save_pretrained wrote")
    if not (folder / CONFIG).exists():
        raise BadModel(f"adapter {folder}: no {CONFIG}; give the folder that PEFT's save_pretrained wrote")
    if not (folder / WEIGHTS).exists():
        pickled = (folder / "adapter_model.bin").exists()
        found = "only adapter_model.bin, a pickle, which is never read" if pickled else f"no {WEIGHTS}"
        raise BadModel(f"adapter {folder}: {found}; save it with PEFT's save_pretrained, which writes {WEIGHTS}")
    try:
        kind = json.loads((folder / CONFIG).read_text(encoding="utf-8"))["peft_type"]
        with safe_open(folder / WEIGHTS, "pt") as opened:
            opened.keys()
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise BadModel(f"adapter {folder}: it cannot be read ({error}); save it again") from None
    if kind != "LORA":
        raise BadModel(f"adapter {folder}: it is {kind}, and only LoRA can be used; merge it into a model of its own")
