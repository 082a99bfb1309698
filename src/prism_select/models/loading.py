"""Loading: a folder or a hub id → a model and the encoder of its rows.

    load_model(config) → LoadedModel(model, encoder)

Choices made here:
- safetensors or GGUF, never a pickle, and never code from the model's folder;
- a file that lacks a weight is refused: the weight would be random; so are weights that another
  library than bitsandbytes has quantised, which have no gradient;
- an adapter's folder is asked first for tokenizer and chat template: training has used those;
- fused experts run one by one: that form has a forward-mode derivative;
- float16 on a CPU becomes float32 unless --dtype says otherwise.
"""

import hashlib
import json
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from copy import deepcopy
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from prism_select.data.encoding import Encoder
from prism_select.data.records import Example
from prism_select.models.adapters import has_tokenizer, load_adapter, no_adapter, refuse_kind
from prism_select.models.causal_lm import CausalLM
from prism_select.models.devices import bytes_by_device, take_hooks_off
from prism_select.models.merging import PROBE, refuse_beside_packed
from prism_select.models.placement import (
    DeviceMap,
    free_memory,
    network_of,
    place,
    scoring_share,
)
from prism_select.models.quantised import (
    BITS,
    bits_in,
    pack,
    pack_shapes,
    packed_matrices,
    quantised_entry,
    quantizer_of,
    values_of,
)
from prism_select.run.adapter_base import looks_local, named_base
from prism_select.run.config import ModelOptions
from prism_select.run.errors import BadModel, BadOption, BadRow
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


LIMITS = ("max_position_embeddings", "max_sequence_length", "max_seq_len", "seq_length")
WEIGHTS = (".safetensors", ".gguf")
PRINTED = (*WEIGHTS, ".json", ".jinja", ".model", ".txt", ".tiktoken")
PROBED_ROWS = 2  # that a merged adapter is compared with PEFT's model on


@dataclass(frozen=True)
class LoadedModel:
    """A model, and the encoder that makes its tokens. `warnings` are what a user should know of the
    way it was loaded."""

    model: CausalLM
    encoder: Encoder
    warnings: Sequence[str] = ()


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
        if looks_local(name):
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


def load(
    name: str,
    dtype: str,
    device: torch.device,
    adapter: Path | None = None,
    quantize: str = "none",
    spread: Callable[[Any, int], DeviceMap] | None = None,
) -> tuple[CausalLM, Any]:
    """The model and its tokenizer, or that in the folder of `adapter`, which is not put on the
    model. `spread` says of a configuration, in so many bits, which part goes to which device, in
    place of all to `device`. Raises BadModel for whatever is wrong with the folder, BadOption where
    it cannot be quantised."""
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
        if quantize != "none":
            raise BadOption(
                f"--quantize {quantize}: {name} is a GGUF file, which is unpacked as it is read; "
                "give the model in safetensors, or leave --quantize out"
            )
        common["gguf_file"] = gguf
        weights = {"quantization_config": transformers.GgufConfig(dequantize=True)}
        precision = torch.bfloat16 if dtype == "auto" else precision
    try:
        tokenizer = tokenizer_of(source, adapter, common)
        config = transformers.AutoConfig.from_pretrained(source, **common)
        if bits := 0 if gguf else quantised_to(name, config, quantize):
            precision = dtype_of(config, dtype, device)
            weights |= quantised_weights(name, quantize, config, bits, precision, device)
        config._experts_implementation = "eager"
        if spread:
            weights["device_map"] = spread(config, bits)
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
    if spread:
        take_hooks_off(network)
    if bits:
        pack(network, f"--model {name}")
        return CausalLM(network), tokenizer
    if dtype == "auto" and network.dtype == torch.float16 and device.type == "cpu":
        network = network.float()
    return CausalLM(network if spread else network.to(device)), tokenizer


def spread_of(
    config: ModelOptions, layers: str, progress: Progress
) -> Callable[[Any, int], DeviceMap]:
    """For --device-map auto: the placement of a configuration, which is reported where it changes
    nothing. Matrices in few bits take no part of the host: bitsandbytes does not split them."""

    def spread(described: Any, bits: int) -> DeviceMap:
        memory = free_memory(host=not bits)
        network = network_of(deepcopy(described), config.dtype, on_cpu=len(memory) == 1)
        if bits:
            pack_shapes(network, bits)
        found = place(network, memory, scoring_share(network, config, layers))
        devices = [*dict.fromkeys(map(str, found.values()))]
        if len(devices) == 1:
            progress.say(f"--device-map auto: all of the model is on {devices[0]}, as without it")
        elif "cpu" in devices:
            progress.say("--device-map auto: what the GPUs have no room for is computed on the CPU")
        return found

    return spread


def quantised_to(name: str, config: Any, quantize: str) -> int:
    """The bits of the model's matrices, in its files or by `quantize`; 0 where they are whole.
    Raises BadModel for files of another method, BadOption for an option that does not fit them."""
    there, asked = bits_in(f"--model {name}", config), BITS.get(quantize, 0)
    if asked and there and asked != there:
        raise BadOption(
            f"--quantize {quantize}: {name} has its weights in {there} bits already; leave it out"
        )
    return there or asked


