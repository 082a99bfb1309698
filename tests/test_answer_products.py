"""Products of the gradients of answers against autograd, on every architecture."""

import errno
import tempfile
from collections.abc import Mapping

import pytest
import torch
from test_engines import ARCHITECTURES, network_of
from test_engines import V as VOCABULARY
from tiny import Tiny, pairs_of
from torch import Tensor

from prism_select.core.blocks import block_of
from prism_select.core.layers import Parameters
from prism_select.core.likelihood import LanguageModel
from prism_select.core.target_gradient import Side, pair_logliks
from prism_select.directions import answer_products as module
from prism_select.directions.answer_products import AnswerProducts, answer_products
from prism_select.directions.tensor_shelf import Shelf
from prism_select.models.layer_selection import select_parameters
from prism_select.run.errors import DiskTrouble

PAIRS = 5


def answers_of(vocabulary: int) -> Side:
    chosen, rejected = pairs_of(PAIRS, vocabulary=vocabulary)
    order = [*chosen.order, *(PAIRS + pair for pair in rejected.order)]
    return Side([*chosen.batches, *rejected.batches], order)


def gradients_of(model: LanguageModel, weights: Parameters, side: Side) -> dict[str, Tensor]:
    """∇mean_loglik of each answer by autograd, written out again."""
    for weight in weights.values():
        weight.requires_grad_(True)
    rows: dict[int, tuple[Tensor, ...]] = {}
    for batch, answers in side:
        for index, answer in enumerate(answers):
            row = batch.rows(slice(index, index + 1))
            logits = model.logits(model.hidden(row))[:, :-1][row.predicted]
            targets = row.tokens[:, 1:][row.predicted][:, None]
            loglik = logits.log_softmax(-1).gather(1, targets).mean()
            rows[answer] = torch.autograd.grad(
                loglik, list(weights.values()), allow_unused=True, materialize_grads=True
            )
    for weight in weights.values():
        weight.requires_grad_(False)
    return {
        name: torch.stack([rows[answer][k].flatten().double() for answer in sorted(rows)])
        for k, name in enumerate(weights)
    }


def exact_blocks(model: LanguageModel, weights: Parameters, side: Side) -> Mapping[str, Tensor]:
    block, sums = block_of(model.network), dict[str, Tensor]()
    for name, own in gradients_of(model, weights, side).items():
        sums[block(name)] = sums.get(block(name), 0) + own @ own.T
    return sums


def assert_same(found: AnswerProducts, exact: Mapping[str, Tensor], rtol: float) -> None:
    assert found.exact and set(found.blocks) == set(exact)
    for name, products in found.blocks.items():
        allowed = rtol * float(exact[name].abs().max())
        assert torch.allclose(products, exact[name], rtol=0, atol=allowed), name
    assert torch.allclose(found.total, sum(exact.values(), torch.zeros(())), rtol=10 * rtol)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_products_are_those_of_autograd_on_every_architecture(name: str) -> None:
    model, side = network_of(name), answers_of(VOCABULARY)
    weights = select_parameters(model.network, "all")
    found = answer_products(model, weights, side)
    assert_same(found, exact_blocks(model, weights, side), 1e-5)
    assert torch.allclose(found.mean_loglik, pair_logliks(model, side), rtol=1e-6)
    tokens = torch.cat([batch.counts for batch in side.batches])
    assert found.tokens.tolist() == tokens[torch.tensor(side.order).argsort()].tolist()


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(
    ("held", "room", "formed"),
    [(2**28, 2**30, 2**26), (2**28, 2**14, 2**9), (0, 2**30, 2**26), (2**13, 2**14, 2**9)],
)
def test_products_are_exact_however_few_numbers_are_held_at_once(
    tied: bool, held: int, room: int, formed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, side = Tiny(tied=tied), answers_of(61)
    weights = select_parameters(model.network, "all")
    exact = exact_blocks(model, weights, side)
    monkeypatch.setattr(module, "HELD", held)
    monkeypatch.setattr(module, "PIECE", room)
    rooms = {torch.device("cpu"): room}
    monkeypatch.setattr(module, "room_for_factors", lambda *_: rooms)
    monkeypatch.setattr(module, "FORMED", formed)
    monkeypatch.setattr(module, "TOKENS", 3)
    assert_same(answer_products(model, weights, side), exact, 1e-12)


@pytest.mark.parametrize("tied", [True, False])
def test_products_token_by_token_are_the_same(tied: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    model, side = Tiny(tied=tied), answers_of(61)
    weights = select_parameters(model.network, "all")
    exact = exact_blocks(model, weights, side)
    monkeypatch.setattr(module, "few_tokens", lambda *_: True)
    assert_same(answer_products(model, weights, side), exact, 1e-12)
    monkeypatch.setattr(module, "few_tokens", lambda *_: False)
    assert_same(answer_products(model, weights, side), exact, 1e-12)


def test_gradients_of_many_answers_are_folded_without_bias(monkeypatch: pytest.MonkeyPatch) -> None:
    model, side = Tiny(), answers_of(61)
    weights = select_parameters(model.network, "all")
    exact = sum(exact_blocks(model, weights, side).values(), torch.zeros(()))
    monkeypatch.setattr(module, "EXACT", 2 * PAIRS - 1)
    found = answer_products(model, weights, side)
    assert not found.exact
    assert torch.allclose(found.total, exact, atol=0.2 * float(exact.max()))


def test_a_temporary_folder_that_is_full_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(tempfile, "TemporaryFile", full)
    with pytest.raises(DiskTrouble, match="No space left on device"):
        Shelf(0).put(torch.zeros(3))
