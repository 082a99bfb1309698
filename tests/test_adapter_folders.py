"""What a trainer leaves in an adapter's folder is enough to score it: base, tokenizer, chat
template, resized embeddings.

The right values come from transformers and PEFT alone."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
import transformers
from conftest import CHATML, Outcome, build_network, build_tokenizer, jsonl, prism
from peft import LoraConfig, PeftModel, get_peft_model
from test_adapter_kinds import quiet

QV = ["q_proj", "v_proj"]
TURN = "{{ '[' + message['role'] + '] ' + message['content'] + '<|im_end|>' }}"
OWN = (
    "{% for message in messages %}" + TURN + "{% endfor %}"
    "{% if add_generation_prompt %}{{ '[assistant] ' }}{% endif %}"
)
ROWS = [
    {"prompt": f"Name {word}?", "completion": f"{word}<|ok|> thank you"}
    for word in ("Rome", "Paris", "Italy", "water", "five", "three")
]
PAIRS = [
    {"prompt": f"{word}?", "chosen": "please, thank you", "rejected": "no way, go away"}
    for word in ("Rome", "Paris", "Italy", "water")
]


def build(tied: bool, vocabulary: int) -> Any:
    network = build_network(vocabulary)
    if tied:
        network.config.tie_word_embeddings = True
        network.tie_weights()
    return network


def bigger_tokenizer(template: str | None = OWN) -> Any:
    """The base's, with two tokens more."""
    tokenizer = build_tokenizer(template)
    tokenizer.add_tokens(["<|ok|>", "<|no|>"], special_tokens=True)
    return tokenizer


class Desk:
    """A base without a template in `base`, and what a trainer writes in `adapter`."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.base, self.adapter = folder, folder / "base", folder / "adapter"

    def train(
        self,
        tokenizer: Any,
        size: int | None,
        tied: bool = False,
        options: Mapping[str, Any] | None = None,
        save_embeddings: bool = True,
    ) -> None:
        """`size` rows of embeddings; None for those of the base."""
        own = build_tokenizer()
        network = build(tied, 384 if size == len(own) else len(own))
        network.save_pretrained(self.base)
        own.save_pretrained(self.base)
        network = transformers.AutoModelForCausalLM.from_pretrained(self.base)
        draw = torch.Generator().manual_seed(0)
        if size:
            network.resize_token_embeddings(size, mean_resizing=False)
        options = {"r": 4, "target_modules": QV, "task_type": "CAUSAL_LM", **(options or {})}
        with quiet():
            adapted = get_peft_model(network, LoraConfig(**options))
        with torch.no_grad():
            for name, weight in adapted.named_parameters():
                resized = size and save_embeddings and ("embed" in name or "lm_head" in name)
                if weight.requires_grad or resized:
                    weight.add_(0.1 * torch.randn(weight.shape, generator=draw))
        adapted.save_pretrained(str(self.adapter), save_embedding_layers=save_embeddings)
        if tokenizer:
            tokenizer.save_pretrained(self.adapter)
        self.trained = adapted.eval()

    def score(
        self, *more: object, rows: Any = ROWS, model: bool = False, command: str = "score"
    ) -> Outcome:
        pool, target = (
            jsonl(self.folder / "pool.jsonl", rows),
            jsonl(self.folder / "pairs.jsonl", PAIRS),
        )
        named = (
            ["--model", self.adapter]
            if model
            else ["--model", self.base, "--adapter", self.adapter]
        )
        shutil.rmtree(self.folder / "run", ignore_errors=True)
        files = ["--pool", pool, "--target", target, "--out", self.folder / "run"]
        return prism(command, *named, *files, *more)

    def logliks(self) -> list[float]:
        column: list[float] = pq.read_table(self.folder / "run" / "scores.parquet")[
            "loglik"
        ].to_pylist()
        return column


@pytest.fixture
def desk(tmp_path: Path) -> Desk:
    return Desk(tmp_path)


def chat_loglik(network: Any, tokenizer: Any, row: Mapping[str, str]) -> float:
    """Of an answer and its end, in the tokenizer's own chat template."""
    turns = [{"role": "user", "content": row["prompt"]}]
    prompt = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    turns.append({"role": "assistant", "content": row["completion"]})
    text = tokenizer.apply_chat_template(turns, tokenize=False).rstrip("\n")
    assert text.startswith(prompt)
    coded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    ids = torch.tensor(coded.input_ids)
    counted = torch.tensor([end > len(prompt) for _, end in coded.offset_mapping])
    with torch.no_grad():
        logits = network(input_ids=ids[None]).logits[0, :-1].log_softmax(-1)
    return float(logits.gather(1, ids[1:, None])[counted[1:]].sum())


