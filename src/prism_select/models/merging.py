"""Merging: an adapter into the weights of its model, proved by their logits.

    PEFT's model → logits        merged model → the same logits        or the adapter stays apart

    ‖after − before‖ / ‖before‖, mean over tokens, ≤ √ε      ε: rounding of the model's dtype

Choices made here:
- a weight that two modules share (tied embeddings, repeated layers) is merged for neither: one
  change would move both;
- what is linear in the weights (LoRA) is then kept apart: gradients of the base's weights are those
  of the sum; of other kinds they are not, so these are refused;
- LoRA of matrices in few bits is merged in factors beside them (core/packed.py);
- mean over tokens: in low precision rounding may send a few tokens to other experts.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from prism_select.core.packed import PackedLinear
from prism_select.models.causal_lm import CausalLM
from prism_select.models.devices import connect
from prism_select.models.quantised import packed_matrices
from prism_select.run.errors import BadModel

__all__ = ["apart", "merged", "random_tokens", "refuse_beside_packed"]

FLOAT32 = torch.finfo(torch.float32).eps  # PEFT computes no finer
PROBE = 16  # tokens of each sequence that logits are compared on: large vocabularies take memory
APART = "gradients are those of the model's weights, or with --layers adapter of the adapter's"


def merged(adapted: Any, rows: Sequence[Tensor], say: Callable[[str], None]) -> CausalLM:
    """The model with the adapter in its weights, or apart where merging is known to change it.
    Raises BadModel where merging fails or changes the logits on `rows`."""
    refuse_beside_packed(adapted)
    if reason := why_apart(adapted):
        if not is_linear(adapted):
            raise BadModel(
                f"it cannot be merged, since {reason}; give --layers adapter, or untie the weights "
                "and train again"
            )
        model = apart(adapted, rows)
        say(f"the adapter is kept apart, since {reason}; {APART}")
        return model
    before = logits(adapted, rows)
    try:
        add_to_packed(adapted)
        network: Any = adapted.merge_and_unload()
    except (RuntimeError, ValueError, NotImplementedError, AttributeError) as error:
        why = " ".join(str(error).split())[:200]
        raise BadModel(f"PEFT cannot merge it ({why}); give --layers adapter") from error
    refuse_other_logits(network, rows, before, "merged into the weights")
    return CausalLM(network)


def apart(adapted: Any, rows: Sequence[Tensor]) -> CausalLM:
    """The base model with the adapter's modules in it. Raises BadModel where it is not PEFT's
    model: where the adapter is more than these modules."""
    refuse_beside_packed(adapted)
    before = logits(adapted, rows)
    network = adapted.get_base_model()
    refuse_other_logits(network, rows, before, "without PEFT's own model around it")
    return CausalLM(network)


def refuse_beside_packed(adapted: Any, owner: str = "") -> None:
    """Raises BadModel for an adapter that reads or replaces matrices in few bits."""
    if not packed_matrices(adapted):
        return
    saved = [
        name
        for name, module in adapted.named_modules()
        if hasattr(module, "original_module") and packed_matrices(module)
    ]
    if saved or not is_linear(adapted):
        kind = f"it has {saved[0]} saved whole" if saved else "it is not LoRA, or has DoRA"
        raise BadModel(
            f"{owner}{kind}, and the model's matrices are in few bits; give the model in full "
            "precision"
        )


def add_to_packed(adapted: Any) -> None:
    """Merges LoRA of matrices in few bits: its factors are added whenever one is unpacked."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    network = adapted.get_base_model()
    for name, layer in list(network.named_modules()):
        base = layer.get_base_layer() if isinstance(layer, BaseTunerLayer) else None
        if not isinstance(base, PackedLinear):
            continue
        for adapter in layer.active_adapters:
            if adapter not in layer.lora_A:
                continue
            left, right = layer.lora_B[adapter], layer.lora_A[adapter].weight
            base.add(
                (layer.scaling[adapter] * left.weight).detach().float(), right.detach().float()
            )
            if left.bias is not None:
                base.bias.data += (layer.scaling[adapter] * left.bias).to(base.bias)
        network.set_submodule(name, base)


def refuse_other_logits(
    network: nn.Module, rows: Sequence[Tensor], before: Sequence[Tensor], how: str
) -> None:
    after = logits(network, rows)
    differences = [
        (b - a).norm(dim=-1) / a.norm(dim=-1) for a, b in zip(before, after, strict=True)
    ]
    off = float(torch.cat(differences).mean())
    rounding = max(torch.finfo(next(network.parameters()).dtype).eps, FLOAT32)
    if not off <= rounding**0.5:
        raise BadModel(
            f"{how}, the model's logits differ by {off:.1%} from those of PEFT's model; give "
            "--layers adapter, or save the model merged by what trained it"
        )


@torch.no_grad()
def logits(network: Any, rows: Sequence[Tensor]) -> list[Tensor]:
    """Of each row, without its mean over the vocabulary, which no probability depends on."""
    connect(network.eval())
    outputs = [network(input_ids=tokens[None], use_cache=False).logits[0] for tokens in rows]
    return [values.float() - values.float().mean(-1, keepdim=True) for values in outputs]


def random_tokens(network: Any) -> list[Tensor]:
    """Random tokens, and the last of the vocabulary, where new ones are."""
    vocabulary = int(network.get_output_embeddings().weight.shape[0])
    draw = torch.Generator().manual_seed(0)
    device = network.get_input_embeddings().weight.device
    random = torch.randint(vocabulary, (PROBE,), generator=draw)
    last = torch.arange(max(0, vocabulary - PROBE), vocabulary)
    return [random.to(device), last.to(device)]


def is_linear(adapted: Any) -> bool:
    """Whether the adapter adds something to the weights that does not depend on them."""
    configs = adapted.peft_config.values()
    return all(c.peft_type == "LORA" and not c.use_dora for c in configs)


def why_apart(adapted: Any) -> str:
    """Why merging would change what the model computes; empty where no reason is known."""
    from peft.tuners.trainable_tokens.layer import TrainableTokensLayer
    from peft.tuners.tuners_utils import BaseTunerLayer

    holders: dict[int, list[nn.Module]] = {}
    for module in adapted.modules():
        for parameter in module._parameters.values():
            if parameter is not None:
                holders.setdefault(id(parameter), []).append(module)
    moved: dict[int, str] = {}  # base modules that merging changes, by their path
    of_tokens = set[int]()
    for path, layer in adapted.named_modules():
        if not isinstance(layer, BaseTunerLayer):
            continue
        base = layer.get_base_layer()
        moved[id(base)] = path.removeprefix("base_model.model.")
        if isinstance(layer, TrainableTokensLayer):
            of_tokens.add(id(base))
        biased = any(getattr(layer, "lora_bias", {}).get(name) for name in layer.active_adapters)
        if biased and getattr(base, "bias", None) is None:
            return f"it has a bias (lora_bias) for {moved[id(base)]}, which has none"
    for modules in holders.values():
        names = [moved[id(module)] for module in modules if id(module) in moved]
        both_by_tokens = all(id(module) in of_tokens for module in modules)
        if len(modules) > 1 and names and not both_by_tokens:
            return f"{names[0]} shares its weight with another module"
    return ""
