"""Without weights: a network from its configuration alone, on torch's meta device, where tensors
have shapes and no numbers.

    config.json → network        adapter_config.json → the adapter's parameters in it

Choices made here:
- nothing is downloaded, and no code from the folder runs;
- the precision is that of --dtype, of the configuration, or else float32;
- an adapter that would be merged changes no shape, and is left out.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from prism_select.models.adapters import has_tokenizer, no_adapter, no_peft, refuse_kind
from prism_select.models.causal_lm import CausalLM
from prism_select.models.loading import quantised_to, tokenizer_of
from prism_select.models.placement import network_of
from prism_select.models.quantised import pack_shapes
from prism_select.run.config import ModelOptions
from prism_select.run.errors import BadModel, PrismError

__all__ = ["config_alone", "network_of", "shapes_of", "with_adapter_shapes"]

WEIGHTS = ("*.safetensors", "*.gguf", "*.bin", "*.pt", "*.pth")


def config_alone(name: str) -> bool:
    """Whether this is a folder with a configuration and without weights of any kind."""
    folder = Path(name)
    has_weights = any(True for pattern in WEIGHTS for _ in folder.glob(pattern))
    return (folder / "config.json").is_file() and not has_weights


def shapes_of(config: ModelOptions, layers: str) -> tuple[CausalLM, Any | None]:
    """The model of a folder, and its tokenizer where there is one. Raises BadModel for a
    configuration, an adapter or a tokenizer that cannot be read."""
    import transformers

    transformers.logging.set_verbosity_error()
    folder, adapter = Path(str(config.model)), Path(config.adapter) if config.adapter else None
    if adapter and not adapter.is_dir():
        raise no_adapter(adapter)
    common: dict[str, Any] = {"trust_remote_code": False}
    advice = "give the folder of a model that transformers can load"
    with _reading(f"--model {folder}: no weights, and no plan from its config.json", advice):
        described = transformers.AutoConfig.from_pretrained(str(folder), **common)
        bits = quantised_to(str(folder), described, config.quantize)
        network = network_of(described, config.dtype, config.device == "cpu")
        if bits:
            pack_shapes(network, bits)
        tokenizer = None
        if has_tokenizer(folder) or (adapter and has_tokenizer(adapter)):
            tokenizer = tokenizer_of(str(folder), adapter, common)
    if adapter and layers == "adapter":
        network = _with_adapter(network, adapter)
    return CausalLM(network), tokenizer


def with_adapter_shapes(network: Any, described: Any) -> Any:
    """The network with the parameters of PEFT's configuration, in the network's dtype."""
    import peft

    with torch.device("meta"):
        adapted = peft.get_peft_model(network, described, autocast_adapter_dtype=False)
    for parameter in adapted.parameters():
        parameter.data = parameter.data.to(network.dtype)
    return adapted.get_base_model()


def _with_adapter(network: Any, folder: Path) -> Any:
    try:
        import peft
    except ImportError:
        raise no_peft() from None
    with _reading(f"adapter {folder}: it does not fit this model", "give the one it was made for"):
        described = peft.PeftConfig.from_pretrained(str(folder))
        refuse_kind(f"adapter {folder}", described)
        return with_adapter_shapes(network, described)


@contextmanager
def _reading(what: str, advice: str) -> Iterator[None]:
    """Raises BadModel for an error of any kind: files may hold anything."""
    try:
        yield
    except PrismError:
        raise
    except Exception as error:
        why = " ".join(str(error).split())[:200] or type(error).__name__
        raise BadModel(f"{what} ({why}); {advice}") from error
