"""A plan without weights: bytes by hand, bytes of a real run, and what a folder must hold."""

import json
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from conftest import CHATML, PEAK, build_network, build_tokenizer, jsonl, prism, prism_apart
from safetensors.torch import load_file

from prism_select import api
from prism_select.core.blocks import stack_of
from prism_select.core.dry_run import DryRun
from prism_select.core.engines import reverse
from prism_select.core.layers import Factored, Factors, Parameters
from prism_select.core.likelihood import Batch
from prism_select.demo.story import MODEL
from prism_select.directions import answer_products
from prism_select.models.causal_lm import CausalLM
from prism_select.models.layer_selection import select_parameters
from prism_select.models.without_weights import network_of, with_adapter_shapes
from prism_select.run.config import ScoreConfig
from prism_select.scoring.model_plan import (
    ModelPlan,
    _Trial,
    numbers_of,
    run_bytes,
    scoring_along,
    weight_bytes,
)

TINY = {
    "vocab_size": 300,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "tie_word_embeddings": False,
    "dtype": "float32",
}
LLAMA_70B = {
    **TINY,
    "model_type": "llama",
    "vocab_size": 128256,
    "hidden_size": 8192,
    "intermediate_size": 28672,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "dtype": "bfloat16",
}
BLOCK = 64 * 64 * 2 + 64 * 32 * 2 + 64 * 96 * 3  # numbers of matrices: q and o, k and v, MLP
NORMS, EMBEDDING = 2 * 64, 300 * 64
ROWS, TOKENS = 4, 32


def network(**changes: Any) -> Any:
    return network_of(transformers.LlamaConfig(**{**TINY, **changes}))


# ---------------------------------------------------------------- bytes and operations by hand


def test_weights_are_their_numbers_times_the_bytes_of_the_dtype() -> None:
    numbers = 4 * (BLOCK + NORMS) + 64 + 2 * EMBEDDING  # a norm at the end; embedding and head
    assert weight_bytes(network()) == 4 * numbers
    assert weight_bytes(network(dtype="bfloat16")) == 2 * numbers
    tied = network(tie_word_embeddings=True)
    assert weight_bytes(tied) == 4 * (numbers - EMBEDDING)