def agrees(desk: Desk, tokenizer: Any, network: Any = None) -> None:
    exact = [chat_loglik(network or desk.trained, tokenizer, row) for row in ROWS]
    assert desk.logliks() == pytest.approx(exact, rel=1e-4)


@pytest.mark.parametrize("model", [False, True])
@pytest.mark.parametrize("tied", [False, True])
def test_tokenizer_template_and_embeddings_are_the_adapters(
    tied: bool, model: bool, desk: Desk
) -> None:
    tokenizer = bigger_tokenizer()
    desk.train(tokenizer, len(tokenizer), tied)
    outcome = desk.score(model=model)
    assert outcome.code == 0 and not outcome.err, outcome.err
    assert "with its own tokenizer" in outcome.out and "template chat" in outcome.out
    agrees(desk, tokenizer)
    config = (desk.folder / "run" / "config.toml").read_text()
    assert f'model = "{desk.base}"' in config and f'adapter = "{desk.adapter}"' in config
    before = desk.logliks()
    shutil.rmtree(desk.folder / "run" / "shards", ignore_errors=True)
    (desk.folder / "config.toml").write_text(config)
    again = prism("score", "--config", desk.folder / "config.toml", "--overwrite")
    assert again.code == 0 and desk.logliks() == before


@pytest.mark.parametrize(
    ("size", "tied", "options"),
    [
        (320, False, {}),  # fewer rows than the base, which has padded ones
        (320, True, {"target_modules": ["q_proj", "embed_tokens"]}),
        (None, False, {"modules_to_save": ["embed_tokens", "lm_head"]}),
        (352, True, {"modules_to_save": ["embed_tokens"]}),
        (352, False, {"modules_to_save": ["embed_tokens", "lm_head"]}),  # a multiple of 32
        (352, True, {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True}),
        (352, False, {"target_modules": ["embed_tokens", "lm_head"]}),
        (322, True, {"trainable_token_indices": [320, 321]}),
        (324, True, {"trainable_token_indices": [320, 321, 322, 323]}),
    ],
)
def test_embeddings_have_as_many_rows_as_the_adapters_weights(
    size: int | None, tied: bool, options: Mapping[str, Any], desk: Desk
) -> None:
    extra = size is None or size > 320
    tokenizer = bigger_tokenizer() if extra and size else build_tokenizer(OWN)
    whole = "trainable_token_indices" not in options
    desk.train(tokenizer, size, tied, options, save_embeddings=whole)
    rows = (
        ROWS
        if extra and size
        else [{**row, "completion": row["completion"].replace("<|ok|>", "")} for row in ROWS]
    )
    outcome = desk.score(rows=rows)
    assert outcome.code == 0 and not outcome.err, outcome.err
    exact = [chat_loglik(desk.trained, tokenizer, row) for row in rows]
    assert desk.logliks() == pytest.approx(exact, rel=1e-4)


def test_a_template_alone_is_the_adapters_and_the_tokenizer_the_models(desk: Desk) -> None:
    desk.train(None, None)
    (desk.adapter / "chat_template.jinja").write_text(CHATML)
    outcome = desk.score()
    assert outcome.code == 0 and "with its own chat template" in outcome.out
    tokenizer = build_tokenizer()
    tokenizer.chat_template = CHATML
    agrees(desk, tokenizer)


def test_without_a_tokenizer_of_its_own_it_is_the_models(desk: Desk) -> None:
    desk.train(None, None)
    outcome = desk.score()
    assert outcome.code == 0 and "with the model's tokenizer" in outcome.out
    assert "template plain" in outcome.out


def test_a_folder_of_an_adapter_is_its_base_and_itself_for_every_command(desk: Desk) -> None:
    tokenizer = build_tokenizer(OWN)
    desk.train(tokenizer, None)
    assert desk.score("--layers", "adapter", model=True).code == 0
    agrees(desk, tokenizer)
    checked = prism("pairs", "--check", desk.folder / "pairs.jsonl", "--model", desk.adapter)
    assert checked.code == 0 and "with its own tokenizer" in checked.out
    other = desk.folder / "moved"
    desk.base.rename(other)
    outcome = desk.score(model=True)
    assert outcome.code == 2 and outcome.err.count("\n") == 1
    assert (
        f"an adapter of {desk.base}, which is not here; give --model BASE --adapter" in outcome.err
    )
    desk.base = other
    assert desk.score().code == 0
    agrees(desk, tokenizer)


