"""Choosing again while training goes on: a callback for TRL's SFTTrainer.

    step 0        select at the model as it is          train on the choice
    every N       save, select at what it has become    train on the new choice

    rounds = Rounds(every=12, folder="rounds", pool="pool.jsonl", target="pairs.jsonl",
    model="MODEL", budget="5%") trainer = RoundsTrainer(rounds, model=…,
    args=SFTConfig(max_steps=36, …), train_dataset=pool, …) trainer.train()

Choices made here: the training set is the whole pool, in the order of its file, and a choice is
what the sampler draws from; so a new choice takes effect one batch late, since a batch is made
while the one before it is trained on. Every choice is a run folder of its own, `folder/step-N/run`,
with its checkpoint (or adapter) beside it."""

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

    def on_train_begin(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        self.choose(0, given["model"], given["processing_class"])

    def on_step_end(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        if (
            self.every
            and state.global_step % self.every == 0
            and state.global_step < state.max_steps
        ):
            self.choose(state.global_step, given["model"], given["processing_class"])

    def choose(self, step: int, model: Any, tokenizer: Any) -> None:
        place = self.folder / f"step-{step}"
        model.save_pretrained(place / "checkpoint")
        tokenizer.save_pretrained(place / "checkpoint")
        whole = not hasattr(model, "peft_config")
        options = self.options | {
            "model" if whole else "adapter": str(place / "checkpoint"),
            "out": str(place / "run"),
        }
        scores = prism_select.select(**options).scores
        each = zip(scores["row"].to_pylist(), scores["verdict"].to_pylist(), strict=True)
        self.chosen.rows = [row for row, verdict in each if verdict == "selected"]
        self.choices.append(self.chosen.rows)


class RoundsTrainer(SFTTrainer):
    """TRL's trainer, on the rows that `rounds` chose."""

    def __init__(self, rounds: Rounds, **given: Any) -> None:
        self.rounds = rounds
        super().__init__(**given, callbacks=[rounds])
        if len(self.train_dataset) != len(given["train_dataset"]):
            raise ValueError(
                "TRL dropped rows of which nothing is left to learn, so their numbers are not the pool's"
            )

    def _get_train_sampler(self, *_: Any) -> Chosen:
        return self.rounds.chosen