def test_matrices_of_few_bits_are_those_of_the_blocks() -> None:
    rows = 64 + 32 + 32 + 64 + 96 + 96 + 64  # q k v o gate up down
    others = 2 * (4 * NORMS + 64 + 2 * EMBEDDING)
    half = network(dtype="bfloat16")
    assert weight_bytes(half, 8) == 4 * (BLOCK + 4 * rows) + others
    assert weight_bytes(half, 4) == 4 * (BLOCK // 2 + BLOCK // 64 * 4) + others
    from peft import LoraConfig

    added = with_adapter_shapes(half, LoraConfig(r=2, target_modules=["q_proj"]))
    assert weight_bytes(added, 4) == weight_bytes(network(dtype="bfloat16"), 4) + 4 * 2 * 2 * 128


def test_the_bundled_model_takes_what_its_file_holds() -> None:
    config = transformers.AutoConfig.from_pretrained(MODEL)
    tensors = load_file(Path(MODEL) / "model.safetensors").values()
    assert weight_bytes(network_of(config)) == sum(tensor.nbytes for tensor in tensors)


@pytest.mark.parametrize("rank", [4, None])
def test_operations_are_those_of_forward_backward_and_directions(rank: int | None) -> None:
    model = CausalLM(network())
    weights = select_parameters(model.network, "all")
    scoring = scoring_along(model, weights, (ROWS, TOKENS), rank)
    blocks, head = 4 * BLOCK, EMBEDDING
    sides = 4 * (64 + 64 + 2 * (64 + 32) + 64 + 64 + 3 * (64 + 96))  # rows and columns
    predicted = (TOKENS - 1) / TOKENS  # the head leaves the first token of a row out
    attention = 4 * (4 + 10) * TOKENS * 64  # of four blocks: two products, then five
    along = 2 * (blocks + 2 * predicted * head)  # formed once; in the head two tangents
    if rank:
        along = 2 * 2 * rank * (sides + predicted * (64 + 300) + 64)  # the last: looked up
    expected = 4 * (blocks + predicted * head) + attention + along
    assert scoring.operations == pytest.approx(expected, rel=1e-6)


def test_directions_take_their_numbers_in_the_dtype_and_in_float32_before() -> None:
    model = CausalLM(network(dtype="bfloat16"))
    weights = select_parameters(model.network, r"blocks|layers\.\d+\.mlp")
    full, low = (scoring_along(model, weights, (ROWS, TOKENS), rank) for rank in (None, 4))
    assert full.numbers == 2 * 4 * 3 * 64 * 96 and low.numbers == 2 * 4 * 3 * 4 * (64 + 96)
    assert full.direction_bytes == 2 * full.numbers and low.direction_bytes == 2 * low.numbers
    large = replace(full, batch_bytes=0)
    assert large.bytes == 6 * full.numbers and low.bytes == 2 * low.numbers + low.batch_bytes
    numbers = numbers_of(weights)
    assert run_bytes(weights, full) == 8 * numbers + full.direction_bytes + full.batch_bytes
    assert run_bytes(weights, full, targets=0) == run_bytes(weights, full)
    assert run_bytes(weights, full, targets=2) == run_bytes(weights, full) + 12 * numbers
    sketches = 4 * low.numbers * (4 + 16) // 4
    expected = sketches + low.direction_bytes + low.batch_bytes
    assert run_bytes(weights, full, low, rank=4) == expected


# ---------------------------------------------------------------- against what really happens

SMALL: dict[str, Any] = {
    "llama": transformers.LlamaConfig(**TINY),
    "gpt2": transformers.GPT2Config(
        vocab_size=300, n_embd=64, n_layer=4, n_head=4, bos_token_id=1, eos_token_id=2
    ),
    "gemma2": transformers.Gemma2Config(**{**TINY, "tie_word_embeddings": True}, head_dim=16),
    "qwen3-moe": transformers.Qwen3MoeConfig(
        **TINY, num_experts=8, moe_intermediate_size=32, num_experts_per_tok=2, head_dim=16
    ),
}


def directions_of(weights: Parameters, rank: int) -> Sequence[Factored]:
    """With factors for the matrices of the blocks."""

    def of(name: str, weight: torch.Tensor) -> torch.Tensor | Factors:
        if rank and weight.ndim == 2 and ("self_attn" in name or ".h." in name):
            return Factors(torch.ones(weight.shape[0], rank), torch.ones(rank, weight.shape[1]))
        return torch.ones(weight.shape)

    return [{n: of(n, w) for n, w in weights.items()} for _ in range(2)]


def batch_of_ones() -> Batch:
    real = torch.ones(ROWS, TOKENS, dtype=torch.bool)
    if real.device.type != "meta":
        real[0, -1] = False  # padding: a mask, as in the dry run
    return Batch(torch.zeros(ROWS, TOKENS, dtype=torch.long), real, real.clone())


@pytest.mark.parametrize("layers", ["all", "late"])
@pytest.mark.parametrize("rank", [0, 4])
@pytest.mark.parametrize("name", SMALL)
def test_a_dry_run_counts_what_a_run_on_numbers_holds(name: str, rank: int, layers: str) -> None:
    peaks = []
    for device in ("cpu", "meta"):
        torch.manual_seed(0)
        SMALL[name]._experts_implementation = "eager"
        with torch.device(device):
            made = transformers.AutoModelForCausalLM.from_config(SMALL[name], dtype=torch.float32)
            model = CausalLM(made)
            weights = select_parameters(model.network, layers)
            with DryRun(model.network.parameters()) as seen:
                engine = reverse(model, weights, directions_of(weights, rank))
                engine(batch_of_ones())
        peaks.append(seen.peak)
    assert peaks[1] == pytest.approx(peaks[0], rel=0.04)


@pytest.mark.parametrize("layers", ["all", "late", "last:1"])
@pytest.mark.parametrize("name", SMALL)
def test_blocks_alike_are_counted_as_all_of_them(name: str, layers: str) -> None:
    model = CausalLM(network_of(SMALL[name]))
    weights = select_parameters(model.network, layers)
    direction = {n: torch.empty(w.shape, device="meta") for n, w in weights.items()}
    trial = _Trial(model, weights, [direction, direction], (ROWS, TOKENS))
    assert trial.of_all_blocks() == trial.of_blocks(range(4))
    assert len(stack_of(model.network)[1]) == 4


def test_a_network_that_the_engine_cannot_follow_is_refused_in_one_line(
    place: Path, tmp_path: Path
) -> None:
    config = {"model_type": "mamba", "hidden_size": 32, "num_hidden_layers": 2, "vocab_size": 300}
    (tmp_path / "config.json").write_text(json.dumps(config))
    words = ["--pool", place / "pool.jsonl", "--target", place / "pairs.jsonl", "--dry-run"]
    told = prism("score", "--model", tmp_path, *words)
    assert told.code == 2 and told.err.count("\n") == 1
    assert "MambaForCausalLM: it cannot be planned without its weights (engine reverse" in told.err


def test_factors_are_never_multiplied_out_all_at_once() -> None:
    made = network_of(transformers.LlamaConfig(**{**TINY, "num_hidden_layers": 24}))
    model = CausalLM(made)
    weights = select_parameters(made, r"layers")
    with torch.device("meta"), DryRun(made.parameters()) as seen:
        low = [
            {
                n: Factors(torch.empty(w.shape[0], 1), torch.empty(1, w.shape[1]))
                for n, w in weights.items()
                if w.ndim == 2
            }
        ]
        reverse(model, weights, low)
    assert seen.peak < numbers_of(weights)  # float32 of all would be four times as much


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with weights, one with its configuration and tokenizer, and one with its
    configuration alone; a pool and pairs."""
    folder = tmp_path_factory.mktemp("plan")
    tokenizer = build_tokenizer(CHATML)
    build_network(len(tokenizer)).save_pretrained(folder / "whole")
    tokenizer.save_pretrained(folder / "whole")
    weights = shutil.ignore_patterns("*.safetensors")
    shutil.copytree(folder / "whole", folder / "shapes", ignore=weights)
    (folder / "bare").mkdir()
    shutil.copy(folder / "whole" / "config.json", folder / "bare")
    rows = [
        {"prompt": f"{n:02} plus 3? " * 8, "completion": f"{n:02}, then 3" * 4} for n in range(48)
    ]
    jsonl(folder / "pool.jsonl", rows)
    pairs = [{"prompt": f"{n} plus one?", "chosen": f"{n + 1}", "rejected": "no"} for n in range(5)]
    jsonl(folder / "pairs.jsonl", pairs)
    return folder


def plan(place: Path, model: str, **options: Any) -> Any:
    files = {"pool": (str(place / "pool.jsonl"),), "target": (str(place / "pairs.jsonl"),)}
    return api.plan(
        ScoreConfig(model=str(place / model), out=str(place / "run"), **{**files, **options})
    )


@pytest.mark.parametrize("options", [{"layers": "late"}, {"layers": "last:1", "rank": 2}])
def test_a_whole_run_holds_what_was_planned(
    tmp_path: Path, place: Path, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a model large enough that the products of its pairs' answers do not stand out, with their
    factors on disk."""
    monkeypatch.setattr(answer_products, "HELD", 0)
    tokenizer = build_tokenizer(CHATML)
    torch.manual_seed(0)
    sizes = {"hidden_size": 192, "intermediate_size": 512, "vocab_size": len(tokenizer)}
    config = transformers.LlamaConfig(**{**TINY, **sizes}, max_position_embeddings=512)
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path / "m")
    tokenizer.save_pretrained(tmp_path / "m")
    shutil.copytree(tmp_path / "m", tmp_path / "c", ignore=shutil.ignore_patterns("*.safetensors"))
    rows = [{"text": f"{n:02} and {n:02} " * (12 + n % 4)} for n in range(20)]
    pool, target = (jsonl(tmp_path / "pool.jsonl", rows),), (str(place / "pairs.jsonl"),)
    config = ScoreConfig(
        model=str(tmp_path / "c"),
        pool=pool,
        target=target,
        out=str(tmp_path / "run"),
        device="cpu",
        **options,
    )
    planned = api.plan(config)
    with DryRun() as seen:
        api.execute(replace(config, model=str(tmp_path / "m")))
    close = 0.15 if "rank" in options else 0.06  # sums of products stand out beside a low rank
    assert planned.memory_bytes == pytest.approx(seen.peak, rel=close)


