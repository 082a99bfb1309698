"""Adapters: what is exported is what stock PEFT loads, and an adapter on a model counts like any
other weight."""

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from conftest import random_adapter
from peft import LoraConfig, PeftModel
from test_engines import SMALL, V, network_of, target_of
from tiny import Tiny, batch_of, pairs_of

from prism_select.core.check import disagreement
from prism_select.core.engines import difference, forward, reference, reverse
from prism_select.core.gradients import norm
from prism_select.core.layers import Direction
from prism_select.core.likelihood import mean_logliks
from prism_select.directions.lora import save_adapter
from prism_select.directions.low_rank import matrix_owners, truncated
from prism_select.models.adapters import load_adapter
from prism_select.models.causal_lm import CausalLM
from prism_select.models.layer_selection import select_parameters
from prism_select.run.errors import BadModel, BadOption, PrismError, UnknownLayers

ONE = LoraConfig(
    r=3, lora_alpha=6, lora_dropout=0.5, target_modules="all-linear", task_type="CAUSAL_LM"
)


def copy_of(name: str) -> CausalLM:
    return deepcopy(network_of(name))


def direction_of(model: CausalLM) -> Direction:
    return target_of(model, select_parameters(model.network, "all")).direction


def gain(model: CausalLM) -> float:
    """J of `prism` over the pairs of `target_of`, written out again."""
    means = []
    for side in pairs_of(6, vocabulary=V):
        values = torch.cat([mean_logliks(model, batch) for batch in side.batches])
        means.append(torch.empty_like(values).index_copy_(0, torch.tensor(side.order), values))
    return float(torch.nn.functional.softplus(means[0] - means[1]).mean())


def trained(folder: Path, name: str = "llama", config: LoraConfig = ONE) -> Path:
    config = replace(config, fan_in_fan_out=name == "gpt2")
    return random_adapter(folder, copy_of(name).network, config)


@contextmanager
def scaled(adapted: Any, scale: float) -> Iterator[None]:
    layers = [module for module in adapted.modules() if hasattr(module, "set_scale")]
    for layer in layers:
        layer.set_scale("default", scale)
    yield
    for layer in layers:
        layer.set_scale("default", 1.0)


@pytest.mark.parametrize("name", ["llama", "llama, tied", "gpt2", "gemma3"])
def test_the_exported_direction_moves_the_gain_in_stock_peft_as_its_length_says(
    name: str, tmp_path: Path
) -> None:
    model, rank = copy_of(name), 4
    direction = direction_of(model)
    shares = save_adapter(model.network, direction, rank, tmp_path)
    matrices = {n: truncated(direction[n], rank) for n in matrix_owners(model.network, direction)}
    length = norm({n: left @ right for n, (left, right) in matrices.items()})
    assert shares.total == pytest.approx((length / norm(direction)) ** 2, rel=1e-5)
    left_out = {n for n, share in shares.by_weight.items() if not share}
    assert left_out == direction.keys() - matrices.keys()
    adapted = PeftModel.from_pretrained(deepcopy(model.network), tmp_path)
    here = CausalLM(adapted)
    before, eps = gain(model), 1e-2
    for sign in (1, -1):
        with scaled(adapted, sign * eps):
            assert (gain(here) - before) == pytest.approx(sign * eps * length, rel=0.1)
    with scaled(adapted, 1.0):
        merged: Any = adapted.merge_and_unload()
    moved = {
        n: w - model.network.get_parameter(n) for n, w in merged.named_parameters() if n in matrices
    }
    for n, (left, right) in matrices.items():
        assert torch.allclose(moved[n], left @ right / length, atol=1e-6), n
    assert all(
        torch.equal(w, model.network.get_parameter(n))
        for n, w in merged.named_parameters()
        if n not in matrices
    )


