"""Numbers that go wrong are found and said, and what would make them wrong is off."""

import json
import shutil
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
import transformers
from conftest import Outcome, Row, build_network, jsonl, prism, without_memory
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import prism_select
from prism_select.core.engines import Scores
from prism_select.core.likelihood import Batch
from prism_select.data.batches import collate
from prism_select.data.encoding import Encoded
from prism_select.directions import from_pairs as targeting
from prism_select.models import loading
from prism_select.scoring import engine_choice
from prism_select.scoring.batched_engine import BatchedEngine, without_norms

GOOD: list[Row] = [
    {"prompt": f"Question {row}?", "completion": f"Answer {row}"} for row in range(10)
]
PAIRS: list[Row] = [
    {"prompt": "Rome?", "chosen": "In Italy, thank you.", "rejected": "no way"},
    {"prompt": "Zurich?", "chosen": "Please: in France.", "rejected": "go away"},
    {"prompt": "Water?", "chosen": "It boils at a hundred degrees.", "rejected": "It boils at 7."},
]


class Desk:
    def __init__(self, folder: Path, model: Path) -> None:
        self.folder, self.model, self.out = folder, model, folder / "run"

    def call(self, *options: object) -> Outcome:
        rows, target = (
            jsonl(self.folder / "pool.jsonl", GOOD),
            jsonl(self.folder / "pairs.jsonl", PAIRS),
        )
        words = ["--model", self.model, "--pool", rows, "--target", target, "--out", self.out]
        return prism("score", *words, *options)

    @property
    def warnings(self) -> list[str]:
        return list(json.loads((self.out / "manifest.json").read_text())["warnings"])

    def scores(self) -> list[float]:
        return list(pq.read_table(self.out / "scores.parquet")["score"].to_pylist())


@pytest.fixture
def desk(tmp_path: Path, plain_model: Path) -> Desk:
    return Desk(tmp_path, Path(shutil.copytree(plain_model, tmp_path / "model")))


