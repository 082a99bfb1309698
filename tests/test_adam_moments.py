"""--curvature adam: the direction is divided by the moments that transformers.Trainer saved, each
parameter's by its own."""

import json
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import transformers
from conftest import Outcome, jsonl, prism, save_model
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from test_commands import PAIRS, POOL, Loop, plain

import prism_select
from prism_select.directions.adam_moments import in_trainers_order
from prism_select.run.errors import RunMismatch

DECAY_2, EPS, STEPS = 0.95, 1e-6, (2, 4)
ADAM = ("--curvature", "adam")

Moments = dict[str, torch.Tensor]


class Recorder(transformers.TrainerCallback):  # type: ignore[misc]
    """v of each parameter by its recurrence, from the gradients that the optimizer is given."""

    def __init__(self) -> None:
        self.step, self.moments = 0, Moments()
        self.saved = dict[int, Moments]()

    def on_pre_optimizer_step(self, *given: Any, model: Any, **rest: Any) -> None:
        self.step += 1
        for name, weight in model.named_parameters():
            if weight.requires_grad:
                square = (1 - DECAY_2) * weight.grad.double().square()
                self.moments[name] = DECAY_2 * self.moments.get(name, 0) + square
        corrected = 1 - DECAY_2**self.step
        self.saved[self.step] = {name: v / corrected for name, v in self.moments.items()}


def trained(folder: Path, base: Path, adapter: bool, **options: Any) -> dict[int, Moments]:
    """A run of transformers.Trainer with two checkpoints, and v̂ at each."""
    torch.manual_seed(0)
    tokenizer = transformers.AutoTokenizer.from_pretrained(base)
    network: Any = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    if adapter:
        config = LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False)
        network = get_peft_model(network, config)
    coded = [plain(tokenizer, str(row["prompt"]), str(row["completion"])) for row in POOL[:8]]
    rows: Any = [
        {"input_ids": ids, "labels": [-100] * is_own.count(False) + ids[is_own.count(False) :]}
        for ids, is_own in coded
    ]
    settings: dict[str, Any] = {
        "max_steps": max(STEPS),
        "save_steps": STEPS[0],
        "logging_steps": 1,
        "per_device_train_batch_size": 1,
        "learning_rate": 1e-2,
        "weight_decay": 0.1,
        "adam_beta2": DECAY_2,
        "adam_epsilon": EPS,
        "use_cpu": True,
        "report_to": "none",
        "disable_tqdm": True,
    }
    recorder = Recorder()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        arguments = transformers.TrainingArguments(str(folder), **settings | options)
        transformers.Trainer(
            network,
            arguments,
            train_dataset=rows,
            processing_class=tokenizer,
            data_collator=transformers.default_data_collator,
            callbacks=[recorder],
        ).train()
    return recorder.saved


