"""LoRA: a direction as an adapter that stock PEFT loads.

    ΔW = (lora_alpha / r) lora_B lora_A = L / ‖L‖      L: the direction's matrices, each cut to rank
                                                       r; ‖L‖ over all of them

    Loaded with scale ε, it raises the gain by ε ‖L‖ + O(ε²), if the direction is the gain's own
    gradient.

    adapter_config.json          r, lora_alpha = r, the modules by their full names
    adapter_model.safetensors    base_model.model.MODULE.lora_A.weight (r, d_in),
                                 base_model.model.MODULE.lora_B.weight (d_out, r), in float32

Choices made here:
- the adapter has length one, so a scale is a distance;
- matrices of lower rank than r are padded with zeros;
- embeddings, heads tied to them, norms, biases and fused experts have no LoRA and are left out.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.nn import functional

from prism_select.core.gradients import norm
from prism_select.core.layers import Factored, Factors, Owner, dense
from prism_select.core.packed import is_transposed
from prism_select.directions.low_rank import matrix_owners, truncated
from prism_select.models.layer_selection import adapter_names
from prism_select.run.adapter_base import CONFIG, WEIGHTS
from prism_select.run.errors import BadOption
from prism_select.run.folder import Store

__all__ = ["AdapterEnergy", "save_adapter"]


@dataclass(frozen=True)
class AdapterEnergy:
    """Shares of a direction's squared length that its adapter keeps: of all parameters together,
    and of each (0 where it is left out)."""

    total: float
    by_weight: Mapping[str, float]


def save_adapter(network: nn.Module, direction: Factored, rank: int, folder: Path) -> AdapterEnergy:
    """Raises BadOption where nothing can be kept, DiskTrouble."""
    used = _adaptable(network, direction)
    low = {name: truncated(dense({name: direction[name]})[name], rank) for name in used}
    lengths = {name: norm(dense({name: value})) for name, value in low.items()}
    length = math.hypot(*lengths.values())
    tensors: dict[str, Tensor] = {}
    for name, owner in used.items():
        a, b = _padded(owner, low[name] / length, rank)
        tensors[f"base_model.model.{owner.name}.lora_A.weight"] = a.float()
        tensors[f"base_model.model.{owner.name}.lora_B.weight"] = b.float()
    store = Store(str(folder))
    store.make()
    store.write_tensors(WEIGHTS, tensors, {"format": "pt"})
    store.write_json(CONFIG, _config(network, list(used.values()), rank))
    before = {name: norm({name: value}) for name, value in direction.items()}
    by_weight = {
        name: (lengths.get(name, 0.0) / size) ** 2 if size else 1.0 for name, size in before.items()
    }
    return AdapterEnergy((length / norm(direction)) ** 2, by_weight)


def _adaptable(network: nn.Module, direction: Factored) -> Mapping[str, Owner]:
    """The matrices that LoRA could move and the direction does."""
    if adapter_names(network):
        raise BadOption(
            "--save-adapter: the model has an adapter already, kept apart; merge it, or leave it "
            "out"
        )
    matrices = matrix_owners(network, direction)
    used = {name: owner for name, owner in matrices.items() if norm({name: direction[name]})}
    if not used:
        raise BadOption(
            "--save-adapter: no matrix is selected that LoRA could move; select more with --layers"
        )
    return used


def _padded(owner: Owner, factors: Factors, rank: int) -> tuple[Tensor, Tensor]:
    """lora_A (rank, d_in) and lora_B (d_out, rank)."""
    b, a = factors
    if is_transposed(owner.module):
        b, a = a.mT, b.mT
    missing = rank - len(a)
    return functional.pad(a, (0, 0, 0, missing)), functional.pad(b, (0, missing))


def _config(network: nn.Module, used: Sequence[Owner], rank: int) -> dict[str, Any]:
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": getattr(network, "name_or_path", ""),
        "r": rank,
        "lora_alpha": rank,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": any(is_transposed(owner.module) for owner in used),
        "target_modules": sorted(owner.name for owner in used),
        "inference_mode": True,
    }
