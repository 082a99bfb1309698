"""A model over several devices, fake ones with real numbers: what one device gives, and a network
that is left as it was."""

import copy
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any

import accelerate
import pytest
import torch
import transformers
from conftest import CHATML, jsonl, prism, save_model
from fake_devices import fake_devices, moved
from test_answer_products import answers_of
from test_engines import V
from test_engines import network_of as one_of
from test_objects import PAIRS, POOL
from test_range_finder import coefficients_of
from tiny import batch_of, pairs_of
from torch import Tensor

import prism_select
from prism_select import Run
from prism_select.commands import plan_without_weights
from prism_select.core.blocks import stack_of
from prism_select.core.engines import ENGINES
from prism_select.core.layers import Factored, Parameters, dense
from prism_select.core.likelihood import Batch
from prism_select.core.target_gradient import Side, target_gradient
from prism_select.data.encoding import Encoded
from prism_select.directions.answer_products import answer_products
from prism_select.directions.curvature import CURVATURES
from prism_select.directions.low_rank import factor
from prism_select.directions.range_finder import low_rank_directions
from prism_select.models.causal_lm import CausalLM
from prism_select.models.devices import bytes_by_device
from prism_select.models.layer_selection import select_parameters
from prism_select.models.lora_training import TrainingSettings, train
from prism_select.models.placement import free_memory, network_of, place, scoring_share
from prism_select.models.quantised import pack_shapes
from prism_select.run.config import ModelOptions, ScoreConfig
from prism_select.run.errors import BadModel, BadOption
from prism_select.run.progress import Silent
from prism_select.scoring.gradient_norms import with_norms
from prism_select.scoring.model_plan import weight_bytes
from prism_select.selection.cascade_prediction import feature_extractor
from prism_select.selection.hidden_states import answer_states, layers_of

NAMES = ("llama", "llama, tied", "gemma3", "gpt2", "mixtral")
FIRST, SECOND = "cpu:1", "cpu:2"