class Place:
    """A base, a Trainer's checkpoints of it (`full`) and of an adapter on it (`lora`), and v̂."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.base = folder, save_model(folder / "base")
        self.full, self.lora = folder / "full", folder / "lora"
        self.moments = trained(self.full, self.base, adapter=False)
        self.moments_of_lora = trained(self.lora, self.base, adapter=True)
        self.pool = jsonl(folder / "pool.jsonl", POOL)
        self.target = jsonl(folder / "pairs.jsonl", PAIRS)

    def score(self, out: Path, *words: object) -> Outcome:
        files = ["--pool", self.pool, "--target", self.target, "--out", out]
        return prism("score", *files, *words)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    return Place(tmp_path_factory.mktemp("adam"))


def scores(run: Path, name: str = "score") -> Any:
    return pq.read_table(run / "scores.parquet")[name].to_numpy()


def apart(one: Any, other: Any) -> float:
    return float(np.linalg.norm(one - other) / np.linalg.norm(other))


def expected(folder: Path, moments: Moments, damping: float) -> Any:
    """One parameter after the other in float64: gradient / (√v̂ + ε + damping · their mean)."""
    naive = Loop(folder)
    naive.network.double()
    sides = [
        [plain(naive.tokenizer, str(pair["prompt"]), str(pair[side])) for pair in PAIRS]
        for side in ("chosen", "rejected")
    ]
    gradient, _ = naive.direction(list(zip(*sides, strict=True)), "prism", damping=0)
    names = [name for name, _ in naive.network.named_parameters()]
    divided = []
    for name, part in zip(names, gradient, strict=True):
        divisor = moments[name].sqrt() + EPS
        divided.append(part / (divisor + damping * divisor.mean()))
    rows = [plain(naive.tokenizer, str(row["prompt"]), str(row["completion"])) for row in POOL]
    return np.array([naive.score(row, divided) for row in rows])


@pytest.mark.parametrize("damping", [0.1, 1e-6])
def test_scores_are_those_of_a_dense_definition(
    place: Place, damping: float, tmp_path: Path
) -> None:
    checkpoint = place.full / "checkpoint-4"
    words = ["--model", checkpoint, *ADAM, "--damping", damping, "--dtype", "float64"]
    done = place.score(tmp_path / "run", *words)
    assert done.code == 0, done.err
    dense = expected(checkpoint, place.moments[4], damping)
    assert apart(scores(tmp_path / "run"), dense) < 1e-5
    halves = [scores(tmp_path / "run", f"score_{side}") for side in ("chosen", "rejected")]
    assert apart(halves[0] - halves[1], dense) < 1e-5
    manifest = json.loads((tmp_path / "run" / "manifest.json").read_text())
    assert manifest["curvature"]["name"] == "adam" and manifest["curvature"]["rows"] == 0


def test_checkpoints_add_up_each_with_its_own_moments(place: Place, tmp_path: Path) -> None:
    done = place.score(tmp_path / "run", "--checkpoint", place.full, *ADAM, "--dtype", "float64")
    assert done.code == 0, done.err
    points = json.loads((tmp_path / "run" / "manifest.json").read_text())["checkpoints"]
    weights = [point["weight"] for point in points]
    assert weights[0] > weights[1] > 0
    dense = sum(
        weight * expected(place.full / f"checkpoint-{step}", place.moments[step], 0.1)
        for weight, step in zip(weights, STEPS, strict=True)
    )
    assert apart(scores(tmp_path / "run"), dense) < 1e-5


def test_moments_of_an_adapter_are_those_of_its_own_weights(place: Place, tmp_path: Path) -> None:
    checkpoint = place.lora / "checkpoint-4"
    words = ["--model", place.base, "--adapter", checkpoint, "--layers", "adapter"]
    for name, more in {"flat": ("--curvature", "flat"), "adam": ADAM}.items():
        done = place.score(tmp_path / name, *words, *more)
        assert done.code == 0, done.err
    flat, adam = (load_file(tmp_path / n / "direction.safetensors") for n in ("flat", "adam"))
    assert len(flat) == 2 * 2 * 4 * 7  # both halves, A and B of seven matrices in four blocks
    for name, gradient in flat.items():
        inside = name.removeprefix("chosen/")
        divisor = place.moments_of_lora[4][f"base_model.model.{inside}"].sqrt() + EPS
        assert apart(adam[name], gradient / (divisor + 0.1 * divisor.mean())) < 1e-5
    done = place.score(tmp_path / "whole", *words[:4], *ADAM)
    assert done.code == 2 and "give --layers adapter" in done.err
    done = place.score(tmp_path / "sum", "--checkpoint", place.lora, *words[4:], *ADAM)
    assert done.code == 0, done.err


def test_other_moments_are_another_run(place: Place, tmp_path: Path) -> None:
    folder = shutil.copytree(place.full / "checkpoint-4", tmp_path / "checkpoint")
    given: dict[str, Any] = {"model": str(folder), "pool": place.pool, "target": place.target}
    prism_select.score(**given, curvature="adam", out=tmp_path / "run")
    shutil.copy(place.full / "checkpoint-2" / "optimizer.pt", folder)
    with pytest.raises(RunMismatch, match="model"):
        prism_select.score(**given, curvature="adam", out=tmp_path / "run")


def test_an_older_trainers_groups_are_told_by_their_sizes(place: Place) -> None:
    network = transformers.AutoModelForCausalLM.from_pretrained(place.base)
    names = [name for name, _ in network.named_parameters()]
    norms = [name for name in names if "norm" in name]
    others = [name for name in names if name not in norms]
    assert in_trainers_order(network, names, [len(others), len(norms)]) == [*others, *norms]
    assert in_trainers_order(network, names, [len(names), 0]) == names
    assert in_trainers_order(network, names, [len(names) - 1, 1]) is None
    assert in_trainers_order(network, names, [len(names)]) is None


# ---------------------------------------------------------------- what is refused


def changed(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    def write(file: Path) -> None:
        saved = torch.load(file, weights_only=True)
        change(saved)
        torch.save(saved, file)

    return write


def renamed(saved: dict[str, Any]) -> None:
    """As the 8-bit optimizers of bitsandbytes call them."""
    for state in saved["state"].values():
        state["state2"] = state.pop("exp_avg_sq")


def of_a_wider_model(saved: dict[str, Any]) -> None:
    saved["state"][0]["exp_avg_sq"] = torch.zeros(400, 32)


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (Path.unlink, "has no optimizer.pt; give a checkpoint of transformers.Trainer"),
        (lambda file: file.write_bytes(b"nothing"), "it cannot be read"),
        (lambda file: torch.save([1], file), "it cannot be read"),
        (changed(renamed), "it holds step, exp_avg, state2, not the moments of torch's AdamW"),
        (changed(lambda saved: saved["state"].pop(3)), "it holds nothing, not the moments"),
        (changed(lambda saved: saved["param_groups"][0].pop("betas")), "not the moments of torch"),
        (changed(of_a_wider_model), "have the shape (400, 32), and the model's (320, 32)"),
        (changed(lambda saved: saved["param_groups"].pop()), "and the model has 39"),
    ],
)
def test_what_does_not_fit_is_one_line(
    spoil: Callable[[Path], None], reason: str, place: Place, tmp_path: Path
) -> None:
    folder = shutil.copytree(place.full / "checkpoint-4", tmp_path / "checkpoint")
    spoil(folder / "optimizer.pt")
    done = place.score(tmp_path / "run", "--model", folder, *ADAM)
    assert done.code == 2 and done.err.count("\n") == 1, done.err
    assert reason in done.err and not (tmp_path / "run").exists()


def test_another_optimizer_is_refused(place: Place, tmp_path: Path) -> None:
    trained(tmp_path / "other", place.base, adapter=False, optim="adafactor")
    done = place.score(tmp_path / "run", "--model", tmp_path / "other" / "checkpoint-4", *ADAM)
    assert done.code == 2 and "not the moments of torch's AdamW" in done.err, done.err


def test_every_checkpoint_is_looked_at_before_the_first_is_scored(
    place: Place, tmp_path: Path
) -> None:
    folder = shutil.copytree(place.full, tmp_path / "trainer")
    (folder / "checkpoint-4" / "optimizer.pt").unlink()
    done = place.score(tmp_path / "run", "--checkpoint", folder, *ADAM)
    assert done.code == 2 and "checkpoint-4 has no optimizer.pt" in done.err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["--warmup", "5%"], "--curvature adam and --warmup"),
        (["--tune", "pairs"], "how --curvature adam ranks"),
    ],
)
def test_what_moments_cannot_say_is_refused(
    words: list[str], reason: str, place: Place, tmp_path: Path
) -> None:
    done = place.score(tmp_path / "run", "--model", place.full / "checkpoint-4", *ADAM, *words)
    assert done.code == 2 and reason in done.err
    done = prism("pairs", "--check", place.target, "--model", place.base, *ADAM)
    assert done.code == 2 and "--curvature adam: not of pairs alone" in done.err
