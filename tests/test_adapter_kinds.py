"""Every kind of adapter that PEFT loads: its own log-likelihoods, or one line that says why not.

The right values come from transformers and PEFT alone: `PeftModel` on the base, unmerged, and loops
of autograd over it."""

import json
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import peft
import pyarrow.parquet as pq
import pytest
import torch
import transformers
from conftest import build_tokenizer, jsonl, prism
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor

from prism_select.core.engines import reference, reverse
from prism_select.core.likelihood import Batch
from prism_select.models.adapters import load_adapter
from prism_select.models.layer_selection import adapter_names, select_parameters
from prism_select.run.errors import BadModel

V = 320
SIZE = dict(
    vocab_size=V,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=128,
    initializer_range=0.15,
    dtype="float32",
)
TASK = dict(task_type="CAUSAL_LM")
QV = ["q_proj", "v_proj"]
# Rows of tokens; some of them are those that the adapters of single tokens train.
IDS = torch.randint(0, V, (4, 24), generator=torch.Generator().manual_seed(1))
IDS[0, 3], IDS[1, 4], IDS[2, 5:7] = 5, V - 1, torch.tensor([6, 7])


def llama(tied: bool) -> Any:
    return transformers.LlamaConfig(**SIZE, tie_word_embeddings=tied)


BASES: Mapping[str, Callable[[], Any]] = {
    "llama": lambda: llama(False),
    "llama, tied": lambda: llama(True),
    "qwen2, tied, with biases": lambda: transformers.Qwen2Config(**SIZE, tie_word_embeddings=True),
    "gpt2, tied": lambda: transformers.GPT2Config(
        vocab_size=V, n_embd=32, n_layer=2, n_head=4, n_positions=128
    ),
    "gemma3, tied": lambda: transformers.Gemma3TextConfig(
        **SIZE, head_dim=8, sliding_window=8, layer_types=["sliding_attention"] * 3
    ),
    "opt, narrow embeddings": lambda: transformers.OPTConfig(
        vocab_size=V,
        hidden_size=32,
        ffn_dim=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=128,
        word_embed_proj_dim=16,
    ),
}


def lora(**options: Any) -> Callable[[], Any]:
    return lambda: LoraConfig(**{"r": 4, "target_modules": QV, **TASK, **options})


def other(kind: str, **options: Any) -> Callable[[], Any]:
    return lambda: getattr(peft, f"{kind}Config")(**{**TASK, **options})


