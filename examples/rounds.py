"""Selecting again during training: a callback for TRL's SFTTrainer.

    step 0         select at the model as it is           train on the choice
    every N steps  save, select at what it has become     train on the new choice

    options = {"pool": "pool.jsonl", "target": "pairs.jsonl", "model": "MODEL", "budget": "5%"}
    rounds = Rounds(every=12, folder="rounds", **options)
    trainer = RoundsTrainer(rounds, model=…, args=SFTConfig(max_steps=36, …), train_dataset=pool)
    trainer.train()

Choices made here:
- the training set is the whole pool, in the order of its file; the sampler draws from the choice;
- a new choice takes effect one batch late: a batch is made while the one before it is trained on;
- every choice is a run folder of its own, `folder/step-N/run`, with its checkpoint (or adapter)
  beside it.
"""

import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from torch.utils.data import Sampler
from transformers import TrainerCallback
from trl.trainer.sft_trainer import SFTTrainer

import prism_select


class Chosen(Sampler[int]):
    """Rows of the present choice in random order, over and over; a new choice is drawn from at
    once."""

    def __init__(self, rows: Sequence[int] = (), seed: int = 0) -> None:
        self.rows, self.random = list(rows), random.Random(seed)

    def __iter__(self) -> Iterator[int]:
        while True:
            rows = self.rows
            for row in self.random.sample(rows, len(rows)):
                if rows is not self.rows:
                    break
                yield row

    def __len__(self) -> int:
        return 10**9  # it never ends: the trainer's max_steps says when to stop


class Rounds(TrainerCallback):  # type: ignore[misc]
    """Selects before the first step and, unless `every` is 0, again after every `every` steps.
    `options` are those of `prism select`; `model` is the checkpoint that training starts from."""

    def __init__(self, every: int, folder: str, seed: int = 0, **options: Any) -> None:
        self.every, self.folder, self.options = every, Path(folder), options
        self.chosen, self.choices = Chosen(seed=seed), list[list[int]]()

    def on_train_begin(self, args: Any, state: Any, control: Any, **objects: Any) -> None:
        self.choose(0, objects["model"], objects["processing_class"])

    def on_step_end(self, args: Any, state: Any, control: Any, **objects: Any) -> None:
        step = state.global_step
        if self.every and step % self.every == 0 and step < state.max_steps:
            self.choose(step, objects["model"], objects["processing_class"])

    def choose(self, step: int, model: Any, tokenizer: Any) -> None:
        folder = self.folder / f"step-{step}"
        model.save_pretrained(folder / "checkpoint")
        tokenizer.save_pretrained(folder / "checkpoint")
        option = "adapter" if hasattr(model, "peft_config") else "model"
        options = self.options | {option: folder / "checkpoint", "out": folder / "run"}
        scores = prism_select.select(**options).scores
        verdicts = scores["verdict"].to_pylist()
        self.chosen.rows = [row for row, verdict in enumerate(verdicts) if verdict == "selected"]
        self.choices.append(self.chosen.rows)


class RoundsTrainer(SFTTrainer):
    """TRL's trainer, on the rows that `rounds` chose."""

    def __init__(self, rounds: Rounds, **arguments: Any) -> None:
        self.rounds = rounds
        super().__init__(**arguments, callbacks=[rounds])
        if len(self.train_dataset) != len(arguments["train_dataset"]):
            raise ValueError(
                "TRL dropped rows without supervised tokens: rows no longer match the pool"
            )

    def _get_train_sampler(self, *_: Any) -> Chosen:
        return self.rounds.chosen