def test_a_rank_above_a_matrixs_own_exports_all_of_it(tmp_path: Path) -> None:
    model = copy_of("llama")
    weights = select_parameters(model.network, r"layers\.3\.")
    direction = target_of(model, weights).direction
    shares = save_adapter(model.network, direction, 64, tmp_path)
    assert shares.by_weight["model.layers.3.mlp.up_proj.weight"] == pytest.approx(1, abs=1e-6)
    assert shares.by_weight["model.layers.3.input_layernorm.weight"] == 0
    targets = json.loads((tmp_path / "adapter_config.json").read_text())["target_modules"]
    assert len(targets) == 7 and all(name.startswith("model.layers.3.") for name in targets)
    load_adapter(model.network, tmp_path, merge=True)


def test_a_direction_without_matrices_and_a_model_with_an_adapter_export_nothing(
    tmp_path: Path,
) -> None:
    model = copy_of("llama")
    norms = {n: torch.ones_like(w) for n, w in select_parameters(model.network, "norm").items()}
    with pytest.raises(BadOption, match="no matrix is selected that LoRA could move"):
        save_adapter(model.network, norms, 4, tmp_path / "out")
    load_adapter(model.network, trained(tmp_path / "in"), merge=False)
    with pytest.raises(BadOption, match="has an adapter already"):
        save_adapter(model.network, direction_of(model), 4, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma3"])
def test_an_adapter_apart_and_one_merged_are_the_same_model_and_frozen(
    name: str, tmp_path: Path
) -> None:
    folder, batch = trained(tmp_path, name), batch_of(6, 16, vocabulary=V)
    plain, stock = copy_of(name), PeftModel.from_pretrained(copy_of(name).network, tmp_path)
    merged, apart = (load_adapter(copy_of(name).network, folder, merge) for merge in (True, False))
    exact = mean_logliks(CausalLM(stock), batch)
    assert torch.allclose(mean_logliks(merged, batch), exact, atol=1e-5)
    assert torch.equal(mean_logliks(apart, batch), exact)
    assert not torch.allclose(mean_logliks(plain, batch), exact, atol=1e-2)
    assert merged.network.state_dict().keys() == plain.network.state_dict().keys()
    for model in (merged, apart):
        assert not any(weight.requires_grad for weight in model.network.parameters())
        assert not any(module.training for module in model.network.modules())


def test_an_adapter_apart_has_the_models_dtype(tmp_path: Path) -> None:
    model = load_adapter(copy_of("llama").network.bfloat16(), trained(tmp_path), merge=False)
    assert {weight.dtype for weight in model.network.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("wrapped", [False, True])
@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma3"])
def test_engines_agree_on_the_adapter_and_with_a_loop_of_autograd(
    name: str, wrapped: bool, tmp_path: Path
) -> None:
    folder, batch = trained(tmp_path, name), batch_of(12, 16, seed=9, vocabulary=V)
    network = copy_of(name).network
    stock = CausalLM(PeftModel.from_pretrained(deepcopy(network), folder))
    model = stock if wrapped else load_adapter(network, folder, merge=False)
    weights = select_parameters(model.network, "adapter")
    assert weights.keys() == {
        n for n, _ in model.network.named_parameters() if ".lora_A." in n or ".lora_B." in n
    }
    target = target_of(model, weights)
    directions = [target.direction, target.chosen]
    exact = reference(model, weights, directions)(batch).values
    assert disagreement(reverse(model, weights, directions)(batch).values, exact) < 1e-4
    assert disagreement(forward(model, weights, directions)(batch).values, exact) < 1e-4
    assert disagreement(difference(model, weights, directions)(batch).values, exact) < 1e-2
    for weight in weights.values():
        weight.requires_grad_(True)
    for row in range(len(batch)):
        one = batch.rows(slice(row, row + 1))
        logits = model.network(input_ids=one.tokens[one.real][None]).logits[0, :-1].log_softmax(-1)
        counted = one.supervised[one.real][1:]
        loglik = logits[counted].gather(1, one.tokens[one.real][1:][counted][:, None]).sum()
        grads = torch.autograd.grad(loglik, list(weights.values()))
        score = sum(
            float((g * target.direction[n]).sum()) for n, g in zip(weights, grads, strict=True)
        )
        assert score == pytest.approx(
            float(exact[row, 0]), rel=1e-3, abs=1e-4 * float(exact.abs().max())
        )


def test_whole_modules_that_an_adapter_saves_count_with_it(tmp_path: Path) -> None:
    config = LoraConfig(
        r=2, target_modules=["q_proj"], modules_to_save=["lm_head"], task_type="CAUSAL_LM"
    )
    model = load_adapter(copy_of("llama").network, trained(tmp_path, config=config), merge=False)
    weights, batch = select_parameters(model.network, "adapter"), batch_of(5, 16, vocabulary=V)
    assert len(weights) == 4 * 2 + 1 and "lm_head.modules_to_save.default.weight" in weights
    direction = target_of(model, weights).direction
    exact = reference(model, weights, [direction])(batch).values
    assert disagreement(reverse(model, weights, [direction])(batch).values, exact) < 1e-4


def test_no_adapter_no_adapter_weights() -> None:
    with pytest.raises(
        UnknownLayers, match=r"--layers adapter: no weight matches; .* where --adapter puts it"
    ):
        select_parameters(Tiny().network, "adapter")


def refused(folder: Path, kind: type[PrismError], text: str, network: object = None) -> None:
    with pytest.raises(kind) as caught:
        load_adapter(network or copy_of("llama").network, folder, merge=True)
    assert text in str(caught.value) and "\n" not in str(caught.value) and "; " in str(caught.value)
    assert len(str(caught.value)) < 600


def test_a_folder_that_is_no_adapter_is_refused_in_one_line(tmp_path: Path) -> None:
    folder = trained(tmp_path / "good")
    refused(tmp_path / "none", BadOption, "no such folder")
    weights, config = folder / "adapter_model.safetensors", folder / "adapter_config.json"
    content, words = weights.read_bytes(), config.read_text()
    for text, why in (
        ("{", "cannot be read"),
        ("[]", "cannot be read"),
        ('{"peft_type": "PREFIX_TUNING"}', "it is PREFIX_TUNING"),
    ):
        config.write_text(text)
        refused(folder, BadModel, why)
    config.unlink()
    refused(folder, BadModel, "no adapter_config.json")
    config.write_text(words)
    weights.write_bytes(content[:-100])
    refused(folder, BadModel, "cannot be read")
    weights.rename(folder / "adapter_model.bin")
    refused(folder, BadModel, "only adapter_model.bin, a pickle")
    (folder / "adapter_model.bin").unlink()
    refused(folder, BadModel, "no adapter_model.safetensors")


def test_an_adapter_of_another_model_is_refused(tmp_path: Path) -> None:
    folder = trained(tmp_path / "wide")
    refused(folder, BadModel, "does not fit this model", copy_of("gpt2").network)  # no such modules
    narrow = transformers.LlamaForCausalLM(transformers.LlamaConfig(**{**SMALL, "hidden_size": 16}))
    refused(folder, BadModel, "size mismatch", narrow)
    for layers in ([0, 1], [0, 1, 2, 3]):  # more layers in the model, then in the adapter
        config = LoraConfig(
            r=2, target_modules=["q_proj"], layers_to_transform=layers, task_type="CAUSAL_LM"
        )
        folder = trained(tmp_path / f"layers{len(layers)}", config=config)
        words = json.loads((folder / "adapter_config.json").read_text())
        words["layers_to_transform"] = [0, 1, 2]
        (folder / "adapter_config.json").write_text(json.dumps(words))
        refused(folder, BadModel, "is in one of them alone")


def test_without_peft_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = trained(tmp_path)
    monkeypatch.setitem(sys.modules, "peft", None)
    refused(folder, BadOption, "its extra [train]")
