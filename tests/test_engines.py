"""Every engine against the definition, on our own float64 transformer and on the architectures that
people use."""

import re
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from conftest import without_memory
from tiny import Tiny, batch_of, pairs_of

from prism_select.core import engines, layers
from prism_select.core.check import check, disagreement
from prism_select.core.engines import ENGINES, difference, forward, reference, reverse
from prism_select.core.layers import Parameters
from prism_select.core.likelihood import Batch, LanguageModel, token_logliks
from prism_select.core.statistics import rank_correlation
from prism_select.core.target_gradient import Target, target_gradient
from prism_select.directions.common_part import common_of
from prism_select.models.causal_lm import CausalLM
from prism_select.models.layer_selection import select_parameters
from prism_select.run.errors import BadOption, EnginesDisagree, Unreachable

V = 97
SMALL = dict(
    vocab_size=V,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=64,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
)
PLAIN = {name: value for name, value in SMALL.items() if name != "num_key_value_heads"}
MIXTURE = dict(num_experts_per_tok=2, experts_implementation="eager")

ARCHITECTURES: dict[str, Callable[[], transformers.PretrainedConfig]] = {
    "llama": lambda: transformers.LlamaConfig(**SMALL),
    "llama, tied": lambda: transformers.LlamaConfig(**SMALL, tie_word_embeddings=True),
    "qwen3": lambda: transformers.Qwen3Config(**SMALL, head_dim=8),
    "gemma3": lambda: transformers.Gemma3TextConfig(
        **SMALL,
        head_dim=8,
        sliding_window=4,
        layer_types=["sliding_attention", "full_attention"] * 2,
    ),
    "gemma2": lambda: transformers.Gemma2Config(
        **SMALL,
        head_dim=8,
        sliding_window=4,
        final_logit_softcapping=5.0,
        attn_implementation="eager",
    ),
    "phi3": lambda: transformers.Phi3Config(**SMALL),
    "gpt2": lambda: transformers.GPT2Config(
        vocab_size=V, n_embd=32, n_layer=4, n_head=4, n_positions=64, bos_token_id=1, eos_token_id=2
    ),
    "opt": lambda: transformers.OPTConfig(
        vocab_size=V,
        hidden_size=32,
        ffn_dim=48,
        num_hidden_layers=4,
        num_attention_heads=4,
        max_position_embeddings=64,
        word_embed_proj_dim=16,
    ),
    "falcon": lambda: transformers.FalconConfig(
        **PLAIN, multi_query=True, parallel_attn=True
    ),  # adds up in place
    "gpt-neox": lambda: transformers.GPTNeoXConfig(**PLAIN),
    "mixtral": lambda: transformers.MixtralConfig(**SMALL, num_local_experts=4, **MIXTURE),
    "qwen3-moe": lambda: transformers.Qwen3MoeConfig(
        **SMALL, head_dim=8, num_experts=4, moe_intermediate_size=16, **MIXTURE
    ),
}


@cache
def network_of(name: str) -> CausalLM:
    torch.manual_seed(0)
    config = ARCHITECTURES[name]()
    network = transformers.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for weight in network.parameters():  # biases start at zero and norms at one: move them
            weight.add_(0.05 * torch.randn_like(weight))
    return CausalLM(network)


def target_of(
    model: LanguageModel, weights: Parameters, weighting: str = "prism", vocabulary: int = V
) -> Target:
    return target_gradient(model, weights, pairs_of(6, vocabulary=vocabulary), weighting)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("layers", ["all", "late", r"head|words|before|between"])
@pytest.mark.parametrize("left", [False, True])
def test_engines_agree_to_rounding_on_a_float64_transformer(
    tied: bool, layers: str, left: bool
) -> None:
    model = Tiny(tied=tied)
    weights = select_parameters(model.network, layers)
    target = target_of(model, weights, vocabulary=61)
    directions, batch = [target.direction, target.chosen], batch_of(12, seed=7, left=left)
    exact = reference(model, weights, directions)(batch)
    for engine, allowed in {reverse: 1e-10, forward: 1e-10, difference: 1e-4}.items():
        fast = engine(model, weights, directions)(batch)
        assert disagreement(fast.values, exact.values) < allowed, engine.__name__
        assert torch.allclose(fast.loglik, exact.loglik, rtol=1e-10)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_many_directions_at_once_are_each_what_one_is_alone(name: str) -> None:
    model = network_of(name)
    weights = select_parameters(model.network, "all")
    target = target_of(model, weights)
    directions = [target.direction, target.chosen, target.rejected, common_of(target)]
    batch = batch_of(9, 16, seed=3, vocabulary=V)
    together = reverse(model, weights, directions)(batch).values
    alone = torch.cat(
        [reverse(model, weights, [direction])(batch).values for direction in directions], dim=1
    )
    assert disagreement(together, alone) < 1e-5


