"""Every baseline against its definition, written out again: slow, row by row, from the
model's own output."""

import math
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from conftest import CHATML, build_network, build_tokenizer
from numpy.typing import NDArray
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.model_selection import LeaveOneGroupOut, cross_val_predict
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor

from prism_select.core.likelihood import Batch
from prism_select.data.encoding import Encoded, Encoder
from prism_select.data.records import Example, Turn
from prism_select.directions.pair_encoding import EncodedPairs
from prism_select.models.causal_lm import CausalLM
from prism_select.models.layer_selection import select_parameters
from prism_select.run.options import Amount
from prism_select.selection import hidden_state_baselines as states
from prism_select.selection.baseline_scores import Material, Texts
from prism_select.selection.baselines import BASELINES, COUNT_BASELINES, count_ranking, rank
from prism_select.selection.hidden_states import own_answers
from prism_select.selection.rules import OUTCOMES, Rules, choose

ROWS = [
    ("What is the capital of France?", "Paris"),
    ("And that of Italy?", "Rome, thank you very much"),
    ("Two plus three?", "It makes five; two plus three makes five."),
    ("Please answer with a polite word", "No way, go away"),
    ("Boil water", "At a hundred degrees water boils, and then it boils and boils and boils away."),
    ("Say it", "way"),
    ("Who are you, and what do you do for us all day long in Rome?", "An assistant"),
    ("system", "user assistant user"),
    ("Count", "one two three four five"),
]
PAIRS = [
    ("The capital of Italy?", "Rome", "Paris, I think, or no"),
    ("Three plus two?", "It makes five.", "Go away"),
    ("A polite word, please", "Thank you very much!", "No"),
]


def example_of(prompt: str, answer: str) -> Example:
    turns = (Turn("user", prompt), Turn("assistant", answer))
    return Example(
        turns if prompt else turns[1:], "", "", "rows.jsonl", 1, prompt_turns=1 if prompt else 0
    )


@cache
def encoder_of(chat: bool) -> Encoder:
    return Encoder(build_tokenizer(CHATML if chat else None), "auto", 64)


@cache
def material_of(chat: bool = False, layers: str = "all") -> Material:
    """Batches of a few rows, so that the order of the pool has to be found again."""
    encoder = encoder_of(chat)
    model = CausalLM(build_network(len(encoder.tokenizer)))
    rows = [encoder.encode(example_of(*row)) for row in ROWS]
    return Material(
        texts=[f"{prompt}\n{answer}" for prompt, answer in ROWS],
        sources=["a", "b", "b"] * 3,
        tokens=np.array([row.targets for row in rows]),
        target_texts=[f"{prompt}\n{chosen}" for prompt, chosen, _ in PAIRS],
        model=model,
        weights=select_parameters(model.network, layers),
        rows=rows,
        pairs=EncodedPairs(
            [encoder.encode(example_of(prompt, chosen)) for prompt, chosen, _ in PAIRS],
            [encoder.encode(example_of(prompt, rejected)) for prompt, _, rejected in PAIRS],
        ),
        prefix=encoder.prefix,
        scores=np.square(np.arange(len(rows), dtype=np.float64)),
        batch_tokens=100,
    )


def ranked(name: str, material: Texts) -> NDArray[np.float64]:
    return rank([name], material)[name]


def logliks(material: Material, row: Encoded) -> Tensor:
    """Of each supervised token that has a context, by the network alone."""
    network: Any = material.model.network
    tokens = torch.tensor([row.tokens])
    found = (
        network(input_ids=tokens)
        .logits[0, :-1]
        .log_softmax(-1)
        .gather(1, tokens[0, 1:, None])[:, 0]
    )
    return torch.as_tensor(found[torch.tensor(row.supervised[1:])])


def loss(material: Material, row: Encoded) -> float:
    with torch.no_grad():
        return -float(logliks(material, row).double().mean())


