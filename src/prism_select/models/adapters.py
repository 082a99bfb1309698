"""Adapters: a direction as a LoRA adapter that stock PEFT loads, and an adapter of PEFT's on a
model.

    ΔW = (lora_alpha / r) lora_B lora_A = L / ‖L‖      L: the direction's matrices, each cut to rank r; ‖L‖ over all

    loaded with scale ε, the gain rises by ε ‖L‖ + O(ε²) where the direction is the gain's own
    gradient

    adapter_config.json          r, lora_alpha = r, the modules by their full names
    adapter_model.safetensors    base_model.model.MODULE.lora_A.weight (r, d_in), lora_B.weight (d_out, r), float32

Choices made here: the adapter has length one, so that a scale is a distance; matrices of lower rank
than r are padded with zeros; embeddings, heads tied to them, norms, biases and fused experts have
no LoRA and are left out. A loaded adapter is LoRA in safetensors whose names all fit; kept apart,
it has the model's dtype."""

import json
import warnings
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from prism_select.models.causal_lm import CausalLM
from prism_select.run.errors import BadModel, BadOption

__all__ = ["CONFIG", "WEIGHTS", "load_adapter"]

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


def load_adapter(network: Any, folder: Path, merge: bool) -> CausalLM:
    """The network, changed in place, with an adapter in its weights, or beside them as weights of
    its own, frozen like the rest. Raises BadOption without PEFT or without such a folder, BadModel
    where the adapter cannot be used."""
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
        raise BadOption(
            f"adapter {folder}: no such folder; give the one that PEFT's save_pretrained wrote"
        )
    if not (folder / CONFIG).exists():
        raise BadModel(
            f"adapter {folder}: no {CONFIG}; give the folder that PEFT's save_pretrained wrote"
        )
    if not (folder / WEIGHTS).exists():
        pickled = (folder / "adapter_model.bin").exists()
        found = (
            "only adapter_model.bin, a pickle, which is never read" if pickled else f"no {WEIGHTS}"
        )
        raise BadModel(
            f"adapter {folder}: {found}; save it with PEFT's save_pretrained, which writes {WEIGHTS}"
        )
    try:
        kind = json.loads((folder / CONFIG).read_text(encoding="utf-8"))["peft_type"]
        with safe_open(folder / WEIGHTS, "pt") as opened:
            opened.keys()
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise BadModel(f"adapter {folder}: it cannot be read ({error}); save it again") from None
    if kind != "LORA":
        raise BadModel(
            f"adapter {folder}: it is {kind}, and only LoRA can be used; merge it into a model of its own"
        )