@pytest.mark.parametrize("layers", ["all", "late"])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_engines_agree_in_float32_on_every_architecture(name: str, layers: str) -> None:
    model = network_of(name)
    weights = select_parameters(model.network, layers)
    target = target_of(model, weights)
    directions, batch = [target.direction, target.chosen], batch_of(32, 16, seed=9, vocabulary=V)
    exact = reference(model, weights, directions)(batch).values
    assert disagreement(reverse(model, weights, directions)(batch).values, exact) < 1e-4
    assert disagreement(forward(model, weights, directions)(batch).values, exact) < 1e-4
    differences = difference(model, weights, directions)(batch).values
    assert disagreement(differences, exact) < 1e-2
    for k in range(2):
        assert rank_correlation(differences[:, k].numpy(), exact[:, k].numpy()) > 0.999


@pytest.mark.parametrize("name", ["llama, tied", "gemma3"])
def test_a_word_that_pads_and_stands_in_the_text_counts_as_torch_counts_it(name: str) -> None:
    model = network_of(name)
    weights = select_parameters(model.network, "all")
    target, batch = target_of(model, weights), batch_of(32, 16, seed=9, vocabulary=V)
    batch.tokens[:, 3:6] = 0
    directions = [target.direction, target.chosen]
    assert target.direction[next(iter(weights))][0].any()  # through the head
    exact = reference(model, weights, directions)(batch).values
    for engine, allowed in {reverse: 1e-4, forward: 1e-4, difference: 2e-3}.items():
        assert disagreement(engine(model, weights, directions)(batch).values, exact) < allowed, (
            engine.__name__
        )


def test_of_a_model_that_also_sees_what_reads_text_counts() -> None:
    torch.manual_seed(0)
    sight = dict(hidden_size=16, intermediate_size=24, num_hidden_layers=6, num_attention_heads=2)
    config = transformers.Gemma3Config(
        text_config=ARCHITECTURES["gemma3"]().to_dict(),
        vision_config={**sight, "image_size": 28, "patch_size": 14},
        **dict(mm_tokens_per_image=4, image_token_index=7, boi_token_index=8, eoi_token_index=9),
    )
    model = CausalLM(transformers.AutoModelForCausalLM.from_config(config))
    everything, late = (
        select_parameters(model.network, "all"),
        select_parameters(model.network, "late"),
    )
    assert {
        name for name, _ in model.network.named_parameters() if "language_model" in name
    } == set(everything)
    assert {name for name in everything if re.search(r"layers\.[23]\.", name)} == set(late)
    directions, batch = (
        [target_of(model, everything).direction],
        batch_of(8, 16, seed=9, vocabulary=V),
    )
    exact = reference(model, everything, directions)(batch).values
    assert disagreement(reverse(model, everything, directions)(batch).values, exact) < 1e-4


def test_a_network_that_names_itself_its_decoder_is_split_at_its_model() -> None:
    network = transformers.Llama4ForCausalLM(
        transformers.Llama4TextConfig(
            **SMALL, head_dim=8, num_local_experts=2, intermediate_size_mlp=48
        )
    )
    assert network.get_decoder() is network
    assert CausalLM(network).body is network.model


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_bfloat16_ranks_as_the_float32_definition_does(name: str) -> None:
    torch.manual_seed(0)
    exact_model = network_of(name)
    low = transformers.AutoModelForCausalLM.from_config(ARCHITECTURES[name]())
    low.load_state_dict(exact_model.network.state_dict())
    model = CausalLM(low.bfloat16())
    batch, scores = batch_of(64, 16, seed=5, vocabulary=V), []
    for each, engine in ((model, reverse), (exact_model, reference)):
        weights = select_parameters(each.network, "all")
        scores.append(
            engine(each, weights, [target_of(each, weights).direction])(batch).values[:, 0].numpy()
        )
    assert rank_correlation(scores[0], scores[1]) > 0.99


def test_left_padding_scores_like_right_padding_on_every_architecture() -> None:
    for name in ARCHITECTURES:
        model = network_of(name)
        weights = select_parameters(model.network, "all")
        engine = reverse(model, weights, [target_of(model, weights).direction])
        right = engine(batch_of(8, 16, seed=3, vocabulary=V)).values
        left = engine(batch_of(8, 16, seed=3, left=True, vocabulary=V)).values
        assert disagreement(left, right) < 1e-5, name


