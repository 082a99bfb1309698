"""What the parts of a network add to a score, and which cut of them is best."""

import numpy as np
import pytest
import torch
from test_engines import ARCHITECTURES, V, network_of, target_of
from tiny import Tiny, batch_of

from prism_select.core.engines import reverse
from prism_select.models.layer_selection import select_parameters
from prism_select.scoring.layer_profile import best_cut, parts_of, profile


@pytest.mark.parametrize("name", ["llama", "llama, tied", "gemma3", "gpt2", "opt", "mixtral"])
def test_contributions_add_up_to_the_score_and_those_of_a_cut_to_its_own(name: str) -> None:
    model = network_of(name)
    weights = select_parameters(model.network, "all")
    direction = target_of(model, weights).direction
    batches = [batch_of(6, 16, seed, vocabulary=V) for seed in (1, 2)]
    found, parts = profile(model, weights, direction, batches), parts_of(model.network, weights)
    columns = list(dict.fromkeys(parts.values()))
    assert found.shape == (12, len(columns)) and np.abs(found).min(1).max() > 0
    for cut in ("all", "late", "last:1", "last:3"):
        chosen = select_parameters(model.network, cut)
        engine = reverse(model, chosen, [{n: d for n, d in direction.items() if n in chosen}])
        exact = torch.cat([engine(batch).values[:, 0] for batch in batches]).numpy()
        kept = [i for i, part in enumerate(columns) if any(parts[name] == part for name in chosen)]
        assert sum(part in [columns[i] for i in kept] for part in parts.values()) == len(chosen)
        assert np.linalg.norm(found[:, kept].sum(1) - exact) < 1e-5 * np.linalg.norm(exact)


def test_parts_have_readable_names_in_the_order_of_the_network() -> None:
    def names(network: torch.nn.Module) -> list[str]:
        return list(dict.fromkeys(parts_of(network, select_parameters(network, "all")).values()))

    blocks = [f"block {i}" for i in range(4)]
    assert names(Tiny(tied=False).network) == ["embeddings", *blocks, "last", "head"]
    assert names(network_of("llama").network) == ["embeddings", *blocks, "norm", "head"]
    assert names(network_of("llama, tied").network) == ["embeddings and head", *blocks, "norm"]
    assert names(network_of("gpt2").network) == [
        "embeddings and head",
        "embeddings",
        *blocks,
        "ln_f",
    ]
    assert {part for name in ARCHITECTURES for part in names(network_of(name).network)} >= set(
        blocks
    )


@pytest.mark.parametrize("planted", range(6))
def test_the_best_cut_keeps_a_planted_block_and_as_little_noise_as_it_can(planted: int) -> None:
    draw = np.random.default_rng(0)
    labels, noise = draw.random(4000) < 0.3, draw.standard_normal((4000, 8))
    parts = ["embeddings", *(f"block {i}" for i in range(6)), "norm"]
    noise[:, planted + 1] += labels
    tokens = draw.integers(1, 400, 4000)
    table = best_cut(noise * tokens[:, None], parts, labels, tokens)
    assert table[0].name in ({"late", "last:3"} if planted == 3 else {f"last:{6 - planted}"})
    assert [cut.auroc for cut in table] == sorted((cut.auroc for cut in table), reverse=True)
    assert sorted(cut.name for cut in table) == ["all", *(f"last:{n}" for n in range(1, 7)), "late"]
    named = {cut.name: cut.auroc for cut in table}
    assert named["late"] == named["last:3"]
    assert best_cut(noise * tokens[:, None], parts, labels)[0].auroc < table[0].auroc


def test_cuts_that_need_blocks_that_were_not_profiled_are_not_offered() -> None:
    labels = np.array([True, False, True])
    table = best_cut(np.eye(3), ["block 2", "block 3", "norm"], labels)
    assert {cut.name for cut in table} == {"all", "late", "last:1", "last:2"}