# ---------------------------------------------------------------- the command


def test_a_plan_counts_the_parameters_and_tokens_that_the_model_has(place: Path) -> None:
    whole, shapes, bare = (plan(place, model) for model in ("whole", "shapes", "bare"))
    assert not isinstance(whole, ModelPlan) and isinstance(shapes, ModelPlan)
    assert shapes.tokens == whole.tokens and shapes.counted_by == "by the tokenizer"
    assert shapes.disk_bytes == whole.disk_bytes
    characters = 8 * len("00 plus 3? ") + 4 * len("00, then 3")
    assert bare.tokens == 48 * round(characters / 4) and "4 characters" in bare.counted_by
    network = build_network(len(build_tokenizer(CHATML)))
    assert bare.parameters == bare.selected == sum(p.numel() for p in network.parameters())
    assert bare.weights_bytes == 4 * bare.parameters and bare.dtype == "float32"
    assert plan(place, "bare", dtype="bfloat16").weights_bytes == 2 * bare.parameters


@pytest.mark.parametrize("layers", ["late", "last:3", r"mlp\.up_proj"])
def test_layers_count_as_in_the_model_itself(place: Path, layers: str) -> None:
    network = build_network(len(build_tokenizer(CHATML)))
    numbers = numbers_of(select_parameters(network, layers))
    assert plan(place, "bare", layers=layers).selected == numbers