def test_scores_do_not_depend_on_batch_size_order_or_duplicates() -> None:
    model = network_of("llama")
    weights = select_parameters(model.network, "all")
    engine = reverse(model, weights, [target_of(model, weights).direction])
    batch = batch_of(24, 16, seed=4, vocabulary=V)
    together = engine(batch).values
    alone = torch.cat([engine(batch.rows(slice(i, i + 1))).values for i in range(24)])
    order = torch.randperm(24, generator=torch.Generator().manual_seed(0)).repeat(2)
    shuffled = engine(
        type(batch)(batch.tokens[order], batch.real[order], batch.supervised[order])
    ).values
    assert disagreement(alone, together) < 1e-5
    assert disagreement(shuffled, together[order]) < 1e-5


def test_a_weight_that_an_engine_cannot_reach_is_named() -> None:
    config = ARCHITECTURES["mixtral"]()
    config._experts_implementation = "grouped_mm"  # this form has no forward-mode derivative
    torch.manual_seed(0)
    model = CausalLM(transformers.AutoModelForCausalLM.from_config(config))
    weights = select_parameters(model.network, "all")
    target = target_of(model, weights)
    batch = batch_of(4, 16, vocabulary=V)
    with pytest.raises(Unreachable, match=r"model\.layers\.\d\.mlp\.experts\.gate_up_proj"):
        reverse(model, weights, [target.direction])(batch)
    exact = reference(model, weights, [target.direction])(batch).values
    assert disagreement(difference(model, weights, [target.direction])(batch).values, exact) < 1e-2


def test_a_weight_used_behind_its_modules_back_is_named() -> None:
    model = Tiny()
    head, words = model.network.head, model.network.body.words
    model.logits = lambda hidden: hidden @ words.weight.T + head.bias  # type: ignore[method-assign]
    weights = select_parameters(model.network, "head.bias")
    with pytest.raises(Unreachable, match=r"head\.bias: the module that holds it was never called"):
        reverse(model, weights, [{name: torch.ones_like(w) for name, w in weights.items()}])(
            batch_of(3)
        )


def test_difference_refuses_what_rounding_would_ruin() -> None:
    model = CausalLM(
        transformers.AutoModelForCausalLM.from_config(ARCHITECTURES["llama"]()).bfloat16()
    )
    weights = select_parameters(model.network, "all")
    with pytest.raises(BadOption, match="float32"):
        difference(model, weights, [{name: torch.ones_like(w) for name, w in weights.items()}])


def test_the_check_stops_an_engine_that_is_wrong() -> None:
    model = Tiny()
    weights = select_parameters(model.network, "all")
    slow = reference(model, weights, [target_of(model, weights, vocabulary=61).direction])
    exact = slow(batch_of(4)).values
    assert check("reverse", exact, exact, torch.float64) == 0
    with pytest.raises(
        EnginesDisagree, match=r"differ by 1\.0e-02 on the first 4 rows \(allowed 1e-04\)"
    ):
        check("reverse", exact * 1.01, exact, torch.float64)


def test_the_model_is_as_it_was_after_each_engine() -> None:
    model = Tiny()
    weights = select_parameters(model.network, "all")
    direction = target_of(model, weights, vocabulary=61).direction
    before = {name: value.clone() for name, value in model.network.state_dict().items()}
    for make in ENGINES.values():
        make(model, weights, [direction])(batch_of(3))
        assert all(
            torch.equal(before[name], value) for name, value in model.network.state_dict().items()
        )
        assert not any(
            weight.requires_grad or weight.grad is not None for weight in model.network.parameters()
        )
        assert not any(module._forward_hooks for module in model.network.modules())


def test_the_head_in_chunks_scores_like_the_head_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Tiny()
    weights = select_parameters(model.network, "all")
    engine = reverse(model, weights, [target_of(model, weights, vocabulary=61).direction])
    at_once = engine(batch_of(9))
    monkeypatch.setattr("prism_select.core.likelihood.HEAD_LOGITS", 3 * 61)
    in_chunks = engine(batch_of(9))
    assert np.allclose(in_chunks.values, at_once.values, rtol=1e-10)
    assert np.allclose(in_chunks.loglik, at_once.loglik, rtol=1e-10)


class Leaking(Tiny):
    """Its last block sees more of the first one than what the blocks between give."""

    def hidden(self, batch: Batch) -> torch.Tensor:
        blocks: Any = self.network.body.blocks
        first, last = blocks[0], blocks[-1]
        seen: list[torch.Tensor] = []
        hooks = [
            first.up.register_forward_hook(lambda *args: seen.append(args[2])),
            last.register_forward_hook(lambda *args: args[2] + (seen.pop().mean() if seen else 0)),
        ]
        try:
            return super().hidden(batch)
        finally:
            for hook in hooks:
                hook.remove()