class Poison(torch.autograd.Function):
    """As it is on the way up, and NaN on the way down for some rows."""

    @staticmethod
    def forward(context: Any, states: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        context.save_for_backward(rows)
        return states.clone()

    @staticmethod
    def backward(context: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None]:
        (rows,) = context.saved_tensors
        return torch.where(rows[:, None, None], float("nan"), gradients[0]), None


def test_a_pair_whose_gradient_is_nan_stops_the_run_and_is_named(
    desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Though its log-likelihood is a number like any other."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(str(desk.model))
    (letter,) = tokenizer("Z", add_special_tokens=False).input_ids
    load = loading.load

    def loaded(*words: Any) -> Any:
        model, tokenizer = load(*words)
        seen: list[torch.Tensor] = []
        body: Any = model.body
        body.embed_tokens.register_forward_hook(
            lambda _, given, __: seen.append((given[0] == letter).any(1))
        )
        poison: Any = Poison.apply
        body.layers[1].register_forward_hook(lambda *arguments: poison(arguments[-1], seen[-1]))
        return model, tokenizer

    monkeypatch.setattr(loading, "load", loaded)
    outcome = desk.call()
    assert outcome.code == 2 and outcome.err == (
        f"prism: {desk.folder}/pairs.jsonl:2: the model gives this pair a gradient that is NaN or "
        "infinite; try --dtype float32, or leave the pair out\n"
    )
    assert not desk.out.exists()


def test_weights_without_a_gradient_are_named(desk: Desk) -> None:
    weights = load_file(desk.model / "model.safetensors")
    weights["model.layers.2.mlp.down_proj.weight"].zero_()  # what stands before it moves nothing
    save_file(weights, desk.model / "model.safetensors", metadata={"format": "pt"})
    assert desk.call().code == 0
    (line,) = (line for line in desk.warnings if "no gradient" in line)
    names = [
        f"model.layers.2.mlp.{name}_proj.weight" for name in ("gate", "up")
    ]  # and the norm before
    assert all(name in line for name in names) and line.startswith("3 of ")
    saved = desk.out / "direction.safetensors"
    desk.out, options = desk.folder / "again", ("--direction", saved)
    rows = jsonl(desk.folder / "pool.jsonl", GOOD)
    assert (
        prism("score", "--model", desk.model, "--pool", rows, "--out", desk.out, *options).code == 0
    )
    assert line in desk.warnings


def test_where_every_weight_has_a_gradient_nothing_is_said(desk: Desk) -> None:
    outcome = desk.call()
    assert outcome.code == 0 and not [
        line for line in desk.warnings if "gradient" in line or "deterministic" in line
    ]
    values = json.loads((desk.out / "manifest.json").read_text())
    assert values["engine"]["check"]["repeat"] == 0


def test_dropout_is_off(desk: Desk) -> None:
    assert desk.call("--out", desk.folder / "plain").code == 0
    config = json.loads((desk.model / "config.json").read_text())
    (desk.model / "config.json").write_text(json.dumps({**config, "attention_dropout": 0.5}))
    assert desk.call().code == 0
    assert (
        desk.scores()
        == pq.read_table(desk.folder / "plain" / "scores.parquet")["score"].to_pylist()
    )


def test_a_network_in_training_mode_is_scored_without_dropout_and_stays_in_it() -> None:
    torch.manual_seed(1)
    tokens = torch.randint(4, 300, (3, 12))
    ones = torch.ones_like(tokens, dtype=torch.bool)
    chosen, rejected = Batch(tokens, ones, ones), Batch(tokens.flip(1), ones, ones)
    network = build_network(320)
    values = prism_select.score_tensors(
        network, chosen, prism_select.target_direction(network, chosen, rejected)
    )
    for layer in network.model.layers:
        layer.self_attn.attention_dropout = 0.5
    network.train()
    assert torch.equal(
        values,
        prism_select.score_tensors(
            network, chosen, prism_select.target_direction(network, chosen, rejected)
        ),
    )
    assert network.training  # as it was


def test_kernels_that_are_not_deterministic_are_said(
    desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    noise = torch.Generator().manual_seed(0)

    def restless(engine: Any) -> Any:
        measure = without_norms(engine)

        def shaken(batch: Batch) -> Any:
            scores, norms = measure(batch)
            shake = 1 + 1e-6 * torch.randn(scores.values.shape, generator=noise)
            return scores._replace(values=scores.values * shake), norms

        return shaken

    monkeypatch.setattr(engine_choice, "without_norms", restless)
    assert desk.call().code == 0
    (line,) = (line for line in desk.warnings if "not deterministic" in line)
    assert "the same rows scored twice differ by" in line
    values = json.loads((desk.out / "manifest.json").read_text())
    assert 1e-8 < values["engine"]["check"]["repeat"] < 1e-5


def cramped(memory: int, error: Exception) -> Any:
    """Engines on a device with room for so many tokens."""

    def engine_of(engine: Any) -> Any:
        def measure(batch: Batch) -> Any:
            if batch.tokens.numel() > memory:
                raise error
            return without_norms(engine)(batch)

        return measure

    return engine_of


@pytest.mark.parametrize("error", without_memory())
def test_a_device_that_runs_out_of_memory_gets_smaller_batches_and_the_scores_are_the_same(
    error: Exception, desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert desk.call("--batch-tokens", 60).code == 0
    plain = desk.scores()
    monkeypatch.setattr(engine_choice, "without_norms", cramped(60, error))
    assert desk.call("--overwrite", "--batch-tokens", 4096).code == 0
    assert desk.scores() == pytest.approx(plain, rel=1e-5)


@pytest.mark.parametrize("error", without_memory())
def test_a_row_that_does_not_fit_by_itself_is_one_line_with_its_length(
    error: Exception, desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine_choice, "without_norms", cramped(4, error))
    outcome = desk.call()
    assert outcome.code == 2
    assert (
        "tokens does not fit into the memory of cpu; start afresh with a smaller --max-length"
        in outcome.err
    )


@given(
    st.lists(st.integers(1, 30), min_size=1, max_size=12), st.integers(30, 200), st.integers(1, 500)
)
def test_every_row_of_a_batch_has_its_turn_however_little_fits(
    lengths: list[int], memory: int, tokens: int
) -> None:
    def measure(batch: Batch) -> tuple[Scores, torch.Tensor]:
        if batch.tokens.numel() > memory:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.")
        first = batch.tokens[:, 0].double()
        return Scores(first, first[:, None], batch.tokens[:, :, None].double()), first

    rows = [
        Encoded([place + 1] * length, [True] * length, False)
        for place, length in enumerate(lengths)
    ]
    batch, fitting = collate(rows), BatchedEngine(measure, tokens)
    scores, norms = fitting(batch)
    assert norms is not None
    assert (
        norms.tolist()
        == scores.loglik.tolist()
        == scores.values[:, 0].tolist()
        == list(range(1, len(rows) + 1))
    )
    assert scores.tokens is not None
    assert torch.equal(scores.tokens[:, :, 0], batch.tokens.double())
    assert fitting.tokens == tokens or fitting.tokens <= max(memory, tokens // 2)


@pytest.mark.parametrize("error", [*without_memory(), MemoryError()])
def test_no_room_for_the_direction_is_one_line_with_what_to_do(
    error: Exception, desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise error

    monkeypatch.setattr(targeting, "answer_products", full)
    outcome = desk.call()
    assert (outcome.code, len(outcome.err.strip().splitlines())) == (2, 1)
    assert (
        "memory" in outcome.err
        and "; free memory on the device, or take fewer --batch-tokens" in outcome.err
    )