MERGED: Mapping[str, Callable[[], Any]] = {
    "LoRA": lora(target_modules="all-linear"),
    "LoRA, rank-stabilised": lora(use_rslora=True),
    "LoRA, patterns": lora(rank_pattern={"q_proj": 2}, alpha_pattern={"v_proj": 32}),
    "LoRA, some layers": lora(layers_to_transform=[1]),
    "LoRA, biases": lora(bias="all"),
    "LoRA, biases of its layers": lora(bias="lora_only"),
    "LoRA, parameters": lora(target_modules=[], target_parameters=["mlp.up_proj.weight"]),
    "LoRA, PiSSA": lora(init_lora_weights="pissa"),
    "LoRA, OLoRA": lora(init_lora_weights="olora"),
    "LoRA, saved norm": lora(modules_to_save=["norm"]),
    "LoRA, saved head": lora(modules_to_save=["lm_head"]),
    "LoRA, saved embeddings": lora(modules_to_save=["embed_tokens"]),
    "LoRA, saved both": lora(modules_to_save=["lm_head", "embed_tokens"]),
    "LoRA, saved and tied": lora(modules_to_save=["embed_tokens"], ensure_weight_tying=True),
    "LoRA, tokens": lora(trainable_token_indices=[5, 6, V - 1]),
    "LoRA, tied tokens": lora(trainable_token_indices=[5, 6], ensure_weight_tying=True),
    "DoRA": lora(use_dora=True),
    "AdaLoRA": other("AdaLora", init_r=4, target_r=2, total_step=10, target_modules=QV),
    "IA3": other(
        "IA3", target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"]
    ),
    "LoHa": other("LoHa", r=4, target_modules=QV),
    "LoKr": other("LoKr", r=4, target_modules=QV),
    "VeRA": other("Vera", r=4, target_modules=["q_proj"]),
    "VB-LoRA": other("VBLoRA", r=2, num_vectors=8, vector_length=16, topk=2, target_modules=QV),
    "RandLoRA": other("RandLora", r=4, target_modules=["q_proj"]),
    "OFT": other("OFT", r=0, oft_block_size=4, target_modules=QV),
    "BOFT": other("BOFT", boft_block_size=4, target_modules=QV),
    "HRA": other("HRA", r=4, target_modules=QV),
    "FourierFT": other("FourierFT", n_frequency=20, target_modules=QV),
    "WaveFT": other("WaveFT", n_frequency=20, target_modules=["q_proj"]),
    "C3A": other("C3A", block_size=16, target_modules=["q_proj"]),
    "MiSS": other("Miss", r=4, target_modules=QV),
    "SHiRA": other("Shira", r=4, target_modules=QV),
    "RoAd": other("Road", group_size=8, target_modules=QV),
    "DeLoRA": other("Delora", r=4, target_modules=QV),
    "GraLoRA": other("Gralora", r=4, gralora_k=2, target_modules=QV),
    "norms": other("LNTuning", target_modules=["input_layernorm"]),
    "tokens alone": other(
        "TrainableTokens", token_indices=[5, 6, V - 1], target_modules=["embed_tokens"]
    ),
}
# merged where embeddings and head have weights of their own, and apart where they share them
EMBEDDINGS: Mapping[str, Callable[[], Any]] = {
    "LoRA of embeddings": lora(target_modules=["q_proj", "embed_tokens"]),
    "LoRA of the head": lora(target_modules=["q_proj", "lm_head"]),
    "LoRA of both": lora(target_modules=["embed_tokens", "lm_head"]),
    "LoRA of embeddings, tied": lora(
        target_modules=["q_proj", "embed_tokens"], ensure_weight_tying=True
    ),
    "LoRA of the head, tied": lora(target_modules=["lm_head"], ensure_weight_tying=True),
    "LoRA, tokens of the head": lora(trainable_token_indices={"lm_head": [5, 6]}),
}
APART: Mapping[str, Callable[[], Any]] = {
    "LoRA, biases of its own": lora(lora_bias=True),
    "LoRA, repeated layers": lora(layer_replication=[[0, 2], [1, 3]]),
}
REFUSED: Mapping[str, tuple[Callable[[], Any], str]] = {
    "prompt tuning": (other("PromptTuning", num_virtual_tokens=4), "it is PROMPT_TUNING"),
    "prefix tuning": (other("PrefixTuning", num_virtual_tokens=4), "it is PREFIX_TUNING"),
    "p-tuning": (
        other("PromptEncoder", num_virtual_tokens=4, encoder_hidden_size=16),
        "it is P_TUNING",
    ),
    "adaption prompt": (
        other("AdaptionPrompt", adapter_len=4, adapter_layers=2),
        "it is ADAPTION_PROMPT",
    ),
    "activated LoRA": (lora(alora_invocation_tokens=[6, 7]), "an activated LoRA"),
    "a reward model's": (lora(task_type="SEQ_CLS"), "the task SEQ_CLS"),
}


def base(name: str) -> Any:
    torch.manual_seed(0)
    network = transformers.AutoModelForCausalLM.from_config(BASES[name]())
    with torch.no_grad():
        for weight in network.parameters():  # biases start at zero and norms at one: move them
            weight.add_(0.05 * torch.randn_like(weight))
    return network.eval()


@contextmanager
def quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def moved(network: Any, config: Any, seed: int = 3) -> Any:
    """PEFT's model with every trainable number moved, as a training would."""
    draw = torch.Generator().manual_seed(seed)
    with quiet(), torch.no_grad():
        adapted = get_peft_model(network, config)
        for weight in adapted.parameters():
            if weight.requires_grad:
                weight.add_(0.1 * torch.randn(weight.shape, generator=draw))
    return adapted


def saved(folder: Path, name: str, config: Any) -> Path:
    with quiet():
        moved(base(name), config).save_pretrained(str(folder))
    return folder


def logliks(network: Any, ids: Tensor = IDS) -> Tensor:
    with torch.no_grad():
        logits = network(input_ids=ids).logits[:, :-1].double().log_softmax(-1)
    total: Tensor = logits.gather(-1, ids[:, 1:, None])[..., 0].sum(1)
    return total