@pytest.mark.parametrize(("kind", "passes"), [(Tiny, [1, 1, 2, 2]), (Leaking, [2, 2, 2, 2])])
def test_blocks_below_the_selected_parameters_run_once_where_that_is_exact(
    kind: type[Tiny], passes: list[int]
) -> None:
    model, batch = kind(), batch_of(4, seed=3)
    weights = select_parameters(model.network, "late")
    directions = [target_of(model, weights, vocabulary=61).direction]
    engine = difference(model, weights, directions)
    engine(batch)  # the first batch sets the step, too
    runs = [0] * len(passes)

    def count(index: int) -> Callable[..., None]:
        return lambda *_: runs.__setitem__(index, runs[index] + 1)

    blocks: Any = model.network.body.blocks
    for index, block in enumerate(blocks):
        block.up.register_forward_hook(count(index))
    fast = engine(batch)
    assert runs == passes
    exact = reference(model, weights, directions)(batch)
    assert disagreement(fast.values, exact.values) < 1e-4
    assert all("forward" not in vars(block) for block in blocks)


@pytest.mark.parametrize("error", without_memory())
def test_memory_that_runs_out_in_a_modules_own_derivative_is_no_weight_out_of_reach(
    error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise error

    model = network_of("llama")
    weights = select_parameters(model.network, "norm")
    engine = reverse(model, weights, [target_of(model, weights).direction])
    monkeypatch.setattr(layers, "tangent_of", full)
    with pytest.raises(RuntimeError, match="memory"):
        engine(batch_of(3, 16, seed=3, vocabulary=V))


def test_a_head_that_answers_in_less_than_the_body_s_precision_is_one_that_scores(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = network_of("llama")
    model.network.double()
    weights = select_parameters(model.network, "all")
    target, batch, head = (
        target_of(model, weights),
        batch_of(3, 16, seed=3, vocabulary=V),
        model.logits,
    )
    exact = reference(model, weights, [target.direction])(batch).values
    monkeypatch.setattr(model, "logits", lambda hidden: head(hidden).float())
    for engine in (reference, reverse):
        assert (
            disagreement(
                engine(model, weights, [target_of(model, weights).direction])(batch).values, exact
            )
            < 1e-5
        )


@pytest.mark.parametrize("call", range(1, 9))
def test_a_difference_that_ran_out_of_memory_while_it_got_ready_gets_ready_again(
    call: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = network_of("llama")
    weights = select_parameters(model.network, "late")
    target = target_of(model, weights)
    directions, batch, calls = (
        [target.direction, target.chosen],
        batch_of(3, 16, seed=3, vocabulary=V),
        list[int](),
    )

    def cramped(*args: Any) -> torch.Tensor:
        calls.append(1)
        if len(calls) == call:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return token_logliks(*args)

    engine, undisturbed = (difference(model, weights, directions) for _ in range(2))
    expected = undisturbed(batch).values
    monkeypatch.setattr(engines, "token_logliks", cramped)
    with pytest.raises(torch.OutOfMemoryError):
        engine(batch)
    assert torch.equal(engine(batch).values, expected)


@pytest.mark.parametrize("name", ["llama, tied", "opt", "gpt2", "gemma3"])
def test_directions_in_factors_of_several_ranks_are_scored_as_in_full(name: str) -> None:
    """Biases, tied heads, Conv1D and embeddings that scale their rows; one direction lacks what the
    others move."""
    model = network_of(name)
    weights, draw = select_parameters(model.network, "all"), torch.Generator().manual_seed(0)

    def along(rank: int, names: Sequence[str]) -> dict[str, torch.Tensor | layers.Factors]:
        moves: dict[str, torch.Tensor | layers.Factors] = {}
        for owner in layers.owners(model.network, {n: weights[n] for n in names}):
            for key, own in owner.weights.items():
                rows, *columns = weights[own].shape
                moves[own] = torch.randn(rows, *columns, generator=draw)
                if key == "weight" and (layers.is_matrix(owner) or owner.scale):
                    left = torch.randn(rows, rank, generator=draw)
                    right = torch.randn(rank, *columns, generator=draw)
                    moves[own] = layers.Factors(left, right)
        return moves

    some = [along(3, [*weights]), along(1, [*weights][::2]), along(5, [*weights])]
    batch = batch_of(3, vocabulary=V)
    fast, exact = (ENGINES[e](model, weights, some)(batch) for e in ("reverse", "reference"))
    np.testing.assert_allclose(fast.values.numpy(), exact.values.numpy(), rtol=1e-5, atol=1e-5)
