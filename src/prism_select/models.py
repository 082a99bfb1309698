"""Models: load a causal language model, freeze it, and split it into body and head.

    hidden(batch)  -> states      the network's decoder, positions given explicitly
    logits(states) -> logits      the network's own forward from the last hidden state on: head, bias, scaling, capping

Choices made here: safetensors or GGUF only, never pickle, never code from the model's folder; evaluation mode, all
weights frozen; fused experts run one by one, since that form has a forward-mode derivative; the split is proved on
three tokens when a model is wrapped.
"""

import hashlib
import inspect
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from safetensors import SafetensorError
from torch import Tensor, nn

from prism_select.blocks import decoder_of
from prism_select.core.likelihood import Batch
from prism_select.errors import BadModel, BadOption

__all__ = ["CausalLM", "fingerprint", "load", "resolve_device", "weights_of"]


class CausalLM:
    """A Hugging Face causal language model as the core sees it."""

    def __init__(self, network: Any) -> None:
        self.network: nn.Module = network.eval().requires_grad_(False)
        self.body: nn.Module = decoder_of(network)[1]
        if self.body is network:
            raise BadModel(f"{type(network).__name__}: its body and head are one; try another architecture")
        self.vocabulary: int = network.get_output_embeddings().weight.shape[0]
        self._takes_positions = "position_ids" in inspect.signature(self.body.forward).parameters
        self._prove_split()

    @property
    def device(self) -> torch.device:
        return next(self.network.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        return next(self.network.parameters()).dtype

    def hidden(self, batch: Batch) -> Float[Tensor, "batch time width"]:
        positions = {"position_ids": batch.positions} if self._takes_positions else {}
        output = self.body(
            input_ids=batch.tokens, attention_mask=batch.real.long(), use_cache=False, return_dict=True, **positions
        )
        states: Tensor = output.last_hidden_state
        return states

    def logits(self, hidden: Float[Tensor, "rows width"]) -> Float[Tensor, "rows vocabulary"]:
        start = torch.zeros(1, 1, dtype=torch.long, device=hidden.device)
        with _answering(self.body, hidden[None]):
            logits: Tensor = self.network(input_ids=start, use_cache=False, return_dict=True).logits[0]
        return logits

    @torch.no_grad()
    def _prove_split(self) -> None:
        tokens = torch.tensor([[0, 1, 2]], device=self.device) % self.vocabulary
        every = torch.ones_like(tokens, dtype=torch.bool)
        whole = self.network(input_ids=tokens, attention_mask=every.long(), use_cache=False).logits[0]
        split = self.logits(self.hidden(Batch(tokens, every, every))[0])
        if whole.isfinite().all() and not torch.allclose(whole, split, rtol=1e-2, atol=1e-2):
            name = type(self.network).__name__
            raise BadModel(f"{name}: its output head cannot be run apart from its body; try another architecture")


class _Answer:
    """What a body returns, with nothing but the last hidden state in it."""

    def __init__(self, hidden: Tensor) -> None:
        self.last_hidden_state = hidden

    def __getitem__(self, place: int) -> Tensor | None:
        return self.last_hidden_state if place == 0 else None

    def __getattr__(self, name: str) -> None:
        return None


@contextmanager
def _answering(body: nn.Module, hidden: Tensor) -> Iterator[None]:
    """While open, `body` returns `hidden` without computing anything."""
    before = body.__dict__.get("forward")
    body.forward = lambda *args, **named: _Answer(hidden)
    try:
        yield
    finally:
        del body.forward
        if before is not None:
            body.forward = before


def resolve_device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError) as error:
        raise BadOption(f"--device {name}: {str(error).splitlines()[0]}; try cpu") from None
    if device.type == "mps":
        raise BadOption(f"--device {name}: scores add up in double precision, which it lacks; try cpu")
    return device


def weights_of(name: str) -> str | None:
    """The GGUF file to load, or None for safetensors or a hub id. Raises BadModel for a path with neither file."""
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
    found = f"only {pickled[0].name}, a pickle, which is never read" if pickled else "no weights"
    raise BadModel(f"--model {folder}: {found}; save it with save_pretrained(folder), which writes model.safetensors")


def refuse_unreachable(name: str) -> None:
    """Raises BadModel at once where a hub model is not here and the hub cannot be asked: the hub's client would go on
    trying for a minute."""
    from huggingface_hub import HfApi, try_to_load_from_cache

    try:
        if not isinstance(try_to_load_from_cache(name, "config.json"), str):
            HfApi().model_info(name, timeout=10)
    except Exception as error:  # of whichever HTTP library; what else there is to say comes later, from transformers
        if type(error).__name__ in ("ConnectError", "ConnectTimeout", "ConnectionError", "OfflineModeIsEnabled"):
            why = "no such folder here, and the hub cannot be reached"
            raise BadModel(f"--model {name}: {why}; check the path, or the network") from error


def load(name: str, dtype: str, device: torch.device) -> tuple[CausalLM, Any]:
    """The model and its tokenizer. Raises BadModel, in one line, whatever is wrong with the folder."""
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    logging.getLogger("transformers").setLevel(logging.ERROR)
    path, packed = Path(name), weights_of(name)
    if path.exists():
        path = path.parent if path.is_file() else path
    else:
        refuse_unreachable(name)
    source = str(path) if path.exists() else name
    options: dict[str, Any] = {"gguf_file": packed} if packed else {"use_safetensors": True}
    precision: Any = "auto" if dtype == "auto" else getattr(torch, dtype)
    if packed:
        options["quantization_config"] = transformers.GgufConfig(dequantize=True)
        precision = torch.bfloat16 if dtype == "auto" else precision
    plain: dict[str, Any] = {"trust_remote_code": False, **({"gguf_file": packed} if packed else {})}
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(source, **plain)
        config = transformers.AutoConfig.from_pretrained(source, **plain)
        config._experts_implementation = "eager"
        network, told = transformers.AutoModelForCausalLM.from_pretrained(
            source, config=config, dtype=precision, output_loading_info=True, trust_remote_code=False, **options
        )
    except (OSError, ValueError, KeyError, ImportError, RuntimeError, SafetensorError) as error:
        reason = " ".join(str(error).split())[:300]
        raise BadModel(f"--model {name}: {reason or type(error).__name__}; check the folder or the hub id") from error
    if missing := sorted(told["missing_keys"]):
        raise BadModel(
            f"--model {name}: its files hold no {missing[0]} ({len(missing)} weights are missing and would be random); "
            "save the whole model with save_pretrained(folder)"
        )
    if dtype == "auto" and network.dtype == torch.float16 and device.type == "cpu":
        network = network.float()
    return CausalLM(network.to(device)), tokenizer


def fingerprint(name: str) -> str:
    """Of the configuration, and of the first and last megabyte of each file of weights; a hub id counts by its name."""
    path, whole = Path(name), hashlib.blake2b(digest_size=16)
    if not path.exists():
        return f"hub:{name}"
    files = (
        [path]
        if path.is_file()
        else sorted(p for p in path.iterdir() if p.suffix in (".json", ".safetensors", ".gguf"))
    )
    for file in files:
        size = file.stat().st_size
        whole.update(f"{file.name}\0{size}\0".encode())
        with file.open("rb") as stream:
            whole.update(stream.read(2**20))
            stream.seek(max(0, size - 2**20))
            whole.update(stream.read())
    return whole.hexdigest()