def peft_model(name: str, folder: Path) -> Any:
    with quiet():
        return PeftModel.from_pretrained(base(name), str(folder)).eval()


def loaded(name: str, folder: Path, merge: bool = True) -> tuple[Any, list[str]]:
    lines: list[str] = []
    model = load_adapter(base(name), folder, merge, list(IDS), lines.append)
    return model, lines


def same(ours: Tensor, theirs: Tensor) -> bool:
    return torch.allclose(ours, theirs, rtol=1e-5, atol=1e-4)


@pytest.mark.filterwarnings("ignore:Sparse invariant checks:UserWarning")  # torch's, of SHiRA
@pytest.mark.parametrize("name", ["llama", "llama, tied"])
@pytest.mark.parametrize("kind", MERGED)
def test_a_merged_adapter_gives_pefts_log_likelihoods(kind: str, name: str, tmp_path: Path) -> None:
    folder = saved(tmp_path, name, MERGED[kind]())
    exact = logliks(peft_model(name, folder))
    assert not same(logliks(base(name)), exact)  # it does something
    model, _ = loaded(name, folder)
    assert same(logliks(model.network), exact)
    assert not adapter_names(model.network)
    assert len(select_parameters(model.network, "all")) == len(list(model.network.parameters()))
    beside, _ = loaded(name, folder, merge=False)
    assert torch.equal(logliks(beside.network), exact)


@pytest.mark.parametrize("name", ["llama", "llama, tied"])
@pytest.mark.parametrize("kind", [*EMBEDDINGS, *APART])
def test_an_adapter_that_merging_would_change_stays_apart_and_says_so(
    kind: str, name: str, tmp_path: Path
) -> None:
    folder = saved(tmp_path, name, {**EMBEDDINGS, **APART}[kind]())
    exact = logliks(peft_model(name, folder))
    model, lines = loaded(name, folder)
    assert same(logliks(model.network), exact)
    is_apart = name != "llama" or kind in APART
    assert bool(adapter_names(model.network)) == is_apart
    assert any(line.startswith("the adapter is kept apart, since") for line in lines) == is_apart
    weights = select_parameters(model.network, "all")  # all of the model's, none of the adapter's
    assert [w.shape for w in weights.values()] == [w.shape for w in base(name).parameters()]


@pytest.mark.parametrize(
    "name", ["qwen2, tied, with biases", "gpt2, tied", "gemma3, tied", "opt, narrow embeddings"]
)
@pytest.mark.parametrize("part", ["linear", "embeddings", "biases"])
def test_other_architectures_give_pefts_log_likelihoods(
    part: str, name: str, tmp_path: Path
) -> None:
    embeddings = "wte" if name.startswith("gpt2") else "embed_tokens"
    linear = "c_attn" if name.startswith("gpt2") else "q_proj"
    config = {
        "linear": lora(target_modules="all-linear"),
        "embeddings": lora(target_modules=[embeddings, linear]),
        "biases": lora(target_modules=[linear], lora_bias=True, bias="all"),
    }[part]()
    config.fan_in_fan_out = name.startswith("gpt2")
    folder = saved(tmp_path, name, config)
    model, _ = loaded(name, folder)
    assert same(logliks(model.network), logliks(peft_model(name, folder)))
    without_bias = part == "biases" and name.startswith("gemma3")
    assert bool(adapter_names(model.network)) == (part == "embeddings" or without_bias)


@pytest.mark.parametrize("merge", [True, False])
@pytest.mark.parametrize("kind", REFUSED)
def test_an_adapter_that_is_more_than_weights_is_refused_in_one_line(
    kind: str, merge: bool, tmp_path: Path
) -> None:
    make, words = REFUSED[kind]
    folder = tmp_path
    if kind == "a reward model's":
        saved(folder, "llama", lora()())
        config = json.loads((folder / "adapter_config.json").read_text())
        (folder / "adapter_config.json").write_text(json.dumps({**config, "task_type": "SEQ_CLS"}))
    else:
        saved(folder, "llama", make())
    with pytest.raises(BadModel, match=words) as caught:
        loaded("llama", folder, merge)
    assert "\n" not in str(caught.value) and "; " in str(caught.value)