def spread(network: Any) -> Any:
    """The upper half of the blocks, and a head of its own, on a second device."""
    stack, blocks = stack_of(network)
    devices = {f"{stack}.{k}": SECOND for k in range(len(blocks) // 2, len(blocks))}
    head = network.get_output_embeddings()
    if head.weight is not network.get_input_embeddings().weight:
        (name,) = (name for name, module in network.named_modules() if module is head)
        devices[name] = SECOND
    return moved(network, {**devices, "": FIRST})


def on(device: torch.device, batch: Batch) -> Batch:
    return Batch(*(tensor.to(device) for tensor in (batch.tokens, batch.real, batch.supervised)))


def side_on(device: torch.device, side: Side) -> Side:
    return Side([on(device, batch) for batch in side.batches], side.order)


Found = Mapping[str, Tensor]


def engines(model: CausalLM, weights: Parameters, name: str) -> Found:
    """Scores by an engine, along a direction and its half, in full and of low rank."""
    chosen, rejected = (side_on(model.device, side) for side in pairs_of(4, vocabulary=V))
    target = target_gradient(model, weights, (chosen, rejected), "prism")
    full: list[Factored] = [target.direction, target.chosen]
    low = [factor(model.network, direction, 4).direction for direction in full]
    batch, found = on(model.device, batch_of(5, 12, 3, vocabulary=V)), dict[str, Tensor]()
    for rank, directions in (("full", full), ("4", low)):
        scores = ENGINES[name](model, weights, directions)(batch)
        found |= {rank: scores.values, f"{rank}, loglik": scores.loglik}
    return found


def norms(model: CausalLM, weights: Parameters) -> Found:
    batch = on(model.device, batch_of(5, 12, 3, vocabulary=V))
    return {"norms": with_norms(model, weights, [])(batch)[1]}


def products(model: CausalLM, weights: Parameters) -> Found:
    return answer_products(model, weights, side_on(model.device, answers_of(V))).blocks


def low_rank(model: CausalLM, weights: Parameters) -> Found:
    side = side_on(model.device, answers_of(V))
    return dense(low_rank_directions(model, weights, side, coefficients_of(2), 4)[1])


def curvature(model: CausalLM, weights: Parameters, kind: str) -> Found:
    rows = [on(model.device, batch_of(2, 10, seed, vocabulary=V)) for seed in range(2)]
    fitted = CURVATURES[kind](model, weights, rows, 5)
    return fitted.solve({n: torch.ones_like(w) for n, w in weights.items()}, 0.1)


def features(model: CausalLM, weights: Parameters) -> Found:
    batch = on(model.device, batch_of(3, 12, 3, vocabulary=V))
    states = answer_states(model, batch, layers_of(model.network))
    return {"features": feature_extractor(model, 0)(batch)} | {
        str(k): s for k, s in enumerate(states)
    }


WAYS: Mapping[str, Callable[[CausalLM, Parameters], Found]] = {
    **{name: partial(engines, name=name) for name in ENGINES},
    "norms": norms,
    "products": products,
    "low rank": low_rank,
    "diagonal": partial(curvature, kind="diagonal"),
    "ekfac": partial(curvature, kind="ekfac"),
    "features": features,
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", NAMES)
def test_two_devices_give_what_one_gives(name: str, way: str) -> None:
    one = one_of(name)
    exact = WAYS[way](one, select_parameters(one.network, "all"))
    with fake_devices():
        two = CausalLM(spread(copy.deepcopy(one.network)))
        assert {str(device) for device in two.devices} == {FIRST, SECOND}
        found = WAYS[way](two, select_parameters(two.network, "all"))
        plain = {key: value.cpu() for key, value in found.items()}
    assert plain.keys() == exact.keys()
    for key, value in plain.items():
        assert torch.allclose(value, exact[key], rtol=1e-4, atol=1e-6), key


# ---------------------------------------------------------------- a model that is spread already


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("devices")
    save_model(folder / "model", CHATML)
    return folder


def selected(network: Any, folder: Path, **options: Any) -> Run:
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder / "model")
    given = {"tokenizer": tokenizer, "budget": "50%", **options}
    return prism_select.select(network, POOL, PAIRS, **given)


def loaded(folder: Path) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(folder / "model")


def scores_of(run: Run) -> list[float]:
    scores: list[float] = run.scores["score"].to_pylist()
    return scores


@pytest.mark.parametrize("options", [{}, {"rank": 4}, {"layers": "late", "normalize": "norm"}])
def test_a_run_on_two_devices_chooses_as_on_one(folder: Path, options: dict[str, Any]) -> None:
    one = selected(loaded(folder), folder, **options)
    with fake_devices():
        network = spread(loaded(folder))
        two = selected(network, folder, **options)
        assert not any(module._forward_pre_hooks for module in network.modules())
    assert two.manifest["model"]["device"] == f"{FIRST}, {SECOND}"
    assert [*two.manifest["plan"]["by_device"]] == [FIRST, SECOND]
    assert "by_device" not in one.manifest["plan"]
    assert scores_of(two) == pytest.approx(scores_of(one), rel=1e-3, abs=1e-4)
    assert two.scores["verdict"].to_pylist() == one.scores["verdict"].to_pylist()


def test_a_network_with_accelerates_hooks_is_scored_and_keeps_them(folder: Path) -> None:
    plain, network = loaded(folder), loaded(folder)
    parts = {f"model.layers.{k}": "cpu" for k in range(len(network.model.layers))}
    rest = {f"model.{name}": "cpu" for name in ("embed_tokens", "norm", "rotary_emb")}
    accelerate.dispatch_model(network, {**parts, **rest, "lm_head": "cpu"}, force_hooks=True)
    before = {module: dict(vars(module)) for module in network.modules()}
    assert sum("_hf_hook" in held for held in before.values()) > 10
    run = selected(network, folder)
    assert scores_of(run) == scores_of(selected(plain, folder))
    for module, held in before.items():
        for name in ("forward", "_old_forward", "_hf_hook"):
            assert vars(module).get(name) is held.get(name), name
    assert not any(module._forward_pre_hooks for module in network.modules())


def test_weights_that_accelerate_has_sent_away_are_refused(folder: Path) -> None:
    network = loaded(folder)
    accelerate.cpu_offload(network)
    with pytest.raises(BadModel, match=r"wait on the host or on disk.*--device-map auto"):
        selected(network, folder)
    with pytest.raises(BadOption, match="device_map: a loaded model is taken as it is"):
        selected(loaded(folder), folder, device_map="auto")


# ---------------------------------------------------------------- placement

GB = 10**9
HOST = torch.device("cpu")
LLAMA_8B = {
    "vocab_size": 128_256,
    "hidden_size": 4096,
    "intermediate_size": 14_336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "dtype": "bfloat16",
}


def gpu(number: int) -> torch.device:
    return torch.device("cuda", number)


@cache
def shapes() -> Any:
    return network_of(transformers.LlamaConfig(**LLAMA_8B))


def placed(*sizes: float, host: float = 60) -> dict[torch.device, list[str]]:
    """Names of modules on each device, of GPUs of these GB."""
    memory = {gpu(number): int(size * GB) for number, size in enumerate(sizes)}
    share = scoring_share(shapes(), ModelOptions(), "all")
    found = dict[torch.device, list[str]]()
    for name, device in place(shapes(), {**memory, HOST: int(host * GB)}, share).items():
        found.setdefault(device, []).append(name)
    return found


def size_of(names: Sequence[str]) -> int:
    modules = [shapes().get_submodule(name) for name in names]
    return sum(p.numel() * p.element_size() for m in modules for p in m.parameters())


@pytest.mark.parametrize(
    ("sizes", "devices"),
    [
        ((80,), [gpu(0)]),
        ((24, 24), [gpu(0), gpu(1)]),
        ((16, 16, 16), [gpu(0), gpu(1), gpu(2)]),
        ((24,), [gpu(0), HOST]),
        ((), [HOST]),
    ],
)
def test_weights_leave_room_for_scoring_and_blocks_stay_whole(
    sizes: Sequence[float], devices: Sequence[torch.device]
) -> None:
    found = placed(*sizes)
    assert list(found) == devices
    for device, size in zip(devices, sizes, strict=False):
        assert 1.7 * size_of(found[device]) <= size * GB
    names = [name for part in found.values() for name in part]
    assert size_of(names) == size_of([""])
    blocks = [name for name in names if name.startswith("model.layers")]
    assert blocks == [f"model.layers.{k}" for k in range(32)] or names == [""]
    if len(sizes) > 1:
        assert max(map(size_of, found.values())) < 2 * min(map(size_of, found.values()))


def test_directions_in_full_leave_less_room_for_weights() -> None:
    given: Mapping[str, Any] = {"model": "m", "pool": ["p"], "target": ["t"], "out": "o"}
    options, curved = ScoreConfig(**given, rank="full"), ScoreConfig(**given, curvature="ekfac")
    assert scoring_share(shapes(), options, "all") == pytest.approx(1 / 2.7)
    assert scoring_share(shapes(), options, "all") < scoring_share(shapes(), options, "late")
    assert scoring_share(shapes(), curved, "all") == pytest.approx(1 / (1.7 + 12 / 2))
    few = scoring_share(shapes(), options, "last:1")  # up to 268 million numbers: in float32
    assert few == pytest.approx(scoring_share(shapes(), curved, "last:1"))
    assert scoring_share(shapes(), ModelOptions(), "all") == pytest.approx(1 / 1.7)


@pytest.mark.parametrize(("bits", "size"), [(8, 24), (4, 20)])
def test_matrices_in_few_bits_are_counted_as_they_are(bits: int, size: int) -> None:
    packed = network_of(transformers.LlamaConfig(**LLAMA_8B))
    pack_shapes(packed, bits)
    share = scoring_share(packed, ModelOptions(), "all")
    found = sum(bytes_by_device(packed).values())
    assert found == pytest.approx(weight_bytes(packed), abs=1000) and found < share * size * GB
    assert [*place(packed, {gpu(0): size * GB}, share).values()] == [gpu(0)]
    assert gpu(0) != [*placed(size)][-1] == HOST


def test_a_model_without_room_is_refused() -> None:
    with pytest.raises(BadModel, match=r"take 16\.1 GB.*room for 10\.6 GB"):
        placed(10, host=8)


def test_each_process_of_torchrun_takes_its_own_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 5)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda number: (number * GB, 9 * GB))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    found = []
    for rank in "01":
        monkeypatch.setenv("LOCAL_RANK", rank)
        found.append(free_memory())
    assert [[*memory] for memory in found] == [[gpu(0), gpu(1), HOST], [*map(gpu, (2, 3, 4)), HOST]]
    assert found[1][gpu(3)] == 3 * GB
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "6")
    with pytest.raises(BadOption, match="6 processes share 5 GPUs"):
        free_memory()