def quantised_weights(
    name: str, quantize: str, config: Any, bits: int, precision: Any, device: torch.device
) -> dict[str, Any]:
    """What transformers' loader takes for matrices of few bits."""
    there = bool(getattr(config, "quantization_config", None))
    asked_by = f"--model {name}" if there else f"--quantize {quantize}"
    quantizer = quantizer_of(asked_by, bits, precision, device)
    return {"device_map": {"": device}} | ({} if there else {"quantization_config": quantizer})


def dtype_of(config: Any, dtype: str, device: torch.device) -> Any:
    """What --dtype asks for; auto is float32 in place of float16 on a CPU."""
    if dtype != "auto":
        return getattr(torch, dtype)
    is_half = getattr(config, "dtype", None) == torch.float16
    return torch.float32 if is_half and device.type == "cpu" else "auto"


def tokenizer_of(source: str, adapter: Path | None, common: Mapping[str, Any]) -> Any:
    """The tokenizer beside the adapter, or the model's own with the adapter's chat template, where
    there are such. Raises BadModel for an adapter's that cannot be read."""
    import transformers

    template = adapter / "chat_template.jinja" if adapter else None
    if adapter and has_tokenizer(adapter):
        try:
            return transformers.AutoTokenizer.from_pretrained(str(adapter), trust_remote_code=False)
        except Exception as error:  # of any kind: its files may hold anything
            why = " ".join(str(error).split())[:200] or type(error).__name__
            raise BadModel(
                f"adapter {adapter}: its tokenizer cannot be read ({why}); save it again, or "
                "remove its files to take the model's own"
            ) from error
    tokenizer = transformers.AutoTokenizer.from_pretrained(source, **common)
    if template and template.is_file():
        tokenizer.chat_template = template.read_text(encoding="utf-8")
    return tokenizer


def refuse_lent(network: Any) -> None:
    """Raises BadModel for a loaded network with weights or an adapter that no score can reach."""
    dtypes, packed = (
        (torch.float64, torch.float32, torch.bfloat16, torch.float16),
        packed_matrices(network),
    )
    parameters = network.named_parameters()
    frozen = [n for n, p in parameters if p.dtype not in dtypes and n not in packed]
    if frozen or (getattr(network, "is_quantized", False) and not packed):
        what = f"{len(frozen)} of its weights, {frozen[0]} say," if frozen else "its weights"
        raise BadModel(
            f"model: {what} are quantised, and have no gradient; load it in full precision, or "
            "with BitsAndBytesConfig"
        )
    for config in getattr(network, "peft_config", {}).values():
        refuse_kind("model", config)
    if packed and hasattr(network, "peft_config"):
        refuse_beside_packed(network, "model: ")


def adopt(lent: ModelObject) -> tuple[CausalLM, Any]:
    """A loaded model as it is; of a PEFT model the base with the adapter in it. Other modules stand
    in place of those of bitsandbytes, until `unchanged` ends."""
    network = lent.network
    refuse_lent(network)
    if hasattr(network, "get_base_model"):
        network = network.get_base_model()
    pack(network)
    if hasattr(network.config, "_experts_implementation"):
        network.config._experts_implementation = "eager"
    return CausalLM(network), lent.tokenizer


def object_fingerprint(lent: ModelObject) -> str:
    """Of the tokenizer, of the configurations, and of each parameter its name, type, sum and first
    4,096 numbers."""
    digest = hashlib.blake2b(digest_size=16)
    tokenizer, network = lent.tokenizer, lent.network
    backend = getattr(tokenizer, "backend_tokenizer", None)
    digest.update((backend.to_str() if backend else repr(tokenizer)).encode())
    digest.update(str(getattr(tokenizer, "chat_template", None)).encode())
    for config in configurations(network):
        digest.update(json.dumps(config, sort_keys=True, default=plain).encode())
    for name, values in values_of(network):
        numbers = values.flatten()[:4096].double().cpu().numpy().tobytes()
        total = float(values.sum(dtype=torch.float64))
        digest.update(f"{name} {values.dtype} {tuple(values.shape)} {total!r}".encode() + numbers)
    return digest.hexdigest()


def configurations(network: Any) -> Iterator[Mapping[str, Any]]:
    """Of a network and of its adapters, in a form that does not depend on how it was loaded."""
    config: Any = getattr(network, "config", None)
    values: Mapping[str, Any] = config.to_dict() if hasattr(config, "to_dict") else {}
    yield {name: value for name, value in values.items() if not name.startswith("_")}
    for name, adapter in sorted(getattr(network, "peft_config", {}).items()):
        active = name in getattr(network, "active_adapters", [name])
        yield {**adapter.to_dict(), "name": name, "active": active}


def plain(value: Any) -> Any:
    """For JSON: a set is a list, whose order is the same everywhere."""
    return sorted(value) if isinstance(value, set) else str(value)


