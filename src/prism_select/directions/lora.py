"""TODO."""

import math
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor, nn
from torch.nn import functional

from prism_select.core.layers import Direction, dense
from prism_select.core.target_gradient import norm
from prism_select.directions.low_rank import matrices, truncated
from prism_select.models.adapters import CONFIG, WEIGHTS
from prism_select.run.errors import BadOption
from prism_select.run.folder import Store

__all__ = ["save_adapter"]


def save_adapter(
    network: nn.Module, direction: Direction, rank: int, folder: Path
) -> Mapping[str, float]:
    """The share of the direction's squared length that the adapter keeps: of each weight, 0 where
    it is left out, and of all together under `total`. Raises BadOption where nothing can be kept,
    DiskTrouble."""
    if any("lora_" in name for name, _ in network.named_parameters()):
        raise BadOption(
            "--save-adapter: the model has an adapter already, kept apart; merge it, or leave it out"
        )
    used = {
        name: owner for name, owner in matrices(network, direction).items() if direction[name].any()
    }
    if not used:
        raise BadOption(
            "--save-adapter: no matrix counts that LoRA could move; count more with --layers"
        )
    low = {name: truncated(direction[name], rank) for name in used}
    lengths = {name: norm(dense({name: value})) for name, value in low.items()}
    length, tensors, transposed = math.hypot(*lengths.values()), dict[str, Tensor](), False
    for name, value in low.items():
        left, right = value / length
        if not isinstance(used[name].module, nn.Linear):  # Conv1D keeps (d_in, d_out)
            left, right, transposed = right.mT, left.mT, True
        lacking = rank - len(right)
        parts = {
            "A": functional.pad(right, (0, 0, 0, lacking)),
            "B": functional.pad(left, (0, lacking)),
        }
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
    kept = {
        name: (lengths.get(name, 0.0) / size) ** 2 if size else 1.0 for name, size in whole.items()
    }
    return kept | {"total": (length / norm(direction)) ** 2}