def test_an_adapter_counts_from_its_configuration(place: Path, tmp_path: Path) -> None:
    from peft import LoraConfig

    LoraConfig(r=3, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM").save_pretrained(
        str(tmp_path)
    )
    options = {"adapter": str(tmp_path), "layers": "adapter"}
    found, base = plan(place, "bare", **options), plan(place, "bare")
    assert found.selected == 4 * 3 * (32 + 32 + 48 + 32)
    assert found.parameters == base.parameters + found.selected
    assert plan(place, "bare", adapter=str(tmp_path)).selected == base.parameters  # merged
    (tmp_path / "adapter_config.json").write_text("{}")
    words = ["--pool", place / "pool.jsonl", "--target", place / "pairs.jsonl", "--dry-run"]
    words += ["--adapter", tmp_path, "--layers", "adapter"]
    refused = prism("score", "--model", place / "bare", *words)
    assert refused.code == 2 and refused.err.count("\n") == 1 and str(tmp_path) in refused.err


def test_a_batch_takes_memory_in_proportion_to_its_tokens(place: Path) -> None:
    small, large = (plan(place, "bare", batch_tokens=tokens) for tokens in (256, 1024))
    assert large.batch_bytes == pytest.approx(4 * small.batch_bytes, rel=0.05)
    assert plan(place, "bare").batch_tokens == 4096  # of a GPU, which is not here
    assert plan(place, "bare", device="cpu").batch_tokens == 512


def test_a_saved_direction_says_what_is_selected(place: Path) -> None:
    words = ["--pool", place / "pool.jsonl", "--out", place / "late"]
    scored = prism(
        "score",
        "--model",
        place / "whole",
        "--target",
        place / "pairs.jsonl",
        *words,
        "--layers=late",
    )
    assert scored.code == 0
    saved = str(place / "late" / "direction.safetensors")
    found, late = (
        plan(place, "bare", direction=saved, target=()),
        plan(place, "bare", layers="late"),
    )
    assert found.selected == late.selected and found.scoring_bytes == late.scoring_bytes
    assert found.memory_bytes == late.memory_bytes
    other = {**json.loads((place / "bare" / "config.json").read_text()), "hidden_size": 64}
    (place / "other").mkdir()
    (place / "other" / "config.json").write_text(json.dumps(other))
    refused = prism("score", "--model", place / "other", *words, "--dry-run", "--direction", saved)
    assert refused.code == 2 and "does not fit this model" in refused.err


