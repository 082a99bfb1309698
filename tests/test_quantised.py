"""Quantised models: a score on matrices in 8 or 4 bits is that of the model they unpack to."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import transformers
from conftest import build_tokenizer, jsonl, prism, random_adapter
from peft import LoraConfig, PeftModel
from safetensors.torch import load_file, save_file
from test_engines import SMALL, V
from tiny import batch_of, pairs_of
from torch.nn import functional

import prism_select
from prism_select.core.engines import ENGINES
from prism_select.core.likelihood import Batch
from prism_select.core.packed import PackedLinear
from prism_select.core.target_gradient import Side
from prism_select.models.causal_lm import CausalLM, unchanged
from prism_select.models.layer_selection import select_parameters
from prism_select.models.loading import adopt, load, object_fingerprint
from prism_select.models.quantised import pack_shapes, packed_matrices
from prism_select.models.without_weights import network_of
from prism_select.run.errors import BadOption
from prism_select.run.objects import ModelObject
from prism_select.scoring.in_memory import score_tensors, target_direction
from prism_select.scoring.model_plan import scoring_along, weight_bytes

WORDS = 320
TEXT = {
    **SMALL,
    "vocab_size": WORDS,
    "hidden_size": 64,
    "intermediate_size": 128,
    "max_position_embeddings": 128,
}
KINDS: Mapping[str, Any] = {
    "llama": lambda: transformers.LlamaConfig(**TEXT, initializer_range=0.15),
    "qwen2": lambda: transformers.Qwen2Config(**TEXT, initializer_range=0.15),  # with biases
    "gpt2": lambda: transformers.GPT2Config(  # Conv1D, biases, tied head
        vocab_size=WORDS, n_embd=64, n_layer=4, n_head=4, n_positions=128, initializer_range=0.15
    ),
}
MATRICES = {"llama": 28, "qwen2": 28, "gpt2": 16}
UNPACKED = {  # folders
    "8bit": (8, torch.float32),
    "4bit": (4, torch.float32),
    "8bit bfloat16": (8, torch.bfloat16),
    "4bit bfloat16": (4, torch.bfloat16),
}
PAIRS = [
    {"prompt": "Where is Rome?", "chosen": "In Italy, thank you.", "rejected": "no way"},
    {"prompt": "Say Paris", "chosen": "Please, Paris.", "rejected": "Go away."},
    {"prompt": "Water?", "chosen": "It boils at a hundred degrees.", "rejected": "At 7."},
    {"prompt": "Two and three?", "chosen": "Five, please.", "rejected": "go away, no"},
]
POOL = [
    {"prompt": f"Question {index}?", "completion": f"Answer {index}" + ", please" * (index % 3)}
    for index in range(8)
]


class Desk:
    """Folders of one architecture: whole, and unpacked from 8 and from 4 bits; and files."""

    def __init__(self, folder: Path, kind: str, saved: bool = True) -> None:
        self.folder, self.kind = folder, kind
        self.whole, self.tokenizer = folder / "whole", build_tokenizer()
        torch.manual_seed(0)
        network = transformers.AutoModelForCausalLM.from_config(KINDS[kind]())
        with torch.no_grad():
            for weight in network.parameters():
                weight.add_(0.02 * torch.randn_like(weight))
        for path in (self.whole, *(folder / name for name in UNPACKED)):
            self.tokenizer.save_pretrained(path)
        network.save_pretrained(self.whole)
        for name, (bits, dtype) in UNPACKED.items() if saved else ():
            self.unpacked(bits, dtype).save_pretrained(folder / name)
        self.files = [
            *("--pool", jsonl(folder / "pool.jsonl", POOL)),
            *("--target", jsonl(folder / "pairs.jsonl", PAIRS)),
        ]

    def packed(self, bits: int, dtype: torch.dtype = torch.float32) -> Any:
        """As a user loads it."""
        config = transformers.BitsAndBytesConfig(
            load_in_8bit=bits == 8, load_in_4bit=bits == 4, bnb_4bit_quant_type="nf4"
        )
        return transformers.AutoModelForCausalLM.from_pretrained(
            self.whole, quantization_config=config, dtype=dtype, device_map={"": "cpu"}
        )

    def unpacked(self, bits: int, dtype: torch.dtype = torch.float32) -> Any:
        """The whole network, with the numbers that bitsandbytes gives back."""
        from bitsandbytes import functional as library

        packed = dict(self.packed(bits, dtype).named_modules())
        network = transformers.AutoModelForCausalLM.from_pretrained(self.whole, dtype=dtype)
        for name, module in network.named_modules():
            weight = getattr(packed[name], "weight", None)
            if weight is None or weight.is_floating_point():
                continue
            if bits == 4:
                matrix = library.dequantize_4bit(weight.data, weight.quant_state)
            else:
                matrix = library.int8_vectorwise_dequant(weight.data, weight.SCB)
            matrix = matrix.T if self.kind == "gpt2" else matrix
            assert not matrix.equal(module.weight)
            module.weight.data = matrix.to(dtype)
        return network

    def score(self, folder: Path, out: Path, *words: object, command: str = "score") -> Any:
        """How it ended, the manifest, the scores, and their table."""
        outcome = prism(command, "--model", folder, *self.files, *words, "--out", out)
        assert outcome.code == 0, outcome.err
        table = pq.read_table(out / "scores.parquet")
        scores = np.array(table["score"].to_pylist(), dtype=float)
        return outcome, json.loads((out / "manifest.json").read_text()), scores, table


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Desk:
    return Desk(tmp_path_factory.mktemp("llama"), "llama")


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory: pytest.TempPathFactory) -> Desk:
    return Desk(tmp_path_factory.mktemp("gpt2"), "gpt2")


def sums_of_logliks(network: Any, batch: Batch) -> torch.Tensor:
    """loglik of each row, written out again."""
    logits = network(
        input_ids=batch.tokens,
        attention_mask=batch.real.long(),
        position_ids=batch.positions,
    ).logits[:, :-1]
    taken = -functional.cross_entropy(logits.float().mT, batch.tokens[:, 1:], reduction="none")
    return (taken * batch.predicted).sum(1)


def by_hand(network: Any, batch: Batch, sides: tuple[Side, Side], layers: str) -> list[float]:
    """∇loglik(row) · ∇ mean softplus(Δ), by autograd on a network of ordinary modules."""
    weights = select_parameters(network, layers)
    network.requires_grad_(False)
    for weight in weights.values():
        weight.requires_grad_(True)
    means = []
    for side in sides:
        values = torch.cat([sums_of_logliks(network, b) / b.counts for b in side.batches])
        means.append(torch.empty_like(values).index_copy(0, torch.tensor(side.order), values))
    gain = functional.softplus(means[0] - means[1]).mean()
    direction = torch.autograd.grad(gain, [*weights.values()])
    scores = []
    for row in range(len(batch)):
        loglik = sums_of_logliks(network, batch.rows(slice(row, row + 1)))
        gradient = torch.autograd.grad(loglik.sum(), [*weights.values()])
        products = [g.double() * d.double() for g, d in zip(gradient, direction, strict=True)]
        scores.append(float(sum(product.sum() for product in products)))
    return scores


def one_batch(side: Side) -> Batch:
    """The pairs in order, in one batch."""
    fields = []
    for name in ("tokens", "real", "supervised"):
        rows = torch.cat([getattr(batch, name) for batch in side.batches])
        fields.append(torch.empty_like(rows).index_copy(0, torch.tensor(side.order), rows))
    return Batch(*fields)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("kind", KINDS)
def test_every_engine_scores_a_loaded_network_as_autograd_does_what_it_unpacks_to(
    kind: str, bits: int, dtype: torch.dtype, tmp_path: Path
) -> None:
    desk = Desk(tmp_path, kind, saved=False)
    network, plain = desk.packed(bits, dtype), desk.unpacked(bits, dtype)
    assert isinstance(network, transformers.PreTrainedModel)
    batch, sides = batch_of(5, 16, vocabulary=V), pairs_of(6, vocabulary=V)
    narrow = dtype == torch.bfloat16
    for layers in ("all", "late", "attn|bias"):
        exact = np.array(by_hand(plain, batch, sides, layers))
        direction = target_direction(network, one_batch(sides[0]), one_batch(sides[1]), layers)
        assert direction.keys() == select_parameters(plain, layers).keys()
        for name, weight in select_parameters(plain, layers).items():
            assert direction[name].shape == weight.shape
        for engine in ENGINES:
            if engine == "difference" and narrow:
                continue
            scores = score_tensors(network, batch, direction, engine).numpy()
            allowed = 0.05 if narrow else 5e-3 if engine == "difference" else 1e-4
            off = np.linalg.norm(scores - exact) / np.linalg.norm(exact)
            assert off < allowed, (layers, engine)


@pytest.mark.parametrize("bits", [8, 4])
def test_a_loaded_network_is_afterwards_as_it_was(bits: int, llama: Desk) -> None:
    network, batch = llama.packed(bits), batch_of(3, 16, vocabulary=V)
    modules, before = dict(network.named_modules()), vars(network).copy()
    unpacked = {name: packed.unpack() for name, packed in packed_matrices(network).items()}
    mark = object_fingerprint(ModelObject(network, llama.tokenizer))
    with torch.no_grad():
        output = network(input_ids=batch.tokens).logits
    for _ in range(2):
        chosen, rejected = map(one_batch, pairs_of(4, vocabulary=V))
        direction = target_direction(network, chosen, rejected)
        score_tensors(network, batch, direction)
        with unchanged(network):
            model, _ = adopt(ModelObject(network, llama.tokenizer))
            assert sum(isinstance(m, PackedLinear) for m in model.network.modules()) == 28
    assert dict(network.named_modules()) == modules and vars(network) == before
    with torch.no_grad():
        assert network(input_ids=batch.tokens).logits.equal(output)
    later = object_fingerprint(ModelObject(network, llama.tokenizer))
    other = object_fingerprint(ModelObject(llama.unpacked(bits), llama.tokenizer))
    assert later == mark or bits == 4  # a forward pass may round scales of 4 bits to bfloat16
    for name, packed in packed_matrices(network).items():
        assert torch.allclose(packed.unpack(), unpacked[name], rtol=2**-7)
    assert mark != other


WAYS = {
    "8bit --curvature flat": ["llama"],
    "8bit --normalize norm --layers late": ["llama"],
    "8bit --rank 8": ["llama"],
    "8bit --rank 8 --dtype bfloat16": ["llama"],
    "4bit": ["llama", "gpt2"],
    "4bit --layers attn --weighting uniform": ["llama"],
    "4bit --layers late --curvature diagonal": ["llama"],
    "4bit --layers late --curvature ekfac": ["llama", "gpt2"],
    "4bit --normalize norm": ["gpt2"],
    "4bit --tokens": ["llama"],
    "4bit --rank 8 --curvature flat": ["llama", "gpt2"],
    "4bit --engine difference --common remove": ["llama"],
    "4bit --dtype bfloat16": ["llama"],
}


@pytest.mark.parametrize(
    ("way", "kind"), [(way, kind) for way, kinds in WAYS.items() for kind in kinds]
)
def test_a_run_scores_as_one_on_a_folder_with_the_unpacked_numbers(
    way: str, kind: str, llama: Desk, gpt2: Desk, tmp_path: Path
) -> None:
    desk = llama if kind == "llama" else gpt2
    bits, *words = way.split()
    narrow = "bfloat16" in words
    folder = desk.folder / (f"{bits} bfloat16" if narrow else bits)
    _, _, exact, whole = desk.score(folder, tmp_path / "exact", *words)
    outcome, manifest, scores, table = desk.score(
        desk.whole, tmp_path / "run", *words, "--quantize", bits
    )
    allowed = 0.05 if narrow else 1e-2 if "difference" in words else 1e-4
    for found, wanted in [(scores, exact), *halves(table, whole)]:
        assert np.linalg.norm(found - wanted) <= allowed * np.linalg.norm(wanted)
    quantised = manifest["model"]["quantised"]
    assert quantised["bits"] == int(bits[0]) and quantised["matrices"] == MATRICES[kind]
    assert manifest["config"]["quantize"] == bits
    line = f"{MATRICES[kind]} matrices in {bits[0]} bits, {quantised['numbers']:,} of "
    assert line in outcome.out


def halves(*tables: Any) -> Iterator[list[Any]]:
    """Other columns that are to be the same."""
    for name in {*tables[0].column_names} & {"score_cosine", "score_chosen", "loglik"}:
        yield [np.array(table[name].to_pylist(), dtype=float) for table in tables]


# ---------------------------------------------------------------- memory


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("frozen", [True, False])
def test_a_graph_keeps_no_unpacked_matrix(bits: int, frozen: bool, llama: Desk) -> None:
    model, _ = load(str(llama.whole), "float32", torch.device("cpu"), None, f"{bits}bit")
    plain = CausalLM(llama.unpacked(bits))
    batch = batch_of(2, 12, vocabulary=V)
    matrices = {
        tuple(sorted(m.weight.shape))
        for m in model.network.modules()
        if isinstance(m, PackedLinear)
    }

    def held_by(of: CausalLM) -> int:
        """How many matrices of such shapes the graph of a forward pass keeps."""
        kept = list[torch.Tensor]()

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            if tensor.ndim == 2 and tuple(sorted(tensor.shape)) in matrices:
                kept.append(tensor)
            return tensor

        for weight in of.network.parameters():
            weight.requires_grad_(not frozen)
        network: Any = of.network
        network.get_input_embeddings().weight.requires_grad_(True)
        hooks: Any = torch.autograd.graph.saved_tensors_hooks
        with hooks(pack, lambda tensor: tensor):
            hidden = of.hidden(batch)
        hidden.sum().backward()
        return len(kept)

    assert held_by(plain) == 28 and held_by(model) == 0
    expected = {n: w.grad for n, w in plain.network.named_parameters() if w.grad is not None}
    found = {n: w.grad for n, w in model.network.named_parameters() if w.grad is not None}
    assert found.keys() == expected.keys() and len(found) == 1 if frozen else len(found) > 30
    for name, gradient in found.items():
        assert torch.allclose(gradient, expected[name], rtol=1e-3, atol=1e-4)


def test_parameters_of_packed_matrices_take_no_memory(llama: Desk) -> None:
    model, _ = load(str(llama.whole), "float32", torch.device("cpu"), None, "4bit")
    named = dict(model.network.named_parameters())
    whole = dict(llama.unpacked(4).named_parameters())
    assert {n: w.shape for n, w in named.items()} == {n: w.shape for n, w in whole.items()}
    packed = [n for n, w in named.items() if w.untyped_storage().nbytes() == 4]
    assert len(packed) == 28 and not any(named[n].any() for n in packed)
    numbers = sum(named[n].numel() for n in packed)
    others = 4 * (sum(w.numel() for w in named.values()) - numbers)
    assert weight_bytes(model.network) == others + numbers // 2 + 4 * (numbers // 64)


@pytest.mark.parametrize("bits", [8, 4])
def test_a_plan_from_the_configuration_counts_the_bits(
    bits: int, llama: Desk, tmp_path: Path
) -> None:
    words = [*llama.files, "--dry-run", "--json"]
    packing = ["--quantize", f"{bits}bit"]
    for name in ("bare", "packed"):
        (tmp_path / name).mkdir()
    llama.packed(bits).config.save_pretrained(tmp_path / "packed")
    (tmp_path / "bare" / "config.json").write_text((llama.whole / "config.json").read_text())

    def plan(name: str, *more: str) -> dict[str, Any]:
        outcome = prism("score", "--model", tmp_path / name, *words, *more)
        assert outcome.code == 0, outcome.err
        found: dict[str, Any] = json.loads(outcome.out)
        return found

    whole, found, there = plan("bare"), plan("bare", *packing), plan("packed")
    model, _ = load(str(llama.whole), "float32", torch.device("cpu"), None, f"{bits}bit")
    assert found == there
    assert found["weights_bytes"] == weight_bytes(model.network) < whole["weights_bytes"]
    assert found["parameters"] == whole["parameters"] and found["selected"] == whole["selected"]
    assert found["dtype"] == f"float32, matrices in {bits} bits"
    assert found["memory_bytes"] < whole["memory_bytes"]


def test_a_plan_counts_the_matrix_that_is_unpacked_beside_the_batch() -> None:
    matrix, found = 4 * 64 * 4096, []
    for bits in (0, 8, 4):
        network = network_of(transformers.LlamaConfig(**{**TEXT, "intermediate_size": 4096}))
        if bits:
            pack_shapes(network, bits)
        weights = select_parameters(network, "all")
        found.append(scoring_along(CausalLM(network), weights, (1, 2), 4).batch_bytes)
    assert found[1] == found[2] and 0.9 * matrix < found[1] - found[0] < 2 * matrix


# ---------------------------------------------------------------- folders, adapters, trainings


@pytest.mark.parametrize("bits", [8, 4])
def test_a_checkpoint_that_is_packed_already_scores_as_one_packed_here(
    bits: int, llama: Desk, gpt2: Desk, tmp_path: Path
) -> None:
    for desk in (llama, gpt2):
        folder = tmp_path / desk.kind
        desk.packed(bits).save_pretrained(folder / "there")
        desk.tokenizer.save_pretrained(folder / "there")
        packing = ["--quantize", f"{bits}bit"]
        _, _, here, _ = desk.score(desk.whole, folder / "a", *packing)
        _, manifest, there, _ = desk.score(folder / "there", folder / "b")
        _, _, both, _ = desk.score(folder / "there", folder / "c", *packing)
        assert np.allclose(there, here, rtol=1e-4, atol=1e-5) and np.array_equal(there, both)
        assert manifest["model"]["quantised"]["bits"] == bits
        assert manifest["config"]["quantize"] == "none"
    other = "4bit" if bits == 8 else "8bit"
    words = ["--model", folder / "there", *gpt2.files, "--quantize", other, "--out", tmp_path / "d"]
    refused(f"--quantize {other}: {folder / 'there'} has its weights in {bits} bits", *words)


def refused(says: str, *words: object, command: str = "score") -> None:
    outcome = prism(command, *words)
    assert outcome.code == 2 and outcome.err.count("\n") == 1, outcome.err
    assert says in outcome.err


def lora(desk: Desk, folder: Path, **changes: Any) -> Path:
    settings = {"r": 3, "lora_alpha": 6, "target_modules": "all-linear", **changes}
    config = LoraConfig(**settings, task_type="CAUSAL_LM", fan_in_fan_out=desk.kind == "gpt2")
    network = transformers.AutoModelForCausalLM.from_pretrained(desk.whole)
    return random_adapter(folder, network, config)


ON_TOP: list[tuple[str, list[str], dict[str, Any]]] = [
    ("llama", [], {}),
    ("gpt2", [], {}),
    ("llama", ["--layers", "adapter"], {}),
    ("gpt2", ["--layers", "adapter", "--curvature", "ekfac"], {}),
    ("llama", ["--layers", "late", "--rank", "8"], {"use_rslora": True}),
    ("llama", ["--normalize", "norm"], {"target_modules": ["q_proj", "lm_head", "embed_tokens"]}),
    ("llama", ["--layers", "adapter", "--dtype", "bfloat16"], {}),
]


@pytest.mark.parametrize(("kind", "words", "settings"), ON_TOP)
def test_an_adapter_on_packed_matrices_is_that_on_what_they_unpack_to(
    kind: str,
    words: list[str],
    settings: dict[str, Any],
    llama: Desk,
    gpt2: Desk,
    tmp_path: Path,
) -> None:
    desk = llama if kind == "llama" else gpt2
    adapter = lora(desk, tmp_path / "adapter", **settings)
    narrow = "bfloat16" in words
    words = [*words, "--adapter", str(adapter)]
    folder = desk.folder / ("4bit bfloat16" if narrow else "4bit")
    _, whole, exact, _ = desk.score(folder, tmp_path / "exact", *words)
    _, base, _, _ = desk.score(
        desk.whole, tmp_path / "base", "--quantize", "4bit", "--layers", "late"
    )
    _, manifest, scores, _ = desk.score(desk.whole, tmp_path / "run", *words, "--quantize", "4bit")
    assert np.linalg.norm(scores - exact) <= (0.05 if narrow else 1e-3) * np.linalg.norm(exact)
    state = "apart" if "adapter" in words else "merged"
    assert manifest["model"]["adapter"] == whole["model"]["adapter"] == state
    assert manifest["model"]["counted_weights"] == whole["model"]["counted_weights"]
    if "late" in words:
        assert manifest["model"]["counted_weights"] == base["model"]["counted_weights"]


def test_a_loaded_peft_model_on_packed_matrices_scores_as_its_files_do(
    llama: Desk, tmp_path: Path
) -> None:
    adapter = lora(llama, tmp_path / "lora")
    for layers in ("adapter", "all"):
        words = ["--layers", layers, "--adapter", str(adapter), "--quantize", "4bit"]
        _, _, exact, _ = llama.score(llama.whole, tmp_path / layers, *words)
        network: Any = PeftModel.from_pretrained(llama.packed(4), str(adapter))
        modules = dict(network.named_modules())
        run = prism_select.score(
            network,
            POOL,
            PAIRS,
            tokenizer=llama.tokenizer,
            layers=layers,
            out=tmp_path / f"l{layers}",
        )
        scores = np.array(run.scores["score"].to_pylist())
        assert np.linalg.norm(scores - exact) <= 1e-3 * np.linalg.norm(exact)
        assert dict(network.named_modules()) == modules
        assert run.manifest["model"]["quantised"]["matrices"] == 28


def test_a_saved_direction_fits_the_whole_model_and_the_packed_one(
    gpt2: Desk, tmp_path: Path
) -> None:
    packing = ["--quantize", "4bit"]
    _, _, scores, _ = gpt2.score(gpt2.whole, tmp_path / "packed", *packing)
    words = ["--model", gpt2.whole, "--pool", gpt2.folder / "pool.jsonl"]
    saved = tmp_path / "packed" / "direction.safetensors"
    for more in ([], packing):
        out = tmp_path / f"again{len(more)}"
        outcome = prism("score", *words, "--direction", saved, *more, "--out", out)
        assert outcome.code == 0, outcome.err
        again = np.array(pq.read_table(out / "scores.parquet")["score"].to_pylist())
        assert np.corrcoef(again, scores)[0, 1] > (0.999999 if more else 0.5)
        assert np.allclose(again, scores, rtol=1e-3, atol=1e-4) == bool(more)


def test_a_direction_of_a_packed_model_is_exported_as_lora(gpt2: Desk, tmp_path: Path) -> None:
    folder = tmp_path / "direction"
    words = ["--quantize", "8bit", "--rank", "8", "--save-adapter", folder]
    gpt2.score(gpt2.whole, tmp_path / "run", *words)
    gpt2.score(gpt2.folder / "8bit", tmp_path / "exact", *words[2:-1], tmp_path / "exactly")
    adapters = [
        PeftModel.from_pretrained(gpt2.unpacked(8), str(path)).state_dict()
        for path in (folder, tmp_path / "exactly")
    ]
    for name, value in adapters[0].items():
        if "lora_B" in name:
            other = name.replace("lora_B", "lora_A")
            found, exact = (state[name] @ state[other] for state in adapters)
            assert torch.allclose(found, exact, atol=1e-4) and value.any()


def test_a_warm_up_and_an_evaluation_train_on_packed_matrices(llama: Desk, tmp_path: Path) -> None:
    out, packing = tmp_path / "run", ["--quantize", "4bit", "--warmup", "90%"]
    words = [*packing, "--budget", "50%", "--layers", "late"]
    _, manifest, warmed, _ = llama.score(llama.whole, out, *words, command="select")
    _, _, exact, _ = llama.score(
        llama.folder / "4bit", tmp_path / "exact", *words[2:], command="select"
    )
    assert np.linalg.norm(warmed - exact) <= 1e-2 * np.linalg.norm(exact)
    assert manifest["model"]["quantised"]["matrices"] == 28
    holdout = jsonl(tmp_path / "holdout.jsonl", [{**p, "prompt": p["prompt"] + "?"} for p in PAIRS])
    evaluation = [out, "--holdout", holdout, "--against", "random", "--seeds", "1"]
    refused("--full: the model of", *evaluation, "--full", command="evaluate")
    outcome = prism("evaluate", *evaluation, "--steps", "4")
    assert outcome.code == 0, outcome.err
    found = json.loads((out / "evaluation" / "evaluation.json").read_text())
    assert found


def test_an_evaluation_trains_beside_a_loaded_network(llama: Desk, tmp_path: Path) -> None:
    network = llama.packed(4)
    before = dict(network.named_modules())
    run = prism_select.select(
        network, POOL, PAIRS, tokenizer=llama.tokenizer, budget=0.5, out=tmp_path / "run"
    )
    holdout = [{**pair, "prompt": pair["prompt"] + "?"} for pair in PAIRS]
    assert prism_select.evaluate(run, holdout=holdout, against="random", seeds=1, steps="4")
    assert dict(network.named_modules()) == before and network.is_loaded_in_4bit


# ---------------------------------------------------------------- what is refused


def test_what_cannot_be_packed_is_refused_in_one_line(
    llama: Desk, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["--model", llama.whole, *llama.files, "--out", tmp_path / "run", "--quantize", "4bit"]
    refused("--quantize 4bit and --dtype float64: bitsandbytes packs", *words, "--dtype", "float64")
    dora = lora(llama, tmp_path / "dora", use_dora=True)
    for layers in ("adapter", "all"):
        refused(
            f"adapter {dora}: it is not LoRA, or has DoRA, and the model's matrices are in few",
            *words,
            *("--adapter", dora, "--layers", layers),
        )
    saved = lora(llama, tmp_path / "saved", target_modules=["q_proj"], modules_to_save=["up_proj"])
    refused("up_proj saved whole", *words, "--adapter", saved)
    gguf = tmp_path / "gguf"
    gguf.mkdir()
    (gguf / "model.gguf").write_bytes(b"")
    refused("--quantize 4bit: ", "--model", gguf, *words[2:])
    with pytest.raises(BadOption, match="quantize: a loaded model is taken as it is"):
        prism_select.score(
            llama.packed(4), POOL, PAIRS, tokenizer=llama.tokenizer, quantize="8bit", out=tmp_path
        )

    def broken(bits: int, device: object) -> None:
        raise RuntimeError("no kernel\nhere")

    with monkeypatch.context() as patch:
        patch.setattr("prism_select.models.quantised._try", broken)
        refused("cannot unpack 4 bits on cpu (no kernel here); try another version", *words)
    with monkeypatch.context() as patch:
        patch.setattr("prism_select.models.quantised.find_spec", lambda name: None)
        refused("--quantize 4bit: needs bitsandbytes; pip install 'prism-select[quantize]'", *words)
    assert not (tmp_path / "run").exists()


def test_a_run_of_other_bits_is_another_run(llama: Desk, tmp_path: Path) -> None:
    words = ["--model", llama.whole, *llama.files, "--out", tmp_path / "run"]
    assert prism("score", *words, "--quantize", "4bit").code == 0
    refused("quantize", *words, "--quantize", "8bit")
    refused("quantize", *words)


def test_what_bitsandbytes_can_pack_otherwise_unpacks_as_it_says(llama: Desk) -> None:
    ways: list[dict[str, Any]] = [
        {"bnb_4bit_use_double_quant": True},
        {"bnb_4bit_quant_type": "fp4"},
        {"bnb_4bit_quant_storage": torch.bfloat16},
    ]
    for way in ways:
        config = transformers.BitsAndBytesConfig(load_in_4bit=True, **way)
        network = transformers.AutoModelForCausalLM.from_pretrained(
            llama.whole, quantization_config=config, dtype=torch.float32
        )
        matrices = {name: packed.unpack() for name, packed in packed_matrices(network).items()}
        assert len(matrices) == 28
        plain = dict(network.dequantize().named_parameters())
        assert all(matrix.equal(plain[name]) for name, matrix in matrices.items())


@pytest.mark.parametrize("bits", [8, 4])
def test_numbers_and_scales_that_do_not_fit_are_never_read(
    bits: int, llama: Desk, tmp_path: Path
) -> None:
    model = tmp_path / "model"
    llama.packed(bits).save_pretrained(model)
    llama.tokenizer.save_pretrained(model)
    sound = load_file(model / "model.safetensors")
    module = "model.layers.1.mlp.up_proj"
    scales = f"{module}.SCB" if bits == 8 else f"{module}.weight.absmax"
    forged = {"quant_type": "nf4", "blocksize": 0, "dtype": "float32", "shape": [64, 128]}
    changes: list[dict[str, torch.Tensor]] = [
        {name: sound[name].flatten()[: sound[name].numel() // 2].clone()}
        for name in (scales, f"{module}.weight")
    ]
    if bits == 4:
        text = torch.tensor([*json.dumps(forged).encode()], dtype=torch.uint8)
        changes.append({f"{module}.weight.quant_state.bitsandbytes__nf4": text})
    words = ["--model", model, *llama.files, "--out", tmp_path / "run"]
    for change in changes:
        save_file({**sound, **change}, model / "model.safetensors", {"format": "pt"})
        refused(f"--model {model}: {module} should be packed by bitsandbytes", *words)
