"""Gradient norms against autograd's, one example at a time."""

import pytest
import torch
import transformers
from test_engines import ARCHITECTURES, V, network_of, target_of
from tiny import Tiny, batch_of
from torch import Tensor, nn

from prism_select.core.engines import reverse
from prism_select.core.gradients import differentiable
from prism_select.core.layers import Parameters
from prism_select.core.likelihood import Batch, LanguageModel, backward
from prism_select.models.causal_lm import CausalLM
from prism_select.models.layer_selection import select_parameters
from prism_select.scoring.gradient_norms import outer_squares, with_norms


def autograds(model: LanguageModel, weights: Parameters, batch: Batch) -> Tensor:
    """The slow way, in float64."""
    found = []
    for place in range(len(batch)):
        with differentiable(weights):
            backward(model, batch.rows(slice(place, place + 1)), torch.ones(1))
            squares = [
                w.grad.double().square().sum() for w in weights.values() if w.grad is not None
            ]
            found.append(torch.stack(squares).sum().sqrt())
    return torch.stack(found)


def apart(found: Tensor, exact: Tensor) -> float:
    return float(((found - exact) / exact).abs().max())


@pytest.mark.parametrize("chunk", [2**20, 61, 3 * 61, 7 * 61])
@pytest.mark.parametrize(
    "layers", ["all", "late", r"head|words|before|between", "words", r"head\.weight"]
)
@pytest.mark.parametrize("tied", [True, False])
def test_the_norms_are_autograds_to_rounding(
    tied: bool, layers: str, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("prism_select.core.likelihood.HEAD_LOGITS", chunk)
    model = Tiny(tied=tied)
    if tied and layers == r"head\.weight":
        layers = "words"
    weights = select_parameters(model.network, layers)
    for time, left in ((14, False), (14, True), (31, False)):
        batch = batch_of(7, time, seed=3, left=left)
        assert (
            apart(with_norms(model, weights, [])(batch)[1], autograds(model, weights, batch))
            < 1e-10
        )


@pytest.mark.parametrize("layers", ["all", "late"])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_norms_are_autograds_on_every_architecture(
    name: str, layers: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = network_of(name)
    weights = select_parameters(model.network, layers)
    batch, directions = batch_of(9, 16, seed=9, vocabulary=V), [target_of(model, weights).direction]
    plain, exact = reverse(model, weights, directions)(batch), autograds(model, weights, batch)
    scores, norms = with_norms(model, weights, directions)(batch)
    assert apart(norms, exact) < 1e-4
    assert torch.equal(scores.values, plain.values) and torch.equal(scores.loglik, plain.loglik)
    assert not any(module._forward_hooks for module in model.network.modules())
    monkeypatch.setattr("prism_select.core.likelihood.HEAD_LOGITS", 5 * V)
    left = batch_of(9, 16, seed=9, left=True, vocabulary=V)
    assert apart(with_norms(model, weights, [])(left)[1], exact) < 1e-4


@pytest.mark.parametrize("name", ["llama", "llama, tied", "gemma3", "gpt2", "opt"])
def test_usual_networks_need_formulas_alone(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = network_of(name)
    weights = select_parameters(model.network, "all")
    monkeypatch.setattr("prism_select.scoring.gradient_norms.differentiable", None)
    with_norms(model, weights, [])(batch_of(5, 16, seed=9, vocabulary=V))


def test_a_parameter_counts_with_all_of_its_uses() -> None:
    model, batch = Tiny(), batch_of(5)
    blocks = model.network.body.blocks
    blocks[1].before, blocks[1].down.bias = blocks[0].before, blocks[0].down.bias  # type: ignore[union-attr]
    weights = select_parameters(model.network, "all")
    assert apart(with_norms(model, weights, [])(batch)[1], autograds(model, weights, batch)) < 1e-10
    blocks[1].up = blocks[0].up
    weights = select_parameters(model.network, "all")
    assert apart(with_norms(model, weights, [])(batch)[1], autograds(model, weights, batch)) < 1e-10
    assert not any(module._forward_hooks for module in model.network.modules())


class Mixing(nn.Module):
    """A module with a matrix and a vector of its own beside a child's, neither in a known
    formula."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.matrix, self.gains = nn.Parameter(torch.rand(width, 200)), nn.Parameter(torch.rand(3))
        self.inner = nn.Linear(200, width)

    def forward(self, x: Tensor) -> Tensor:
        moved: Tensor = self.inner((x @ self.matrix).tanh()) * self.gains.prod()
        return moved


def test_parameters_without_a_formula_count_by_the_definition() -> None:
    model, batch = Tiny(), batch_of(6)
    torch.manual_seed(1)
    model.network.body.blocks[2].out = Mixing(16).double().requires_grad_(False)
    weights = select_parameters(model.network, r"blocks\.2\.out")
    directions = [{name: torch.ones_like(weight) for name, weight in weights.items()}]
    assert len(weights) == 4
    scores, norms = with_norms(model, weights, directions)(batch)
    assert torch.equal(scores.values, reverse(model, weights, directions)(batch).values)
    assert apart(norms, autograds(model, weights, batch)) < 1e-10


@pytest.mark.parametrize("name", ["llama", "llama, tied", "gemma3"])
def test_a_padding_word_in_the_text_counts_as_torch_counts_it(name: str) -> None:
    model, batch = network_of(name), batch_of(6, 16, vocabulary=V)
    batch.tokens[:, 2:5] = 0
    weights = select_parameters(model.network, "all")
    assert apart(with_norms(model, weights, [])(batch)[1], autograds(model, weights, batch)) < 1e-4


@pytest.mark.parametrize("name", ["gemma3", "gpt2", "mixtral"])
def test_the_norms_are_autograds_in_bfloat16(name: str) -> None:
    torch.manual_seed(0)
    low = transformers.AutoModelForCausalLM.from_config(ARCHITECTURES[name]())
    low.load_state_dict(network_of(name).network.state_dict())
    model, batch = CausalLM(low.bfloat16()), batch_of(16, 16, seed=5, vocabulary=V)
    weights = select_parameters(model.network, "all")
    assert apart(with_norms(model, weights, [])(batch)[1], autograds(model, weights, batch)) < 5e-3


@pytest.mark.parametrize("size", [1e-4, 300.0])
@pytest.mark.parametrize("time", [3, 40])
def test_squares_leave_the_range_of_float16_and_are_right_all_the_same(
    size: float, time: int
) -> None:
    draw = torch.Generator().manual_seed(0)
    left, right = ((torch.randn(2, time, 16, generator=draw) * size).half() for _ in range(2))
    expected = torch.stack(
        [(a.double().T @ b.double()).square().sum() for a, b in zip(left, right, strict=True)]
    )
    assert torch.allclose(outer_squares(left, right).double(), expected, rtol=1e-3)