def test_the_plan_is_a_table_that_names_its_assumptions(place: Path) -> None:
    words = ["--model", place / "bare", "--pool", place / "pool.jsonl", "--dry-run"]
    words += ["--target", place / "pairs.jsonl"]
    told = prism("repair", *words, "--warmup", "5%", "--curvature", "diagonal")
    assert told.code == 0 and told.err == ""
    names = ["parameters", "weights", "scoring", "batch", "tokens", "time", "memory", "disk"]
    names += ["estimate", "not"]
    assert [line.split()[0] for line in told.out.splitlines()[-10:]] == names
    for phrase in ("100 TFLOP/s", "rank 64", "not here", "--curvature diagonal, --warmup"):
        assert phrase in told.out
    values = json.loads(prism("select", *words, "--rank", "5", "--json").out)
    assert set(values["scoring_bytes"]) == {"full", "rank 5"}
    assert values["seconds"] == pytest.approx(
        values["tokens"] * values["seconds_per_million"]["rank 5"] / 1e6
    )
    assert not (place / "prism-out").exists()


def test_a_folder_without_a_sound_configuration_is_refused_in_one_line(
    place: Path, tmp_path: Path
) -> None:
    words = ["--model", tmp_path, "--pool", place / "pool.jsonl", "--dry-run"]
    words += ["--target", place / "pairs.jsonl"]

    def refuses(phrase: str, *words: object) -> None:
        told = prism("score", *words)
        assert told.code == 2 and told.err.count("\n") == 1 and phrase in told.err, told.err

    refuses("no weights", *words)
    sound = json.loads((place / "bare" / "config.json").read_text())
    broken = ["{", "[]", "{}", json.dumps({"model_type": "none-such"})]
    broken += [
        json.dumps({**sound, "hidden_size": "wide"}),
        json.dumps({**sound, "model_type": "t5"}),
    ]
    for text in broken:
        (tmp_path / "config.json").write_text(text)
        refuses(f"--model {tmp_path}: no weights, and no plan from its config.json", *words)
    quantised = {**sound, "quantization_config": {"quant_method": "gptq", "bits": 4}}
    (tmp_path / "config.json").write_text(json.dumps(quantised))
    refuses("its weights are quantised (gptq)", *words)
    (tmp_path / "config.json").write_text(json.dumps(sound))
    assert prism("score", *words).code == 0
    refuses("--layers none-such: no weight matches", *words, "--layers", "none-such")
    run = [word for word in words if word != "--dry-run"]
    refuses("no weights; save it with save_pretrained", *run, "--out", tmp_path / "run")
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    refuses("a pickle, which is never read", *words)


def test_seventy_billion_parameters_take_seconds_and_less_than_a_gigabyte(
    place: Path, tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(LLAMA_70B))
    code = PEAK + (
        "import time\n"
        "from prism_select import api\n"
        "from prism_select.commands import pipeline\n"
        "from prism_select.run.config import SelectConfig\n"
        f"files = {dict(pool=[str(place / 'pool.jsonl')], target=[str(place / 'pairs.jsonl')])}\n"
        f"config = SelectConfig(model={str(tmp_path)!r}, out='run', **files)\n"
        "start = time.process_time()\n"
        "plan = api.plan(config)\n"
        "print(plan.parameters, plan.weights_bytes, time.process_time() - start, peak())\n"
    )
    done = prism_apart("-c", code, module=False)
    assert done.code == 0, done.err
    parameters, weights, seconds, peak = map(float, done.out.split())
    block = 2 * 8192**2 + 2 * 8192 * 1024 + 3 * 8192 * 28672 + 2 * 8192
    assert parameters == 80 * block + 8192 + 2 * 128256 * 8192 and weights == 2 * parameters
    assert seconds < 10 and peak < 1e9