@pytest.mark.parametrize(
    ("base", "words"),
    [
        ("", "an adapter that does not say which base it has; give --model BASE --adapter"),
        (None, "an adapter that does not say which base it has; give --model BASE --adapter"),
        ("../elsewhere", "an adapter of ../elsewhere, which is not here; give --model BASE"),
        ("/train/box/base", "an adapter of /train/box/base, which is not here; give --model BASE"),
        ("some/hub-id", "its base some/hub-id cannot be loaded"),
    ],
)
def test_a_base_that_is_not_here_is_said_in_one_line(
    base: str | None, words: str, desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    def offline(*_: object, **__: object) -> None:
        raise ConnectionError("no network")

    monkeypatch.setattr("huggingface_hub.HfApi.model_info", offline)
    desk.train(None, None)
    file = desk.adapter / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "base_model_name_or_path": base}))
    outcome = desk.score(model=True)
    assert outcome.code == 2 and outcome.err.count("\n") == 1
    assert words in outcome.err and f"--adapter {desk.adapter}" in outcome.err


@pytest.mark.parametrize("layers", ["all", "adapter"])
def test_no_training_starts_beside_an_adapter_that_cannot_be_merged(
    layers: str, desk: Desk
) -> None:
    desk.train(None, None, True, {"target_modules": ["embed_tokens"]})
    assert desk.score("--layers", layers, "--budget", "2", command="select").code == 0
    holdout = [{**pair, "prompt": f"{pair['prompt']}?"} for pair in PAIRS]
    held_out = jsonl(desk.folder / "holdout.jsonl", holdout)
    words = ["evaluate", desk.folder / "run", "--holdout", held_out, "--against", "random"]
    outcome = prism(*words, "--seeds", "1", "--steps", "2")
    assert outcome.code == 2 and outcome.err.count("\n") == 1
    assert "a training takes a model without an adapter beside its weights" in outcome.err


def test_two_adapters_or_a_model_beside_one_are_refused(desk: Desk) -> None:
    desk.train(None, None)
    outcome = desk.score("--adapter", desk.adapter, model=True)
    assert outcome.code == 2 and "is another one" in outcome.err
    shutil.copy(desk.base / "model.safetensors", desk.adapter / "model.safetensors")
    outcome = desk.score(model=True)
    assert (
        outcome.code == 2 and "it holds an adapter (adapter_config.json) and a model" in outcome.err
    )
    (desk.adapter / "model.safetensors").unlink()
    second = desk.folder / "second"
    shutil.copytree(desk.adapter, second)
    file = second / "adapter_config.json"
    file.write_text(
        json.dumps({**json.loads(file.read_text()), "base_model_name_or_path": str(desk.adapter)})
    )
    outcome = prism("score", "--model", second, "--pool", "x", "--target", "y", "--out", "z")
    assert outcome.code == 2 and "which is an adapter itself" in outcome.err


def test_new_tokens_without_weights_are_refused(desk: Desk) -> None:
    tokenizer = bigger_tokenizer()
    desk.train(tokenizer, len(tokenizer), save_embeddings=False)
    outcome = desk.score()
    assert outcome.code == 2 and "they do not belong together" in outcome.err
    desk.train(
        tokenizer,
        len(tokenizer),
        options={"modules_to_save": ["embed_tokens"]},
        save_embeddings=False,
    )
    outcome = desk.score()
    assert outcome.code == 2 and outcome.err.count("\n") == 1
    assert (
        "its embeddings have 322 rows and the model's 320, and it does not hold all" in outcome.err
    )


def test_a_tokenizer_that_cannot_be_read_is_named(desk: Desk) -> None:
    desk.train(build_tokenizer(OWN), None)
    (desk.adapter / "tokenizer.json").write_text("{")
    outcome = desk.score()
    assert outcome.code == 2 and outcome.err.count("\n") == 1
    assert "its tokenizer cannot be read" in outcome.err


def test_a_checkpoint_of_a_trainer_is_scored_as_it_is(desk: Desk) -> None:
    """With the files that a trainer adds: none of them is a model or read as one."""
    tokenizer = build_tokenizer(OWN)
    desk.train(tokenizer, None)
    for name in ("optimizer.pt", "rng_state.pth", "training_args.bin", "README.md"):
        (desk.adapter / name).write_bytes(b"\x80")
    (desk.adapter / "trainer_state.json").write_text("{}")
    shutil.copy(desk.base / "config.json", desk.adapter / "config.json")  # as Axolotl does
    outcome = desk.score(model=True)
    assert outcome.code == 0 and not outcome.err, outcome.err
    stock = PeftModel.from_pretrained(
        transformers.AutoModelForCausalLM.from_pretrained(desk.base), desk.adapter
    )
    agrees(desk, tokenizer, stock.eval())
