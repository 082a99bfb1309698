"""What a model says of itself is seen: how long its texts may be, and whether its weights are
numbers that have a gradient."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
import transformers
from conftest import build_network, build_tokenizer, jsonl, prism, save_model
from torch import nn

import prism_select
from prism_select.models.loading import longest_row
from prism_select.run.errors import BadModel

TEXT = dict(
    vocab_size=320,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
)
ROWS = [{"prompt": "Rome?", "completion": "very " * count} for count in (3, 40, 120, 200)]
PAIRS = [{"prompt": "Rome?", "chosen": "please, thank you", "rejected": "no way, go away"}]


def files(folder: Path) -> list[object]:
    pool, target = jsonl(folder / "pool.jsonl", ROWS), jsonl(folder / "pairs.jsonl", PAIRS)
    return ["--pool", pool, "--target", target, "--out", folder / "run"]


@pytest.mark.parametrize(
    ("config", "longest"),
    [
        (lambda: transformers.LlamaConfig(**TEXT, max_position_embeddings=96), 96),
        (lambda: transformers.GPT2Config(n_positions=77), 77),
        (lambda: transformers.MptConfig(max_seq_len=55), 55),
        (lambda: transformers.BloomConfig(), None),
        (
            lambda: transformers.LlavaConfig(
                text_config=transformers.LlamaConfig(**TEXT, max_position_embeddings=256)
            ),
            256,
        ),
        (
            lambda: transformers.Gemma3Config(
                text_config=transformers.Gemma3TextConfig(**TEXT, max_position_embeddings=128)
            ),
            128,
        ),
        (
            lambda: transformers.Qwen2_5_VLConfig(
                text_config={**TEXT, "max_position_embeddings": 64}
            ),
            64,
        ),
        (
            lambda: transformers.Mistral3Config(
                text_config=transformers.MistralConfig(**TEXT, max_position_embeddings=48)
            ),
            48,
        ),
    ],
)
def test_the_longest_text_is_that_of_the_model_for_texts(
    config: Callable[[], Any], longest: int | None
) -> None:
    assert longest_row(config()) == longest


def test_rows_are_truncated_to_what_the_text_model_of_a_vision_model_takes(tmp_path: Path) -> None:
    tokenizer = build_tokenizer()
    text = transformers.Gemma3TextConfig(
        **TEXT,
        head_dim=8,
        max_position_embeddings=64,
        layer_types=["full_attention"] * 2,
    )
    vision = transformers.SiglipVisionConfig(
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        image_size=28,
        patch_size=14,
    )
    torch.manual_seed(0)
    config = transformers.Gemma3Config(
        text_config=text, vision_config=vision, mm_tokens_per_image=4, image_token_index=319
    )
    model = tmp_path / "model"
    transformers.Gemma3ForConditionalGeneration(config).save_pretrained(model)
    tokenizer.save_pretrained(model)
    outcome = prism("score", "--model", model, *files(tmp_path))
    assert outcome.code == 0 and "at most 64 tokens a row" in outcome.out, outcome.err
    table = pq.read_table(tmp_path / "run" / "scores.parquet")
    exact = [len(tokenizer(f"{row['prompt']}\n{row['completion']}</s>").input_ids) for row in ROWS]
    assert table["length"].to_pylist() == [min(64, length) for length in exact]
    assert table["truncated"].to_pylist() == [length > 64 for length in exact]


@pytest.mark.parametrize(
    ("quantization", "name"),
    [
        ({"quant_method": "bitsandbytes"}, "bitsandbytes"),
        ({"quant_method": "gptq", "bits": 4}, "gptq"),
        ({"quant_method": "awq", "bits": 4}, "awq"),
        ({"quant_method": "fp8"}, "fp8"),
    ],
)
def test_a_folder_with_quantised_weights_is_refused_in_one_line(
    quantization: dict[str, Any], name: str, tmp_path: Path
) -> None:
    model = save_model(tmp_path / "model")
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "quantization_config": quantization}))
    outcome = prism("score", "--model", model, *files(tmp_path))
    assert outcome.code == 2 and outcome.err.count("\n") == 1
    assert f"its weights are quantised ({name}), and have no gradient" in outcome.err


@pytest.mark.parametrize("bits", [8, 4])
def test_a_folder_that_names_bitsandbytes_and_holds_whole_numbers_is_refused(
    bits: int, tmp_path: Path
) -> None:
    model = save_model(tmp_path / "model")
    config = json.loads((model / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes", f"load_in_{bits}bit": True}
    (model / "config.json").write_text(json.dumps(config))
    outcome = prism("score", "--model", model, *files(tmp_path))
    assert outcome.code == 2 and outcome.err.count("\n") == 1
    assert f"--model {model}: model.layers.0.self_attn.q_proj should be packed" in outcome.err


class Packed(nn.Linear):
    """As a library of quantised layers makes one: whole numbers that stand for the weight."""

    def __init__(self, layer: nn.Linear, dtype: torch.dtype) -> None:
        super().__init__(layer.in_features, layer.out_features, bias=False)
        packed = torch.zeros(layer.weight.shape).to(dtype)
        self.weight = nn.Parameter(packed, requires_grad=False)


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.float8_e4m3fn])
def test_a_loaded_model_with_quantised_weights_is_refused(
    dtype: torch.dtype, tmp_path: Path
) -> None:
    tokenizer = build_tokenizer()
    network = build_network(len(tokenizer))
    for block in network.model.layers:
        block.mlp.up_proj = Packed(block.mlp.up_proj, dtype)
    with pytest.raises(BadModel, match=r"4 of its weights, .*up_proj.weight say, are quantised"):
        prism_select.score(
            network, pool=ROWS, target=PAIRS, tokenizer=tokenizer, out=tmp_path / "run"
        )
