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
from conftest import build_tokenizer, jsonl, prism
from test_engines import SMALL, V
from tiny import batch_of, pairs_of
from torch.nn import functional

from prism_select.core.engines import ENGINES
from prism_select.core.likelihood import Batch
from prism_select.core.packed import PackedLinear
from prism_select.core.target_gradient import Side
from prism_select.models.causal_lm import unchanged
from prism_select.models.layer_selection import select_parameters
from prism_select.models.loading import adopt, object_fingerprint
from prism_select.run.objects import ModelObject
from prism_select.scoring.in_memory import score_tensors, target_direction

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
    assert later == mark or bits == 4  # a forward pass may round scales of 4 bits
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
