"""Mean hidden states and own answers of every architecture, against the network itself."""

from copy import deepcopy
from typing import Any

import pytest
import torch
from test_engines import ARCHITECTURES, V, network_of
from tiny import batch_of
from torch import Tensor

from prism_select.data.encoding import Encoded
from prism_select.selection.hidden_states import answer_states, layers_of, own_answers


@pytest.mark.parametrize("left", [False, True])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_states_are_means_over_the_answer_whatever_the_architecture(name: str, left: bool) -> None:
    model = network_of(name)
    network: Any = deepcopy(model.network)  # transformers leaves hooks where it shows states
    batch = batch_of(5, left=left, vocabulary=V)
    layers = layers_of(model.network)
    with torch.no_grad():
        found = answer_states(model, batch, layers)
        for row in range(5):
            real = batch.real[row]
            states = network(
                input_ids=batch.tokens[row : row + 1, real], output_hidden_states=True
            ).hidden_states[1:]
            answer = batch.supervised[row, real].clone()
            answer[0] = False  # it has no context
            for layer, state in enumerate(states[:-1]):  # the last one is normalised
                assert torch.allclose(found[layer][row], state[0, answer].mean(0), atol=1e-5)
    assert len(found) == len(states) == network.config.num_hidden_layers


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_own_answers_do_not_depend_on_the_prompts_beside_them(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def likeliest(chances: Tensor, num_samples: int) -> Tensor:
        return chances.argmax(-1, keepdim=True)

    monkeypatch.setattr(torch, "multinomial", likeliest)
    model = network_of(name)
    rows = [
        Encoded([*range(3, 9 + size)], [False] * size + [True] * 6, False) for size in (2, 9, 5)
    ]
    for row, own in zip(rows, own_answers(model, rows, [], 400, 0), strict=True):
        network: Any = model.network
        tokens = [*row.tokens[:-6]]
        for _ in range(6):
            with torch.no_grad():
                logits = network(input_ids=torch.tensor([tokens]), use_cache=False).logits
            tokens.append(int(logits[0, -1].argmax()))
        assert own.tokens == tokens