def model_fingerprint(name: str) -> str:
    """Of the configuration, the tokenizer and its chat templates, and of the first and last
    megabyte of each file of weights; of a hub id, its name."""
    if is_object(name):
        return object_fingerprint(object_at(name))
    path, digest = Path(name), hashlib.blake2b(digest_size=16)
    if not path.exists():
        return f"hub:{name}"
    files = [path]
    if path.is_dir():
        inside = [*path.iterdir(), *path.glob("additional_chat_templates/*")]
        files = sorted(file for file in inside if file.suffix in PRINTED and file.is_file())
    for file in files:
        size = file.stat().st_size
        digest.update(f"{file.name}\0{size}\0".encode())
        with file.open("rb") as stream:
            if file.suffix in WEIGHTS:
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


def load_model(
    config: ModelOptions, layers: str, progress: Progress, rows: Iterable[Example] = ()
) -> LoadedModel:
    """The adapter is merged, or kept apart where `layers` is adapter. A merged one is compared with
    PEFT's model on the first few of `rows`. Raises what `load` and `load_adapter` raise."""
    adapter = Path(config.adapter) if config.adapter and not is_object(config.adapter) else None
    if adapter and not adapter.is_dir():
        raise no_adapter(adapter)
    warnings: list[str] = []
    with progress.task(f"loading {config.model}", None):
        if is_object(config.model):
            model, tokenizer = adopt(object_at(str(config.model)))
        else:
            model, tokenizer = load_base(config, layers, adapter, progress)
        encoder = encoder_of(config, model, tokenizer, bounded=not adapter)
        if adapter:
            progress.say(f"adapter {adapter}, with {whose_tokenizer(adapter)}")
            model = load_adapter(
                model.network,
                adapter,
                merge=layers != "adapter",
                rows=tokens_of(encoder, rows, model.device),
                say=warnings.append,
            )
            encoder = encoder_of(config, model, tokenizer)
    for line in warnings:
        progress.say(line)
    if entry := quantised_entry(model.network):
        progress.say(
            f"{entry['matrices']} matrices in {entry['bits']} bits, {entry['numbers']:,} of "
            f"{model.size:,} numbers: scores are those of the model that they unpack to"
        )
    if config.template_date and not encoder.date.day:
        progress.say(f"--template-date {config.template_date}: the template shows no date")
    elif encoder.date.day:
        progress.say(f"the template's date is {encoder.date.day} (--template-date)")
    progress.say(
        f"{type(model.network).__name__} in {str(model.dtype).removeprefix('torch.')} on "
        f"{devices_in_words(model)}, template {encoder.template}, "
        f"at most {encoder.max_length} tokens a row"
    )
    return LoadedModel(model, encoder, warnings)


def load_base(
    config: ModelOptions, layers: str, adapter: Path | None, progress: Progress
) -> tuple[CausalLM, Any]:
    """Raises BadModel, which names the adapter where that has named the model."""
    name = str(config.model)
    try:
        device = resolve_device(config.device)
        spread = spread_of(config, layers, progress) if config.device_map == "auto" else None
        return load(name, config.dtype, device, adapter, config.quantize, spread)
    except BadModel as error:
        if adapter and named_base(adapter) == name and not Path(name).exists():
            raise BadModel(
                f"adapter {adapter}: its base {name} cannot be loaded ({error}); give --model BASE "
                f"--adapter {adapter}"
            ) from error
        raise


def encoder_of(
    config: ModelOptions, model: CausalLM, tokenizer: Any, bounded: bool = True
) -> Encoder:
    """Rows are cut to --max-length, or to what the model takes. Where it is `bounded`, a token that
    the model does not have is refused."""
    longest = longest_row(model.network.config) or config.max_length
    return Encoder(
        tokenizer,
        config.template,
        min(config.max_length, longest),
        model.vocabulary if bounded else None,
        config.skip_end,
        config.template_date,
    )


def longest_row(config: Any) -> int | None:
    """The most tokens that the model takes; of a model for images and texts, its text model."""
    text = config.get_text_config(decoder=True) if hasattr(config, "get_text_config") else config
    for part in (text, config):
        for name in LIMITS:
            limit = getattr(part, name, None)
            if isinstance(limit, int) and limit > 0:
                return limit
    return None


def tokens_of(encoder: Encoder, rows: Iterable[Example], device: torch.device) -> list[Tensor]:
    """The last tokens of a few rows, which may have tokens that are new to the model."""
    tokens = list[Tensor]()
    for row in islice(rows, PROBED_ROWS):
        with suppress(BadRow, BadModel):
            tokens.append(torch.tensor(encoder.encode(row).tokens[-PROBE:], device=device))
    return tokens


def devices_in_words(model: CausalLM) -> str:
    sizes = bytes_by_device(model.network)
    if len(sizes) == 1:
        return str(model.device)
    return ", ".join(f"{device} ({size / 1e9:.1f} GB)" for device, size in sizes.items())


def whose_tokenizer(adapter: Path) -> str:
    if has_tokenizer(adapter):
        return "its own tokenizer"
    own = (adapter / "chat_template.jinja").is_file()
    return "its own chat template" if own else "the model's tokenizer"