# ---------------------------------------------------------------- the option


def test_one_device_is_said_and_changes_nothing(folder: Path) -> None:
    jsonl(folder / "pool.jsonl", POOL)
    jsonl(folder / "pairs.jsonl", PAIRS)
    words: list[object] = ["score", "--model", folder / "model", "--pool", folder / "pool.jsonl"]
    words += ["--target", folder / "pairs.jsonl", "--out"]
    plain = prism(*words, folder / "plain")
    spread_out = prism(*words, folder / "spread", "--device-map", "auto")
    assert not plain.code and not spread_out.code, spread_out.err
    assert "--device-map auto: all of the model is on cpu, as without it" in spread_out.out
    runs = [Run(folder / name) for name in ("plain", "spread")]
    assert scores_of(runs[0]) == scores_of(runs[1])
    both = prism(*words, folder / "both", "--device", "cpu", "--device-map", "auto")
    assert both.code == 2 and "one names a device, the other takes all" in both.err


def test_weights_are_loaded_where_the_map_says(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Real hooks of accelerate, of a map over the CPU and the CPU, are gone after loading."""
    from prism_select.models import loading

    parts = ["model.embed_tokens", "model.layers", "model.norm", "model.rotary_emb", "lm_head"]
    asked = dict[str, Any]()

    def dispatched(network: Any, found: Any, *_: Any, **__: Any) -> Any:
        return accelerate.dispatch_model(network, found, force_hooks=True)

    def from_pretrained(*args: Any, **options: Any) -> Any:
        asked.update(options["device_map"])
        network, report = original(*args, **options)
        return dispatched(network, options["device_map"]), report

    original = transformers.AutoModelForCausalLM.from_pretrained
    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", from_pretrained)
    monkeypatch.setattr(loading, "place", lambda *_: dict.fromkeys(parts, HOST))
    config = ModelOptions(model=str(folder / "model"), device_map="auto")
    model = loading.load_model(config, "all", Silent()).model
    assert [*asked] == parts
    assert not any(hasattr(module, "_hf_hook") for module in model.network.modules())
    assert not hasattr(model.network, "hf_device_map")


def test_a_plan_from_a_configuration_gives_the_memory_of_each_device(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    alone, size = folder / "alone", (folder / "model" / "model.safetensors").stat().st_size
    alone.mkdir()
    (alone / "config.json").write_bytes((folder / "model" / "config.json").read_bytes())
    memory = {gpu(0): 3 * size, gpu(1): 3 * size, HOST: 9 * size}
    monkeypatch.setattr(plan_without_weights, "free_memory", lambda _: memory)
    words: list[object] = ["--model", alone, "--pool", jsonl(folder / "pool.jsonl", POOL)]
    words += ["--target", jsonl(folder / "pairs.jsonl", PAIRS), "--out", folder / "none"]
    done = prism("score", *words, "--dry-run", "--device-map", "auto")
    assert not done.code, done.err
    assert re.search(
        r"at the highest of a whole run: cuda:0 0\.\d+ GB, cuda:1 0\.\d+", words_of(done.out)
    )


def words_of(text: str) -> str:
    return " ".join(text.split())


def test_a_training_leaves_parts_on_their_devices_and_refuses_the_host(folder: Path) -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder / "model")
    rows = [Encoded([5, 6, 7, 8], [False, False, True, True], False)] * 8
    with fake_devices():
        model = CausalLM(spread(loaded(folder)))
        steps = list[float]()
        learner = train(
            model, tokenizer, rows, TrainingSettings(0, 2), lambda _, loss: steps.append(loss)
        )
        devices = {str(parameter.device) for parameter in learner.parameters()}
    assert devices == {FIRST, SECOND} and len(steps) == 2
    assert not hasattr(model.network, "hf_device_map")
    model.devices = [gpu(0), HOST]
    with pytest.raises(BadOption, match="a training takes GPUs alone"):
        train(model, tokenizer, rows, TrainingSettings(0, 2))


def test_accelerate_is_asked_for_where_it_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "accelerate", None)
    with pytest.raises(BadOption, match=r"accelerate is not installed.*prism-select\[devices\]"):
        placed(24, 24)