def gradient(material: Material, row: Encoded, mean: bool = False) -> Tensor:
    """∇loglik of one row, or ∇mean_loglik, as one long vector."""
    weights = list(material.weights.values())
    for weight in weights:
        weight.requires_grad_(True)
    found = logliks(material, row)
    parts = torch.autograd.grad(found.mean() if mean else found.sum(), weights)
    for weight in weights:
        weight.requires_grad_(False)
    return torch.cat([part.flatten() for part in parts]).double()


def close(found: NDArray[np.float64], wanted: Sequence[float]) -> bool:
    exact = np.array(wanted)
    return bool(np.abs(found - exact).max() < 1e-4 * np.abs(exact).max())


def taken(numbers: NDArray[np.float64], rows: int) -> list[int]:
    count = len(numbers)
    verdicts = choose(
        numbers,
        np.ones(count, dtype=np.int64),
        np.zeros(count, dtype=np.int64),
        Rules(Amount("rows", rows)),
        rows,
    )
    found: list[int] = np.flatnonzero(verdicts == OUTCOMES.index("taken")).tolist()
    return found


def texts_of(
    texts: Sequence[str], target: Sequence[str] = (), seed: int = 0, sources: Sequence[str] = ()
) -> Texts:
    return Texts(
        texts=texts,
        sources=sources or [""] * len(texts),
        tokens=np.array([len(text) for text in texts]),
        target_texts=target,
        seed=seed,
    )


@pytest.mark.parametrize("name", ["random", "random-by-source"])
def test_random_rows_are_those_of_the_seed(name: str) -> None:
    one, same, other = (ranked(name, texts_of(["x"] * 50, seed=seed)) for seed in (1, 1, 2))
    assert (one == same).all() and len(set(one)) == 50
    assert taken(one, 10) != taken(other, 10)


def test_random_by_source_takes_the_same_share_of_every_source_at_any_budget() -> None:
    sources = ["a"] * 60 + ["b"] * 25 + ["c"] * 5
    numbers = ranked("random-by-source", texts_of(["x"] * 90, sources=sources))
    for rows in range(1, 91):
        counts = Counter(sources[row] for row in taken(numbers, rows))
        low = max((counts[source] - 1) / sources.count(source) for source in "abc")
        high = min((counts[source] + 1) / sources.count(source) for source in "abc")
        assert low < high, "there is a share that every source is within a row of"


def test_random_by_source_takes_every_row_as_often() -> None:
    sources, often = ["a"] * 12 + ["b"] * 5 + ["c"] * 3, np.zeros(20)
    for seed in range(2000):
        numbers = ranked("random-by-source", texts_of(["x"] * 20, seed=seed, sources=sources))
        often[numbers >= -0.25] += 1
    assert np.abs(often / 2000 - 0.25).max() < 0.04  # four standard errors


def test_the_longest_come_first_and_equal_rows_in_the_order_of_the_pool() -> None:
    numbers = ranked("length", texts_of(["xx", "xxx", "xx", "x", "xx"]))
    assert numbers.tolist() == [2, 3, 2, 1, 2]
    assert [taken(numbers, rows) for rows in (1, 2, 3)] == [[1], [0, 1], [0, 1, 2]]


def okapi(rows: Sequence[Sequence[str]], asked: Sequence[str]) -> list[float]:
    mean, found = sum(map(len, rows)) / len(rows), []
    for row in rows:
        total = 0.0
        for word in asked:
            n, f = sum(word in other for other in rows), row.count(word)
            idf = math.log(1 + (len(rows) - n + 0.5) / (n + 0.5))
            total += idf * f / (f + 1.5 * (0.25 + 0.75 * len(row) / mean))
        found.append(total)
    return found


def test_bm25_is_okapis_formula() -> None:
    texts = [
        "Two plus two is 4",
        "plus, PLUS and minus",
        "…",
        "nothing here",
        "Two plus two is 4",
        "4 2 4",
    ]
    wanted = ["two Plus two", "is it 4? unheard-of", "!"]
    split = [re.findall(r"\w+", text.lower()) for text in texts]
    each = [okapi(split, re.findall(r"\w+", text.lower())) for text in wanted]
    numbers = ranked("bm25", texts_of(texts, wanted))
    assert numbers == pytest.approx(np.mean(each, axis=0), rel=1e-12)
    assert numbers[2] == numbers[3] == 0 and numbers[0] == numbers[4] == numbers.max()
    assert taken(numbers, 1) == [0]


