"""Loading: a folder or a hub id → a model and the encoder of its rows.

    load_model(config) → LoadedModel(model, encoder)

Choices made here:
- safetensors or GGUF, never a pickle, and never code from the model's folder;
- a file that lacks a weight is refused: the weight would be random;
- fused experts run one by one: that form has a forward-mode derivative;
- float16 on a CPU becomes float32 unless --dtype says otherwise.
"""

import hashlib
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from prism_select.data.encoding import Encoder
from prism_select.models.adapters import load_adapter
from prism_select.models.causal_lm import CausalLM
from prism_select.run.config import ModelOptions
from prism_select.run.errors import BadModel, BadOption
from prism_select.run.objects import ModelObject, is_object, object_at
from prism_select.run.progress import Progress

__all__ = [
    "LoadedModel",
    "fingerprint_of",
    "load",
    "load_model",
    "model_fingerprint",
    "resolve_device",
    "weights_of",
]


@dataclass(frozen=True)
class LoadedModel:
    """A model, and the encoder that makes its tokens."""

    model: CausalLM
    encoder: Encoder


def resolve_device(name: str) -> torch.device:
    """Raises BadOption for a device that is not there, or without float64."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError) as error:
        raise BadOption(f"--device {name}: {str(error).splitlines()[0]}; try cpu") from None
    if device.type == "mps":
        raise BadOption(
            f"--device {name}: scores add up in double precision, which it lacks; try cpu"
        )
    return device


def weights_of(name: str) -> str | None:
    """The GGUF file to load, or None for safetensors or a hub id. Raises BadModel for a path with
    neither file."""
    if is_object(name):
        return None
    folder = Path(name)
    if not folder.exists():
        if folder.is_absolute() or name.startswith(".") or name.count("/") > 1:
            raise BadModel(f"--model {name}: no such folder; check the path, or give a hub id")
        return None
    if folder.is_file():
        if folder.suffix != ".gguf":
            raise BadModel(f"--model {folder}: a file that is not .gguf; give the model's folder")
        return folder.name
    if any(folder.glob("*.safetensors")):
        return None
    packed = sorted(folder.glob("*.gguf"))
    if len(packed) == 1:
        return packed[0].name
    if packed:
        raise BadModel(f"--model {folder}: {len(packed)} .gguf files; give the path of one")
    pickled = [*folder.glob("*.bin"), *folder.glob("*.pt"), *folder.glob("*.pth")]
    what = f"only {pickled[0].name}, a pickle, which is never read" if pickled else "no weights"
    raise BadModel(
        f"--model {folder}: {what}; save it with save_pretrained(folder), which writes "
        "model.safetensors"
    )


def refuse_unreachable(name: str) -> None:
    """Raises BadModel at once for a hub model that is not in the cache while the hub cannot be
    reached: the hub's client would try for a minute."""
    from huggingface_hub import HfApi, try_to_load_from_cache

    try:
        if not isinstance(try_to_load_from_cache(name, "config.json"), str):
            HfApi().model_info(name, timeout=10)
    except Exception as error:  # of any HTTP library; transformers reports all but these later
        if type(error).__name__ in (
            "ConnectError",
            "ConnectTimeout",
            "ConnectionError",
            "OfflineModeIsEnabled",
        ):
            why = "no such folder here, and the hub cannot be reached"
            raise BadModel(f"--model {name}: {why}; check the path, or the network") from error


