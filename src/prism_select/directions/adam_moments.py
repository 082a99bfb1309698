"""Adam's moments: the curvature that a checkpoint's own optimizer took its steps with.

    v̂ = exp_avg_sq / (1 − β₂^step)        H = √v̂ + ε, a diagonal

    FOLDER/optimizer.pt, as transformers.Trainer writes it beside the weights

LESS's preconditioning (arXiv 2402.04333), made linear in the row: there the row's own gradient
enters both moments, here it is divided by those of the checkpoint.

Choices made here:
- parameters are matched in the Trainer's order, those with weight decay first, and checked by
  shape; of an adapter its own alone were trained;
- norms have weight decay in a Trainer before transformers 5: the sizes of the groups tell;
- the file is a pickle; torch's reader of weights alone runs no code of it;
- a parameter whose moments are all zero does not move.
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from prism_select.core.gradients import wide_dtype
from prism_select.core.layers import Parameters
from prism_select.directions.curvature import Block, BlockCurvature
from prism_select.models.layer_selection import select_parameters
from prism_select.run.config import ScoreConfig
from prism_select.run.errors import BadModel
from prism_select.run.objects import is_object

__all__ = ["adam_curvature", "moments_file"]

FILE = "optimizer.pt"
NORMS = r"layernorm|rmsnorm|(?:^|\.)norm(?:$|\.)|_norm(?:$|\.)"
WITHOUT_DECAY = (rf"bias|{NORMS}", "bias")  # in names, in lower case; LayerNorm has none either


def moments_file(config: ScoreConfig) -> Path:
    """Beside the adapter, or the model without one. Raises BadModel where there is none."""
    name = config.adapter or str(config.model)
    if is_object(name):
        raise BadModel("--curvature adam: a loaded model has no optimizer.pt; give its folder")
    folder = Path(name)
    path = (folder.parent if folder.is_file() else folder) / FILE
    if not path.is_file():
        raise BadModel(
            f"--curvature adam: {folder} has no {FILE}; give a checkpoint of transformers.Trainer, "
            "saved with save_only_model=False"
        )
    return path


def adam_curvature(
    config: ScoreConfig, network: nn.Module, parameters: Parameters
) -> BlockCurvature:
    """Of the selected parameters. Raises BadModel for a file that does not fit the model, or that
    is of another optimizer."""
    path = moments_file(config)
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        state, groups = saved["state"], saved["param_groups"]
        sizes = [len(group["params"]) for group in groups]
    except Exception as error:  # of any kind: the file may hold anything
        why = (" ".join(str(error).split()) or type(error).__name__)[:200]
        raise refusal(path, f"it cannot be read ({why})") from error
    trained = dict(network.named_parameters())
    if config.layers == "adapter":
        trained = dict(select_parameters(network, "adapter"))
    names = in_trainers_order(network, list(trained), sizes)
    if names is None:
        counts = " + ".join(map(str, sizes))
        what = f"it is of {counts} parameters, and the model has {len(trained)}"
        raise refusal(path, f"{what}, in other groups")
    keys = [(key, group) for group in groups for key in group["params"]]
    entries = {name: (state.get(key, {}), g) for name, (key, g) in zip(names, keys, strict=True)}
    for name in names:
        refuse_other_state(path, name, trained[name], *entries[name])
    blocks = {name: adam_block(weight, *entries[name]) for name, weight in parameters.items()}
    return BlockCurvature(blocks, 0)


def in_trainers_order(
    network: nn.Module, names: Sequence[str], sizes: Sequence[int]
) -> list[str] | None:
    """Those with weight decay, then the others; None where the groups have other sizes."""
    for pattern in WITHOUT_DECAY:
        decayed = [name for name in names if has_decay(network, name, pattern)]
        if [len(decayed), len(names) - len(decayed)] == [*sizes]:
            return [*decayed, *(name for name in names if name not in decayed)]
    return None


def has_decay(network: nn.Module, name: str, pattern: str) -> bool:
    module = network.get_submodule(name.rpartition(".")[0])
    return not (isinstance(module, nn.LayerNorm) or re.search(pattern, name.lower()))


def refuse_other_state(
    path: Path, name: str, weight: Tensor, state: Mapping[str, Any], group: Mapping[str, Any]
) -> None:
    moments: Any = state.get("exp_avg_sq")
    is_adams = moments is not None and "step" in state and {"betas", "eps"} <= group.keys()
    if not is_adams or group.get("amsgrad"):
        found = ", ".join(map(str, state)) or "nothing"
        raise refusal(path, f"for {name} it holds {found}, not the moments of torch's AdamW")
    if moments.shape != weight.shape:
        shapes = f"{tuple(moments.shape)}, and the model's {tuple(weight.shape)}"
        raise refusal(path, f"the moments of {name} have the shape {shapes}")


def refusal(path: Path, what: str) -> BadModel:
    return BadModel(
        f"--curvature adam: {path}: {what}; give a checkpoint of this model, trained by "
        "transformers.Trainer with AdamW, or another --curvature"
    )


def adam_block(weight: Tensor, state: Mapping[str, Any], group: Mapping[str, Any]) -> Block:
    moments = state["exp_avg_sq"].to(weight.device, wide_dtype(weight))
    root = (moments / (1 - group["betas"][1] ** float(state["step"]))).sqrt()
    return Block(root + group["eps"] * bool(root.any()))