@pytest.mark.parametrize("kind", ["DoRA", "OFT", "LoHa"])
def test_what_is_not_linear_is_refused_where_weights_are_tied(kind: str, tmp_path: Path) -> None:
    config = {
        "DoRA": lora(target_modules=["embed_tokens"], use_dora=True),
        "OFT": other("OFT", r=0, oft_block_size=4, target_modules=["lm_head"]),
        "LoHa": other("LoHa", r=4, target_modules=["lm_head"]),
    }[kind]()
    folder = saved(tmp_path, "llama, tied", config)
    with pytest.raises(
        BadModel, match=r"cannot be merged, since .* shares its weight with another"
    ):
        loaded("llama, tied", folder)
    model, _ = loaded("llama, tied", folder, merge=False)
    assert same(logliks(model.network), logliks(peft_model("llama, tied", folder)))


def test_a_merge_that_changes_the_logits_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = saved(tmp_path, "llama", lora()())
    merge = peft.tuners.lora.layer.Linear.merge

    def wrong(layer: Any, *arguments: Any, **options: Any) -> None:
        merge(layer, *arguments, **options)
        layer.get_base_layer().weight.data *= 1.01

    monkeypatch.setattr(peft.tuners.lora.layer.Linear, "merge", wrong)
    with pytest.raises(BadModel, match=r"merged into the weights, .* differ by \d+\.\d%"):
        loaded("llama", folder)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_rounding_of_a_dtype_is_no_change(dtype: torch.dtype, tmp_path: Path) -> None:
    folder = saved(tmp_path, "llama", lora(target_modules="all-linear")())
    model = load_adapter(base("llama").to(dtype), folder, True, list(IDS))
    assert not adapter_names(model.network) and model.dtype == dtype


def test_an_option_that_this_peft_does_not_know_is_said(tmp_path: Path) -> None:
    folder = saved(tmp_path, "llama", lora()())
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**config, "gate_of_tomorrow": 2}))
    _, lines = loaded("llama", folder)
    assert any("gate_of_tomorrow" in line for line in lines)


# Scores of an adapter that stays apart


def batch_of(ids: Tensor) -> Batch:
    real = torch.ones_like(ids, dtype=torch.bool)
    return Batch(ids, real, real)


@pytest.mark.parametrize("kind", [*EMBEDDINGS, *APART])
def test_gradients_beside_an_adapter_are_those_of_autograd_over_pefts_model(
    kind: str, tmp_path: Path
) -> None:
    """And of LoRA those of a model with the sum in its weights: for that, take them untied."""
    name = "llama, tied"
    folder = saved(tmp_path, name, {**EMBEDDINGS, **APART}[kind]())
    model, _ = loaded(name, folder)
    weights = select_parameters(model.network, "all")
    draw = torch.Generator().manual_seed(0)
    direction = {n: torch.randn(w.shape, generator=draw) for n, w in weights.items()}
    theirs = peft_model(name, folder)
    named = {n.removeprefix("base_model.model."): w for n, w in theirs.named_parameters()}
    for n in weights:
        named[n].requires_grad_(True)
    ours = reference(model, weights, [direction])(batch_of(IDS)).values[:, 0]
    for row, score in zip(IDS, ours.tolist(), strict=True):
        logits = theirs(input_ids=row[None]).logits[0, :-1].log_softmax(-1)
        loglik = logits.gather(1, row[1:, None]).sum()
        grads = torch.autograd.grad(loglik, [named[n] for n in weights])
        exact = sum(float((g * direction[n]).sum()) for n, g in zip(weights, grads, strict=True))
        assert score == pytest.approx(exact, rel=1e-3, abs=1e-2)
    if kind != "LoRA, tokens of the head":  # whose layer reads a weight that it does not hold
        fast = reverse(model, weights, [direction])(batch_of(IDS)).values[:, 0]
        assert torch.allclose(fast, ours, rtol=1e-3, atol=1e-2)


# The command

ROWS = [
    {"prompt": f"Name {word}?", "completion": f"{word}, thank you very much"}
    for word in ("Rome", "Paris", "Italy", "water", "five", "three")
]
PAIRS = [
    {"prompt": f"{word}?", "chosen": "please, thank you", "rejected": "no way, go away"}
    for word in ("Rome", "Paris", "Italy", "water")
]


