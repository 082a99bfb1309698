"""Sign, unit and scale: what the score promises, held to what training does."""

import pytest
import torch
from tiny import Tiny, batch_of, pairs_of

from prism_select.core.engines import reverse
from prism_select.core.gains import GAINS, slopes
from prism_select.core.gradients import adding_gradients, minus, norm, zero_sum
from prism_select.core.likelihood import backward, token_logliks
from prism_select.core.target_gradient import Side, Target, target_gradient
from prism_select.models.layer_selection import select_parameters
from prism_select.run.errors import UnknownLayers


def gain_of(model: Tiny, sides: tuple[Side, Side], weighting: str) -> float:
    """J, written out again from its definition."""
    means = [
        torch.cat([token_logliks(model, b).sum(1) / b.counts for b in sides[side].batches])
        for side in (0, 1)
    ]
    return float(GAINS[weighting](*means).mean())


def target_of(model: Tiny, sides: tuple[Side, Side], weighting: str = "prism") -> Target:
    return target_gradient(model, select_parameters(model.network, "all"), sides, weighting)


@pytest.mark.parametrize("weighting", GAINS)
def test_one_training_step_moves_the_gain_as_scored(weighting: str) -> None:
    model, sides, batch, rate = Tiny(), pairs_of(8), batch_of(64, seed=3), 1e-6
    weights = select_parameters(model.network, "all")
    predicted = reverse(model, weights, [target_of(model, sides, weighting).direction])(
        batch
    ).values[:, 0]
    before, moved = gain_of(model, sides, weighting), []
    for i in range(64):
        row = batch.rows(slice(i, i + 1))
        for weight in weights.values():
            weight.requires_grad_(True)
        backward(model, row, torch.ones(1, dtype=torch.float64))
        steps = {
            name: rate * weight.grad for name, weight in weights.items() if weight.grad is not None
        }
        with torch.no_grad():
            for weight in weights.values():
                weight.requires_grad_(False).grad = None
            for name, step in steps.items():
                weights[name].add_(step)
            moved.append((gain_of(model, sides, weighting) - before) / rate)
            for name, step in steps.items():
                weights[name].sub_(step)
    actual = torch.tensor(moved, dtype=torch.float64)
    assert torch.corrcoef(torch.stack([predicted, actual]))[0, 1] > 0.999
    clear = predicted.abs() > 0.01 * predicted.abs().max()
    assert torch.equal(predicted[clear].sign(), actual[clear].sign())
    assert float((predicted - actual).norm() / actual.norm()) < 1e-2


def test_swapping_chosen_and_rejected_under_uniform_negates_every_score_exactly() -> None:
    model, sides, batch = Tiny(), pairs_of(7), batch_of(20, seed=5)
    weights = select_parameters(model.network, "all")
    forth, back = (target_of(model, way, "uniform") for way in (sides, sides[::-1]))
    scores = [reverse(model, weights, [target.direction])(batch).values for target in (forth, back)]
    assert torch.equal(scores[0], -scores[1])
    assert torch.equal(forth.gap, -back.gap)


@pytest.mark.parametrize("weighting", GAINS)
def test_the_direction_is_the_gradient_of_the_gain(weighting: str) -> None:
    model, sides = Tiny(), pairs_of(6)
    weights = select_parameters(model.network, "all")
    for weight in weights.values():
        weight.requires_grad_(True)
    means = [
        torch.cat([token_logliks(model, b).sum(1) / b.counts for b in sides[side].batches])
        for side in (0, 1)
    ]
    gradient = torch.autograd.grad(GAINS[weighting](*means).mean(), list(weights.values()))
    for weight in weights.values():
        weight.requires_grad_(False)
    exact = dict(zip(weights, gradient, strict=True))
    direction = target_of(model, sides, weighting).direction
    assert norm(minus(direction, exact)) < 1e-10 * norm(exact)


def test_slopes_weigh_pairs_as_the_paper_does() -> None:
    chosen, rejected = torch.tensor([-1.0, -2.0, -3.0]), torch.tensor([-2.0, -2.0, -1.0])
    preference = torch.sigmoid(chosen - rejected)
    assert torch.allclose(slopes("prism", chosen, rejected).chosen, preference)
    assert torch.allclose(slopes("prism", chosen, rejected).rejected, preference)
    assert torch.allclose(slopes("hard", chosen, rejected).chosen, 1 - preference)
    assert torch.equal(slopes("uniform", chosen, rejected).chosen, torch.ones(3))
    assert torch.equal(slopes("unpaired", chosen, rejected).rejected, torch.zeros(3))


def test_figures_of_the_target_follow_their_formulas() -> None:
    model, sides = Tiny(), pairs_of(6)
    target = target_of(model, sides)
    weight = torch.sigmoid(target.gap)
    assert torch.allclose(target.weight, weight)


def test_layers_are_chosen_by_block_and_by_name() -> None:
    network = Tiny().network
    names = set(select_parameters(network, "all"))
    assert names == {name for name, _ in network.named_parameters()}
    late = set(select_parameters(network, "late"))
    assert late == {name for name in names if ".blocks.2." in name or ".blocks.3." in name}
    assert set(select_parameters(network, "last:1")) == {
        name for name in names if ".blocks.3." in name
    }
    assert set(select_parameters(network, "last:9")) == {
        name for name in names if ".blocks." in name
    }
    assert set(select_parameters(network, r"qkv\.weight$")) == {
        f"body.blocks.{i}.qkv.weight" for i in range(4)
    }
    for wrong in ("nothing", "last:0", "[", "last:"):
        with pytest.raises(UnknownLayers, match=r"this model has \d+ weights"):
            select_parameters(network, wrong)


def test_the_first_token_and_padding_are_never_predicted() -> None:
    batch = batch_of(6, seed=2, left=True)
    everything = type(batch)(batch.tokens, batch.real, batch.real)
    assert torch.equal(everything.counts, batch.real.sum(1) - 1)
    assert (token_logliks(Tiny(), everything)[~everything.predicted] == 0).all()


def test_a_sum_in_bfloat16_is_right_on_average_however_small_what_it_adds() -> None:
    weights = {"w": torch.nn.Parameter(torch.ones(4096, dtype=torch.bfloat16))}
    total = zero_sum(weights, bfloat16=True)
    added, times = torch.linspace(0.1, 1, 4096), 1000
    with adding_gradients(total, weights):
        for _ in range(times):
            (weights["w"].float() * added).sum().backward()
            assert weights["w"].grad is None
    exact = times * added.bfloat16().double()
    off = total["w"].double() / exact - 1
    assert total["w"].dtype == torch.bfloat16
    assert off.abs().mean() < 0.05 and abs(off.mean()) < 0.003  # plainly: stuck at a quarter
    plain = torch.zeros(4096, dtype=torch.bfloat16)
    for _ in range(times):
        plain += added.bfloat16()
    assert (plain.double() / exact).mean() < 0.6