def test_bm25_of_rows_or_pairs_without_a_word_is_nothing() -> None:
    assert ranked("bm25", texts_of(["", "…"], ["word"])).tolist() == [0, 0]
    assert ranked("bm25", texts_of(["word", "…"], ["?"])).tolist() == [0, 0]


@pytest.mark.parametrize("chat", [False, True])
def test_losses_are_those_of_rows_read_one_by_one(chat: bool) -> None:
    material = material_of(chat)
    losses = [loss(material, row) for row in material.rows]
    middle = sorted(losses)[len(losses) // 2]
    assert close(ranked("loss-top", material), losses)
    assert close(ranked("loss-mid", material), [-abs(each - middle) for each in losses])
    assert taken(ranked("loss-mid", material), 1) == [losses.index(middle)]


def test_a_loss_that_is_not_finite_takes_no_part_and_moves_no_median() -> None:
    material = replace(material_of())
    material.__dict__["pool_pass"] = (np.array([3.0, np.nan, 1.0, 2.5, np.inf]), torch.zeros(5, 1))
    numbers = ranked("loss-mid", material)
    assert numbers[[0, 2, 3]].tolist() == [-0.5, -1.5, 0] and not np.isfinite(numbers[[1, 4]]).any()


def test_ifd_is_the_loss_after_the_prompt_over_that_of_the_answer_alone() -> None:
    material, encoder = material_of(), encoder_of(False)
    ratios = [
        loss(material, encoder.encode(example_of(prompt, answer)))
        / loss(material, encoder.encode(example_of("", answer)))
        for prompt, answer in ROWS
    ]
    assert min(ratios) < 1 < max(ratios)
    numbers = ranked("ifd", material)
    assert close(numbers, [ratio if ratio <= 1 else -ratio for ratio in ratios])
    usual = sorted(
        (row for row in range(len(ROWS)) if ratios[row] <= 1), key=lambda row: -ratios[row]
    )
    late = sorted((row for row in range(len(ROWS)) if ratios[row] > 1), key=lambda row: ratios[row])
    assert np.argsort(-numbers).tolist() == [*usual, *late]


def test_ifd_of_a_bare_text_is_one_and_without_a_context_it_starts_at_the_second_token() -> None:
    rows = [
        Encoded(
            [0, 9, 11, 13, 7], [True] * 5, False
        ),  # what stands before every text is there already
        Encoded([0, 20, 21, 9, 11, 13], [False] * 3 + [True] * 3, False),
        Encoded([0, 20, 9], [False, False, True], False),
    ]
    material = replace(material_of(), rows=rows, prefix=[0])
    assert ranked("ifd", material)[0] == pytest.approx(1, rel=1e-5)
    bare = replace(material, prefix=[])
    ratio = loss(bare, rows[1]) / loss(bare, Encoded([9, 11, 13], [True] * 3, False))
    numbers = ranked("ifd", bare)
    assert abs(numbers[1]) == pytest.approx(ratio, rel=1e-5)
    assert np.isnan(numbers[2]), "nothing is left of one token without a context"
    assert np.isnan(ranked("ifd", replace(bare, rows=rows[2:]))).all()


@pytest.mark.parametrize("chat", [False, True])
def test_rds_lets_the_targets_take_their_nearest_rows_in_turn(chat: bool) -> None:
    material = material_of(chat)
    network: Any = material.model.network

    def sketch(row: Encoded) -> Tensor:
        with torch.no_grad():
            states = network(
                input_ids=torch.tensor([row.tokens]), output_hidden_states=True
            ).hidden_states[-1][0]
        total = sum((t + 1) * state.double() for t, state in enumerate(states))
        mean = torch.as_tensor(total) / sum(range(1, len(states) + 1))
        return torch.nn.functional.normalize(mean, dim=0)

    pool, targets = (
        [sketch(row) for row in material.rows],
        [sketch(row) for row in material.pairs[0]],
    )
    assert torch.allclose(
        torch.nn.functional.normalize(material.pool_pass[1].double()), torch.stack(pool), atol=1e-5
    )
    left, order = list(range(len(pool))), list[int]()
    while left:
        target = targets[len(order) % len(targets)]
        order.append(max(left, key=lambda row: float(pool[row] @ target)))
        left.remove(order[-1])
    assert np.argsort(-ranked("rds", material)).tolist() == order


def means_of(material: Material, row: Encoded) -> Tensor:
    """[layer, width]: mean over the answer, by the network's own list of states; what it lists last
    is normalised, so the last block is not there."""
    network: Any = material.model.network
    found = network(input_ids=torch.tensor([row.tokens]), output_hidden_states=True).hidden_states[
        1:-1
    ]
    counted = torch.tensor([False, *row.supervised[1:]])
    return torch.stack([state[0][counted].mean(0) for state in found])


@pytest.mark.parametrize("chat", [False, True])
def test_states_of_every_layer_are_those_of_rows_read_one_by_one(chat: bool) -> None:
    material = material_of(chat)
    for rows, found in (
        (material.rows, material.pool_states),
        (material.pairs.rejected, material.pair_states[1]),
    ):
        wanted = torch.stack([means_of(material, row) for row in rows], 1)
        assert found.dtype == np.float32 and len(found) == len(wanted) + 1
        assert np.abs(found[:-1] - wanted.numpy()).max() < 1e-5 * np.abs(found).max()


def planted(seed: int) -> tuple[NDArray[np.float64], ...]:
    """Chosen and rejected states of 24 pairs and of 60 rows, the first half of the chosen kind,
    that differ in the third of four layers."""
    draw = np.random.default_rng(seed)
    chosen, rejected, rows = (draw.normal(size=(4, count, 30)) for count in (24, 24, 60))
    direction = draw.normal(size=30) / 30**0.5
    chosen[2] += 2 * direction
    rejected[2] -= 2 * direction
    rows[2] += 2 * direction * np.where(np.arange(60) < 30, 1, -1)[:, None]
    scale = np.exp(draw.normal(size=30) * 2)
    return chosen * scale, rejected * scale, rows * scale


def test_the_probe_finds_planted_rows_and_their_layer() -> None:
    for seed in range(5):
        chosen, rejected, rows = planted(seed)
        folds = np.array_split(np.arange(24), 8)
        found = states.choose_probe(chosen, rejected, folds)
        numbers = states.probe(chosen, rejected, rows, folds)
        assert found.layer == 2 and found.auroc > 0.9
        assert roc_auc_score(np.arange(60) < 30, numbers) > 0.93
        back = states.probe(rejected, chosen, rows, folds)
        assert np.abs(back + numbers).max() < 1e-3 * np.abs(numbers).max()
        scaled = states.probe(chosen * 9, rejected * 9, rows * 9, folds)
        assert np.abs(scaled - numbers).max() < 1e-3 * np.abs(numbers).max()


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(("name", "least"), [("probe", 0.95), ("vector-filter", 0.9)])
def test_rows_of_a_planted_kind_come_first_and_with_exchanged_pairs_last(
    name: str, least: float, seed: int
) -> None:
    encoder, draw = encoder_of(False), np.random.default_rng(seed)
    kinds = [["Rome", "Paris", "France", "Italy", "capital"], ["go", "away", "no", "way", "polite"]]
    noise = ["two", "three", "five", "water", "boils", "and", "then", "it"]

    def answer(kind: int) -> Encoded:
        words = [*draw.choice(kinds[kind], 4), *draw.choice(noise, 4)]
        return encoder.encode(example_of("Say it", " ".join(draw.permutation(words))))

    pairs = EncodedPairs([answer(0) for _ in range(24)], [answer(1) for _ in range(24)])
    material = replace(
        material_of(),
        rows=[answer(row % 2) for row in range(200)],
        pairs=pairs,
        folds=np.array_split(np.arange(24), 8),
    )
    numbers = ranked(name, material)
    assert roc_auc_score(np.arange(200) % 2 == 0, numbers) > least
    back = ranked(name, replace(material, pairs=EncodedPairs(*pairs[::-1])))
    assert np.abs(back + numbers).max() < 1e-3 * np.abs(numbers).max()


def test_the_probe_is_scikit_learns_at_the_layer_and_strength_of_its_own_search() -> None:
    chosen, rejected, rows = planted(7)
    folds = np.array_split(np.arange(24), 8)
    labels, groups = np.repeat([1, 0], 24), np.tile(np.repeat(np.arange(8), 3), 2)
    best, wanted = (-1.0, 0.0), np.empty(0)
    for strength in states.STRENGTHS:
        for layer in (1, 2, 0, 3):
            answers = np.concatenate([chosen[layer], rejected[layer]])
            model = make_pipeline(
                StandardScaler(), LogisticRegression(C=strength, tol=1e-8, max_iter=10_000)
            )
            held = cross_val_predict(
                model,
                answers,
                labels,
                groups=groups,
                cv=LeaveOneGroupOut(),
                method="decision_function",
            )
            if (value := roc_auc_score(labels, held)) > best[0]:
                best = (value, strength)
                wanted = model.fit(answers, labels).decision_function(rows[layer])
    found = states.choose_probe(chosen, rejected, folds)
    assert (found.auroc, found.strength) == pytest.approx(best)
    assert states.probe(chosen, rejected, rows, folds) == pytest.approx(wanted, rel=1e-3, abs=1e-3)


def test_equal_layers_and_strengths_leave_the_strongest_penalty_at_the_middle() -> None:
    chosen = np.random.default_rng(0).normal(size=(5, 8, 4)) + 50
    for folds in (np.array_split(np.arange(8), 4), []):
        found = states.choose_probe(chosen, -chosen, folds)
        assert (found.layer, found.strength) == (2, states.STRENGTHS[0])
        assert states.choose_vector(chosen, -chosen, folds).layer == 2
        assert states.choose_vector(chosen, -chosen, folds, lowest=3).layer == 3


def test_pairs_turned_at_random_are_at_chance_when_both_answers_are_held_out() -> None:
    values = []
    for seed in range(20):
        draw = np.random.default_rng(seed)
        question = 5 * draw.normal(size=(1, 24, 30))
        chosen, rejected = question + draw.normal(size=(2, 1, 24, 30))
        values.append(
            states.choose_vector(chosen, rejected, np.array_split(np.arange(24), 8)).auroc
        )
    assert abs(np.mean(values) - 0.5) < 0.06


MIDDLE = 1  # of four layers the first of the two nearest


def concept_of(material: Material) -> Tensor:
    """The vector at the middle of the tiny model's layers, of length one."""
    chosen, rejected = (
        torch.stack([means_of(material, row)[MIDDLE] for row in rows]).double().mean(0)
        for rows in material.pairs
    )
    return torch.nn.functional.normalize(chosen - rejected, dim=0)


def test_vector_filter_is_the_projection_on_the_difference_of_means() -> None:
    material = material_of(False)
    with torch.no_grad():
        vector = concept_of(material)
        wanted = [float(means_of(material, row)[MIDDLE].double() @ vector) for row in material.rows]
    assert close(ranked("vector-filter", material), wanted)


def test_projection_difference_takes_off_the_models_own_answer() -> None:
    material = material_of(False)
    own = own_answers(material.model, material.rows, [], 100, 0)
    with torch.no_grad():
        vector = concept_of(material)
        wanted = [
            float((means_of(material, row) - means_of(material, other))[MIDDLE].double() @ vector)
            for row, other in zip(material.rows, own, strict=True)
        ]
    assert close(ranked("projection-difference", material), wanted)
    other_seed = ranked("projection-difference", replace(material, seed=1))
    assert not close(other_seed, wanted)


def test_own_answers_follow_the_prompts_of_rows_and_stop_at_an_end() -> None:
    material = material_of()
    ends = range(0, 200, 3)
    free = own_answers(material.model, material.rows, [], 100, 0)
    ended = own_answers(material.model, material.rows, ends, 100, 0)
    for row, long, short in zip(material.rows, free, ended, strict=True):
        start = row.supervised.index(True)
        assert long.targets == row.targets and 1 <= short.targets <= row.targets
        for own in (long, short):
            assert own.tokens[:start] == row.tokens[:start]
            assert [*own.supervised] == [place >= start for place in range(len(own.tokens))]
        assert not any(token in ends for token in short.tokens[start:-1])
    assert any(
        len(short.tokens) < len(long.tokens) for long, short in zip(free, ended, strict=True)
    )


def test_own_answers_are_drawn_as_the_model_says() -> None:
    material = material_of()
    row = Encoded([0, 9, 11], [False, False, True], False)
    drawn = own_answers(material.model, [row] * 4000, [], 600, 0)
    with torch.no_grad():
        network: Any = material.model.network
        chances = network(input_ids=torch.tensor([[0, 9]])).logits[0, -1].softmax(-1)
    counts = torch.tensor([own.tokens[-1] for own in drawn]).bincount(minlength=len(chances))
    error = (counts / 4000 - chances).abs() / (chances * (1 - chances) / 4000).sqrt()
    assert error[chances > 0.002].max() < 5


@pytest.mark.parametrize("layers", ["all", "late"])
def test_concept_influence_is_an_inner_product_with_autograds_gradient(layers: str) -> None:
    material = material_of(layers=layers)
    weights = list(material.weights.values())
    layer = {"all": MIDDLE, "late": 2}[layers]  # late are the parameters of layers 2 and 3
    chosen, rejected = (
        of_side[layer].astype(np.float64).mean(0) for of_side in material.pair_states
    )
    vector = torch.tensor((chosen - rejected) / np.linalg.norm(chosen - rejected))
    total = torch.zeros(())
    for weight in weights:
        weight.requires_grad_(True)
    for row in material.pairs.chosen:
        network: Any = material.model.network
        output = list[Tensor]()
        hook = network.model.layers[layer].register_forward_hook(
            lambda block, inputs, found, output=output: output.append(found)
        )
        network(input_ids=torch.tensor([row.tokens]))
        hook.remove()
        counted = torch.tensor([False, *row.supervised[1:]])
        total = total + output[0][0, counted].mean(0).double() @ vector
    parts = torch.autograd.grad(total / len(PAIRS), weights, allow_unused=True)
    for weight in weights:
        weight.requires_grad_(False)
    direction = torch.cat(
        [
            (torch.zeros_like(weight) if part is None else part).flatten()
            for part, weight in zip(parts, weights, strict=True)
        ]
    ).double()
    wanted = [float(gradient(material, row) @ direction) for row in material.rows]
    assert close(ranked("concept-influence", material), wanted)


def pair_weights(material: Material, name: str) -> list[tuple[float, float]]:
    """Of the chosen and of the rejected answer of each pair."""
    gaps = [
        loss(material, no) - loss(material, yes) for yes, no in zip(*material.pairs, strict=True)
    ]
    if name in ("hard", "first-order"):
        sign = 1 if name == "hard" else -1
        return [(1 / (1 + math.exp(sign * gap)),) * 2 for gap in gaps]
    return [(1.0, 1.0 if name == "uniform" else 0.0)] * len(gaps)


@pytest.mark.parametrize("layers", ["all", "late"])
@pytest.mark.parametrize("name", ["first-order", "uniform", "hard", "unpaired"])
def test_other_weightings_are_inner_products_with_autograds_direction(
    name: str, layers: str
) -> None:
    material = material_of(layers=layers)
    parts = [
        up * gradient(material, yes, mean=True) - down * gradient(material, no, mean=True)
        for yes, no, (up, down) in zip(*material.pairs, pair_weights(material, name), strict=True)
    ]
    direction = torch.stack(parts).mean(0)
    assert close(
        ranked(name, material),
        [float(gradient(material, row) @ direction) for row in material.rows],
    )


@pytest.mark.parametrize("layers", ["all", "late"])
def test_less_is_the_cosine_of_autograds_gradients(layers: str) -> None:
    material = material_of(layers=layers)
    target = torch.stack([gradient(material, row, mean=True) for row in material.pairs[0]]).mean(0)
    own = [gradient(material, row) for row in material.rows]
    numbers = ranked("less", material)
    assert close(numbers, [float(each @ target / each.norm() / target.norm()) for each in own])
    assert np.abs(numbers).max() <= 1


def test_probe_and_score_weigh_alike() -> None:
    scores = np.square(np.arange(len(ROWS), dtype=np.float64))
    material = material_of()
    parts = [ranked("probe", material), scores]
    wanted = sum((part - part.mean()) / part.std() for part in parts)
    assert close(ranked("probe-and-score", material), np.asarray(wanted).tolist())
    moved = replace(material, scores=7 + 3 * scores)
    assert close(ranked("probe-and-score", moved), np.asarray(wanted).tolist())


def test_contrast_is_between_the_means_of_two_groups_of_any_size() -> None:
    whole = material_of()
    material = replace(whole, pairs=EncodedPairs(whole.pairs[0], whole.pairs[1][:2]))
    chosen, rejected = (
        torch.stack([gradient(material, row) for row in rows]).mean(0) for rows in material.pairs
    )
    wanted = [float(gradient(material, row) @ (chosen - rejected)) for row in material.rows]
    assert close(ranked("contrast", material), wanted)
    assert not close(ranked("uniform", whole), ranked("contrast", whole).tolist()), (
        "it sums over tokens"
    )


@pytest.mark.parametrize("name", BASELINES)
def test_a_baseline_says_the_same_twice_of_every_row_and_leaves_the_model_as_it_was(
    name: str,
) -> None:
    material = replace(material_of())
    before = {key: value.clone() for key, value in material.model.network.state_dict().items()}
    numbers = ranked(name, material)
    assert (
        numbers.shape == (len(ROWS),) and numbers.dtype == np.float64 and np.isfinite(numbers).all()
    )
    assert (ranked(name, replace(material)) == numbers).all()
    after = material.model.network.state_dict()
    assert all(torch.equal(value, after[key]) for key, value in before.items())
    assert not any(
        weight.requires_grad or weight.grad is not None for weight in material.weights.values()
    )
    assert not any(module._forward_hooks for module in material.model.network.modules())


class Counting:
    """A model that counts the rows it reads."""

    def __init__(self, model: Any) -> None:
        self.network, self.vocabulary, self.model, self.read = (
            model.network,
            model.vocabulary,
            model,
            0,
        )
        self.logits: Callable[[Tensor], Tensor] = model.logits

    def hidden(self, batch: Batch) -> Tensor:
        self.read += len(batch)
        return torch.as_tensor(self.model.hidden(batch))


def test_ifd_of_an_answer_that_the_model_is_sure_of_is_nothing() -> None:
    model, row = (
        Counting(material_of().model),
        Encoded([0, 9, 5, 5], [False, False, True, True], False),
    )
    model.logits = lambda hidden: 1e4 * torch.eye(model.vocabulary)[5].expand(len(hidden), -1)
    material = replace(material_of(), model=model, rows=[row])
    assert ranked("loss-top", material).tolist() == [0] and np.isnan(ranked("ifd", material)).all()


def test_baselines_that_only_read_share_one_pass_over_the_pool() -> None:
    model = Counting(material_of().model)
    material = replace(material_of(), model=model)
    for name, more in {
        "loss-top": len(ROWS),
        "loss-mid": 0,
        "ifd": len(ROWS),
        "rds": len(PAIRS),
        "probe": len(ROWS) + 2 * len(PAIRS),
        "vector-filter": 0,
        "projection-difference": len(ROWS),
        "concept-influence": 1 + len(PAIRS) + len(ROWS),
    }.items():
        before = model.read
        ranked(name, material)
        assert model.read - before == more, name


def test_baselines_of_counts_need_neither_texts_nor_a_model() -> None:
    tokens = np.array([3, 1, 2])
    for name in COUNT_BASELINES:
        texts = texts_of(["xxx", "x", "xx"], sources=["a", "b", "a"], seed=5)
        assert (count_ranking(name, ["a", "b", "a"], tokens, 5) == ranked(name, texts)).all()
        assert not BASELINES[name].target