@cache
def tokenizer() -> Any:
    return build_tokenizer()


def plain_ids(prompt: str, answer: str) -> tuple[Tensor, int]:
    """Tokens of a row in plain form, and how many of them are the prompt's."""
    coded = tokenizer()
    start = [coded.bos_token_id, *coded(prompt + "\n", add_special_tokens=False).input_ids]
    ids = coded(prompt + "\n" + answer, add_special_tokens=False).input_ids
    assert ids[: len(start) - 1] == start[1:]
    return torch.tensor([coded.bos_token_id, *ids, coded.eos_token_id]), len(start)


def answer_loglik(network: Any, row: Mapping[str, str], key: str) -> Tensor:
    """Log-likelihood of an answer and its end, and the number of their tokens."""
    ids, prompt = plain_ids(row["prompt"], row[key])
    logits = network(input_ids=ids[None]).logits[0, :-1].log_softmax(-1)
    total: Tensor = logits.gather(1, ids[1:, None])[prompt - 1 :].sum()
    return total


def folders(where: Path, name: str, config: Any) -> tuple[Path, Path]:
    """A base with its tokenizer, and an adapter for it."""
    model, adapter = where / "base", where / "adapter"
    base(name).save_pretrained(model)
    tokenizer().save_pretrained(model)
    return model, saved(adapter, name, config)


def words(where: Path) -> list[object]:
    pool, target = jsonl(where / "pool.jsonl", ROWS), jsonl(where / "pairs.jsonl", PAIRS)
    return ["--pool", pool, "--target", target, "--out", where / "run"]


def flat(where: Path) -> list[object]:
    return [*words(where), "--curvature", "flat"]


@pytest.mark.parametrize(
    "kind", ["LoRA of embeddings", "LoRA of the head, tied", "LoRA, biases of its own"]
)
def test_scores_are_those_of_a_loop_over_pefts_model(kind: str, tmp_path: Path) -> None:
    name = "llama, tied"
    model, adapter = folders(tmp_path, name, {**EMBEDDINGS, **APART}[kind]())
    outcome = prism("score", "--model", model, "--adapter", adapter, *flat(tmp_path))
    assert outcome.code == 0 and not outcome.err, outcome.err
    manifest = json.loads((tmp_path / "run" / "manifest.json").read_text())
    assert manifest["model"]["adapter"] == "apart"
    assert any("is kept apart, since" in line for line in manifest["warnings"])
    theirs = peft_model(name, adapter)
    weights = [w for n, w in theirs.named_parameters() if "lora_" not in n]
    assert sum(w.numel() for w in weights) == sum(w.numel() for w in base(name).parameters())
    for weight in weights:
        weight.requires_grad_(True)
    lengths = {
        (r["prompt"], k): len(plain_ids(r["prompt"], r[k])[0]) - plain_ids(r["prompt"], r[k])[1]
        for r in PAIRS
        for k in ("chosen", "rejected")
    }
    gaps = [
        answer_loglik(theirs, row, "chosen") / lengths[row["prompt"], "chosen"]
        - answer_loglik(theirs, row, "rejected") / lengths[row["prompt"], "rejected"]
        for row in PAIRS
    ]
    gain = torch.nn.functional.softplus(torch.stack(gaps)).mean()
    direction = torch.autograd.grad(gain, weights)
    table = pq.read_table(tmp_path / "run" / "scores.parquet")
    for row, loglik, score in zip(
        ROWS, table["loglik"].to_pylist(), table["score"].to_pylist(), strict=True
    ):
        exact = answer_loglik(theirs, row, "completion")
        assert loglik == pytest.approx(exact.item(), rel=1e-5)
        grads = torch.autograd.grad(exact, weights)
        right = sum(float((g * d).sum()) for g, d in zip(grads, direction, strict=True))
        assert score == pytest.approx(right, rel=1e-3, abs=1e-3)


def test_the_command_refuses_in_one_line_what_has_no_weights(tmp_path: Path) -> None:
    model, adapter = folders(tmp_path, "llama", REFUSED["prompt tuning"][0]())
    outcome = prism("score", "--model", model, "--adapter", adapter, *words(tmp_path))
    assert outcome.code == 2 and outcome.err.count("\n") == 1
    assert "it is PROMPT_TUNING, which puts learned vectors before a text" in outcome.err
