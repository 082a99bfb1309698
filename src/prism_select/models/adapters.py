"""Adapters: an adapter of PEFT's, put on a model.

    adapter_config.json, adapter_model.safetensors → W + (lora_alpha / r) B A     merged
                                                   → W, A, B                      kept apart

Choices made here:
- every kind that PEFT can merge, in safetensors, and only where every name fits the model;
- embeddings take the number of rows that the adapter's weights have;
- PEFT's own model decides: a merged adapter gives its logits (merging.py), or is not used;
- a merged adapter is computed in float32; one kept apart has the model's dtype and is frozen.
"""

import json
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from prism_select.models.causal_lm import CausalLM
from prism_select.models.merging import apart, merged, random_tokens
from prism_select.run.adapter_base import CONFIG, WEIGHTS
from prism_select.run.errors import BadModel, BadOption
from prism_select.run.tensor_files import tensor_shapes

__all__ = ["has_tokenizer", "load_adapter", "no_adapter", "no_peft", "refuse_kind"]

Shapes = Mapping[str, tuple[int, ...]]
Say = Callable[[str], None]

TOKENIZERS = ("tokenizer.json", "tokenizer.model", "spiece.model", "vocab.json", "vocab.txt")
# PEFT's models that do more than change weights: no base model gives their logits.
BESIDE_WEIGHTS = ("ADAPTION_PROMPT", "POLY", "XLORA")
SAVED = ".modules_to_save."  # PEFT's own copy of a module
OF_WEIGHTS = re.compile(r"weight|embedding|key|ignored|bias", re.IGNORECASE)


def has_tokenizer(folder: Path) -> bool:
    """Whether a trainer left a tokenizer in the adapter's folder."""
    return any((folder / name).is_file() for name in TOKENIZERS)


def load_adapter(
    network: Any,
    folder: Path,
    merge: bool,
    rows: Sequence[Tensor] = (),
    say: Say = lambda line: None,
) -> CausalLM:
    """The network, changed in place, with the adapter merged into its weights, or beside them as
    frozen parameters: where `merge` is false, or where merging LoRA would change what the model
    computes. `rows` are tokens that logits are compared on, beside random ones; `say` gets what
    PEFT warns of and what was done. Raises BadOption without PEFT or such a folder, BadModel where
    the adapter cannot be used."""
    shapes = _check(folder)
    try:
        import peft
    except ImportError:
        raise no_peft() from None
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            config = peft.PeftConfig.from_pretrained(str(folder))
            refuse_kind(f"adapter {folder}", config)
            _resize(network, folder, shapes, config)
            adapted = _attached(network, folder, shapes, config, merge)
        except (OSError, ValueError, RuntimeError, KeyError, TypeError, AttributeError) as error:
            why = " ".join(str(error).split())[:200]
            raise BadModel(
                f"adapter {folder}: it does not fit this model ({why}); give the model that it was "
                "made for"
            ) from error
        probe = random_tokens(adapted)
        vocabulary = network.get_output_embeddings().weight.shape[0]
        probe += [tokens for tokens in rows if int(tokens.max()) < vocabulary]
        try:
            model = merged(adapted, probe, say) if merge else apart(adapted, probe)
        except BadModel as error:
            raise BadModel(f"adapter {folder}: {error}") from error.__cause__
    for line in dict.fromkeys(str(warning.message) for warning in caught):
        if OF_WEIGHTS.search(line):
            say(f"PEFT says of the adapter: {' '.join(line.split())[:200]}")
    return model


def no_adapter(folder: Path) -> BadOption:
    return BadOption(
        f"adapter {folder}: no such folder; give the one that PEFT's save_pretrained wrote"
    )


def no_peft() -> BadOption:
    return BadOption("an adapter needs PEFT; install PRISM with its extra [train]")


