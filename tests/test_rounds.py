"""The callback that selects again during training: examples/rounds.py."""

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import jsonl, prism
from datasets import Dataset, IterableDataset, load_dataset
from peft import LoraConfig
from test_examples import example
from transformers import TrainerCallback
from trl.trainer.sft_config import SFTConfig
from trl.trainer.sft_trainer import SFTTrainer

import prism_select
from prism_select.demo.story import MODEL
from prism_select.demo.world import pairs, pool

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
Rounds: Any = example("rounds").Rounds
TARGETS = {skill: pairs(skill, 8, 0) for skill in ("capitals", "plurals")}
LORA = LoraConfig(r=4, target_modules="all-linear")


def as_messages(row: dict[str, Any]) -> dict[str, Any]:
    roles = {"prompt": "user", "completion": "assistant"}
    return {key: [{"role": role, "content": row[key]}] for key, role in roles.items()}


ROWS = [as_messages(row) for row in pool(60, 0)]


class Careful(Rounds):  # type: ignore[misc]
    """Fails where a selection leaves anything changed behind."""

    def choose(self, step: int, objects: Any, made: bool = False) -> None:
        before = condition(objects["model"])
        super().choose(step, objects, made)
        assert condition(objects["model"]) == before


def condition(model: Any) -> list[Any]:
    """Random states; mode, forward pass and hooks of every module; every parameter."""
    return [
        random.getstate(),
        [np.array(part).tolist() for part in np.random.get_state()],
        torch.get_rng_state().tolist(),
        [(m.training, m.__dict__.get("forward"), len(m._forward_hooks)) for m in model.modules()],
        [(p.requires_grad, p.grad, p.detach().numpy().tobytes()) for p in model.parameters()],
    ]


class StopAt(TrainerCallback):  # type: ignore[misc]
    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **objects: Any) -> None:
        control.should_training_stop = state.global_step == self.step


class Watched(SFTTrainer):
    """Notes the tokens of every row that it trains on."""

    seen: list[list[int]]

    def training_step(self, model: Any, inputs: Any, *others: Any) -> Any:
        for tokens, real in zip(inputs["input_ids"], inputs["attention_mask"], strict=True):
            self.seen.append(tokens[real.bool()].tolist())
        return super().training_step(model, inputs, *others)  # type: ignore[no-untyped-call]


def trainer(
    folder: Path, callbacks: list[Any], rows: Any = None, lora: Any = None, **settings: Any
) -> Watched:
    args = {"max_steps": 12, "per_device_train_batch_size": 4, "bf16": False} | settings
    made = Watched(
        model=str(MODEL),
        args=SFTConfig(
            output_dir=str(folder / "trainer"),
            learning_rate=1e-3,
            use_cpu=True,
            report_to="none",
            disable_tqdm=True,
            **args,
        ),
        train_dataset=Dataset.from_list(ROWS) if rows is None else rows,
        peft_config=lora,
        callbacks=callbacks,
    )
    made.seen = []
    return made


def steps(folder: Path) -> dict[int, list[int]]:
    """Of each step the rows."""
    lines = map(json.loads, (folder / "steps.jsonl").read_text(encoding="utf-8").splitlines())
    return {line["step"]: line["rows"] for line in lines}


def chosen(folder: Path) -> set[int]:
    verdicts = prism_select.Run(folder).scores["verdict"].to_pylist()
    return {row for row, verdict in enumerate(verdicts) if verdict == "selected"}


def weights(made: Watched) -> dict[str, torch.Tensor]:
    return {name: each.detach().clone() for name, each in made.model.named_parameters()}


def test_rounds_train_on_what_the_model_of_their_step_chooses_and_go_on_after_a_stop(
    tmp_path: Path,
) -> None:
    """Sixty rows are fifteen batches: the eighth step, the end of an epoch, takes one of them, the
    others two."""
    options = {"pool": ROWS, "target": TARGETS, "budget": "20%", "layers": "late"}
    settings = {"gradient_accumulation_steps": 2, "save_steps": 5}
    whole = trainer(tmp_path, [Careful(3, tmp_path / "whole", **options)], **settings)
    whole.train()
    folder = tmp_path / "whole"
    taken = steps(folder)
    choices = [chosen(folder / f"round-{number}") for number in (1, 2, 3)]
    assert [len(taken[step]) for step in range(1, 13)] == [8] * 7 + [4] + [8] * 4
    drawn = [row for rows in taken.values() for row in rows]
    assert [whole.train_dataset["input_ids"][row] for row in drawn] == whole.seen
    assert choices[0] != choices[1] != choices[2]
    parts = drawn[:36], drawn[36:64], drawn[64:]  # a batch later than steps 4 and 8
    assert all({*part} == choice for part, choice in zip(parts, choices, strict=True))
    assert all(sorted(drawn[at : at + 12]) == sorted(choices[0]) for at in (0, 12))
    assert "score:plurals" in prism_select.Run(folder / "round-3").scores.column_names
    assert (folder / "round-3" / "report.html").exists()

    first, second = (Careful(3, tmp_path / "parts", **options) for _ in range(2))
    trainer(tmp_path / "stopped", [first, StopAt(9)], **settings).train()
    assert steps(tmp_path / "parts") == {step: taken[step] for step in range(1, 10)}
    again = trainer(tmp_path / "stopped", [second], **settings)
    again.train(resume_from_checkpoint=str(tmp_path / "stopped" / "trainer" / "checkpoint-5"))
    assert steps(tmp_path / "parts") == taken and again.seen == whole.seen[40:]
    expected = weights(whole)
    assert all(torch.equal(each, expected[name]) for name, each in weights(again).items())


