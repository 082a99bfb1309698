"""Adapters: a LoRA adapter of PEFT's, put on a model.

    adapter_config.json, adapter_model.safetensors → W + (lora_alpha / r) B A     merged
                                                   → W, A, B                      kept apart

Choices made here:
- only LoRA, in safetensors, and only where every name fits the model;
- a merged adapter is computed in float32; one kept apart has the model's dtype and is frozen.
"""

import json
import warnings
from pathlib import Path
from typing import Any

from prism_select.models.causal_lm import CausalLM
from prism_select.run.errors import BadModel, BadOption
from prism_select.run.tensor_files import tensor_names

__all__ = ["CONFIG", "WEIGHTS", "load_adapter"]

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


def load_adapter(network: Any, folder: Path, merge: bool) -> CausalLM:
    """The network, changed in place, with the adapter merged into its weights, or beside them as
    frozen parameters. Raises BadOption without PEFT or such a folder, BadModel where the adapter
    cannot be used."""
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
            names = adapted.load_adapter(
                str(folder),
                "default",
                autocast_adapter_dtype=merge,
                torch_device=str(next(network.parameters()).device),
            )
            if unmatched := [*names.missing_keys, *names.unexpected_keys]:
                raise ValueError(f"{unmatched[0]} is in one of them alone")
        except (OSError, ValueError, RuntimeError, KeyError, TypeError) as error:
            why = " ".join(str(error).split())[:200]
            raise BadModel(
                f"adapter {folder}: it does not fit this model ({why}); give the model that it was "
                "made for"
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
        what = (
            "only adapter_model.bin, a pickle, which is never read" if pickled else f"no {WEIGHTS}"
        )
        raise BadModel(
            f"adapter {folder}: {what}; save it with PEFT's save_pretrained, which writes {WEIGHTS}"
        )
    try:
        kind = json.loads((folder / CONFIG).read_text(encoding="utf-8"))["peft_type"]
        tensor_names(folder / WEIGHTS)  # raises where it is none
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise BadModel(f"adapter {folder}: it cannot be read ({error}); save it again") from None
    if kind != "LORA":
        raise BadModel(
            f"adapter {folder}: it is {kind}, and only LoRA can be used; merge it into a model of "
            "its own"
        )