def _attached(network: Any, folder: Path, shapes: Shapes, config: Any, merge: bool) -> Any:
    """PEFT's model with the adapter in it, as PeftModel.from_pretrained makes it. Raises ValueError
    where a name is in one of the two alone."""
    from peft import PeftModel
    from peft.auto import MODEL_TYPE_TO_PEFT_MODEL_MAPPING as KINDS

    config.inference_mode = True
    kind: Any = KINDS.get(config.task_type, PeftModel)
    adapted = kind(network, config, "default", autocast_adapter_dtype=merge)
    names = adapted.load_adapter(
        str(folder),
        "default",
        autocast_adapter_dtype=merge,
        torch_device=str(next(network.parameters()).device),
        key_mapping=getattr(network, "_checkpoint_conversion_mapping", {}),
    )
    unmatched = [name for name in names.missing_keys if "vblora_vector_bank" not in name]
    # embeddings that were saved on purpose are in the file twice
    twice = {name for name in shapes if SAVED in name and name.replace(SAVED, ".") in shapes}
    unmatched += [name for name in names.unexpected_keys if name not in twice]
    if unmatched:
        raise ValueError(f"{unmatched[0]} is in one of them alone")
    return adapted


def refuse_kind(owner: str, config: Any) -> None:
    """Raises BadModel for an adapter that is not in the weights alone."""
    kind = str(getattr(config.peft_type, "value", config.peft_type))
    what = ""
    if config.is_prompt_learning:
        what = f"it is {kind}, which puts learned vectors before a text"
    elif kind in BESIDE_WEIGHTS:
        what = f"it is {kind}, which is more than a change of weights"
    elif getattr(config, "alora_invocation_tokens", None):
        what = "it is an activated LoRA, which works only after its invocation tokens"
    if what:
        raise BadModel(
            f"{owner}: {what}; a score needs weights: train LoRA or another kind that "
            "PEFT can merge"
        )
    if config.task_type not in (None, "CAUSAL_LM"):
        raise BadModel(
            f"{owner}: it was made for the task {config.task_type}; give one for CAUSAL_LM"
        )


def _resize(network: Any, folder: Path, shapes: Shapes, config: Any) -> None:
    """Gives the embeddings and the head as many rows as the adapter has for them. Raises BadModel
    where rows are new to the model and the adapter does not hold them."""
    modules = {
        f"base_model.model.{name}": module
        for name, module in network.named_modules()
        if module in (network.get_input_embeddings(), network.get_output_embeddings())
    }
    rows = {  # of each of them that the adapter saved whole
        name: shapes[key][0]
        for name in modules
        for key in (f"{name}.weight", f"{name}.base_layer.weight")
        if key in shapes
    }
    indices = _token_indices(config)
    before = network.get_input_embeddings().weight.shape[0]
    after = max(rows.values(), default=max([before - 1, *indices]) + 1)
    if after == before:
        return
    new = set(range(before, after))
    tied = len({id(module.weight) for module in modules.values()}) == 1
    copied = not getattr(config, "ensure_weight_tying", False) and any(
        name.endswith(saved) for name in modules for saved in config.modules_to_save or ()
    )
    has_rows = [
        name in rows
        or (new <= indices and f"{name}.token_adapter.trainable_tokens_delta" in shapes)
        for name in modules
    ]
    if not (any(has_rows) if tied and not copied else all(has_rows)):
        raise BadModel(
            f"adapter {folder}: its embeddings have {after} rows and the model's {before}, and it "
            "does not hold all of the others; save it again with save_embedding_layers=True, or "
            "give the model whose embeddings were resized"
        )
    network.resize_token_embeddings(after, mean_resizing=False)


def _token_indices(config: Any) -> set[int]:
    """The tokens whose embeddings alone were trained."""
    found = getattr(config, "trainable_token_indices", None) or getattr(config, "token_indices", ())
    lists = found.values() if isinstance(found, Mapping) else [found]
    return {int(index) for indices in lists for index in indices or ()}


def _check(folder: Path) -> Shapes:
    """Shapes of the adapter's tensors by name. Raises BadOption where there is no such folder,
    BadModel where it holds no adapter in safetensors."""
    if not folder.is_dir():
        raise no_adapter(folder)
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
        json.loads((folder / CONFIG).read_text(encoding="utf-8"))["peft_type"]
        return tensor_shapes(folder / WEIGHTS)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise BadModel(f"adapter {folder}: it cannot be read ({error}); save it again") from None