def test_one_round_trains_as_on_the_choice_of_the_command(tmp_path: Path) -> None:
    options = {"pool": jsonl(tmp_path / "pool.jsonl", ROWS), "budget": "20%", "groups": "auto"}
    options["target"] = jsonl(tmp_path / "pairs.jsonl", [*TARGETS["capitals"], *TARGETS["plurals"]])
    words = [word for name, value in options.items() for word in (f"--{name}", value)]
    assert prism("select", "--model", MODEL, "--out", tmp_path / "run", *words).code == 0
    rows = load_dataset(
        "json",
        data_files=str(tmp_path / "run" / "selected.jsonl"),
        split="train",
        cache_dir=str(tmp_path / "cache"),
    )
    plain = trainer(tmp_path, [], rows, lora=LORA)
    once = trainer(tmp_path, [Careful(1, tmp_path / "out", **options)], lora=LORA)
    for each in (plain, once):
        each.train()
    assert chosen(tmp_path / "out" / "round-1") == chosen(tmp_path / "run") and len(rows) == 12
    assert once.seen == plain.seen
    expected = weights(plain)
    assert all(torch.equal(each, expected[name]) for name, each in weights(once).items())


def test_rounds_at_given_steps_with_workers_and_outside_mixed_precision(tmp_path: Path) -> None:
    careful = Careful([1], tmp_path / "out", pool=ROWS, target=TARGETS["capitals"], budget=4)
    settings = {"max_steps": 6, "per_device_train_batch_size": 1, "dataloader_num_workers": 1}
    made = trainer(tmp_path, [careful], bf16=True, **settings)
    made.train()
    drawn = [row for rows in steps(tmp_path / "out").values() for row in rows]
    assert [made.train_dataset["input_ids"][row] for row in drawn] == made.seen
    rounds = tmp_path / "out" / "round-1", tmp_path / "out" / "round-2"
    assert chosen(rounds[0]) == {*drawn[:4]} and chosen(rounds[1]) >= {*drawn[4:]}
    assert prism_select.Run(rounds[1]).manifest["engine"]["dtype"] == "float32"


STREAM = IterableDataset.from_generator(lambda: iter(ROWS))


@pytest.mark.parametrize(
    ("rounds", "settings", "says"),
    [
        (3, {"max_steps": -1, "num_train_epochs": 1}, "max_steps is missing"),
        (3, {"packing": True, "max_length": 64}, "packing"),
        (3, {"ignore_data_skip": True}, "ignore_data_skip"),
        (3, {"train_sampling_strategy": "sequential"}, "SequentialSampler"),
        (3, {"rows": STREAM}, "stream nothing"),
        (13, {}, "rounds=13"),
        (3, {"rows": Dataset.from_list(ROWS[:20])}, "20 rows and the pool 60"),
    ],
    ids=str,
)
def test_a_training_that_rounds_do_not_fit_is_refused_before_its_first_step(
    rounds: Any, settings: dict[str, Any], says: str, tmp_path: Path
) -> None:
    callback = Rounds(rounds, tmp_path / "out", pool=ROWS, target=TARGETS["capitals"], budget=4)
    with pytest.raises(ValueError, match=says):
        trainer(tmp_path, [callback], **settings).train()
    assert not (tmp_path / "out" / "steps.jsonl").exists()


@pytest.mark.parametrize("wrong", [0, 13, [0, 4], [4, 4], [8, 4], [4, 12]])
def test_rounds_are_at_even_distances_or_at_rising_steps(wrong: Any) -> None:
    steps_of = example("rounds").steps_of
    assert steps_of(3, 36) == steps_of([12, 24], 36) == [0, 12, 24]
    with pytest.raises(ValueError, match="rising steps below max_steps=12"):
        steps_of(wrong, 12)


def test_rounds_of_another_training_are_not_written_over(tmp_path: Path) -> None:
    (tmp_path / "out" / "round-1").mkdir(parents=True)
    callback = Rounds(3, tmp_path / "out", pool=ROWS, target=TARGETS["capitals"])
    with pytest.raises(ValueError, match="rounds of another training"):
        trainer(tmp_path, [callback]).train()