def load(name: str, dtype: str, device: torch.device) -> tuple[CausalLM, Any]:
    """The model and its tokenizer. Raises BadModel for whatever is wrong with the folder."""
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    logging.getLogger("transformers").setLevel(logging.ERROR)
    path, gguf = Path(name), weights_of(name)
    if path.exists():
        path = path.parent if path.is_file() else path
    else:
        refuse_unreachable(name)
    source = str(path) if path.exists() else name
    precision: Any = "auto" if dtype == "auto" else getattr(torch, dtype)
    common: dict[str, Any] = {"trust_remote_code": False}
    weights: dict[str, Any] = {"use_safetensors": True}
    if gguf:
        common["gguf_file"] = gguf
        weights = {"quantization_config": transformers.GgufConfig(dequantize=True)}
        precision = torch.bfloat16 if dtype == "auto" else precision
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(source, **common)
        config = transformers.AutoConfig.from_pretrained(source, **common)
        config._experts_implementation = "eager"
        network, report = transformers.AutoModelForCausalLM.from_pretrained(
            source,
            config=config,
            dtype=precision,
            output_loading_info=True,
            **common,
            **weights,
        )
    except (OSError, ValueError, KeyError, ImportError, RuntimeError, SafetensorError) as error:
        reason = " ".join(str(error).split())[:300]
        raise BadModel(
            f"--model {name}: {reason or type(error).__name__}; check the folder or the hub id"
        ) from error
    if missing := sorted(report["missing_keys"]):
        raise BadModel(
            f"--model {name}: its files hold no {missing[0]} ({len(missing)} weights are missing "
            "and would be random); save the whole model with save_pretrained(folder)"
        )
    if dtype == "auto" and network.dtype == torch.float16 and device.type == "cpu":
        network = network.float()
    return CausalLM(network.to(device)), tokenizer


def adopt(lent: ModelObject) -> tuple[CausalLM, Any]:
    """A loaded model as it is; of a PEFT model the base with the adapter in it."""
    network = lent.network
    if hasattr(network, "get_base_model"):
        network = network.get_base_model()
    if hasattr(network.config, "_experts_implementation"):
        network.config._experts_implementation = "eager"
    return CausalLM(network), lent.tokenizer


def object_fingerprint(lent: ModelObject) -> str:
    """Of the tokenizer, and of each parameter its name, type, sum and first 4,096 numbers."""
    digest = hashlib.blake2b(digest_size=16)
    tokenizer = lent.tokenizer
    backend = getattr(tokenizer, "backend_tokenizer", None)
    digest.update((backend.to_str() if backend else repr(tokenizer)).encode())
    digest.update(str(getattr(tokenizer, "chat_template", None)).encode())
    for name, parameter in lent.network.named_parameters():
        values = parameter.detach()
        numbers = values.flatten()[:4096].double().cpu().numpy().tobytes()
        total = float(values.sum(dtype=torch.float64))
        digest.update(f"{name} {values.dtype} {tuple(values.shape)} {total!r}".encode() + numbers)
    return digest.hexdigest()


def model_fingerprint(name: str) -> str:
    """Of the configuration, and of the first and last megabyte of each file of weights; of a hub
    id, its name."""
    if is_object(name):
        return object_fingerprint(object_at(name))
    path, digest = Path(name), hashlib.blake2b(digest_size=16)
    if not path.exists():
        return f"hub:{name}"
    files = (
        [path]
        if path.is_file()
        else sorted(p for p in path.iterdir() if p.suffix in (".json", ".safetensors", ".gguf"))
    )
    for file in files:
        size = file.stat().st_size
        digest.update(f"{file.name}\0{size}\0".encode())
        with file.open("rb") as stream:
            digest.update(stream.read(2**20))
            stream.seek(max(0, size - 2**20))
            digest.update(stream.read())
    return digest.hexdigest()


def fingerprint_of(config: ModelOptions) -> str:
    """Of the model and its adapter."""
    names = [str(config.model)]
    if config.adapter and not is_object(config.adapter):
        names.append(config.adapter)
    return "+".join(map(model_fingerprint, names))


def load_model(config: ModelOptions, layers: str, progress: Progress) -> LoadedModel:
    """The adapter is merged, or kept apart where `layers` is adapter. Raises what `load` and
    `load_adapter` raise."""
    with progress.task(f"loading {config.model}", None):
        if is_object(config.model):
            model, tokenizer = adopt(object_at(str(config.model)))
        else:
            model, tokenizer = load(str(config.model), config.dtype, resolve_device(config.device))
            if config.adapter:
                model = load_adapter(model.network, Path(config.adapter), merge=layers != "adapter")
    limit = getattr(model.network.config, "max_position_embeddings", None) or config.max_length
    encoder = Encoder(
        tokenizer, config.template, min(config.max_length, limit), model.vocabulary, config.skip_end
    )
    progress.say(
        f"{type(model.network).__name__} in {str(model.dtype).removeprefix('torch.')} on "
        f"{model.device}, template {encoder.template}, at most {encoder.max_length} tokens a row"
    )
    return LoadedModel(model, encoder)
